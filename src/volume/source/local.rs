//! Images that are read from this node's disk: copied behind the volume's back, and their devices moved to the copy under whoever reads.

use std::sync::Arc;
use std::time::Duration;

use super::prepare::{Images, Preparer};
use super::prepared::{ImageKey, ImageOnLoop, Origin, Prepared, PreparedBase};
use crate::blocking::{self, OffThread};
use crate::error::{Error, Kind, Result};
use crate::kernel::file_system::FileSystem;
use crate::kernel::image::{Content, Image, ImageIdentity};
use crate::kernel::loop_device::{Attached, Reads};
use crate::kernel::{self, Doing};
use crate::metrics;
use crate::places::run_at;
use crate::spec::Loopback;
use crate::volume::cache::{Cache, Entry, Name, Original, Source, other_bytes, stands_on};

/// How long a server may take to say what an image is, where there is a copy to begin with.
const PATIENCE: Duration = Duration::from_secs(10);

impl Preparer {
    /// The name of an image that is to be copied to this node.
    pub(super) fn copied(&self, image: &Loopback) -> Result<Option<Name>> {
        let Some(name) = Name::of(image) else { return Ok(None) };
        Ok(self.cache.wants(image, self.policy().node_cache())?.then_some(name))
    }

    /// The loop device of an image that is to be copied: of the copy, where there is one of what the server has now, or where the server
    /// does not answer. Else it is of the file on the server, until that is copied.
    pub(super) async fn image_or_copy(
        &self,
        spec: &Loopback,
        name: Name,
        opened: impl Future<Output = Result<(PreparedBase, OffThread<Image>)>>,
        file_system: FileSystem,
    ) -> Result<ImageOnLoop> {
        let opened = match self.cache.has(&name).await {
            false => opened.await,
            true => tokio::time::timeout(PATIENCE, opened).await.unwrap_or_else(|_| {
                let message = format!("no answer in {} s: is the server up?", PATIENCE.as_secs());
                Err(Error::new(Kind::Unavailable, message))
            }),
        };
        let (base, image) = match opened {
            Ok(opened) => opened,
            Err(error) if error.kind == Kind::Unavailable => {
                let Some((original, copy)) = self.cache.last_known(&name, spec.digest).await? else {
                    return Err(error);
                };
                let root = self.root_hash(spec, None).await?;
                metrics::cache().hits.inc();
                tracing::warn!("{name} begins with its copy on this node: {error}");
                let attached = self.attach(spec, copy, root, file_system, Origin::Copy).await?;
                return Ok(ImageOnLoop { spec: spec.clone(), content: original.content(), attached });
            }
            Err(error) => {
                if is_of_server(error.kind)
                    && let Err(error) = self.cache.is_gone(&name).await
                {
                    tracing::warn!(%error, "an older copy is not marked");
                }
                return Err(error);
            }
        };
        let (original, content) = (Original::of(name, &image), image.content);
        let root = self.root_hash(spec, Some(&base)).await?;
        if let Some(copy) = self.cache.confirmed(&original, spec.digest).await? {
            metrics::cache().hits.inc();
            let attached = self.attach(spec, copy, root, file_system, Origin::Copy).await?;
            return Ok(ImageOnLoop { spec: spec.clone(), content, attached });
        }
        metrics::cache().misses.inc();
        let source = self.source(original, &image, &base)?;
        let identity = image.identity;
        let attached = self.attach(spec, image, root, file_system, Origin::Base(base.clone())).await?;
        self.copy_behind(source, identity, base);
        Ok(ImageOnLoop { spec: spec.clone(), content, attached })
    }

