//! Copies of images on the node's disk: made in the background, used by what starts next, and thrown away when others need the room.
//!
//! What is there, and what it is a copy of, the directory alone says ([`store`]). In memory is only what this process is copying, and what
//! it failed to ([`making`]).

pub mod by_hand;
mod copy;
mod making;
mod original;
mod store;

use std::path::PathBuf;
use std::sync::Arc;

pub use making::{Source, UnderWay};
pub use original::{Entry, Name, Original};
pub use store::{Bounds, Store};

use crate::blocking::{self, OffThread};
use crate::error::{Error, Kind, Result};
use crate::kernel::image::Image;
use crate::kernel::loop_device::Attached;
use crate::metrics;
use crate::spec::{Cache as Wanted, Digest, Loopback};
use making::Making;

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
    making: Making,
}

/// The copies of a node at one moment.
#[derive(Debug)]
pub struct Kept {
    /// What they take of the disk.
    pub bytes: u64,
    pub quota: u64,
    pub entries: Vec<Entry>,
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
                let (making, store) = (Making::new(config.copies), Arc::new(store));
                Cache { on: Ok(On { config, store, making }) }
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
                if could_be(&entry, digest)
                    && let Some((entry, copy)) = usable(&store, &entry.original)
                {
                    return Ok::<_, Error>(Some((entry.original, copy)));
                }
            }
            Ok(None)
        };
        blocking::run("look for a copy of the image", look).await
    }

    /// Whether [`Self::last_known`] may know a copy.
    pub async fn has(&self, name: &Name, digest: Option<Digest>) -> bool {
        let Ok(on) = &self.on else { return false };
        let (store, name) = (Arc::clone(&on.store), name.clone());
        let is_it = move |entry: &Entry| entry.is_complete() && could_be(entry, digest);
        let look = move || Ok::<_, Error>(store.entries_of(&name)?.iter().any(is_it));
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

    /// The ID of the copy that a loop device stands on. Waits for the disk.
    pub fn below(&self, device: &Attached) -> Option<String> {
        self.on.as_ref().ok()?.store.below(device)
    }

    /// The image whose copy a loop device stands on, by its path on its server. Waits for the disk.
    pub fn image_below(&self, device: &Attached) -> Option<String> {
        self.on.as_ref().ok()?.store.image_below(device)
    }

    /// What is kept, and how much of what may be; `None` where nothing is. Waits for the disk.
    pub fn kept(&self) -> Result<Option<Kept>> {
        let Ok(on) = &self.on else { return Ok(None) };
        let entries = on.store.entries()?;
        Ok(Some(Kept { bytes: on.store.usage()?, quota: on.config.bounds.quota, entries }))
    }
}

/// Whether a copy may be used without its server's word.
fn could_be(entry: &Entry, digest: Option<Digest>) -> bool {
    if digest.is_some() { entry.has(digest) } else { !entry.superseded }
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

/// Why a volume gets nothing; its condition says so too.
pub fn other_bytes(entry: &Entry, digest: Option<Digest>) -> Error {
    let (is, wanted) = (entry.digest.as_deref().unwrap_or_default(), digest.map(|digest| digest.to_string()));
    let message = format!("{} is {is}, and the volume names {}", entry.original.name, wanted.unwrap_or_default());
    Error::new(Kind::FailedPrecondition, message)
}

#[cfg(test)]
mod tests;
