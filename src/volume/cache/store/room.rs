//! Room for copies: what may be taken, and who makes way.

use super::Store;
use crate::error::{Error, Kind, Result};
use crate::metrics;
use crate::volume::cache::original::{Entry, Original};

/// Room for the descriptions and for what a file system keeps of a file.
const OVERHEAD: u64 = 64 << 10;

/// How much the copies may take.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of all copies together, in bytes.
    pub quota: u64,
    /// What they leave of the disk to others, in bytes.
    pub min_free: u64,
}

impl Store {
    /// Evicts until a copy of this image fits.
    pub(super) fn make_room(&self, original: &Original, synced: u64, bounds: Bounds) -> Result<()> {
        let id = original.id();
        let size = original.size.saturating_add(OVERHEAD);
        let no_room = |why: String| {
            let message = format!("no room for a copy of {} bytes of {}: {why}", original.size, original.name);
            Err(Error::new(Kind::ResourceExhausted, message))
        };
        if size > bounds.quota {
            return no_room(format!("all copies together may have {} bytes", bounds.quota));
        }
        let mut others = self.entries()?;
        others.retain(|entry| entry.original.id() != id);
        let mut taken: u64 = others.iter().map(|entry| entry.original.size + OVERHEAD).sum();
        // False before true: what the server has no more goes first.
        others.sort_by_key(|entry| !entry.superseded);
        let mut candidates = others.into_iter();
        loop {
            let free = self.free().map_err(self.failed("look at", ""))?;
            let (fits, leaves) =
                (taken + size <= bounds.quota, free >= bounds.min_free.saturating_add(size - synced.min(size)));
            if fits && leaves {
                return Ok(());
            }
            let evicted = loop {
                let Some(entry) = candidates.next() else {
                    let used = "and what others have is in use";
                    return no_room(match fits {
                        false => format!("all copies together may have {} bytes, {used}", bounds.quota),
                        true => {
                            format!("{free} bytes are free on the disk, of which {} stay so, {used}", bounds.min_free)
                        }
                    });
                };
                if self.evict_unused(&entry)? {
                    break entry;
                }
            };
            taken -= evicted.original.size + OVERHEAD;
        }
    }

    /// Removes a copy unless it is in use; says whether it did.
    pub fn evict(&self, entry: &Entry) -> Result<bool> {
        let _lock = self.lock()?;
        self.evict_unused(entry)
    }

    fn evict_unused(&self, entry: &Entry) -> Result<bool> {
        let id = entry.original.id();
        if !self.unlink_unused(&id).map_err(self.failed("remove", &id))? {
            return Ok(false);
        }
        metrics::cache().evictions.inc();
        tracing::info!(image = %entry.original.name, bytes = entry.original.size, "the copy is evicted");
        Ok(true)
    }

    /// Removes a copy, used or not: who has it open keeps it. For one whose bytes are wrong.
    pub fn remove(&self, entry: &Entry) -> Result<()> {
        let _lock = self.lock()?;
        let id = entry.original.id();
        self.unlink(&id).map_err(self.failed("remove", &id))
    }
}
