//! A file system of a given size in a file: a writable layer that cannot fill the disk it lies on.
//!
//! No mkfs(8) is started: a small ext4 that it made once is written into the file, and the kernel lets it grow (`EXT4_IOC_RESIZE_FS`,
//! fs/ext4/resize.c). The template is what these print (e2fsprogs 1.47):
//!
//! ```text
//! truncate --size 16M image
//! E2FSPROGS_FAKE_TIME=1764115200 mke2fs -F -t ext4 -b 4096 -I 256 -N 8192 -m 0 -M '' -J size=4 -O none,has_journal,ext_attr,dir_index,\
//! filetype,meta_bg,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum -E lazy_itable_init=1,\
//! lazy_journal_init=1,nodiscard,hash_seed=5c7a1e6e-2b2f-4b0d-9f0e-6f1f6f5b1d11 -U 8f1c2b5e-7d43-4e39-a6f0-3b0c2a6b9d52 image
//! od --address-radix x --format x1 image
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::error::{Doing, Error, Result};
use super::loop_device::LoopDevice;
use super::mount::{self, DetachedMount, MountAttrFlags, NewMount};

/// The smallest that there is: the template's.
pub const SMALLEST: u64 = 16 << 20;

const TEMPLATE: &str = include_str!("scratch/ext4.template");
const BLOCK: u64 = 4096;
/// `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u64>(b'f', 16);

/// Mounts the file system in `path`, which is made where it is not there yet, with all that was written to it before; it holds at most
/// `size` bytes, its own structures included. Space of the disk is taken as it is written to, and given back as files are deleted.
///
/// `EAGAIN` says that it is mounted already: a file must not be two devices.
pub fn mount(path: &Path, size: u64) -> Result<DetachedMount> {
    let file = open(path, size).doing(|| format!("make the file system {}", path.display()))?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .doing(|| format!("lock {}", path.display()))
        .map_err(|error| error.with_hint("the kernel still lets go of an earlier mount of it"))?;
    // The device has the file open, and with it the lock.
    let device = LoopDevice::writable(&file)?;
    let new =
        NewMount::new("ext4", format!("ext4 on {}", device.path().display())).set("source", device.path().display());
    let mount = mount::create(new.flag("discard").set("errors", "remount-ro"))?;
    grow(mount.as_fd(), size / BLOCK)?;
    Ok(mount)
}

/// The same file system once more, read-only, while it is mounted; `None` where it is not.
pub fn look_into(path: &Path) -> Result<Option<DetachedMount>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file: File = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file.into(),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::new(format!("open {}", path.display()), errno)),
    };
    // The kernel shows paths as the driver that attached it sees them.
    let end: PathBuf = path.iter().skip(path.iter().count().saturating_sub(2)).collect();
    let Some(device) = LoopDevice::writing_to(&file, &format!("/{}", end.display()))? else { return Ok(None) };
    let what = || format!("ext4 on {} again, read-only", device.path().display());
    let new = || NewMount::new("ext4", what()).set("source", device.path().display());
    // A superblock is found only by who wants it as it is: `rw`, or `ro` after an error on the disk.
    match mount::create(new().with(MountAttrFlags::MOUNT_ATTR_RDONLY)) {
        Err(error) if error.errno() == Errno::BUSY => mount::create(new().read_only()),
        mounted => mounted,
    }
    .map(Some)
}

/// A new file appears whole or not at all: its name is the last step.
fn open(path: &Path, size: u64) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => return Ok(file.into()),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let new = path.with_extension("new");
    let file: File = rustix::fs::open(&new, flags | OFlags::CREATE | OFlags::TRUNC, Mode::RUSR | Mode::WUSR)?.into();
    file.set_len(size.max(SMALLEST))?;
    write_template(&file)?;
    file.sync_data()?;
    std::fs::rename(new, path)?;
    Ok(file)
}

/// Writes what is not zero: each line is an address and 16 bytes, and a star repeats the line above up to the next address (od(1)).
fn write_template(file: &File) -> io::Result<()> {
    let (mut last, mut bytes, mut repeated) = (0, [0; 16], false);
    for line in TEMPLATE.lines() {
        if line == "*" {
            repeated = true;
            continue;
        }
        let mut numbers = line.split(' ');
        let number = |text: &str| u64::from_str_radix(text, 16).map_err(io::Error::other);
        let address = number(numbers.next().unwrap_or_default())?;
        if repeated && bytes != [0; 16] {
            let count = usize::try_from((address - last) / 16 - 1).map_err(io::Error::other)?;
            file.write_all_at(&bytes.repeat(count), last + 16)?;
        }
        (last, repeated) = (address, false);
        for (byte, text) in bytes.iter_mut().zip(numbers) {
            *byte = u8::from_str_radix(text, 16).map_err(io::Error::other)?;
        }
        // The last line is the size.
        if bytes != [0; 16] && line.contains(' ') {
            file.write_all_at(&bytes, address)?;
        }
    }
    Ok(())
}

/// Does nothing where the file system has that many blocks, as one that was mounted before.
fn grow(mount: BorrowedFd<'_>, blocks: u64) -> Result<()> {
    let action = || format!("let the file system grow to {blocks} blocks (EXT4_IOC_RESIZE_FS)");
    let root = rustix::fs::openat(mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let root = root.doing(action)?;
    // SAFETY: the kernel reads one u64, and writes nothing.
    let grown = unsafe {
        let resize = rustix::ioctl::Setter::<{ EXT4_IOC_RESIZE_FS }, u64>::new(blocks);
        rustix::ioctl::ioctl(&root, resize)
    };
    grown.map_err(|errno| match errno {
        Errno::PERM => Error::new(action(), errno).with_hint("this needs CAP_SYS_RESOURCE"),
        _ => Error::new(action(), errno),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::file_system::{FileSystem, SUPERBLOCK};

    #[test]
    fn the_template_is_an_ext4_of_the_smallest_size_in_a_file_of_the_size_that_is_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        let file = open(&path, 1 << 30).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 30);
        let mut head = [0; SUPERBLOCK];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(FileSystem::Ext4.stated_size(&head), Some(SMALLEST));
        // The end of a bitmap: what lies behind the last block is taken.
        let mut taken = [0; 16];
        let line = TEMPLATE.lines().find(|line| line.ends_with(&" ff".repeat(16))).unwrap();
        let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
        file.read_exact_at(&mut taken, address + 16).unwrap();
        assert_eq!(taken, [0xff; 16]);
        // What is there already is what a pod wrote.
        file.write_all_at(b"x", 0).unwrap();
        let mut first = [0];
        open(&path, 1 << 30).unwrap().read_exact_at(&mut first, 0).unwrap();
        assert_eq!(&first, b"x");
    }
}
