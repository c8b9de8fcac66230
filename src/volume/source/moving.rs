//! Copying images behind the backs of their volumes, and moving their devices to the copies under whoever reads.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use super::mark::Mark;
use super::prepare::{Images, Preparer};
use super::prepared::{ImageKey, PreparedBase};
use crate::blocking::{self, OffThread};
use crate::error::{Error, Kind, Result};
use crate::kernel::image::{Content, Image, ImageIdentity};
use crate::kernel::loop_device::{Attached, Purpose};
use crate::kernel::{self, Kernel};
use crate::lock::lock;
use crate::places::run_at;
use crate::spec::Loopback;
use crate::step::{self, Step};
use crate::volume::cache::{Original, Source};

/// An image that a pod has, and that the policy still allows to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    pub image: Loopback,
    /// What it was when it was attached.
    pub content: Content,
    /// Of the pod, where it is known.
    pub namespace: Option<String>,
}

impl Preparer {
    /// Copies an image while others use it, and then moves the devices that stand on it.
    pub(super) fn copy_behind(&self, source: Source, identity: ImageIdentity, base: PreparedBase) {
        let (cache, mover) = (Arc::clone(&self.cache), self.mover());
        let copy = async move {
            // What failed was logged.
            if let Ok(Some(copy)) = cache.copy(source).await {
                mover.move_to(copy, identity, &base).await;
            }
        };
        // The threads that it takes count for who asked for it.
        tokio::spawn(Step::for_namespace(step::namespace().as_deref()).observe(copy));
    }

    fn mover(&self) -> Mover {
        let (kernel, mark, images) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.images));
        Mover { kernel, mark, images }
    }

    /// Goes on with what an earlier process, or an earlier failure, left undone for these images: copies that are not complete, devices that
    /// still stand on a file of a server. No server waits for another, and where one does not answer, nothing is done. Who does not wait for
    /// the end may call it again.
    pub async fn tend(self: &Arc<Self>, images: Vec<Published>) -> Result<()> {
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let list = move || {
            let mut devices = kernel.loop_devices(mark.tag())?;
            devices.retain(|device| cache.below(device).is_none());
            Ok::<_, kernel::Error>(devices.into_iter().map(|it| (it.identity, it.purpose)).collect::<Vec<_>>())
        };
        let devices = blocking::run("look at the loop devices", list).await?;
        let mut servers = HashMap::<_, Vec<_>>::new();
        for published in images {
            let Content { inode, size, .. } = published.content;
            let purpose =
                devices.iter().find(|(it, _)| (it.inode, it.size) == (inode, size)).map(|(_, purpose)| *purpose);
            let image = match purpose {
                Some(Purpose::Path { server, .. }) => published.image.on(Some(server)),
                Some(_) => published.image,
                None => continue,
            };
            if let Some(nfs) = image.base.export() {
                servers.entry(nfs.host.clone()).or_default().push(Published { image, ..published });
            }
        }
        let mut tasks = Vec::new();
        for (server, images) in servers {
            let (this, until_done) = (Arc::clone(self), Arc::new(()));
            match lock(&self.tending).entry(server) {
                // It does not answer.
                Entry::Occupied(last) if last.get().strong_count() > 0 => continue,
                entry => entry.insert_entry(Arc::downgrade(&until_done)),
            };
            tasks.push(tokio::spawn(async move {
                let _until_done = until_done;
                for published in images {
                    let step = Step::for_namespace(published.namespace.as_deref());
                    if let Err(error) = step.observe(this.tend_one(&published)).await {
                        tracing::debug!(%error, "an image is left on its server");
                    }
                }
            }));
        }
        for task in tasks {
            task.await
                .map_err(|error| Error::new(Kind::Internal, format!("see to the copies of a server: {error}")))?;
        }
        Ok(())
    }

    async fn tend_one(&self, published: &Published) -> Result<()> {
        let spec = &published.image;
        let Some(name) = self.copied(spec)? else { return Ok(()) };
        let (base, image) = self.open_image(spec, &[], None).await?;
        if image.content != published.content {
            return Ok(());
        }
        let (original, identity) = (Original::of(name, &image), image.identity);
        match self.cache.confirmed(&original, None).await? {
            Some(copy) => self.mover().move_to(copy, identity, &base).await,
            None => self.copy_behind(self.source(original, &image, &base)?, identity, base),
        }
        Ok(())
    }
}

/// What moving a device takes.
struct Mover {
    kernel: Arc<dyn Kernel>,
    mark: Mark,
    images: Arc<Images>,
}

impl Mover {
    /// What cannot be moved goes on from its server, and ends with its last user.
    async fn move_to(&self, copy: OffThread<Image>, from: ImageIdentity, base: &PreparedBase) {
        if let Err(error) = self.try_to_move(copy, from, base).await {
            tracing::error!("an image goes on from its server: {error}");
        }
    }

    async fn try_to_move(&self, copy: OffThread<Image>, from: ImageIdentity, base: &PreparedBase) -> Result<()> {
        if let PreparedBase::Mount(mount) = base {
            mount.probe().await?;
        }
        let (kernel, mark, to) = (Arc::clone(&self.kernel), self.mark.clone(), copy.identity);
        let work = move || {
            let is_movable = copy.is_movable()?;
            let mut devices = kernel.loop_devices(mark.tag())?;
            let is_kept = |purpose| matches!(purpose, Purpose::Verity | Purpose::Path { .. });
            devices.retain(|it| it.identity == from && (is_movable || is_kept(it.purpose)));
            let mut moved = Vec::new();
            for Attached { device, purpose, .. } in &devices {
                if let Err(error) = kernel.change_backing(device, &copy) {
                    return Ok((moved, Some(error)));
                }
                tracing::info!(device = device.number(), bytes = to.size, "moved to the copy on this node");
                moved.push(*purpose);
            }
            Ok::<_, kernel::Error>((moved, None))
        };
        let (moved, failed) = run_at(base.places(), "move a loop device to a copy", work).await?;
        let renamed = |key: &ImageKey| {
            (key.identity == from && moved.contains(&key.purpose())).then_some(ImageKey { identity: to, ..*key })
        };
        for attached in self.images.rename(renamed) {
            attached.is_local_now();
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }
}
