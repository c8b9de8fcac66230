//! What only the driver that serves this node knows, told at a socket in its data directory: what its threads wait for, of which the kernel
//! tells other processes only that they wait, what it copies, and what it reads ahead.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio_stream::StreamExt;

use crate::blocking;
use crate::error::{Error, Result};
use crate::socket;
use crate::volume::cache::UnderWay;
use crate::volume::source::Prefetching;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(3);

/// One thread.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    /// The addresses of the servers that it may wait for; empty for what needs this node alone.
    pub servers: String,
    pub step: String,
    /// Of the pod that it is done for, where that is known.
    pub namespace: Option<String>,
    pub seconds: u64,
}

/// What is told.
#[derive(Debug, Default, Deserialize, Serialize)]
pub struct Told {
    pub waiting: Vec<Waiting>,
    pub copies: Vec<UnderWay>,
    pub prefetching: Vec<Prefetching>,
}

/// Tells whoever connects, until `stop` is ready.
pub async fn serve(
    data_dir: &Path,
    in_background: impl Fn() -> (Vec<UnderWay>, Vec<Prefetching>),
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let path = socket_in(data_dir);
    let mut connections = socket::listen(&path).await?;
    tokio::pin!(stop);
    loop {
        let connection = tokio::select! {
            () = &mut stop => break,
            connection = connections.next() => connection,
        };
        if let Some(Ok(mut connection)) = connection {
            let (copies, prefetching) = in_background();
            let text = serde_json::to_vec(&Told { waiting: now(), copies, prefetching })?;
            // Who does not listen is told nothing.
            let _ = tokio::time::timeout(PATIENCE, connection.write_all(&text)).await;
        }
    }
    drop(connections);
    socket::remove(&path)
}

fn now() -> Vec<Waiting> {
    let describe = |under_way: blocking::UnderWay| Waiting {
        servers: under_way.servers,
        step: under_way.step,
        namespace: under_way.namespace.map(|namespace| namespace.to_string()),
        seconds: under_way.since.elapsed().as_secs(),
    };
    blocking::under_way().into_iter().map(describe).collect()
}

/// Asks the driver with this data directory; nothing where none runs.
pub fn ask(data_dir: &Path) -> Result<Told> {
    let path = socket_in(data_dir);
    let mut text = Vec::new();
    let read = UnixStream::connect(&path).and_then(|mut connection| {
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.read_to_end(&mut text)
    });
    match read {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(Told::default())
        }
        Err(error) => Err(Error::file("ask the driver at", &path, &error)),
        Ok(_) => serde_json::from_slice(&text).map_err(|error| Error::file("read", &path, &error.into())),
    }
}

fn socket_in(data_dir: &Path) -> PathBuf {
    data_dir.join("status.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_process_is_told_what_each_thread_waits_for() {
        let directory = tempfile::tempdir().unwrap();
        assert!(ask(directory.path()).unwrap().waiting.is_empty(), "no driver runs");
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = serve(directory.path(), Default::default, async { drop(stopped.await) });
        let path = directory.path().to_owned();
        let (told, heard) = std::sync::mpsc::channel::<()>();
        let stuck = blocking::run("a step of this test", move || {
            let _ = heard.recv();
            Ok::<_, Error>(())
        });
        let look = async {
            let asked = loop {
                let path = path.clone();
                let asked = blocking::run("ask", move || ask(&path)).await.unwrap().waiting;
                if asked.iter().any(|waiting| waiting.step == "a step of this test") {
                    break asked;
                }
            };
            drop((told, stop));
            asked
        };
        let (asked, stuck, served) = tokio::join!(look, stuck, serving);
        stuck.unwrap();
        served.unwrap();
        let mine = asked.iter().find(|waiting| waiting.step == "a step of this test").unwrap();
        assert!(mine.servers.is_empty() && mine.namespace.is_none());
        assert!(!socket_in(directory.path()).exists());
    }
}
