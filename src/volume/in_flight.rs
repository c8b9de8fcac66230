//! Operations under way: one at a time for each key, and whoever asks for the same joins it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument;

use super::blocking::{self, Step};
use super::error::{Error, Kind, Result};
use super::lock;

#[derive(Default)]
pub struct InFlight {
    operations: Arc<Mutex<HashMap<String, Operation>>>,
}

#[derive(Clone)]
struct Operation {
    request: String,
    lease: Lease,
    step: Step,
    outcome: Arc<watch::Sender<Option<Result<()>>>>,
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
        if *superseded { Err(Lease::superseded()) } else { change() }
    }

    fn end(&self) {
        *lock(&self.superseded) = true;
    }

    fn is(&self, other: &Lease) -> bool {
        Arc::ptr_eq(&self.superseded, &other.superseded)
    }

    fn superseded() -> Error {
        Error::new(Kind::Aborted, "given up: a later call undoes what this one was about to do")
    }
}

/// How an operation treats another one that is under way with its key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// Waits for its end.
    Await,
    /// Ends its lease and goes ahead: what the other still waits for, it will not use.
    Supersede,
}

impl InFlight {
    /// Runs `work` under `key` and returns its outcome.
    ///
    /// While the same `request` runs under the key, its outcome is awaited instead; what happens to another request, `other` says.
    /// The work goes on when the caller's future is dropped and when `timeout` ends: that is answered `DEADLINE_EXCEEDED` with
    /// the step waited for, and a repeated call joins. `ABORTED` means that another request did not end in time, or superseded
    /// this one.
    pub async fn run<F: Future<Output = Result<()>> + Send + 'static>(
        &self,
        key: String,
        request: String,
        other: Other,
        timeout: Duration,
        work: impl FnOnce(Lease) -> F,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut work = Some(work);
        loop {
            let operation = {
                let mut operations = lock(&self.operations);
                match (operations.get(&key).cloned(), work.take()) {
                    (Some(running), unused) => {
                        work = unused;
                        running
                    }
                    (None, Some(work)) => self.start(&mut operations, &key, &request, work),
                    // What this call started is gone, and it was not told of an outcome.
                    (None, None) => return Err(Lease::superseded()),
                }
            };
            let mine = operation.request == request;
            if !mine && other == Other::Supersede {
                self.supersede(&key, operation).await?;
                continue;
            }
            let mut outcome = operation.outcome.subscribe();
            let ended = tokio::time::timeout_at(deadline, outcome.wait_for(Option::is_some)).await;
            match ended {
                Ok(Ok(outcome)) if mine => return outcome.clone().unwrap_or(Ok(())),
                Ok(_) => continue,
                Err(_) => return Err(late(&key, &operation, mine, timeout)),
            }
        }
    }

    /// Whether an operation is under way with this key.
    pub fn is_running(&self, key: &str) -> bool {
        lock(&self.operations).contains_key(key)
    }

    fn start<F: Future<Output = Result<()>> + Send + 'static>(
        &self,
        operations: &mut HashMap<String, Operation>,
        key: &str,
        request: &str,
        work: impl FnOnce(Lease) -> F,
    ) -> Operation {
        let operation = Operation {
            request: request.to_owned(),
            lease: Lease::default(),
            step: Step::default(),
            outcome: Arc::new(watch::Sender::new(None)),
        };
        operations.insert(key.to_owned(), operation.clone());
        let work = operation.step.clone().observe(work(operation.lease.clone()));
        let end = End { operations: Arc::clone(&self.operations), key: key.to_owned(), operation: operation.clone() };
        // What the operation logs belongs to the call that started it.
        tokio::spawn(async move { end.with(work.await) }.in_current_span());
        operation
    }

    async fn supersede(&self, key: &str, running: Operation) -> Result<()> {
        let lease = running.lease.clone();
        blocking::run(format!("{key}: end what is under way"), move || lease.end()).await?;
        forget(&self.operations, key, &running);
        running.outcome.send_replace(Some(Err(Lease::superseded())));
        Ok(())
    }
}

