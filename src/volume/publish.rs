//! Publish and unpublish: one mount at one target path, with what belongs to it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::blocking::measured;
use super::build::{UpperLayer, build};
use super::error::{Error, Kind, Result};
use super::in_flight::{Lease, Other};
use super::prepare::Prepared;
use super::record::{self, Directory, Record};
use super::{Publication, RELEASE_PATIENCE, Volumes, blocking, lock, release};
use crate::kernel::loop_device::{self, Tag};
use crate::kernel::mount::{DetachedMount, MountAttrFlags, is_mount, open_directory, unmount_all};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::{self, mountinfo};
use crate::spec::{Mount, Upper};

impl Volumes {
    /// Mounts the volume at its target, which is made if it is not there; its parent must be.
    ///
    /// `staged` says that [`Self::stage`] holds the volume; one that is not staged (inline, by hand, or after a restart of the
    /// driver) is prepared for this target alone. Publishing the same again is no work; another volume, or other attributes, at
    /// a target in use is `ALREADY_EXISTS`. On any error nothing is left behind.
    pub async fn publish(self: &Arc<Self>, publication: Publication, staged: bool) -> Result<()> {
        let this = Arc::clone(self);
        let key = target_key(&publication.target);
        let request = format!("publish {publication:?}");
        let work = |lease| this.publish_now(publication, staged, lease);
        self.in_flight.run(key, request, Other::Await, self.config.timeout, work).await
    }

    async fn publish_now(self: Arc<Self>, publication: Publication, staged: bool, lease: Lease) -> Result<()> {
        let target = publication.target.clone();
        let directory = Directory::of(&self.config.data_dir, &target);
        let look = {
            let (target, directory) = (target.clone(), directory.clone());
            move || Ok((is_mount(&target)?, directory.read()))
        };
        let found: kernel::Result<_> = blocking::run(format!("look at {}", target.display()), look).await?;
        match found? {
            (true, Some(record)) if record.publication == publication => return Ok(()),
            (true, record) => return Err(in_use(&target, record)),
            (false, _) => {}
        }
        let held = match staged {
            true => self.staged(&publication.volume_id, &publication.mount)?,
            false => None,
        };
        let held = match held {
            Some(held) => held,
            None => Arc::new(self.preparer.prepare(&publication.mount).await?),
        };
        let step = format!("mount volume {} at {}", publication.volume_id, target.display());
        let attached = match self.preparer.ask(&publication.mount).await {
            Ok(places) => {
                let (this, held) = (Arc::clone(&self), Arc::clone(&held));
                let attach = move || this.attach(&publication, &held, &directory, &lease);
                blocking::run_at(places, step, attach).await.and_then(|attached| attached)
            }
            Err(error) => Err(error),
        };
        if attached.is_err() {
            release(held).await;
        }
        attached
    }

    /// Puts the volume at its target, unless the call was superseded: then all is left to the call that did it.
    fn attach(
        &self,
        publication: &Publication,
        held: &Arc<Prepared>,
        directory: &Directory,
        lease: &Lease,
    ) -> Result<()> {
        let upper = lease.change(|| self.record(publication, held, directory))?;
        let mount = mount(publication, held, &self.namespace, upper.as_ref());
        let replaced = lease.change(|| {
            let attach = || {
                let mount = mount?;
                make_target(&publication.target)?;
                measured("attach", || mount.attach(open_directory(&publication.target)?))?;
                Ok(lock(&self.published).insert(publication.target.clone(), Arc::clone(held)))
            };
            attach().inspect_err(|_| {
                // The first error is the one to report; what stays is removed by unpublish or by the next call.
                let _ = directory.remove(&self.trash);
                let _ = std::fs::remove_dir(&publication.target);
            })
        });
        // Of a mount that somebody else took off. Released here, where no lock is held.
        replaced.map(drop)
    }

    /// Writes down what is about to be mounted, and returns the writable layer for it.
    fn record(&self, publication: &Publication, held: &Prepared, directory: &Directory) -> Result<Option<UpperLayer>> {
        let _recording = lock(&self.recording);
        self.check_exclusive(publication)?;
        let mut scratch = None;
        match directory.read() {
            // Of the time before the node was rebooted: the pod's scratch layer is still its own.
            Some(record) if record.publication == *publication => scratch = record.scratch,
            // Left by a call that was cut short, and not for this volume.
            _ => directory.remove(&self.trash)?,
        }
        let upper = match &publication.mount {
            Mount::Overlay(overlay) if !publication.read_only => overlay.upper,
            _ => Upper::None,
        };
        if upper == Upper::Directory {
            scratch = scratch.or_else(|| Some(format!("scratch-{}", now())));
        }
        let upper = match (upper, &scratch) {
            (Upper::Tmpfs { size }, _) => Some(UpperLayer::Tmpfs { size }),
            (Upper::Directory, Some(name)) => Some(UpperLayer::Directory(directory.scratch(name))),
            _ => None,
        };
        let mut contents = Vec::new();
        held.contents(&mut contents);
        directory.write(&Record { publication: publication.clone(), contents, scratch }, &self.trash)?;
        Ok(upper)
    }

