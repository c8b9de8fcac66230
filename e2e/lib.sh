# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What a node has of the driver, for the tests that run in the virtual machine: a line for each. To be sourced.

# But those that each pod has, for its token.
mounts() { awk 'index($5, "/var/lib/kubelet/") == 1 && $5 !~ "/kubernetes[.]io~(projected|secret)/"' /proc/1/mountinfo; }
nfs_mounts() { awk '/ - nfs4? /' /proc/1/mountinfo; }
loop_devices() { losetup --noheadings --list --output NAME; }
connections() { ss -tnH state established '( dport = :2049 )'; }
records() { find /var/lib/kubelet/plugins/squashfs.csi.dev/published -mindepth 1 -maxdepth 1 2>/dev/null || true; }
left() { mounts && nfs_mounts && loop_devices && connections && records; }

# Says what is left, if something is. The kernel closes a connection a moment after its last user went.
nothing_left() {
    local _
    for _ in {1..100}; do
        [ -n "$(left)" ] || return 0
        sleep 0.1
    done
    echo "left:" >&2
    left >&2
    return 1
}
