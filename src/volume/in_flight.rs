//! Operations under way: one at a time for each volume and target, and whoever asks for the same joins it.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::publication::Publication;
use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::lock::lock;
use crate::single_flight::{Flight, Flights};
use crate::spec::Mount;
use crate::step::Step;

/// What an operation has for itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// What a volume holds, by its ID.
    Volume(String),
    /// What is at a path.
    Target(PathBuf),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Volume(id) => write!(f, "volume {id}"),
            Key::Target(path) => write!(f, "target {}", path.display()),
        }
    }
}

/// What an operation does: two that are equal are one.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Stage(Mount),
    Unstage,
    Publish(Publication),
    Unpublish { volume_id: String },
}

impl Request {
    /// Of the pod that it is done for, where that is known.
    fn namespace(&self) -> Option<&str> {
        match self {
            Request::Publish(publication) => publication.namespace.as_deref(),
            Request::Stage(_) | Request::Unstage | Request::Unpublish { .. } => None,
        }
    }

    /// Whether it ends another that is under way with its key, and goes ahead: what the other still waits for, it will not use. A request
    /// that does not waits for the other's end, as one that is about another volume does.
    fn supersedes(&self, other: &Request) -> bool {
        match (self, other) {
            (Request::Unpublish { volume_id }, Request::Publish(publication)) => *volume_id == publication.volume_id,
            (Request::Unstage, Request::Stage(_)) => true,
            (Request::Unstage | Request::Unpublish { .. } | Request::Stage(_) | Request::Publish(_), _) => false,
        }
    }
}

/// An operation's right to change what its key stands for, until another supersedes it.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    superseded: Arc<Mutex<bool>>,
}

impl Lease {
    /// Does `change`, which must be quick, unless the operation was superseded. Superseding waits for it.
    pub fn change<T>(&self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let superseded = lock(&self.superseded);
        if *superseded { Err(given_up()) } else { change() }
    }

    fn end(&self) {
        *lock(&self.superseded) = true;
    }
}

fn given_up() -> Error {
    Error::new(Kind::Aborted, "given up: a later call undoes what this one was about to do")
}

/// The operations of a node.
#[derive(Default)]
pub struct InFlight(Flights<Key, (Request, Lease), ()>);

impl InFlight {
    /// Runs `work` under `key` and returns its outcome.
    ///
    /// While an equal request runs under the key, its outcome is awaited instead. The work goes on when the caller's future is
    /// dropped and when `timeout` ends: that is answered `DEADLINE_EXCEEDED` with the step waited for, and a repeated call joins.
    /// `ABORTED` means that another request did not end in time, or superseded this one.
    pub async fn run<F>(
        &self,
        key: Key,
        request: Request,
        timeout: Duration,
        work: impl FnOnce(Lease) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let deadline = Instant::now() + timeout;
        let mut work = Some(work);
        loop {
            let found = self.0.join_or_start(&key, Step::for_namespace(request.namespace()), || {
                let lease = Lease::default();
                Some(((request.clone(), lease.clone()), work.take()?(lease)))
            });
            // Without work left: what this call started is gone, and it was not told of an outcome.
            let Some(flight) = found else { return Err(given_up()) };
            let same = flight.note.0 == request;
            if !same && request.supersedes(&flight.note.0) {
                self.supersede(&key, flight).await?;
                continue;
            }
            match tokio::time::timeout_at(deadline, flight.outcome()).await {
                Ok(outcome) if same => return outcome,
                Ok(_) => continue,
                Err(_) => return Err(late(&key, &flight, same, timeout)),
            }
        }
    }

    /// Whether an operation is under way with this key.
    pub fn is_running(&self, key: &Key) -> bool {
        self.0.get(key).is_some()
    }

    async fn supersede(&self, key: &Key, running: Flight<(Request, Lease), ()>) -> Result<()> {
        let lease = running.note.1.clone();
        blocking::run(format!("{key}: end what is under way"), move || {
            lease.end();
            Ok::<_, Error>(())
        })
        .await?;
        self.0.forget(key, &running);
        running.give_up(Err(given_up()));
        Ok(())
    }
}

