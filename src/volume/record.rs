//! What the driver writes down about a published path: a hint, always checked against the kernel.
//!
//! Each published path has one directory below `published`, named by a hash of the path: `volume.json`, and a scratch
//! directory for the upper layer of an overlay.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Publication;
use super::error::{Error, Kind, Result};
use super::trash::Trash;
use crate::kernel::image::Content;
use crate::kernel::mountinfo;

/// The record of one published path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub publication: Publication,
    /// What the images were when they were attached, in the order of [`super::condition::list_images`].
    #[serde(default)]
    pub contents: Vec<Content>,
    /// The name of the scratch directory, if there is one: each attempt to publish has its own.
    #[serde(default)]
    pub scratch: Option<String>,
}

/// The directory of one published path; it need not exist.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

impl Directory {
    pub fn of(data_dir: &Path, target: &Path) -> Self {
        let digest = Sha256::digest(target.as_os_str().as_encoded_bytes());
        let name: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Directory(published(data_dir).join(name))
    }

    /// A directory of the record's, for the upper and work directories of an overlay.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `None` where there is no record, or none that this version can read: it is a hint.
    pub fn read(&self) -> Option<Record> {
        read(&self.0)
    }

    /// Writes the record; a directory that is not there yet appears with its record and its scratch directory in it.
    pub fn write(&self, record: &Record, trash: &Trash) -> Result<()> {
        self.try_write(record, trash).map_err(|error| failed("write the record in", &self.0, &error))
    }

    fn try_write(&self, record: &Record, trash: &Trash) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(record)?;
        if self.0.exists() {
            let new = self.0.join("volume.json.new");
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            // After a power cut an empty record would cost the pod a scratch layer with all that it ever wrote.
            file.sync_data()?;
            return std::fs::rename(new, self.0.join("volume.json"));
        }
        let new = trash.new_directory()?;
        let fill = || {
            std::fs::write(new.join("volume.json"), &text)?;
            if let Some(scratch) = &record.scratch {
                std::fs::create_dir(new.join(scratch))?;
            }
            std::fs::rename(&new, &self.0)
        };
        fill().inspect_err(|_| {
            // The first error is the one to report; the sweep removes what stays.
            let _ = std::fs::remove_dir_all(&new);
        })
    }

    /// Removes all of it.
    pub fn remove(&self, trash: &Trash) -> Result<()> {
        trash.throw(&self.0).map_err(|error| failed("remove", &self.0, &error))
    }
}

/// All records, in no order.
pub fn all(data_dir: &Path) -> Result<Vec<Record>> {
    match std::fs::read_dir(published(data_dir)) {
        Ok(entries) => Ok(entries.filter_map(|entry| read(&entry.ok()?.path())).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("list", &published(data_dir), &error)),
    }
}

/// Removes the records, and scratch layers, of published paths whose pod is gone: nobody will unpublish them any more.
///
/// A target that is mounted, or whose parent directory still exists, is left alone: the kubelet publishes it again after a
/// reboot, with its scratch layer, or unpublishes it. So is what was mounted by hand: its target may be where only the node's own
/// processes look, and this one be in a container.
pub fn sweep(data_dir: &Path, trash: &Trash) -> Result<()> {
    let mounts = mountinfo::read()?;
    for Record { publication, .. } in all(data_dir)? {
        let target = &publication.target;
        if publication.is_by_hand() {
            continue;
        }
        let gone = target.parent().is_some_and(|parent| matches!(parent.try_exists(), Ok(false)));
        if gone && !mounts.iter().any(|mount| Path::new(&mount.mount_point) == target) {
            tracing::info!(volume = publication.volume_id, target = %target.display(), "the pod is gone: record removed");
            Directory::of(data_dir, target).remove(trash)?;
        }
    }
    Ok(())
}

/// Makes the data directory, which only root can enter, and the one for records in it.
pub fn create_directories(data_dir: &Path) -> Result<()> {
    let path = published(data_dir);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(|error| failed("make directory", &path, &error))
}

fn read(directory: &Path) -> Option<Record> {
    serde_json::from_slice(&std::fs::read(directory.join("volume.json")).ok()?).ok()
}

fn published(data_dir: &Path) -> PathBuf {
    data_dir.join("published")
}

pub fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{action} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sweep_removes_what_pods_left_and_nothing_that_was_mounted_by_hand() {
        let directory = tempfile::tempdir().unwrap();
        let trash = Trash::new(directory.path().join("trash")).unwrap();
        create_directories(directory.path()).unwrap();
        let mount = crate::spec::json::parse(include_str!("../spec/testdata/nfs-loopback.json")).unwrap().mount;
        // Nobody sees these here, as a container does not see what is mounted outside of the kubelet's directory.
        let by_hand = Publication::by_hand("/nowhere/by-hand".into(), mount.clone(), false);
        let of_a_pod = Publication { target: "/nowhere/pod/mount".into(), volume_id: "v".into(), ..by_hand.clone() };
        for publication in [by_hand, of_a_pod] {
            let place = Directory::of(directory.path(), &publication.target);
            place
                .write(&Record { publication, contents: Vec::new(), scratch: Some("scratch".into()) }, &trash)
                .unwrap();
        }
        sweep(directory.path(), &trash).unwrap();
        trash.finish();
        let left = all(directory.path()).unwrap();
        assert_eq!(
            left.iter().map(|record| record.publication.target.as_path()).collect::<Vec<_>>(),
            [Path::new("/nowhere/by-hand")]
        );
        assert!(Directory::of(directory.path(), Path::new("/nowhere/by-hand")).scratch("scratch").exists());
    }
}
