//! NFS mounts that volumes share: one for each export and set of options.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::TcpStream;

use super::error::{Kind, Result};
use super::shared::Shared;
use super::{blocking, resolve};
use crate::kernel::mount::{DetachedMount, open_directory, unmount_all};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::nfs::{self, Export};
use crate::kernel::{self};

/// How long a server may take to accept a connection before it counts as dead.
const PATIENCE: Duration = Duration::from_secs(5);

/// An export mounted in the driver's namespace, for as long as anyone holds it.
pub struct NfsMount {
    export: Export,
    mount: DetachedMount,
    namespace: Arc<PrivateNamespace>,
    directory: String,
}

impl AsFd for NfsMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

impl NfsMount {
    fn attach(export: Export, address: IpAddr, namespace: Arc<PrivateNamespace>) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mount = export.mount(address)?;
        let directory = format!("nfs-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        namespace.run(|| {
            make_directory(&directory)?;
            mount.attach(open_directory(Path::new(&directory))?)
        })??;
        Ok(NfsMount { export, mount, namespace, directory })
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
        let namespace = Arc::clone(&self.namespace);
        let directory = std::mem::take(&mut self.directory);
        let name = self.export.to_string();
        let detach = move || {
            if let Err(error) = NfsMount::detach(&namespace, &directory) {
                tracing::error!("release NFS mount {name}: {error}");
            }
        };
        // The kernel may talk to the server here: never on the thread that answers calls.
        if tokio::runtime::Handle::try_current().is_ok() {
            std::thread::spawn(detach);
        } else {
            detach();
        }
    }
}

/// The NFS mounts of one driver.
pub struct Exports {
    namespace: Arc<PrivateNamespace>,
    mounts: Shared<Export, NfsMount>,
}

impl Exports {
    pub fn new(namespace: Arc<PrivateNamespace>) -> Self {
        Exports { namespace, mounts: Shared::default() }
    }

    /// The mount of this export. Every address of the host is tried; the error is that of the last.
    pub async fn get(&self, export: &Export) -> Result<Arc<NfsMount>> {
        self.mounts.get(export, self.mount(export)).await
    }

    async fn mount(&self, export: &Export) -> Result<NfsMount> {
        let mut last = None;
        for address in resolve::addresses(&export.host).await? {
            let server = SocketAddr::new(address, export.port());
            let attempt = match ask(export, server).await {
                Ok(()) => self.mount_from(export, address).await,
                Err(error) => Err(error.into()),
            };
            match attempt {
                Ok(mount) => return Ok(mount),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            super::Error::new(Kind::Unavailable, format!("mount {export}: the name has no address"))
        }))
    }

    async fn mount_from(&self, export: &Export, address: IpAddr) -> Result<NfsMount> {
        let step = format!("mount {export} (nfs {}, {address})", export.version);
        let (export, namespace) = (export.clone(), Arc::clone(&self.namespace));
        Ok(blocking::run(step, move || NfsMount::attach(export, address, namespace)).await??)
    }
}

/// Asks whether anyone listens, before the kernel waits for an answer without a way to stop it.
async fn ask(export: &Export, server: SocketAddr) -> kernel::Result<()> {
    let action = format!("connect to {server} for {export}");
    blocking::waiting_for(&action);
    let errno = match tokio::time::timeout(PATIENCE, TcpStream::connect(server)).await {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) => Errno::from_io_error(&error).unwrap_or(Errno::HOSTUNREACH),
        Err(_) => Errno::TIMEDOUT,
    };
    Err(nfs::explain(kernel::Error::new(action, errno)))
}

/// Makes a mount point in the current directory.
pub(super) fn make_directory(name: &str) -> kernel::Result<()> {
    std::fs::create_dir(name).map_err(|error| io_error(format!("make directory {name}"), &error))
}

pub(super) fn io_error(action: String, error: &std::io::Error) -> kernel::Error {
    kernel::Error::new(action, Errno::from_io_error(error).unwrap_or(Errno::IO))
}
