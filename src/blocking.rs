//! Where the driver waits for the kernel: each wait on a thread of its own, and always with a name. How many may wait for servers is
//! up to [`crate::places`].

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::error::{Error, Kind, Result};
use crate::kernel;
use crate::lock::lock;
use crate::metrics::{self, Releasing, Timer, Waiting};
use crate::step;

/// The names of the threads, by which others find them.
pub const WAITING: &str = "csi-wait";
pub const RELEASING: &str = "csi-release";
/// How many threads let go of what nobody uses any more; one of them is always there.
const RELEASES: usize = 128;

/// Counts `work` under the name of its step.
pub fn measured<T>(step: &'static str, work: impl FnOnce() -> kernel::Result<T>) -> kernel::Result<T> {
    let timer = Timer::start(step);
    let outcome = work();
    timer.end(outcome.as_ref().err().map(|error| metrics::errno_name(error.errno().raw_os_error())));
    outcome
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
    run_for("", step.into(), work).await
}

/// [`run`] for `work` that may wait for `servers`, which has a place for it.
pub async fn run_for<T, E>(servers: &str, step: String, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    let (job, answer) = job(work);
    start(servers, &step, job)?;
    answered(&step, answer).await
}

/// [`run`] for `work` that lets go of something, for which nobody may wait long: the kernel may still have to tell a server.
pub async fn release<T, E>(step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    let (step, (job, answer)) = (step.into(), job(work));
    step::waiting_for(&step);
    let span = tracing::Span::current();
    RELEASES_TO_DO.add(move || span.in_scope(job));
    answered(&step, answer).await
}

/// What a thread does. What is done with it is compiled once, and not for each kind of work.
type Job = Box<dyn FnOnce() + Send>;
type Answer<T, E> = oneshot::Receiver<std::result::Result<T, E>>;

fn job<T: Send + 'static, E: Send + 'static>(work: impl Work<T, E>) -> (Job, Answer<T, E>) {
    let (sender, answer) = oneshot::channel();
    let job = Box::new(move || {
        // The caller may have stopped waiting.
        let _ = sender.send(work());
    });
    (job, answer)
}

fn start(servers: &str, step: &str, job: Job) -> Result<()> {
    let (waiting, span) = (Waiting::new(servers.into()), tracing::Span::current());
    let (namespace, since) = (step::namespace(), Instant::now());
    let under_way = UnderWay { servers: servers.to_owned(), step: step.to_owned(), namespace, since };
    step::waiting_for(step);
    let job = move || {
        let _counted = (waiting, Listed::new(under_way));
        // What the thread logs belongs to the call that started it.
        span.in_scope(job);
    };
    let started = named_thread(WAITING).spawn(job);
    started.map(drop).map_err(|error| Error::new(Kind::ResourceExhausted, format!("{step}: start a thread: {error}")))
}

async fn answered<T, E: Into<Error>>(step: &str, answer: Answer<T, E>) -> Result<T> {
    match answer.await {
        Ok(done) => done.map_err(Into::into),
        Err(_) => Err(Error::new(Kind::Internal, format!("{step}: the driver panicked: see its log"))),
    }
}

/// What a thread waits for.
#[derive(Clone, Debug)]
pub struct UnderWay {
    /// The addresses of the servers that it may wait for; empty for none.
    pub servers: String,
    pub step: String,
    /// Of the pod that it is done for, where that is known.
    pub namespace: Option<Arc<str>>,
    pub since: Instant,
}

/// What the threads of this process wait for now, the oldest first.
pub fn under_way() -> Vec<UnderWay> {
    lock(&UNDER_WAY).values().cloned().collect()
}

static UNDER_WAY: Mutex<BTreeMap<u64, UnderWay>> = Mutex::new(BTreeMap::new());

/// A thread, while it lives.
struct Listed(u64);

impl Listed {
    fn new(under_way: UnderWay) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        lock(&UNDER_WAY).insert(number, under_way);
        Listed(number)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&UNDER_WAY).remove(&self.0);
    }
}

/// Releases to be made: at most [`RELEASES`] at a time, and also where no thread can be started.
struct Releases {
    queue: Mutex<Queue>,
    added: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
}

static RELEASES_TO_DO: LazyLock<Releases> = LazyLock::new(|| {
    let thread = named_thread(RELEASING).spawn(|| RELEASES_TO_DO.work(true));
    thread.expect("a process that cannot start its first threads serves nobody");
    Releases { queue: Mutex::new(Queue { threads: 1, ..Queue::default() }), added: Condvar::new() }
});

/// What waits for the kernel needs little stack, and there may be many.
fn named_thread(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(256 * 1024)
}

fn name_this_thread(name: &str) {
    // Of no use but to those who look.
    let _ = CString::new(name).map(|name| rustix::thread::set_name(&name));
}

impl Releases {
    fn add(&'static self, release: impl FnOnce() + Send + 'static) {
        let releasing = Releasing::new();
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(Box::new(move || {
            let _counted = releasing;
            release();
        }));
        // The one that is always there gets what no other takes.
        if queue.threads < RELEASES && named_thread(RELEASING).spawn(|| self.work(false)).is_ok() {
            queue.threads += 1;
        }
        drop(queue);
        self.added.notify_one();
    }

    fn work(&self, for_ever: bool) {
        let mut queue = lock(&self.queue);
        loop {
            match queue.jobs.pop_front() {
                Some(job) => {
                    drop(queue);
                    // One that panics has said so.
                    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                    queue = lock(&self.queue);
                }
                None if for_ever => {
                    name_this_thread("csi-idle");
                    queue = self.added.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    name_this_thread(RELEASING);
                }
                None => {
                    queue.threads -= 1;
                    return;
                }
            }
        }
    }
}

/// Starts the thread that is always there for releases: call it while threads can be started.
pub fn start_releasing() {
    LazyLock::force(&RELEASES_TO_DO);
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
            RELEASES_TO_DO.add(move || drop(object));
        }
    }
}
