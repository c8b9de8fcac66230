//! The gRPC server on its Unix socket.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::v1::controller_server::ControllerServer;
use super::v1::identity_server::IdentityServer;
use super::v1::node_server::NodeServer;
use super::{Controller, Identity, Node};

/// Where to listen: a path, or a URL `unix:///path` or `unix:/path` as other CSI drivers take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")).unwrap_or(text);
        if path.is_empty() || path.contains("://") {
            return Err(format!("{text:?} is not a Unix socket: write unix:///path/to/csi.sock"));
        }
        Ok(Endpoint(path.into()))
    }
}

/// Serves until `stop` is ready; calls under way are answered first.
pub async fn serve(
    endpoint: &Endpoint,
    identity: Identity,
    controller: Option<Controller>,
    node: Option<Node>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = listen(&endpoint.0).await?;
    tracing::info!(socket = %endpoint.0.display(), "listening");
    Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_optional_service(controller.map(ControllerServer::new))
        .add_optional_service(node.map(NodeServer::new))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .map_err(io::Error::other)
}

/// Takes the place of a socket that nobody serves any more; one that is served, or no socket at all, is left alone.
async fn listen(path: &Path) -> io::Result<UnixListener> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("listen on {}: {error}", path.display()));
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(named(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is not a socket")));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(named(io::Error::new(io::ErrorKind::AddrInUse, "another process serves it")));
        }
        Ok(_) => std::fs::remove_file(path).map_err(named)?,
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_path_or_a_unix_url() {
        for text in ["unix:///csi/csi.sock", "unix:/csi/csi.sock", "/csi/csi.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().0, Path::new("/csi/csi.sock"), "{text}");
        }
        for text in ["", "unix://", "tcp://127.0.0.1:1"] {
            text.parse::<Endpoint>().unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_served_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("csi.sock");
        let first = listen(&path).await.unwrap();
        assert_eq!(listen(&path).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        listen(&path).await.unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(listen(&file).await.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
