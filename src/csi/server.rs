//! The gRPC server on its Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tonic::transport::Server;

use super::v1::controller_server::ControllerServer;
use super::v1::identity_server::IdentityServer;
use super::v1::node_server::NodeServer;
use super::{Controller, Identity, Node};
use crate::socket;

/// Where to listen: a path, or a URL `unix:///path` or `unix:/path` as other CSI drivers take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(PathBuf);

impl Endpoint {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

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
    let connections = socket::listen(&endpoint.0).await?;
    Server::builder()
        .add_service(IdentityServer::new(identity))
        .add_optional_service(controller.map(ControllerServer::new))
        .add_optional_service(node.map(NodeServer::new))
        .serve_with_incoming_shutdown(connections, stop)
        .await
        .map_err(io::Error::other)?;
    socket::remove(&endpoint.0)
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
}
