//! What of images is read ahead, and when.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use tokio::sync::{Mutex, MutexGuard};

use super::*;
use crate::spec::parameters::parse_attributes;
use crate::volume::fixture::{Node, squashfs, wait_for};
use crate::volume::{PrefetchConfig, Publication};

/// All tests of the process count together: one of these at a time, and no other reads ahead.
async fn counted() -> (MutexGuard<'static, ()>, impl Fn() -> u64) {
    static COUNTED: LazyLock<Mutex<()>> = LazyLock::new(Mutex::default);
    let alone = COUNTED.lock().await;
    let before = metrics::prefetched_bytes().get();
    (alone, move || (metrics::prefetched_bytes().get() - before) >> 10)
}

/// A node that reads 1 MiB ahead.
async fn node() -> Node {
    let mut node = Node::new().await;
    node.prefetch = PrefetchConfig { budget: 1 << 20, rate: None };
    node.restart();
    node
}

/// A volume of an image, read ahead or not.
async fn publish(node: &Node, image: &str, prefetch: Option<&str>, pod: &str) {
    let port = format!("port={}", node.port);
    let of = [("server", "127.0.0.1"), ("share", "/images"), ("image", image), ("nfsOptions", &port)];
    let all = of.into_iter().chain(prefetch.map(|prefetch| ("prefetch", prefetch)));
    let all: BTreeMap<_, _> = all.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mount = node.volumes.allow(parse_attributes(&all, &[]).unwrap(), None).unwrap();
    let (volume_id, target) = (pod.to_owned(), node.target(pod));
    let publication = Publication { volume_id, ..Publication::by_hand(target, mount, true) };
    node.volumes.publish(publication, false).await.unwrap();
}

