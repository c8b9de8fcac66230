//! When things happen: stage, publish, unpublish and unstage of one spec, and what they share.
//!
//! [`Volumes`] is the whole of it. A call runs as one operation under its key ([`in_flight`]); it turns the spec into held kernel objects
//! ([`prepare`]), those into one detached mount ([`build`]), and attaches that as the last step. Whatever waits for the kernel
//! runs on a thread of its own ([`blocking`]).

mod blocking;
mod build;
mod condition;
mod error;
mod examine;
mod exports;
mod in_flight;
mod observe;
mod prepare;
mod probe;
mod publish;
mod record;
mod resolve;
mod shared;
mod stats;
pub mod status;
mod trash;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use error::{Error, Kind, Result};
pub use examine::{ask_server, try_overlay};
pub use observe::Observation;
pub use stats::{Stats, Usage};

use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::support;
use crate::metrics;
use crate::spec::Mount;
use crate::spec::policy::Policy;
use condition::Conditions;
use in_flight::{InFlight, Lease, Other};
use prepare::{Prepared, Preparer};
use trash::Trash;

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
    /// How many KiB the kernel reads ahead in files of NFS exports; `None` leaves that to the kernel.
    pub nfs_read_ahead: Option<u32>,
    /// What every spec was checked by.
    pub policy: Policy,
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
    /// No other path may be published while this one is (access mode `SINGLE_NODE_SINGLE_WRITER`).
    #[serde(default)]
    pub exclusive: bool,
}

impl Publication {
    /// One of a person, not of the kubelet.
    pub fn by_hand(target: PathBuf, mount: Mount, read_only: bool) -> Self {
        Publication { volume_id: by_hand(&target), target, mount, read_only, exclusive: false }
    }

    fn is_by_hand(&self) -> bool {
        self.volume_id == by_hand(&self.target)
    }
}

/// The volume ID of what a person mounted at `target`.
pub fn by_hand(target: &Path) -> String {
    format!("by hand: {}", target.display())
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
    /// Held while a record is written, so that of two exclusive publications the second sees the first.
    recording: Mutex<()>,
    trash: Trash,
    conditions: Conditions,
    /// What was wrong with published paths when they were last asked about.
    abnormal: Mutex<HashMap<PathBuf, String>>,
}

impl Volumes {
    /// Makes the mount namespace and the data directory; needs root.
    pub fn new(config: Config) -> Result<Arc<Self>> {
        record::create_directories(&config.data_dir)?;
        let path = config.data_dir.join("trash");
        let trash = Trash::new(path.clone()).map_err(|error| record::failed("make directory", &path, &error))?;
        let namespace = Arc::new(PrivateNamespace::new()?);
        Ok(Arc::new(Volumes {
            preparer: Preparer::new(Arc::clone(&namespace), &config)?,
            namespace,
            config,
            in_flight: InFlight::default(),
            staged: Mutex::default(),
            published: Mutex::default(),
            recording: Mutex::default(),
            trash,
            conditions: Conditions::default(),
            abnormal: Mutex::default(),
        }))
    }

    /// Mounts the exports and attaches the images that the volume needs, and holds them until [`Self::unstage`].
    ///
    /// Staging the same volume again is no work. Another spec under the same ID is `ALREADY_EXISTS`.
    pub async fn stage(self: &Arc<Self>, volume_id: &str, mount: &Mount) -> Result<()> {
        let (this, id, spec) = (Arc::clone(self), volume_id.to_owned(), mount.clone());
        let work = |lease| async move { this.stage_now(id, spec, lease).await };
        let request = format!("stage {mount:?}");
        self.in_flight.run(volume_key(volume_id), request, Other::Await, self.config.timeout, work).await
    }

    /// Lets go of what [`Self::stage`] holds, also of a stage that is under way. A volume that is not staged is no error.
    pub async fn unstage(self: &Arc<Self>, volume_id: &str) -> Result<()> {
        let (this, id) = (Arc::clone(self), volume_id.to_owned());
        let work = |_| async move {
            let held = lock(&this.staged).remove(&id);
            release(held).await;
            Ok(())
        };
        let request = "unstage".into();
        self.in_flight.run(volume_key(volume_id), request, Other::Supersede, self.config.timeout, work).await
    }

    async fn stage_now(&self, volume_id: String, mount: Mount, lease: Lease) -> Result<()> {
        if self.staged(&volume_id, &mount)?.is_some() {
            return Ok(());
        }
        let held = Arc::new(self.preparer.prepare(&mount).await?);
        lease.change(|| {
            lock(&self.staged).insert(volume_id, (mount, held));
            Ok(())
        })
    }

    /// What the volume holds if it is staged. After a restart of the driver nothing is.
    fn staged(&self, volume_id: &str, mount: &Mount) -> Result<Option<Arc<Prepared>>> {
        match lock(&self.staged).get(volume_id) {
            Some((staged, held)) if staged == mount => Ok(Some(Arc::clone(held))),
            Some(_) => {
                let message = format!("volume {volume_id} is staged with other attributes: unstage it first");
                Err(Error::new(Kind::AlreadyExists, message))
            }
            None => Ok(None),
        }
    }

    /// Waits until the scratch layers of what was unpublished are deleted: for a process that ends.
    pub fn finish_deletions(&self) {
        self.trash.finish();
    }

    /// Removes what earlier processes left and what belongs to pods that are gone, in the background; for a process that serves
    /// a node, before it does.
    pub fn sweep(&self) {
        if let Err(error) = self.trash.sweep() {
            tracing::error!(%error, "sweep");
        }
        let (data_dir, trash) = (self.config.data_dir.clone(), self.trash.clone());
        tokio::spawn(async move {
            let swept = blocking::run("sweep", move || record::sweep(&data_dir, &trash)).await;
            if let Err(error) = swept.and_then(|swept| swept) {
                tracing::error!(%error, "sweep");
            }
        });
    }
}

/// What this node lacks for the driver to work; empty where nothing is missing.
pub async fn missing() -> Result<Vec<String>> {
    blocking::run("look what the kernel offers", support::missing).await
}

/// Drops what is held where waiting for the kernel is allowed, and waits a little for it to be gone.
async fn release<T: Send + 'static>(held: T) {
    let gone = blocking::release("release what nobody uses any more", move || {
        let step = metrics::Step::start("release");
        drop(held);
        step.end(None);
    });
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
