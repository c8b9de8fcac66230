//! NFS mounts by the kernel's own text options (nfs(5), fs/nfs/fs_context.c), without mount.nfs(8).
//!
//! The kernel resolves no names: it wants the server's address as `addr=` and, for version 4, ours as `clientaddr=`.
//! Version 3 gets `nolock`: nothing locks an image, so that neither rpc.statd nor a lock port is needed.

mod protection;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::error::{Doing, Error, Result, Subject, errno_of};
use super::mount::NewMount;

/// The port of NFS where the options name no other.
pub const PORT: u16 = 2049;

/// The versions of the protocol that Linux speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    V3,
    V4_0,
    V4_1,
    V4_2,
}

impl Version {
    /// The value of the option `vers=`.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V3 => "3",
            Version::V4_0 => "4.0",
            Version::V4_1 => "4.1",
            Version::V4_2 => "4.2",
        }
    }

    /// The version that a server is asked for in the header of a call (RFC 5531): all of 4 have one.
    pub fn program(self) -> u32 {
        match self {
            Version::V3 => 3,
            Version::V4_0 | Version::V4_1 | Version::V4_2 => 4,
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One export, and how to mount it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    /// The name to show, in lower case; an IPv6 address has no brackets.
    pub host: String,
    pub path: String,
    pub version: Version,
    pub read_only: bool,
    /// Further options of nfs(5), already checked; never one that this file sets.
    pub options: Vec<(String, Option<String>)>,
    /// Of an export that several servers have, their list: such a mount is for who names the same list, and nobody else.
    pub one_of: Vec<String>,
}

impl std::fmt::Display for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.path)
    }
}

impl Export {
    /// The TCP port of the server's NFS service.
    pub fn port(&self) -> u16 {
        let port = self.option("port").and_then(|port| port.parse().ok());
        port.filter(|&port| port != 0).unwrap_or(PORT)
    }

    /// Whether the transport is RDMA, for which the server need not listen on TCP.
    pub fn is_rdma(&self) -> bool {
        self.option("proto").is_some_and(|proto| proto.starts_with("rdma"))
    }

    fn option(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(name, _)| name == key)?.1.as_deref()
    }

    /// The export as it is mounted from the server at `address`: `host:/path (nfs 4.2, sec=krb5p, ADDRESS)`.
    pub fn from(&self, address: IpAddr) -> String {
        let protection: String = self.protection().iter().map(|option| format!("{option}, ")).collect();
        format!("{self} (nfs {}, {protection}{address})", self.version)
    }

    /// The mount of the export from the server at `address`. [`Self::explain`] has words for the errors of making it.
    pub fn mount_from(&self, address: IpAddr) -> Result<NewMount> {
        let what = self.from(address);
        let fs_type = match self.version {
            Version::V3 => "nfs",
            Version::V4_0 | Version::V4_1 | Version::V4_2 => "nfs4",
        };
        let new = NewMount::new(fs_type, &what).about(Subject::Server);
        let new = new.set("source", self).set("vers", self.version).set("addr", address);
        let mut new = match self.version {
            Version::V3 => new.flag("nolock"),
            Version::V4_0 | Version::V4_1 | Version::V4_2 => {
                let own = own_address(SocketAddr::new(address, self.port()));
                let own = own.map_err(|errno| Error::new(format!("mount {what}"), errno).about(Subject::Server));
                new.set("clientaddr", own.map_err(|error| self.explain(error))?)
            }
        };
        // The kernel gives a mount the superblock of another whose options differ in these alone, and with it the other's patience.
        if self.options.iter().any(|(key, _)| matches!(key.as_str(), "timeo" | "retrans")) {
            new = new.flag("nosharecache");
        }
        // Without it the kernel has a bug there, BUG() in nfs_init_timeout_values: it knows no such protocol for MOUNT (seen with 6.12).
        if self.version == Version::V3 && self.is_tls() && self.option("mountproto").is_none() {
            new = new.set("mountproto", if address.is_ipv6() { "tcp6" } else { "tcp" });
        }
        for (key, value) in &self.options {
            new = match value {
                Some(value) => new.set(key, value),
                None => new.flag(key),
            };
        }
        Ok(if self.read_only { new.read_only() } else { new })
    }

    /// What to look at for the errors that mounts of it are known to end with.
    pub fn explain(&self, error: Error) -> Error {
        match self.protection_hint(error.errno()) {
            Some(hint) => error.with_hint(hint),
            None => explain(error),
        }
    }
}

