//! What the kernel says that a device is of.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use linux_raw_sys::ioctl::BLKGETDISKSEQ;
use linux_raw_sys::loop_device::{LOOP_GET_STATUS64, loop_info64};
use rustix::io::Errno;

use super::backing_file;

/// What a device is of. The kernel asks its file system for the inode's number, for which NFS asks no server, and others do: while one of
/// those hangs, who asks hangs with it. So a device is asked once for each time that it is given a file.
pub(super) fn status(number: u32, fd: &OwnedFd) -> std::result::Result<loop_info64, Errno> {
    static KNOWN: Mutex<BTreeMap<u32, (Attachment, loop_info64)>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let attachment = Attachment::now(number, fd);
    if let Some((of, info)) = known().get(&number)
        && attachment.as_ref() == Some(of)
    {
        return Ok(*info);
    }
    // SAFETY: an integer-only C struct, for which all zeroes is a value.
    let mut info: loop_info64 = unsafe { std::mem::zeroed() };
    // SAFETY: LOOP_GET_STATUS64 fills one loop_info64.
    unsafe {
        let status = rustix::ioctl::Updater::<{ LOOP_GET_STATUS64 as _ }, _>::new(&mut info);
        rustix::ioctl::ioctl(fd.as_fd(), status)
    }?;
    // Unless another process put another file in its place meanwhile.
    if let Some(attachment) = attachment.filter(|before| Attachment::now(number, fd).as_ref() == Some(before)) {
        known().insert(number, (attachment, info));
    }
    Ok(info)
}

/// One time that a device was given a file.
#[derive(Debug, PartialEq, Eq)]
struct Attachment {
    /// The kernel counts them, of all block devices together.
    sequence: u64,
    backing_file: Option<String>,
}

impl Attachment {
    /// That of an open device; `None` before Linux 5.15, which does not count. Asks no file system.
    fn now(number: u32, fd: &OwnedFd) -> Option<Self> {
        // SAFETY: BLKGETDISKSEQ fills one u64.
        let sequence = unsafe {
            let sequence = rustix::ioctl::Getter::<{ BLKGETDISKSEQ as _ }, u64>::new();
            rustix::ioctl::ioctl(fd.as_fd(), sequence)
        };
        Some(Attachment { sequence: sequence.ok()?, backing_file: backing_file(number) })
    }
}
