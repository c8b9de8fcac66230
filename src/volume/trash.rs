//! Directories on their way out: gone from their place at once, deleted in the background.
//!
//! What pods wrote may be of any size and depth, so that deletion takes neither the caller's time nor its stack, and opens two
//! directories at a time however deep a tree is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// A directory on the same file system as what is thrown into it.
#[derive(Clone, Debug)]
pub struct Trash {
    path: PathBuf,
    count: Arc<AtomicU64>,
}

impl Trash {
    /// Makes the directory.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&path)?;
        Ok(Trash { path, count: Arc::default() })
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
        let trash = self.open()?;
        match self.move_here(&trash, rustix::fs::CWD, directory.as_os_str()) {
            Ok(name) => {
                self.empty(vec![name]);
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn open(&self) -> io::Result<OwnedFd> {
        Ok(open_directory(rustix::fs::CWD, self.path.as_os_str())?)
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
        let delete = move || {
            if let Err(error) = trash.delete(names) {
                tracing::error!("delete what is in {}: {error}", trash.path.display());
            }
        };
        // What cannot be deleted now is deleted when the driver starts again.
        if let Err(error) = std::thread::Builder::new().name("trash".into()).spawn(delete) {
            tracing::error!("delete what is in {}: start a thread: {error}", self.path.display());
        }
    }

    /// Deletes trees of the trash: a directory's directories become entries of the trash themselves.
    fn delete(&self, mut names: Vec<OsString>) -> io::Result<()> {
        let trash = self.open()?;
        while let Some(name) = names.pop() {
            let directory = match open_directory(&trash, &name) {
                Ok(directory) => directory,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for entry in Dir::read_from(&directory)? {
                let entry = entry?;
                let entry = OsStr::from_bytes(entry.file_name().to_bytes());
                if entry == "." || entry == ".." {
                    continue;
                }
                match rustix::fs::unlinkat(&directory, entry, AtFlags::empty()) {
                    Err(Errno::ISDIR) => names.push(self.move_here(&trash, &directory, entry)?),
                    answer => answer?,
                }
            }
            rustix::fs::unlinkat(&trash, &name, AtFlags::REMOVEDIR)?;
        }
        Ok(())
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
        trash.delete(vec!["left".into()]).unwrap();
        assert_eq!(std::fs::read_dir(directory.path().join("trash")).unwrap().count(), 0);
        assert!(precious.join("file").exists());
        trash.throw(&tree).unwrap();
    }
}
