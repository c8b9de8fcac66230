//! The image file: opened where it cannot escape, and looked at before the kernel's file systems parse it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::error::{Doing, Error, Result, Subject, errno_of};
use super::file_system::{FileSystem, SUPERBLOCK};
use super::mount::{Symlinks, explain_escape, open_directory_beneath};
use super::sif::{self, Partition};
use super::verity::Tree;

/// An image file that is open, and which file it is.
#[derive(Debug)]
pub struct Image {
    pub file: File,
    pub identity: ImageIdentity,
    pub content: Content,
}

/// What of a file must stay as it is while the file is mounted. Unlike [`ImageIdentity`] it does not change when the file gets another
/// name, owner or mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
pub struct ImageIdentity {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since 1970, 0 for earlier.
    pub changed: u64,
}

impl Image {
    /// What an open file is now, and when it was changed. On NFS the server is asked.
    pub fn look_again(file: &File) -> Result<(Content, u64)> {
        let stat =
            rustix::fs::statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)
                .doing(|| "look at an image again".into())?;
        let time = |time: rustix::fs::StatxTimestamp| nanoseconds(time.tv_sec, time.tv_nsec.into());
        let content = Content { inode: stat.stx_ino, size: stat.stx_size, modified: time(stat.stx_mtime) };
        Ok((content, time(stat.stx_ctime)))
    }

    /// A file of this node that has the bytes of an image which is elsewhere. It is told from other files by what it is and by when
    /// that image was `changed`, so that a device which was moved to it is the same as one that began with it.
    pub fn copy(file: File, content: Content, changed: u64) -> Result<Self> {
        let metadata = file.metadata().doing(|| "look at the copy of an image".into())?;
        if metadata.size() != content.size {
            let hint =
                format!("it has {} bytes in place of {}: somebody else wrote to it", metadata.size(), content.size);
            return Err(Error::new("open the copy of an image", Errno::NODATA).with_hint(hint));
        }
        let (device, inode) = (metadata.dev(), metadata.ino());
        Ok(Image { file, identity: ImageIdentity { device, inode, size: content.size, changed }, content })
    }

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
        Self::of(File::from(file), path)
    }

    /// The same where a device may be opened, as below the node's root directory: it is looked at before it is opened, for to open a watchdog and
    /// to close it is enough. Needs a /proc.
    pub fn open_on_node(base: impl AsFd, path: &str, symlinks: Symlinks) -> Result<Self> {
        let opening = || format!("open image {path}");
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(base, path, flags, Mode::empty(), symlinks.resolve());
        let found = File::from(found.doing(opening).map_err(explain_escape)?);
        if !found.metadata().map_err(|error| unreadable(path, errno_of(&error)))?.is_file() {
            return Self::of(found, path);
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(format!("/proc/self/fd/{}", found.as_raw_fd()), flags, Mode::empty());
        Self::of(File::from(file.doing(opening).map_err(|error| error.about(Subject::Image))?), path)
    }

    fn of(file: File, path: &str) -> Result<Self> {
        let metadata = file.metadata().map_err(|error| unreadable(path, errno_of(&error)))?;
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
                .about(Subject::Image)
                .with_hint(format!("an image is one regular file, this is {kind}")));
        }
        let (inode, size) = (metadata.ino(), metadata.size());
        let changed = nanoseconds(metadata.ctime(), metadata.ctime_nsec());
        let modified = nanoseconds(metadata.mtime(), metadata.mtime_nsec());
        Ok(Image {
            file,
            identity: ImageIdentity { device: metadata.dev(), inode, size, changed },
            content: Content { inode, size, modified },
        })
    }

    /// Reads the superblock and compares the size that it states with the file's; of a `sealed` image, with that of the data before its hash
    /// tree, of a SIF with that of its partition.
    ///
    /// The errors are those of a wrong file: `EMEDIUMTYPE` where the content is not of this type or has no hash tree, `ENODATA` where there
    /// is less of it than its superblock says.
    pub fn check(&self, path: &str, file_system: FileSystem, sealed: bool) -> Result<()> {
        if file_system == FileSystem::Sif
            && sif::is_sif(&self.head(0).map_err(|error| unreadable(path, errno_of(&error)))?)
        {
            let Partition { offset, size } = self.partition()?;
            return self.check_part(path, FileSystem::Squashfs, offset, size, " in its partition");
        }
        match sealed {
            true => {
                let there = Tree::find(&self.file, self.identity.size)?.data_size();
                self.check_part(path, file_system, 0, there, " before its hash tree")
            }
            false => self.check_part(path, file_system, 0, self.identity.size, ""),
        }
    }

    /// The part of a SIF that is mounted.
    pub fn partition(&self) -> Result<Partition> {
        sif::find(&self.file, self.identity.size)
    }

    /// The same for the bytes that begin at `offset` and are `there`.
    fn check_part(&self, path: &str, file_system: FileSystem, offset: u64, there: u64, place: &str) -> Result<()> {
        let head = self.head(offset).map_err(|error| unreadable(path, errno_of(&error)))?;
        match file_system.stated_size(&head) {
            None => Err(unreadable(path, Errno::MEDIUMTYPE).with_hint(format!(
                "this is not a {} image{place}: {}",
                file_system.name(),
                match FileSystem::recognise(&head) {
                    Some(other) if offset == 0 => format!("it is {}; name that as the file system type", other.name()),
                    Some(other) => format!("it is {}", other.name()),
                    None if head.is_empty() => "the file is empty".to_owned(),
                    None => "no known superblock is in its first 2 KiB".to_owned(),
                }
            ))),
            Some(size) if size > there => Err(unreadable(path, Errno::NODATA).with_hint(format!(
                "the image is truncated: its superblock states {size} bytes, the file has {there}{place}"
            ))),
            // drivers/block/loop.c: the rest of a sector at the end cannot be read.
            Some(size) if size > there / 512 * 512 => {
                Err(unreadable(path, Errno::NODATA).with_hint(format!(
                    "a loop device has whole sectors, and the image ends inside of one, at {size} bytes: make it without -nopad, or \
                     'truncate --size %512' it"
                )))
            }
            Some(_) => Ok(()),
        }
    }

    /// Whether what is mounted of a device with this image goes on when that gets another file (LOOP_CHANGE_FD): Linux 6.6 and newer shut
    /// down ext4 and xfs (fs/super.c, fs_bdev_mark_dead).
    pub fn is_movable(&self) -> Result<bool> {
        let head = self.head(0).doing(|| "read the superblock of an image".into())?;
        Ok(![FileSystem::Ext4, FileSystem::Xfs].iter().any(|it| it.stated_size(&head).is_some()))
    }

    /// The first bytes of what begins at `offset`.
    fn head(&self, offset: u64) -> std::io::Result<Vec<u8>> {
        let (mut head, mut block) = (Vec::new(), [0; SUPERBLOCK]);
        while head.len() < block.len() {
            match self.file.read_at(&mut block, offset + head.len() as u64)? {
                0 => break,
                length => head.extend_from_slice(&block[..length]),
            }
        }
        Ok(head)
    }
}

