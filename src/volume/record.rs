//! What the driver writes down about a published path: a hint, always checked against the kernel.
//!
//! Each published path has one directory below `published`, named by a hash of the path: `volume.json`, and `scratch` for
//! the upper layer of an overlay.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Publication;
use super::error::{Error, Kind, Result};

/// The directory of one published path; it need not exist.
pub struct Directory(PathBuf);

impl Directory {
    pub fn of(data_dir: &Path, target: &Path) -> Self {
        let digest = Sha256::digest(target.as_os_str().as_encoded_bytes());
        let name: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Directory(published(data_dir).join(name))
    }

    /// Where the upper and work directories of an overlay are made.
    pub fn scratch(&self) -> PathBuf {
        self.0.join("scratch")
    }

    /// `None` where there is no record, or none that this version can read: it is a hint.
    pub fn read(&self) -> Option<Publication> {
        read(&self.0)
    }

    /// Makes the directory with its record, and with an empty scratch directory if there is none.
    pub fn write(&self, record: &Publication) -> Result<()> {
        create_directory(&self.scratch())?;
        let write = || -> io::Result<()> {
            let new = self.0.join("volume.json.new");
            std::fs::write(&new, serde_json::to_vec_pretty(record)?)?;
            std::fs::rename(new, self.0.join("volume.json"))
        };
        write().map_err(|error| failed("write the record in", &self.0, &error))
    }

    /// Removes all of it. Symlinks in the scratch layer are removed, never followed.
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &self.0, &error)),
            _ => Ok(()),
        }
    }
}

/// All records, in no order.
pub fn all(data_dir: &Path) -> Result<Vec<Publication>> {
    match std::fs::read_dir(published(data_dir)) {
        Ok(entries) => Ok(entries.filter_map(|entry| read(&entry.ok()?.path())).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("list", &published(data_dir), &error)),
    }
}

/// Makes a directory, and those above it, that only root can enter.
pub fn create_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| failed("make directory", path, &error))
}

fn read(directory: &Path) -> Option<Publication> {
    serde_json::from_slice(&std::fs::read(directory.join("volume.json")).ok()?).ok()
}

fn published(data_dir: &Path) -> PathBuf {
    data_dir.join("published")
}

fn failed(action: &str, path: &Path, error: &io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{action} {}: {error}", path.display()))
}
