//! A Unix socket to serve gRPC on, which comes back when somebody removes it.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How often it is looked whether the socket is still there.
const WATCH: Duration = Duration::from_secs(2);

/// Listens at `path` and returns the connections. Takes the place of a socket that nobody serves any more; one that is served, or no
/// socket at all, is an error.
pub async fn listen(path: &Path) -> io::Result<ReceiverStream<io::Result<UnixStream>>> {
    let listener = bind(path).await?;
    tracing::info!(socket = %path.display(), "listening");
    let (sender, connections) = mpsc::channel(1);
    tokio::spawn(accept(listener, path.to_owned(), sender));
    Ok(ReceiverStream::new(connections))
}

/// Removes the socket at the end, so that nobody finds one that nobody serves.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(error.kind(), format!("remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Ends with the receiver of the connections.
async fn accept(mut listener: UnixListener, path: PathBuf, sender: mpsc::Sender<io::Result<UnixStream>>) {
    let mut watch = tokio::time::interval(WATCH);
    loop {
        tokio::select! {
            // First of all: who removes the socket has let go of the connections before.
            biased;
            () = sender.closed() => return,
            connection = listener.accept() => {
                if connection.is_err() {
                    // Of too many open files, say: it will not be better at once.
                    tokio::time::sleep(WATCH / 10).await;
                }
                if sender.send(connection.map(|(stream, _)| stream)).await.is_err() {
                    return;
                }
            }
            _ = watch.tick() => match std::fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => match bind(&path).await {
                    Ok(new) => {
                        tracing::warn!(socket = %path.display(), "the socket was removed: made again");
                        listener = new;
                    }
                    Err(error) => tracing::error!(%error, "the socket was removed"),
                },
                _ => {}
            },
        }
    }
}

async fn bind(path: &Path) -> io::Result<UnixListener> {
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
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_served_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("csi.sock");
        let first = bind(&path).await.unwrap();
        assert_eq!(bind(&path).await.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        bind(&path).await.unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(bind(&file).await.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[tokio::test]
    async fn a_removed_socket_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("csi.sock");
        let mut connections = listen(&path).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        while UnixStream::connect(&path).await.is_err() {
            tokio::time::sleep(WATCH / 10).await;
        }
        connections.next().await.unwrap().unwrap();
    }
}
