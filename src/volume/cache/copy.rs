//! The bytes of one image, from its server to the node's disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::Advice;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::original::Original;
use super::store::Part;
use crate::error::{Error, Kind};
use crate::kernel::image::Image;
use crate::lock::lock;
use crate::metrics;
use crate::spec::Digest;

/// How much is read at a time; more than that it never waits for (see [`Progress::ask`]). A whole number of the blocks of any disk, as `O_DIRECT` wants it (open(2)).
const CHUNK: usize = 1 << 20;
const ALIGNMENT: usize = 4096;
/// How much may be lost when the power is cut, and wait in the node's memory for the disk.
const SYNCED: u64 = 8 << 20;

/// Why there is no copy.
pub struct Failure {
    pub error: Error,
    /// What is on the disk already will be of use.
    pub goes_on: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, goes_on: false }
    }
}

/// How far a copy is, for who looks from outside.
#[derive(Debug, Default)]
pub struct Progress {
    pub bytes: AtomicU64,
    /// Since when the server owes an answer.
    asked: Mutex<Option<Instant>>,
}

impl Progress {
    /// The server is asked for at most a MiB, until the answer is dropped.
    pub fn ask(self: &Arc<Self>) -> Asked {
        *lock(&self.asked) = Some(Instant::now());
        Asked(Arc::clone(self))
    }

    /// How long the server has owed what it was asked for; zero where that is nothing.
    pub fn owed(&self) -> Duration {
        lock(&self.asked).map(|since| since.elapsed()).unwrap_or_default()
    }
}

pub struct Asked(Arc<Progress>);

impl Drop for Asked {
    fn drop(&mut self) {
        *lock(&self.0.asked) = None;
    }
}

/// Copies `source` into `part`, from where an earlier process was, and looks at what is on the disk in the end. `rate` is the most bytes to
/// read in a second.
///
/// Nothing of it stays in the node's page cache: the source is read past it where its file system can do that.
pub fn copy(
    source: &File,
    part: &mut Part,
    rate: Option<u64>,
    progress: &Arc<Progress>,
) -> std::result::Result<Digest, Failure> {
    let original = part.entry.original.clone();
    let unread = |error: io::Error| Failure {
        error: Error::new(Kind::Unavailable, format!("read {}: {error}", original.name)),
        goes_on: true,
    };
    let asked = progress.ask();
    let source = past_the_cache(source).map_err(unread)?;
    drop(asked);
    let mut space = vec![0; CHUNK + ALIGNMENT];
    let start = space.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut space[start..start + CHUNK];
    let mut sum = Sha256::new();
    // Whole chunks alone, as `O_DIRECT` begins where a block does.
    let mut at = part.entry.synced / CHUNK as u64 * CHUNK as u64;
    read_again(part.file(), at, buffer, |bytes| sum.update(bytes)).map_err(|error| part.failed("read", &error))?;
    part.file().set_len(at).map_err(|error| part.failed("write", &error))?;
    progress.bytes.store(at, Ordering::Relaxed);
    let (began, first) = (Instant::now(), at);
    while at < original.size {
        let asked = progress.ask();
        let length = read_full(&source, buffer, at).map_err(unread)?.min((original.size - at) as usize);
        drop(asked);
        if length == 0 {
            return Err(changed(&original).into());
        }
        sum.update(&buffer[..length]);
        part.file().write_all_at(&buffer[..length], at).map_err(|error| part.failed("write", &error))?;
        at += length as u64;
        metrics::cache().copied_bytes.inc_by(length as u64);
        progress.bytes.store(at, Ordering::Relaxed);
        if at - part.entry.synced >= SYNCED || at == original.size {
            part.sync(at).map_err(|error| part.failed("write", &error))?;
        }
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64((at - first) as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(began.elapsed()));
        }
    }
    let asked = progress.ask();
    let now = Image::look_again(&source);
    drop(asked);
    match now {
        Ok(now) if now == (original.content(), original.changed) => {}
        Ok(_) => return Err(changed(&original).into()),
        Err(error) => return Err(Failure { error: error.into(), goes_on: true }),
    }
    let digest = Digest(sum.finalize().into());
    match verify(part.file(), original.size).map_err(|error| part.failed("read", &error))? {
        on_disk if on_disk == digest => Ok(digest),
        on_disk => {
            let message = format!("copy {}: {digest} was written, and the disk has {on_disk}: it fails", original.name);
            Err(Error::new(Kind::Aborted, message).into())
        }
    }
}

fn changed(original: &Original) -> Error {
    let message = format!("copy {}: it was changed or replaced on the server meanwhile", original.name);
    Error::new(Kind::Aborted, message)
}

/// The digest of `size` bytes on the disk; what was in memory of them is dropped before.
pub fn verify(file: &File, size: u64) -> io::Result<Digest> {
    let mut sum = Sha256::new();
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    read_again(file, size, &mut vec![0; CHUNK], |bytes| sum.update(bytes))?;
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    Ok(Digest(sum.finalize().into()))
}

/// The first `size` bytes of a file of the node.
fn read_again(file: &File, size: u64, buffer: &mut [u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let most = buffer.len().min((size - at) as usize);
        match file.read_at(&mut buffer[..most], at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => {
                each(&buffer[..length]);
                at += length as u64;
            }
        }
    }
    Ok(())
}

/// The same file, read past the page cache. One that the kernel cannot read so is read as it is.
fn past_the_cache(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let open = |flags| std::fs::OpenOptions::new().read(true).custom_flags(flags).open(&path);
    match open(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0),
        file => file,
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], at + length as u64) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // At the end of the file, behind its last block.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && length > 0 => break,
            Err(error) => return Err(error),
        }
        // A part of a block is the last of the file, and the kernel takes no offset inside of one.
        if length % ALIGNMENT != 0 {
            break;
        }
    }
    Ok(length)
}
