//! Images that are read into the node's memory ahead of those who will read in them, behind the backs of their volumes.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::ahead::Prefetching;
use super::prepare::Preparer;
use super::prepared::{AttachedImage, PreparedBase};
use crate::blocking::OffThread;
use crate::error::{Error, Result};
use crate::kernel::image::Image;
use crate::kernel::{Doing, page_cache};
use crate::metrics;
use crate::places::run_at;
use crate::spec::{Loopback, Prefetch};
use crate::step::{self, Step};
use crate::volume::cache::Name;

/// How much of an image is on its way at a time, at least and at most.
const LEAST: u64 = 64 << 10;
const MOST: u64 = 16 << 20;
/// How often it is asked whether anybody still has the image.
const ASKED: Duration = Duration::from_secs(1);

impl Preparer {
    /// The file of an image that is to be read ahead.
    pub(super) fn to_prefetch(&self, spec: &Loopback, image: &Image) -> Result<Option<OffThread<File>>> {
        if spec.prefetch != Some(Prefetch::All) || !self.prefetcher.is_on() {
            return Ok(None);
        }
        let file = image.file.try_clone().doing(|| "keep an image open".into())?;
        Ok(Some(OffThread::new(file)))
    }

    /// Reads an image ahead from its beginning, as far as the budget goes, unless that was begun before. Nobody waits for it, and it ends with
    /// the image's last user.
    pub(super) fn prefetch(
        &self,
        spec: &Loopback,
        file: OffThread<File>,
        attached: &Arc<OffThread<AttachedImage>>,
        base: &PreparedBase,
    ) {
        let Some(name) = Name::of(spec).filter(|_| !attached.is_read_ahead()) else { return };
        let Some(share) = self.prefetcher.take(attached.size()) else {
            tracing::info!("{name} is not read ahead: the budget is spent on other images");
            return;
        };
        let end = share.bytes();
        if !attached.read_ahead(share) {
            return;
        }
        let (ahead, rate) = (self.prefetcher.begin(name.to_string(), end), self.prefetcher.rate());
        let turns = self.prefetcher.turns_of(&name.server);
        let (file, places, attached) = (Arc::new(file), base.places(), Arc::downgrade(attached));
        let read = async move {
            let is_wanted = || attached.upgrade().is_some_and(|attached| attached.is_read_ahead());
            let _turn = loop {
                match tokio::time::timeout(ASKED, turns.acquire()).await {
                    Ok(turn) => break turn,
                    Err(_) if is_wanted() => {}
                    Err(_) => return Ok(()),
                }
            };
            let (start, mut at) = (Instant::now(), 0);
            let window = rate.map_or(MOST, |rate| (rate * ASKED.as_secs()).clamp(LEAST, MOST));
            while at < end && is_wanted() {
                let (part, file) = (at..end.min(at + window), Arc::clone(&file));
                at = part.end;
                let size = part.end - part.start;
                let fill = move || page_cache::fill(&file, part);
                run_at(places.clone(), format!("read {name} ahead"), fill).await?;
                ahead.is_at(at);
                metrics::prefetched_bytes().inc_by(size);
                if let Some(rate) = rate {
                    tokio::time::sleep_until(start + Duration::from_secs_f64(at as f64 / rate as f64)).await;
                }
            }
            if at == end {
                tracing::info!(bytes = end, "{name} was read ahead");
            }
            Ok::<_, Error>(())
        };
        let read = async move {
            if let Err(error) = read.await {
                tracing::warn!("an image is read no further ahead: {error}");
            }
        };
        // The threads that it takes count for who asked for it.
        tokio::spawn(Step::for_namespace(step::namespace().as_deref()).observe(read));
    }

    /// What is being read ahead.
    pub fn prefetching(&self) -> Vec<Prefetching> {
        self.prefetcher.under_way()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::error::Result;
    use crate::metrics;
    use crate::spec::parameters::parse_attributes;
    use crate::volume::Publication;
    use crate::volume::fixture::{Node, squashfs, wait_for};

    /// A volume of an image, read ahead or not.
    async fn publish(node: &Node, image: &str, prefetch: &str, pod: &str) -> Result<()> {
        let port = format!("port={}", node.port);
        let of = [("server", "127.0.0.1"), ("share", "/images"), ("image", image), ("nfsOptions", &port)];
        let all = [&of[..], &[("prefetch", prefetch)]].concat().into_iter();
        let all: BTreeMap<_, _> = all.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let mount = node.volumes.allow(parse_attributes(&all, &[]).unwrap(), None).unwrap();
        let (volume_id, target) = (pod.to_owned(), node.target(pod));
        let publication = Publication { volume_id, target, mount, read_only: true, namespace: None, exclusive: false };
        node.volumes.publish(publication, false).await
    }

    /// All tests of the process count together, and no other reads ahead.
    #[tokio::test]
    async fn an_image_is_read_ahead_once_as_far_as_the_budget_goes_and_gives_its_share_back() {
        let node = Node::new().await;
        let write = |name: &str, size| std::fs::write(node.kernel.export().join(name), squashfs(size)).unwrap();
        write("small", 400 << 10);
        write("large", 800 << 10);
        let read = || metrics::prefetched_bytes().get() >> 10;
        publish(&node, "small", "none", "a").await.unwrap();
        assert_eq!((read(), node.volumes.prefetching().len()), (0, 0));
        for (image, pod, so_far) in
            [("small", "b", 400), ("large", "c", 1024), ("small", "d", 1024), ("large", "e", 1024)]
        {
            publish(&node, image, "all", pod).await.unwrap();
            wait_for(|| read() == so_far && node.volumes.prefetching().is_empty(), || format!("{} KiB", read())).await;
        }
        for pod in ["a", "b", "c", "d", "e"] {
            node.volumes.unpublish(pod, &node.target(pod)).await.unwrap();
        }
        node.assert_nothing_held().await;
        publish(&node, "large", "all", "f").await.unwrap();
        wait_for(|| read() == 1024 + 800, || format!("{} KiB", read())).await;
    }
}
