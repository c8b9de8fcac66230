//! Images that are read into the node's memory ahead of those who will read in them, behind the backs of their volumes.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use super::ahead::{Prefetcher, Prefetching, Watch};
use super::layers;
use super::learned::Learned;
use super::open_base::OpenBase;
use super::prepare::{Preparer, symlinks};
use super::prepared::{AttachedImage, PreparedBase};
use super::profile::{self, Profile};
use crate::blocking::{self, OffThread};
use crate::error::{Error, Result};
use crate::kernel::image::Image;
use crate::kernel::page_cache::{self, Watched};
use crate::kernel::{self, Doing};
use crate::metrics;
use crate::places::{Places, run_at};
use crate::spec::{Loopback, Prefetch};
use crate::step::{self, Step};
use crate::volume::cache::{Name, Original};

/// How much of an image is on its way at a time, at least and at most.
const LEAST: u64 = 64 << 10;
const MOST: u64 = 16 << 20;
/// How often it is asked whether anybody still has the image.
const ASKED: Duration = Duration::from_secs(1);
/// How long an image is used until it is written down what was read of it, so that it is known also where the driver is killed.
const LEARNED: Duration = Duration::from_secs(120);
/// The largest image of which it is learned what is read.
const MOST_LEARNED: u64 = 256 << 30;

/// An image that is to be read ahead, open on its server.
pub(super) struct ToPrefetch {
    file: OffThread<File>,
    original: Original,
    what: Prefetch,
    places: Option<Places>,
    /// Where it is to be learned. It keeps the image's base.
    profile: Option<ReadProfile>,
}

/// Reads what lies beside an image, for nodes that know nothing of it.
type ReadProfile = Box<dyn FnOnce() -> kernel::Result<Vec<u8>> + Send>;

impl Preparer {
    /// What is needed to read an image ahead, where its volume wants that.
    pub(super) fn to_prefetch(
        &self,
        spec: &Loopback,
        base: &PreparedBase,
        image: &Image,
    ) -> Result<Option<ToPrefetch>> {
        let what = spec.prefetch.unwrap_or(Prefetch::Learned);
        let Some(name) = Name::of(spec).filter(|_| what != Prefetch::None && self.prefetcher.is_on()) else {
            return Ok(None);
        };
        let file = OffThread::new(image.file.try_clone().doing(|| "keep an image open".into())?);
        let (original, places) = (Original::of(name, image), base.places());
        let (kernel, base, symlinks) = (Arc::clone(&self.kernel), base.clone(), symlinks(&spec.base, spec.symlinks));
        let path = format!("{}.profile", spec.path);
        let profile: ReadProfile = Box::new(move || {
            let image = OpenBase::new(base, &*kernel)?.open_image(&path, symlinks)?;
            // A byte more than it may have, so that too large a one is none.
            layers::read(&image, &path, profile::MAX + 1)
        });
        let profile = Some(profile).filter(|_| what == Prefetch::Learned);
        Ok(Some(ToPrefetch { file, original, what, places, profile }))
    }

    /// Reads an image ahead, as far as the budget goes, unless that was begun before, and sees to it that what is read of it is learned. Nobody
    /// waits for it, and it ends with the image's last user.
    pub(super) fn prefetch(&self, image: ToPrefetch, attached: &Arc<OffThread<AttachedImage>>) {
        if !attached.ahead.begin() {
            return;
        }
        let (prefetcher, attached) = (Arc::clone(&self.prefetcher), Arc::downgrade(attached));
        let work = async move {
            let name = image.original.name.to_string();
            if let Err(error) = see_to(&prefetcher, image, &attached).await {
                tracing::warn!("what is read of {name} is not learned: {error}");
            }
        };
        // The threads that it takes count for who asked for it.
        tokio::spawn(Step::for_namespace(step::namespace().as_deref()).observe(work));
    }

    /// What is being read ahead.
    pub fn prefetching(&self) -> Vec<Prefetching> {
        self.prefetcher.under_way()
    }
}

async fn see_to(prefetcher: &Prefetcher, image: ToPrefetch, attached: &Weak<OffThread<AttachedImage>>) -> Result<()> {
    let ToPrefetch { file, original, what, places, profile } = image;
    let (file, name) = (Arc::new(file), original.name.to_string());
    let parts = match what {
        Prefetch::None => Vec::new(),
        Prefetch::All => std::iter::once(0..original.size).collect(),
        Prefetch::Learned => {
            let known = known(prefetcher.learned().clone(), &original, profile, places.clone()).await?;
            // The kernel is asked about each of its pages.
            if original.size > MOST_LEARNED {
                tracing::info!("{name} has more than {MOST_LEARNED} bytes: it is not learned what is read of it");
            } else {
                let watch = watch(prefetcher.learned().clone(), &file, &original, places.clone()).await?;
                let Some(attached) = attached.upgrade() else { return Ok(()) };
                attached.ahead.watch(watch);
            }
            known
        }
    };
    let wanted = bytes_of(&parts);
    match (prefetcher.take(wanted), attached.upgrade()) {
        (Some(share), Some(image)) => {
            let parts = first(parts, share.bytes());
            image.ahead.hold(share);
            drop(image);
            if let Err(error) = read(prefetcher, &file, &original.name, &parts, attached, places).await {
                tracing::warn!("{name} is read no further ahead: {error}");
            }
        }
        (None, Some(_)) if wanted > 0 => {
            tracing::info!("{name} is not read ahead: the budget is spent on other images")
        }
        _ => {}
    }
    drop(file);
    if what == Prefetch::Learned {
        tokio::time::sleep(LEARNED).await;
        if let Some(watch) = attached.upgrade().and_then(|attached| attached.ahead.watched()) {
            let learn = move || {
                watch.learn();
                // Let go of where that waits for nobody.
                Ok::<_, Error>(watch)
            };
            blocking::run("write down what was read of an image", learn).await?;
        }
    }
    Ok(())
}

