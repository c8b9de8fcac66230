//! `/healthz`, `/readyz` and `/metrics`.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::{Mutex, watch};

use super::scrape;
use crate::kubernetes::registration::Registered;
use crate::volume::{self, Volumes};

/// How long the process may take to accept a connection to its own socket.
const PATIENCE: Duration = Duration::from_secs(3);

/// What is looked at.
pub struct Watched {
    pub csi_socket: PathBuf,
    /// `None` where this process mounts nothing.
    pub volumes: Option<Arc<Volumes>>,
    /// `None` where something else registers the driver.
    pub registered: Option<watch::Receiver<Registered>>,
    /// What kept the process from being ready when it was last asked.
    pub problems: watch::Sender<String>,
    /// Held by the one request that looks at the node: many clients cost no more than one.
    pub looking: Mutex<()>,
}

/// Serves until `stop` is ready. Whoever can connect may read all of it: it names servers, exports and images, and holds no secret.
pub async fn serve(
    address: SocketAddr,
    watched: Watched,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let named = |error: io::Error| {
        let hint = "choose another --http-address, or leave it out";
        io::Error::new(error.kind(), format!("serve metrics and health at {address}: {error}: {hint}"))
    };
    let listener = TcpListener::bind(address).await.map_err(named)?;
    tracing::info!(%address, "serving metrics and health");
    axum::serve(listener, router(watched)).with_graceful_shutdown(stop).await
}

fn router(watched: Watched) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Arc::new(watched))
}

/// Well while the process serves its socket: what a restart could mend, and nothing else.
async fn healthz(State(watched): State<Arc<Watched>>) -> (StatusCode, String) {
    let socket = watched.csi_socket.display();
    match tokio::time::timeout(PATIENCE, UnixStream::connect(&watched.csi_socket)).await {
        Ok(Ok(_)) => (StatusCode::OK, "ok\n".into()),
        Ok(Err(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("connect to {socket}: {error}\n")),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, format!("connect to {socket}: no answer\n")),
    }
}

/// Ready when the kernel has what is needed and the kubelet knows the driver.
async fn readyz(State(watched): State<Arc<Watched>>) -> (StatusCode, String) {
    let _looking = watched.looking.lock().await;
    let mut problems = Vec::new();
    if watched.volumes.is_some() {
        match volume::missing().await {
            Ok(missing) => problems.extend(missing.into_iter().map(|missing| format!("this node lacks: {missing}"))),
            Err(error) => problems.push(error.to_string()),
        }
    }
    match watched.registered.as_ref().map(|registered| registered.borrow().clone()) {
        None | Some(Registered::Yes) => {}
        Some(Registered::NotYet) => problems.push("the kubelet has not registered the driver yet".into()),
        Some(Registered::Refused(why)) => problems.push(format!("the kubelet refused the driver: {why}")),
    }
    let problems = problems.join("\n");
    // Kubernetes shows no more of an answer than its status.
    let before = watched.problems.send_replace(problems.clone());
    match (problems.is_empty(), before == problems) {
        (false, false) => tracing::warn!("not ready: {problems}"),
        (true, false) => tracing::info!("ready"),
        _ => {}
    }
    match problems.is_empty() {
        true => (StatusCode::OK, "ok\n".into()),
        false => (StatusCode::SERVICE_UNAVAILABLE, problems + "\n"),
    }
}

async fn metrics(State(watched): State<Arc<Watched>>) -> impl IntoResponse {
    let _looking = watched.looking.lock().await;
    match scrape::scrape(&watched).await {
        Ok(text) => ([(CONTENT_TYPE, scrape::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
