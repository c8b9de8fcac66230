# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the parts of `make bench` have in common. To be sourced, in the virtual machine.

# shellcheck disable=SC2034 # those who source this use what is set here
driver=
export CSI_ENDPOINT=unix:///run/csi.sock
pods=/var/lib/kubelet/pods
cd /root || exit
# shellcheck source=e2e/lib.sh
. /root/lib.sh

sum() { awk '{ all += $1 } END { print all + 0 }' "$@"; }
# NFS calls, and reads of a disk that is one of the network (without what it takes to have that).
calls() {
    {
        awk '$1 == "rpc" { print $2 }' /proc/net/rpc/nfs
        cat /sys/block/nvme0n1/stat 2>/dev/null || true
    } | sum
}
# Hundredths of a second that the threads of the NFS servers took.
nfsd() { cat /proc/[0-9]*/stat 2>/dev/null | awk '$2 == "(nfsd)" { all += $14 + $15 } END { print all + 0 }'; }
link() { echo "$(calls) $(sum /sys/class/net/nfs[01]/statistics/rx_bytes) $(sum /sys/class/net/nfs[01]/statistics/tx_bytes) $(nfsd)"; }

# The kernel closes a connection a moment after its last user went.
disconnected() {
    local _
    for _ in {1..200}; do
        [ -n "$(connections)" ] || return 0
        sleep 0.05
    done
    echo "bench: the NFS mount is still there" >&2
    return 1
}

# Waits for a socket of a process.
listening() {
    while ! [ -S "$1" ]; do
        kill -0 "$2" || return
        sleep 0.05
    done
}
# start_driver [ARGUMENT]...
start_driver() {
    csi-driver-squashfs node --node-id node-1 --endpoint "$CSI_ENDPOINT" --log-level warn "$@" 2>driver.log &
    driver=$!
    listening /run/csi.sock $driver || { cat driver.log >&2; return 1; }
}

stop_driver() {
    kill "$driver"
    wait "$driver"
    driver=
    rm -f /run/csi.sock
}

# call METHOD ARGUMENT...: makes a CSI call; sets $took and $connected, in ms.
call() {
    local answer
    answer=$(./csi "$@") || { cat driver.log >&2; return 1; }
    [[ $answer =~ ^[A-Za-z]+:\ OK\ in\ ([0-9.]+)\ ms\ \(connected\ in\ ([0-9.]+) ]]
    # shellcheck disable=SC2034
    took=${BASH_REMATCH[1]} connected=${BASH_REMATCH[2]}
}

# until_learned DIRECTORY: the driver writes there once a volume's last pod is gone.
until_learned() {
    until ls "$1"/*.json >/dev/null 2>&1; do
        sleep 0.2
    done
}

# timed COMMAND...: sets $took, in ms.
timed() {
    local start=${EPOCHREALTIME/./}
    "$@"
    local end=${EPOCHREALTIME/./}
    local us=$((end - start))
    printf -v took '%d.%03d' $((us / 1000)) $((us % 1000))
}

model=$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)
case $model in
    *TCG*) how="a virtual machine, emulated without KVM: compare the columns, not with other machines" ;;
    *) how="a virtual machine" ;;
esac
echo "machine: $model, $(nproc) CPUs, $((($(sed -n 's/MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo) + 512) / 1024)) MiB," \
    "Linux $(uname -r); $how"

# cold: as if nothing had ever been read, on the server too, and nothing were known of the link.
cold() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    ip tcp_metrics flush
    nfs-server exec ip tcp_metrics flush
}

# A tree of small files.
small_files() {
    mkdir lower
    cp -a /usr/lib/python3.13 /usr/share lower
}
# What is read of a directory.
all_files() { (cd "$1" && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' cat | wc -c); }
each_tenth() { (cd "$1" && find . -type f -printf '%P\n' | LC_ALL=C sort | awk 'NR % 10 == 0' | xargs -d '\n' cat | wc -c); }

# delayed MS: a round trip to the server takes that much longer.
round_trip=0
delayed() {
    round_trip=$1
    nfs-server restore
    [ "$1" = 0 ] || nfs-server delay "$(awk "BEGIN { print $1 / 2 }")"
}

# reading WAY COMMAND...: prints calls, KiB received, KiB sent, seconds and those of a processor that nfsd took, here and as CSV. The
# command says what it read: that has to be $read. What is read again has its way's name with "again" in the CSV.
csv=/root/$(basename "$0").csv
echo "section,round trip in ms,way,calls,KiB received,KiB sent,seconds,seconds of nfsd" >"$csv"
section='' read='' way=''
# heading SECTION TITLE
heading() {
    section=$1
    printf '\n%s\n  %-44s %8s %9s %9s %8s %8s\n' "$2" "" calls "KiB recv" "KiB sent" seconds nfsd
}
reading() {
    local label=$1 before after numbers
    shift
    read -ra before < <(link)
    timed "$@" >was_read
    read -ra after < <(link)
    [ "$(<was_read)" = "$read" ] || { echo "bench: $label: '$(<was_read)' was read, not '$read'" >&2; return 1; }
    numbers=("$((after[0] - before[0]))" "$(((after[1] - before[1]) / 1024))" "$(((after[2] - before[2]) / 1024))" \
        "$(awk "BEGIN { printf \"%.1f\", $took / 1000 }")" "$(awk "BEGIN { printf \"%.2f\", (${after[3]} - ${before[3]}) / 100 }")")
    # Of another server the kernel does not say what it takes.
    [ "$1" != disk ] || numbers[4]=
    printf '  %-44s %8d %9d %9d %8.1f %8s\n' "$label" "${numbers[@]}"
    if [ "$label" = again ]; then way="$way, again"; else way=$label; fi
    (IFS=,; echo "\"$section\",$round_trip,\"$way\",${numbers[*]}") >>"$csv"
}
# done_with_readings: says what is true of all tables, and keeps the CSV, which is complete now.
done_with_readings() {
    cat <<TEXT

  From nothing mounted and cold caches, on the server too, to the last byte. The driver's time includes two starts of the client
  that makes the CSI calls. What is read ahead is in its row as far as it had come by the end of it. Bytes are those of the link, with
  headers as the link sees them. nfsd's time is what its threads took of a processor. Each row is one run: seconds of the next one differ,
  by as much as a tenth.
TEXT
    mv "$csv" /root/out
}
