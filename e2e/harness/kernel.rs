//! What the kernel has, seen with other eyes than the driver's.

use std::fs;
use std::path::Path;

use super::run;

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

/// The lines of the mount table with a mount point below `directory`.
pub fn mounts_below(directory: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = |line: &&str| line.split(' ').nth(4).is_some_and(|path| Path::new(path).starts_with(directory));
    table.lines().filter(below).map(Into::into).collect()
}

/// The line of the mount table for one mount point.
pub fn mount_line(target: &Path) -> String {
    let mut lines = mounts_below(target);
    assert_eq!(lines.len(), 1, "{} is mounted {} times", target.display(), lines.len());
    lines.remove(0)
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

/// Cleans up after a scenario that failed, so that the next one is not blamed.
pub fn unmount_below(directory: &Path) {
    for line in mounts_below(directory).iter().rev() {
        let path = line.split(' ').nth(4).unwrap();
        let _ = std::process::Command::new("umount").args(["-l", path]).status();
    }
}
