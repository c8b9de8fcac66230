//! Readers that never stop, and miss nothing: each reads all files of an image again and again, and compares.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::image::Tree;
use super::nfs_server::fresh_caches;
use super::{run, wait_up_to};

/// A tree of files that no compression makes smaller, with their digests.
pub struct Files {
    tree: Tree,
    digests: Arc<[(String, Vec<u8>)]>,
}

impl Files {
    pub fn random(count: usize, kib: usize) -> Self {
        let tree = Tree::new(&[]);
        let name = |number| format!("file-{number}");
        for path in (0..count).map(|number| tree.path().join(name(number))) {
            let (of, count) = (format!("of={}", path.display()), format!("count={kib}"));
            run("dd", &["if=/dev/urandom", &of, "bs=1K", &count, "status=none"]);
        }
        let digests = (0..count).map(|number| (name(number), hash(&tree.path().join(name(number))).unwrap())).collect();
        Files { tree, digests }
    }

    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.digests.iter().map(|(name, _)| name.as_str())
    }

    /// Fails unless they are what is in `directory`.
    pub fn assert_in(&self, directory: &Path) {
        for (name, digest) in &*self.digests {
            assert!(hash(&directory.join(name)).unwrap() == *digest, "{name} has another content");
        }
    }
}

/// Processes of pods, as it were: threads that read until they are ended, from the server, as caches are dropped all the time.
pub struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    directory: PathBuf,
    digests: Arc<[(String, Vec<u8>)]>,
    stop: AtomicBool,
    /// How often each has read all files.
    rounds: Vec<AtomicUsize>,
    /// How long one file took, in milliseconds.
    slowest: AtomicU64,
}

/// A reader that waits for longer hangs, or waits for each of the others to find out by itself that a server is dead.
const HANGS: Duration = Duration::from_secs(300);

impl Readers {
    pub fn start(count: usize, directory: &Path, files: &Files) -> Self {
        let shared = Arc::new(Shared {
            directory: directory.into(),
            digests: Arc::clone(&files.digests),
            stop: AtomicBool::new(false),
            rounds: (0..count).map(|_| AtomicUsize::new(0)).collect(),
            slowest: AtomicU64::new(0),
        });
        let with = |work: fn(&Shared, usize), number| {
            let shared = Arc::clone(&shared);
            spawn(move || work(&shared, number))
        };
        let threads = (0..count).map(|number| with(Shared::read, number)).chain([with(Shared::drop_caches, 0)]);
        Readers { threads: threads.collect(), shared: Arc::clone(&shared) }
    }

    /// Returns when each of them has read all files once more, none of which is in the node's memory now.
    pub fn wait_for_another_round(&self) {
        fresh_caches();
        let rounds = || self.shared.rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed));
        let before: Vec<_> = rounds().collect();
        wait_up_to(HANGS, "each reader to read all files", || {
            assert!(!self.threads.iter().any(JoinHandle::is_finished), "a reader has failed");
            // The round that each is in has begun before.
            rounds().zip(&before).all(|(now, before)| now >= before + 2)
        });
    }

    /// The longest time that one of them took for one file since the last call.
    pub fn slowest(&self) -> Duration {
        Duration::from_millis(self.shared.slowest.swap(0, Ordering::Relaxed))
    }

    /// Fails if one of them saw an error or a wrong byte.
    pub fn end(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        wait_up_to(HANGS, "readers to end", || self.threads.iter().all(JoinHandle::is_finished));
        for thread in self.threads.drain(..) {
            thread.join().expect("a reader has failed");
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn read(&self, number: usize) {
        // Each begins elsewhere, so that not all wait for the same block.
        let from = number % self.digests.len();
        while !self.stopped() {
            for (name, digest) in self.digests[from..].iter().chain(&self.digests[..from]) {
                let start = Instant::now();
                let read = hash(&self.directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(read == *digest, "{name} has another content");
                self.slowest.fetch_max(start.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
            self.rounds[number].fetch_add(1, Ordering::Relaxed);
        }
    }

    fn drop_caches(&self, _: usize) {
        while !self.stopped() {
            fresh_caches();
            sleep(Duration::from_secs(1));
        }
    }
}

pub fn hash(file: &Path) -> io::Result<Vec<u8>> {
    let (mut file, mut sum, mut buffer) = (fs::File::open(file)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(sum.finalize().to_vec()),
            length => sum.update(&buffer[..length]),
        }
    }
}
