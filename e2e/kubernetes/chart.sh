# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# The driver as `helm install` brings it into the cluster of one node of `node`. To be sourced.

# shellcheck disable=SC2034 # those who source this use what is set here
driver=squashfs.csi.dev
server=192.168.3.253
chart=/root/charts/csi-driver-squashfs
registry=/var/lib/kubelet/plugins_registry
patience=${PATIENCE:-600}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd /root || exit
# shellcheck source=e2e/lib.sh
. /root/lib.sh

say() { echo "scenarios: $*"; }
# because REASON: what is said of a scenario that fails, once more at the end.
because() { echo "$*" >/root/out/because; }
fail() { say "$*" >&2; because "$*"; exit 1; }

# eventually WHAT COMMAND...: waits until the command succeeds.
eventually() {
    local what=$1 deadline=$((SECONDS + patience))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || fail "not within $patience s: $what"
        sleep 1
    done
}

wait_for() { kubectl wait --timeout "${patience}s" --for "$@"; }
delete() { kubectl delete --timeout "${patience}s" "$@"; }

# ---------------------------------------------------------------- the driver

# install [ARGUMENT]... as an admin does, once more to change it. Inline volumes are off by default.
install() {
    helm upgrade --install csi-driver-squashfs "$chart" --namespace kube-system --set inlineVolumes.enabled=true \
        --wait --timeout "${patience}s" "$@"
}

uninstall() { helm uninstall csi-driver-squashfs --namespace kube-system --wait --timeout "${patience}s" "$@"; }

node_pod=(--namespace kube-system --selector app.kubernetes.io/component=node)
node_log() { kubectl logs "${node_pod[@]}" --container driver --tail=-1; }
restarts() { kubectl get pods "${node_pod[@]}" --output 'jsonpath={.items[0].status.containerStatuses[0].restartCount}'; }
listed() { kubectl get csinode node-1 --output 'jsonpath={.spec.drivers[*].name}' | grep -qxF "$driver"; }
registrations() { node_log | grep -cF 'the kubelet registered the driver' || true; }
registered() { [ "$(registrations)" -gt "$1" ]; }
restarted() { [ "$(restarts)" -gt "$1" ]; }

# The images of the chart, under the names that it gives them: the one of `make image`, or else of the program in PATH.
load_images() {
    local image program archive
    for image in $(helm template csi-driver-squashfs "$chart" | awk '$1 == "image:" { print $2 }' | sort -u); do
        program=csi-driver-squashfs
        [[ $image != *csi-provisioner* ]] || program=csi-provisioner
        archive=/root/$program-amd64.tar
        if [ ! -e "$archive" ]; then
            mkdir -p "image/$program"
            cp "$(command -v "$program")" "image/$program"
            "$here/image" "$image" "image/$program" "/$program" >"$archive"
        fi
        ctr --namespace k8s.io images import --index-name "$image" "$archive"
    done
}

diagnose() {
    kubectl get pods --all-namespaces --output wide
    kubectl get events --all-namespaces --field-selector 'type=Warning,reason!=MissingClusterDNS'
    node_log | tail -n 30
    csi-driver-squashfs status
}

# The server has the address that the examples name.
nfs-server exec ip address replace "$server/32" dev eth0
ip route replace "$server/32" via "$NFS_SERVER"
