//! Copies of images on the node's disk: made in the background, used by what starts next, and thrown away when others need the room.
//!
//! What is there, and what it is a copy of, the directory alone says ([`store`]). In memory is only what this process is copying, and what
//! it failed to.

pub mod by_hand;
mod copy;
mod original;
mod store;

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

pub use original::{Entry, Name, Original, stands_on};
pub use store::{Bounds, Store};

use crate::blocking::{self, OffThread};
use crate::error::{Error, Kind, Result};
use crate::kernel::image::Image;
use crate::lock::lock;
use crate::metrics;
use crate::places::{Places, run_at};
use crate::spec::{Cache as Wanted, Digest, Loopback};
use copy::Progress;

/// How long after a copy failed it is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// A copy that gets less than so many bytes in so long is no reason for others to wait, whether its server cannot do better or will not.
const STALLED: Duration = Duration::from_secs(10);
const LEAST: u64 = 1 << 20;

/// How a node keeps copies.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub directory: PathBuf,
    pub bounds: Bounds,
    /// The most bytes that one copy reads in a second.
    pub rate: Option<u64>,
    /// How many copies are made at a time.
    pub copies: usize,
    /// Whether images are copied whose volumes do not say.
    pub by_default: bool,
}

/// The copies of one node; or why it keeps none.
pub struct Cache {
    on: std::result::Result<On, String>,
}

struct On {
    config: CacheConfig,
    store: Arc<Store>,
    turns: Arc<Semaphore>,
    copies: Arc<Mutex<HashMap<String, State>>>,
}

/// What this process knows of a copy that is not complete.
#[derive(Clone, Debug)]
enum State {
    Running { original: Original, progress: Arc<Progress> },
    Failed { original: Original, at: Instant, why: String },
}

/// A copy that is not complete, as others are told of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct UnderWay {
    pub image: String,
    pub size: u64,
    pub copied: u64,
    /// Why it goes on from the server; it is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// The copies of a node at one moment.
#[derive(Debug)]
pub struct Kept {
    /// What they take of the disk.
    pub bytes: u64,
    pub quota: u64,
    pub entries: Vec<Entry>,
}

/// An image that is open on its server.
pub struct Source {
    pub original: Original,
    pub file: OffThread<File>,
    pub places: Option<Places>,
}

impl Cache {
    /// One that keeps nothing.
    pub fn off(why: impl Into<String>) -> Self {
        Cache { on: Err(why.into()) }
    }

    /// A directory that cannot be used is no reason to serve no volumes: they are read from their servers, and who asks is told why.
    pub fn new(config: CacheConfig, driver_name: &str) -> Self {
        let opened = Store::new(&config.directory, driver_name).and_then(|store| {
            store.sweep()?;
            Ok(store)
        });
        match opened {
            Ok(store) => {
                let (turns, copies) = (Arc::new(Semaphore::new(config.copies)), Arc::default());
                Cache { on: Ok(On { config, store: Arc::new(store), turns, copies }) }
            }
            Err(error) => {
                tracing::error!("no image is copied to this node: {error}");
                metrics::cache().failures.inc();
                Cache::off(error.message)
            }
        }
    }

    /// Whether this image is to be copied, where it lies on an export. One that names its bytes fails where nobody would look at them.
    pub fn wants(&self, image: &Loopback, allowed_by_default: bool) -> Result<bool> {
        match (&self.on, image.digest) {
            (Ok(on), _) => Ok(match image.cache {
                Some(wanted) => wanted == Wanted::Node,
                None => on.config.by_default && allowed_by_default,
            }),
            (Err(_), None) => Ok(false),
            (Err(why), Some(_)) => {
                let message = format!(
                    "the digest of image {} would not be checked: that is done where images are copied to the node, and this one keeps no \
                     copies: {why}",
                    image.path
                );
                Err(Error::new(Kind::FailedPrecondition, message))
            }
        }
    }

