//! One export, mounted in the driver's namespace.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::mark::nfs_directory;
use super::probe::null_call;
use crate::blocking;
use crate::error::Result;
use crate::kernel::image::ImageIdentity;
use crate::kernel::mount::{self, DetachedMount, Symlinks, open_directory, open_directory_beneath};
use crate::kernel::nfs::{self, Export};
use crate::kernel::{self, Doing, Kernel, Subject, in_namespace};
use crate::lock::lock;
use crate::places::Places;

/// For how long calls are ended, and how often: the next ones are made when one has ended.
const ABORTING: Duration = Duration::from_secs(10);
const BETWEEN: Duration = Duration::from_millis(10);

/// An export mounted in the driver's namespace, for as long as anyone holds it.
pub struct NfsMount {
    export: Export,
    /// Of the server, as it was last known.
    address: Mutex<IpAddr>,
    places: Places,
    mount: Arc<DetachedMount>,
    /// Its superblock is.
    read_only: bool,
    kernel: Arc<dyn Kernel>,
    directory: String,
}

impl NfsMount {
    /// Waits for the server, which is the one of `addresses` that answered: those of its host.
    pub(super) fn new(
        export: Export,
        address: IpAddr,
        addresses: &[IpAddr],
        places: Places,
        kernel: Arc<dyn Kernel>,
    ) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mount = kernel.mount(export.mount_from(address)?).map_err(|error| export.explain(error))?;
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
        let (mount, address) = (Arc::new(mount), Mutex::new(address));
        // From here on it is taken off where it is dropped.
        let mount = NfsMount { export, address, places, mount, read_only, kernel, directory };
        match address_in(&options) {
            Some(real) if !addresses.contains(&real) => Err(mount.passes_for(real)),
            _ => mount.export.check_protection(&options).map(|()| mount),
        }
    }

    /// Opens a directory of the mount without following a symlink. Asks the server.
    pub fn open(&self, directory: &str) -> kernel::Result<OwnedFd> {
        open_directory_beneath(&*self.mount, directory, Symlinks::Refused)
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

    pub fn address(&self) -> IpAddr {
        *lock(&self.address)
    }

    /// Whether the server answers, so that it makes sense to let the kernel ask it something.
    pub async fn probe(&self) -> Result<()> {
        let known = self.address();
        let Err(error) = self.ask(known).await else { return Ok(()) };
        match self.address_now().await? {
            Some(address) if address != known => {
                *lock(&self.address) = address;
                self.ask(address).await
            }
            _ => Err(error),
        }
    }

    async fn ask(&self, address: IpAddr) -> Result<()> {
        Ok(null_call(&self.export, SocketAddr::new(address, self.export.port())).await?)
    }

    /// Where the kernel asks: an admin may have moved its connection, see [`kernel::transport`].
    async fn address_now(&self) -> Result<Option<IpAddr>> {
        let (kernel, mount) = (Arc::clone(&self.kernel), Arc::clone(&self.mount));
        let look = move || in_namespace(&*kernel, || kernel.super_options(&mount))?;
        let options = blocking::run(format!("look where {} is mounted from", self.export), look).await?;
        Ok(address_in(&options))
    }

    /// For what may be set of a mount.
    pub(super) fn mount(&self) -> &DetachedMount {
        &self.mount
    }

    /// Whether an image with this identity was opened on it. Asks no server.
    pub fn has(&self, identity: ImageIdentity) -> kernel::Result<bool> {
        Ok(mount::device_of(&*self.mount)? == identity.device)
    }

    /// Ends the calls that wait for the server, with an error for who made them, again and again until `is_done`, or for a while.
    pub fn abort_calls(&self, is_done: impl Fn() -> bool) -> kernel::Result<()> {
        let start = Instant::now();
        while !is_done() && start.elapsed() < ABORTING {
            in_namespace(&*self.kernel, || self.kernel.abort_calls(Path::new(&self.directory)))??;
            std::thread::sleep(BETWEEN);
        }
        Ok(())
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

/// The server's address in the options of a superblock.
fn address_in(options: &str) -> Option<IpAddr> {
    nfs::shown(options, "addr")?.parse().ok()
}
