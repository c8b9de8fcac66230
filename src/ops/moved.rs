//! An NFS server that has moved to another address: what this node has mounted from it goes on there.

use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::kernel::nfs;
use crate::kernel::transport::{self, Transport};
use crate::volume;

/// How long it is looked whether the connections are there, all together.
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
/// `each` is told of one after the other; the error says which stay where they are, as nothing answers for them. Takes root in the node's
/// network namespace, and Linux 5.14.
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
    let port = |transport: &Transport| transport.port.unwrap_or(nfs::PORT);
    let (to, answering) = volume::where_nfs_answers(new, &from.iter().map(port).collect()).await?;
    if to == old {
        let message = format!("{new} is at {old}, where the connections lead: nothing is moved");
        return Err(Error::new(Kind::InvalidArgument, message));
    }
    let (mut moved, mut left) = (Vec::new(), Vec::new());
    for from in from {
        if !answering.contains(&port(&from)) {
            left.push(format!("nothing answers at {to} port {}", port(&from)));
            continue;
        }
        let (step, transport) = (format!("move the connection to {old}"), from.clone());
        match blocking::run(step, move || transport.move_to(to)).await {
            Ok(()) => moved.push(from),
            // It was closed meanwhile: nobody needs it.
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            Err(error) => left.push(error.message),
        }
    }
    let (start, count) = (Instant::now(), moved.len());
    for from in moved {
        let work = move || {
            let is_connected = from.is_connected_within(PATIENCE.saturating_sub(start.elapsed()));
            Ok::<_, Error>(Moved { from, to, is_connected })
        };
        each(&blocking::run(format!("wait for a connection to {to}"), work).await?);
    }
    match (count, left.is_empty()) {
        (0, true) => Err(Error::new(Kind::NotFound, format!("all connections to {old} were closed meanwhile"))),
        (_, true) => Ok(()),
        (_, false) => {
            let (many, why) = (left.len(), left.join("; "));
            Err(Error::new(Kind::Unavailable, format!("{count} connections were moved, and {many} were not: {why}")))
        }
    }
}
