//! When things happen: stage, publish, unpublish and unstage of one spec, and what they share.
//!
//! [`Volumes`] is the whole of it. A call runs as one operation under its key ([`in_flight`]); it turns the spec into held kernel objects
//! ([`prepare`]), those into one detached mount ([`build`]), and attaches that as the last step. Whatever waits for the kernel
//! runs on a thread of its own ([`blocking`]).

mod blocking;
mod build;
mod error;
mod exports;
mod in_flight;
mod prepare;
mod publish;
mod record;
mod resolve;
mod shared;
mod stats;
pub mod status;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use error::{Error, Kind, Result};
pub use stats::{Stats, Usage};

use crate::kernel::namespace::PrivateNamespace;
use crate::spec::Mount;
use in_flight::InFlight;
use prepare::{Prepared, Preparer};

/// How long the answer to an unstage or unpublish waits for the kernel to let go of what nobody uses any more.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// What the driver is told when it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Marks this driver's loop devices and overlays: two drivers on a node differ in it.
    pub driver_name: String,
    /// Where scratch layers and records live: on a disk of the node that can be the upper of an overlay.
    pub data_dir: PathBuf,
    /// Where the node's root directory is seen, for `base: root`.
    pub host_root: PathBuf,
    /// How long a call may take before it is answered with `DEADLINE_EXCEEDED`; its work goes on.
    pub timeout: Duration,
}

/// One volume at one published path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    pub volume_id: String,
    pub target: PathBuf,
    pub mount: Mount,
    pub read_only: bool,
}

/// The volumes of one node.
pub struct Volumes {
    config: Config,
    namespace: Arc<PrivateNamespace>,
    preparer: Preparer,
    in_flight: InFlight,
    /// What staged volumes hold, by volume ID.
    staged: Mutex<HashMap<String, (Mount, Arc<Prepared>)>>,
    /// What published paths hold. The kernel keeps them alive without it; this keeps the NFS mount for the next volume.
    published: Mutex<HashMap<PathBuf, Arc<Prepared>>>,
}

impl Volumes {
    /// Makes the mount namespace and the data directory; needs root.
    pub fn new(config: Config) -> Result<Arc<Self>> {
        record::create_directory(&config.data_dir)?;
        let namespace = Arc::new(PrivateNamespace::new()?);
        Ok(Arc::new(Volumes {
            preparer: Preparer::new(Arc::clone(&namespace), &config)?,
            namespace,
            config,
            in_flight: InFlight::default(),
            staged: Mutex::default(),
            published: Mutex::default(),
        }))
    }

    /// Mounts the exports and attaches the images that the volume needs, and holds them until [`Self::unstage`].
    ///
    /// Staging the same volume again is no work. Another spec under the same ID is `ALREADY_EXISTS`.
    pub async fn stage(self: &Arc<Self>, volume_id: &str, mount: &Mount) -> Result<()> {
        let this = Arc::clone(self);
        let (id, mount) = (volume_id.to_owned(), mount.clone());
        let request = format!("stage {mount:?}");
        self.in_flight
            .run(
                volume_key(volume_id),
                request,
                self.config.timeout,
                async move { this.held(&id, &mount).await.map(drop) },
            )
            .await
    }

    /// Lets go of what [`Self::stage`] holds. A volume that is not staged is no error.
    pub async fn unstage(self: &Arc<Self>, volume_id: &str) -> Result<()> {
        let this = Arc::clone(self);
        let id = volume_id.to_owned();
        let work = async move {
            let held = lock(&this.staged).remove(&id);
            release(held).await;
            Ok(())
        };
        self.in_flight.run(volume_key(volume_id), "unstage".into(), self.config.timeout, work).await
    }

    /// What the staged volume holds. After a restart of the driver nothing is held: it is prepared again.
    async fn held(&self, volume_id: &str, mount: &Mount) -> Result<Arc<Prepared>> {
        if let Some((staged, held)) = lock(&self.staged).get(volume_id) {
            if staged == mount {
                return Ok(Arc::clone(held));
            }
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("volume {volume_id} is staged with other attributes: unstage it first"),
            ));
        }
        let held = Arc::new(self.preparer.prepare(mount).await?);
        lock(&self.staged).insert(volume_id.to_owned(), (mount.clone(), Arc::clone(&held)));
        Ok(held)
    }
}

/// Drops what is held where waiting for the kernel is allowed, and waits a little for it to be gone.
async fn release<T: Send + 'static>(held: T) {
    let gone = blocking::run("release what nobody uses any more", move || drop(held));
    // Late is not lost: the thread goes on.
    let _ = tokio::time::timeout(RELEASE_PATIENCE, gone).await;
}

fn volume_key(volume_id: &str) -> String {
    format!("volume {volume_id}")
}

/// No code panics while it holds one of these locks, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
