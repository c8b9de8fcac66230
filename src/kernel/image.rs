//! The image file: opened where it cannot escape, and looked at before the kernel's file systems parse it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{Doing, Error, Result};
use super::mount::{Symlinks, explain_escape, open_directory_beneath};

/// An image file that is open, and which file it is.
#[derive(Debug)]
pub struct Image {
    pub file: File,
    pub identity: Identity,
    pub content: Content,
}

/// What of a file must stay as it is while the file is mounted. Unlike [`Identity`] it does not change when the file gets another
/// name, owner or mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since 1970, 0 for earlier.
    pub modified: u64,
}

/// Tells one content of one file from every other, as far as stat(2) can.
///
/// A file that is written over, or replaced by another with the same inode number, changes its size or change time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since 1970, 0 for earlier.
    pub changed: u64,
}

impl Image {
    /// Opens the regular file `path` below `base`, which it cannot leave (openat2(2)).
    ///
    /// On NFS the server says which file that is now, whatever the client has cached.
    pub fn open(base: impl AsFd, path: &str, symlinks: Symlinks) -> Result<Self> {
        revalidate_directory(&base, path, symlinks)?;
        // NONBLOCK: opening a FIFO would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(base, path, flags, Mode::empty(), symlinks.resolve())
            .doing(|| format!("open image {path}"))
            .map_err(explain_escape)?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(|error| io_error(path, &error))?;
        let kind = metadata.file_type();
        if !kind.is_file() {
            let (kind, errno) = if kind.is_dir() {
                ("a directory", Errno::ISDIR)
            } else if kind.is_fifo() {
                ("a FIFO", Errno::INVAL)
            } else {
                ("not a regular file", Errno::INVAL)
            };
            return Err(Error::new(format!("open image {path}"), errno)
                .with_hint(format!("an image is one regular file, this is {kind}")));
        }
        let (inode, size) = (metadata.ino(), metadata.size());
        let changed = nanoseconds(metadata.ctime(), metadata.ctime_nsec());
        let modified = nanoseconds(metadata.mtime(), metadata.mtime_nsec());
        Ok(Image {
            file,
            identity: Identity { device: metadata.dev(), inode, size, changed },
            content: Content { inode, size, modified },
        })
    }

    /// Reads the superblock and compares the size that it states with the file's.
    ///
    /// The errors are those of a wrong file: `EMEDIUMTYPE` where the content is not of this type, `ENODATA` where there is less of it
    /// than its superblock says.
    pub fn check(&self, path: &str, fs_type: &str) -> Result<()> {
        let mut head = Vec::new();
        let mut block = [0; 2048];
        while head.len() < block.len() {
            match self.file.read_at(&mut block, head.len() as u64) {
                Ok(0) => break,
                Ok(length) => head.extend_from_slice(&block[..length]),
                Err(error) => return Err(io_error(path, &error)),
            }
        }
        match stated_size(&head, fs_type) {
            None => Err(Error::new(format!("read image {path}"), Errno::MEDIUMTYPE).with_hint(format!(
                "this is not a {fs_type} image: {}",
                match recognise(&head) {
                    Some(other) => format!("it is {other}; name that as the file system type"),
                    None if head.is_empty() => "the file is empty".to_owned(),
                    None => "no known superblock is in its first 2 KiB".to_owned(),
                }
            ))),
            Some(size) if size > self.identity.size => Err(Error::new(format!("read image {path}"), Errno::NODATA)
                .with_hint(format!(
                    "the image is truncated: its superblock states {size} bytes, the file has {}",
                    self.identity.size
                ))),
            Some(_) => Ok(()),
        }
    }
}

/// Makes an NFS client ask for the state of the directory that holds `path`: it believes a cached name for up to a minute
/// otherwise (nfs(5), `acdirmax`), and opens the file that had it.
fn revalidate_directory(base: impl AsFd, path: &str, symlinks: Symlinks) -> Result<()> {
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let directory = open_directory_beneath(base, directory, symlinks)?;
    rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)
        .doing(|| format!("look at the directory of {path}"))?;
    Ok(())
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> u64 {
    u64::try_from(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)).unwrap_or(0)
}

fn io_error(path: &str, error: &std::io::Error) -> Error {
    Error::new(format!("read image {path}"), Errno::from_io_error(error).unwrap_or(Errno::IO))
}

