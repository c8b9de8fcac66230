//! NFS mounts by the kernel's own text options (nfs(5), fs/nfs/fs_context.c), without mount.nfs(8).
//!
//! The kernel resolves no names: it wants the server's address as `addr=` and, for version 4, ours as `clientaddr=`.
//! Version 3 gets `nolock`: nothing locks an image, so that neither rpc.statd nor a lock port is needed.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::error::{Doing, Error, Result};
use super::mount::{CONFINED, DetachedMount, FsContext, MountAttrFlags};

/// The port of NFS where the options name no other.
pub const PORT: u16 = 2049;

/// One export, and how to mount it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    /// The name to show, in lower case; an IPv6 address has no brackets.
    pub host: String,
    pub path: String,
    /// The value of `vers=`: `3`, `4.0`, `4.1` or `4.2`.
    pub version: &'static str,
    pub read_only: bool,
    /// Further options of nfs(5), already checked; never one that this file sets.
    pub options: Vec<(String, Option<String>)>,
}

impl std::fmt::Display for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.path)
    }
}

impl Export {
    /// The TCP port of the server's NFS service.
    pub fn port(&self) -> u16 {
        let port = self.options.iter().find(|(key, _)| key == "port");
        let port = port.and_then(|(_, value)| value.as_ref()?.parse().ok());
        port.filter(|&port| port != 0).unwrap_or(PORT)
    }

    /// Mounts the export from the server at `address`, attached nowhere.
    ///
    /// Waits for the server: call it where waiting is allowed.
    pub fn mount(&self, address: IpAddr) -> Result<DetachedMount> {
        let fs_type = if self.version == "3" { "nfs" } else { "nfs4" };
        let what = format!("{self} (nfs {}, {address})", self.version);
        let context = FsContext::new(fs_type, &what)?;
        context.set("source", &self.to_string())?;
        context.set("vers", self.version)?;
        context.set("addr", &address.to_string())?;
        if self.version == "3" {
            context.set_flag("nolock")?;
        } else {
            let own = own_address(SocketAddr::new(address, self.port()))
                .map_err(|errno| explain(Error::new(format!("mount {what}"), errno)))?;
            context.set("clientaddr", &own.to_string())?;
        }
        for (key, value) in &self.options {
            match value {
                Some(value) => context.set(key, value)?,
                None => context.set_flag(key)?,
            }
        }
        let mut attributes = CONFINED;
        if self.read_only {
            context.set_flag("ro")?;
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        context.mount(attributes).map_err(explain)
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
    std::fs::write(&path, kib.to_string())
        .map_err(|error| Error::new(format!("write {path}"), Errno::from_io_error(&error).unwrap_or(Errno::IO)))
}

/// What to look at for the errors that NFS mounts are known to end with.
pub fn explain(error: Error) -> Error {
    let hint = match error.errno() {
        Errno::CONNREFUSED => "is nfsd running there, and is its port open to this node?",
        Errno::CONNRESET => "the connection was closed without an answer: is nfsd running behind that address?",
        Errno::PROTO => "what answers there is no NFS server: is the port right?",
        Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::TIMEDOUT => {
            "is the server up, and does the network let this node reach it?"
        }
        Errno::NOENT => "the server has no such export: compare with 'showmount -e' or /etc/exports there",
        Errno::ACCESS | Errno::PERM => {
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
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::HOSTUNREACH)),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(host: &str, options: &[(&str, Option<&str>)]) -> Export {
        Export {
            host: host.into(),
            path: "/images".into(),
            version: "4.2",
            read_only: true,
            options: options.iter().map(|(key, value)| ((*key).into(), value.map(Into::into))).collect(),
        }
    }

    #[test]
    fn an_ipv6_server_is_written_in_brackets() {
        assert_eq!(export("fd00::2", &[]).to_string(), "[fd00::2]:/images");
        assert_eq!(export("nfs.example.org", &[]).to_string(), "nfs.example.org:/images");
    }

    #[test]
    fn the_port_option_names_the_port() {
        assert_eq!(export("a", &[]).port(), 2049);
        assert_eq!(export("a", &[("port", Some("20490"))]).port(), 20490);
    }
}
