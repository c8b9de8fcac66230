//! Publish and unpublish: one mount at one target path, with what belongs to it.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::in_flight::{Key, Lease, Request};
use super::publication::Publication;
use super::record::{Directory, Found, List, Record};
use super::source::{Prepared, Storage, UpperLayer, build};
use super::{RELEASE_PATIENCE, Volumes, release};
use crate::blocking::{self, measured};
use crate::error::{Error, Kind, Result};
use crate::kernel::mount::{CONFINED, DetachedMount, MountAttrFlags, open_directory};
use crate::lock::lock;
use crate::places::run_at;
use crate::spec::Upper;
use crate::spec::policy::Share;

impl Volumes {
    /// Mounts the volume at its target, which is made if it is not there; its parent must be.
    ///
    /// `staged` says that the volume is staged, by this process or an earlier one; another (inline, or by hand) is prepared for this target
    /// alone. Publishing the same again is no work; another volume, or other attributes, at
    /// a target in use is `ALREADY_EXISTS`. On any error nothing new is left behind.
    pub async fn publish(self: &Arc<Self>, publication: Publication, staged: bool) -> Result<()> {
        if publication.mount.is_of_the_node() && !publication.read_only {
            let message = "a directory of the node is given to who mounts it read-only, and to nobody else: set \"readOnly: true\" \
                           where the pod names the claim, or on its inline volume (by hand: --read-only)";
            return Err(Error::new(Kind::FailedPrecondition, message));
        }
        let this = Arc::clone(self);
        let (key, request) = (Key::Target(publication.target.clone()), Request::Publish(publication.clone()));
        let work = |lease| this.publish_now(publication, staged, lease);
        self.in_flight.run(key, request, self.timeout, work).await
    }

    async fn publish_now(self: Arc<Self>, publication: Publication, staged: bool, lease: Lease) -> Result<()> {
        let target = publication.target.clone();
        let directory = self.records.of(&target);
        let look = {
            let (kernel, target, directory) = (Arc::clone(&self.kernel), target.clone(), directory.clone());
            move || Ok::<_, Error>((kernel.is_mount(&target)?, directory.read()?))
        };
        match blocking::run(format!("look at {}", target.display()), look).await? {
            (_, Found::Unreadable(unreadable)) => return Err(unreadable.into()),
            (true, Found::Record(record)) if record.is_of(&publication) => return Ok(()),
            (true, Found::Record(record)) => return Err(in_use(&target, Some(&record))),
            (true, Found::Nothing) => return Err(in_use(&target, None)),
            (false, Found::Record(_) | Found::Nothing) => {}
        }
        let held = match staged {
            true => self.staged(&publication.volume_id, &publication.mount)?,
            false => None,
        };
        let (held, asked) = match held {
            Some(held) => {
                let asked = held.probe().await;
                (held, asked)
            }
            None if staged => (self.staged_before(&publication.volume_id, &publication.mount).await?, Ok(())),
            None => (Arc::new(self.preparer.prepare(&publication.mount, &[]).await?), Ok(())),
        };
        let step = format!("mount volume {} at {}", publication.volume_id, target.display());
        let mounted = match asked {
            Ok(()) => {
                let places = held.places_to_build();
                let (this, held) = (Arc::clone(&self), Arc::clone(&held));
                let mount = move || this.mount_at_target(&publication, &held, &directory, &lease);
                run_at(places, step, mount).await
            }
            Err(error) => Err(error),
        };
        if mounted.is_err() {
            release(held).await;
        }
        mounted
    }

    /// Puts the volume at its target, unless the call was superseded: then all is left to the call that did it.
    fn mount_at_target(
        &self,
        publication: &Publication,
        held: &Arc<Prepared>,
        directory: &Directory,
        lease: &Lease,
    ) -> Result<()> {
        let recorded = lease.change(|| self.record(publication, held, directory))?;
        let mount = self.detached(publication, held, recorded.upper.as_ref());
        let replaced = lease.change(|| {
            let attach = || {
                let mount = mount?;
                make_target(&publication.target)?;
                measured("attach", || self.kernel.attach(&mount, open_directory(&publication.target)?.as_fd()))?;
                Ok(lock(&self.published).insert(publication.target.clone(), Arc::clone(held)))
            };
            attach().inspect_err(|_| {
                // The first error is the one to report; what stays is removed by unpublish or by the next call.
                if recorded.is_new {
                    let _ = directory.remove();
                }
                let _ = std::fs::remove_dir(&publication.target);
            })
        });
        // If there was something to replace, it belongs to a mount that somebody else took off. It is dropped here, where no lock is held.
        replaced.map(drop)
    }

