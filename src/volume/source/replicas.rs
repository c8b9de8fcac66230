//! Images that several servers have: opened on each of them, and made one device, of which another server is asked where one is silent
//! (dm-multipath).

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::local::{PATIENCE, no_answer};
use super::paths::{Paths, ServerPath};
use super::prepare::Preparer;
use super::prepared::{AttachedImage, ImageKey, ImageOnLoop, Known, Origin, Over, PreparedBase};
use crate::blocking::{OffThread, measured};
use crate::error::{Error, Kind, Result, first_that_can};
use crate::kernel::device_mapper::Message;
use crate::kernel::file_system::FileSystem;
use crate::kernel::fingerprint::Fingerprint;
use crate::kernel::image::{Image, ImageIdentity};
use crate::kernel::loop_device::{Purpose, Tag};
use crate::kernel::verity::{RootHash, Tree};
use crate::kernel::{self, Kernel};
use crate::lock::lock;
use crate::metrics;
use crate::places::{Places, run_at};
use crate::spec::Loopback;
use crate::volume::cache::Original;

/// How long is waited for the other servers once one has answered. Those that are late are added later: see [`super::tend_paths`].
const LATE: Duration = Duration::from_secs(3);

/// An image that is open on one of its servers.
pub(super) struct Replica {
    /// Its place in the list of the spec.
    pub server: u8,
    /// The image as it is on this server alone.
    pub spec: Loopback,
    pub base: PreparedBase,
    pub image: OffThread<Image>,
}

impl Preparer {
    /// The device of an image that several servers have: of a copy on this node, where there is one of what a server has now or where none
    /// answers. Else it is of all servers that answer.
    pub(super) async fn replicated(
        &self,
        spec: &Loopback,
        known: &[Known],
        file_system: FileSystem,
    ) -> Result<ImageOnLoop> {
        let opened = self.open_replicas(spec, known, Some(file_system));
        let opened = match self.has_copy(spec).await? {
            false => opened.await,
            true => tokio::time::timeout(PATIENCE, opened).await.unwrap_or_else(|_| Err(no_answer())),
        };
        let replicas = match opened {
            Ok(replicas) => replicas,
            Err(error) if error.kind == Kind::Unavailable => return self.any_copy(spec, file_system, error).await,
            Err(error) => return Err(error),
        };
        for replica in &replicas {
            let Some(name) = self.copied(&replica.spec)? else { continue };
            let original = Original::of(name, &replica.image);
            if let Some(copy) = self.cache.confirmed(&original, spec.digest).await? {
                metrics::cache().hits.inc();
                let root = self.root_hash_on(&replicas).await?;
                let attached = self.attach(&replica.spec, copy, root, file_system, Origin::Copy).await?;
                return Ok(ImageOnLoop { spec: spec.clone(), content: original.content(), attached });
            }
        }
        let root = self.root_hash_on(&replicas).await?;
        let mut behind = Vec::new();
        for Replica { server, spec, base, image } in &replicas {
            let to_copy = match self.copied(spec)? {
                Some(name) => Some(self.source(Original::of(name, image), image, base)?),
                None => None,
            };
            let to_prefetch = if to_copy.is_some() { None } else { self.to_prefetch(spec, base, image)? };
            behind.push((*server, image.identity, base.clone(), to_copy, to_prefetch));
        }
        let (attached, is_new) = self.attach_replicas(spec, replicas, root, file_system).await?;
        // One that is there already was seen to; and one that did not fit is not the first path.
        let first = behind.into_iter().find(|(server, ..)| is_new && Some(*server) == attached.key().server);
        match first {
            Some((_, identity, base, Some(source), _)) => {
                metrics::cache().misses.inc();
                self.copy_behind(source, identity, base);
            }
            Some((_, _, _, None, Some(to_prefetch))) => self.prefetch(to_prefetch, &attached),
            _ => {}
        }
        let content = attached.content;
        Ok(ImageOnLoop { spec: spec.clone(), content, attached })
    }

