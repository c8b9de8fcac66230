//! A question that cannot hang, before the kernel asks one that can.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::resolve;
use crate::error::{Error, Kind};
use crate::kernel::nfs::{self, Export, Version};
use crate::kernel::{self, Result, Subject};
use crate::metrics::{self, Timer};
use crate::step::waiting_for;

/// How long a server may take to answer before it counts as dead.
const PATIENCE: Duration = Duration::from_secs(5);
/// ONC RPC (RFC 5531): the NFS program, and the procedure that does nothing.
const NFS_PROGRAM: u32 = 100_003;
const NULL_PROCEDURE: u32 = 0;
const LAST_FRAGMENT: u32 = 1 << 31;
const SUCCESS: u32 = 0;
/// One of each program version.
const VERSIONS: [Version; 2] = [Version::V4_2, Version::V3];

/// Connects to the export's server and makes one NFS NULL call. Any answer will do: the server is alive.
///
/// A server that is mounted by RDMA need not listen on TCP and is not asked.
pub async fn null_call(export: &Export, server: SocketAddr) -> Result<()> {
    match export.is_rdma() {
        true => Ok(()),
        false => ask(export, server).await.map(drop),
    }
}

async fn ask(export: &Export, server: SocketAddr) -> Result<Option<u32>> {
    let action = format!("ask NFS server {server} for {export}");
    waiting_for(&action);
    let timer = Timer::start("probe");
    let errno = match tokio::time::timeout(PATIENCE, call(export, server)).await {
        Ok(Ok(answer)) => {
            timer.end(None);
            return Ok(answer);
        }
        // As a load balancer does before servers that are dead.
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Errno::CONNRESET,
        Ok(Err(error)) => Errno::from_io_error(&error).unwrap_or(Errno::PROTO),
        Err(_) => Errno::TIMEDOUT,
    };
    timer.end(Some(metrics::errno_name(errno.raw_os_error())));
    // It is asked in the clear, and without a key.
    Err(nfs::explain(kernel::Error::new(action, errno).about(Subject::Server)))
}

/// Asks the NFS service of a host at its standard port, at each of its addresses; says which versions it speaks.
pub async fn ask_host(host: &str) -> crate::error::Result<String> {
    let (mut answers, mut last) = (Vec::new(), None);
    for address in resolve::addresses(host).await? {
        for version in VERSIONS {
            match ask_service(host, address, nfs::PORT, version).await {
                Ok(true) => answers.push(format!("NFS {} at {address}", version.program())),
                Ok(false) => {}
                Err(error) => last = Some(error),
            }
        }
    }
    match last {
        _ if !answers.is_empty() => Ok(format!("answers {}", answers.join(", "))),
        Some(error) => Err(error.into()),
        None => Err(Error::new(Kind::Unavailable, format!("ask {host}: it has no NFS service of version 3 or 4"))),
    }
}

/// The first IPv4 address of a host at which NFS answers at one of these ports, and the ports at which a service of ONC RPC does there: with
/// NFS 3 there are others than NFS.
pub async fn where_nfs_answers(host: &str, ports: &BTreeSet<u16>) -> crate::error::Result<(IpAddr, BTreeSet<u16>)> {
    let mut last = Error::new(Kind::Unavailable, format!("ask {host}: the name has no IPv4 address"));
    for address in resolve::addresses(host).await?.into_iter().filter(IpAddr::is_ipv4) {
        let (mut answering, mut is_nfs) = (BTreeSet::new(), false);
        for &port in ports {
            for version in VERSIONS {
                match ask_service(host, address, port, version).await {
                    Ok(speaks) => {
                        answering.insert(port);
                        is_nfs |= speaks;
                    }
                    Err(error) => last = error.into(),
                }
            }
        }
        match is_nfs {
            true => return Ok((address, answering)),
            false if answering.is_empty() => {}
            false => {
                last = Error::new(Kind::Unavailable, format!("ask {host}: {address} has other services, and not NFS"))
            }
        }
    }
    Err(last)
}

