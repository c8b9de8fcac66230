# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# The ways that /images/$tree, or an image of it, can come to a node. To be sourced, after lib.sh. Each mounts it and calls
# $work with the directory; work again is "again"; what ends it has its name after "end_".

tree='' work=''
at=/var/lib/kubelet/by-hand
learned=/var/lib/kubelet/plugins/squashfs.csi.dev/learned
# shellcheck disable=SC2154 # of lib.sh
mkdir -p "$at"/{nfs,mnt} "$pods"
mounted=

run_in() {
    mounted=$1
    "$work" "$mounted"
}
again() { "$work" "$mounted"; }

mount_nfs() { mount -t nfs -o ro,vers=4.2 10.99.0.2:/images "$at/nfs"; }
files() {
    mount_nfs
    run_in "$at/nfs/$tree"
}
end_files() {
    umount "$at/nfs"
    disconnected
}

# by_hand IMAGE OPTION...: with mount(8), and these options of it.
by_hand() {
    mount_nfs
    mount "${@:2}" "$at/nfs/$1" "$at/mnt"
    run_in "$at/mnt"
}
end_by_hand() {
    umount "$at/mnt"
    end_files
}

# The kernels of both sides know how to be a disk of the network: NVMe over TCP.
nqn=nqn.2014-08.org.nvmexpress:uuid:5b1f0d2e-6a3c-4f2b-9d57-1c8e0a4b7f00
# offer_disk IMAGE: without the server's page cache (buffered_io), with which 6.12 answered some reads with an I/O error.
offer_disk() {
    local nvmet=/sys/kernel/config/nvmet
    modprobe -a nvmet-tcp nvme-tcp
    mount -t configfs configfs /sys/kernel/config
    mkdir -p $nvmet/subsystems/$nqn/namespaces/1 $nvmet/ports/1
    echo 1 >$nvmet/subsystems/$nqn/attr_allow_any_host
    echo "/images/$1" >$nvmet/subsystems/$nqn/namespaces/1/device_path
    echo 1 >$nvmet/subsystems/$nqn/namespaces/1/enable
    echo tcp >$nvmet/ports/1/addr_trtype
    echo ipv4 >$nvmet/ports/1/addr_adrfam
    echo 10.99.0.2 >$nvmet/ports/1/addr_traddr
    echo 4420 >$nvmet/ports/1/addr_trsvcid
    nsenter --net=/run/netns/nfs ln -s $nvmet/subsystems/$nqn $nvmet/ports/1/subsystems/
}
# disk: with that on it.
disk() {
    local _
    echo "transport=tcp,traddr=10.99.0.2,trsvcid=4420,nqn=$nqn,hostnqn=$nqn-node,hostid=5b1f0d2e-6a3c-4f2b-9d57-1c8e0a4b7f01" >/dev/nvme-fabrics
    for _ in {1..500}; do
        [ ! -b /dev/nvme0n1 ] || break
        sleep 0.01
    done
    mount -o ro /dev/nvme0n1 "$at/mnt"
    run_in "$at/mnt"
}
end_disk() {
    umount "$at/mnt"
    echo 1 >/sys/class/nvme/nvme0/delete_controller
}

# driver IMAGE ATTRIBUTE...
driver() {
    local of=(--mode MULTI_NODE_READER_ONLY --attribute server=10.99.0.2 --attribute share=/images --attribute "image=$1")
    shift
    for attribute; do
        of+=(--attribute "$attribute")
    done
    call stage image "${of[@]}"
    call publish image "$pods/1" "${of[@]}"
    run_in "$pods/1"
}
end_driver() {
    call unpublish image "$pods/1"
    call unstage image
    disconnected
}
# learn IMAGE ATTRIBUTE...: what this work reads of it.
learn() {
    rm -rf "$learned"
    driver "$@" >/dev/null
    end_driver
    until_learned "$learned"
}

# on_node IMAGE: a copy on the node's own disk.
on_node() {
    mount -o loop,ro "$at/$1" "$at/mnt"
    run_in "$at/mnt"
}
end_on_node() { umount "$at/mnt"; }

# measure LABEL WAY ARGUMENT...: from nothing mounted and cold caches, and once more if $twice says so.
twice=
measure() {
    cold
    reading "$1" "${@:2}"
    [ -z "$twice" ] || reading again again
    "end_$2"
}
