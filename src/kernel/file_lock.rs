//! Locks that machines share: on a file of an NFS mount its server keeps them, and who works on the server itself sees them too.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::error::{Doing, Result, last_errno};

/// Who else may have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Others of this kind. The file must be open for reading.
    Shared,
    /// Nobody. The file must be open for writing.
    Alone,
}

/// Locks a file until it is closed, or the process ends; `false` where another has it in a way that forbids it. Asks the server of the
/// file.
///
/// By `F_OFD_SETLK` (fcntl(2)): flock(2) on NFS is a lock of this kind on the server, but not one on the server itself (nfs(5)). `ENOLCK` and
/// others say that the file system has no locks.
pub fn try_lock(file: &File, lock: Lock) -> Result<bool> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Alone => libc::F_WRLCK,
    };
    // SAFETY: zeroes are a `struct flock`: of the whole file, by no process.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = kind as libc::c_short;
    whole.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the kernel reads the structure, and writes nothing.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } {
        0 => Ok(true),
        _ => match last_errno() {
            Errno::AGAIN | Errno::ACCESS => Ok(false),
            errno => Err(errno).doing(|| "lock a file (F_OFD_SETLK)".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_a_file_and_a_writer_has_it_alone_until_it_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, two, three) = (open(), open(), open());
        assert!(try_lock(&one, Lock::Shared).unwrap() && try_lock(&two, Lock::Shared).unwrap());
        assert!(!try_lock(&three, Lock::Alone).unwrap());
        drop((one, two));
        assert!(try_lock(&three, Lock::Alone).unwrap());
        assert!(!try_lock(&open(), Lock::Shared).unwrap());
    }
}
