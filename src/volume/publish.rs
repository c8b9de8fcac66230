//! Publish and unpublish: one mount at one target path, with what belongs to it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::build::{UpperLayer, build};
use super::error::{Error, Kind, Result};
use super::prepare::Prepared;
use super::record::Directory;
use super::{Publication, Volumes, blocking, lock, release};
use crate::kernel::mount::{MountAttrFlags, is_mount, open_directory, unmount_all};
use crate::kernel::namespace::PrivateNamespace;
use crate::spec::{Mount, Upper};

impl Volumes {
    /// Mounts the volume at its target, which is made if it is not there; its parent must be.
    ///
    /// `staged` says that [`Self::stage`] holds the volume until its unstage; a volume that is not staged (inline, or by hand) is
    /// prepared for this target alone. Publishing the same again is no work; another volume, or other attributes, at
    /// a target in use is `ALREADY_EXISTS`. On any error nothing is left behind.
    pub async fn publish(self: &Arc<Self>, publication: Publication, staged: bool) -> Result<()> {
        let this = Arc::clone(self);
        let key = target_key(&publication.target);
        let request = format!("publish {publication:?}");
        let work = async move { this.publish_now(publication, staged).await };
        self.in_flight.run(key, request, self.config.timeout, work).await
    }

    async fn publish_now(&self, publication: Publication, staged: bool) -> Result<()> {
        let target = publication.target.clone();
        let directory = Directory::of(&self.config.data_dir, &target);
        let found = {
            let (target, directory) = (target.clone(), Directory::of(&self.config.data_dir, &target));
            let look = move || Ok((is_mount(&target)?, directory.read()));
            blocking::run(format!("look at {}", publication.target.display()), look).await?
        };
        match found.map_err(|error: crate::kernel::Error| Error::from(error))? {
            (true, Some(record)) if record == publication => return Ok(()),
            (true, record) => return Err(in_use(&target, record)),
            // Left by a call that was cut short, and not for this volume.
            (false, Some(record)) if record != publication => directory.remove()?,
            (false, _) => {}
        }
        let held = match staged {
            true => self.held(&publication.volume_id, &publication.mount).await?,
            false => Arc::new(self.preparer.prepare(&publication.mount).await?),
        };
        let attach = {
            let (held, publication) = (Arc::clone(&held), publication.clone());
            let namespace = Arc::clone(&self.namespace);
            move || {
                directory.write(&publication)?;
                attach(&publication, &held, &namespace, &directory).inspect_err(|_| {
                    // The first error is the one to report; what stays is removed by unpublish or by the next call.
                    let _ = directory.remove();
                    let _ = std::fs::remove_dir(&publication.target);
                })
            }
        };
        let step = format!("mount volume {} at {}", publication.volume_id, target.display());
        let attached = blocking::run(step, attach).await?;
        if attached.is_ok() {
            lock(&self.published).insert(target, held);
        } else {
            release(held).await;
        }
        attached
    }

    /// Unmounts the target, and removes it and its scratch layer. A target that is not there is no error.
    pub async fn unpublish(self: &Arc<Self>, volume_id: &str, target: &Path) -> Result<()> {
        let this = Arc::clone(self);
        let (id, target) = (volume_id.to_owned(), target.to_owned());
        let key = target_key(&target);
        let work = async move { this.unpublish_now(&id, &target).await };
        self.in_flight.run(key, "unpublish".into(), self.config.timeout, work).await
    }

    async fn unpublish_now(&self, volume_id: &str, target: &Path) -> Result<()> {
        let directory = Directory::of(&self.config.data_dir, target);
        let held = lock(&self.published).remove(target);
        let (volume_id, path) = (volume_id.to_owned(), target.to_owned());
        let remove = move || {
            if let Some(record) = directory.read().filter(|record| record.volume_id != volume_id) {
                return Err(in_use(&path, Some(record)));
            }
            unmount_all(&path)?;
            match std::fs::remove_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::new(Kind::Internal, format!("remove {}: {error}", path.display())));
                }
                _ => {}
            }
            directory.remove()
        };
        let removed = blocking::run(format!("unmount {}", target.display()), remove).await?;
        release(held).await;
        removed
    }
}

fn attach(
    publication: &Publication,
    held: &Prepared,
    namespace: &PrivateNamespace,
    directory: &Directory,
) -> Result<()> {
    let upper = match &publication.mount {
        Mount::Overlay(overlay) if !publication.read_only => match overlay.upper {
            Upper::Directory => Some(UpperLayer::Directory(directory.scratch())),
            Upper::Tmpfs { size } => Some(UpperLayer::Tmpfs { size }),
            Upper::None => None,
        },
        _ => None,
    };
    let mut attributes = MountAttrFlags::empty();
    if publication.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    // An overlay runs files of all its layers.
    if publication.mount.is_no_exec() {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
    }
    let mount = build(held, namespace, upper.as_ref())?;
    mount.restrict(attributes)?;
    make_target(&publication.target)?;
    Ok(mount.attach(open_directory(&publication.target)?)?)
}

fn target_key(target: &Path) -> String {
    format!("target {}", target.display())
}

fn in_use(target: &Path, record: Option<Publication>) -> Error {
    let by = match record {
        Some(record) => format!("volume {}{}", record.volume_id, if record.read_only { " (read-only)" } else { "" }),
        None => "a mount that this driver did not make".into(),
    };
    Error::new(Kind::AlreadyExists, format!("target {} is in use by {by}", target.display()))
}

/// Makes the last component of the target, as the CSI spec asks for (NodePublishVolume, `target_path`).
fn make_target(target: &Path) -> Result<()> {
    match std::fs::create_dir(target) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && target.is_dir() => Ok(()),
        Err(error) => {
            let kind = match error.kind() {
                io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    Kind::FailedPrecondition
                }
                _ => Kind::Internal,
            };
            Err(Error::new(kind, format!("make target directory {}: {error}", target.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_no_target_and_a_target_needs_its_parent() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(make_target(&file).unwrap_err().kind, Kind::FailedPrecondition);
        assert_eq!(make_target(&directory.path().join("absent/target")).unwrap_err().kind, Kind::FailedPrecondition);
        make_target(&directory.path().join("target")).unwrap();
        make_target(&directory.path().join("target")).unwrap();
    }
}
