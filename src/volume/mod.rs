//! When things happen: a volume is staged, published, unpublished and unstaged, and volumes share what they can.
//!
//! [`Volumes`] is the whole of it. A call runs as one operation under its key ([`in_flight`]). [`source`] turns the spec into held
//! kernel objects, and those into one detached mount, which is attached as the last step. [`report`] looks at what is there. What must
//! outlive the process is written down as a [`record`].
//!
//! ```text
//!  kubelet    csi::Node      Volumes            source::Preparer     source::build       kernel
//!     | stage    |              |                      |                   |                |
//!     |--------->|-- Allowed -->| key: volume ID       |                   |                |
//!     |          |              |-- prepare ---------->| resolve, probe    |                |
//!     |          |              |                      |-------- mount NFS, out of sight -->|
//!     |          |              |                      |-------- open image, loop device -->|
//!     |          |              |                      |-------- mount it, detached ------->|
//!     |          |              |<---- Arc<Prepared> --|                   |                |
//!     |<---------|<-- staged ---|                      |                   |                |
//!     | publish  |              |                      |                   |                |
//!     |--------->|------------->| key: target          |                   |                |
//!     |          |              | the record, the scratch directory        |                |
//!     |          |              |-- build ------------------------------->|--- mounts ----->|
//!     |          |              |<---------------------- DetachedMount ----|                |
//!     |          |              |----------------------- attach at the target ------------->|
//!     |<---------|<-- there ----|                      |                   |                |
//!     | unpublish|              |                      |                   |                |
//!     |--------->|------------->|----------------------- unmount the target ---------------->|
//!     |          |              | the record, the scratch directory: to the trash            |
//!     |<---------|<-- gone -----|                      |                   |                |
//!     | unstage  |              |                      |                   |                |
//!     |--------->|------------->| drop Arc<Prepared>: the last one lets go of loop device and export
//!     |<---------|<-- gone -----|                      |                   |                |
//! ```
//!
//! An inline volume is prepared by publish, and so is a staged one after a restart of the driver, of whose images those are taken that
//! are still attached. Where the spec of a staged volume shows an export as it is, its server is asked before the mounts are made.
//!
//! **Threads.** One thread serves all calls. Whatever waits for the kernel has a thread of its own ([`crate::blocking`]): one for each
//! step that needs this node alone, and for NFS servers as many as [`crate::places`] has. What is dropped where a server might be waited
//! for is dropped on yet another ([`crate::blocking::OffThread`]).
//!
//! **Order of locks.** None is held while a server is waited for, or across an `.await`. Who holds one takes only those further down:
//!
//! 1. [`in_flight::Lease`], while a stage or publish changes what its key stands for, this node's disk included; what supersedes it
//!    waits for that.
//! 2. `recording`, while a record is written, so that of two that may not both be there the second sees the first.
//! 3. For moments: the operations under way, the live objects of [`source`], what is read ahead of an image, the places of servers, the
//!    deletions of [`record`].
//! 4. For moments, and each by itself: `staged`, `published`, what [`report`] remembers, the budget of what is read ahead, the step of an
//!    operation, metrics.
//!
//! What is learned of images is written by one thread at a time: that lock is taken by those that wait for the disk, who hold no other.

mod abnormal;
mod cache;
#[cfg(test)]
pub mod fixture;
mod in_flight;
mod publication;
mod publish;
mod record;
mod report;
mod source;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use abnormal::{Abnormal, Harm};
pub use cache::{Bounds, CacheConfig, Entry, Kept, UnderWay, by_hand as copies};
pub use publication::{Publication, by_hand};
pub use report::{Observation, Stats, Usage, commit, profile, status, try_overlay, waiting};
pub use source::{PrefetchConfig, Prefetching, ask_host, where_nfs_answers};

use tokio::time::Instant;

use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::kernel::{Kernel, support};
use crate::lock::lock;
use crate::metrics::Timer;
use crate::spec::policy::Policy;
use crate::spec::{Allowed, Parsed};
use cache::Cache;
use in_flight::{InFlight, Key, Lease, Request};
use record::{Record, Records};
use report::Report;
use source::mark::Mark;
use source::{Known, Learned, Node, Prefetcher, Prepared, Preparer, Published};

/// How long the answer to an unstage or unpublish waits for the kernel to let go of what nobody uses any more.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked for copies that are not made yet.
const TEND: Duration = Duration::from_secs(60);

/// How often it is looked whether servers answer those who read, where an image has several; and whether those that did not are there again.
const WATCH_PATHS: Duration = Duration::from_secs(1);
const TEND_PATHS: Duration = Duration::from_secs(5);

