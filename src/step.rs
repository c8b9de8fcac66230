//! An operation as others see it: the step that it waits at, and for whom it is done.

use std::sync::{Arc, Mutex};

use crate::lock::lock;

tokio::task_local! {
    static STEP: Step;
}

/// The step that an operation is at.
#[derive(Clone, Debug, Default)]
pub struct Step {
    at: Arc<Mutex<At>>,
    namespace: Option<Arc<str>>,
}

#[derive(Clone, Debug)]
enum At {
    Named(String),
    /// Where the work is that the operation waits for.
    Behind(Step),
}

impl Default for At {
    fn default() -> Self {
        At::Named(String::new())
    }
}

impl Step {
    /// Of an operation for a pod in this namespace, where that is known.
    pub fn for_namespace(namespace: Option<&str>) -> Self {
        Step { at: Arc::default(), namespace: namespace.map(Into::into) }
    }

    /// Runs an operation whose waits are to be seen in this step.
    pub async fn observe<F: Future>(self, operation: F) -> F::Output {
        STEP.scope(self, operation).await
    }

    /// What is waited for, for the answer to a caller who cannot wait any longer.
    pub fn current(&self) -> String {
        let at = lock(&self.at).clone();
        match at {
            At::Named(step) => step,
            At::Behind(other) => other.current(),
        }
    }
}

/// The namespace of the pod that the current operation is for.
pub fn namespace() -> Option<Arc<str>> {
    STEP.try_with(|current| current.namespace.clone()).ok().flatten()
}

/// Names what the current operation waits for now.
pub fn waiting_for(step: impl Into<String>) {
    let step = step.into();
    tracing::debug!(step, "waiting");
    at(At::Named(step));
}

/// Says that the current operation waits for work that has steps of its own. That work must not wait for this operation.
pub fn waiting_behind(other: &Step) {
    at(At::Behind(other.clone()));
}

fn at(step: At) {
    // Outside of an operation nobody asks.
    let _ = STEP.try_with(|current| *lock(&current.at) = step);
}
