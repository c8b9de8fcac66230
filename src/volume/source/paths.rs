//! The paths of images that several servers have, one for each server: which of them the kernel reads by.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::prepared::ImageKey;
use crate::kernel::device_mapper::{Multipath, PathState, Verified};
use crate::kernel::image::{Image, ImageIdentity};
use crate::kernel::loop_device::{self, Attached, Purpose, Reads, Tag};
use crate::kernel::verity::RootHash;
use crate::kernel::{self, Kernel};
use crate::volume::cache::Cache;

/// For how long a path must be one before the kernel is told to go back to it.
const WELL: Duration = Duration::from_secs(60);
/// What fails sooner than this failed at once, and its server may have been no better than before.
const AT_ONCE: Duration = Duration::from_secs(15);
/// How soon a path that failed is looked after again, and how late at most where it fails at once each time.
const SOON: Duration = Duration::from_secs(5);
const LATEST: Duration = Duration::from_secs(300);

/// What an image of several servers stands on.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The loop device of its first path, by which it is known.
    pub first: u32,
    /// Who reads waits where no path is left.
    pub queues: bool,
    pub each: Vec<ServerPath>,
}

/// A way to one server.
#[derive(Clone, Debug)]
pub struct ServerPath {
    /// The place of the server in the list of the spec.
    pub server: u8,
    pub loop_device: u32,
    pub identity: ImageIdentity,
    /// By what the kernel verifies what it reads there.
    pub root: Option<RootHash>,
    pub is_corrupted: bool,
    /// It leads to a copy on this node.
    pub is_local: bool,
    pub reads: Reads,
    pub state: PathState,
}

impl Paths {
    /// Of what stands on them.
    pub fn key(&self) -> Option<ImageKey> {
        let first = self.each.iter().find(|path| path.loop_device == self.first)?;
        Some(ImageKey { identity: first.identity, verity: first.root, is_sif: false, server: Some(first.server) })
    }

    /// The place among them, from 1, of the best that is one, with that of its server; and of that which the kernel reads by.
    pub fn best_and_current(&self) -> (Option<(u32, u8)>, Option<u32>) {
        let places = || (1..).zip(&self.each);
        let best = places().find(|(_, path)| !path.state.is_failed).map(|(at, path)| (at, path.server));
        (best, places().find(|(_, path)| path.state.is_current).map(|(at, _)| at))
    }

    /// The servers that gave other bytes than the root hash says.
    pub fn corrupted(&self) -> Vec<u8> {
        self.each.iter().filter(|path| path.is_corrupted).map(|path| path.server).collect()
    }

    /// `None` where one of them cannot be looked at now, as it is being moved.
    fn of(multipath: Multipath, attached: &[Attached], verified: &[Verified], cache: &Cache) -> Option<Self> {
        let describe = |state: PathState| {
            let verified = verified.iter().find(|it| it.device == state.device);
            let loop_device = match (verified, state.device) {
                (Some(verified), _) => verified.loop_device,
                (None, (loop_device::MAJOR, number)) => number,
                (None, _) => return None,
            };
            let it = attached.iter().find(|it| it.device.number() == loop_device)?;
            let Purpose::Path { server, .. } = it.purpose else { return None };
            Some(ServerPath {
                server,
                loop_device,
                identity: it.identity,
                reads: it.reads,
                root: verified.map(|verified| verified.root),
                is_corrupted: verified.is_some_and(|verified| verified.is_corrupted),
                is_local: cache.below(it).is_some(),
                state,
            })
        };
        let Multipath { loop_device: first, queues, paths, .. } = multipath;
        Some(Paths { first, queues, each: paths.into_iter().map(describe).collect::<Option<_>>()? })
    }
}

impl ServerPath {
    /// Whether it is to this file, wherever the export is mounted; if not `strictly`, also where somebody changed the file since, as by
    /// giving it another owner.
    pub fn is_file(&self, image: &Image, strictly: bool) -> bool {
        let ImageIdentity { inode, size, changed, .. } = image.identity;
        let of_file = (self.identity.inode, self.identity.size) == (inode, size);
        of_file && (!strictly || self.identity.changed == changed)
    }
}

