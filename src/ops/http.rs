//! `/healthz`, `/readyz` and `/metrics`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinError;

use super::scrape;
use crate::kubernetes::registration::Registered;
use crate::volume::{self, Error, Kind, Volumes};

/// How long the process may take to accept a connection to its own socket.
const PATIENCE: Duration = Duration::from_secs(3);
/// How many clients may be connected, how long one may take to ask, and until it has its answer: whoever can connect must not cost
/// the driver its memory.
const CONNECTIONS: usize = 64;
const ASKING: Duration = Duration::from_secs(3);
const CONNECTED: Duration = Duration::from_secs(20);

/// What is looked at.
pub struct Watched {
    pub csi_socket: PathBuf,
    /// `None` where this process mounts nothing.
    pub volumes: Option<Arc<Volumes>>,
    /// `None` where something else registers the driver.
    pub registered: Option<watch::Receiver<Registered>>,
    /// What kept the process from being ready when it was last asked.
    known_problems: watch::Sender<String>,
    readyz: Turn,
    metrics: Turn,
}

impl Watched {
    pub fn new(
        csi_socket: PathBuf,
        volumes: Option<Arc<Volumes>>,
        registered: Option<watch::Receiver<Registered>>,
    ) -> Self {
        let (readyz, metrics) = (Turn::default(), Turn::default());
        Watched { csi_socket, volumes, registered, known_problems: watch::Sender::default(), readyz, metrics }
    }
}

/// What one request after the other does: many clients cost no more than one.
#[derive(Default)]
struct Turn(Arc<Mutex<()>>);

impl Turn {
    /// Does `work` to its end, also for a client that is gone meanwhile: those who come and go would cost more than one otherwise.
    async fn take<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T, JoinError> {
        let turn = Arc::clone(&self.0).lock_owned().await;
        let work = async move {
            let _turn = turn;
            work.await
        };
        tokio::spawn(work).await
    }
}

/// Serves until `stop` is ready. Whoever can connect may read all of it: it names servers, exports and images, and holds no secret.
pub async fn serve(address: SocketAddr, watched: Watched, stop: impl Future<Output = ()>) -> io::Result<()> {
    let named = |error: io::Error| {
        let hint = "choose another --http-address, or leave it out";
        io::Error::new(error.kind(), format!("serve metrics and health at {address}: {error}: {hint}"))
    };
    let listener = match TcpListener::bind(address).await {
        // "::" stands for all addresses, also of a kernel without IPv6.
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    let listener = listener.map_err(named)?;
    tracing::info!(%address, "serving metrics and health");
    let service = TowerToHyperService::new(router(watched));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::pin!(stop);
    loop {
        let (stream, place) = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = accept(&listener, &places) => accepted,
        };
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(ASKING).keep_alive(false);
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(async move {
            let _place = place;
            // How a client leaves is its own affair.
            let _ = tokio::time::timeout(CONNECTED, connection).await;
        });
    }
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let place = Arc::clone(places).acquire_owned().await.expect("nobody closes it");
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) => {
                tracing::warn!(%error, "accept a connection to metrics and health");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
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
    let asked = Arc::clone(&watched);
    let problems = watched.readyz.take(async move {
        let problems = asked.problems().await.join("\n");
        // Kubernetes shows no more of an answer than its status.
        let before = asked.known_problems.send_replace(problems.clone());
        match (problems.is_empty(), before == problems) {
            (false, false) => tracing::warn!("not ready: {problems}"),
            (true, false) => tracing::info!("ready"),
            _ => {}
        }
        problems
    });
    match problems.await {
        Ok(problems) if problems.is_empty() => (StatusCode::OK, "ok\n".into()),
        Ok(problems) => (StatusCode::SERVICE_UNAVAILABLE, problems + "\n"),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

impl Watched {
    async fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.volumes.is_some() {
            match volume::missing().await {
                Ok(missing) => {
                    problems.extend(missing.into_iter().map(|missing| format!("this node lacks: {missing}")));
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        match self.registered.as_ref().map(|registered| registered.borrow().clone()) {
            None | Some(Registered::Yes) => {}
            Some(Registered::NotYet) => problems.push("the kubelet has not registered the driver yet".into()),
            Some(Registered::Refused(why)) => problems.push(format!("the kubelet refused the driver: {why}")),
        }
        problems
    }
}

async fn metrics(State(watched): State<Arc<Watched>>) -> impl IntoResponse {
    let asked = Arc::clone(&watched);
    let text = watched.metrics.take(async move { scrape::scrape(&asked).await });
    match text.await.unwrap_or_else(|error| Err(Error::new(Kind::Internal, error.to_string()))) {
        Ok(text) => ([(CONTENT_TYPE, scrape::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
