//! Directories on their way out: gone from their place at once, deleted in the background.
//!
//! What pods wrote may be of any size and depth, so that deletion takes neither the caller's time nor its stack, and opens two
//! directories at a time however deep a tree is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::lock::lock;

/// A directory on the same file system as what is thrown into it.
#[derive(Clone, Debug)]
pub struct Trash {
    path: PathBuf,
    count: Arc<AtomicU64>,
    deletions: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Trash {
    /// Makes the directory.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&path)?;
        Ok(Trash { path, count: Arc::default(), deletions: Arc::default() })
    }

    /// Deletes in the background what an earlier process left.
    pub fn sweep(&self) -> io::Result<()> {
        let left = std::fs::read_dir(&self.path)?;
        self.empty(left.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?);
        Ok(())
    }

    /// Makes an empty directory that is trash unless it is renamed: what is put together in it appears whole or not at all.
    pub fn new_directory(&self) -> io::Result<PathBuf> {
        loop {
            let path = self.path.join(self.name());
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
            Ok(name) => {
                self.empty(vec![name]);
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn name(&self) -> OsString {
        self.count.fetch_add(1, Ordering::Relaxed).to_string().into()
    }

    /// Gives the directory a name in the trash that nothing has.
    fn move_here(&self, trash: &OwnedFd, from: impl rustix::fd::AsFd, name: &OsStr) -> rustix::io::Result<OsString> {
        loop {
            let new = self.name();
            match rustix::fs::renameat_with(&from, name, trash, &new, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok(new),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn empty(&self, names: Vec<OsString>) {
        let trash = self.clone();
        // What cannot be deleted now is tried again when the driver starts anew.
        match std::thread::Builder::new().name("trash".into()).spawn(move || trash.delete(names)) {
            Ok(deletion) => {
                let mut deletions = lock(&self.deletions);
                deletions.retain(|deletion| !deletion.is_finished());
                deletions.push(deletion);
            }
            Err(error) => tracing::error!("delete what is in {}: start a thread: {error}", self.path.display()),
        }
    }

    /// Waits until what was thrown is deleted: for a process that ends.
    pub fn finish(&self) {
        let deletions = std::mem::take(&mut *lock(&self.deletions));
        for deletion in deletions {
            // One that panicked has said so.
            let _ = deletion.join();
        }
    }

    /// Deletes trees of the trash: a directory's directories become entries of the trash themselves. What cannot be deleted is in the
    /// way of nothing else.
    fn delete(&self, mut names: Vec<OsString>) {
        let failed = |name: &OsStr, errno: Errno| {
            tracing::error!("delete {}: {}", self.path.join(name).display(), io::Error::from(errno));
        };
        let trash = match open_directory(rustix::fs::CWD, self.path.as_os_str()) {
            Ok(trash) => trash,
            Err(errno) => return failed(OsStr::new(""), errno),
        };
        while let Some(name) = names.pop() {
            match self.delete_one(&trash, &name, &mut names) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => failed(&name, errno),
            }
        }
    }

    fn delete_one(&self, trash: &OwnedFd, name: &OsStr, directories: &mut Vec<OsString>) -> rustix::io::Result<()> {
        let directory = open_directory(trash, name)?;
        let mut first = Ok(());
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let entry = OsStr::from_bytes(entry.file_name().to_bytes());
            if entry == "." || entry == ".." {
                continue;
            }
            let deleted = match rustix::fs::unlinkat(&directory, entry, AtFlags::empty()) {
                Err(Errno::ISDIR) => self.move_here(trash, &directory, entry).map(|name| directories.push(name)),
                answer => answer,
            };
            first = first.and(deleted);
        }
        first?;
        rustix::fs::unlinkat(trash, name, AtFlags::REMOVEDIR)
    }
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
        trash.delete(vec!["left".into()]);
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
}
