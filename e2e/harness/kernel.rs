//! What the kernel has, seen with other eyes than the driver's.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc;

use super::run;

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

/// The path of a loop device's file, as the kernel shows it; a device that is just going has none.
pub fn backing_file(device: &str) -> Option<String> {
    let file = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")).ok()?;
    Some(file.trim_end().to_owned())
}

/// The mount table of a driver's own namespace, which only an open file of the driver leads to.
pub fn private_mounts(pid: u32) -> Vec<String> {
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let namespaces = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_private = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("mnt:[") && link != own)
    };
    let namespace = fs::File::open(namespaces.into_iter().find(is_private).expect("a namespace")).unwrap();
    let (entered, is_entered) = mpsc::channel();
    let (read, is_read) = mpsc::channel::<()>();
    let visitor = std::thread::spawn(move || {
        // SAFETY: this thread alone changes its file system context and namespace; no memory is touched.
        let thread = unsafe {
            assert_eq!(libc::unshare(libc::CLONE_FS), 0);
            assert_eq!(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS), 0);
            libc::gettid()
        };
        entered.send(thread).unwrap();
        is_read.recv().unwrap();
    });
    let thread = is_entered.recv().unwrap();
    let table = fs::read_to_string(format!("/proc/self/task/{thread}/mountinfo")).unwrap();
    read.send(()).unwrap();
    visitor.join().unwrap();
    table.lines().map(Into::into).collect()
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

/// The remote procedure calls that this node's NFS client has sent, but for those by which it keeps its lease now and then.
///
/// Their sum is the kernel's: nfsstat does not know READ_PLUS, by which NFS 4.2 reads.
pub fn rpcs() -> u64 {
    let counters = fs::read_to_string("/proc/net/rpc/nfs").unwrap();
    let all = counters.lines().find_map(|line| line.strip_prefix("rpc ")?.split(' ').next()).unwrap();
    let calls = run("nfsstat", &["-c", "-l"]);
    let calls = calls.lines().filter_map(|line| line.strip_prefix("nfs v")?.split_once("client")?.1.split_once(':'));
    let lease = calls.filter(|(call, _)| ["sequence", "renew"].contains(&call.trim()));
    all.parse::<u64>().unwrap() - lease.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum::<u64>()
}

/// Cleans up after a scenario that failed, so that the next one is not blamed.
pub fn unmount_below(directory: &Path) {
    for line in mounts_below(directory).iter().rev() {
        let path = line.split(' ').nth(4).unwrap();
        let _ = std::process::Command::new("umount").args(["-l", path]).status();
    }
}
