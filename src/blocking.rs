//! Where the driver waits for the kernel: each wait on a thread of its own, and always with a name.

use std::io;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::thread;

use tokio::sync::{Semaphore, oneshot};

use crate::error::{Error, Kind, Result};
use crate::kernel;
use crate::lock::lock;
use crate::metrics::{self, Releasing, Timer, Waiting};

/// How many threads may wait for one NFS server. What comes later waits for a place, without a thread.
const PLACES: usize = 16;
/// The names of the threads, by which others find them.
pub const WAITING: &str = "csi-wait";
pub const RELEASING: &str = "csi-release";

tokio::task_local! {
    /// What the current operation waits for, for the answer to a caller who cannot wait any longer.
    static STEP: Step;
}

/// The step that an operation is at.
#[derive(Clone, Debug, Default)]
pub struct Step(Arc<Mutex<At>>);

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
    /// Runs an operation whose waits are to be seen in this step.
    pub async fn observe<F: Future>(self, operation: F) -> F::Output {
        STEP.scope(self, operation).await
    }

    pub fn current(&self) -> String {
        let at = lock(&self.0).clone();
        match at {
            At::Named(step) => step,
            At::Behind(other) => other.current(),
        }
    }
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
    let _ = STEP.try_with(|current| *lock(&current.0) = step);
}

/// Counts `work` under the name of its step.
pub fn measured<T>(step: &'static str, work: impl FnOnce() -> kernel::Result<T>) -> kernel::Result<T> {
    let timer = Timer::start(step);
    let outcome = work();
    timer.end(outcome.as_ref().err().map(|error| metrics::errno_name(error.errno().raw_os_error())));
    outcome
}

/// The threads that may wait for one NFS server: a dead one takes no more than these.
#[derive(Clone, Debug)]
pub struct Places {
    server: Arc<str>,
    free: Arc<Semaphore>,
}

impl Places {
    pub fn new(server: IpAddr) -> Self {
        Places { server: server.to_string().into(), free: Arc::new(Semaphore::new(PLACES)) }
    }

    /// Whether anybody else has these places: a mount of the server, or a thread at one of them.
    pub fn are_used(&self) -> bool {
        Arc::strong_count(&self.free) > 1
    }

    /// [`run`], once there is a place; it is taken until `work` ends, whoever still waits for it.
    pub async fn run<T, E>(&self, step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
    where
        T: Send + 'static,
        E: Into<Error> + Send + 'static,
    {
        let step = step.into();
        let place = match Arc::clone(&self.free).try_acquire_owned() {
            Ok(place) => Ok(place),
            Err(_) => {
                waiting_for(format!("{step} (after {PLACES} others that wait for this server)"));
                Arc::clone(&self.free).acquire_owned().await
            }
        };
        let waiting = Waiting::new(Arc::clone(&self.server));
        wait(WAITING, step, move || {
            let _counted = (waiting, place);
            work()
        })
        .await
    }
}

/// What a thread of its own does, and how it may fail.
pub trait Work<T, E>: FnOnce() -> std::result::Result<T, E> + Send + 'static {}

impl<T, E, F: FnOnce() -> std::result::Result<T, E> + Send + 'static> Work<T, E> for F {}

/// Runs `work`, which may wait for the node's kernel or disk for any time, on a thread of its own.
pub async fn run<T, E>(step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    let waiting = Waiting::new("".into());
    wait(WAITING, step.into(), move || {
        let _counted = waiting;
        work()
    })
    .await
}

/// [`Places::run`] for `work` that asks a server, else [`run`].
pub async fn run_at<T, E>(places: Option<Places>, step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    match places {
        Some(places) => places.run(step, work).await,
        None => run(step, work).await,
    }
}

/// [`run`] for `work` that lets go of something, for which nobody may wait long: the kernel may still have to tell a server.
pub async fn release<T, E>(step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    let releasing = Releasing::new();
    wait(RELEASING, step.into(), move || {
        let _counted = releasing;
        work()
    })
    .await
}

async fn wait<T, E>(thread: &str, step: String, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    let (sender, receiver) = oneshot::channel();
    waiting_for(&step);
    start(thread, move || {
        // The caller may have stopped waiting.
        let _ = sender.send(work());
    })
    .map_err(|error| Error::new(Kind::ResourceExhausted, format!("{step}: start a thread: {error}")))?;
    match receiver.await {
        Ok(done) => done.map_err(Into::into),
        Err(_) => Err(Error::new(Kind::Internal, format!("{step}: the driver panicked: see its log"))),
    }
}

/// What the thread logs belongs to the call that started it.
fn start(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let span = tracing::Span::current();
    let thread = thread::Builder::new().name(name.into()).stack_size(256 * 1024);
    thread.spawn(move || span.in_scope(work)).map(drop)
}

/// A kernel object whose release may wait for a server: it is never dropped on the thread that answers calls.
#[derive(Debug)]
pub struct OffThread<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> OffThread<T> {
    pub fn new(object: T) -> Self {
        OffThread(Some(object))
    }
}

impl<T: Send + 'static> Deref for OffThread<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only drop takes it")
    }
}

impl<T: Send + 'static> Drop for OffThread<T> {
    fn drop(&mut self) {
        let object = self.0.take();
        if tokio::runtime::Handle::try_current().is_ok() {
            let releasing = Releasing::new();
            // Where no thread can be started the object is released here: late answers beat none at all.
            let _ = start(RELEASING, move || {
                let _counted = releasing;
                drop(object);
            });
        }
    }
}