fn forget(operations: &Mutex<HashMap<String, Operation>>, key: &str, operation: &Operation) {
    let mut operations = lock(operations);
    if operations.get(key).is_some_and(|current| current.lease.is(&operation.lease)) {
        operations.remove(key);
    }
}

/// Frees the key and tells the outcome, also when the work panics.
struct End {
    operations: Arc<Mutex<HashMap<String, Operation>>>,
    key: String,
    operation: Operation,
}

impl End {
    fn with(self, outcome: Result<()>) {
        forget(&self.operations, &self.key, &self.operation);
        self.operation.outcome.send_replace(Some(outcome));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        forget(&self.operations, &self.key, &self.operation);
        let panicked =
            || Some(Err(Error::new(Kind::Internal, format!("{}: the driver panicked: see its log", self.key))));
        self.operation.outcome.send_if_modified(|outcome| {
            let unknown = outcome.is_none();
            if unknown {
                *outcome = panicked();
            }
            unknown
        });
    }
}

fn late(key: &str, operation: &Operation, same: bool, timeout: Duration) -> Error {
    let step = operation.step.current();
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

    /// Work that waits until it is let go, and counts itself.
    fn gated(gate: &Arc<Notify>, count: &Arc<AtomicUsize>) -> impl Future<Output = Result<()>> + Send + 'static {
        let (gate, count) = (Arc::clone(gate), Arc::clone(count));
        async move {
            super::super::blocking::waiting_for("the server");
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
        let run = |request: &str, count| {
            let work = gated(&gate, count);
            in_flight.run("key".into(), request.into(), Other::Await, LONG, |_| work)
        };
        let open = async {
            gate.notify_one();
            tokio::task::yield_now().await;
            assert!(second.load(Ordering::SeqCst) == 0 || first.load(Ordering::SeqCst) == 1);
            gate.notify_one();
        };
        let (a, b, c, ()) = tokio::join!(run("a", &first), run("a", &first), run("b", &second), open);
        a.and(b).and(c).unwrap();
        assert_eq!((first.load(Ordering::SeqCst), second.load(Ordering::SeqCst)), (1, 1));
    }

    #[tokio::test]
    async fn a_late_call_says_what_it_waits_for_and_the_next_one_joins() {
        let in_flight = InFlight::default();
        let (gate, count) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let run = |request: &str, timeout| {
            let work = gated(&gate, &count);
            in_flight.run("volume v".into(), request.into(), Other::Await, timeout, |_| work)
        };
        let error = run("stage", SHORT).await.unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded);
        assert!(error.message.contains("still at: the server"), "{error}");
        let error = run("unstage", SHORT).await.unwrap_err();
        assert_eq!(error.kind, Kind::Aborted);
        gate.notify_one();
        run("stage", LONG).await.unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_panic_frees_the_key() {
        let in_flight = InFlight::default();
        let run = |work: fn()| {
            in_flight.run("key".into(), "request".into(), Other::Await, LONG, move |_| async move {
                work();
                Ok(())
            })
        };
        let error = run(|| panic!("a bug, as this test wants")).await.unwrap_err();
        assert_eq!(error.kind, Kind::Internal);
        run(|| ()).await.unwrap();
    }

    #[tokio::test]
    async fn a_superseded_operation_is_answered_at_once_and_changes_nothing_later() {
        let in_flight = InFlight::default();
        let gate = Arc::new(Notify::new());
        let changed = Arc::new(AtomicUsize::new(0));
        let stuck = in_flight.run("key".into(), "publish".into(), Other::Await, LONG, |lease| {
            let (gate, changed) = (Arc::clone(&gate), Arc::clone(&changed));
            async move {
                gate.notified().await;
                lease.change(|| {
                    changed.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            }
        });
        let undo = in_flight.run("key".into(), "unpublish".into(), Other::Supersede, LONG, |_| async { Ok(()) });
        let (stuck, undo) = tokio::join!(stuck, undo);
        assert_eq!(stuck.unwrap_err().kind, Kind::Aborted);
        undo.unwrap();
        gate.notify_one();
        tokio::task::yield_now().await;
        in_flight.run("key".into(), "publish".into(), Other::Await, LONG, |_| async { Ok(()) }).await.unwrap();
        assert_eq!(changed.load(Ordering::SeqCst), 0);
    }
}
