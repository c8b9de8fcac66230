//! How much of images a node reads ahead of those who will read in them, in which order, and what is learned for that.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::learned::Learned;
use crate::blocking::OffThread;
use crate::kernel::page_cache::Watched;
use crate::lock::lock;
use crate::volume::cache::Original;

/// How much a node reads ahead.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefetchConfig {
    /// The most bytes of all images that are attached, together; 0 for a node that reads nothing ahead, and learns nothing. They are of the
    /// memory of the driver's cgroup.
    pub budget: u64,
    /// The most bytes of one image in a second.
    pub rate: Option<u64>,
}

/// What is read ahead on a node.
pub struct Prefetcher {
    config: PrefetchConfig,
    learned: Learned,
    taken: Arc<Mutex<u64>>,
    /// One image at a time of each server.
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
    under_way: Mutex<Vec<Weak<Ahead>>>,
}

/// A part of the budget, until it is dropped: what an image takes of it for as long as it is attached.
pub struct Share {
    bytes: u64,
    taken: Arc<Mutex<u64>>,
}

impl Drop for Share {
    fn drop(&mut self) {
        *lock(&self.taken) -= self.bytes;
    }
}

impl Share {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// What is read ahead of an attached image, and learned of it.
#[derive(Default)]
pub struct OfImage(Mutex<State>);

#[derive(Default)]
struct State {
    is_begun: bool,
    is_ended: bool,
    share: Option<Share>,
    watch: Option<Arc<OffThread<Watch>>>,
}

impl OfImage {
    /// It is seen to from now on; says whether nobody did before.
    pub fn begin(&self) -> bool {
        !std::mem::replace(&mut lock(&self.0).is_begun, true)
    }

    /// Keeps a part of the budget until the end.
    pub fn hold(&self, share: Share) {
        let mut state = lock(&self.0);
        state.share = Some(share).filter(|_| !state.is_ended);
    }

    /// What is read of it is written down at the end.
    pub fn watch(&self, watch: OffThread<Watch>) {
        let mut state = lock(&self.0);
        state.watch = Some(Arc::new(watch)).filter(|_| !state.is_ended);
    }

    /// By what it is learned what was read of it so far.
    pub fn watched(&self) -> Option<Arc<OffThread<Watch>>> {
        lock(&self.0).watch.clone()
    }

    pub fn is_ended(&self) -> bool {
        lock(&self.0).is_ended
    }

    /// It is not read from its server any more.
    pub fn end(&self) {
        let ended = State { is_begun: true, is_ended: true, share: None, watch: None };
        let before = std::mem::replace(&mut *lock(&self.0), ended);
        drop(before);
    }
}

/// An image of which it is written down what was read, at the latest when this is dropped.
pub struct Watch {
    file: Watched,
    original: Original,
    learned: Learned,
}

impl Watch {
    pub fn new(file: Watched, original: Original, learned: Learned) -> Self {
        Watch { file, original, learned }
    }

    /// Writes it down. Waits for the disk.
    pub fn learn(&self) {
        let cached = self.file.cached().map_err(|error| error.to_string());
        let written =
            cached.and_then(|parts| self.learned.add(&self.original, parts).map_err(|error| error.to_string()));
        if let Err(error) = written {
            tracing::warn!("what was read of {} is not written down: {error}", self.original.name);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.learn();
    }
}

/// An image that is being read ahead, until it is dropped.
pub struct Ahead {
    image: String,
    size: u64,
    read: AtomicU64,
}

impl Ahead {
    /// So many bytes were read.
    pub fn is_at(&self, bytes: u64) {
        self.read.store(bytes, Ordering::Relaxed);
    }
}

/// The same as others are told of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Prefetching {
    pub image: String,
    /// How many bytes are to be read.
    pub size: u64,
    pub read: u64,
}

impl Prefetcher {
    pub fn new(config: PrefetchConfig, learned: Learned) -> Self {
        let (taken, turns, under_way) = (Arc::default(), Mutex::default(), Mutex::default());
        Prefetcher { config, learned, taken, turns, under_way }
    }

    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    pub fn is_on(&self) -> bool {
        self.config.budget > 0
    }

    pub fn rate(&self) -> Option<u64> {
        self.config.rate
    }

    /// Of so many bytes, as many as there are left; `None` where that is nothing.
    pub fn take(&self, wanted: u64) -> Option<Share> {
        let mut taken = lock(&self.taken);
        let bytes = wanted.min(self.config.budget.saturating_sub(*taken));
        *taken += bytes;
        (bytes > 0).then(|| Share { bytes, taken: Arc::clone(&self.taken) })
    }

    /// For one image at a time of this server.
    pub fn turns_of(&self, server: &str) -> Arc<Semaphore> {
        let mut turns = lock(&self.turns);
        turns.retain(|_, turns| Arc::strong_count(turns) > 1);
        Arc::clone(turns.entry(server.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))))
    }

    /// So many bytes of an image are to be read.
    pub fn begin(&self, image: String, size: u64) -> Arc<Ahead> {
        let ahead = Arc::new(Ahead { image, size, read: AtomicU64::default() });
        let mut under_way = lock(&self.under_way);
        under_way.retain(|ahead| ahead.strong_count() > 0);
        under_way.push(Arc::downgrade(&ahead));
        ahead
    }

    /// What is being read ahead.
    pub fn under_way(&self) -> Vec<Prefetching> {
        let describe = |ahead: Arc<Ahead>| Prefetching {
            image: ahead.image.clone(),
            size: ahead.size,
            read: ahead.read.load(Ordering::Relaxed),
        };
        lock(&self.under_way).iter().filter_map(Weak::upgrade).map(describe).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn prefetcher(budget: u64) -> Prefetcher {
        Prefetcher::new(PrefetchConfig { budget, rate: None }, Learned::new(Path::new("/nowhere")))
    }

    #[test]
    fn the_budget_is_shared_by_the_images_that_are_attached() {
        let prefetcher = prefetcher(100);
        let one = prefetcher.take(70).unwrap();
        let two = prefetcher.take(70).unwrap();
        assert_eq!((one.bytes(), two.bytes()), (70, 30));
        assert!(prefetcher.take(1).is_none());
        drop(one);
        assert_eq!(prefetcher.take(200).unwrap().bytes(), 70);
        assert!(prefetcher.is_on());
    }

    #[test]
    fn what_is_read_ahead_is_told_until_it_is_done() {
        let prefetcher = prefetcher(100);
        let ahead = prefetcher.begin("a".into(), 50);
        ahead.is_at(20);
        let told = prefetcher.under_way();
        assert_eq!((told.len(), told[0].size, told[0].read), (1, 50, 20));
        drop(ahead);
        assert!(prefetcher.under_way().is_empty());
    }
}
