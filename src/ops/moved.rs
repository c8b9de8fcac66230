//! An NFS server that has moved to another address: what this node has mounted from it goes on there.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::kernel::transport::{self, Transport};
use crate::kernel::{self, nfs};
use crate::volume;

/// How long it is looked whether a connection is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection of the kernel that leads elsewhere now.
pub struct Moved {
    from: Transport,
    to: IpAddr,
    is_connected: bool,
}

/// One line: `10.0.0.5 port 2049 is at 10.0.0.9 now: connected`.
impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Moved { from, to, is_connected } = self;
        write!(f, "{}", from.address)?;
        if let Some(port) = from.port {
            write!(f, " port {port}")?;
        }
        let words = if *is_connected { "connected" } else { "it is connected when something is read" };
        write!(f, " is at {to} now: {words}")
    }
}

/// Leads all connections of this node's NFS client to `old` to the address of `new` that answers: of every mount, whoever made it. It is
/// the admin's word that what answers there has the same file systems; readers get errors (ESTALE) where that is not so.
///
/// `each` is told of one after the other. Takes root in the node's network namespace, and Linux 5.14.
pub async fn move_server(old: IpAddr, new: &str, mut each: impl FnMut(&Moved)) -> Result<()> {
    let all = blocking::run("list the connections to NFS servers", transport::list).await?;
    let from: Vec<_> = all.iter().filter(|transport| transport.address == old).cloned().collect();
    if from.is_empty() {
        let mut others: Vec<_> = all.iter().map(|transport| transport.address.to_string()).collect();
        others.dedup();
        let others = if others.is_empty() { "no server".into() } else { others.join(", ") };
        let message = format!("this node's NFS client has no connection to {old}, but to {others}: nothing is moved");
        return Err(Error::new(Kind::NotFound, message));
    }
    let port = from.iter().find_map(|transport| transport.port).unwrap_or(nfs::PORT);
    let to = volume::address_that_answers(new, old, port).await?;
    for from in from {
        let work = move || {
            from.move_to(to)?;
            let is_connected = from.is_connected_within(PATIENCE);
            Ok::<_, kernel::Error>(Moved { from, to, is_connected })
        };
        each(&blocking::run(format!("move the connection to {old}"), work).await?);
    }
    Ok(())
}