/// Sets how many KiB the kernel reads ahead in the files of a mount that are opened from now on. All mounts of its superblock share
/// this, also those that others made of the same export with the same options.
///
/// Asks no server. It takes a writable /sys (Documentation/ABI/testing/sysfs-class-bdi).
pub fn set_read_ahead(mount: impl AsFd, kib: u32) -> Result<()> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let device = rustix::fs::statx(mount, "", flags, StatxFlags::empty()).doing(|| "look at an NFS mount".into())?;
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.stx_dev_major, device.stx_dev_minor);
    std::fs::write(&path, kib.to_string()).doing(|| format!("write {path}"))
}

/// What a mount has for one of its options, of those that it shows (/proc/PID/mountinfo).
pub fn shown<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    options.split(',').find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
}

/// What to look at for the errors that a server is known for, whatever protects its calls.
pub fn explain(error: Error) -> Error {
    let hint = match error.errno() {
        Errno::CONNREFUSED => "is nfsd running there, and is its port open to this node?",
        Errno::CONNRESET => "the connection was closed without an answer: is nfsd running behind that address?",
        Errno::PROTO => "what answers there is no NFS server: is the port right?",
        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::TIMEDOUT => {
            "is the server up, and does the network let this node reach it?"
        }
        Errno::NOENT => "the server has no such export: compare with 'showmount -e' or /etc/exports there",
        Errno::ACCESS => {
            "the server refuses this node: see the export's client list, and 'insecure' if the network translates ports"
        }
        Errno::PROTONOSUPPORT | Errno::OPNOTSUPP => {
            "the server does not speak this NFS version: try another 'version', or enable it in the server's nfs.conf"
        }
        Errno::INVAL => "the kernel refuses an option: see its words, and nfs(5)",
        _ => return error,
    };
    error.with_hint(hint)
}

/// The address from which this node reaches `server`; no packet is sent.
fn own_address(server: SocketAddr) -> std::result::Result<IpAddr, Errno> {
    let any: IpAddr = match server.ip() {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let address = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(server)?;
        socket.local_addr()
    });
    match address {
        Ok(address) => Ok(address.ip()),
        Err(error) => Err(errno_of(&error)),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn export(host: &str, options: &[(&str, Option<&str>)]) -> Export {
        Export {
            host: host.into(),
            path: "/images".into(),
            version: Version::V4_2,
            read_only: true,
            options: options.iter().map(|(key, value)| ((*key).into(), value.map(Into::into))).collect(),
            one_of: Vec::new(),
        }
    }

    #[test]
    fn an_ipv6_server_is_written_in_brackets() {
        assert_eq!(export("fd00::2", &[]).to_string(), "[fd00::2]:/images");
        assert_eq!(export("nfs.example.org", &[]).to_string(), "nfs.example.org:/images");
    }

    fn options(export: &Export) -> Vec<String> {
        let options = export.mount_from([127, 0, 0, 1].into()).unwrap().options.into_iter();
        options.map(|(key, value)| value.map_or(key.clone(), |value| format!("{key}={value}"))).collect()
    }

    #[test]
    fn the_kernel_gets_addresses_and_the_options_of_the_version() {
        let mut export = export("server", &[("hard", None), ("timeo", Some("600"))]);
        let v4 = "source=server:/images,vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,nosharecache,hard,timeo=600,ro";
        assert_eq!(options(&export).join(","), v4);
        (export.version, export.read_only) = (Version::V3, false);
        let v3 = "source=server:/images,vers=3,addr=127.0.0.1,nolock,nosharecache,hard,timeo=600";
        assert_eq!(options(&export).join(","), v3);
        assert_eq!(export.mount_from([127, 0, 0, 1].into()).unwrap().fs_type, "nfs");
    }

    #[test]
    fn the_kernel_is_told_how_to_ask_for_an_export_of_nfs_3_over_tls() {
        let mut export = export("server", &[("xprtsec", Some("tls"))]);
        assert!(!options(&export).join(",").contains("mountproto"));
        export.version = Version::V3;
        assert!(options(&export).join(",").contains("nolock,mountproto=tcp,xprtsec=tls"));
        export.options.push(("mountproto".into(), Some("tcp6".into())));
        assert!(options(&export).join(",").ends_with("nolock,xprtsec=tls,mountproto=tcp6,ro"));
    }

    #[test]
    fn a_mount_with_a_patience_of_its_own_shares_no_superblock_with_others() {
        let shares = |option| !options(&export("server", &[option])).contains(&"nosharecache".to_owned());
        assert!(!shares(("timeo", Some("1"))) && !shares(("retrans", Some("0"))) && shares(("soft", None)));
    }

    #[test]
    fn the_port_option_names_the_port() {
        assert_eq!(export("a", &[]).port(), 2049);
        assert_eq!(export("a", &[("port", Some("20490"))]).port(), 20490);
    }
}
