//! What the driver writes down about a published path: a hint, always checked against the kernel.
//!
//! Each published path has one directory below `published`, named by a hash of the path: `volume.json` ([`mod@format`]), and a scratch
//! directory for the upper layer of an overlay; each staged volume has a file below `staged` ([`staged`]). A record that cannot be read, as of a newer driver, is never removed before its path
//! is unpublished: there is a pod's scratch layer beside it.

mod format;
mod staged;
mod trash;

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::publication::{Publication, by_hand};
use crate::error::{Error, Kind, Result};
use crate::kernel::Kernel;
use crate::kernel::image::Content;
use crate::spec::{Loopback, Mount};
use trash::Trash;

/// The record of one published path.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub volume_id: String,
    pub target: PathBuf,
    pub mount: Mount,
    pub read_only: bool,
    pub exclusive: bool,
    /// Of the pod, where it is known.
    pub namespace: Option<String>,
    /// What each image was when it was attached.
    pub images: Vec<(Loopback, Content)>,
    /// The name of the scratch directory, if there is one: each attempt to publish has its own.
    pub scratch: Option<String>,
}

impl Record {
    pub fn new(publication: &Publication, images: Vec<(Loopback, Content)>, scratch: Option<String>) -> Self {
        Record {
            volume_id: publication.volume_id.clone(),
            target: publication.target.clone(),
            mount: (*publication.mount).clone(),
            read_only: publication.read_only,
            exclusive: publication.exclusive,
            namespace: publication.namespace.clone(),
            images,
            scratch,
        }
    }

    /// Whether it is of this publication, and of no other at the same path.
    pub fn is_of(&self, publication: &Publication) -> bool {
        let Publication { volume_id, target, mount, read_only, exclusive, namespace: _, group: _ } = publication;
        self.volume_id == *volume_id
            && self.target == *target
            && self.mount == **mount
            && self.read_only == *read_only
            && self.exclusive == *exclusive
    }
}

/// What there is of a published path.
#[derive(Debug)]
pub enum Found {
    Nothing,
    Record(Record),
    Unreadable(Unreadable),
}

/// A record that this version of the driver cannot read.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Unreadable {
    pub path: PathBuf,
    /// As far as it says so.
    pub volume_id: Option<String>,
    pub target: Option<PathBuf>,
    pub why: String,
}

impl Unreadable {
    /// Whether it is of this volume, as far as it says so: it lies where the driver published something.
    pub fn may_be_of(&self, volume_id: &str) -> bool {
        self.volume_id.as_deref().is_none_or(|id| id == volume_id)
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the record {} cannot be read: {}", self.path.display(), self.why)
    }
}

impl From<Unreadable> for Error {
    fn from(unreadable: Unreadable) -> Self {
        let hint =
            "it is kept, with what the pod wrote: run the version of the driver that wrote it, or delete the pod";
        Error::new(Kind::FailedPrecondition, format!("{unreadable}: {hint}"))
    }
}

/// All records of a data directory, in no order.
#[derive(Debug, Default)]
pub struct List {
    pub records: Vec<Record>,
    pub unreadable: Vec<Unreadable>,
}

/// The records of a data directory that this process may change.
#[derive(Clone, Debug)]
pub struct Records {
    data_dir: PathBuf,
    trash: Trash,
}

impl Records {
    /// Makes the directories, which only root can enter.
    pub fn new(data_dir: &Path) -> Result<Self> {
        for path in [published(data_dir), staged::staged(data_dir)] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|error| Error::file("make directory", &path, &error))?;
        }
        let path = data_dir.join("trash");
        let trash = Trash::new(path.clone()).map_err(|error| Error::file("make directory", &path, &error))?;
        Ok(Records { data_dir: data_dir.to_owned(), trash })
    }

    /// The directory of a published path, which need not exist.
    pub fn of(&self, target: &Path) -> Directory {
        let name = name_of(target.as_os_str().as_encoded_bytes());
        Directory { path: published(&self.data_dir).join(name), trash: self.trash.clone() }
    }

    pub fn list(&self) -> Result<List> {
        list(&self.data_dir)
    }

    /// Deletes in the background what earlier processes threw away.
    pub fn empty_trash(&self) -> io::Result<()> {
        self.trash.sweep()
    }

    /// Waits until what was removed is deleted: for a process that ends.
    pub fn finish_deletions(&self) {
        self.trash.finish();
    }

    /// Removes the records, and scratch layers, of published paths whose pod is gone: nobody will unpublish them any more.
    ///
    /// A target that is mounted, or whose parent directory still exists, is left alone: the kubelet publishes it again after a
    /// reboot, with its scratch layer, or unpublishes it. So is what was mounted by hand: its target may be where only the node's own
    /// processes look, and this one be in a container. So is what cannot be read.
    pub fn sweep(&self, kernel: &dyn Kernel) -> Result<()> {
        if let Err(error) = self.sweep_staged() {
            tracing::error!("sweep the records of staged volumes: {error}");
        }
        let mounts = kernel.mounts()?;
        let List { records, unreadable } = self.list()?;
        for unreadable in unreadable {
            tracing::error!(volume_id = unreadable.volume_id, "{unreadable}");
        }
        for Record { volume_id, target, .. } in records {
            if volume_id == by_hand(&target) {
                continue;
            }
            let gone = target.parent().is_some_and(|parent| matches!(parent.try_exists(), Ok(false)));
            if gone && !mounts.iter().any(|mount| Path::new(&mount.mount_point) == target) {
                tracing::info!(volume_id, target = %target.display(), "the pod is gone: record removed");
                self.of(&target).remove()?;
            }
        }
        Ok(())
    }
}

