//! What this process counts (OpenMetrics): how long calls and steps take and how they fail, and which threads wait. Anyone may
//! count; what the kernel counts is read at each scrape, by [`crate::ops`].

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::lock::lock;

/// The prefix of every metric.
const PREFIX: &str = "squashfs_csi";
/// Upper bounds in seconds: a mount takes milliseconds, a dead server as long as the longest timeout.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 90.0];

/// The names and values of a metric's labels.
pub type Labels<const N: usize> = [(&'static str, String); N];
type Histograms<const N: usize> = Family<Labels<N>, Histogram, fn() -> Histogram>;

struct Metrics {
    calls: Histograms<2>,
    steps: Histograms<1>,
    step_errors: Family<Labels<2>, Counter>,
    /// By server; a server for which nobody waits has no entry.
    waiting: Mutex<BTreeMap<Arc<str>, i64>>,
    releasing: Gauge,
    cache: Cache,
    prefetched_bytes: Counter,
}

/// What becomes of the copies of images on the node's disk.
#[derive(Default)]
pub struct Cache {
    /// Images that were attached from a copy.
    pub hits: Counter,
    /// Images that were to be, and had none.
    pub misses: Counter,
    pub copied_bytes: Counter,
    pub evictions: Counter,
    pub failures: Counter,
    under_way: Gauge,
}

static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
    calls: Family::new_with_constructor(histogram),
    steps: Family::new_with_constructor(histogram),
    step_errors: Family::default(),
    waiting: Mutex::default(),
    releasing: Gauge::default(),
    cache: Cache::default(),
    prefetched_bytes: Counter::default(),
});

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// Counts an answered call; `code` is the name of its gRPC code.
pub fn call(method: &str, code: &str, took: Duration) {
    let labels = [("method", method.to_owned()), ("code", code.to_owned())];
    METRICS.calls.get_or_create(&labels).observe(took.as_secs_f64());
}

/// Times one step of the work behind a call, from its making to [`Self::end`].
pub struct Timer {
    name: &'static str,
    start: Instant,
}

impl Timer {
    pub fn start(name: &'static str) -> Self {
        Timer { name, start: Instant::now() }
    }

    /// Counts how long the step took, or how it failed: by the name of its errno, or of its `EAI_` code (getaddrinfo(3)).
    pub fn end(self, error: Option<String>) {
        let took = self.start.elapsed();
        tracing::debug!(step = self.name, milliseconds = milliseconds(took), error, "step");
        match error {
            None => METRICS.steps.get_or_create(&[("step", self.name.into())]).observe(took.as_secs_f64()),
            Some(error) => {
                METRICS.step_errors.get_or_create(&[("step", self.name.into()), ("errno", error)]).inc();
            }
        }
    }
}

/// For the log: a number that JSON writes as one.
pub fn milliseconds(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

/// The name of an errno, such as `ECONNREFUSED`.
pub fn errno_name(errno: i32) -> String {
    match Errno::from_raw(errno) {
        // Of the NFS client, and in no header of user space.
        Errno::UnknownErrno => errno.to_string(),
        known => format!("{known:?}"),
    }
}

/// A thread that waits for the kernel, while this lives.
pub struct Waiting(Arc<str>);

impl Waiting {
    /// `server` is empty for a wait that needs no server.
    pub fn new(server: Arc<str>) -> Self {
        *waiting().entry(Arc::clone(&server)).or_default() += 1;
        Waiting(server)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut waiting = waiting();
        if let Some(count) = waiting.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.0);
            }
        }
    }
}

fn waiting() -> MutexGuard<'static, BTreeMap<Arc<str>, i64>> {
    lock(&METRICS.waiting)
}

/// A thread that lets go of what nobody uses any more, while this lives.
pub struct Releasing(());

impl Releasing {
    #[allow(clippy::new_without_default, reason = "it counts")]
    pub fn new() -> Self {
        METRICS.releasing.inc();
        Releasing(())
    }
}

impl Drop for Releasing {
    fn drop(&mut self) {
        METRICS.releasing.dec();
    }
}

/// Anyone may count.
pub fn cache() -> &'static Cache {
    &METRICS.cache
}

/// What was read of images ahead of those who read in them.
pub fn prefetched_bytes() -> &'static Counter {
    &METRICS.prefetched_bytes
}

/// A copy that is being made, while this lives.
pub struct UnderWay(());

impl UnderWay {
    #[allow(clippy::new_without_default, reason = "it counts")]
    pub fn new() -> Self {
        METRICS.cache.under_way.inc();
        UnderWay(())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        METRICS.cache.under_way.dec();
    }
}

/// All that was counted so far, to be encoded; the caller may add to it.
pub fn registry() -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let metrics = &*METRICS;
    let build = Family::<Labels<1>, Gauge>::default();
    build.get_or_create(&[("version", env!("CARGO_PKG_VERSION").into())]).set(1);
    registry.register("build_info", "The version that runs", build);
    let calls = metrics.calls.clone();
    registry.register_with_unit("call_duration", "From a CSI request to its answer", Unit::Seconds, calls);
    let steps = metrics.steps.clone();
    registry.register_with_unit("step_duration", "Steps that succeeded", Unit::Seconds, steps);
    registry.register("step_errors", "Steps that failed", metrics.step_errors.clone());
    let threads = Family::<Labels<1>, Gauge>::default();
    for (server, count) in waiting().iter() {
        threads.get_or_create(&[("server", server.to_string())]).set(*count);
    }
    registry.register(
        "waiting_threads",
        "Threads that wait for the kernel, by the servers that it asks, a space between them",
        threads,
    );
    let releasing = metrics.releasing.clone();
    registry.register("unfinished_releases", "What the kernel still lets go of after a teardown", releasing);
    let Cache { hits, misses, copied_bytes, evictions, failures, under_way } = &metrics.cache;
    registry.register("cache_hits", "Images that were attached from the copy on this node", hits.clone());
    registry.register(
        "cache_misses",
        "Images that were to be attached from a copy, of which there was none",
        misses.clone(),
    );
    let help = "Bytes of images that were copied to this node";
    registry.register_with_unit("cache_copied", help, Unit::Bytes, copied_bytes.clone());
    let help = "Bytes of images that were read into the node's memory ahead of their readers";
    registry.register_with_unit("prefetched", help, Unit::Bytes, metrics.prefetched_bytes.clone());
    registry.register("cache_evictions", "Copies that made way for others", evictions.clone());
    registry.register("cache_failures", "Copies that failed", failures.clone());
    registry.register(
        "cache_copies_under_way",
        "Copies that are being made, or wait for their turn",
        under_way.clone(),
    );
    registry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape() -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry()).unwrap();
        text
    }

    #[test]
    fn a_failed_step_is_counted_by_the_name_of_its_errno() {
        Timer::start("test").end(Some(errno_name(libc::ECONNREFUSED)));
        assert!(scrape().contains("squashfs_csi_step_errors_total{step=\"test\",errno=\"ECONNREFUSED\"} 1\n"));
        assert_eq!(errno_name(523), "523");
    }

    #[test]
    fn a_server_is_listed_while_somebody_waits_for_it() {
        let line = "squashfs_csi_waiting_threads{server=\"metrics.test\"}";
        let server: Arc<str> = "metrics.test".into();
        let (one, two) = (Waiting::new(Arc::clone(&server)), Waiting::new(server));
        assert!(scrape().contains(&format!("{line} 2\n")));
        drop(one);
        assert!(scrape().contains(&format!("{line} 1\n")));
        drop(two);
        assert!(!scrape().contains(line));
    }
}