    /// Copies an image to this node and waits for it, whether a volume uses it or not; says what it is.
    pub async fn warm(&self, spec: &Loopback) -> Result<Entry> {
        let Some(name) = Name::of(spec) else {
            let message = format!("image {} lies on no export: only such images are copied", spec.path);
            return Err(Error::new(Kind::FailedPrecondition, message));
        };
        let (base, image) = self.open_image(spec, &[], None).await?;
        let original = Original::of(name.clone(), &image);
        if self.cache.confirmed(&original, spec.digest).await?.is_none() {
            self.cache.copy(self.source(original.clone(), &image, &base)?).await?;
        }
        let copies = self.cache.copies_of(&name).await?;
        copies.into_iter().find(|copy| copy.original == original).ok_or_else(|| {
            Error::new(Kind::Aborted, format!("{name} is being copied by another process: see 'status' there"))
        })
    }

    /// The copies of this node.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    fn source(&self, original: Original, image: &Image, base: &PreparedBase) -> Result<Source> {
        let file = image.file.try_clone().doing(|| "keep an image open".into())?;
        Ok(Source { original, file: OffThread::new(file), places: base.places() })
    }

    /// Copies an image while others use it, and then moves the device that stands on it.
    fn copy_behind(&self, source: Source, identity: ImageIdentity, base: PreparedBase) {
        let (cache, mover) = (Arc::clone(&self.cache), self.mover());
        tokio::spawn(async move {
            // What failed was logged.
            if let Ok(Some(copy)) = cache.copy(source).await {
                mover.move_to(copy, identity, &base).await;
            }
        });
    }

    fn mover(&self) -> Mover {
        let (kernel, mark, images) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.images));
        Mover { kernel, mark, images }
    }

    /// Goes on with what an earlier process, or an earlier failure, left undone for these images, of which each is published: copies that
    /// are not complete, devices that still stand on a file of a server. Where a server does not answer, nothing is done.
    pub async fn tend(&self, images: Vec<(Loopback, Content)>) -> Result<()> {
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let list = move || {
            let identities = kernel.loop_devices(mark.tag())?.into_iter().map(|attached| attached.identity);
            Ok::<_, kernel::Error>(identities.collect::<Vec<_>>())
        };
        let devices = blocking::run("look at the loop devices", list).await?;
        for (image, content) in images {
            // A volume whose digest cannot be checked any more says so when it is published.
            let Ok(Some(name)) = self.copied(&image) else { continue };
            let is_it = |device: &&ImageIdentity| (device.inode, device.size) == (content.inode, content.size);
            if devices.iter().any(|device| is_it(&device))
                && let Err(error) = self.tend_one(&image, name, content).await
            {
                tracing::debug!(%error, "an image is left on its server");
            }
        }
        Ok(())
    }

    async fn tend_one(&self, spec: &Loopback, name: Name, content: Content) -> Result<()> {
        let (base, image) = self.open_image(spec, &[], None).await?;
        if image.content != content {
            return Ok(());
        }
        let (original, identity) = (Original::of(name, &image), image.identity);
        match self.cache.confirmed(&original, None).await? {
            Some(copy) => self.mover().move_to(copy, identity, &base).await,
            None => self.copy_behind(self.source(original, &image, &base)?, identity, base),
        }
        Ok(())
    }

    /// The name that the copy of a known image has in the directory of copies.
    pub(super) fn copy_of(&self, image: &Loopback, content: Content, identity: ImageIdentity) -> Option<String> {
        Some(Original::new(Name::of(image)?, content, identity.changed).id())
    }

    /// What was read from each loop device, by its number, and which image it is of. Asks no server.
    pub async fn reads(&self) -> Result<Vec<(u32, ImageIdentity, Reads)>> {
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let look = move || {
            let devices = kernel.loop_devices(mark.tag())?.into_iter();
            let reads = devices.map(|attached| (attached.device.number(), attached.identity, attached.reads));
            Ok::<_, kernel::Error>(reads.collect())
        };
        blocking::run("look at the loop devices", look).await
    }

    /// Whether the kernel has read something of this image that did not fit its root hash. Asks no server.
    pub async fn is_corrupted(&self, image: &Loopback, content: Content) -> Result<bool> {
        let (Some(name), Some(_)) = (Name::of(image), image.verity) else { return Ok(false) };
        let mut copies = self.cache.copies_of(&name).await?;
        copies.retain(|copy| copy.original.content() == content);
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let look = move || {
            let verified = kernel.verified_devices(mark.tag())?;
            let is_it = |device: &Attached| {
                let ImageIdentity { inode, size, .. } = device.identity;
                (inode, size) == (content.inode, content.size)
                    || copies.iter().any(|copy| stands_on(device, &copy.original.id()))
            };
            let is_corrupted = |device: &Attached| {
                verified.iter().any(|it| it.is_corrupted && it.loop_device == device.device.number())
            };
            Ok::<_, kernel::Error>(kernel.loop_devices(mark.tag())?.iter().any(|it| is_it(it) && is_corrupted(it)))
        };
        blocking::run("look at the verified devices", look).await
    }

    /// Whether an image with this content is read from this node, whatever its server does. Asks no server.
    pub async fn is_local(&self, image: &Loopback, content: Content) -> Result<bool> {
        let Some(name) = Name::of(image) else { return Ok(false) };
        let mut copies = self.cache.copies_of(&name).await?;
        copies.retain(|copy| copy.original.content() == content);
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let look = move || {
            let devices = kernel.loop_devices(mark.tag())?;
            let is_on = |device: &Attached| copies.iter().any(|copy| stands_on(device, &copy.original.id()));
            Ok::<_, kernel::Error>(devices.iter().any(is_on))
        };
        blocking::run("look at the loop devices", look).await
    }

    /// Fails where the image that a volume had turned out to have other bytes than the volume names.
    pub async fn check_digest(&self, image: &Loopback, content: Content) -> Result<()> {
        let (Some(name), Some(_)) = (Name::of(image), image.digest) else { return Ok(()) };
        let copies = self.cache.copies_of(&name).await?;
        let is_wrong = |copy: &&Entry| copy.original.content() == content && !copy.has(image.digest);
        match copies.iter().find(is_wrong) {
            Some(copy) => Err(other_bytes(copy, image.digest)),
            None => Ok(()),
        }
    }
}

