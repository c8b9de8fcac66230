//! NFS mounts that volumes share: one for each export and set of options.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::mark::nfs_directory;
use super::shared::Shared;
use super::{probe, resolve};
use crate::blocking::{OffThread, measured};
use crate::error::{Error, Kind, Result};
use crate::kernel::mount::{DetachedMount, Symlinks, open_directory, open_directory_beneath};
use crate::kernel::nfs::{self, Export};
use crate::kernel::{self, Doing, Kernel, Subject, in_namespace};
use crate::places::{self, Place, Places, Table};

/// An export mounted in the driver's namespace, for as long as anyone holds it.
pub struct NfsMount {
    export: Export,
    address: IpAddr,
    places: Places,
    mount: DetachedMount,
    /// Its superblock is.
    read_only: bool,
    kernel: Arc<dyn Kernel>,
    directory: String,
}

impl NfsMount {
    /// Waits for the server, which is the one of `addresses` that answered: those of its host.
    fn new(
        export: Export,
        address: IpAddr,
        addresses: &[IpAddr],
        places: Places,
        kernel: Arc<dyn Kernel>,
    ) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mount = kernel.mount(export.mount_from(address)?).map_err(nfs::explain)?;
        let directory = nfs_directory(COUNT.fetch_add(1, Ordering::Relaxed));
        let options = in_namespace(&*kernel, || {
            std::fs::create_dir(&directory).doing(|| format!("make directory {directory}"))?;
            let attach = || {
                kernel.attach(&mount, open_directory(Path::new(&directory))?.as_fd())?;
                kernel.super_options(&mount)
            };
            attach().inspect_err(|_| {
                // The first error is the one to report.
                let _ = kernel.unmount_all(Path::new(&directory)).map(|()| std::fs::remove_dir(&directory));
            })
        })??;
        let read_only = options.split(',').next() == Some("ro");
        let real = options.split(',').find_map(|option| option.strip_prefix("addr=")?.parse().ok());
        // From here on it is taken off where it is dropped.
        let mount = NfsMount { export, address, places, mount, read_only, kernel, directory };
        match real {
            Some(real) if !addresses.contains(&real) => Err(mount.passes_for(real)),
            _ => Ok(mount),
        }
    }

    /// Opens a directory of the mount without following a symlink. Asks the server.
    pub fn open(&self, directory: &str) -> kernel::Result<OwnedFd> {
        open_directory_beneath(&self.mount, directory, Symlinks::Refused)
    }

    /// NFS 4 servers say who they are, and the kernel believes them: what says that it is another server is asked no more, and the mount shows
    /// the export of that one, which this node may read and the author of the volume may not.
    fn passes_for(&self, real: IpAddr) -> kernel::Error {
        let hint = format!(
            "it says that it is the server at {real}, which this node has mounted, and the kernel would show the export of that one: if \
             they are one server, name it by that address, or by a name that has both"
        );
        kernel::Error::new(format!("mount {}", self.mount.what()), Errno::NOTUNIQ)
            .about(Subject::Server)
            .with_hint(hint)
    }

    /// Fails where what was mounted read-only can be written to: Linux 6.13, and releases that took the change over, give such a mount
    /// the superblock of a writable one of the same export.
    pub fn check_read_only(&self) -> kernel::Result<()> {
        if self.read_only || !self.export.read_only {
            return Ok(());
        }
        let hint = "this kernel answers with the writable mount of the export that there is already: mount the export read-only \
                    everywhere on this node, or update its kernel";
        let action = format!("mount {} read-only", self.export);
        Err(kernel::Error::new(action, Errno::BUSY).about(Subject::Server).with_hint(hint))
    }

    /// The threads that may wait for this mount's server.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Whether the server answers, so that it makes sense to let the kernel ask it something.
    pub async fn probe(&self) -> Result<()> {
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
    places: Arc<Table>,
}

impl Exports {
    pub fn new(kernel: Arc<dyn Kernel>, read_ahead: Option<u32>) -> Self {
        Exports { kernel, read_ahead, mounts: Shared::default(), places: Arc::default() }
    }

    /// The mount of this export, whose server answered just now.
    pub async fn get(self: &Arc<Self>, export: &Export) -> Result<Arc<OffThread<NfsMount>>> {
        if let Some(mount) = self.mounts.find(export) {
            mount.probe().await?;
            return Ok(mount);
        }
        let (this, new) = (Arc::clone(self), export.clone());
        let admitted = self.admit(&format!("mount {export}")).await;
        let make = async move {
            let _admitted = admitted;
            this.mount(&new).await
        };
        self.mounts.get(export, make).await
    }

    /// See [`places::admit`].
    pub async fn admit(&self, step: &str) -> Option<Place> {
        places::admit(&self.places, step).await
    }

    /// For servers that an earlier process asked, of which nobody knows any more which they are.
    pub fn places_of_unknown(&self) -> Places {
        Places::new(&self.places, Ipv4Addr::UNSPECIFIED.into())
    }

    /// Tries every address of the host; the error is the most telling one.
    async fn mount(&self, export: &Export) -> Result<OffThread<NfsMount>> {
        let mut last: Option<Error> = None;
        let addresses: Arc<[IpAddr]> = resolve::addresses(&export.host).await?.into();
        for &address in &*addresses {
            let attempt = match probe::null_call(export, SocketAddr::new(address, export.port())).await {
                Ok(()) => self.mount_from(export, address, &addresses).await,
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

    async fn mount_from(
        &self,
        export: &Export,
        address: IpAddr,
        addresses: &Arc<[IpAddr]>,
    ) -> Result<OffThread<NfsMount>> {
        let step = format!("mount {export} (nfs {}, {address})", export.version);
        // By address, whatever name a user has for the server.
        let places = Places::new(&self.places, address);
        let (export, kernel, mine) = (export.clone(), Arc::clone(&self.kernel), places.clone());
        let addresses = Arc::clone(addresses);
        let read_ahead = self.read_ahead;
        let mount = move || {
            let mount = measured("nfs", || NfsMount::new(export, address, &addresses, mine, Arc::clone(&kernel)))?;
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
