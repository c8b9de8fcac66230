//! A directory that overlayfs writes to, as a layer of a container image (image-spec, layer.md).
//!
//! Whoever wrote what is in it may go on to change it: all is opened by one name in an open directory, without following a link, so that
//! nothing else is read; what changes meanwhile is an error. A tar that has its end is complete.

mod tar_out;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fgetxattr, flistxattr, fstat, openat, readlinkat, statat,
};
use rustix::io::Errno;
use tar::EntryType;

use tar_out::{Tar, size};

use crate::error::{Error, Kind, Result};
use crate::kernel::overlay::{is_opaque, is_whiteout};
use crate::kernel::{self, Subject, errno_of};

/// In a layer an empty file `.wh.NAME` stands for the removal of NAME, and this one for that of all that its directory had.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// `PATH_MAX` without its null byte, and the largest set of attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const LONGEST_PATH: usize = 4095;
const ATTRIBUTES: usize = 64 << 10;
/// The most bytes of all values of one file: the driver's container has little memory.
const MOST_OF_A_FILE: usize = 1 << 20;
/// The most bytes of names of files that have several: they are kept in memory.
const LINKS: usize = 8 << 20;

const CHANGED: &str = "it changed while it was read: stop what writes there, and try again";

/// Writes what is in `upper`. `left_out` is told what no layer can have.
pub fn write(upper: OwnedFd, out: impl Write, mut left_out: impl FnMut(&str)) -> Result<()> {
    let mut layer = Layer { tar: Tar::new(out), links: HashMap::new(), names: 0, buffer: vec![0; 128 << 10] };
    let mut levels = vec![layer.directory(upper.as_fd(), OsStr::new("."), b"")?];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.dir.read() else {
            level.check()?;
            levels.pop();
            continue;
        };
        let entry = entry.map_err(|errno| failed("list", &level.path, errno))?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let path = join(&level.path, name);
        if name.starts_with(WHITEOUT) {
            return Err(unfit(
                &path,
                "a layer can have no name that begins with \".wh.\", by which it says what is gone: rename it",
            ));
        }
        if path.len() > LONGEST_PATH {
            return Err(unfit(&path, "its path is longer than 4095 bytes"));
        }
        let (here, name) = (level.dir.fd().map_err(|errno| failed("read", &path, errno))?, OsStr::from_bytes(name));
        let stat = statat(here, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| failed("look at", &path, errno))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = layer.directory(here, name, &path)?;
                levels.push(below);
            }
            FileType::RegularFile => layer.file(here, name, &level.path, &path)?,
            FileType::Socket => left_out(&format!("{} is a socket: it is left out", shown(&path))),
            _ if is_whiteout(&stat) => layer.whiteout(&level.path, name)?,
            kind => layer.special(here, name, kind, &path, &stat)?,
        }
    }
    layer.tar.finish().map_err(not_written)
}

/// A directory whose entries are being read.
struct Level {
    dir: Dir,
    path: Vec<u8>,
    stat: Stat,
}

impl Level {
    fn check(&self) -> Result<()> {
        let now = self.dir.stat().map_err(|errno| failed("look at", &self.path, errno))?;
        if is_same(&self.stat, &now) { Ok(()) } else { Err(unfit(&self.path, CHANGED)) }
    }
}

struct Layer<W: Write> {
    tar: Tar<W>,
    /// Of files that have more names, by inode, the first one.
    links: HashMap<u64, Vec<u8>>,
    /// How many bytes these are.
    names: usize,
    buffer: Vec<u8>,
}

impl<W: Write> Layer<W> {
    /// Its own entry, and what is to be read of it.
    fn directory(&mut self, above: BorrowedFd<'_>, name: &OsStr, path: &[u8]) -> Result<Level> {
        let error = |errno| failed("read", path, errno);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(above, name, flags, Mode::empty()).map_err(error)?;
        let stat = fstat(&directory).map_err(error)?;
        let attributes = attributes(&directory, path)?;
        self.tar.entry(EntryType::Directory, &[path, b"/"].concat(), &stat, b"", attributes).map_err(not_written)?;
        if is_opaque(&directory).map_err(error)? {
            self.tar.empty(&join(path, OPAQUE)).map_err(not_written)?;
        }
        Ok(Level { dir: Dir::new(directory).map_err(error)?, path: path.to_vec(), stat })
    }

