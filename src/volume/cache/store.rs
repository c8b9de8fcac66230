//! The directory of the copies. It is the one truth about them: every process reads it anew, and none remembers.
//!
//! A copy is two files: `ID.json` ([`Entry`]) and the bytes, in `ID.part` while they come in and in `ID.image` when they are complete and
//! on the disk. Who uses either file has it locked (flock(2)); a loop device holds the open file that it was given, and with it the lock,
//! so that the kernel says which copies are in use, whichever process attached them. Changes of which files there are are made under a
//! lock on the directory.

mod part;
mod room;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

pub use part::Part;
pub use room::Bounds;

use super::original::{Entry, Name, Original, is_id};
use crate::error::{Error, Kind, Result};
use crate::kernel::loop_device::Attached;

/// The file that says whose directory it is.
const OWNER: &str = "driver";
/// What files of a copy are, in the order in which they are removed.
const KINDS: &[&str] = &["json", "new", "image", "part"];

/// An open directory of copies.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    directory: OwnedFd,
}

impl Store {
    /// Makes the directory where it is not there, and looks whether it can be trusted with what pods run.
    pub fn new(path: &Path, driver_name: &str) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| Error::file("make directory", path, &error))?;
        let store = Store::open(path)?;
        if !store.is_there(OWNER) {
            let files = store.files().map_err(store.failed("list", ""))?;
            let is_strange = |name: &&String| ![".", "..", "lost+found"].contains(&name.as_str());
            // Somebody else of this driver may have made it his meanwhile.
            if let Some(other) = files.iter().find(is_strange).filter(|_| !store.is_there(OWNER)) {
                return Err(store.unfit(&format!("{other} is in it: give the driver one of its own, which is empty")));
            }
        }
        let written = || {
            let file = File::from(rustix::fs::openat(
                &store.directory,
                OWNER,
                OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::RUSR | Mode::WUSR,
            )?);
            let mut owner = String::new();
            (&file).take(256).read_to_string(&mut owner)?;
            if owner.is_empty() {
                file.write_all_at(driver_name.as_bytes(), 0)?;
                owner = driver_name.to_owned();
            }
            Ok(owner)
        };
        match written().map_err(|error| Error::file("look whose is", path, &error))? {
            owner if owner == driver_name => Ok(store),
            owner => Err(store.unfit(&format!("it is that of the driver {owner}: each needs one of its own"))),
        }
    }

    /// The directory as it is, of any driver.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::LOOP | Errno::NOTDIR) => {
                let why = format!("the directory of copies {} is a symlink or no directory", path.display());
                return Err(Error::new(Kind::FailedPrecondition, why));
            }
            Err(errno) => return Err(Error::file("open directory", path, &errno.into())),
        };
        let store = Store { path: path.to_owned(), directory };
        let looked = || Ok((rustix::fs::fstat(&store.directory)?, rustix::fs::fstatfs(&store.directory)?));
        let (stat, file_system) = looked().map_err(|errno: io::Error| Error::file("look at", path, &errno))?;
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(store.unfit(&format!("it is owned by user {}, and not by the driver's", stat.st_uid)));
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(store.unfit("others may write to it: 'chmod go-w' it"));
        }
        if let Some((name, _)) = REMOTE.iter().find(|(_, magic)| file_system.f_type as u32 == *magic) {
            return Err(store.unfit(&format!("it is on {name}: copies belong on a disk of the node")));
        }
        Ok(store)
    }

    fn unfit(&self, why: &str) -> Error {
        Error::new(Kind::FailedPrecondition, format!("the directory of copies {}: {why}", self.path.display()))
    }

    fn failed(&self, action: &str, name: &str) -> impl Fn(io::Error) -> Error {
        let path = self.path.join(name);
        move |error| Error::file(action, &path, &error)
    }

    fn failed_copy(&self, action: &str, original: &Original, error: &io::Error) -> Error {
        Error::file(&format!("{action} the copy of {} in", original.name), &self.path, error)
    }

    /// Others wait until the answer is dropped.
    fn lock(&self) -> Result<File> {
        self.lock_directory().map_err(self.failed("lock", ""))
    }

    fn lock_directory(&self) -> io::Result<File> {
        let directory = self.open_at(".", OFlags::RDONLY | OFlags::DIRECTORY)?;
        flock(&directory, FlockOperation::LockExclusive)?;
        Ok(directory)
    }

    /// How many bytes of the disk nobody has taken.
    fn free(&self) -> io::Result<u64> {
        let disk = rustix::fs::fstatvfs(&self.directory)?;
        Ok(disk.f_bavail * disk.f_frsize)
    }

    fn open_at(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// All copies, complete or not, the one that was used last at the end. A description that is torn or of no use is passed over.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        self.entries_by(|_| true)
    }

    /// Those of this name.
    pub fn entries_of(&self, name: &Name) -> Result<Vec<Entry>> {
        let prefix = format!("{}-", name.prefix());
        let mut entries = self.entries_by(|file| file.starts_with(&prefix))?;
        entries.retain(|entry| entry.original.name == *name);
        Ok(entries)
    }

    fn entries_by(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for name in self.files().map_err(self.failed("list", ""))? {
            if let Some((id, "json")) = split(&name).filter(|(id, _)| wanted(id))
                && let Some(entry) = self.read(id).map_err(self.failed("read", &name))?
            {
                entries.push(entry);
            }
        }
        entries.sort_by_key(|(used, _)| *used);
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }

    fn files(&self) -> io::Result<Vec<String>> {
        let mut files = Vec::new();
        for entry in Dir::read_from(&self.directory)? {
            // No name of ours is anything but ASCII.
            files.extend(entry?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(files)
    }

    /// What is said of a copy, and when it was used last.
    fn read(&self, id: &str) -> io::Result<Option<(SystemTime, Entry)>> {
        let mut text = Vec::new();
        let file = match self.open_at(&format!("{id}.json"), OFlags::RDONLY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        (&file).take(64 << 10).read_to_end(&mut text)?;
        let entry = serde_json::from_slice::<Entry>(&text).ok().filter(|entry| entry.original.id() == id);
        entry.map(|entry| Ok((file.metadata()?.modified()?, entry))).transpose()
    }

    /// Says it of a copy, at once and for good; for who has the lock.
    fn write(&self, entry: &Entry) -> io::Result<()> {
        let id = entry.original.id();
        let new = format!("{id}.new");
        let mut file = self.open_at(&new, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)?;
        file.write_all(&serde_json::to_vec(entry)?)?;
        file.sync_all()?;
        self.rename(&new, &format!("{id}.json"))
    }

    fn rename(&self, old: &str, new: &str) -> io::Result<()> {
        rustix::fs::renameat(&self.directory, old, &self.directory, new)?;
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    /// The complete copy of this image, locked against eviction while it is open; now it was used.
    pub fn get(&self, original: &Original) -> Result<Option<(Entry, File)>> {
        self.take(original, true)
    }

    /// The same for who only looks at it: that is no use.
    pub fn peek(&self, original: &Original) -> Result<Option<(Entry, File)>> {
        self.take(original, false)
    }

    fn take(&self, original: &Original, is_use: bool) -> Result<Option<(Entry, File)>> {
        let id = original.id();
        let open = || {
            let Some((_, entry)) = self.read(&id)?.filter(|(_, entry)| entry.is_complete()) else { return Ok(None) };
            let file = self.open_at(&format!("{id}.image"), OFlags::RDONLY)?;
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                // It is on its way out.
                Err(Errno::WOULDBLOCK) => return Ok(None),
                locked => locked?,
            }
            if file.metadata()?.nlink() == 0 {
                // It went before it was locked.
                return Ok(None);
            }
            if is_use {
                self.open_at(&format!("{id}.json"), OFlags::RDONLY)?.set_modified(SystemTime::now())?;
            }
            Ok(Some((entry, file)))
        };
        match open() {
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => Ok(None),
            answer => answer.map_err(self.failed("open", &id)),
        }
    }

    /// Writes down that the server has this image by its name and no other, or none at all. What cannot be marked as of the past, as on a full
    /// disk, is forgotten.
    pub fn confirm(&self, name: &Name, original: Option<&Original>) -> Result<()> {
        let id = original.map(Original::id);
        let is_wrong = |entry: &Entry| entry.superseded == (Some(entry.original.id()) == id);
        if !self.entries_of(name)?.iter().any(is_wrong) {
            return Ok(());
        }
        // Read again where nobody changes it: a copy may have been completed meanwhile.
        let _lock = self.lock()?;
        let mut first_error = None;
        for mut entry in self.entries_of(name)?.into_iter().filter(is_wrong) {
            entry.superseded = !entry.superseded;
            let id = entry.original.id();
            let written = self.write(&entry).or_else(|error| match entry.superseded {
                // Who uses it keeps it.
                true if !self.unlink_unused(&id)? => self.unlink_one(&id, "json"),
                true => Ok(()),
                false => Err(error),
            });
            if let Err(error) = written {
                first_error.get_or_insert(self.failed("write", &id)(error));
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// The ID of the copy that a loop device stands on, if it does on one of this directory. It may have been thrown away since.
    pub fn below(&self, device: &Attached) -> Option<String> {
        let file = device.backing_file.as_deref()?;
        let (file, is_gone) = file.strip_suffix(" (deleted)").map_or((file, false), |file| (file, true));
        let name = file.rsplit('/').next()?;
        let (id, _) = split(name).filter(|(_, kind)| *kind == "image")?;
        let stat = match is_gone {
            true => rustix::fs::fstat(&self.directory),
            false => rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW),
        };
        let stat = stat.ok()?;
        let is_it = stat.st_dev == device.identity.device && (is_gone || stat.st_ino == device.identity.inode);
        is_it.then(|| id.to_owned())
    }

    /// The same as the path of the image on its server, where that is still known.
    pub fn image_below(&self, device: &Attached) -> Option<String> {
        let id = self.below(device)?;
        let entry = self.read(&id).ok().flatten();
        Some(entry.map_or_else(|| format!("of the copy {id}"), |(_, entry)| entry.original.name.file()))
    }

    fn is_there(&self, name: &str) -> bool {
        rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Removes a copy unless a loop device or a process has it; says whether it did.
    fn unlink_unused(&self, id: &str) -> io::Result<bool> {
        // Nobody begins to use it until it is gone.
        let mut locked = Vec::new();
        for kind in ["part", "image"] {
            match self.open_at(&format!("{id}.{kind}"), OFlags::RDONLY) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(file) => match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::WOULDBLOCK) => return Ok(false),
                    Err(errno) => return Err(errno.into()),
                    Ok(()) => locked.push(file),
                },
            }
        }
        self.unlink(id).map(|()| true)
    }

    /// The description goes first: nobody finds what is left without it but the sweep.
    fn unlink(&self, id: &str) -> io::Result<()> {
        KINDS.iter().try_for_each(|kind| self.unlink_one(id, kind))
    }

    fn unlink_one(&self, id: &str, kind: &str) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, format!("{id}.{kind}"), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes what no description is about: torn by a power cut, or of an eviction that was cut short. Files of other names stay.
    pub fn sweep(&self) -> Result<()> {
        let _lock = self.lock()?;
        let sweep = || {
            for name in self.files()? {
                let Some((id, _)) = split(&name) else { continue };
                if self.read(id)?.is_none() {
                    self.unlink_unused(id)?;
                }
            }
            Ok(())
        };
        sweep().map_err(self.failed("sweep", ""))
    }

    /// How many bytes of the disk the copies take.
    pub fn usage(&self) -> Result<u64> {
        let mut bytes = 0;
        for name in self.files().map_err(self.failed("list", ""))? {
            if let Ok(stat) = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            }
        }
        Ok(bytes)
    }
}

/// The parts of the name of a file of a copy: its ID, and what the file is to it.
fn split(file: &str) -> Option<(&str, &str)> {
    let (id, kind) = file.split_once('.')?;
    (is_id(id) && KINDS.contains(&kind)).then_some((id, kind))
}

/// File systems that are not of this node (statfs(2)).
const REMOTE: &[(&str, u32)] = &[
    ("NFS", 0x6969),
    ("CIFS", 0xff53_4d42),
    ("SMB", 0xfe53_4d42),
    ("Ceph", 0x00c3_6400),
    ("9p", 0x0102_1997),
    ("AFS", 0x5346_414f),
    ("FUSE", 0x6573_5546),
];
