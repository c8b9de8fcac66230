//! Where the driver waits for the kernel: each wait on a thread of its own, and always with a name.

use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::{Semaphore, oneshot};

use super::error::{Error, Kind, Result};
use super::lock;

/// How many threads may wait for one NFS server. What comes later waits for a place, without a thread.
const PLACES: usize = 16;

tokio::task_local! {
    /// What the current operation waits for, for the answer to a caller who cannot wait any longer.
    static STEP: Step;
}

/// The step that an operation is at.
#[derive(Clone, Debug, Default)]
pub struct Step(Arc<Mutex<String>>);

impl Step {
    /// Runs an operation whose waits are to be seen in this step.
    pub async fn observe<F: Future>(self, operation: F) -> F::Output {
        STEP.scope(self, operation).await
    }

    pub fn current(&self) -> String {
        lock(&self.0).clone()
    }
}

/// Names what the current operation waits for now.
pub fn waiting_for(step: impl Into<String>) {
    let step = step.into();
    tracing::debug!(step, "waiting");
    // Outside of an operation nobody asks.
    let _ = STEP.try_with(|current| *lock(&current.0) = step);
}

/// The threads that may wait for one NFS server: a dead one takes no more than these.
#[derive(Clone, Debug)]
pub struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Places(Arc::new(Semaphore::new(PLACES)))
    }
}

impl Places {
    /// [`run`], once there is a place; it is taken until `work` ends, whoever still waits for it.
    pub async fn run<T: Send + 'static>(
        &self,
        step: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let step = step.into();
        let place = match Arc::clone(&self.0).try_acquire_owned() {
            Ok(place) => Ok(place),
            Err(_) => {
                waiting_for(format!("{step} (after {PLACES} others that wait for this server)"));
                Arc::clone(&self.0).acquire_owned().await
            }
        };
        run(step, move || {
            let _place = place;
            work()
        })
        .await
    }
}

/// Runs `work`, which may wait for a server or a disk for any time, on a thread of its own.
pub async fn run<T: Send + 'static>(step: impl Into<String>, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let step = step.into();
    let (sender, receiver) = oneshot::channel();
    waiting_for(&step);
    thread::Builder::new()
        .name("kernel".into())
        .stack_size(256 * 1024)
        .spawn(move || {
            // The caller may have stopped waiting.
            let _ = sender.send(work());
        })
        .map_err(|error| Error::new(Kind::ResourceExhausted, format!("{step}: start a thread: {error}")))?;
    receiver.await.map_err(|_| Error::new(Kind::Internal, format!("{step}: the driver panicked: see its log")))
}

/// A kernel object whose release may wait for a server: it is never released on the thread that answers calls.
#[derive(Debug)]
pub struct Aside<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Aside<T> {
    pub fn new(object: T) -> Self {
        Aside(Some(object))
    }
}

impl<T: Send + 'static> Deref for Aside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only drop takes it")
    }
}

impl<T: Send + 'static> Drop for Aside<T> {
    fn drop(&mut self) {
        let object = self.0.take();
        if tokio::runtime::Handle::try_current().is_ok() {
            // Where no thread can be started the object is released here: late answers beat none at all.
            let _ = thread::Builder::new().spawn(move || drop(object));
        }
    }
}