fn late(key: &Key, flight: &Flight<(Request, Lease), ()>, same: bool, timeout: Duration) -> Error {
    let step = flight.step.current();
    let seconds = timeout.as_secs_f64();
    if same {
        let message =
            format!("{key}: not done after {seconds} s, still at: {step}; it goes on, repeat the call to join it");
        Error::new(Kind::DeadlineExceeded, message)
    } else {
        let message = format!("{key}: another operation has been at it for {seconds} s, still at: {step}");
        Error::new(Kind::Aborted, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(10);

    fn key() -> Key {
        Key::Volume("v".into())
    }

    /// One of the requests that wait for another to end.
    fn stage(path: &str) -> Request {
        let spec = format!(r#"{{"kind":"nfs","nfs":{{"host":"a","path":"{path}"}}}}"#);
        Request::Stage(crate::spec::json::parse(&spec).unwrap().mount().clone())
    }

    /// Work that waits until it is let go, and counts itself.
    fn gated(gate: &Arc<Notify>, count: &Arc<AtomicUsize>) -> impl Future<Output = Result<()>> + Send + 'static {
        let (gate, count) = (Arc::clone(gate), Arc::clone(count));
        async move {
            crate::step::waiting_for("the server");
            gate.notified().await;
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[tokio::test]
    async fn the_same_request_joins_and_another_waits_its_turn() {
        let in_flight = InFlight::default();
        let gate = Arc::new(Notify::new());
        let (first, second) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let run = |path: &str, count| {
            let work = gated(&gate, count);
            in_flight.run(key(), stage(path), LONG, |_| work)
        };
        let open = async {
            gate.notify_one();
            tokio::task::yield_now().await;
            assert!(second.load(Ordering::SeqCst) == 0 || first.load(Ordering::SeqCst) == 1);
            gate.notify_one();
        };
        let (a, b, c, ()) = tokio::join!(run("/a", &first), run("/a", &first), run("/b", &second), open);
        a.and(b).and(c).unwrap();
        assert_eq!((first.load(Ordering::SeqCst), second.load(Ordering::SeqCst)), (1, 1));
    }

    #[tokio::test]
    async fn a_late_call_says_what_it_waits_for_and_the_next_one_joins() {
        let in_flight = InFlight::default();
        let (gate, count) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let run = |path: &str, timeout| {
            let work = gated(&gate, &count);
            in_flight.run(key(), stage(path), timeout, |_| work)
        };
        let error = run("/a", SHORT).await.unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded);
        assert!(error.message.contains("volume v: not done after 0.01 s, still at: the server"), "{error}");
        let error = run("/b", SHORT).await.unwrap_err();
        assert_eq!(error.kind, Kind::Aborted);
        gate.notify_one();
        run("/a", LONG).await.unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_superseded_operation_is_answered_at_once_and_changes_nothing_later() {
        let in_flight = InFlight::default();
        let gate = Arc::new(Notify::new());
        let changed = Arc::new(AtomicUsize::new(0));
        let stuck = in_flight.run(key(), stage("/a"), LONG, |lease| {
            let (gate, changed) = (Arc::clone(&gate), Arc::clone(&changed));
            async move {
                gate.notified().await;
                lease.change(|| {
                    changed.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            }
        });
        let undo = in_flight.run(key(), Request::Unstage, LONG, |_| async { Ok(()) });
        let (stuck, undo) = tokio::join!(stuck, undo);
        assert_eq!(stuck.unwrap_err().kind, Kind::Aborted);
        undo.unwrap();
        gate.notify_one();
        tokio::task::yield_now().await;
        in_flight.run(key(), stage("/a"), LONG, |_| async { Ok(()) }).await.unwrap();
        assert_eq!(changed.load(Ordering::SeqCst), 0);
    }
}
