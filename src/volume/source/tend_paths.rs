//! What is done so that each server of an image is one that the kernel can read by, once it can be.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::devices;
use super::local::{PATIENCE, no_answer};
use super::mark::loop_devices_of;
use super::moving::Published;
use super::paths::{self, Paths, ServerPath};
use super::prepare::Preparer;
use super::prepared::PreparedBase;
use crate::blocking::{self, OffThread};
use crate::error::{Error, Kind, Result};
use crate::kernel;
use crate::kernel::device_mapper::Message;
use crate::kernel::fingerprint::Fingerprint;
use crate::kernel::image::Image;
use crate::kernel::loop_device::Purpose;
use crate::lock::lock;
use crate::places::run_at;
use crate::spec::Loopback;
use crate::step::Step;

/// After how many errors at once a path is not tried again if another can be made.
const TRIED: u32 = 3;
/// How long one image may take before others are looked after again.
const ROUND: Duration = Duration::from_secs(30);
/// The most paths of one image, of which some may be of files that a server has no more.
const MOST: usize = 16;

/// What became of a path that was looked after.
enum Looked {
    /// It is one again, or was made.
    Path,
    Silent,
    Gone,
}

impl Preparer {
    /// What the image with this first loop device stands on.
    pub async fn paths(&self, first: u32) -> Result<Option<Paths>> {
        Ok(self.all_paths().await?.into_iter().find(|it| it.first == first))
    }

    pub(super) async fn all_paths(&self) -> Result<Vec<Paths>> {
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let look = move || paths::all(&*kernel, mark.tag(), &cache);
        blocking::run("look at the paths of images", look).await
    }

    /// What images of several servers stand on, by the first loop device of each: those that this process has attached, and those `published`
    /// by an earlier one, which are asked for only where there are such.
    pub(super) async fn paths_in_use(
        &self,
        published: impl Future<Output = Result<Vec<(PathBuf, Published)>>>,
    ) -> Result<HashMap<u32, (Paths, Published)>> {
        let attached = self.images.all().into_iter().filter_map(|attached| {
            let image = attached.replicated()?.clone();
            Some((attached.device.number(), Published { image, content: attached.content, namespace: None }))
        });
        let mut attached: HashMap<_, _> = attached.collect();
        let (mut found, mut others) = (HashMap::new(), Vec::new());
        for paths in self.all_paths().await? {
            match attached.remove(&paths.first) {
                Some(image) => drop(found.insert(paths.first, (paths, image))),
                None => others.push(paths),
            }
        }
        if others.is_empty() {
            return Ok(found);
        }
        let published = published.await?;
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let look = move || {
            let (devices, mounts) = (devices::all(&*kernel, mark.tag(), &cache)?, kernel.mounts()?);
            let below: HashMap<_, _> =
                mounts.iter().map(|mount| (mount.mount_point.as_str(), loop_devices_of(mount))).collect();
            for (target, published) in published {
                let numbers = target.to_str().and_then(|target| below.get(target)).into_iter().flatten();
                let below = numbers.filter_map(|number| devices.iter().find(|device| device.number == *number));
                for device in below.filter(|device| device.is_of(&published.image, published.content)) {
                    if let Some(paths) = others.iter().find(|paths| paths.first == device.number) {
                        found.entry(paths.first).or_insert_with(|| (paths.clone(), published.clone()));
                    }
                }
            }
            Ok::<_, kernel::Error>(found)
        };
        blocking::run("look at the paths of images", look).await
    }