/// What the driver is told when it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Marks this driver's loop devices and overlays: two drivers on a node differ in it.
    pub driver_name: String,
    /// Where scratch layers and records live: on a disk of the node that can be the upper of an overlay.
    pub data_dir: PathBuf,
    /// Where the node's root directory is seen, for `base: root`.
    pub host_root: PathBuf,
    /// How many KiB the kernel reads ahead in files of NFS exports; `None` leaves that to the kernel.
    pub nfs_read_ahead: Option<u32>,
    /// The node's zone, as the policy calls those of servers, where it is known.
    pub zone: Option<String>,
    /// How copies of images are kept; `None` for a process that keeps none.
    pub cache: Option<CacheConfig>,
    /// How much of images is read ahead.
    pub prefetch: PrefetchConfig,
    /// What volumes may ask for.
    pub policy: Arc<Policy>,
    /// How long a call may take before it is answered with `DEADLINE_EXCEEDED`; its work goes on.
    pub timeout: Duration,
}

/// The volumes of one node.
pub struct Volumes {
    timeout: Duration,
    kernel: Arc<dyn Kernel>,
    mark: Mark,
    preparer: Arc<Preparer>,
    in_flight: InFlight,
    /// What staged volumes hold, by volume ID.
    staged: Mutex<HashMap<String, (Allowed, Arc<Prepared>)>>,
    /// What published paths hold. The kernel keeps them alive without it; this keeps the NFS mount for the next volume.
    published: Mutex<HashMap<PathBuf, Arc<Prepared>>>,
    recording: Mutex<()>,
    records: Records,
    report: Report,
}

impl Volumes {
    /// Makes the data directory.
    pub fn new(config: Config, kernel: Arc<dyn Kernel>) -> Result<Arc<Self>> {
        blocking::start_releasing();
        let Config { driver_name, data_dir, host_root, nfs_read_ahead, zone, cache, prefetch, policy, timeout } =
            config;
        let mark = Mark::new(&driver_name);
        let records = Records::new(&data_dir)?;
        let cache = match cache {
            Some(config) => Cache::new(config, &driver_name),
            None => Cache::off("the driver runs without --cache-quota"),
        };
        let prefetcher = Prefetcher::new(prefetch, Learned::new(&data_dir));
        let (cache, kernel_too) = (Arc::new(cache), Arc::clone(&kernel));
        let node = Node { host_root: &host_root, read_ahead: nfs_read_ahead, zone };
        let preparer = Preparer::new(kernel_too, policy, mark.clone(), node, cache, prefetcher)?;
        let preparer = Arc::new(preparer);
        Ok(Arc::new(Volumes {
            report: Report::new(Arc::clone(&kernel), mark.clone(), Arc::clone(&preparer), records.clone(), timeout),
            timeout,
            kernel,
            mark,
            preparer,
            in_flight: InFlight::default(),
            staged: Mutex::default(),
            published: Mutex::default(),
            recording: Mutex::default(),
            records,
        }))
    }

    /// Whether the policy says different things of different namespaces, so that a pod's must be known.
    pub fn needs_namespace(&self) -> bool {
        self.preparer.policy().needs_namespace()
    }

    /// What the node's policy says to a spec, for a pod in a namespace where that is known.
    pub fn allow(&self, spec: Parsed, namespace: Option<&str>) -> Result<Allowed> {
        Ok(spec.allowed_by(self.preparer.policy(), namespace)?)
    }

    /// Mounts the exports and attaches the images that the volume needs, and holds them until [`Self::unstage`].
    ///
    /// Staging the same volume again is no work. Another spec under the same ID is `ALREADY_EXISTS`.
    pub async fn stage(self: &Arc<Self>, volume_id: &str, mount: &Allowed) -> Result<()> {
        let (this, id, spec) = (Arc::clone(self), volume_id.to_owned(), mount.clone());
        let work = |lease| async move { this.stage_now(id, spec, lease).await };
        let request = Request::Stage((**mount).clone());
        self.in_flight.run(Key::Volume(volume_id.into()), request, self.timeout, work).await
    }

    /// Lets go of what [`Self::stage`] holds, also of a stage that is under way. A volume that is not staged is no error.
    pub async fn unstage(self: &Arc<Self>, volume_id: &str) -> Result<()> {
        let (this, id) = (Arc::clone(self), volume_id.to_owned());
        let work = |_| async move {
            let (records, volume_id) = (this.records.clone(), id.clone());
            let remove = move || records.remove_staged(&volume_id);
            let removed = blocking::run("remove the record of the staged volume", remove).await;
            let held = lock(&this.staged).remove(&id);
            release(held).await;
            removed
        };
        self.in_flight.run(Key::Volume(volume_id.into()), Request::Unstage, self.timeout, work).await
    }

