//! `/healthz` and `/readyz` at one address, `/metrics` at another: who may look at metrics can keep no probe of the kubelet waiting.

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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::scrape;
use crate::error::Result;
use crate::kubernetes::registration::Registered;
use crate::single_flight::Flights;
use crate::volume::{self, Volumes};

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
    /// Whoever asks while an answer is made gets that one: many clients cost no more than one.
    answers: Flights<&'static str, (), Arc<str>>,
}

impl Watched {
    pub fn new(
        csi_socket: PathBuf,
        volumes: Option<Arc<Volumes>>,
        registered: Option<watch::Receiver<Registered>>,
    ) -> Self {
        let (known_problems, answers) = (watch::Sender::default(), Flights::default());
        Watched { csi_socket, volumes, registered, known_problems, answers }
    }

    /// What keeps the process from being ready, a line each. Kubernetes shows no more of an answer than its status, so that what is
    /// new is logged.
    async fn problems(&self) -> String {
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
        let problems = problems.join("\n");
        let before = self.known_problems.send_replace(problems.clone());
        match (problems.is_empty(), before == problems) {
            (false, false) => tracing::warn!("not ready: {problems}"),
            (true, false) => tracing::info!("ready"),
            _ => {}
        }
        problems
    }
}

/// What is served at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// `/healthz` and `/readyz`.
    Health,
    /// `/metrics`. Whoever can connect may read all of it: it names servers, exports and images, and holds no secret.
    Metrics,
}

/// Serves until `stop` is ready.
pub async fn serve(
    address: SocketAddr,
    served: Served,
    watched: Arc<Watched>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let (what, flag) = match served {
        Served::Health => ("health", "--health-address"),
        Served::Metrics => ("metrics", "--metrics-address"),
    };
    let named = |error: io::Error| {
        let hint = format!("choose another {flag}, or leave it out");
        io::Error::new(error.kind(), format!("serve {what} at {address}: {error}: {hint}"))
    };
    let listener = match TcpListener::bind(address).await {
        // "::" stands for all addresses, also of a kernel without IPv6.
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    let listener = listener.map_err(named)?;
    tracing::info!(%address, "serving {what}");
    let service = TowerToHyperService::new(router(served, watched));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(ASKING).keep_alive(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::pin!(stop);
    loop {
        let (stream, place) = tokio::select! {
            () = &mut stop => return Ok(()),
            accepted = accept(&listener, &places) => accepted,
        };
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
                tracing::warn!(%error, "accept an HTTP connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn router(served: Served, watched: Arc<Watched>) -> Router {
    let router = match served {
        Served::Health => Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)),
        Served::Metrics => Router::new().route("/metrics", get(metrics)),
    };
    router.with_state(watched)
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
    let problems = watched.answers.run(&"readyz", || async move { Ok(asked.problems().await.into()) });
    match problems.await {
        Ok(problems) if problems.is_empty() => (StatusCode::OK, "ok\n".into()),
        Ok(problems) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problems}\n")),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn metrics(State(watched): State<Arc<Watched>>) -> impl IntoResponse {
    let asked = Arc::clone(&watched);
    let text: Result<Arc<str>> =
        watched.answers.run(&"metrics", || async move { Ok(scrape::scrape(&asked).await?.into()) }).await;
    match text {
        Ok(text) => ([(CONTENT_TYPE, scrape::CONTENT_TYPE)], text.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
