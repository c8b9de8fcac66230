//! How the kubelet learns of this driver: a socket in its plugin registry, which it finds and asks
//! (`pluginregistration/v1`; k8s.io/kubernetes/pkg/kubelet/pluginmanager). It does so again whenever it starts or the socket is new.

use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::watch;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::socket;
use v1::registration_server::{Registration, RegistrationServer};
use v1::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// The messages and the service of `proto/pluginregistration/v1/api.proto`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("pluginregistration");
}

/// How the socket's name ends. The kubelet sends its path as the `:authority` of each request, with `%2F` for each slash (grpc-go's
/// encodeAuthority), and h2 refuses a host with a `%`. What stands before an `@` is no host, and is let through.
const SOCKET: &str = "@reg.sock";

/// What the kubelet last said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Registered {
    #[default]
    NotYet,
    Yes,
    /// In the kubelet's words. It tries again by itself.
    Refused(String),
}

/// Serves the registration of the driver `driver_name` in the directory `registry`, until `stop` is ready, and then takes it back.
///
/// `csi_socket` is where the kubelet finds the CSI services: a path that means the same to it and to this process.
pub async fn serve(
    registry: &Path,
    driver_name: &str,
    csi_socket: &Path,
    registered: watch::Sender<Registered>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let path = registry.join(format!("{driver_name}{SOCKET}"));
    let service = Service { driver_name: driver_name.to_owned(), csi_socket: csi_socket.to_owned(), registered };
    Server::builder()
        .add_service(RegistrationServer::new(service))
        .serve_with_incoming_shutdown(socket::listen(&path).await?, stop)
        .await
        .map_err(io::Error::other)?;
    // The kubelet forgets a driver whose socket is gone.
    socket::remove(&path)
}

struct Service {
    driver_name: String,
    csi_socket: PathBuf,
    registered: watch::Sender<Registered>,
}

#[tonic::async_trait]
impl Registration for Service {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".into(),
            name: self.driver_name.clone(),
            endpoint: self.csi_socket.display().to_string(),
            // Of CSI; the kubelet compares the major version.
            supported_versions: vec!["1.0.0".into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let registered = if status.plugin_registered {
            tracing::info!(driver = self.driver_name, "the kubelet registered the driver");
            Registered::Yes
        } else {
            tracing::error!(driver = self.driver_name, error = status.error, "the kubelet refused the driver");
            Registered::Refused(status.error)
        };
        self.registered.send_replace(registered);
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