/// The directory of one published path.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
    trash: Trash,
}

impl Directory {
    /// A directory of the record's, for the upper and work directories of an overlay.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn read(&self) -> Result<Found> {
        read(&self.path)
    }

    /// Writes the record; a directory that is not there yet appears with its record and its scratch directory in it.
    pub fn write(&self, record: &Record) -> Result<()> {
        self.try_write(record).map_err(|error| Error::file("write the record in", &self.path, &error))
    }

    fn try_write(&self, record: &Record) -> io::Result<()> {
        let text = format::write(record)?;
        if self.path.exists() {
            let new = self.path.join("volume.json.new");
            write_synced(&new, &text)?;
            return std::fs::rename(new, self.path.join("volume.json"));
        }
        let new = self.trash.new_directory()?;
        let fill = || {
            match &record.scratch {
                Some(scratch) => {
                    write_synced(&new.join("volume.json"), &text)?;
                    std::fs::create_dir(new.join(scratch))?;
                }
                // Worth no wait for the disk: one that a power cut tears is thrown away.
                None => std::fs::write(new.join("volume.json"), &text)?,
            }
            std::fs::rename(&new, &self.path)
        };
        fill().inspect_err(|_| {
            // The first error is the one to report; the sweep removes what stays.
            let _ = std::fs::remove_dir_all(&new);
        })
    }

    /// Removes all of it.
    pub fn remove(&self) -> Result<()> {
        self.trash.throw(&self.path).map_err(|error| Error::file("remove", &self.path, &error))
    }
}

/// All records of a data directory, which need not exist: for a process that only looks.
pub fn list(data_dir: &Path) -> Result<List> {
    let directory = published(data_dir);
    let mut list = List::default();
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(list),
        Err(error) => return Err(Error::file("list", &directory, &error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| Error::file("list", &directory, &error))?;
        match read(&entry.path()) {
            Ok(Found::Nothing) => {}
            Ok(Found::Record(record)) => list.records.push(record),
            Ok(Found::Unreadable(unreadable)) => list.unreadable.push(unreadable),
            Err(error) => {
                let (path, why) = (entry.path(), error.message);
                list.unreadable.push(Unreadable { path, volume_id: None, target: None, why });
            }
        }
    }
    Ok(list)
}

/// The scratch directory of a record in a data directory: for a process that only looks.
pub fn scratch(data_dir: &Path, record: &Record) -> Option<PathBuf> {
    let directory = published(data_dir).join(name_of(record.target.as_os_str().as_encoded_bytes()));
    Some(directory.join(record.scratch.as_ref()?))
}

fn read(directory: &Path) -> Result<Found> {
    let path = directory.join("volume.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Found::Nothing);
        }
        Err(error) => return Err(Error::file("read", &path, &error)),
    };
    match format::read(&text) {
        Ok(record) => Ok(Found::Record(record)),
        Err(failure) if failure.is_torn && !has_scratch(directory)? => {
            tracing::warn!("{} was torn by a power cut, and there is nothing beside it: it is ignored", path.display());
            Ok(Found::Nothing)
        }
        Err(format::Failure { head, why, .. }) => {
            Ok(Found::Unreadable(Unreadable { path, volume_id: head.volume_id, target: head.target, why }))
        }
    }
}

/// Whether a pod may have written something here.
fn has_scratch(directory: &Path) -> Result<bool> {
    let failed = |error| Error::file("list", directory, &error);
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        if entry.and_then(|entry| entry.file_type()).map_err(failed)?.is_dir() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// After a power cut an empty record would cost the pod a scratch layer with all that it ever wrote.
fn write_synced(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text)?;
    file.sync_data()
}

/// A name of fixed length for what may be any text.
fn name_of(text: &[u8]) -> String {
    Sha256::digest(text).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn published(data_dir: &Path) -> PathBuf {
    data_dir.join("published")
}
