//! Work that several callers want at once: it is done once, and to its end, whoever of them goes away meanwhile, unless it is given up.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::Instrument;

use crate::error::{Error, Kind, Result};
use crate::lock::lock;
use crate::step::{Step, waiting_behind};

/// What is under way, by key. `N` is a note that each flight carries.
pub struct Flights<K, N, V>(Arc<Mutex<HashMap<K, Flight<N, V>>>>);

/// Work under way, or just ended.
pub struct Flight<N, V> {
    pub note: N,
    /// Where the work is.
    pub step: Step,
    outcome: Arc<watch::Sender<Option<Result<V>>>>,
    task: Arc<OnceLock<AbortHandle>>,
}

impl<N: Clone, V> Clone for Flight<N, V> {
    fn clone(&self) -> Self {
        let (outcome, task) = (Arc::clone(&self.outcome), Arc::clone(&self.task));
        Flight { note: self.note.clone(), step: self.step.clone(), outcome, task }
    }
}

impl<N, V: Clone> Flight<N, V> {
    /// Waits for the end of the work.
    pub async fn outcome(&self) -> Result<V> {
        let mut outcome = self.outcome.subscribe();
        let ended = outcome.wait_for(Option::is_some).await;
        // The sender lives in this flight.
        ended.ok().and_then(|outcome| outcome.clone()).unwrap_or_else(|| Err(panicked()))
    }
}

impl<N, V> Flight<N, V> {
    /// Answers all who wait, and ends the work: what it waits for on a thread goes on there, what it waits for without one is given up.
    pub fn give_up(&self, answer: Result<V>) {
        self.answer(answer);
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    /// Only the first answer counts.
    fn answer(&self, answer: Result<V>) {
        self.outcome.send_if_modified(|outcome| {
            let first = outcome.is_none();
            if first {
                *outcome = Some(answer);
            }
            first
        });
    }
}

impl<K, N, V> Default for Flights<K, N, V> {
    fn default() -> Self {
        Flights(Arc::default())
    }
}

impl<K, N, V> Flights<K, N, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    N: Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    pub fn get(&self, key: &K) -> Option<Flight<N, V>> {
        lock(&self.0).get(key).cloned()
    }

    /// The flight of this key, or a new one at `step` with the note and the work that `start` returns, which must be quick.
    pub fn join_or_start<F>(&self, key: &K, step: Step, start: impl FnOnce() -> Option<(N, F)>) -> Option<Flight<N, V>>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let mut flights = lock(&self.0);
        if let Some(flight) = flights.get(key) {
            return Some(flight.clone());
        }
        let (note, work) = start()?;
        let (outcome, task) = (Arc::new(watch::Sender::new(None)), Arc::default());
        let flight = Flight { note, step, outcome, task };
        flights.insert(key.clone(), flight.clone());
        let work = flight.step.clone().observe(work);
        let end = End { flights: Arc::clone(&self.0), key: key.clone(), flight: flight.clone() };
        // What the work logs belongs to the call that started it.
        let task = tokio::spawn(async move { end.with(work.await) }.in_current_span());
        let _ = flight.task.set(task.abort_handle());
        Some(flight)
    }

    /// Frees the key: who comes next starts anew, while the work goes on.
    pub fn forget(&self, key: &K, flight: &Flight<N, V>) {
        forget(&self.0, key, flight);
    }
}

impl<K, V> Flights<K, (), V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// The outcome of the work that is under way with this key, or else of `work`, which is done for all who join and no namespace.
    pub async fn run<F>(&self, key: &K, work: impl FnOnce() -> F) -> Result<V>
    where
        F: Future<Output = Result<V>> + Send + 'static,
    {
        let flight = self.join_or_start(key, Step::default(), || Some(((), work()))).expect("there is work to start");
        waiting_behind(&flight.step);
        flight.outcome().await
    }
}

fn forget<K: Eq + Hash, N, V>(flights: &Mutex<HashMap<K, Flight<N, V>>>, key: &K, flight: &Flight<N, V>) {
    let mut flights = lock(flights);
    if flights.get(key).is_some_and(|current| Arc::ptr_eq(&current.outcome, &flight.outcome)) {
        flights.remove(key);
    }
}

/// Frees the key and tells the outcome, also when the work panics.
struct End<K: Eq + Hash, N, V> {
    flights: Arc<Mutex<HashMap<K, Flight<N, V>>>>,
    key: K,
    flight: Flight<N, V>,
}

impl<K: Eq + Hash, N, V> End<K, N, V> {
    fn with(self, outcome: Result<V>) {
        forget(&self.flights, &self.key, &self.flight);
        self.flight.answer(outcome);
    }
}

impl<K: Eq + Hash, N, V> Drop for End<K, N, V> {
    fn drop(&mut self) {
        forget(&self.flights, &self.key, &self.flight);
        self.flight.answer(Err(panicked()));
    }
}

fn panicked() -> Error {
    Error::new(Kind::Internal, "the driver panicked: see its log")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;
    use tokio::sync::Notify;

    #[tokio::test]
    async fn work_is_done_once_for_all_who_want_it_now_and_again_for_who_comes_later() {
        let flights = Flights::default();
        let count = Arc::new(AtomicUsize::new(0));
        let run = || {
            let count = Arc::clone(&count);
            flights.run(&"key", move || async move {
                tokio::task::yield_now().await;
                Ok(count.fetch_add(1, Ordering::SeqCst))
            })
        };
        let (one, two) = tokio::join!(run(), run());
        assert_eq!((one.unwrap(), two.unwrap()), (0, 0));
        assert_eq!(run().await.unwrap(), 1);
    }

    #[tokio::test]
    async fn work_goes_on_when_the_one_who_started_it_goes_away() {
        let flights = Flights::default();
        let gate = Arc::new(Notify::new());
        let run = || {
            let gate = Arc::clone(&gate);
            flights.run(&"key", move || async move {
                gate.notified().await;
                Ok(())
            })
        };
        tokio::time::timeout(Duration::from_millis(1), run()).await.unwrap_err();
        gate.notify_one();
        // Joins the first: of its own work the gate would never open.
        run().await.unwrap();
    }

    #[tokio::test]
    async fn who_joins_is_told_where_the_work_is() {
        let flights = Arc::new(Flights::<_, (), ()>::default());
        let mine = Step::default();
        let wait = mine.clone().observe(async move {
            let stuck = || async {
                crate::step::waiting_for("the server");
                std::future::pending().await
            };
            tokio::time::timeout(Duration::from_millis(10), flights.run(&"key", stuck)).await
        });
        wait.await.unwrap_err();
        assert_eq!(mine.current(), "the server");
    }

    #[tokio::test]
    async fn a_panic_frees_the_key_and_is_told() {
        let flights = Flights::<_, (), ()>::default();
        let error = flights.run(&"key", || async { panic!("a bug, as this test wants") }).await.unwrap_err();
        assert_eq!(error.kind, Kind::Internal);
        flights.run(&"key", || async { Ok(()) }).await.unwrap();
    }
}