    async fn stage_now(self: &Arc<Self>, volume_id: String, mount: Allowed, lease: Lease) -> Result<()> {
        if self.staged(&volume_id, &mount)?.is_some() {
            return Ok(());
        }
        let (held, _) = self.prepare_as_before(&volume_id, &mount).await?;
        self.keep_staged(volume_id, mount, held, lease).await
    }

    /// Holds what a volume needs, and writes down which files its images are.
    async fn keep_staged(
        self: &Arc<Self>,
        volume_id: String,
        mount: Allowed,
        held: Arc<Prepared>,
        lease: Lease,
    ) -> Result<()> {
        let this = Arc::clone(self);
        let keep = move || {
            lease.change(|| {
                this.records.write_staged(&volume_id, &mount, &held.images())?;
                Ok(lock(&this.staged).insert(volume_id, (mount, held)))
            })
        };
        // What it replaced is let go of where no lock is held.
        blocking::run("write down what is staged", keep).await.map(drop)
    }

    /// What a volume holds that an earlier process staged, and is to be published.
    async fn staged_before(&self, volume_id: &str, mount: &Allowed) -> Result<Arc<Prepared>> {
        let (held, known) = self.prepare_as_before(volume_id, mount).await?;
        if known.is_empty() {
            return Ok(held);
        }
        let images = held.images();
        if images != known {
            // Nothing had it mounted any more: from here on it is this that the volume has.
            let (records, id, spec) = (self.records.clone(), volume_id.to_owned(), (**mount).clone());
            blocking::run("write down what is staged", move || records.write_staged(&id, &spec, &images)).await?;
        }
        lock(&self.staged).entry(volume_id.to_owned()).or_insert_with(|| (mount.clone(), Arc::clone(&held)));
        Ok(held)
    }

    /// Where an earlier process staged this volume, its images are those of then, while they are attached.
    async fn prepare_as_before(&self, volume_id: &str, mount: &Allowed) -> Result<(Arc<Prepared>, Vec<Known>)> {
        let (records, id, spec) = (self.records.clone(), volume_id.to_owned(), (**mount).clone());
        let read = move || Ok::<_, Error>(records.read_staged(&id, &spec));
        let known = blocking::run("read what was staged", read).await?;
        Ok((Arc::new(self.preparer.prepare(mount, &known).await?), known))
    }

    /// What the volume holds if this process staged it.
    fn staged(&self, volume_id: &str, mount: &Allowed) -> Result<Option<Arc<Prepared>>> {
        match lock(&self.staged).get(volume_id) {
            Some((staged, held)) if staged == mount => Ok(Some(Arc::clone(held))),
            Some(_) => {
                let message = format!("volume {volume_id} is staged with other attributes: unstage it first");
                Err(Error::new(Kind::AlreadyExists, message))
            }
            None => Ok(None),
        }
    }

    /// See [`Report::stats`].
    pub async fn stats(&self, volume_id: &str, path: &Path) -> Result<Stats> {
        self.report.stats(volume_id, path).await
    }

    /// What is wrong with the volume at `path`, or else with one of those where it is published; see [`Report::health`]. `NOT_FOUND` where it
    /// is not published there, or neither published nor staged.
    pub async fn health(&self, volume_id: &str, path: Option<&Path>) -> Result<Option<Abnormal>> {
        if let Some(path) = path {
            return self.report.health(volume_id, path).await;
        }
        let published = self.report.published(volume_id).await?;
        if published.is_empty() && !lock(&self.staged).contains_key(volume_id) {
            return Err(Error::new(Kind::NotFound, format!("volume {volume_id} is neither staged nor published")));
        }
        for path in published {
            if let Some(abnormal) = self.report.health(volume_id, &path).await? {
                return Ok(Some(abnormal));
            }
        }
        Ok(None)
    }

    /// What this process and the kernel have at this moment. Asks no server.
    pub async fn observe(&self) -> Result<Observation> {
        let staged = lock(&self.staged).len();
        self.report.observe(staged).await
    }

    /// Waits until the scratch layers of what was unpublished are deleted: for a process that ends.
    pub fn finish_deletions(&self) {
        self.records.finish_deletions();
    }

    /// What this process copies to this node now, and what it failed to.
    pub fn copies_under_way(&self) -> Vec<UnderWay> {
        self.preparer.cache().under_way()
    }

    /// What this process reads ahead now.
    pub fn prefetching(&self) -> Vec<Prefetching> {
        self.preparer.prefetching()
    }

    /// Copies the images of a mount to this node and waits for it: see [`Preparer::warm`].
    pub async fn warm(&self, mount: &Allowed) -> Result<Vec<Entry>> {
        let mut copies = Vec::new();
        for image in mount.images() {
            copies.extend(self.preparer.warm(image).await?);
        }
        Ok(copies)
    }

