//! What is written down about a staged volume: which files its images were. The next process finds them by it while they are attached, so
//! that it asks no server for them, and no pod gets another version of an image than those beside it.
//!
//! It is for this boot of the node alone, and only read by a driver that writes the same format: without it a volume is prepared anew.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::Mount as Written;
use super::{Records, name_of};
use crate::error::{Error, Result};
use crate::kernel::image::ImageIdentity;
use crate::kernel::{boot, verity};
use crate::spec::Mount;
use crate::volume::source::{ImageKey, Known};

/// What is written; other formats are not read.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    format: u32,
    boot_id: String,
    volume_id: String,
    mount: Written,
    /// In the order in which the images stand in `mount`, one inside of another after it.
    identities: Vec<Identity>,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: u64,
    /// Of an image that is verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    root: Option<String>,
    /// Of an image of which a part is mounted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    sif: bool,
    /// Of an image that several servers have, the place of this one in their list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    server: Option<u8>,
}

impl Records {
    pub fn write_staged(&self, volume_id: &str, mount: &Mount, images: &[Known]) -> Result<()> {
        let path = self.staged(volume_id);
        let identity = |known: &Known| {
            let ImageIdentity { device, inode, size, changed } = known.key.identity;
            let root = known.key.verity.map(|root| verity::hexadecimal(&root));
            let ImageKey { is_sif: sif, server, .. } = known.key;
            Identity { device, inode, size, changed, root, sif, server }
        };
        let contents = images.iter().map(|known| (known.image.clone(), known.content)).collect();
        let write = || {
            let text = serde_json::to_vec(&Text {
                format: FORMAT,
                boot_id: boot::id().map_err(io::Error::other)?,
                volume_id: volume_id.into(),
                mount: Written::of(mount, &contents),
                identities: images.iter().map(identity).collect(),
            })?;
            let new = path.with_extension("new");
            std::fs::write(&new, text)?;
            std::fs::rename(new, &path)
        };
        write().map_err(|error| Error::file("write", &path, &error))
    }

    /// The images of a volume that an earlier process staged with this mount; none where it did not.
    pub fn read_staged(&self, volume_id: &str, mount: &Mount) -> Vec<Known> {
        let path = self.staged(volume_id);
        match read(&path, volume_id, mount) {
            Ok(images) => images.unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!("read {}: {error}: the volume is prepared anew", path.display());
                Vec::new()
            }
        }
    }

    /// One that is not there is no error.
    pub fn remove_staged(&self, volume_id: &str) -> Result<()> {
        let path = self.staged(volume_id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", &path, &error)),
            _ => Ok(()),
        }
    }

    /// Removes what was written before the node was booted.
    pub fn sweep_staged(&self) -> io::Result<()> {
        let boot_id = boot::id().map_err(io::Error::other)?;
        for entry in std::fs::read_dir(staged(&self.data_dir))? {
            let path = entry?.path();
            // One that is gone meanwhile is of a volume that was unstaged.
            let Ok(text) = std::fs::read(&path) else { continue };
            if serde_json::from_slice::<Text>(&text).is_ok_and(|text| text.boot_id != boot_id) {
                let _ = std::fs::remove_file(&path);
            }
        }
        Ok(())
    }

    fn staged(&self, volume_id: &str) -> PathBuf {
        staged(&self.data_dir).join(format!("{}.json", name_of(volume_id.as_bytes())))
    }
}

pub fn staged(data_dir: &Path) -> PathBuf {
    data_dir.join("staged")
}

fn read(path: &Path, volume_id: &str, mount: &Mount) -> io::Result<Option<Vec<Known>>> {
    let text: Text = serde_json::from_slice(&std::fs::read(path)?)?;
    if text.format != FORMAT || text.boot_id != boot::id().map_err(io::Error::other)? || text.volume_id != volume_id {
        return Ok(None);
    }
    let mut images = Vec::new();
    let written = text.mount.spec(&mut images).map_err(io::Error::other)?;
    if written != *mount || images.len() != text.identities.len() {
        return Ok(None);
    }
    let known = |((image, content), identity): ((_, _), Identity)| {
        let Identity { device, inode, size, changed, root, sif, server } = identity;
        let verity = root.and_then(|root| verity::read_hexadecimal(&root));
        let key = ImageKey { identity: ImageIdentity { device, inode, size, changed }, verity, is_sif: sif, server };
        Known { image, content, key }
    };
    Ok(Some(images.into_iter().zip(text.identities).map(known).collect()))
}