/// What moving a device takes.
struct Mover {
    kernel: Arc<dyn kernel::Kernel>,
    mark: super::mark::Mark,
    images: Arc<Images>,
}

impl Mover {
    /// The kernel lets the reads end that are under way: the server is asked before whether it answers.
    async fn move_to(&self, copy: OffThread<Image>, from: ImageIdentity, base: &PreparedBase) {
        let moved = async {
            if let PreparedBase::Mount(mount) = base
                && let Prepared::Nfs { mount, .. } = &**mount
            {
                mount.probe().await?;
            }
            let (kernel, mark, to) = (Arc::clone(&self.kernel), self.mark.clone(), copy.identity);
            let work = move || {
                for attached in kernel.loop_devices(mark.tag())? {
                    if attached.identity == from {
                        kernel.change_backing(&attached.device, &copy)?;
                        tracing::info!(
                            device = attached.device.number(),
                            bytes = to.size,
                            "moved to the copy on this node"
                        );
                    }
                }
                Ok::<_, kernel::Error>(())
            };
            run_at(base.places(), "move a loop device to a copy", work).await?;
            let moved = |key: &ImageKey| (key.identity == from).then_some(ImageKey { identity: to, ..*key });
            for attached in self.images.alias(moved) {
                attached.is_local_now();
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = moved.await {
            tracing::error!("an image goes on from its server: {error}");
        }
    }
}

/// Whether an error is the server's answer about a file, and not that there is none.
fn is_of_server(kind: Kind) -> bool {
    matches!(kind, Kind::NotFound | Kind::PermissionDenied | Kind::FailedPrecondition)
}

#[cfg(test)]
mod tests;
