//! Copies that are being made: some at a time, each for all who ask for it, and none from a server that gives nothing.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::copy::{self, Progress};
use super::original::{Name, Original};
use super::{Cache, On, usable};
use crate::blocking::OffThread;
use crate::error::{Error, Kind, Result};
use crate::kernel::image::{Content, Image};
use crate::lock::lock;
use crate::metrics;
use crate::places::{Places, run_at};

/// How long after a copy failed it is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// A copy that waits so long for what it asked its server for last is no reason for others to wait, whether the server cannot do better or
/// will not.
const STALLED: Duration = Duration::from_secs(10);
/// How many such copies of one server there may be, until no other is begun.
const MOST_STALLED: usize = 2;

/// An image that is open on its server.
pub struct Source {
    pub original: Original,
    pub file: OffThread<File>,
    pub places: Option<Places>,
}

/// The copies that this process makes.
pub struct Making {
    turns: Semaphore,
    patience: Duration,
    /// What copies hold that have given their turn to others, by their server.
    stalled: Mutex<HashMap<String, Weak<()>>>,
    copies: Mutex<HashMap<String, State>>,
}

impl Making {
    /// At most so many at a time, beside those that get nothing.
    pub fn new(copies: usize) -> Self {
        Making { turns: Semaphore::new(copies), patience: STALLED, stalled: Mutex::default(), copies: Mutex::default() }
    }

    /// With another patience than a test has.
    #[cfg(test)]
    pub fn with_patience(self, patience: Duration) -> Self {
        Making { patience, ..self }
    }

    pub fn stalled(&self, server: &str) -> usize {
        lock(&self.stalled).get(server).map_or(0, Weak::strong_count)
    }

    /// Makes a copy from this server when it is its turn.
    pub async fn in_turn<T>(
        &self,
        server: &str,
        progress: &Progress,
        copying: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut turn = Some(self.turns.acquire().await.expect("nobody closes it"));
        if self.stalled(server) >= MOST_STALLED {
            let message =
                format!("{MOST_STALLED} copies from {server} get nothing, or next to nothing: no other is begun");
            return Err(Error::new(Kind::Unavailable, message));
        }
        tokio::pin!(copying);
        let mut stalled = None;
        loop {
            if let Ok(copied) = tokio::time::timeout(self.patience, &mut copying).await {
                return copied;
            }
            if progress.owed() >= self.patience {
                // The next one goes ahead, and this one goes on when it can.
                turn = None;
                stalled.get_or_insert_with(|| self.one_more_stalled(server));
            } else if turn.is_none() {
                // Those that wait for one have none that goes on already.
                turn = self.turns.try_acquire().ok();
                stalled = stalled.filter(|_| turn.is_none());
            }
        }
    }

    /// Until the answer is dropped.
    fn one_more_stalled(&self, server: &str) -> Arc<()> {
        let mut stalled = lock(&self.stalled);
        stalled.retain(|_, copies| copies.strong_count() > 0);
        let copies = stalled.get(server).and_then(Weak::upgrade).unwrap_or_default();
        stalled.insert(server.to_owned(), Arc::downgrade(&copies));
        copies
    }
}

/// What this process knows of a copy that is not complete.
#[derive(Clone, Debug)]
enum State {
    /// Once more, where it `failed` before.
    Running {
        original: Original,
        progress: Arc<Progress>,
        failed: Option<String>,
    },
    Failed {
        original: Original,
        at: Instant,
        why: String,
    },
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

impl Cache {
    /// Copies an image, after others where there are many, and opens the copy. `None` where another is at it, or it failed a moment ago: what
    /// failed is logged and told to who asks, and tried again at a later call.
    pub async fn copy(&self, source: Source) -> Result<Option<OffThread<Image>>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let (id, original) = (source.original.id(), source.original.clone());
        let progress = Arc::<Progress>::default();
        let failed = {
            let mut copies = lock(&on.making.copies);
            copies.retain(|_, state| !matches!(state, State::Failed { at, .. } if at.elapsed() > 10 * AGAIN));
            let failed = match copies.get(&id) {
                Some(State::Running { .. }) => return Ok(None),
                Some(State::Failed { at, .. }) if at.elapsed() < AGAIN => return Ok(None),
                Some(State::Failed { why, .. }) => Some(why.clone()),
                None => None,
            };
            let (original, progress) = (original.clone(), Arc::clone(&progress));
            copies.insert(id.clone(), State::Running { original, progress, failed: failed.clone() });
            failed
        };
        let under_way = metrics::UnderWay::new();
        let copied = on.copy(source, &progress).await;
        drop(under_way);
        match copied {
            Ok(image) => {
                lock(&on.making.copies).remove(&id);
                Ok(image)
            }
            Err(error) => {
                // Said once, and not at each time that it is tried again.
                if failed.as_ref() != Some(&error.message) {
                    tracing::error!("{} is read from its server: {error}", original.name);
                }
                metrics::cache().failures.inc();
                let failed = State::Failed { original, at: Instant::now(), why: error.message.clone() };
                lock(&on.making.copies).insert(id, failed);
                Err(error)
            }
        }
    }

    /// Why there is no copy of this content, where this process failed to make one.
    pub fn failure(&self, name: &Name, content: Content) -> Option<String> {
        let copies = lock(&self.on.as_ref().ok()?.making.copies);
        copies.values().find_map(|state| {
            let (original, why) = match state {
                State::Running { original, failed, .. } => (original, failed.as_ref()?),
                State::Failed { original, why, .. } => (original, why),
            };
            (original.name == *name && original.content() == content).then(|| why.clone())
        })
    }

    /// What this process copies now, and what it failed to.
    pub fn under_way(&self) -> Vec<UnderWay> {
        let Ok(on) = &self.on else { return Vec::new() };
        let mut all: Vec<_> = lock(&on.making.copies).values().map(describe).collect();
        all.sort_by(|one, other| one.image.cmp(&other.image));
        all
    }
}

impl On {
    async fn copy(&self, source: Source, progress: &Arc<Progress>) -> Result<Option<OffThread<Image>>> {
        let server = source.original.name.server.clone();
        let (store, config, seen) = (Arc::clone(&self.store), self.config.clone(), Arc::clone(progress));
        let Source { original, file, places } = source;
        let step = format!("copy {} to this node", original.name);
        // A place among the threads that wait for the server is its answer, too.
        let asked = progress.ask();
        let work = move || {
            drop(asked);
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
        self.making.in_turn(&server, progress, run_at(places, step, work)).await
    }
}

fn describe(state: &State) -> UnderWay {
    let (original, copied, failed) = match state {
        State::Running { original, progress, .. } => (original, progress.bytes.load(Ordering::Relaxed), None),
        State::Failed { original, why, .. } => (original, 0, Some(why.clone())),
    };
    UnderWay { image: original.name.to_string(), size: original.size, copied, failed }
}
