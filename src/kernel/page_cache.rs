//! What of a file is in the node's page cache, and how it comes there ahead of those who will read in it.

use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::error::{Doing, Error, Result, last_errno};

/// How much is asked for in one call at least, and at most.
const LEAST: u64 = 128 << 10;
const MOST: u64 = 1 << 20;
/// How many pages are asked for at a time.
const ASKED: usize = 1 << 16;

/// Reads parts of a file into the page cache, and waits for them. All of them are on their way at once, in calls of the size that the file
/// system likes, whatever its read-ahead is (readahead(2)). May wait for the file's server. The memory counts for the cgroup of who calls
/// this.
pub fn fill(file: &File, parts: &[Range<u64>]) -> Result<()> {
    // Of a file on NFS the size of its calls.
    let size = file.metadata().doing(|| "look at a file to be read ahead".into())?.blksize().clamp(LEAST, MOST);
    let pieces = || {
        let pieces_of = |part: &Range<u64>| {
            let end = part.end;
            (part.start..end).step_by(size as usize).map(move |start| start..end.min(start + size))
        };
        parts.iter().flat_map(pieces_of)
    };
    for piece in pieces() {
        read_ahead(file, piece)?;
    }
    let mut space = vec![0; size as usize];
    for Range { start, end } in pieces() {
        // Waits for what is on its way, and reads what the kernel left out.
        file.read_exact_at(&mut space[..(end - start) as usize], start).doing(|| "read a file ahead".into())?;
    }
    Ok(())
}

fn read_ahead(file: &File, part: Range<u64>) -> Result<()> {
    // SAFETY: readahead takes a file descriptor and two numbers.
    match unsafe { libc::readahead(file.as_raw_fd(), part.start as i64, (part.end - part.start) as usize) } {
        0 => Ok(()),
        _ => Err(Error::new("read a file ahead (readahead)", last_errno())),
    }
}

/// A file whose part in the page cache can be asked for, for as long as this lives. It takes no memory, and keeps the file open.
#[derive(Debug)]
pub struct Watched {
    start: NonNull<c_void>,
    size: usize,
    _file: File,
}

// SAFETY: nobody reads or writes where the mapping is: it stands for its file in questions to the kernel.
unsafe impl Send for Watched {}
// SAFETY: as above.
unsafe impl Sync for Watched {}

impl Watched {
    /// Asks the file's server; no later question does.
    ///
    /// A server that does not answer stops this call alone, unless it falls silent between the read and the mmap: there NFS may ask it once more, with
    /// the memory of the whole process locked. (Without a mapping only cachestat(2) tells what is cached, from Linux 6.5 on.)
    pub fn new(file: File, size: u64) -> Result<Self> {
        // What the server says now, NFS believes for some seconds.
        file.read_at(&mut [0], 0).doing(|| "read a file that is to be mapped".into())?;
        Watched::untouched(file, size)
    }

    /// The same, of a file that is not read before. Where it has a server, that may be asked with the memory of the process locked.
    pub fn untouched(file: File, size: u64) -> Result<Self> {
        let doing = || "map a file (mmap)".to_owned();
        let size = usize::try_from(size).ok().filter(|size| *size > 0).ok_or(Errno::INVAL).doing(doing)?;
        // SAFETY: a new mapping, of which no access is allowed.
        let start =
            unsafe { mmap(ptr::null_mut(), size, ProtFlags::empty(), MapFlags::SHARED, &file, 0) }.doing(doing)?;
        let start = NonNull::new(start).ok_or(Errno::NOMEM).doing(doing)?;
        Ok(Watched { start, size, _file: file })
    }

    /// The parts of the file that are in the page cache now, in their order (mincore(2)). Takes root or the file's owner: to
    /// others the kernel says that all of it is.
    pub fn cached(&self) -> Result<Vec<Range<u64>>> {
        let page = rustix::param::page_size();
        let (mut parts, mut pages) = (Vec::<Range<u64>>::new(), vec![0_u8; ASKED]);
        for at in (0..self.size).step_by(page * ASKED) {
            let length = (self.size - at).min(page * ASKED);
            // SAFETY: the part lies in the mapping, and has a page for each byte of the answer at most.
            let answer = unsafe { libc::mincore(self.start.as_ptr().byte_add(at), length, pages.as_mut_ptr()) };
            if answer != 0 {
                return Err(Error::new("ask for cached pages (mincore)", last_errno()));
            }
            for (number, _) in pages[..length.div_ceil(page)].iter().enumerate().filter(|(_, page)| *page & 1 != 0) {
                let start = at + number * page;
                let (start, end) = (start as u64, (start + page).min(self.size) as u64);
                match parts.last_mut().filter(|last| last.end == start) {
                    Some(last) => last.end = end,
                    None => parts.push(start..end),
                }
            }
        }
        Ok(parts)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // SAFETY: nothing points into the mapping.
        if let Err(errno) = unsafe { munmap(self.start.as_ptr(), self.size) } {
            tracing::error!(%errno, "unmap a file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_file_is_read_and_what_is_not_there_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * LEAST + 5).unwrap();
        for part in [0..0, 0..1, 7..LEAST + 9, 0..3 * LEAST + 5, 3 * LEAST..3 * LEAST + 5] {
            fill(&file, &[part]).unwrap();
        }
        fill(&file, &[]).unwrap();
        assert!(fill(&file, &[0..1, 3 * LEAST..3 * LEAST + 6]).is_err());
    }

    #[test]
    fn what_was_written_is_cached_and_what_nobody_touched_is_not() {
        let file = tempfile::tempfile().unwrap();
        // A hole of which nothing was ever read.
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[1; 8192], 1 << 20).unwrap();
        file.write_all_at(&[1], 2 << 20).unwrap();
        let watched = Watched::new(file, (4 << 20) - 5).unwrap();
        let cached = watched.cached().unwrap();
        assert!(cached[0].start == 0 && cached[0].end <= LEAST, "what was read to ask the server");
        assert_eq!(cached[1..], [1 << 20..(1 << 20) + 8192, 2 << 20..(2 << 20) + 4096]);
        assert!(Watched::new(tempfile::tempfile().unwrap(), 0).is_err());
    }
}
