//! What the kernel has, seen with other eyes than the driver's.

use std::fs;
use std::path::Path;

use super::{run, wait_for};

/// The loop devices that have a file.
pub fn loop_devices() -> Vec<String> {
    let mut devices: Vec<_> = fs::read_dir("/sys/block")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("loop").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    devices.sort();
    devices
}

/// The lines of the mount table with a mount point below the kubelet's directory, but for the directory's own.
pub fn kubelet_mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = |line: &&str| line.split(' ').nth(4).is_some_and(|path| path.starts_with("/var/lib/kubelet/"));
    table.lines().filter(below).map(Into::into).collect()
}

/// The line of the mount table for one mount point.
pub fn mount_line(target: &Path) -> String {
    let target = target.to_str().unwrap();
    let lines = kubelet_mounts();
    let mut lines = lines.iter().filter(|line| line.split(' ').nth(4) == Some(target));
    let line = lines.next().unwrap_or_else(|| panic!("{target} is not mounted"));
    assert!(lines.next().is_none(), "{target} is mounted twice");
    line.clone()
}

/// The NFS mounts in the host's mount table: there must be none.
pub fn visible_nfs_mounts() -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.contains(" - nfs4 ") || line.contains(" - nfs ")).count()
}

/// The connections of this node to an NFS server; an established connection is an NFS client of the kernel.
pub fn nfs_connections() -> usize {
    run("ss", &["-tnH", "state", "established", "( dport = :2049 )"]).lines().count()
}

/// The remote procedure calls that this node's NFS client has sent.
pub fn rpcs() -> u64 {
    let text = fs::read_to_string("/proc/net/rpc/nfs").unwrap();
    let line = text.lines().find(|line| line.starts_with("rpc ")).unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

/// Fails unless all that the drivers made is gone; the kernel closes a connection a moment after its last user went.
pub fn assert_nothing_left() {
    assert_eq!(kubelet_mounts(), [""; 0], "mounts are left");
    let in_vm = std::env::var_os("NFS_SERVER").is_some();
    wait_for("loop devices and connections to go", || loop_devices().is_empty() && (!in_vm || nfs_connections() == 0));
}

/// Cleans up after a scenario that failed, so that the next one is not blamed.
pub fn unmount_below(directory: &Path) {
    for line in kubelet_mounts().iter().rev() {
        let path = line.split(' ').nth(4).unwrap();
        if Path::new(path).starts_with(directory) {
            let _ = std::process::Command::new("umount").args(["-l", path]).status();
        }
    }
}