    /// Looks after the paths of published images: one whose server has its file again is a path again, a server without a path gets one, and
    /// the kernel goes back to the first once that has been well for a while. No server waits for another.
    pub async fn tend_paths(
        self: &Arc<Self>,
        published: impl Future<Output = Result<Vec<(PathBuf, Published)>>>,
        now: Instant,
    ) -> Result<()> {
        let there = self.paths_in_use(published).await?;
        lock(&self.trials).keep(|first| there.contains_key(&first));
        let tend = there.into_values().map(|(paths, published)| {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                let step = Step::for_namespace(published.namespace.as_deref());
                let Published { image, .. } = &published;
                let tend = step.observe(this.tend_paths_of(&paths, image, now));
                match tokio::time::timeout(ROUND, tend).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::error!("the paths of {} of {} stay as they are: {error}", image.path, image.base);
                    }
                    // Its threads go on, and others are looked after.
                    Err(_) => tracing::warn!("a server of {} does not answer", image.base),
                }
            })
        });
        for task in tend.collect::<Vec<_>>() {
            let panicked = |error| Error::new(Kind::Internal, format!("look after the paths of an image: {error}"));
            task.await.map_err(panicked)?;
        }
        Ok(())
    }

    async fn tend_paths_of(&self, paths: &Paths, image: &Loopback, now: Instant) -> Result<()> {
        let servers = image.on_each();
        let mut is_changed = false;
        let looks = (0..).zip(&servers).map(|(server, there)| self.look_after(paths, image, server, there, now));
        for looked in join_all(looks).await {
            is_changed |= looked;
        }
        // What became of it is seen the next time.
        if is_changed {
            return Ok(());
        }
        let message = match paths.best_and_current() {
            (Some((at, best)), current) => {
                let is_well = lock(&self.trials).is_well((paths.first, best), now);
                match current {
                    _ if !paths.queues => Message::QueueIfNoPath,
                    Some(current) if at < current && is_well => Message::SwitchGroup(at),
                    _ => return Ok(()),
                }
            }
            (None, _) => {
                let (gone, mut trials) = (paths.corrupted(), lock(&self.trials));
                let is_gone = |server| gone.contains(&server) || trials.of((paths.first, server), now).is_gone;
                match ((0..servers.len() as u8).all(is_gone), paths.queues) {
                    (true, true) => Message::FailIfNoPath,
                    (false, false) => Message::QueueIfNoPath,
                    _ => return Ok(()),
                }
            }
        };
        tracing::warn!("{} of {}: {}", image.path, image.base, message.text());
        self.tell(paths.first, message).await
    }

    /// Whether anything was done about the path to a server.
    async fn look_after(&self, paths: &Paths, image: &Loopback, server: u8, there: &Loopback, now: Instant) -> bool {
        let path = (paths.first, server);
        if paths.each.iter().any(|it| it.server == server && !it.state.is_failed) {
            lock(&self.trials).is_well(path, now);
            return false;
        }
        let local = paths.each.iter().find(|it| it.server == server && it.is_local);
        let is_last = paths.each.iter().all(|it| it.state.is_failed);
        // What the kernel has found to be other bytes is not read again.
        if paths.corrupted().contains(&server) || !lock(&self.trials).is_due(path, is_last, now) {
            return false;
        }
        let looked = match local {
            // No server is asked for it.
            Some(local) => {
                self.tell(paths.first, Message::ReinstatePath(local.state.device)).await.map(|()| Looked::Path)
            }
            None => match tokio::time::timeout(PATIENCE, self.open_image(there, &[], None)).await {
                Ok(Ok((base, opened))) => self.path_to(paths, image, server, base, opened).await,
                Ok(Err(error)) => Err(error),
                Err(_) => Err(no_answer()),
            },
        };
        let looked = looked.unwrap_or_else(|error| {
            tracing::warn!("{} is not read from {}: {error}", image.path, there.base);
            match error.kind {
                Kind::NotFound | Kind::PermissionDenied | Kind::FailedPrecondition => Looked::Gone,
                _ => Looked::Silent,
            }
        });
        let mut trials = lock(&self.trials);
        let trial = trials.of(path, now);
        trial.is_gone = matches!(looked, Looked::Gone);
        let is_path = matches!(looked, Looked::Path);
        trial.times += u32::from(is_path);
        is_path
    }

    /// Makes a file that is open on its server one of the paths.
    async fn path_to(
        &self,
        paths: &Paths,
        image: &Loopback,
        server: u8,
        base: PreparedBase,
        opened: OffThread<Image>,
    ) -> Result<Looked> {
        let host = image.on(Some(server)).base;
        if let Some(path) = self.path_of(paths, server, &opened) {
            tracing::info!("{} is read from {host} again, where it has to be", image.path);
            self.tell(paths.first, Message::ReinstatePath(path.state.device)).await?;
            return Ok(Looked::Path);
        }
        // One at a time, and none by what was there before another.
        let turn = self.turn_to_attach(&format!("paths of loop{}", paths.first)).await;
        let Some(now) = self.paths(paths.first).await? else { return Ok(Looked::Silent) };
        let paths = &now;
        if paths.each.len() >= MOST {
            return Ok(Looked::Gone);
        }
        // The device stops for as long as reads of its paths are under way.
        if paths.each.iter().any(|path| path.state.is_failed && path.reads.under_way > 0) {
            return Ok(Looked::Silent);
        }
        let root = paths.each.first().and_then(|path| path.root);
        let same = match root {
            Some(_) => None,
            None => match self.file_of_a_path(paths, image).await? {
                Some(same) => Some(same),
                // There is nothing that the file could be compared with, now or ever.
                None if paths.each.iter().all(|path| path.state.is_failed) => return Ok(Looked::Gone),
                None => return Ok(Looked::Silent),
            },
        };
        let (kernel, mark, paths_now) = (Arc::clone(&self.kernel), self.mark.clone(), paths.clone());
        let (here, places) = (host.to_string(), base.places());
        let add = move || {
            let _turn = turn;
            if let Some((there, same)) = same {
                let fingerprint = |image: &Image| Fingerprint::of(&image.file, image.identity.size);
                fingerprint(&same)?.compare(&there, &fingerprint(&opened)?, &here)?;
            }
            let purpose = Purpose::Path { server, verified: root.is_some() };
            let device = kernel.loop_device(&opened, purpose, mark.tag())?;
            let verified = root
                .map(|root| kernel.verified_device(&device, opened.identity.size, &root, mark.tag()))
                .transpose()?;
            let new = verified.as_ref().map_or_else(|| device.device(), |verified| verified.device());
            let numbers: Vec<_> = paths_now.each.iter().map(|path| path.state.device).chain([new]).collect();
            kernel.change_paths(paths_now.first, &numbers, true, mark.tag())?;
            // None of the new table is known to have failed.
            for path in paths_now.each.iter().filter(|path| path.state.is_failed) {
                kernel.tell_multipath(paths_now.first, Message::FailPath(path.state.device), mark.tag())?;
            }
            Ok::<_, kernel::Error>(())
        };
        run_at(places, format!("add {host} to the servers of {}", image.path), add).await?;
        tracing::info!("{} is read from {host} too, where it has to be", image.path);
        if let Some(attached) = paths.key().and_then(|key| self.images.find(&key)) {
            attached.comes_from(base);
        }
        Ok(Looked::Path)
    }

    /// The path to a file. Where the last ones were errors at once, that is one by today's mount of the export alone: the server may know the
    /// file no more by the handle of then.
    fn path_of<'a>(&self, paths: &'a Paths, server: u8, opened: &Image) -> Option<&'a ServerPath> {
        let mut mine = paths.each.iter().filter(|path| path.server == server);
        if let Some(path) = mine.clone().find(|path| path.identity == opened.identity) {
            return Some(path);
        }
        // The kernel sees that a verified image is the same; and where there is no other path, nothing is gained by none.
        let strictly = !mine.clone().any(|path| path.root.is_some()) && paths.each.iter().any(|it| !it.state.is_failed);
        let times = lock(&self.trials).times((paths.first, server));
        mine.find(|path| times < TRIED && path.is_file(opened, strictly))
    }

    /// The file of a path that is one, to compare others with.
    async fn file_of_a_path(&self, paths: &Paths, image: &Loopback) -> Result<Option<(String, OffThread<Image>)>> {
        for path in paths.each.iter().filter(|path| !path.state.is_failed) {
            let there = image.on(Some(path.server));
            match self.open_image(&there, &[], None).await {
                Ok((_, opened)) if path.is_file(&opened, true) => return Ok(Some((there.base.to_string(), opened))),
                _ => {}
            }
        }
        Ok(None)
    }

    pub(super) async fn tell(&self, first: u32, message: Message) -> Result<()> {
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let tell = move || kernel.tell_multipath(first, message, mark.tag());
        blocking::run("tell device mapper about the paths of an image", tell).await
    }
}
