//! A question that cannot hang, before the kernel asks one that can.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::resolve;
use crate::error::Kind;
use crate::kernel::nfs::{self, Export, Version};
use crate::kernel::{Error, Result, Subject};
use crate::metrics::{self, Timer};
use crate::step::waiting_for;

/// How long a server may take to answer before it counts as dead.
const PATIENCE: Duration = Duration::from_secs(5);
/// ONC RPC (RFC 5531): the NFS program, and the procedure that does nothing.
const NFS_PROGRAM: u32 = 100_003;
const NULL_PROCEDURE: u32 = 0;

/// Connects to the export's server and makes one NFS NULL call. Any answer will do: the server is alive.
///
/// A server that is mounted by RDMA need not listen on TCP and is not asked.
pub async fn null_call(export: &Export, server: SocketAddr) -> Result<()> {
    if export.is_rdma() {
        return Ok(());
    }
    let action = format!("ask NFS server {server} for {export}");
    waiting_for(&action);
    let timer = Timer::start("probe");
    let errno = match tokio::time::timeout(PATIENCE, call(export, server)).await {
        Ok(Ok(())) => {
            timer.end(None);
            return Ok(());
        }
        // As a load balancer does before servers that are dead.
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Errno::CONNRESET,
        Ok(Err(error)) => Errno::from_io_error(&error).unwrap_or(Errno::PROTO),
        Err(_) => Errno::TIMEDOUT,
    };
    timer.end(Some(metrics::errno_name(errno.raw_os_error())));
    Err(nfs::explain(Error::new(action, errno).about(Subject::Server)))
}

/// Asks the NFS service of a host at its standard port, at each of its addresses; says which versions answered.
pub async fn ask_host(host: &str) -> crate::error::Result<String> {
    let answers = ask_at(host, &resolve::addresses(host).await?, nfs::PORT).await?;
    let answers = answers.iter().map(|(address, version)| format!("NFS {} at {address}", version.program()));
    Ok(format!("answers {}", answers.collect::<Vec<_>>().join(", ")))
}

/// The first address of a host, of the family of `like`, at which an NFS service answers at this port.
pub async fn address_that_answers(host: &str, like: IpAddr, port: u16) -> crate::error::Result<IpAddr> {
    let mut addresses = resolve::addresses(host).await?;
    addresses.retain(|address| address.is_ipv4() == like.is_ipv4());
    Ok(ask_at(host, &addresses, port).await?[0].0)
}

/// Where NFS answers, and by which versions: one at least.
async fn ask_at(host: &str, addresses: &[IpAddr], port: u16) -> crate::error::Result<Vec<(IpAddr, Version)>> {
    let mut answers = Vec::new();
    let mut last = crate::error::Error::new(Kind::Unavailable, format!("ask {host}: the name has no such address"));
    for &address in addresses {
        for version in [Version::V4_2, Version::V3] {
            let (host, path) = (host.to_owned(), "/".to_owned());
            let export = Export { host, path, version, read_only: true, options: Vec::new() };
            match null_call(&export, SocketAddr::new(address, port)).await {
                Ok(()) => answers.push((address, version)),
                Err(error) => last = error.into(),
            }
        }
    }
    if answers.is_empty() { Err(last) } else { Ok(answers) }
}

async fn call(export: &Export, server: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(server).await?;
    let transaction = std::process::id();
    // A call: transaction, CALL, RPC version 2, program, version, procedure, then credentials and verifier of flavour AUTH_NONE.
    let words = [transaction, 0, 2, NFS_PROGRAM, export.version.program(), NULL_PROCEDURE, 0, 0, 0, 0];
    let last_fragment = 0x8000_0000 | (4 * words.len() as u32);
    let message: Vec<u8> = [last_fragment].into_iter().chain(words).flat_map(u32::to_be_bytes).collect();
    stream.write_all(&message).await?;
    let _length = stream.read_u32().await?;
    let answer = (stream.read_u32().await?, stream.read_u32().await?);
    if answer == (transaction, 1) { Ok(()) } else { Err(std::io::Error::from_raw_os_error(libc::EPROTO)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn export() -> Export {
        let (host, path) = ("localhost".into(), "/images".into());
        Export { host, path, version: Version::V4_2, read_only: true, options: Vec::new() }
    }

    /// Asks a listener that reads a call and answers these words.
    async fn ask_one_that_answers(answer: [u32; 3]) -> Result<()> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut call = [0; 44];
            stream.read_exact(&mut call).await.unwrap();
            assert_eq!(call[..4], [0x80, 0, 0, 40]);
            assert_eq!(call[16..24], [0, 1, 0x86, 0xa3, 0, 0, 0, 4]);
            for word in answer {
                stream.write_u32(word).await.unwrap();
            }
        };
        let export = export();
        tokio::join!(null_call(&export, address), serve).0
    }

    #[tokio::test]
    async fn a_server_that_answers_is_alive_and_one_that_speaks_otherwise_is_not() {
        ask_one_that_answers([0x8000_0008, std::process::id(), 1]).await.unwrap();
        let error = ask_one_that_answers([0x4854_5450, 0x2f31_2e31, 0x2034_3030]).await.unwrap_err();
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