fn recognise(head: &[u8]) -> Option<&'static str> {
    ["squashfs", "erofs", "ext4", "xfs"].into_iter().find(|fs_type| stated_size(head, fs_type).is_some())
}

/// The bytes that the superblock in `head` (the first 2 KiB) says the image has; `None` if it is not of this type.
fn stated_size(head: &[u8], fs_type: &str) -> Option<u64> {
    let bytes = |at: usize, length: usize| head.get(at..at + length);
    let little = |at, length| Some(bytes(at, length)?.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
    let big = |at, length| Some(bytes(at, length)?.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
    match fs_type {
        // fs/squashfs/squashfs_fs.h: magic, version 4.0, bytes_used.
        "squashfs" => (bytes(0, 4)? == b"hsqs" && little(28, 4)? == 4).then(|| little(40, 8))?,
        // fs/erofs/erofs_fs.h: magic, blkszbits, blocks.
        "erofs" => {
            let shift = little(1024 + 12, 1)?;
            (little(1024, 4)? == 0xE0F5_E1E2 && shift < 32).then(|| little(1024 + 36, 4))?.map(|blocks| blocks << shift)
        }
        // Documentation/filesystems/ext4/super.rst: s_magic, s_blocks_count (its high half with the 64bit feature), s_log_block_size.
        "ext4" => {
            let shift = little(1024 + 24, 4)?;
            let high = if little(1024 + 96, 4)? & 0x80 != 0 { little(1024 + 0x150, 4)? } else { 0 };
            let blocks = little(1024 + 4, 4)? | high << 32;
            (little(1024 + 56, 2)? == 0xEF53 && shift < 8).then(|| blocks.saturating_mul(1024 << shift))
        }
        // fs/xfs/libxfs/xfs_format.h: sb_magicnum, sb_blocksize, sb_dblocks, all big-endian.
        "xfs" => (bytes(0, 4)? == b"XFSB").then(|| Some(big(4, 4)?.saturating_mul(big(8, 8)?)))?,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squashfs(bytes_used: u64) -> Vec<u8> {
        let mut head = vec![0; 2048];
        head[..4].copy_from_slice(b"hsqs");
        head[28] = 4;
        head[40..48].copy_from_slice(&bytes_used.to_le_bytes());
        head
    }

    fn image(content: &[u8]) -> (tempfile::TempDir, Image) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("image"), content).unwrap();
        let base = File::open(directory.path()).unwrap();
        let image = Image::open(&base, "image", Symlinks::Inside).unwrap();
        (directory, image)
    }

    #[test]
    fn a_whole_image_passes_and_a_truncated_one_is_refused() {
        image(&squashfs(2048)).1.check("image", "squashfs").unwrap();
        let error = image(&squashfs(2049)).1.check("image", "squashfs").unwrap_err();
        assert_eq!(error.errno(), Errno::NODATA);
        assert!(error.to_string().contains("states 2049 bytes, the file has 2048"), "{error}");
    }

    #[test]
    fn another_type_is_named() {
        let error = image(&squashfs(2048)).1.check("image", "erofs").unwrap_err();
        assert_eq!(error.errno(), Errno::MEDIUMTYPE);
        assert!(error.to_string().contains("it is squashfs"), "{error}");
    }

    #[test]
    fn an_empty_and_a_short_file_are_not_images() {
        assert!(image(b"").1.check("image", "squashfs").unwrap_err().to_string().contains("the file is empty"));
        assert_eq!(image(b"hsqs").1.check("image", "squashfs").unwrap_err().errno(), Errno::MEDIUMTYPE);
    }

    #[test]
    fn a_directory_is_not_an_image_and_no_path_leaves_its_base() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("dir")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../etc/passwd", directory.path().join("parent")).unwrap();
        let base = File::open(directory.path()).unwrap();
        let open = |path| Image::open(&base, path, Symlinks::Inside).unwrap_err().errno();
        assert_eq!(open("dir"), Errno::ISDIR);
        assert_eq!(open("absolute"), Errno::XDEV);
        assert_eq!(open("parent"), Errno::XDEV);
        assert_eq!(open("absent"), Errno::NOENT);
    }
}
