//! How full a published volume is, and whether it is well.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Report;
use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::kernel;
use crate::lock::lock;
use crate::places::run_at;
use crate::spec::Allowed;
use crate::volume::abnormal::Abnormal;
use crate::volume::record::{Found, List, Record};

/// The deepest directory of a scratch layer that is counted, and the most entries: a pod may make more than anyone wants to look at.
const DEPTH: usize = 64;
const ENTRIES: usize = 100_000;

/// How one published volume is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Bytes and inodes; `None` where the volume is not mounted any more, or its server does not answer, and where they were not asked for.
    pub usage: Option<(Usage, Usage)>,
    pub abnormal: Option<Abnormal>,
}

/// A number of bytes or of inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub total: u64,
    pub used: u64,
    pub available: u64,
}

impl Report {
    /// The usage of the volume at `path`: of the scratch layer where it has one, else of the image.
    ///
    /// `NOT_FOUND` where this volume is not published at this path. Answered from the node's memory and disk, unless the
    /// spec shows plain NFS: then its server is asked first whether it is there.
    pub async fn stats(&self, volume_id: &str, path: &Path) -> Result<Stats> {
        self.look_at_volume(volume_id, path, true).await
    }

    /// What is wrong with the volume at `path`: [`Report::stats`] without the usage, which costs a walk through the writable layer.
    pub async fn health(&self, volume_id: &str, path: &Path) -> Result<Option<Abnormal>> {
        Ok(self.look_at_volume(volume_id, path, false).await?.abnormal)
    }

    /// The paths where a volume is published.
    pub async fn published(&self, volume_id: &str) -> Result<Vec<PathBuf>> {
        let records = self.records.clone();
        let List { records, unreadable } = blocking::run("list the records", move || records.list()).await?;
        let readable = records.into_iter().filter(|record| record.volume_id == volume_id).map(|record| record.target);
        let others = unreadable.into_iter().filter(|record| record.volume_id.as_deref() == Some(volume_id));
        Ok(readable.chain(others.filter_map(|record| record.target)).collect())
    }

    async fn look_at_volume(&self, volume_id: &str, path: &Path, measured: bool) -> Result<Stats> {
        let stats = self.look_and_ask(volume_id, path, measured).await?;
        self.remember(volume_id, path, stats.abnormal.as_ref());
        Ok(stats)
    }

    /// Few clusters show a volume's condition; the log and the metrics of the driver do.
    fn remember(&self, volume_id: &str, path: &Path, now: Option<&Abnormal>) {
        let before = {
            let mut abnormal = lock(&self.abnormal);
            match now {
                Some(now) => abnormal.insert(path.to_owned(), now.clone()),
                None => abnormal.remove(path),
            }
        };
        match now {
            _ if before.as_ref() == now => {}
            Some(Abnormal { reason, message, .. }) => {
                tracing::warn!(volume_id, target = %path.display(), reason, "abnormal: {message}");
            }
            None => tracing::info!(volume_id, target = %path.display(), "no longer abnormal"),
        }
    }

    async fn look_and_ask(&self, volume_id: &str, path: &Path, measured: bool) -> Result<Stats> {
        let abnormal = |abnormal| Ok(Stats { usage: None, abnormal: Some(abnormal) });
        let directory = self.records.of(path);
        let record = match blocking::run("read the record", move || directory.read()).await? {
            Found::Record(record) if record.volume_id == volume_id => record,
            Found::Unreadable(unreadable) if unreadable.may_be_of(volume_id) => {
                return abnormal(Abnormal::degraded("RecordUnreadable", unreadable.to_string()));
            }
            Found::Record(_) | Found::Unreadable(_) | Found::Nothing => {
                let message = format!("volume {volume_id} is not published at {}", path.display());
                return Err(Error::new(Kind::NotFound, message));
            }
        };
        // No server is asked that the policy does not allow any more.
        let mount = match Allowed::new(record.mount.clone(), self.preparer.policy(), record.namespace.as_deref()) {
            Ok(mount) => mount,
            Err(error) => {
                return abnormal(Abnormal::degraded("NotAllowed", format!("mounted once, but now: {error}")));
            }
        };
        let step = format!("look at {}", path.display());
        let look = match tokio::time::timeout(self.timeout, self.look(&record, &mount, &step, measured)).await {
            Ok(look) => look?,
            Err(_) => {
                let message = format!("{step}: no answer: is the NFS server up?");
                return Err(Error::new(Kind::DeadlineExceeded, message));
            }
        };
        match look {
            Look::Mounted(usage) => Ok(Stats { usage, abnormal: self.conditions.of(&record).await }),
            Look::Unmounted => {
                let message = "published here, but not mounted any more: delete the pod to mount it again";
                abnormal(Abnormal::inaccessible("NotMounted", message))
            }
            Look::Unanswered(error) => abnormal(Abnormal::unanswered(&error, error.message.clone())),
        }
    }

