//! Directories on their way out: gone from their place at once, deleted in the background by one thread.
//!
//! What pods wrote may be of any size, width and depth: nothing is listed in memory, deletion takes neither the caller's time nor its
//! stack, and two directories are open at a time however deep a tree is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::lock::lock;

/// What is not trash yet: see [`Trash::new_directory`].
const NEW: &str = "new";

/// A directory on the same file system as what is thrown into it.
#[derive(Clone, Debug)]
pub struct Trash {
    path: PathBuf,
    /// When this process began: a part of names that no other process gives.
    began: u128,
    count: Arc<AtomicU64>,
    deletion: Arc<(Mutex<Deletion>, Condvar)>,
}

#[derive(Debug, Default)]
struct Deletion {
    /// The thread is there.
    runs: bool,
    /// Something was thrown since it last looked.
    more: bool,
}

impl Trash {
    /// Makes the directory.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&path)?;
        let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        Ok(Trash { path, began, count: Arc::default(), deletion: Arc::default() })
    }

    /// Deletes in the background what an earlier process left.
    pub fn sweep(&self) -> io::Result<()> {
        let mine = format!("{NEW}-{}-", self.began);
        let trash = open_directory(rustix::fs::CWD, self.path.as_os_str())?;
        for entry in Dir::read_from(&trash)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if is_new(name) && !name.as_encoded_bytes().starts_with(mine.as_bytes()) {
                self.move_here(&trash, &trash, name)?;
            }
        }
        self.empty();
        Ok(())
    }

    /// Makes an empty directory that is trash only for a later process: what is put together in it appears whole or not at all.
    pub fn new_directory(&self) -> io::Result<PathBuf> {
        loop {
            let path = self.path.join(format!("{NEW}-{}", self.name()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes a directory from its place. One that is not there is no error.
    pub fn throw(&self, directory: &Path) -> io::Result<()> {
        let trash = open_directory(rustix::fs::CWD, self.path.as_os_str())?;
        match self.move_here(&trash, rustix::fs::CWD, directory.as_os_str()) {
            Ok(()) => {
                self.empty();
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn name(&self) -> String {
        format!("{}-{}", self.began, self.count.fetch_add(1, Ordering::Relaxed))
    }

    /// Gives the directory a name in the trash that nothing has.
    fn move_here(&self, trash: &OwnedFd, from: impl rustix::fd::AsFd, name: &OsStr) -> rustix::io::Result<()> {
        loop {
            let new = self.name();
            match rustix::fs::renameat_with(&from, name, trash, &new, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                answer => return answer,
            }
        }
    }

    /// Sees to it that the thread looks at the trash after this.
    fn empty(&self) {
        let mut deletion = lock(&self.deletion.0);
        deletion.more = true;
        if deletion.runs {
            return;
        }
        let trash = self.clone();
        // What cannot be deleted now is tried again when something else is thrown, or the driver starts anew.
        match std::thread::Builder::new().name("trash".into()).spawn(move || trash.delete_all()) {
            Ok(_) => deletion.runs = true,
            Err(error) => tracing::error!("delete what is in {}: start a thread: {error}", self.path.display()),
        }
    }

    /// Waits until what was thrown is deleted: for a process that ends.
    pub fn finish(&self) {
        let mut deletion = lock(&self.deletion.0);
        while deletion.runs {
            deletion = self.deletion.1.wait(deletion).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn delete_all(&self) {
        loop {
            lock(&self.deletion.0).more = false;
            let deleted = self.delete_what_is_there();
            let mut deletion = lock(&self.deletion.0);
            match deleted {
                // A directory's directories are entries of the trash now.
                Ok(Pass { progress: true, .. }) => continue,
                Ok(Pass { failed: Some((name, errno)), .. }) => {
                    let (path, error) = (self.path.join(name), io::Error::from(errno));
                    tracing::error!("delete {}: {error}: it is tried again later", path.display());
                }
                Ok(Pass { failed: None, .. }) => {}
                Err(errno) => tracing::error!("list {}: {}", self.path.display(), io::Error::from(errno)),
            }
            if !deletion.more {
                deletion.runs = false;
                self.deletion.1.notify_all();
                return;
            }
        }
    }

    /// Goes through the trash once. What cannot be deleted is in the way of nothing else.
    fn delete_what_is_there(&self) -> rustix::io::Result<Pass> {
        let trash = open_directory(rustix::fs::CWD, self.path.as_os_str())?;
        let mut pass = Pass::default();
        for entry in Dir::read_from(&trash)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." || is_new(name) {
                continue;
            }
            match self.delete(&trash, name, &mut pass.progress) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => pass.failed = pass.failed.or(Some((name.to_owned(), errno))),
            }
        }
        Ok(pass)
    }

    /// Deletes what is in a directory of the trash, and then itself. Of its own directories those that are not empty become entries of
    /// the trash.
    fn delete(&self, trash: &OwnedFd, name: &OsStr, progress: &mut bool) -> rustix::io::Result<()> {
        let directory = open_directory(trash, name)?;
        let mut first = Ok(());
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let entry = OsStr::from_bytes(entry.file_name().to_bytes());
            if entry == "." || entry == ".." {
                continue;
            }
            let deleted = match rustix::fs::unlinkat(&directory, entry, AtFlags::empty()) {
                Err(Errno::ISDIR) => match rustix::fs::unlinkat(&directory, entry, AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY) => self.move_here(trash, &directory, entry),
                    answer => answer,
                },
                answer => answer,
            };
            *progress |= deleted.is_ok();
            first = first.and(deleted);
        }
        first?;
        rustix::fs::unlinkat(trash, name, AtFlags::REMOVEDIR)?;
        *progress = true;
        Ok(())
    }
}

/// What came of going through the trash once.
#[derive(Default)]
struct Pass {
    /// Something is gone, or nearer to it.
    progress: bool,
    /// The first that could not be deleted.
    failed: Option<(OsString, Errno)>,
}

fn is_new(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(NEW.as_bytes())
}

fn open_directory(base: impl rustix::fd::AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(base, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_deeper_than_any_path_is_deleted_and_symlinks_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let precious = directory.path().join("precious");
        std::fs::create_dir(&precious).unwrap();
        std::fs::write(precious.join("file"), "").unwrap();
        let tree = directory.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&precious, tree.join("link")).unwrap();
        let mut deepest = open_directory(rustix::fs::CWD, tree.as_os_str()).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&deepest, "d", Mode::RWXU).unwrap();
            deepest = open_directory(&deepest, OsStr::new("d")).unwrap();
        }
        let trash = Trash::new(directory.path().join("trash")).unwrap();
        std::fs::rename(&tree, directory.path().join("trash/left")).unwrap();
        trash.sweep().unwrap();
        trash.finish();
        assert_eq!(std::fs::read_dir(directory.path().join("trash")).unwrap().count(), 0);
        assert!(precious.join("file").exists());
        trash.throw(&tree).unwrap();
    }

    #[test]
    fn what_is_thrown_is_gone_when_the_deletions_are_finished() {
        let directory = tempfile::tempdir().unwrap();
        let trash = Trash::new(directory.path().join("trash")).unwrap();
        for name in ["a", "b"] {
            let tree = directory.path().join(name);
            std::fs::create_dir_all(tree.join("d/e")).unwrap();
            std::fs::write(tree.join("d/file"), "").unwrap();
            trash.throw(&tree).unwrap();
        }
        trash.finish();
        assert_eq!(std::fs::read_dir(directory.path().join("trash")).unwrap().count(), 0);
    }

    #[test]
    fn what_is_put_together_is_left_alone_until_the_next_process_starts() {
        let directory = tempfile::tempdir().unwrap();
        let trash = Trash::new(directory.path().join("trash")).unwrap();
        let new = trash.new_directory().unwrap();
        std::fs::create_dir(directory.path().join("a")).unwrap();
        trash.throw(&directory.path().join("a")).unwrap();
        trash.finish();
        trash.sweep().unwrap();
        trash.finish();
        assert!(new.exists());
        let next = Trash::new(directory.path().join("trash")).unwrap();
        next.sweep().unwrap();
        next.finish();
        assert!(!new.exists());
    }

    #[test]
    fn what_cannot_be_deleted_is_in_the_way_of_nothing_else_and_not_tried_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let trash = Trash::new(directory.path().join("trash")).unwrap();
        // No directory of a record.
        std::fs::write(directory.path().join("trash/file"), "").unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir_all(directory.path().join(name).join("d/e/f")).unwrap();
            trash.throw(&directory.path().join(name)).unwrap();
        }
        trash.finish();
        assert_eq!(std::fs::read_dir(directory.path().join("trash")).unwrap().count(), 1);
    }
}
