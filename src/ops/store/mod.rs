//! The images in a directory that is exported to nodes, and who in a cluster names each.

pub mod gc;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use crate::error::Result;
use crate::kernel::image::Content;
use crate::kernel::mount::open_directory;
use crate::kernel::mountinfo::{self, MountInfo};
use crate::kubernetes::inventory::Inventory;
use crate::spec::location::{Location, tails};

/// A directory of an export, as this machine sees it.
pub struct Store {
    directory: OwnedFd,
    /// What its server calls it.
    share: String,
}

/// A file that is one image, or an index of several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct File {
    /// Below the directory.
    pub path: String,
    pub size: u64,
    /// When it was read or changed last, as far as its server keeps that.
    #[serde(serialize_with = "look::seconds")]
    pub last_used: SystemTime,
    /// Which file it was, and when it was written.
    #[serde(skip)]
    pub content: Content,
    /// The names of the files beside it that it is the index of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<String>>,
    /// The objects and the indexes that name it.
    pub used_by: BTreeSet<String>,
}

impl File {
    /// The path of a file beside it.
    fn beside(&self, name: &str) -> String {
        format!("{}{name}", self.path.rfind('/').map_or("", |at| &self.path[..=at]))
    }
}

impl Store {
    /// `share` is what the server calls the directory: by default, what the mount table says of an NFS mount.
    pub fn open(path: &Path, share: Option<String>) -> std::result::Result<Store, String> {
        let directory = open_directory(path).map_err(|error| error.to_string())?;
        let share = match share {
            Some(share) if share.starts_with('/') => share,
            Some(share) => return Err(format!("--share {share}: it is no absolute path of the server")),
            None => {
                let mounts = mountinfo::read().map_err(|error| error.to_string())?;
                let path = std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))?;
                share_of(&path, &mounts).ok_or_else(|| {
                    format!("{} is on no NFS mount: say by --share what nodes call it", path.display())
                })?
            }
        };
        Ok(Store { directory, share })
    }

    /// The images, by their paths, with who names them; and the references that cannot be read, each of which may name any.
    pub fn files(&self, inventory: &Inventory) -> Result<(Vec<File>, Vec<String>)> {
        Ok(self.marked(look::files(&self.directory)?, inventory))
    }

    /// The files of [`Store::files`], as one looks at them: layers are in use by their indexes, whoever uses those.
    pub fn listed(&self, mut files: Vec<File>) -> Vec<File> {
        mark_layers(&self.directory, &mut files, |_| true);
        files
    }

    fn marked(&self, mut files: Vec<File>, inventory: &Inventory) -> (Vec<File>, Vec<String>) {
        let mut unreadable = Vec::new();
        for reference in &inventory.references {
            match &reference.locations {
                Ok(locations) => {
                    locations.iter().for_each(|location| self.mark(&mut files, location, &reference.object));
                }
                Err(why) => unreadable.push(format!("{}: {why}", reference.object)),
            }
        }
        (files, unreadable)
    }

    fn mark(&self, files: &mut [File], location: &Location, object: &str) {
        // By what its symlinks lead to, too.
        let real: BTreeSet<_> =
            tails(&location.path).filter_map(|path| look::real_path(&self.directory, path)).collect();
        for file in files {
            let is_real = match location.is_directory {
                true => real.iter().any(|directory| Path::new(&file.path).starts_with(directory)),
                false => real.contains(Path::new(&file.path)),
            };
            if is_real || location.may_be(&format!("{}/{}", self.share.trim_end_matches('/'), file.path)) {
                file.used_by.insert(object.to_owned());
            }
        }
    }
}

/// Of each index that is in use, the layers are: by their names, in whatever directory, for an index may be named by a symlink; and what lies
/// beside it by those names, where that is one.
fn mark_layers(directory: &OwnedFd, files: &mut [File], is_used: impl Fn(&File) -> bool) {
    let mut named = BTreeMap::<String, BTreeSet<String>>::new();
    for index in files.iter().filter(|file| is_used(file)) {
        for layer in index.layers.iter().flatten() {
            let real = look::real_path(directory, &index.beside(layer));
            let real = real.and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
            for name in [Some(layer.clone()), real].into_iter().flatten() {
                named.entry(name).or_default().insert(index.path.clone());
            }
        }
    }
    for file in files {
        file.used_by.extend(named.get(look::split(&file.path).1).cloned().unwrap_or_default());
    }
}

/// What the server calls a directory on an NFS mount of this machine.
fn share_of(directory: &Path, mounts: &[MountInfo]) -> Option<String> {
    let over = |mount: &&MountInfo| directory.starts_with(&mount.mount_point);
    let mount = mounts.iter().filter(over).max_by_key(|mount| mount.mount_point.len())?;
    if !matches!(mount.fs_type.as_str(), "nfs" | "nfs4") {
        return None;
    }
    let (_, export) = mount.source.split_once(":/")?;
    let below = directory.strip_prefix(&mount.mount_point).ok()?;
    let path: PathBuf = [Path::new("/"), Path::new(export), below].iter().collect();
    Some(path.to_string_lossy().trim_end_matches('/').to_owned() + if path == Path::new("/") { "/" } else { "" })
}

#[cfg(test)]
mod tests;