    /// The copy of what the server has now; other copies by that name are of the past. `FAILED_PRECONDITION` where it is not what the volume
    /// names.
    pub async fn confirmed(&self, original: &Original, digest: Option<Digest>) -> Result<Option<OffThread<Image>>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let (store, original, bounds) = (Arc::clone(&on.store), original.clone(), on.config.bounds);
        let look = move || {
            // What cannot be written down now will be said again.
            if let Err(error) = store.confirm(&original.name, Some(&original)) {
                tracing::warn!(%error, "an older copy is not marked");
            }
            match usable(&store, &original) {
                Some((entry, _)) if !entry.has(digest) => Err(other_bytes(&entry, digest)),
                Some((_, copy)) => Ok(Some(copy)),
                None if digest.is_some() && original.size > bounds.quota => {
                    let message = format!(
                        "the digest of {} would not be checked: it has {} bytes, and the copies of this node may have {}",
                        original.name, original.size, bounds.quota
                    );
                    Err(Error::new(Kind::FailedPrecondition, message))
                }
                None => Ok(None),
            }
        };
        blocking::run("look for a copy of the image", look).await
    }

    /// The server says that it has no image by this name, or none for this node.
    pub async fn is_gone(&self, name: &Name) -> Result<()> {
        let Ok(on) = &self.on else { return Ok(()) };
        let (store, name) = (Arc::clone(&on.store), name.clone());
        blocking::run("mark copies of the image", move || store.confirm(&name, None)).await
    }

    /// What the server had by this name when it was asked last, or what the volume names, for when the server does not answer.
    pub async fn last_known(
        &self,
        name: &Name,
        digest: Option<Digest>,
    ) -> Result<Option<(Original, OffThread<Image>)>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let (store, name) = (Arc::clone(&on.store), name.clone());
        let look = move || {
            for entry in store.entries_of(&name)?.into_iter().rev() {
                let is_it = if digest.is_some() { entry.has(digest) } else { !entry.superseded };
                if is_it && let Some((entry, copy)) = usable(&store, &entry.original) {
                    return Ok::<_, Error>(Some((entry.original, copy)));
                }
            }
            Ok(None)
        };
        blocking::run("look for a copy of the image", look).await
    }

    /// Whether there is a copy by this name that could be used without the server.
    pub async fn has(&self, name: &Name) -> bool {
        let Ok(on) = &self.on else { return false };
        let (store, name) = (Arc::clone(&on.store), name.clone());
        let look = move || Ok::<_, Error>(store.entries_of(&name)?.iter().any(Entry::is_complete));
        blocking::run("look for a copy of the image", look).await.unwrap_or_default()
    }

    /// The complete copies by this name with this content.
    pub async fn copies_of(&self, name: &Name) -> Result<Vec<Entry>> {
        let Ok(on) = &self.on else { return Ok(Vec::new()) };
        let (store, name) = (Arc::clone(&on.store), name.clone());
        let look = move || {
            let mut entries = store.entries_of(&name)?;
            entries.retain(Entry::is_complete);
            Ok::<_, Error>(entries)
        };
        blocking::run("look for a copy of the image", look).await
    }

    /// Copies an image, after others where there are many, and opens the copy. `None` where another is at it, or it failed a moment ago: what
    /// failed is logged and told to who asks, and tried again at a later call.
    pub async fn copy(&self, source: Source) -> Result<Option<OffThread<Image>>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let (id, original) = (source.original.id(), source.original.clone());
        let progress = Arc::<Progress>::default();
        let before = {
            let mut copies = lock(&on.copies);
            copies.retain(|_, state| !matches!(state, State::Failed { at, .. } if at.elapsed() > 10 * AGAIN));
            match copies.get(&id) {
                Some(State::Running { .. }) => return Ok(None),
                Some(State::Failed { at, .. }) if at.elapsed() < AGAIN => return Ok(None),
                Some(State::Failed { .. }) | None => {}
            }
            copies.insert(id.clone(), State::Running { original: original.clone(), progress: Arc::clone(&progress) })
        };
        let under_way = metrics::UnderWay::new();
        let copied = on.copy(source, &progress).await;
        drop(under_way);
        match copied {
            Ok(image) => {
                lock(&on.copies).remove(&id);
                Ok(image)
            }
            Err(error) => {
                // Said once, and not at each time that it is tried again.
                if !matches!(before, Some(State::Failed { why, .. }) if why == error.message) {
                    tracing::error!("{} is read from its server: {error}", original.name);
                }
                metrics::cache().failures.inc();
                let failed = State::Failed { original, at: Instant::now(), why: error.message.clone() };
                lock(&on.copies).insert(id, failed);
                Err(error)
            }
        }
    }

    /// What this process copies now, and what it failed to.
    pub fn under_way(&self) -> Vec<UnderWay> {
        let Ok(on) = &self.on else { return Vec::new() };
        let mut all: Vec<_> = lock(&on.copies).values().map(describe).collect();
        all.sort_by(|one, other| one.image.cmp(&other.image));
        all
    }

    /// What is kept, and how much of what may be; `None` where nothing is. Waits for the disk.
    pub fn kept(&self) -> Result<Option<Kept>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let entries = on.store.entries()?;
        Ok(Some(Kept { bytes: on.store.usage()?, quota: on.config.bounds.quota, entries }))
    }
}