/// Whether what answers at this port speaks this version of NFS.
async fn ask_service(host: &str, address: IpAddr, port: u16, version: Version) -> Result<bool> {
    let (host, path) = (host.to_owned(), "/".to_owned());
    let export = Export { host, path, version, read_only: true, options: Vec::new(), one_of: Vec::new() };
    Ok(ask(&export, SocketAddr::new(address, port)).await? == Some(SUCCESS))
}

/// Connects and calls. What the answer says of the call: `accept_stat` of RFC 5531, where there is one.
async fn call(export: &Export, server: SocketAddr) -> std::io::Result<Option<u32>> {
    let mut stream = TcpStream::connect(server).await?;
    let transaction = std::process::id();
    // A call: transaction, CALL, RPC version 2, program, version, procedure, then credentials and verifier of flavour AUTH_NONE.
    let words = [transaction, 0, 2, NFS_PROGRAM, export.version.program(), NULL_PROCEDURE, 0, 0, 0, 0];
    let last_fragment = LAST_FRAGMENT | (4 * words.len() as u32);
    let message: Vec<u8> = [last_fragment].into_iter().chain(words).flat_map(u32::to_be_bytes).collect();
    stream.write_all(&message).await?;
    let length = stream.read_u32().await? & !LAST_FRAGMENT;
    let answer = (stream.read_u32().await?, stream.read_u32().await?);
    if answer != (transaction, 1) {
        return Err(std::io::Error::from_raw_os_error(libc::EPROTO));
    }
    // Whether it was accepted, and a verifier, which is empty for such a call; one that is denied ends before.
    if length < 24 || (stream.read_u32().await?, stream.read_u32().await?, stream.read_u32().await?) != (0, 0, 0) {
        return Ok(None);
    }
    Ok(Some(stream.read_u32().await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn export() -> Export {
        let (host, path) = ("localhost".into(), "/images".into());
        Export { host, path, version: Version::V4_2, read_only: true, options: Vec::new(), one_of: Vec::new() }
    }

    /// Asks a listener that reads a call and answers these words.
    async fn ask_one_that_answers(answer: &[u32]) -> Result<Option<u32>> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut call = [0; 44];
            stream.read_exact(&mut call).await.unwrap();
            assert_eq!(call[..4], [0x80, 0, 0, 40]);
            assert_eq!(call[16..24], [0, 1, 0x86, 0xa3, 0, 0, 0, 4]);
            for word in answer {
                stream.write_u32(*word).await.unwrap();
            }
        };
        let export = export();
        tokio::join!(ask(&export, address), serve).0
    }

    #[tokio::test]
    async fn a_server_that_answers_is_alive_and_one_that_speaks_otherwise_is_not() {
        let me = std::process::id();
        assert_eq!(ask_one_that_answers(&[0x8000_0008, me, 1]).await.unwrap(), None);
        assert_eq!(ask_one_that_answers(&[0x8000_0018, me, 1, 0, 0, 0, SUCCESS]).await.unwrap(), Some(SUCCESS));
        // It has another service, and no such program.
        assert_eq!(ask_one_that_answers(&[0x8000_0018, me, 1, 0, 0, 0, 1]).await.unwrap(), Some(1));
        // The call is denied.
        assert_eq!(ask_one_that_answers(&[0x8000_0014, me, 1, 1, 1, 5]).await.unwrap(), None);
        let error = ask_one_that_answers(&[0x4854_5450, 0x2f31_2e31, 0x2034_3030]).await.unwrap_err();
        assert_eq!(error.errno(), Errno::PROTO);
    }

    #[tokio::test]
    async fn a_closed_port_is_refused() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(null_call(&export(), address).await.unwrap_err().errno(), Errno::CONNREFUSED);
    }
}
