//! NFS mounts that volumes share: one for each export and set of options.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::io::Errno;

use super::nfs_mount::NfsMount;
use super::probe::null_call;
use super::resolve;
use super::shared::Shared;
use crate::blocking::{self, OffThread, measured};
use crate::error::{Error, Kind, Result};
use crate::kernel::nfs::{Export, Version};
use crate::kernel::{self, Kernel};
use crate::lock::lock;
use crate::places::{self, Place, Places, Table};
use crate::spec::policy::Policy;
use crate::step::waiting_for;

/// How long the kernel may take to mount an export of a server that answers, before another way to it is looked for.
const LATE: Duration = Duration::from_secs(10);

/// The NFS mounts of one driver.
pub struct Exports {
    kernel: Arc<dyn Kernel>,
    policy: Arc<Policy>,
    /// In KiB.
    read_ahead: Option<u32>,
    mounts: Shared<Export, OffThread<NfsMount>>,
    places: Arc<Table>,
    late: Mutex<HashMap<(IpAddr, Version), Weak<()>>>,
}

impl Exports {
    pub fn new(kernel: Arc<dyn Kernel>, policy: Arc<Policy>, read_ahead: Option<u32>) -> Self {
        let (mounts, places, late) = (Shared::default(), Arc::default(), Mutex::default());
        Exports { kernel, policy, read_ahead, mounts, places, late }
    }

    /// The mount of this export, whose server answered just now.
    pub async fn get(self: &Arc<Self>, export: &Export) -> Result<Arc<OffThread<NfsMount>>> {
        if let Some(mount) = self.mounts.find(export) {
            match mount.probe().await {
                Ok(()) => return Ok(mount),
                Err(error) => match self.answers_at(export, Some(mount.address())).await {
                    Some(address) => {
                        tracing::warn!("mount {export} from {address} from now on: {error}");
                        self.mounts.forget(export, &mount);
                    }
                    None => return Err(error),
                },
            }
        }
        let (this, new) = (Arc::clone(self), export.clone());
        let admitted = self.admit(&format!("mount {export}")).await;
        let make = async move {
            let _admitted = admitted;
            this.mount(&new).await
        };
        self.mounts.get(export, make).await
    }

    /// Who asks for this export from now on gets a new mount, as where the server says that it does not know the old one (ESTALE); who has
    /// the old one keeps it.
    pub fn forget(&self, export: &Export) {
        if let Some(mount) = self.mounts.find(export) {
            self.mounts.forget(export, &mount);
        }
    }

    /// The mount of this export, if anybody uses it.
    pub fn find(&self, export: &Export) -> Option<Arc<OffThread<NfsMount>>> {
        self.mounts.find(export)
    }

    /// Whether the server of an export answers, which need not be mounted.
    pub async fn answers(&self, export: &Export) -> bool {
        match self.mounts.find(export) {
            Some(mount) => mount.probe().await.is_ok(),
            None => self.answers_at(export, None).await.is_some(),
        }
    }

    /// See [`places::admit`].
    pub async fn admit(&self, step: &str) -> Option<Place> {
        places::admit(&self.places, step).await
    }

    /// For servers that an earlier process asked, of which nobody knows any more which they are.
    pub fn places_of_unknown(&self) -> Places {
        Places::new(&self.places, Ipv4Addr::UNSPECIFIED.into())
    }

    /// See [`Places::of_the_node`].
    pub fn places_of_the_node(&self) -> Places {
        Places::of_the_node(&self.places)
    }

    async fn addresses(&self, export: &Export) -> Result<Vec<IpAddr>> {
        resolve::all_addresses(&self.policy.addresses(&export.host)).await
    }

    /// An address of the server at which it answers, and not this one.
    async fn answers_at(&self, export: &Export, silent: Option<IpAddr>) -> Option<IpAddr> {
        // Name servers that do not answer either have no better news.
        for address in self.addresses(export).await.ok()? {
            if Some(address) != silent && self.ask(export, address).await.is_ok() {
                return Some(address);
            }
        }
        None
    }

    async fn ask(&self, export: &Export, address: IpAddr) -> kernel::Result<()> {
        null_call(export, SocketAddr::new(address, export.port())).await
    }

