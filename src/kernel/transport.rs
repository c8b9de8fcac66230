//! The connections of the kernel's NFS client to its servers: where they lead, and how they are led elsewhere.
//!
//! They are in `/sys/kernel/sunrpc` since Linux 5.14 (net/sunrpc/sysfs.c), those of the network namespace in which that was mounted. All
//! mounts of one server share them, whoever made the mounts.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::error::{Doing, Error, Result, errno_of};
use super::nfs;
use super::sock_diag::{self, Which};

const SWITCHES: &str = "/sys/kernel/sunrpc/xprt-switches";
/// How often connections to the old address are ended while the kernel is busy with one.
const AGAIN: Duration = Duration::from_millis(100);

/// A connection to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport {
    pub address: IpAddr,
    /// Not known while it is not connected.
    pub port: Option<u16>,
    directory: PathBuf,
}

/// All of them. Asks no server.
pub fn list() -> Result<Vec<Transport>> {
    let mut transports = Vec::new();
    for switch in entries(Path::new(SWITCHES))? {
        for directory in entries(&switch)? {
            let Some(address) = read(&directory.join("dstaddr")).and_then(|text| text.parse().ok()) else {
                // Another file, a connection that has just gone, or one to this machine by a path.
                continue;
            };
            let info = read(&directory.join("xprt_info")).unwrap_or_default();
            let port = info.lines().find_map(|line| line.strip_prefix("dst_port=")?.parse().ok());
            transports.push(Transport { address, port, directory });
        }
    }
    transports.sort_by(|one, other| one.directory.cmp(&other.directory));
    Ok(transports)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let doing = || format!("list {}", directory.display());
    match std::fs::read_dir(directory) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>().doing(doing)
        }
        Err(error) if directory == Path::new(SWITCHES) && errno_of(&error) == Errno::NOENT => {
            let hint = "is the NFS client there (modprobe sunrpc), and the kernel Linux 5.14 or newer?";
            Err(Error::new(doing(), Errno::NOENT).with_hint(hint))
        }
        // Gone meanwhile.
        Err(error) if matches!(errno_of(&error), Errno::NOENT | Errno::NOTDIR) => Ok(Vec::new()),
        Err(error) => Err(error).doing(doing),
    }
}

fn read(file: &Path) -> Option<String> {
    // Before Linux 5.18 a NUL ended it.
    let is_end = |letter: char| letter == '\0' || letter.is_whitespace();
    Some(std::fs::read_to_string(file).ok()?.trim_end_matches(is_end).to_owned())
}

impl Transport {
    /// Leads the connection to another IPv4 address. What waits for an answer is sent once more there. `ENOENT` where it was closed meanwhile.
    ///
    /// Waits while the kernel tries to connect to the old address, which ends with this. Takes a writable /sys, and CAP_NET_ADMIN for
    /// ending the old connection, which else takes the kernel some minutes.
    pub fn move_to(&self, address: IpAddr) -> Result<()> {
        let file = self.directory.join("dstaddr");
        let doing = || format!("move the connection to {} to {address} (write {})", self.address, file.display());
        if !(self.address.is_ipv4() && address.is_ipv4()) {
            // net/sunrpc/sysfs.c, rpc_sysfs_xprt_dstaddr_store: it has room for no other address, and says that all went well.
            let hint = "Linux leads a connection to another IPv4 address alone";
            return Err(Error::new(doing(), Errno::AFNOSUPPORT).with_hint(hint));
        }
        std::thread::scope(|scope| {
            let write = scope.spawn(|| std::fs::write(&file, address.to_string()));
            while !write.is_finished() {
                std::thread::sleep(AGAIN);
                self.end_connections();
            }
            write.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).doing(doing)
        })?;
        self.end_connections();
        Ok(())
    }

    /// The kernel would wait for the old server to take leave.
    fn end_connections(&self) {
        let (port, which) = match self.port {
            Some(port) => (port, Which::All),
            // It is not connected: what is may be somebody else's.
            None => (nfs::PORT, Which::Connecting),
        };
        match sock_diag::destroy(self.address, port, which) {
            Ok(count) => tracing::debug!(address = %self.address, count, "ended connections"),
            Err(error) => tracing::debug!(%error, "the kernel ends the old connection by itself, later"),
        }
    }

    /// Whether there is a connection, within this time.
    pub fn is_connected_within(&self, time: Duration) -> bool {
        let start = Instant::now();
        loop {
            let state = read(&self.directory.join("xprt_state")).unwrap_or_default();
            if state.split([' ', '=']).any(|word| word == "CONNECTED") {
                return true;
            }
            if start.elapsed() > time {
                return false;
            }
            std::thread::sleep(AGAIN);
        }
    }
}