/// Those of the driver with this mark. Asks no server.
pub fn all(kernel: &dyn Kernel, tag: &Tag, cache: &Cache) -> kernel::Result<Vec<Paths>> {
    let multipaths = kernel.multipath_devices(tag)?;
    if multipaths.is_empty() {
        return Ok(Vec::new());
    }
    let (attached, verified) = (kernel.loop_devices(tag)?, kernel.verified_devices(tag)?);
    let describe = |multipath| Paths::of(multipath, &attached, &verified, cache);
    Ok(multipaths.into_iter().filter_map(describe).collect())
}

/// Loop devices with reads that had no answer when they were looked at: what they are of, how much was read by then, and since when that
/// is so.
#[derive(Default)]
pub struct Unanswered(HashMap<u32, (ImageIdentity, u64, Instant)>);

impl Unanswered {
    /// For how long nothing was read of a device although somebody reads; nothing where nobody does.
    pub fn of(&mut self, device: u32, identity: ImageIdentity, reads: Reads, now: Instant) -> Duration {
        let before = self.0.remove(&device).filter(|known| (known.0, known.1) == (identity, reads.bytes));
        let since = before.map_or(now, |known| known.2);
        if reads.under_way == 0 {
            return Duration::ZERO;
        }
        self.0.insert(device, (identity, reads.bytes, since));
        now.duration_since(since)
    }

    /// Forgets devices that are there no more.
    pub fn keep(&mut self, is_there: impl Fn(u32) -> bool) {
        self.0.retain(|device, _| is_there(*device));
    }
}

/// What is known of the paths that were looked after: of the image with this first loop device, to the server at this place.
#[derive(Default)]
pub struct Trials(HashMap<(u32, u8), Trial>);

pub struct Trial {
    pub times: u32,
    next: Instant,
    well_since: Option<Instant>,
    /// The server answers, and has the image no more.
    pub is_gone: bool,
}

impl Trials {
    /// Forgets images that are there no more.
    pub fn keep(&mut self, is_there: impl Fn(u32) -> bool) {
        self.0.retain(|(first, _), _| is_there(*first));
    }

    pub fn of(&mut self, path: (u32, u8), now: Instant) -> &mut Trial {
        self.0.entry(path).or_insert(Trial { times: 0, next: now, well_since: None, is_gone: false })
    }

    /// How often it was tried again.
    pub fn times(&self, path: (u32, u8)) -> u32 {
        self.0.get(&path).map_or(0, |trial| trial.times)
    }

    /// Whether it is time to look after a path that failed; the next time is later, or `soon` where there is no other.
    pub fn is_due(&mut self, path: (u32, u8), soon: bool, now: Instant) -> bool {
        let trial = self.of(path, now);
        trial.well_since = None;
        let is_due = trial.next <= now;
        if is_due {
            let times = if soon { 0 } else { trial.times.min(6) };
            trial.next = now + SOON.saturating_mul(1 << times).min(LATEST);
        }
        is_due
    }

    /// Whether a path that is one has been so for a while.
    pub fn is_well(&mut self, path: (u32, u8), now: Instant) -> bool {
        let trial = self.of(path, now);
        trial.is_gone = false;
        let well = now.duration_since(*trial.well_since.get_or_insert(now));
        if well >= AT_ONCE {
            trial.times = 0;
        }
        well >= WELL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_fails_at_once_each_time_is_tried_less_and_less_often_until_it_is_one_for_longer() {
        let (mut trials, start, path) = (Trials::default(), Instant::now(), (3, 0));
        let mut tried = Vec::new();
        for second in 0..1000 {
            let now = start + Duration::from_secs(second);
            if trials.is_due(path, false, now) {
                trials.of(path, now).times += 1;
                tried.push(second);
            }
        }
        assert_eq!(tried, [0, 5, 15, 35, 75, 155, 315, 615, 915]);
        let now = start + Duration::from_secs(1000);
        assert!(!trials.is_well(path, now) && !trials.is_well(path, now + AT_ONCE - SOON));
        assert_ne!(trials.times(path), 0);
        assert!(!trials.is_well(path, now + AT_ONCE) && trials.times(path) == 0);
        // The kernel goes back to it later than that.
        assert!(!trials.is_well(path, now + WELL - SOON) && trials.is_well(path, now + WELL));
    }
}