    /// The volume's mount, attached nowhere.
    fn detached(
        &self,
        publication: &Publication,
        held: &Prepared,
        upper: Option<&UpperLayer>,
    ) -> Result<DetachedMount> {
        let mount = build(held, &*self.kernel, upper)?;
        let flags = publication.mount.flags();
        let attributes = [
            // An image is read-only by its superblock. A flag of its mount is one that a user namespace locks, and a container there asks
            // for it without.
            (publication.read_only && !held.is_image(), MountAttrFlags::MOUNT_ATTR_RDONLY),
            // An overlay runs files of all its layers.
            (flags.no_exec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
            (flags.no_suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (flags.no_dev, MountAttrFlags::MOUNT_ATTR_NODEV),
            // All users of the node may come there.
            (publication.is_by_hand(), CONFINED),
        ];
        let attributes = attributes.into_iter().filter_map(|(is_set, attribute)| is_set.then_some(attribute)).collect();
        if attributes != MountAttrFlags::empty() {
            self.kernel.restrict(&mount, attributes)?;
        }
        Ok(mount)
    }

    /// Writes down what is about to be mounted.
    fn record(&self, publication: &Publication, held: &Prepared, directory: &Directory) -> Result<Recorded> {
        let _recording = lock(&self.recording);
        self.check_exclusive(publication)?;
        self.check_share(publication)?;
        let (mut scratch, mut is_new) = (None, true);
        match directory.read()? {
            // It is of the time before the node was rebooted: the pod's scratch layer is still its own.
            Found::Record(record) if record.is_of(publication) => (scratch, is_new) = (record.scratch, false),
            // It was left by a call that was cut short, and is not for this volume.
            Found::Record(_) | Found::Nothing => directory.remove()?,
            Found::Unreadable(unreadable) => return Err(unreadable.into()),
        }
        let storage = match publication.mount.upper(publication.read_only) {
            Upper::None => None,
            Upper::Tmpfs { size } => Some(Storage::Tmpfs { size }),
            Upper::Directory { size } => {
                let path = directory.scratch(scratch.get_or_insert_with(|| format!("scratch-{}", now())));
                Some(match size {
                    None => Storage::Directory(path),
                    Some(size) => Storage::File { path: path.join("layer"), size },
                })
            }
        };
        let images = held.images().into_iter().map(|known| (known.image, known.content)).collect();
        directory.write(&Record::new(publication, images, scratch))?;
        let upper = storage.map(|storage| UpperLayer {
            storage,
            root: publication.mount.upper_root(),
            group: publication.group,
        });
        Ok(Recorded { upper, is_new })
    }

    /// A volume for one pod is published once: by a mount, or by a call that is about to make it.
    fn check_exclusive(&self, publication: &Publication) -> Result<()> {
        if !publication.exclusive {
            return Ok(());
        }
        let List { records, unreadable } = self.records.list()?;
        let readable = records.into_iter().map(|record| (record.volume_id, record.target));
        let others = unreadable.into_iter().filter_map(|record| Some((record.volume_id?, record.target?)));
        for (volume_id, target) in readable.chain(others) {
            if volume_id == publication.volume_id
                && target != publication.target
                && (self.in_flight.is_running(&Key::Target(target.clone())) || self.kernel.is_mount(&target)?)
            {
                let message =
                    format!("volume {volume_id} is for one pod at a time and published at {}", target.display());
                return Err(Error::new(Kind::FailedPrecondition, message));
            }
        }
        Ok(())
    }

    /// The writable layers of a namespace's pods together are no more than the policy says.
    fn check_share(&self, publication: &Publication) -> Result<()> {
        let Some(namespace) = &publication.namespace else { return Ok(()) };
        let (share, upper) = (self.preparer.policy().share(namespace), publication.mount.upper(publication.read_only));
        if upper == Upper::None || (share.count, share.size) == (None, None) {
            return Ok(());
        }
        let (mut count, mut size) = (1, upper.size().unwrap_or_default());
        for record in self.records.list()?.records {
            let same = record.namespace.as_ref() == Some(namespace) && record.target != publication.target;
            let upper = record.mount.upper(record.read_only);
            if same && upper != Upper::None {
                count += 1;
                size = size.saturating_add(upper.size().unwrap_or_default());
            }
        }
        let message = match share {
            Share { count: Some(most), .. } if count > most => {
                format!("{most} writable layers, and this would be its {count}th")
            }
            Share { size: Some(most), .. } if size > most => {
                format!("{most} bytes of writable layers, and with this they would be {size}")
            }
            Share { .. } => return Ok(()),
        };
        let message = format!("the policy allows the pods of namespace {namespace} on one node {message}");
        Err(Error::new(Kind::ResourceExhausted, message))
    }

    /// Unmounts the target, and removes it and its scratch layer, also while it is being published. A target that is not
    /// there is no error.
    pub async fn unpublish(self: &Arc<Self>, volume_id: &str, target: &Path) -> Result<()> {
        let this = Arc::clone(self);
        let (id, target) = (volume_id.to_owned(), target.to_owned());
        let (key, request) = (Key::Target(target.clone()), Request::Unpublish { volume_id: volume_id.to_owned() });
        let work = |_| async move { this.unpublish_now(id, target).await };
        self.in_flight.run(key, request, self.timeout, work).await
    }

    async fn unpublish_now(self: Arc<Self>, volume_id: String, target: PathBuf) -> Result<()> {
        let look = {
            let (this, target) = (Arc::clone(&self), target.clone());
            move || this.check_whose(&volume_id, &target)
        };
        blocking::run(format!("look whose {} is", target.display()), look).await?;
        self.unmount(&target).await?;
        let held = lock(&self.published).remove(&target);
        self.report.forget(&target);
        let directory = self.records.of(&target);
        let remove = move || {
            match std::fs::remove_dir(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    // Something that nobody published.
                    let foreign =
                        matches!(error.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::DirectoryNotEmpty);
                    let kind = if foreign { Kind::FailedPrecondition } else { Kind::Internal };
                    return Err(Error::new(kind, format!("remove target directory {}: {error}", target.display())));
                }
                _ => {}
            }
            directory.remove()
        };
        let removed = blocking::run("remove the target and its scratch layer", remove).await;
        release(held).await;
        removed
    }

    /// Whether what is at the target is this volume. Where there is no record, only a mount that carries the driver's mark is.
    fn check_whose(&self, volume_id: &str, target: &Path) -> Result<()> {
        match self.records.of(target).read()? {
            Found::Record(record) if record.volume_id == volume_id => return Ok(()),
            Found::Record(record) => return Err(in_use(target, Some(&record)).with_kind(Kind::NotFound)),
            Found::Unreadable(unreadable) if unreadable.may_be_of(volume_id) => {
                // There is one because the driver published here. What belongs to the pod ends with the pod.
                tracing::warn!(target = %target.display(), "unpublished all the same: {unreadable}");
                return Ok(());
            }
            Found::Unreadable(unreadable) => {
                let message = format!("target {} is in use by another volume: {unreadable}", target.display());
                return Err(Error::new(Kind::NotFound, message));
            }
            Found::Nothing => {}
        }
        let table = self.kernel.mounts()?;
        let here: Vec<_> = table.iter().filter(|mount| Path::new(&mount.mount_point) == target).collect();
        if here.is_empty() {
            return Ok(());
        }
        let devices = self.kernel.loop_devices(self.mark.tag())?;
        let devices: Vec<_> = devices.iter().map(|attached| attached.device.number()).collect();
        match here.iter().all(|mount| self.mark.is_on(mount, &devices)) {
            true => Ok(()),
            false => Err(in_use(target, None).with_kind(Kind::FailedPrecondition)),
        }
    }

    /// Takes off what is mounted at the target. The name is free at once; what the kernel has to tell a dead server after that
    /// is not waited for.
    async fn unmount(&self, target: &Path) -> Result<()> {
        let (kernel, path) = (Arc::clone(&self.kernel), target.to_owned());
        let unmount = move || measured("unmount", || kernel.unmount_all(&path));
        // On a thread of its own: what dead servers keep the others from letting go of is in the way of no pod.
        let unmounted = blocking::run(format!("unmount {}", target.display()), unmount);
        tokio::pin!(unmounted);
        if let Ok(done) = tokio::time::timeout(RELEASE_PATIENCE, &mut unmounted).await {
            return done;
        }
        let kernel = Arc::clone(&self.kernel);
        // Of the mount table, because to look at the path might ask the dead server.
        let table = blocking::run("read the mount table", move || kernel.mounts()).await?;
        if table.iter().any(|mount| Path::new(&mount.mount_point) == target) {
            return unmounted.await;
        }
        tracing::warn!("unmounted {}; the kernel still waits for the server and goes on by itself", target.display());
        Ok(())
    }
}

/// What was written down for a mount that is about to be made.
struct Recorded {
    /// The writable layer for it.
    upper: Option<UpperLayer>,
    /// Nothing of an earlier mount at this path is in it.
    is_new: bool,
}

/// Nanoseconds since 1970: a name that no earlier attempt had.
fn now() -> u128 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos())
}

fn in_use(target: &Path, record: Option<&Record>) -> Error {
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
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_directory(target) => Ok(()),
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

/// A symlink to a directory is none: the mount would be somewhere else.
fn is_directory(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
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
