//! Files in the node's page cache, ahead of those who will read in them.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::error::{Doing, Error, Result, last_errno};

/// How much is asked for in one call at least, and at most.
const LEAST: u64 = 128 << 10;
const MOST: u64 = 1 << 20;

/// Reads a part of a file into the page cache, and waits for it. All of it is on its way at once, in calls of the size that its file system
/// likes, whatever its read-ahead is (readahead(2)). May wait for the file's server. The memory counts for the cgroup of who calls this.
pub fn fill(file: &File, part: Range<u64>) -> Result<()> {
    // Of a file on NFS the size of its calls.
    let size = file.metadata().doing(|| "look at a file to be read ahead".into())?.blksize().clamp(LEAST, MOST);
    let pieces = || (part.start..part.end).step_by(size as usize).map(|start| start..part.end.min(start + size));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_file_is_read_and_what_is_not_there_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * LEAST + 5).unwrap();
        for part in [0..0, 0..1, 7..LEAST + 9, 0..3 * LEAST + 5, 3 * LEAST..3 * LEAST + 5] {
            fill(&file, part).unwrap();
        }
        assert!(fill(&file, 3 * LEAST..3 * LEAST + 6).is_err());
    }
}