    async fn look(&self, record: &Record, mount: &Allowed, step: &str, measured: bool) -> Result<Look> {
        let places = match self.preparer.probe_shown(mount).await {
            Ok(places) => places,
            Err(error) => return Ok(Look::Unanswered(error)),
        };
        let (kernel, path) = (Arc::clone(&self.kernel), record.target.clone());
        // A file system of its own says by itself how full it is.
        let counted = record.scratch.as_ref().filter(|_| record.mount.upper(record.read_only).size().is_none());
        let scratch = counted.map(|name| self.records.of(&path).scratch(name));
        let look = move || match kernel.is_mount(&path)? {
            true if measured => measure(&path, scratch.as_deref()).map(|usage| Look::Mounted(Some(usage))),
            true => Ok(Look::Mounted(None)),
            false => Ok(Look::Unmounted),
        };
        run_at(places, step, look).await
    }
}

/// What a look at a published path found.
enum Look {
    /// Bytes and inodes, where they were to be measured.
    Mounted(Option<(Usage, Usage)>),
    Unmounted,
    /// A server of what the path shows does not answer, or with an error.
    Unanswered(Error),
}

fn measure(path: &Path, scratch: Option<&Path>) -> kernel::Result<(Usage, Usage)> {
    let error = |errno| kernel::Error::new(format!("measure {}", path.display()), errno);
    let file_system = rustix::fs::statvfs(path).map_err(error)?;
    let usage = |total: u64, free: u64, available: u64| Usage { total, used: total.saturating_sub(free), available };
    let block = file_system.f_frsize;
    let mut bytes = usage(file_system.f_blocks * block, file_system.f_bfree * block, file_system.f_bavail * block);
    let mut inodes = usage(file_system.f_files, file_system.f_ffree, file_system.f_favail);
    if let Some(scratch) = scratch {
        // The file system below an upper directory is the node's disk: others fill it too.
        (bytes.used, inodes.used) = tree_usage(scratch).map_err(error)?;
    }
    Ok((bytes, inodes))
}

/// The disk space and the number of files below a directory, while its owner goes on to change it: by file descriptors, so that no
/// symlink put in a directory's place is followed.
fn tree_usage(directory: &Path) -> rustix::io::Result<(u64, u64)> {
    let open = |base: BorrowedFd<'_>, name: &OsStr| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(base, name, flags, Mode::empty())
    };
    let root = rustix::fs::openat(CWD, directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut bytes, mut files) = (0, 0);
    let mut levels = vec![Dir::new(open(root.as_fd(), OsStr::new("."))?)?];
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else { break };
        let Some(entry) = level.read() else {
            levels.pop();
            continue;
        };
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        if name == "." || name == ".." {
            continue;
        }
        let here = level.fd()?;
        let stat = match rustix::fs::statat(here, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat?,
        };
        bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        files += 1;
        if files >= ENTRIES as u64 {
            break;
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && depth < DEPTH {
            match open(here, &name) {
                Ok(directory) => levels.push(Dir::new(directory)?),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok((bytes, files))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_without_following_symlinks_or_going_too_deep() {
        let directory = tempfile::tempdir().unwrap();
        let mut path = directory.path().join("tree");
        std::fs::create_dir(&path).unwrap();
        std::os::unix::fs::symlink("/usr", path.join("link")).unwrap();
        std::fs::write(path.join("file"), vec![1; 100_000]).unwrap();
        for _ in 0..100 {
            path.push("d");
            std::fs::create_dir(&path).unwrap();
        }
        let (bytes, files) = tree_usage(&directory.path().join("tree")).unwrap();
        assert!(bytes >= 100_000);
        assert_eq!(files, 2 + DEPTH as u64);
    }
}