async fn unpublish(node: &Node, pods: &[&str]) {
    for pod in pods {
        node.volumes.unpublish(pod, &node.target(pod)).await.unwrap();
    }
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn an_image_is_read_ahead_once_as_far_as_the_budget_goes_and_gives_its_share_back() {
    let (node, (_alone, read)) = (node().await, counted().await);
    let write = |name: &str, size| std::fs::write(node.kernel.export().join(name), squashfs(size)).unwrap();
    write("small", 400 << 10);
    write("large", 800 << 10);
    publish(&node, "image.sqsh", Some("none"), "a").await;
    assert_eq!((read(), node.volumes.prefetching().len()), (0, 0));
    for (image, pod, so_far) in [("small", "b", 400), ("large", "c", 1024), ("small", "d", 1024), ("large", "e", 1024)]
    {
        publish(&node, image, Some("all"), pod).await;
        wait_for(|| read() == so_far && node.volumes.prefetching().is_empty(), || format!("{} KiB", read())).await;
    }
    unpublish(&node, &["a", "b", "c", "d", "e"]).await;
    publish(&node, "large", Some("all"), "f").await;
    wait_for(|| read() == 1024 + 800, || format!("{} KiB", read())).await;
}

#[tokio::test]
async fn what_was_read_of_an_image_is_read_ahead_the_next_time_unless_it_was_replaced() {
    let (mut node, (_alone, read)) = (node().await, counted().await);
    // Just written, and so in the page cache.
    std::fs::write(node.kernel.export().join("image"), squashfs(400 << 10)).unwrap();
    let learned = node.data_dir().join("learned");
    publish(&node, "image", None, "a").await;
    unpublish(&node, &["a"]).await;
    wait_for(|| learned.exists(), || "nothing is learned".into()).await;
    assert_eq!(read(), 0);
    node.restart();
    publish(&node, "image", None, "b").await;
    wait_for(|| read() == 400, || format!("{} KiB", read())).await;
    publish(&node, "image", None, "c").await;
    unpublish(&node, &["b", "c"]).await;
    std::fs::remove_file(node.kernel.export().join("image")).unwrap();
    std::fs::write(node.kernel.export().join("image"), squashfs(500 << 10)).unwrap();
    publish(&node, "image", Some("learned"), "d").await;
    unpublish(&node, &["d"]).await;
    assert_eq!(read(), 400);
    let files = || std::fs::read_dir(&learned).unwrap().count();
    wait_for(|| files() == 2, || format!("{} images are known", files())).await;
}

#[tokio::test]
async fn a_node_that_knows_nothing_of_an_image_begins_with_what_lies_beside_it() {
    let (node, (_alone, read)) = (node().await, counted().await);
    let write = |name: &str, content: &[u8]| std::fs::write(node.kernel.export().join(name), content).unwrap();
    write("image", &squashfs(400 << 10));
    write("image.profile", br#"{"version": 1, "size": 409600, "parts": [[0, 102400]]}"#);
    publish(&node, "image", None, "a").await;
    wait_for(|| read() == 100 && node.volumes.prefetching().is_empty(), || format!("{} KiB", read())).await;
    unpublish(&node, &["a"]).await;
    // What it learned itself is better: here all of it, which was just written.
    wait_for(|| learned(&node) == 1, || "nothing is learned".into()).await;
    publish(&node, "image", None, "b").await;
    wait_for(|| read() == 500, || format!("{} KiB", read())).await;
    unpublish(&node, &["b"]).await;
}

#[tokio::test]
async fn what_lies_beside_an_image_and_is_no_profile_of_it_says_nothing() {
    let name = Name { server: "s".into(), mount: "m".into(), export: "/e".into(), path: "p".into() };
    let image = Original { name, inode: 1, size: 1000, modified: 2, changed: 3 };
    let parts = |text: kernel::Result<&'static str>| beside(Box::new(|| Ok(text?.into())), &image, None);
    assert_eq!(parts(Ok(r#"{"version": 1, "size": 1000, "parts": [[7, 90]]}"#)).await.first(), Some(&(7..90)));
    assert_eq!(parts(Ok(r#"{"version": 1, "size": 1001, "parts": [[7, 90]]}"#)).await, []);
    assert_eq!(parts(Ok("[")).await, []);
    for errno in [Errno::NOENT, Errno::NAMETOOLONG, Errno::IO] {
        assert_eq!(parts(Err(kernel::Error::new("open it", errno))).await, []);
    }
}

/// Of how many images something is written down.
fn learned(node: &Node) -> usize {
    let files = std::fs::read_dir(node.data_dir().join("learned")).into_iter().flatten();
    files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "json")).count()
}

#[tokio::test]
async fn a_node_without_a_budget_learns_nothing() {
    let node = Node::new().await;
    publish(&node, "image.sqsh", Some("learned"), "a").await;
    unpublish(&node, &["a"]).await;
    assert!(!node.data_dir().join("learned").exists());
}

proptest! {
    #[test]
    fn parts_are_cut_into_windows_in_their_order_and_none_is_lost(
        parts in prop::collection::vec((1_u64..500, 1_u64..300), 0..20),
        window in 1_u64..400,
        budget in 0_u64..3000,
    ) {
        let mut at = 0;
        let parts: Vec<_> = parts.into_iter().map(|(gap, length)| {
            let start = at + gap;
            at = start + length;
            start..at
        }).collect();
        let bytes = |parts: &[Range<u64>]| parts.iter().map(|part| part.end - part.start).sum::<u64>();
        let (all, first) = (bytes(&parts), first(parts.clone(), budget));
        prop_assert_eq!(bytes(&first), budget.min(all));
        let windows = windows(&first, window);
        let expected = first.iter().flat_map(Clone::clone).collect::<Vec<_>>();
        prop_assert_eq!(windows.iter().flatten().flat_map(Clone::clone).collect::<Vec<_>>(), expected);
        prop_assert!(windows.iter().all(|parts| bytes(parts) <= window));
        prop_assert!(windows.iter().rev().skip(1).all(|parts| bytes(parts) == window));
    }
}
