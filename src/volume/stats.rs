//! How full a published volume is, and whether it is well.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::error::{Error, Kind, Result};
use super::record::Directory;
use super::{Publication, Volumes, blocking};
use crate::kernel::mount::is_mount;
use crate::spec::{Mount, Upper};

/// Bytes and inodes of one published volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    pub bytes: Usage,
    pub inodes: Usage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub total: u64,
    pub used: u64,
    pub available: u64,
}

impl Volumes {
    /// The usage of the volume at `path`: of the scratch layer where it has one, else of the image. `None` where it should be mounted and is
    /// not.
    ///
    /// `NOT_FOUND` where this volume is not published at this path. Answered from the node's memory and disk, unless the
    /// spec puts plain NFS at the target.
    pub async fn stats(self: &Arc<Self>, volume_id: &str, path: &Path) -> Result<Option<Stats>> {
        let directory = Directory::of(&self.config.data_dir, path);
        let (volume_id, path) = (volume_id.to_owned(), path.to_owned());
        let step = format!("look at {}", path.display());
        let look = move || match directory.read().filter(|record| record.volume_id == volume_id) {
            None => {
                let message = format!("volume {volume_id} is not published at {}", path.display());
                Err(Error::new(Kind::NotFound, message))
            }
            Some(_) if !is_mount(&path)? => Ok(None),
            Some(record) => measure(&record, &path, &directory).map(Some),
        };
        let late = |_| Error::new(Kind::DeadlineExceeded, format!("{step}: no answer: is the NFS server up?"));
        tokio::time::timeout(self.config.timeout, blocking::run(step.clone(), look)).await.map_err(late)??
    }
}

fn measure(record: &Publication, path: &Path, directory: &Directory) -> Result<Stats> {
    let file_system = rustix::fs::statvfs(path)
        .map_err(|errno| crate::kernel::Error::new(format!("measure {} (statfs)", path.display()), errno))?;
    let usage = |total: u64, free: u64, available: u64| Usage { total, used: total.saturating_sub(free), available };
    let block = file_system.f_frsize;
    let mut stats = Stats {
        bytes: usage(file_system.f_blocks * block, file_system.f_bfree * block, file_system.f_bavail * block),
        inodes: usage(file_system.f_files, file_system.f_ffree, file_system.f_favail),
    };
    // The file system below an upper directory is the node's disk: others fill it too.
    if matches!(&record.mount, Mount::Overlay(overlay) if overlay.upper == Upper::Directory) && !record.read_only {
        let (bytes, inodes) = tree_usage(&directory.scratch()).map_err(|error| {
            Error::new(Kind::Internal, format!("measure the scratch layer of {}: {error}", path.display()))
        })?;
        stats.bytes.used = bytes;
        stats.inodes.used = inodes;
    }
    Ok(stats)
}

/// The disk space and the number of files below a directory; files that go while it looks are not counted.
fn tree_usage(directory: &Path) -> std::io::Result<(u64, u64)> {
    let mut sum = (0, 0);
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                metadata => metadata?,
            };
            sum.0 += metadata.blocks() * 512;
            sum.1 += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(sum)
}