    /// Tries every address of the host; the error is the most telling one.
    async fn mount(&self, export: &Export) -> Result<OffThread<NfsMount>> {
        let mut last: Option<Error> = None;
        let addresses: Arc<[IpAddr]> = self.addresses(export).await?.into();
        for &address in &*addresses {
            let attempt = match self.ask(export, address).await {
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

    /// The kernel takes an NFS 4 server that it knows by another address for the same, and goes on at that one, however dead it is; and one
    /// that it has a connection to, in the clear if that is. It does so for one minor version of the protocol by itself: another has no such past.
    async fn mount_from(
        &self,
        export: &Export,
        address: IpAddr,
        addresses: &Arc<[IpAddr]>,
    ) -> Result<OffThread<NfsMount>> {
        let Some(other) = self.other_minor_version(export) else {
            return self.mount_as(export, address, addresses, Arc::default()).await;
        };
        if self.is_late(address, export.version) {
            return self.mount_as(&other, address, addresses, Arc::default()).await;
        }
        let mine = Arc::new(());
        let gone_when_done = Arc::downgrade(&mine);
        let mut first = pin!(self.mount_as(export, address, addresses, mine));
        let refused = match tokio::time::timeout(LATE, &mut first).await {
            Ok(Err(error)) if error.errno() == Some(Errno::NOTUNIQ) => Some(error),
            Ok(done) => return done,
            Err(_) if self.is_any_silent(export, address).await => None,
            Err(_) => {
                waiting_for(format!("mount {}", export.from(address)));
                return first.await;
            }
        };
        let why = refused.as_ref().map_or(
            "the kernel may know this server by another address, which does not answer".into(),
            Error::to_string,
        );
        tracing::warn!("mount {export} from {address} by NFS {} instead of {}: {why}", other.version, export.version);
        let second = self.mount_as(&other, address, addresses, Arc::default());
        if let Some(refused) = refused {
            return second.await.map_err(|_| refused);
        }
        lock(&self.late).insert((address, export.version), gone_when_done);
        let second = tokio::select! {
            done = &mut first => return done,
            done = second => done,
        };
        match second {
            Ok(mount) => Ok(mount),
            Err(_) => first.await,
        }
    }

    /// The same by another minor version of NFS 4, where the admin has nothing against it.
    fn other_minor_version(&self, export: &Export) -> Option<Export> {
        let version = match export.version {
            Version::V3 => return None,
            Version::V4_0 | Version::V4_2 => Version::V4_1,
            Version::V4_1 => Version::V4_2,
        };
        self.policy.allows_nfs(version.as_str()).then(|| Export { version, ..export.clone() })
    }

    /// Whether a mount from this address is under way for longer than it should be.
    fn is_late(&self, address: IpAddr, version: Version) -> bool {
        let mut late = lock(&self.late);
        late.retain(|_, mount| mount.strong_count() > 0);
        late.contains_key(&(address, version))
    }

    /// Whether the kernel has a connection to another NFS server, which does not answer: it may be this one by another address.
    async fn is_any_silent(&self, export: &Export, address: IpAddr) -> bool {
        let kernel = Arc::clone(&self.kernel);
        let connections = blocking::run("list the connections to NFS servers", move || kernel.transports()).await;
        let connections = connections.unwrap_or_else(|error| {
            tracing::debug!(%error, "which servers the kernel asks is not known");
            Vec::new()
        });
        let others: BTreeSet<_> = connections.into_iter().map(|connection| connection.address).collect();
        for other in others {
            if other != address && self.ask(export, other).await.is_err() {
                return true;
            }
        }
        false
    }

    /// `until_done` is held until the kernel is done, whoever still waits for it.
    async fn mount_as(
        &self,
        export: &Export,
        address: IpAddr,
        addresses: &Arc<[IpAddr]>,
        until_done: Arc<()>,
    ) -> Result<OffThread<NfsMount>> {
        let step = format!("mount {}", export.from(address));
        // By address, whatever name a user has for the server.
        let places = Places::new(&self.places, address);
        let (export, kernel, mine) = (export.clone(), Arc::clone(&self.kernel), places.clone());
        let addresses = Arc::clone(addresses);
        let read_ahead = self.read_ahead;
        let mount = move || {
            let _until_done = until_done;
            let mount = measured("nfs", || NfsMount::new(export, address, &addresses, mine, Arc::clone(&kernel)))?;
            if let Some(kib) = read_ahead
                && let Err(error) = kernel.set_read_ahead(mount.mount(), kib)
            {
                tracing::warn!(%error, "the kernel's own read-ahead stays");
            }
            Ok::<_, kernel::Error>(OffThread::new(mount))
        };
        places.run(step, mount).await
    }
}
