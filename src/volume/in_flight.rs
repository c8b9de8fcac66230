//! Operations under way: one at a time for each key, and whoever asks for the same joins it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::blocking::Step;
use super::error::{Error, Kind, Result};
use super::lock;

#[derive(Default)]
pub struct InFlight {
    operations: Arc<Mutex<HashMap<String, Operation>>>,
}

#[derive(Clone)]
struct Operation {
    request: String,
    step: Step,
    outcome: watch::Receiver<Option<Result<()>>>,
}

impl InFlight {
    /// Runs `work` under `key` and returns its outcome.
    ///
    /// While the same `request` runs under the key, its outcome is awaited instead; another request is awaited first. The work
    /// goes on when the caller's future is dropped and when `timeout` ends: that is answered `DEADLINE_EXCEEDED` with the step
    /// waited for, and a repeated call joins. `ABORTED` means that another request did not end in time.
    pub async fn run(
        &self,
        key: String,
        request: String,
        timeout: Duration,
        work: impl Future<Output = Result<()>> + Send + 'static,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut work = Some(work);
        loop {
            let operation = {
                let mut operations = lock(&self.operations);
                match operations.get(&key) {
                    Some(operation) => operation.clone(),
                    // Only this arm uses up the work, and what it starts has this very request, so it ends the loop.
                    None => match work.take() {
                        Some(work) => self.start(&mut operations, &key, &request, work),
                        None => return Err(Error::new(Kind::Internal, format!("{key}: an operation ran twice"))),
                    },
                }
            };
            let same = operation.request == request;
            let mut outcome = operation.outcome.clone();
            let ended = tokio::time::timeout_at(deadline, outcome.wait_for(Option::is_some)).await;
            match ended {
                Ok(Ok(outcome)) if same => return outcome.clone().unwrap_or(Ok(())),
                Ok(Ok(_)) => continue,
                // The sender goes without a word only when the work panicked.
                Ok(Err(_)) => {
                    return Err(Error::new(Kind::Internal, format!("{key}: the driver panicked: see its log")));
                }
                Err(_) => return Err(late(&key, &operation, same, timeout)),
            }
        }
    }

    fn start(
        &self,
        operations: &mut HashMap<String, Operation>,
        key: &str,
        request: &str,
        work: impl Future<Output = Result<()>> + Send + 'static,
    ) -> Operation {
        let (sender, outcome) = watch::channel(None);
        let step = Step::default();
        let operation = Operation { request: request.to_owned(), step: step.clone(), outcome };
        operations.insert(key.to_owned(), operation.clone());
        let end = End { operations: Arc::clone(&self.operations), key: key.to_owned() };
        tokio::spawn(async move {
            let outcome = step.observe(work).await;
            drop(end);
            sender.send_replace(Some(outcome));
        });
        operation
    }
}

/// Frees the key, also when the work panics.
struct End {
    operations: Arc<Mutex<HashMap<String, Operation>>>,
    key: String,
}

impl Drop for End {
    fn drop(&mut self) {
        lock(&self.operations).remove(&self.key);
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
        let run = |request: &str, count| in_flight.run("key".into(), request.into(), LONG, gated(&gate, count));
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
        let run =
            |request: &str, timeout| in_flight.run("volume v".into(), request.into(), timeout, gated(&gate, &count));
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
            in_flight.run("key".into(), "request".into(), LONG, async move {
                work();
                Ok(())
            })
        };
        let error = run(|| panic!("a bug, as this test wants")).await.unwrap_err();
        assert_eq!(error.kind, Kind::Internal);
        run(|| ()).await.unwrap();
    }
}
