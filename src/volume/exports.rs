//! NFS mounts that volumes share: one for each export and set of options.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;

use super::blocking::{Aside, Places, measured};
use super::error::{Kind, Result};
use super::shared::Shared;
use super::{lock, probe, resolve};
use crate::kernel::mount::{DetachedMount, Symlinks, open_directory, open_directory_beneath, unmount_all};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::nfs::{self, Export};
use crate::kernel::{self};

/// An export mounted in the driver's namespace, for as long as anyone holds it.
pub struct NfsMount {
    export: Export,
    address: IpAddr,
    places: Places,
    mount: DetachedMount,
    namespace: Arc<PrivateNamespace>,
    directory: String,
}

impl NfsMount {
    /// Opens a directory of the mount without following a symlink. Asks the server.
    pub fn open(&self, directory: &str) -> kernel::Result<OwnedFd> {
        open_directory_beneath(&self.mount, directory, Symlinks::Refused)
    }

    /// The threads that may wait for this mount's server.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Whether the server answers, so that it makes sense to let the kernel ask it something.
    pub async fn ask(&self) -> Result<()> {
        Ok(probe::ask(&self.export, SocketAddr::new(self.address, self.export.port())).await?)
    }

    fn attach(
        export: Export,
        address: IpAddr,
        places: Places,
        namespace: Arc<PrivateNamespace>,
    ) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mount = export.mount(address)?;
        let directory = format!("nfs-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        namespace.run(|| {
            make_directory(&directory)?;
            mount.attach(open_directory(Path::new(&directory))?)
        })??;
        Ok(NfsMount { export, address, places, mount, namespace, directory })
    }

    fn detach(namespace: &PrivateNamespace, directory: &str) -> kernel::Result<()> {
        namespace.run(|| {
            unmount_all(Path::new(directory))?;
            std::fs::remove_dir(directory).map_err(|error| io_error(format!("remove {directory}"), &error))
        })?
    }
}

impl Drop for NfsMount {
    fn drop(&mut self) {
        if let Err(error) = NfsMount::detach(&self.namespace, &self.directory) {
            tracing::error!("release NFS mount {}: {error}", self.export);
        }
    }
}

/// The NFS mounts of one driver.
pub struct Exports {
    namespace: Arc<PrivateNamespace>,
    /// In KiB.
    read_ahead: Option<u32>,
    mounts: Shared<Export, Aside<NfsMount>>,
    /// By server, whatever name a user has for it.
    places: Mutex<HashMap<IpAddr, Places>>,
}

impl Exports {
    pub fn new(namespace: Arc<PrivateNamespace>, read_ahead: Option<u32>) -> Self {
        Exports { namespace, read_ahead, mounts: Shared::default(), places: Mutex::default() }
    }

    /// The mount of this export, whose server answered just now. Every address of the host is tried; the error is the most telling
    /// one.
    pub async fn get(&self, export: &Export) -> Result<Arc<Aside<NfsMount>>> {
        let made = AtomicBool::new(false);
        let mount = self.mounts.get(export, async {
            made.store(true, Ordering::Relaxed);
            self.mount(export).await
        });
        let mount = mount.await?;
        if !made.into_inner() {
            mount.ask().await?;
        }
        Ok(mount)
    }

    async fn mount(&self, export: &Export) -> Result<Aside<NfsMount>> {
        let mut last = None;
        for address in resolve::addresses(&export.host).await? {
            let attempt = match probe::ask(export, SocketAddr::new(address, export.port())).await {
                Ok(()) => self.mount_from(export, address).await,
                Err(error) => Err(error.into()),
            };
            match attempt {
                Ok(mount) => return Ok(mount),
                Err(error) => {
                    // What a server says beats what the network says about another of its addresses.
                    if last.as_ref().is_none_or(|last: &super::Error| last.kind == Kind::Unavailable) {
                        last = Some(error);
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| {
            super::Error::new(Kind::Unavailable, format!("mount {export}: the name has no address"))
        }))
    }

    async fn mount_from(&self, export: &Export, address: IpAddr) -> Result<Aside<NfsMount>> {
        let step = format!("mount {export} (nfs {}, {address})", export.version);
        let places = {
            let mut places = lock(&self.places);
            // Of servers that nobody uses any more.
            places.retain(|_, places| places.are_used());
            places.entry(address).or_insert_with(|| Places::new(address)).clone()
        };
        let (export, namespace, mine) = (export.clone(), Arc::clone(&self.namespace), places.clone());
        let read_ahead = self.read_ahead;
        let mount = move || {
            let mount = measured("nfs", || NfsMount::attach(export, address, mine, namespace))?;
            if let Some(kib) = read_ahead
                && let Err(error) = nfs::set_read_ahead(&mount.mount, kib)
            {
                tracing::warn!(%error, "the kernel's own read-ahead stays");
            }
            Ok::<_, kernel::Error>(Aside::new(mount))
        };
        Ok(places.run(step, mount).await??)
    }
}

/// Makes a mount point in the current directory.
pub(super) fn make_directory(name: &str) -> kernel::Result<()> {
    std::fs::create_dir(name).map_err(|error| io_error(format!("make directory {name}"), &error))
}

pub(super) fn io_error(action: String, error: &std::io::Error) -> kernel::Error {
    kernel::Error::new(action, Errno::from_io_error(error).unwrap_or(Errno::IO))
}