    fn file(&mut self, above: BorrowedFd<'_>, name: &OsStr, directory: &[u8], path: &[u8]) -> Result<()> {
        let error = |errno| failed("read", path, errno);
        // By now something else may have this name: NONBLOCK, because to open a FIFO would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mut file = File::from(openat(above, name, flags, Mode::empty()).map_err(error)?);
        let stat = fstat(&file).map_err(error)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(unfit(path, CHANGED));
        }
        if kernel::overlay::is_whiteout_file(&file, &stat).map_err(error)? {
            return self.whiteout(directory, name);
        }
        if let Some(first) = self.first_name(&stat, path)? {
            return self.tar.entry(EntryType::Link, path, &stat, &first, Vec::new()).map_err(not_written);
        }
        let attributes = attributes(&file, path)?;
        self.tar.entry(EntryType::Regular, path, &stat, b"", attributes).map_err(not_written)?;
        let (size, mut left) = (size(&stat), size(&stat));
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let length = match file.read(&mut self.buffer[..most]) {
                Ok(0) => return Err(unfit(path, CHANGED)),
                Ok(length) => length,
                Err(interrupted) if interrupted.kind() == io::ErrorKind::Interrupted => continue,
                Err(other) => return Err(error(errno_of(&other))),
            };
            self.tar.data(&self.buffer[..length]).map_err(not_written)?;
            left -= length as u64;
        }
        if !is_same(&stat, &fstat(&file).map_err(error)?) {
            return Err(unfit(path, CHANGED));
        }
        self.tar.pad(size).map_err(not_written)
    }

    /// A symbolic link, a FIFO or a device.
    fn special(&mut self, above: BorrowedFd<'_>, name: &OsStr, kind: FileType, path: &[u8], stat: &Stat) -> Result<()> {
        if let Some(first) = self.first_name(stat, path)? {
            return self.tar.entry(EntryType::Link, path, stat, &first, Vec::new()).map_err(not_written);
        }
        let (kind, to) = match kind {
            FileType::Symlink => {
                let to = readlinkat(above, name, Vec::new()).map_err(|errno| failed("read", path, errno))?;
                (EntryType::Symlink, to.into_bytes())
            }
            FileType::Fifo => (EntryType::Fifo, Vec::new()),
            FileType::CharacterDevice => (EntryType::Char, Vec::new()),
            FileType::BlockDevice => (EntryType::Block, Vec::new()),
            _ => return Err(unfit(path, "it is of a kind that is not known")),
        };
        self.tar.entry(kind, path, stat, &to, Vec::new()).map_err(not_written)
    }

    fn whiteout(&mut self, directory: &[u8], name: &OsStr) -> Result<()> {
        self.tar.empty(&join(directory, &[WHITEOUT, name.as_bytes()].concat())).map_err(not_written)
    }

    /// The other name of a file that was met before.
    fn first_name(&mut self, stat: &Stat, path: &[u8]) -> Result<Option<Vec<u8>>> {
        if stat.st_nlink < 2 {
            return Ok(None);
        }
        if let Some(first) = self.links.get(&stat.st_ino) {
            return Ok(Some(first.clone()));
        }
        self.names += path.len() + size_of::<(u64, Vec<u8>)>();
        if self.names > LINKS {
            return Err(unfit(path, "there are more files with several names than are kept in memory"));
        }
        self.links.insert(stat.st_ino, path.to_vec());
        Ok(None)
    }
}

/// Those that say something about what is in the image, and not about this machine or this overlay.
fn attributes(file: impl AsFd, path: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let (mut kept, mut names, mut sum) = (Vec::new(), vec![0; ATTRIBUTES], 0);
    match flistxattr(&file, &mut names[..]) {
        Ok(length) => names.truncate(length),
        Err(Errno::OPNOTSUPP) => return Ok(kept),
        Err(errno) => return Err(failed("list the attributes of", path, errno)),
    }
    let is_kept =
        |name: &&str| *name == "security.capability" || name.starts_with("user.") && !name.starts_with("user.overlay.");
    for name in names.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok()).filter(is_kept) {
        if name.contains('=') {
            return Err(unfit(path, "a tar can have no attribute with a '=' in its name"));
        }
        let mut value = vec![0; ATTRIBUTES];
        let length =
            fgetxattr(&file, name, &mut value[..]).map_err(|errno| failed("read an attribute of", path, errno))?;
        value.truncate(length);
        value.shrink_to_fit();
        sum += length;
        if sum > MOST_OF_A_FILE {
            return Err(unfit(path, "it has more than 1 MiB of attributes"));
        }
        kept.push((format!("SCHILY.xattr.{name}"), value));
    }
    kept.sort();
    Ok(kept)
}

/// As far as the times tell that the kernel sets by itself.
fn is_same(one: &Stat, other: &Stat) -> bool {
    let of = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec);
    of(one) == of(other)
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// A path as others may see it.
fn shown(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}

fn unfit(path: &[u8], why: &str) -> Error {
    Error::new(Kind::FailedPrecondition, format!("{}: {why}", shown(path)))
}

fn failed(action: &str, path: &[u8], errno: Errno) -> Error {
    let error = kernel::Error::new(format!("{action} {}", shown(path)), errno).about(Subject::Image);
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::NXIO => error.with_hint(CHANGED).into(),
        _ => error.into(),
    }
}

fn not_written(error: io::Error) -> Error {
    Error::new(Kind::Internal, format!("write the layer: {error}"))
}