impl On {
    async fn copy(&self, source: Source, progress: &Arc<Progress>) -> Result<Option<OffThread<Image>>> {
        let turn = self.turns.acquire().await.expect("nobody closes it");
        let (store, config, seen) = (Arc::clone(&self.store), self.config.clone(), Arc::clone(progress));
        let Source { original, file, places } = source;
        let step = format!("copy {} to this node", original.name);
        let work = move || {
            if let Some(mut part) = store.begin(&original, config.bounds)? {
                match copy::copy(&file, &mut part, config.rate, &seen) {
                    Ok(digest) => part.complete(&digest)?,
                    Err(copy::Failure { error, goes_on: true }) => return Err(error),
                    Err(copy::Failure { error, goes_on: false }) => {
                        if let Err(error) = part.discard() {
                            tracing::warn!(%error, "a copy that is of no use stays");
                        }
                        return Err(error);
                    }
                }
            }
            Ok::<_, Error>(usable(&store, &original).map(|(_, copy)| copy))
        };
        let copying = run_at(places, step, work);
        tokio::pin!(copying);
        let least = self.config.rate.map_or(LEAST, |rate| LEAST.min(rate * STALLED.as_secs() / 2));
        let (mut turn, mut last) = (Some(turn), 0);
        loop {
            match tokio::time::timeout(STALLED, &mut copying).await {
                Ok(copied) => return copied,
                Err(_) => {
                    let now = progress.bytes.load(Ordering::Relaxed);
                    if now.saturating_sub(last) < least {
                        // The next one goes ahead, and this one goes on when it can.
                        turn.take();
                    }
                    last = now;
                }
            }
        }
    }
}

fn describe(state: &State) -> UnderWay {
    let (original, copied, failed) = match state {
        State::Running { original, progress } => (original, progress.bytes.load(Ordering::Relaxed), None),
        State::Failed { original, why, .. } => (original, 0, Some(why.clone())),
    };
    UnderWay { image: original.name.to_string(), size: original.size, copied, failed }
}

/// The copy of an image where it can be used. A disk that fails is no reason to fail a volume, which has its server.
fn usable(store: &Store, original: &Original) -> Option<(Entry, OffThread<Image>)> {
    let (entry, file) = store.get(original).unwrap_or_else(|error| {
        tracing::error!("a copy is of no use: {error}");
        metrics::cache().failures.inc();
        None
    })?;
    match Image::copy(file, original.content(), original.changed) {
        Ok(copy) => Some((entry, OffThread::new(copy))),
        Err(error) => {
            tracing::error!("the copy of {} is thrown away: {error}", original.name);
            metrics::cache().failures.inc();
            if let Err(error) = store.remove(&entry) {
                tracing::error!(%error, "throw away a copy");
            }
            None
        }
    }
}

/// Why a volume gets nothing: in the words of its condition, too.
pub fn other_bytes(entry: &Entry, digest: Option<Digest>) -> Error {
    let (is, wanted) = (entry.digest.as_deref().unwrap_or_default(), digest.map(|digest| digest.to_string()));
    let message = format!("{} is {is}, and the volume names {}", entry.original.name, wanted.unwrap_or_default());
    Error::new(Kind::FailedPrecondition, message)
}

#[cfg(test)]
mod tests;
