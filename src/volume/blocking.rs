//! Where the driver waits for the kernel: each wait on a thread of its own, and always with a name.

use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::oneshot;

use super::error::{Error, Kind, Result};
use super::lock;

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