    /// Sees to the copies of published images from now on: goes on with what was cut short or failed.
    pub fn tend_copies(self: &Arc<Self>) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                match tokio::time::timeout(TEND, this.tend_copies_now()).await {
                    Ok(Err(error)) => tracing::error!(%error, "see to the copies of images"),
                    Ok(Ok(())) => {}
                    Err(_) => tracing::debug!("a server is not done with yet"),
                }
                tokio::time::sleep(TEND).await;
            }
        });
    }

    async fn tend_copies_now(&self) -> Result<()> {
        let mut all = Vec::new();
        for (_, published) in self.images().await? {
            if !all.contains(&published) {
                all.push(published);
            }
        }
        self.preparer.tend(all).await
    }

    /// Looks after the paths of published images that several servers have, from now on: those whose server is silent are given up, and
    /// taken back when it is there again.
    pub fn tend_paths(self: &Arc<Self>) {
        let (watching, tending) = (Arc::clone(self), Arc::clone(self));
        tokio::spawn(async move {
            loop {
                let pause = match watching.give_up_paths_now(Instant::now()).await {
                    Ok(true) => WATCH_PATHS,
                    Ok(false) => TEND_PATHS,
                    Err(error) => {
                        tracing::error!(%error, "look whether servers answer those who read");
                        TEND_PATHS
                    }
                };
                tokio::time::sleep(pause).await;
            }
        });
        tokio::spawn(async move {
            loop {
                if let Err(error) = tending.tend_paths_now(Instant::now()).await {
                    tracing::error!(%error, "look after the paths of images");
                }
                tokio::time::sleep(TEND_PATHS).await;
            }
        });
    }

    /// Whether there are any paths.
    async fn give_up_paths_now(&self, now: Instant) -> Result<bool> {
        let Some(silent) = self.preparer.silent_paths(now).await? else { return Ok(false) };
        if !silent.is_empty() {
            self.preparer.give_up_paths(self.replicated(), &silent).await?;
        }
        Ok(true)
    }

    async fn tend_paths_now(&self, now: Instant) -> Result<()> {
        self.preparer.tend_paths(self.replicated(), now).await
    }

    async fn replicated(&self) -> Result<Vec<(PathBuf, Published)>> {
        let mut images = self.images().await?;
        images.retain(|(_, published)| published.image.is_replicated());
        Ok(images)
    }

    /// The published images, and where: those that the policy still allows, for no other server is asked.
    async fn images(&self) -> Result<Vec<(PathBuf, Published)>> {
        let records = self.records.clone();
        let list = blocking::run("list the records", move || records.list()).await?;
        let mut all = Vec::new();
        for Record { target, mount, namespace, images, .. } in list.records {
            if Allowed::new(mount, self.preparer.policy(), namespace.as_deref()).is_ok() {
                let published = |(image, content)| Published { image, content, namespace: namespace.clone() };
                all.extend(images.into_iter().map(|image| (target.clone(), published(image))));
            }
        }
        Ok(all)
    }

    /// Removes what earlier processes left and what belongs to pods that are gone, in the background; for a process that serves
    /// a node, before it does.
    pub fn sweep(&self) {
        let (records, kernel, tag) = (self.records.clone(), Arc::clone(&self.kernel), self.mark.tag().clone());
        tokio::spawn(async move {
            let sweep = move || {
                let trash = records.empty_trash();
                let trash = trash.map_err(|error| Error::new(Kind::Internal, format!("empty the trash: {error}")));
                // None waits for the success of another.
                for swept in [trash, records.sweep(&*kernel), kernel.sweep_mapped(&tag).map_err(Error::from)] {
                    if let Err(error) = swept {
                        tracing::error!(%error, "sweep");
                    }
                }
                Ok::<_, Error>(())
            };
            if let Err(error) = blocking::run("sweep", sweep).await {
                tracing::error!(%error, "sweep");
            }
        });
    }
}

/// What this node lacks for the driver to work; empty where nothing is missing.
pub async fn missing() -> Result<Vec<String>> {
    blocking::run("look what the kernel offers", || Ok::<_, Error>(support::missing())).await
}

/// Drops what is held where waiting for the kernel is allowed, and waits a little for it to be gone.
async fn release<T: Send + 'static>(held: T) {
    let gone = blocking::release("release what nobody uses any more", move || {
        let timer = Timer::start("release");
        drop(held);
        timer.end(None);
        Ok::<_, Error>(())
    });
    // Late is not lost: the thread goes on.
    let _ = tokio::time::timeout(RELEASE_PATIENCE, gone).await;
}
