//! Deletes the images that nobody names and nobody has used for a while.
//!
//! An image that is to go loses its name first, and then the cluster is asked again: what somebody names by then gets its name back. Who
//! makes images holds a lock meanwhile, so that no layer goes which a new image is to have.

use std::collections::BTreeSet;
use std::fs::File as StdFile;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::look::{self, open, split};
use super::{File, Store, mark_layers};
use crate::error::{Error, Kind, Result};
use crate::kernel::file_lock::{Lock, try_lock};
use crate::kernel::file_system::{FileSystem, SUPERBLOCK};
use crate::kernel::sif;
use crate::kubernetes::inventory::Inventory;

/// What builders lock, each in the directory that it writes to.
const LOCK: &str = ".lock";
/// What lies beside an image and goes with it.
const COMPANIONS: [&str; 4] = [".root", ".root.minisig", ".minisig", ".profile"];
/// The end of the name of what is to go; it begins with a dot.
const UNNAMED: &str = ".deleted";

/// What becomes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Named(BTreeSet<String>),
    /// It was used in the time of grace.
    Young,
    Unused,
}

impl Store {
    /// What is to become of each file. Layers go and stay with their indexes.
    pub fn judge(&self, mut files: Vec<File>, now: SystemTime, grace: Duration) -> Vec<(File, Verdict)> {
        let is_young =
            |file: &File| now.duration_since(file.last_used).is_ok_and(|age| age < grace) || now < file.last_used;
        mark_layers(&self.directory, &mut files, |index| !index.used_by.is_empty() || is_young(index));
        let judge = |file: File| {
            let verdict = match &file.used_by {
                named if !named.is_empty() => Verdict::Named(named.clone()),
                _ if is_young(&file) => Verdict::Young,
                _ => Verdict::Unused,
            };
            (file, verdict)
        };
        files.into_iter().map(judge).collect()
    }
}

/// What became of a file that nobody names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Deleted,
    Kept(String),
}

/// The files of a store that have lost their names.
pub struct Unnamed<'a> {
    store: &'a Store,
    files: Vec<File>,
    /// Of their directories, held until the end.
    locks: Vec<StdFile>,
}