/// Makes an NFS client ask for the state of the directory that holds `path`: it believes a cached name for up to a minute
/// otherwise (nfs(5), `acdirmax`), and opens the file that had it.
fn revalidate_directory(base: impl AsFd, path: &str, symlinks: Symlinks) -> Result<()> {
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let directory = open_directory_beneath(base, directory, symlinks)?;
    rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)
        .doing(|| format!("look at the directory of {path}"))
        .map_err(|error| error.about(Subject::Image))?;
    Ok(())
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> u64 {
    u64::try_from(seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)).unwrap_or(0)
}

fn unreadable(path: &str, errno: Errno) -> Error {
    Error::new(format!("read image {path}"), errno).about(Subject::Image)
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
        image(&squashfs(2048)).1.check("image", FileSystem::Squashfs, false).unwrap();
        let error = image(&squashfs(2049)).1.check("image", FileSystem::Squashfs, false).unwrap_err();
        assert_eq!(error.errno(), Errno::NODATA);
        assert!(error.to_string().contains("states 2049 bytes, the file has 2048"), "{error}");
    }

    #[test]
    fn an_image_that_ends_inside_of_a_sector_is_refused_and_padding_is_none_of_it() {
        let with = |length: usize, used| {
            let mut content = squashfs(used);
            content.resize(length, 0);
            image(&content).1.check("image", FileSystem::Squashfs, false)
        };
        let error = with(2100, 2100).unwrap_err();
        assert!(error.to_string().contains("inside of one, at 2100 bytes"), "{error}");
        with(2100, 2048).unwrap();
        with(2560, 2100).unwrap();
    }

    #[test]
    fn a_squashfs_in_a_sif_is_checked_as_one_that_is_all_of_the_file() {
        let check = |content: &[u8], file_system| image(content).1.check("image", file_system, false);
        let sif = |used| sif::example(&squashfs(used), 36864, 1);
        check(&sif(2048), FileSystem::Sif).unwrap();
        assert_eq!(image(&sif(2048)).1.partition().unwrap(), Partition { offset: 36864, size: 2048 });
        for (content, file_system, errno, why) in [
            (sif(2049), FileSystem::Sif, Errno::NODATA, "the file has 2048 in its partition"),
            (sif(2048), FileSystem::Squashfs, Errno::MEDIUMTYPE, "it is sif; name that"),
            (squashfs(2048), FileSystem::Sif, Errno::MEDIUMTYPE, "not a sif image: it is squashfs; name that"),
            (
                sif::example(&[0; 2048], 36864, 1),
                FileSystem::Sif,
                Errno::MEDIUMTYPE,
                "not a squashfs image in its partition",
            ),
            (sif::example(&squashfs(2048), 36864, 5), FileSystem::Sif, Errno::MEDIUMTYPE, "an encrypted squashfs"),
        ] {
            let error = check(&content, file_system).unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn a_hash_tree_is_no_part_of_what_a_sealed_image_has() {
        let seal = |used| {
            let (directory, open) = image(&squashfs(used)[..].repeat(2));
            super::super::verity::seal(
                &File::options().read(true).write(true).open(directory.path().join("image")).unwrap(),
            )
            .unwrap();
            drop(open);
            let base = File::open(directory.path()).unwrap();
            (Image::open(&base, "image", Symlinks::Inside).unwrap(), directory)
        };
        seal(4096).0.check("image", FileSystem::Squashfs, true).unwrap();
        let (image, _directory) = seal(8192);
        image.check("image", FileSystem::Squashfs, false).unwrap();
        let error = image.check("image", FileSystem::Squashfs, true).unwrap_err();
        assert!(error.to_string().contains("4096 before its hash tree"), "{error}");
    }

    #[test]
    fn only_what_the_kernel_does_not_shut_down_is_moved() {
        let mut ext4 = vec![0; 2048];
        ext4[1024 + 56..1024 + 58].copy_from_slice(&0xEF53u16.to_le_bytes());
        assert!(!image(&ext4).1.is_movable().unwrap());
        assert!(image(&squashfs(2048)).1.is_movable().unwrap());
    }

    #[test]
    fn another_type_is_named() {
        let error = image(&squashfs(2048)).1.check("image", FileSystem::Erofs, false).unwrap_err();
        assert_eq!(error.errno(), Errno::MEDIUMTYPE);
        assert!(error.to_string().contains("it is squashfs"), "{error}");
    }

    #[test]
    fn an_empty_and_a_short_file_are_not_images() {
        assert!(
            image(b"")
                .1
                .check("image", FileSystem::Squashfs, false)
                .unwrap_err()
                .to_string()
                .contains("the file is empty")
        );
        assert_eq!(
            image(b"hsqs").1.check("image", FileSystem::Squashfs, false).unwrap_err().errno(),
            Errno::MEDIUMTYPE
        );
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
        let open = |path| Image::open_on_node(&base, path, Symlinks::Refused).map(drop).map_err(|error| error.errno());
        assert_eq!(open("dir"), Err(Errno::ISDIR));
        assert_eq!(open("absolute"), Err(Errno::LOOP));
        assert_eq!(open("absent"), Err(Errno::NOENT));
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert_eq!(open("file"), Ok(()));
        let dev = File::open("/dev").unwrap();
        assert_eq!(Image::open_on_node(dev, "null", Symlinks::Refused).unwrap_err().errno(), Errno::INVAL);
    }
}