    /// Whether there is a copy of the image as it is on one of its servers.
    async fn has_copy(&self, spec: &Loopback) -> Result<bool> {
        for there in spec.on_each() {
            if let Some(name) = self.copied(&there)?
                && self.cache.has(&name, spec.digest).await
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// By what the image is to be verified: the first server says so that can.
    async fn root_hash_on(&self, replicas: &[Replica]) -> Result<Option<RootHash>> {
        first_that_can(replicas, |replica| self.root_hash(&replica.spec, Some(&replica.base))).await
    }

    /// The image on each of its servers that answers, in this node's order of them.
    pub(super) async fn open_replicas(
        &self,
        spec: &Loopback,
        known: &[Known],
        file_system: Option<FileSystem>,
    ) -> Result<Vec<Replica>> {
        let each = self.in_order(spec);
        let open = |(place, (server, spec)): (usize, (u8, Loopback))| async move {
            let opened = self.open_image(&spec, known, file_system).await;
            (place, opened.map(|(base, image)| Replica { server, spec, base, image }))
        };
        let mut opening: FuturesUnordered<_> = each.into_iter().enumerate().map(open).collect();
        let (mut replicas, mut errors, mut until) = (Vec::new(), Vec::new(), None);
        loop {
            let next = match until {
                None => opening.next().await,
                Some(until) => tokio::time::timeout_at(until, opening.next()).await.unwrap_or_default(),
            };
            match next {
                Some((place, Ok(replica))) => {
                    replicas.push((place, replica));
                    until.get_or_insert(Instant::now() + LATE);
                }
                Some((place, Err(error))) => errors.push((place, error)),
                None => break,
            }
        }
        replicas.sort_by_key(|(place, _)| *place);
        errors.sort_by_key(|(place, _)| *place);
        if replicas.is_empty() {
            return Err(Error::of_all(errors.into_iter().map(|(_, error)| error).collect()));
        }
        for (_, error) in errors {
            tracing::warn!("{} of {} begins without one of its servers: {error}", spec.path, spec.base);
        }
        Ok(replicas.into_iter().map(|(_, replica)| replica).collect())
    }

    /// The servers of an image as this node asks them.
    pub(super) fn in_order(&self, spec: &Loopback) -> Vec<(u8, Loopback)> {
        let mut each: Vec<_> = (0..).zip(spec.on_each()).collect();
        each.sort_by_cached_key(|(_, spec)| {
            let host = spec.base.export().map(|nfs| nfs.host.as_str()).unwrap_or_default();
            self.order.rank(self.policy(), host)
        });
        each
    }

    /// No server answers.
    async fn any_copy(&self, spec: &Loopback, file_system: FileSystem, error: Error) -> Result<ImageOnLoop> {
        for (_, spec_there) in self.in_order(spec) {
            let Some(name) = self.copied(&spec_there)? else { continue };
            if let Some((original, copy)) = self.cache.last_known(&name, spec.digest).await? {
                metrics::cache().hits.inc();
                tracing::warn!("{name} begins with its copy on this node: {error}");
                let root = self.root_hash(&spec_there, None).await?;
                let attached = self.attach(&spec_there, copy, root, file_system, Origin::Copy).await?;
                return Ok(ImageOnLoop { spec: spec.clone(), content: original.content(), attached });
            }
        }
        Err(error)
    }

    /// The device over these, and whether it was made for them: that which is there already may have others.
    async fn attach_replicas(
        &self,
        spec: &Loopback,
        replicas: Vec<Replica>,
        root: Option<RootHash>,
        file_system: FileSystem,
    ) -> Result<(Arc<OffThread<AttachedImage>>, bool)> {
        let name = format!("{} ({}) of {}", spec.path, file_system.name(), spec.base);
        let step = format!("attach image {name}");
        let _admitted = self.exports.admit(&step).await;
        // Two at once would each make a device, and only one of them could have the files.
        let turn = self.turn_to_attach(&name).await;
        let images: Vec<_> = replicas.iter().map(|replica| (replica.server, replica.image.identity)).collect();
        if let Some(attached) = self.attached_over(images, root).await? {
            return Ok((attached, false));
        }
        let places = Places::of_all(replicas.iter().filter_map(|replica| replica.base.places()));
        let (kernel, mark, spec) = (Arc::clone(&self.kernel), self.mark.clone(), spec.clone());
        let attach = move || {
            // Until it is made, whoever waits for it.
            let _turn = turn;
            let (key, attached) = make(&*kernel, mark.tag(), spec, replicas, root, file_system)?;
            Ok::<_, kernel::Error>((key, OffThread::new(attached)))
        };
        let made = run_at(places, step, attach).await;
        let (key, attached) = made.map_err(|error| error.about(&format!("image {name}")))?;
        Ok((self.images.get(&key, async { Ok(attached) }).await?, true))
    }

    /// For one at a time who attaches what has this name.
    pub(super) async fn turn_to_attach(&self, name: &str) -> OwnedSemaphorePermit {
        let turns = {
            let mut attaching = lock(&self.attaching);
            attaching.retain(|_, turns| Arc::strong_count(turns) > 1);
            Arc::clone(attaching.entry(name.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        turns.acquire_owned().await.expect("never closed")
    }

    /// What stands on one of these images, each of which is of the server with this place in its list.
    async fn attached_over(
        &self,
        images: Vec<(u8, ImageIdentity)>,
        root: Option<RootHash>,
    ) -> Result<Option<Arc<OffThread<AttachedImage>>>> {
        let there = self.all_paths().await?;
        let is_one = |path: &ServerPath| path.root == root && images.contains(&(path.server, path.identity));
        let keys = there.iter().filter(|paths| paths.each.iter().any(is_one)).filter_map(Paths::key);
        Ok(keys.filter_map(|key| self.images.find(&key)).next())
    }
}

/// A new device over these, in their order.
fn make(
    kernel: &dyn Kernel,
    tag: &Tag,
    image: Loopback,
    replicas: Vec<Replica>,
    root: Option<RootHash>,
    file_system: FileSystem,
) -> kernel::Result<(ImageKey, AttachedImage)> {
    let mut paths = Vec::new();
    let mut unfit = None;
    for replica in &replicas {
        let image = &replica.image;
        let purpose = Purpose::Path { server: replica.server, verified: root.is_some() };
        let device = measured("loop", || kernel.loop_device(image, purpose, tag))?;
        let verified = match root {
            None => None,
            Some(root) => {
                match measured("verity", || kernel.verified_device(&device, image.identity.size, &root, tag)) {
                    Ok(verified) => Some(verified),
                    Err(error) => {
                        tracing::error!("{} of {} is not read: {error}", replica.spec.path, replica.spec.base);
                        unfit.get_or_insert(error);
                        continue;
                    }
                }
            }
        };
        paths.push((replica, device, verified));
    }
    if let (true, Some(error)) = (paths.is_empty(), unfit) {
        return Err(error);
    }
    if root.is_none() {
        compare(paths.iter().map(|(replica, ..)| *replica))?;
    }
    let (first, device, _) = &paths[0];
    let identity = first.image.identity;
    let sectors = match root {
        Some(_) => Tree::find(&first.image.file, identity.size)?.data_sectors(),
        None => identity.size / 512,
    };
    let numbers: Vec<_> = paths
        .iter()
        .map(|(_, device, verified)| verified.as_ref().map_or_else(|| device.device(), |verified| verified.device()))
        .collect();
    let number = device.number();
    let over = measured("multipath", || kernel.multipath_device(number, &numbers, sectors, tag))?;
    let key = ImageKey { identity, verity: root, is_sif: false, server: Some(first.server) };
    let content = first.image.content;
    let (_, device, _) = paths.swap_remove(0);
    drop(paths);
    let origin = Origin::Bases(replicas.into_iter().map(|replica| replica.base).collect());
    let attached =
        AttachedImage::over(kernel, key, content, device, Some(Over::Paths(over, image)), file_system, origin)?;
    // From here on who reads waits where no server answers. Before, the one who mounts would have.
    kernel.tell_multipath(number, Message::QueueIfNoPath, tag)?;
    Ok((key, attached))
}

/// Fails where samples say that two servers have different images by this name.
fn compare<'a>(mut replicas: impl Iterator<Item = &'a Replica>) -> kernel::Result<()> {
    let told = |replica: &Replica| {
        let fingerprint = Fingerprint::of(&replica.image.file, replica.image.identity.size)?;
        Ok::<_, kernel::Error>((replica.spec.base.to_string(), fingerprint))
    };
    let Some(first) = replicas.next() else { return Ok(()) };
    let Some(second) = replicas.next() else { return Ok(()) };
    let (here, first) = told(first)?;
    for other in [second].into_iter().chain(replicas) {
        let (there, other) = told(other)?;
        first.compare(&here, &other, &there)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