impl Store {
    /// Takes the names of files from them, indexes first; `each` is told of those that keep theirs.
    pub fn unname(&self, files: Vec<File>, mut each: impl FnMut(&File, Outcome)) -> Unnamed<'_> {
        let mut unnamed = Unnamed { store: self, files: Vec::new(), locks: Vec::new() };
        let directories: BTreeSet<_> = files.iter().map(|file| split(&file.path).0.to_owned()).collect();
        for directory in directories {
            let here = || files.iter().filter(|file| split(&file.path).0 == directory);
            match self.lock(&directory) {
                Ok(lock) => unnamed.locks.push(lock),
                Err(why) => {
                    here().for_each(|file| each(file, Outcome::Kept(why.clone())));
                    continue;
                }
            }
            let (indexes, images): (Vec<_>, Vec<_>) = here().partition(|file| file.layers.is_some());
            for file in indexes.into_iter().chain(images) {
                match self.take_name(file) {
                    Ok(()) => unnamed.files.push(file.clone()),
                    Err(why) => each(file, Outcome::Kept(why)),
                }
            }
        }
        unnamed
    }

    /// Gives the files their names back that a process has left without, which has died. Before anything is looked at.
    pub fn recover(&self) -> Result<()> {
        for directory in look::directories(&self.directory) {
            let failed =
                |why: String| Error::new(Kind::FailedPrecondition, format!("give names back in {directory:?}: {why}"));
            let left = || self.left(&directory).map_err(|errno| failed(errno.to_string()));
            if left()?.is_empty() {
                continue;
            }
            let _lock = self.lock(&directory).map_err(failed)?;
            for path in left()? {
                match self.give_name_back(&path) {
                    // It was made again: the one that was to go goes with the next.
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(failed(errno.to_string())),
                }
            }
        }
        Ok(())
    }

    /// The paths that files without a name had in this directory.
    fn left(&self, directory: &str) -> rustix::io::Result<Vec<String>> {
        let mut left = Vec::new();
        for entry in Dir::read_from(&open(&self.directory, directory, OFlags::RDONLY | OFlags::DIRECTORY)?)? {
            let entry = entry?;
            let was = entry.file_name().to_str().unwrap_or_default();
            let name = was.strip_prefix('.').and_then(|name| name.strip_suffix(UNNAMED));
            left.extend(name.map(|name| look::join(directory, name)));
        }
        Ok(left)
    }

    /// So that nobody makes an image in this directory meanwhile.
    fn lock(&self, directory: &str) -> std::result::Result<StdFile, String> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
        let open = || {
            let directory = open(&self.directory, directory, OFlags::PATH | OFlags::DIRECTORY)?;
            let file = rustix::fs::openat(directory, LOCK, flags, mode)?;
            let stat = rustix::fs::fstat(&file)?;
            // Somebody may have laid another file there.
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
                return Err(Errno::MLINK);
            }
            // For whoever makes images, whatever the umask of this process. A file of another user has its mode.
            let _ = rustix::fs::fchmod(&file, mode);
            Ok(file)
        };
        let file: OwnedFd = open().map_err(|errno: Errno| format!("open {LOCK} there: {errno}"))?;
        let file = StdFile::from(file);
        match try_lock(&file, Lock::Alone) {
            Ok(true) => Ok(file),
            Ok(false) => Err("images are being made there: try again later".into()),
            Err(error) => Err(format!("{LOCK} there: {error}: without locks it cannot be told who makes images there")),
        }
    }

    fn take_name(&self, file: &File) -> std::result::Result<(), String> {
        let take = || -> rustix::io::Result<bool> {
            if file.layers.is_none() && !self.is_image(&file.path)? {
                return Ok(false);
            }
            let directory = open(&self.directory, split(&file.path).0, OFlags::PATH | OFlags::DIRECTORY)?;
            let name = split(&file.path).1;
            // By now it may be another, or in use.
            let stat = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if look::content(&stat) != file.content {
                return Err(Errno::STALE);
            }
            rustix::fs::renameat(&directory, name, &directory, unnamed(name)).map(|()| true)
        };
        match take() {
            Ok(true) => Ok(()),
            Ok(false) => Err("by its content it is neither squashfs, EROFS nor SIF".into()),
            Err(Errno::STALE) => Err("it is another by now".into()),
            Err(errno) => Err(format!("rename it: {errno}")),
        }
    }

    fn is_image(&self, path: &str) -> rustix::io::Result<bool> {
        let file = StdFile::from(open(&self.directory, path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        let mut head = [0; SUPERBLOCK];
        let length = file.read_at(&mut head, 0).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        let found = FileSystem::recognise(&head[..length]);
        Ok(matches!(found, Some(FileSystem::Squashfs | FileSystem::Erofs)) || sif::is_sif(&head[..length]))
    }

    fn give_name_back(&self, path: &str) -> rustix::io::Result<()> {
        let (directory, name) = split(path);
        let directory = open(&self.directory, directory, OFlags::PATH | OFlags::DIRECTORY)?;
        rename(&directory, &unnamed(name), name)
    }

    fn delete(&self, path: &str) -> rustix::io::Result<()> {
        let (directory, name) = split(path);
        let directory = open(&self.directory, directory, OFlags::PATH | OFlags::DIRECTORY)?;
        rustix::fs::unlinkat(&directory, unnamed(name), AtFlags::empty())?;
        // Those of a file that has been made again are its own.
        if rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok(());
        }
        for companion in COMPANIONS {
            match rustix::fs::unlinkat(&directory, format!("{name}{companion}"), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

impl Unnamed<'_> {
    /// Deletes those that nobody names by now either, and gives the others their names back. `each` is told of every file.
    ///
    /// Where the cluster names anything that it did not `before`, all have their names back: by a symlink it may be any of them, which cannot be
    /// told while they have none.
    pub fn finish(
        self,
        before: &Inventory,
        inventory: &Result<Inventory>,
        grace: Duration,
        mut each: impl FnMut(&File, Outcome),
    ) {
        let unused: Result<BTreeSet<String>> = inventory.as_ref().map_err(Clone::clone).and_then(|inventory| {
            if before.is_installed && !inventory.is_installed {
                return Err(Error::new(Kind::FailedPrecondition, "the CSIDriver is there no more"));
            }
            if let Some(new) = inventory.names_beside(before) {
                let message = format!("{new} names an image that nobody did a moment ago: try again");
                return Err(Error::new(Kind::Aborted, message));
            }
            let (there, unreadable) = self.store.files(inventory)?;
            if let Some(why) = unreadable.into_iter().next() {
                return Err(Error::new(Kind::FailedPrecondition, why));
            }
            let mut files = there;
            files.extend(self.store.marked(self.files.clone(), inventory).0);
            let judged = self.store.judge(files, SystemTime::now(), grace).into_iter();
            Ok(judged.filter(|(_, verdict)| *verdict == Verdict::Unused).map(|(file, _)| file.path).collect())
        });
        for file in &self.files {
            let why = match &unused {
                Ok(unused) if unused.contains(&file.path) => match self.store.delete(&file.path) {
                    Ok(()) => {
                        each(file, Outcome::Deleted);
                        continue;
                    }
                    Err(errno) => format!("delete it: {errno}"),
                },
                Ok(_) => "it is named or used by now".to_owned(),
                Err(error) => error.to_string(),
            };
            let why = match self.store.give_name_back(&file.path) {
                Ok(()) | Err(Errno::NOENT) => why,
                Err(errno) => format!("{why}; and it is {} now: {errno}", unnamed(split(&file.path).1)),
            };
            each(file, Outcome::Kept(why));
        }
    }
}

fn unnamed(name: &str) -> String {
    format!(".{name}{UNNAMED}")
}

/// Not over a file that has the name by now; where the file system cannot look at both at once, after one another.
fn rename(directory: &OwnedFd, from: &str, to: &str) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL) => match rustix::fs::statat(directory, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => rustix::fs::renameat(directory, from, directory, to),
            Err(errno) => Err(errno),
        },
        renamed => renamed,
    }
}
