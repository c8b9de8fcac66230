//! How much of images a node reads ahead of those who will read in them, and in which order.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::lock::lock;

/// How much a node reads ahead.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefetchConfig {
    /// The most bytes of all images that are attached, together; 0 for a node that reads nothing ahead. They are of the memory of the
    /// driver's cgroup.
    pub budget: u64,
    /// The most bytes of one image in a second.
    pub rate: Option<u64>,
}

/// What is read ahead on a node.
pub struct Prefetcher {
    config: PrefetchConfig,
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
    pub fn new(config: PrefetchConfig) -> Self {
        let (taken, turns, under_way) = (Arc::default(), Mutex::default(), Mutex::default());
        Prefetcher { config, taken, turns, under_way }
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

    #[test]
    fn the_budget_is_shared_by_the_images_that_are_attached() {
        let prefetcher = Prefetcher::new(PrefetchConfig { budget: 100, rate: None });
        let one = prefetcher.take(70).unwrap();
        let two = prefetcher.take(70).unwrap();
        assert_eq!((one.bytes(), two.bytes()), (70, 30));
        assert!(prefetcher.take(1).is_none());
        drop(one);
        assert_eq!(prefetcher.take(200).unwrap().bytes(), 70);
        assert!(!Prefetcher::new(PrefetchConfig::default()).is_on());
    }

    #[test]
    fn what_is_read_ahead_is_told_until_it_is_done() {
        let prefetcher = Prefetcher::new(PrefetchConfig { budget: 100, rate: None });
        let ahead = prefetcher.begin("a".into(), 50);
        ahead.is_at(20);
        let told = prefetcher.under_way();
        assert_eq!((told.len(), told[0].size, told[0].read), (1, 50, 20));
        drop(ahead);
        assert!(prefetcher.under_way().is_empty());
    }
}