    /// A volume for one pod is published once: by a mount, or by a call that is about to make it.
    fn check_exclusive(&self, publication: &Publication) -> Result<()> {
        if !publication.exclusive {
            return Ok(());
        }
        for Record { publication: other, .. } in record::all(&self.config.data_dir)? {
            if other.volume_id == publication.volume_id
                && other.target != publication.target
                && (self.in_flight.is_running(&target_key(&other.target)) || is_mount(&other.target)?)
            {
                let Publication { volume_id, target, .. } = other;
                let message =
                    format!("volume {volume_id} is for one pod at a time and published at {}", target.display());
                return Err(Error::new(Kind::FailedPrecondition, message));
            }
        }
        Ok(())
    }

    /// Unmounts the target, and removes it and its scratch layer, also while it is being published. A target that is not
    /// there is no error.
    pub async fn unpublish(self: &Arc<Self>, volume_id: &str, target: &Path) -> Result<()> {
        let this = Arc::clone(self);
        let (id, target) = (volume_id.to_owned(), target.to_owned());
        let key = target_key(&target);
        let work = |_| async move { this.unpublish_now(id, target).await };
        let request = format!("unpublish {volume_id}");
        self.in_flight.run(key, request, Other::Supersede, self.config.timeout, work).await
    }

    async fn unpublish_now(&self, volume_id: String, target: PathBuf) -> Result<()> {
        let directory = Directory::of(&self.config.data_dir, &target);
        let look = {
            let (target, directory) = (target.clone(), directory.clone());
            let (driver_name, tag) = (self.config.driver_name.clone(), Tag::new(&self.config.driver_name));
            move || match directory.read() {
                Some(record) if record.publication.volume_id == volume_id => Ok(()),
                Some(record) => Err(Error { kind: Kind::NotFound, ..in_use(&target, Some(record)) }),
                None => check_ours(&target, &driver_name, &tag),
            }
        };
        blocking::run(format!("look whose {} is", target.display()), look).await??;
        unmount(&target).await?;
        let held = lock(&self.published).remove(&target);
        lock(&self.abnormal).remove(&target);
        let trash = self.trash.clone();
        let remove = move || {
            match std::fs::remove_dir(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::new(Kind::Internal, format!("remove {}: {error}", target.display())));
                }
                _ => {}
            }
            directory.remove(&trash)
        };
        let removed = blocking::run("remove the target and its scratch layer", remove).await?;
        release(held).await;
        removed
    }
}

/// Where there is no record, only a mount that carries the driver's mark is taken off.
fn check_ours(target: &Path, driver_name: &str, tag: &Tag) -> Result<()> {
    let table = mountinfo::read()?;
    let mut here = table.iter().filter(|mount| Path::new(&mount.mount_point) == target).peekable();
    if here.peek().is_none() {
        return Ok(());
    }
    let devices: Vec<_> = loop_device::list(tag)?.iter().map(|attached| attached.device.number()).collect();
    let ours = |mount: &mountinfo::MountInfo| match mount.device {
        (loop_device::MAJOR, number) => devices.contains(&number),
        _ => mount.fs_type == "overlay" && mount.source == driver_name,
    };
    match here.all(ours) {
        true => Ok(()),
        false => Err(Error { kind: Kind::FailedPrecondition, ..in_use(target, None) }),
    }
}

/// Nanoseconds since 1970: a name that no earlier attempt had.
fn now() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos())
}

/// Takes off what is mounted at the target. The name is free at once; what the kernel has to tell a dead server after that
/// is not waited for.
async fn unmount(target: &Path) -> Result<()> {
    let path = target.to_owned();
    let unmount = move || measured("unmount", || unmount_all(&path));
    let unmounted = blocking::release(format!("unmount {}", target.display()), unmount);
    tokio::pin!(unmounted);
    if let Ok(done) = tokio::time::timeout(RELEASE_PATIENCE, &mut unmounted).await {
        done??;
        return Ok(());
    }
    let path = target.to_owned();
    // Of the mount table, because to look at the path might ask the dead server.
    let table = blocking::run("read the mount table", mountinfo::read).await??;
    if table.iter().any(|mount| Path::new(&mount.mount_point) == path) {
        unmounted.await??;
    } else {
        tracing::warn!("unmounted {}; the kernel still waits for the server and goes on by itself", path.display());
    }
    Ok(())
}

/// The volume's mount, attached nowhere.
fn mount(
    publication: &Publication,
    held: &Prepared,
    namespace: &PrivateNamespace,
    upper: Option<&UpperLayer>,
) -> Result<DetachedMount> {
    let mut attributes = MountAttrFlags::empty();
    if publication.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    // An overlay runs files of all its layers.
    if publication.mount.is_no_exec() {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
    }
    let mount = build(held, namespace, upper)?;
    mount.restrict(attributes)?;
    Ok(mount)
}

fn target_key(target: &Path) -> String {
    format!("target {}", target.display())
}

fn in_use(target: &Path, record: Option<Record>) -> Error {
    let by = match record {
        Some(Record { publication: record, .. }) => {
            format!("volume {}{}", record.volume_id, if record.read_only { " (read-only)" } else { "" })
        }
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