/// The parts of an image that this node learned, or else those that the file beside it says.
async fn known(
    learned: Learned,
    image: &Original,
    profile: Option<ReadProfile>,
    places: Option<Places>,
) -> Result<Vec<Range<u64>>> {
    let of = image.clone();
    let look = move || Ok::<_, Error>(learned.read(&of));
    let known = blocking::run("look what was read of an image", look).await?;
    match profile {
        Some(read) if known.is_empty() => Ok(beside(read, image, places).await),
        _ => Ok(known),
    }
}

/// None where there is no such file, or none that is of use.
async fn beside(read: ReadProfile, image: &Original, places: Option<Places>) -> Vec<Range<u64>> {
    let (name, size) = (&image.name, image.size);
    let parts = match run_at(places, format!("read what lies beside {name}"), read).await {
        Ok(text) => Profile::parse(&text, size),
        Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::NAMETOOLONG)) => return Vec::new(),
        Err(error) => Err(error),
    };
    parts.unwrap_or_else(|error| {
        tracing::warn!("{}.profile of {} is of no use: {error}", name.file(), name.server);
        Vec::new()
    })
}

/// Sees to it that what is read of an image is learned, for as long as what this returns lives.
async fn watch(
    learned: Learned,
    file: &Arc<OffThread<File>>,
    image: &Original,
    places: Option<Places>,
) -> Result<OffThread<Watch>> {
    let (file, of) = (Arc::clone(file), image.clone());
    let begin = move || {
        let file = file.try_clone().doing(|| "keep an image open".into())?;
        Ok::<_, kernel::Error>(OffThread::new(Watch::new(Watched::new(file, of.size)?, of, learned)))
    };
    run_at(places, format!("watch what is read of {}", image.name), begin).await
}

/// Reads parts of an image, after other images of its server, for as long as anybody has it on its server.
async fn read(
    prefetcher: &Prefetcher,
    file: &Arc<OffThread<File>>,
    name: &Name,
    parts: &[Range<u64>],
    attached: &Weak<OffThread<AttachedImage>>,
    places: Option<Places>,
) -> Result<()> {
    let (ahead, rate) = (prefetcher.begin(name.to_string(), bytes_of(parts)), prefetcher.rate());
    let is_wanted = || attached.upgrade().is_some_and(|attached| !attached.ahead.is_ended());
    let turns = prefetcher.turns_of(&name.server);
    let _turn = loop {
        match tokio::time::timeout(ASKED, turns.acquire()).await {
            Ok(turn) => break turn,
            Err(_) if is_wanted() => {}
            Err(_) => return Ok(()),
        }
    };
    let (start, mut done) = (Instant::now(), 0);
    for parts in windows(parts, rate.map_or(MOST, |rate| (rate * ASKED.as_secs()).clamp(LEAST, MOST))) {
        if !is_wanted() {
            return Ok(());
        }
        let (file, bytes) = (Arc::clone(file), bytes_of(&parts));
        let fill = move || page_cache::fill(&file, &parts);
        run_at(places.clone(), format!("read {name} ahead"), fill).await?;
        done += bytes;
        ahead.is_at(done);
        metrics::prefetched_bytes().inc_by(bytes);
        if let Some(rate) = rate {
            tokio::time::sleep_until(start + Duration::from_secs_f64(done as f64 / rate as f64)).await;
        }
    }
    tracing::info!(bytes = done, "{name} was read ahead");
    Ok(())
}

fn bytes_of(parts: &[Range<u64>]) -> u64 {
    parts.iter().map(|part| part.end - part.start).sum()
}

/// The first so many bytes of these parts.
fn first(parts: Vec<Range<u64>>, mut bytes: u64) -> Vec<Range<u64>> {
    let cut = |part: Range<u64>| {
        let length = bytes.min(part.end - part.start);
        bytes -= length;
        (length > 0).then(|| part.start..part.start + length)
    };
    parts.into_iter().map_while(cut).collect()
}

/// The same parts, so many bytes at a time.
fn windows(parts: &[Range<u64>], window: u64) -> Vec<Vec<Range<u64>>> {
    let (mut windows, mut left) = (Vec::<Vec<_>>::new(), 0);
    for part in parts {
        let mut at = part.start;
        while at < part.end {
            if left == 0 {
                windows.push(Vec::new());
                left = window;
            }
            let end = part.end.min(at + left);
            windows.last_mut().expect("one was begun").push(at..end);
            (at, left) = (end, left - (end - at));
        }
    }
    windows
}

#[cfg(test)]
mod tests;
