//! The mount table (proc_pid_mountinfo(5)).

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags};

use super::error::{Doing, Result};
use super::{device_mapper, loop_device};

/// One line of mountinfo; octal escapes are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    pub id: u64,
    pub parent: u64,
    /// `major:minor` of the file system's device; `7:N` is a loop device.
    pub device: (u32, u32),
    pub mount_point: String,
    pub options: String,
    /// Mounts below it appear in other namespaces too (mount_namespaces(7)).
    pub shared: bool,
    pub fs_type: String,
    pub source: String,
    pub super_options: String,
}

impl MountInfo {
    /// The number of the loop device that is mounted, or that a device stands on which is.
    pub fn loop_device(&self) -> Option<u32> {
        loop_device_of(self.device)
    }
}

/// The number of the loop device on which files with this `st_dev` are.
pub fn loop_device_below(device: u64) -> Option<u32> {
    loop_device_of((rustix::fs::major(device), rustix::fs::minor(device)))
}

fn loop_device_of(device: (u32, u32)) -> Option<u32> {
    match device {
        (loop_device::MAJOR, number) => Some(number),
        // Of no device, as NFS and overlay.
        (0, _) => None,
        device => device_mapper::loop_device_below(device),
    }
}

/// The mounts that this process sees.
pub fn read() -> Result<Vec<MountInfo>> {
    read_file("/proc/self/mountinfo")
}

/// The mounts that the calling thread sees.
pub(super) fn read_thread() -> Result<Vec<MountInfo>> {
    read_file("/proc/thread-self/mountinfo")
}

/// The same where the calling thread has no /proc of its own: `proc` is an open one.
pub(super) fn read_thread_by(proc: BorrowedFd<'_>) -> Result<Vec<MountInfo>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(proc, "thread-self/mountinfo", flags, Mode::empty());
    let mut text = Vec::new();
    File::from(file.doing(|| "open the mount table".into())?)
        .read_to_end(&mut text)
        .doing(|| "read the mount table".into())?;
    Ok(parse_table(&text))
}

fn read_file(path: &str) -> Result<Vec<MountInfo>> {
    Ok(parse_table(&std::fs::read(path).doing(|| format!("read {path}"))?))
}

fn parse_table(text: &[u8]) -> Vec<MountInfo> {
    String::from_utf8_lossy(text).lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<MountInfo> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    let (id, parent) = (mount.next()?.parse().ok()?, mount.next()?.parse().ok()?);
    let (major, minor) = mount.next()?.split_once(':')?;
    let mut mount = mount.skip(1);
    let (mount_point, options) = (mount.next()?, mount.next()?);
    let shared = mount.any(|field| field.starts_with("shared:"));
    let mut file_system = file_system.split(' ');
    Some(MountInfo {
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        mount_point: unescape(mount_point),
        options: options.to_owned(),
        shared,
        fs_type: file_system.next()?.to_owned(),
        source: unescape(file_system.next()?),
        super_options: file_system.next().unwrap_or_default().to_owned(),
    })
}

/// Resolves `\040` and its like: the kernel writes space, tab, newline and backslash so.
pub(super) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                bytes.push(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_escapes_is_read() {
        let line = r"36 35 7:3 / /mnt/a\040b rw,nosuid master:1 shared:2 - squashfs /dev/loop3 ro,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, (7, 3)));
        assert_eq!(mount.mount_point, "/mnt/a b");
        assert_eq!((mount.options.as_str(), mount.shared), ("rw,nosuid", true));
        assert_eq!(mount.fs_type, "squashfs");
        assert_eq!(mount.source, "/dev/loop3");
        assert_eq!(mount.super_options, "ro,errors=continue");
    }

    #[test]
    fn a_broken_line_is_no_mount() {
        assert_eq!(parse("36 35 7:3 /"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_machine_has_a_root_mount() {
        assert!(read().unwrap().iter().any(|mount| mount.mount_point == "/"));
    }
}
