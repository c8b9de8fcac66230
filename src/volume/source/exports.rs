//! NFS mounts that volumes share: one for each export and set of options.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::mark::nfs_directory;
use super::shared::Shared;
use super::{probe, resolve};
use crate::blocking::{OffThread, Places, measured};
use crate::error::{Error, Kind, Result};
use crate::kernel::mount::{DetachedMount, Symlinks, open_directory, open_directory_beneath};
use crate::kernel::nfs::{self, Export};
use crate::kernel::{self, Doing, Kernel, in_namespace};
use crate::lock::lock;

/// An export mounted in the driver's namespace, for as long as anyone holds it.
pub struct NfsMount {
    export: Export,
    address: IpAddr,
    places: Places,
    mount: DetachedMount,
    kernel: Arc<dyn Kernel>,
    directory: String,
}

impl NfsMount {
    /// Waits for the server.
    fn new(export: Export, address: IpAddr, places: Places, kernel: Arc<dyn Kernel>) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mount = kernel.mount(export.mount_from(address)?).map_err(nfs::explain)?;
        let directory = nfs_directory(COUNT.fetch_add(1, Ordering::Relaxed));
        in_namespace(&*kernel, || {
            std::fs::create_dir(&directory).doing(|| format!("make directory {directory}"))?;
            let attach = || kernel.attach(&mount, open_directory(Path::new(&directory))?.as_fd());
            attach().inspect_err(|_| {
                // The first error is the one to report.
                let _ = std::fs::remove_dir(&directory);
            })
        })??;
        Ok(NfsMount { export, address, places, mount, kernel, directory })
    }

    /// Opens a directory of the mount without following a symlink. Asks the server.
    pub fn open(&self, directory: &str) -> kernel::Result<OwnedFd> {
        open_directory_beneath(&self.mount, directory, Symlinks::Refused)
    }

    /// The threads that may wait for this mount's server.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Whether the server answers, so that it makes sense to let the kernel ask it something.
    async fn probe(&self) -> Result<()> {
        Ok(probe::null_call(&self.export, SocketAddr::new(self.address, self.export.port())).await?)
    }

    fn detach(&self) -> kernel::Result<()> {
        in_namespace(&*self.kernel, || {
            self.kernel.unmount_all(Path::new(&self.directory))?;
            std::fs::remove_dir(&self.directory).doing(|| format!("remove {}", self.directory))
        })?
    }
}

impl Drop for NfsMount {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            tracing::error!("release NFS mount {}: {error}", self.export);
        }
    }
}

/// The NFS mounts of one driver.
pub struct Exports {
    kernel: Arc<dyn Kernel>,
    /// In KiB.
    read_ahead: Option<u32>,
    mounts: Shared<Export, OffThread<NfsMount>>,
    /// By server, whatever name a user has for it.
    places: Mutex<HashMap<IpAddr, Places>>,
}

impl Exports {
    pub fn new(kernel: Arc<dyn Kernel>, read_ahead: Option<u32>) -> Self {
        Exports { kernel, read_ahead, mounts: Shared::default(), places: Mutex::default() }
    }

    /// The mount of this export, whose server answered just now.
    pub async fn get(self: &Arc<Self>, export: &Export) -> Result<Arc<OffThread<NfsMount>>> {
        if let Some(mount) = self.mounts.find(export) {
            mount.probe().await?;
            return Ok(mount);
        }
        let (this, new) = (Arc::clone(self), export.clone());
        self.mounts.get(export, async move { this.mount(&new).await }).await
    }

    /// Tries every address of the host; the error is the most telling one.
    async fn mount(&self, export: &Export) -> Result<OffThread<NfsMount>> {
        let mut last: Option<Error> = None;
        for address in resolve::addresses(&export.host).await? {
            let attempt = match probe::null_call(export, SocketAddr::new(address, export.port())).await {
                Ok(()) => self.mount_from(export, address).await,
                Err(error) => Err(error.into()),
            };
            match attempt {
                Ok(mount) => return Ok(mount),
                // What a server says beats what the network says about another of its addresses.
                Err(error) if last.as_ref().is_none_or(|last| last.kind == Kind::Unavailable) => last = Some(error),
                Err(_) => {}
            }
        }
        Err(last.unwrap_or_else(|| Error::new(Kind::Unavailable, format!("mount {export}: the name has no address"))))
    }

    async fn mount_from(&self, export: &Export, address: IpAddr) -> Result<OffThread<NfsMount>> {
        let step = format!("mount {export} (nfs {}, {address})", export.version);
        let places = {
            let mut places = lock(&self.places);
            // Of servers that nobody uses any more.
            places.retain(|_, places| places.are_used());
            places.entry(address).or_insert_with(|| Places::new(address)).clone()
        };
        let (export, kernel, mine) = (export.clone(), Arc::clone(&self.kernel), places.clone());
        let read_ahead = self.read_ahead;
        let mount = move || {
            let mount = measured("nfs", || NfsMount::new(export, address, mine, Arc::clone(&kernel)))?;
            if let Some(kib) = read_ahead
                && let Err(error) = kernel.set_read_ahead(&mount.mount, kib)
            {
                tracing::warn!(%error, "the kernel's own read-ahead stays");
            }
            Ok::<_, kernel::Error>(OffThread::new(mount))
        };
        places.run(step, mount).await
    }
}
