//! When an image is read from its server and when from its copy, and what is done when the server changes it or goes away.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use crate::error::Kind;
use crate::kernel::{sif, verity};
use crate::spec::Allowed;
use crate::spec::parameters::parse_attributes;
use crate::volume::Publication;
use crate::volume::copies;
use crate::volume::fixture::{Node, squashfs, wait_for};

/// A volume of the node's image, with these parameters beside.
fn volume(node: &Node, parameters: &[(&str, &str)]) -> Allowed {
    let port = format!("port={}", node.port);
    // The last of a name counts.
    let image = [("server", "127.0.0.1"), ("share", "/images"), ("image", "image.sqsh"), ("nfsOptions", &port)];
    let all = [&image, parameters].concat();
    let all: BTreeMap<_, _> = all.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    node.volumes.allow(parse_attributes(&all, &[]).unwrap(), None).unwrap()
}

async fn publish(node: &Node, parameters: &[(&str, &str)], pod: &str) -> crate::error::Result<()> {
    let (mount, target) = (volume(node, parameters), node.target(pod));
    let volume_id = format!("volume of {pod}");
    let publication = Publication { volume_id, ..Publication::by_hand(target, mount, true) };
    node.volumes.publish(publication, false).await
}

async fn unpublish(node: &Node, pod: &str) {
    node.volumes.unpublish(&format!("volume of {pod}"), &node.target(pod)).await.unwrap();
}

async fn condition(node: &Node, pod: &str) -> Option<String> {
    node.volumes
        .stats(&format!("volume of {pod}"), &node.target(pod))
        .await
        .unwrap()
        .abnormal
        .map(|abnormal| abnormal.message)
}

const NODE: &[(&str, &str)] = &[("cache", "node")];

/// Waits until a device was moved to a copy.
async fn moved(node: &Node) {
    node.wait_for_calls("loop0: another file of 4096 bytes", 1).await;
}

fn complete(node: &Node) -> usize {
    copies::list(&node.cache_dir()).unwrap().iter().filter(|entry| entry.is_complete()).count()
}

#[tokio::test]
async fn an_image_is_copied_behind_its_pod_and_the_next_pod_stands_on_the_same_device() {
    let node = Node::new().await;
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    wait_for(|| node.kernel.left_in_namespace().is_empty(), || "the export is still mounted".into()).await;
    publish(&node, NODE, "b").await.unwrap();
    assert!(!node.log().iter().any(|call| call.contains("an image of")), "no second device");
    for pod in ["a", "b"] {
        unpublish(&node, pod).await;
    }
    node.assert_nothing_held().await;
    publish(&node, NODE, "c").await.unwrap();
    assert!(node.log().iter().any(|call| call == "loop0: an image of 4096 bytes"));
    assert_eq!(condition(&node, "c").await, None);
    assert!(node.volumes.observe().await.unwrap().loop_devices[0].local);
}

#[tokio::test]
async fn nothing_is_copied_unless_somebody_says_so() {
    let node = Node::new().await;
    publish(&node, &[("cache", "none")], "a").await.unwrap();
    publish(&node, &[], "b").await.unwrap();
    node.volumes.tend_copies_now().await.unwrap();
    assert!(copies::list(&node.cache_dir()).unwrap().is_empty());
}

#[tokio::test]
async fn a_pod_begins_with_the_copy_where_the_server_is_silent_and_is_not_called_abnormal() {
    let mut node = Node::new().await;
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    node.stop_server().await;
    publish(&node, NODE, "b").await.unwrap();
    for pod in ["a", "b"] {
        assert_eq!(condition(&node, pod).await, None);
        unpublish(&node, pod).await;
    }
    node.assert_nothing_held().await;
    // After a reboot, too.
    node.restart();
    publish(&node, NODE, "c").await.unwrap();
    assert_eq!(condition(&node, "c").await, None);
    let error = publish(&node, &[("cache", "none")], "d").await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_replaced_image_has_a_copy_of_its_own_and_the_old_one_is_not_given_out_again() {
    let node = Node::new().await;
    publish(&node, NODE, "old").await.unwrap();
    moved(&node).await;
    let (image, new) = (node.kernel.export().join("image.sqsh"), node.kernel.export().join("new"));
    std::fs::write(&new, squashfs(8192)).unwrap();
    std::fs::rename(new, image).unwrap();
    assert!(condition(&node, "old").await.unwrap().contains("was replaced on the server"));
    publish(&node, NODE, "new").await.unwrap();
    node.wait_for_calls("loop1: another file of 8192 bytes", 1).await;
    unpublish(&node, "new").await;
    node.stop_server().await;
    publish(&node, NODE, "silent").await.unwrap();
    let devices = node.volumes.observe().await.unwrap().loop_devices;
    assert_eq!(
        devices.iter().map(|device| (device.size, device.published)).collect::<Vec<_>>(),
        [(4096, 1), (8192, 1)]
    );
}

#[tokio::test]
async fn what_the_server_has_no_more_is_not_begun_with_although_the_new_one_is_not_copied() {
    let node = Node::new().await;
    publish(&node, NODE, "old").await.unwrap();
    moved(&node).await;
    // Larger than all copies may be.
    std::fs::write(node.kernel.export().join("image.sqsh"), squashfs(2 << 20)).unwrap();
    publish(&node, NODE, "new").await.unwrap();
    wait_for(|| node.volumes.copies_under_way().iter().any(|copy| copy.failed.is_some()), || "no failure".into()).await;
    assert!(node.volumes.copies_under_way()[0].failed.as_deref().unwrap().contains("no room for a copy"));
    assert!(condition(&node, "old").await.unwrap().contains("goes on with its copy"));
    unpublish(&node, "new").await;
    node.stop_server().await;
    assert_eq!(publish(&node, NODE, "silent").await.unwrap_err().kind, Kind::Unavailable);
}

#[tokio::test]
async fn what_the_server_said_is_gone_is_not_begun_with_when_it_is_silent() {
    let node = Node::new().await;
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    std::fs::remove_file(node.kernel.export().join("image.sqsh")).unwrap();
    assert_eq!(publish(&node, NODE, "b").await.unwrap_err().kind, Kind::NotFound);
    node.stop_server().await;
    assert_eq!(publish(&node, NODE, "c").await.unwrap_err().kind, Kind::Unavailable);
}

#[tokio::test]
async fn what_this_node_cannot_do_is_no_word_of_the_server_and_the_copy_stays() {
    let node = Node::new().await;
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    wait_for(|| node.kernel.left_in_namespace().is_empty(), || "the export is still mounted".into()).await;
    node.kernel.refuse("mount nfs", rustix::io::Errno::NODEV);
    assert_eq!(publish(&node, NODE, "b").await.unwrap_err().kind, Kind::FailedPrecondition);
    node.kernel.allow();
    node.stop_server().await;
    publish(&node, NODE, "c").await.unwrap();
}

/// Layers beside an index that names them.
fn stack(node: &Node, layers: &[(&str, usize)]) {
    for (name, size) in layers {
        let path = node.kernel.export().join(name);
        if !path.exists() {
            std::fs::write(path, squashfs(*size)).unwrap();
        }
    }
    let names: Vec<_> = layers.iter().map(|(name, _)| *name).collect();
    let index = serde_json::json!({"source": "oci://a@sha256:0", "layers": names});
    std::fs::write(node.kernel.export().join("tools.json"), index.to_string()).unwrap();
}

const INDEX: (&str, &str) = ("image", "tools.json");

#[tokio::test]
async fn an_index_stands_for_an_overlay_of_its_layers_each_with_a_device_and_a_copy_of_its_own() {
    let node = Node::new().await;
    stack(&node, &[("base.sqsh", 4096), ("upper.sqsh", 8192)]);
    publish(&node, &[INDEX, ("cache", "node")], "a").await.unwrap();
    let moved = std::sync::atomic::AtomicUsize::new(0);
    let both_are = || {
        let now = node.log().iter().filter(|call| call.contains(": another file")).count();
        moved.fetch_add(now, std::sync::atomic::Ordering::Relaxed) + now == 2
    };
    wait_for(both_are, || "not both layers are read from their copies".into()).await;
    let sizes = async || {
        let devices = node.volumes.observe().await.unwrap().loop_devices;
        devices.iter().map(|device| device.size).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(sizes().await, [4096, 8192].into());
    assert_eq!(condition(&node, "a").await, None);
    // The layer that another image has too is attached once.
    stack(&node, &[("base.sqsh", 4096), ("other.sqsh", 12288)]);
    publish(&node, &[INDEX, ("cache", "node")], "b").await.unwrap();
    assert_eq!(sizes().await, [4096, 8192, 12288].into());
    for pod in ["a", "b"] {
        unpublish(&node, pod).await;
    }
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn a_staged_index_is_published_without_its_server_with_the_layers_that_it_had() {
    let mut node = Node::new().await;
    stack(&node, &[("base.sqsh", 4096), ("upper.sqsh", 8192)]);
    let mount = volume(&node, &[INDEX]);
    node.volumes.stage("v", &mount).await.unwrap();
    let publication =
        |target| Publication { volume_id: "v".into(), ..Publication::by_hand(target, mount.clone(), true) };
    node.volumes.publish(publication(node.target("a")), true).await.unwrap();
    let _earlier = std::sync::Arc::clone(&node.volumes);
    node.restart();
    node.stop_server().await;
    node.volumes.publish(publication(node.target("b")), true).await.unwrap();
    assert_eq!(node.kernel.live_loop_devices(), [0, 1]);
}

#[tokio::test]
async fn an_index_that_names_what_is_not_there_or_elsewhere_is_refused_and_leaves_nothing() {
    let node = Node::new().await;
    let index = |text: &str| std::fs::write(node.kernel.export().join("tools.json"), text).unwrap();
    for (text, kind, why) in [
        (r#"{"layers":["gone.sqsh"]}"#, Kind::NotFound, "gone.sqsh"),
        (r#"{"layers":["../image.sqsh"]}"#, Kind::FailedPrecondition, "a file beside the index"),
        (r#"{"layers":[]}"#, Kind::FailedPrecondition, "names 0 layers"),
        ("hsqs", Kind::FailedPrecondition, "no index of layers"),
    ] {
        index(text);
        let error = publish(&node, &[INDEX], "a").await.unwrap_err();
        assert!(error.kind == kind && error.message.contains(why), "{error}");
        node.assert_nothing_held().await;
    }
    index(r#"{"layers":["image.sqsh"]}"#);
    let error = publish(&node, &[INDEX, ("verity", &"0".repeat(64))], "a").await.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidArgument, "{error}");
    publish(&node, &[INDEX], "a").await.unwrap();
}

#[tokio::test]
async fn an_image_that_is_not_what_the_volume_names_is_told_once_it_is_known_and_refused_from_then_on() {
    let node = Node::new().await;
    let wrong = format!("sha256:{}", "0".repeat(64));
    publish(&node, &[("digest", &wrong)], "a").await.unwrap();
    moved(&node).await;
    let is = copies::list(&node.cache_dir()).unwrap()[0].digest.clone().unwrap();
    let condition = condition(&node, "a").await.unwrap();
    assert!(condition.contains(&wrong) && condition.contains(&is), "{condition}");
    let error = publish(&node, &[("digest", &wrong)], "b").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
    publish(&node, &[("digest", &is)], "c").await.unwrap();
    node.stop_server().await;
    publish(&node, &[("digest", &is)], "d").await.unwrap();
    assert_eq!(publish(&node, &[("digest", &wrong)], "e").await.unwrap_err().kind, Kind::Unavailable);
}

#[tokio::test]
async fn a_volume_whose_digest_could_not_be_checked_says_so() {
    let node = Node::new().await;
    std::fs::remove_dir_all(node.cache_dir()).unwrap();
    publish(&node, &[("digest", &format!("sha256:{}", "0".repeat(64)))], "a").await.unwrap();
    wait_for(|| node.volumes.copies_under_way().iter().any(|copy| copy.failed.is_some()), || "no failure".into()).await;
    let condition = condition(&node, "a").await.unwrap();
    assert!(condition.contains("was not checked for the digest"), "{condition}");
    assert!(condition.contains("No such file"), "and why: {condition}");
}

#[tokio::test]
async fn an_image_that_the_kernel_would_shut_down_is_not_moved_and_the_next_pod_begins_with_its_copy() {
    let mut node = Node::new().await;
    node.policy("fsTypes: [ext4]");
    let mut ext4 = vec![0; 4096];
    ext4[1024 + 56..1024 + 58].copy_from_slice(&0xEF53u16.to_le_bytes());
    std::fs::write(node.kernel.export().join("image.sqsh"), ext4).unwrap();
    let ext4 = [NODE, &[("fsType", "ext4")]].concat();
    publish(&node, &ext4, "a").await.unwrap();
    wait_for(|| complete(&node) == 1, || "no copy".into()).await;
    node.volumes.tend_copies_now().await.unwrap();
    assert!(!node.log().iter().any(|call| call.contains("another file")));
    unpublish(&node, "a").await;
    node.assert_nothing_held().await;
    publish(&node, &ext4, "b").await.unwrap();
    assert!(node.volumes.observe().await.unwrap().loop_devices[0].local);
}

#[tokio::test]
async fn what_the_policy_forbids_since_is_not_copied_for_pods_that_run() {
    let mut node = Node::new().await;
    node.kernel.hold("another file");
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    let _earlier = std::sync::Arc::clone(&node.volumes);
    node.policy("nodeCache: false");
    node.volumes.tend_copies_now().await.unwrap();
    assert_eq!(node.log(), [""; 0]);
    node.kernel.release();
}

#[tokio::test]
async fn a_digest_that_nobody_would_check_is_refused() {
    let node = Node::new().await;
    std::fs::write(node.kernel.export().join("image.sqsh"), squashfs(2 << 20)).unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let error = publish(&node, &[("digest", &digest)], "a").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
    assert!(error.message.contains("would not be checked"), "{error}");
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn the_next_process_goes_on_with_what_was_cut_short() {
    let mut node = Node::new().await;
    node.kernel.refuse("another file", rustix::io::Errno::IO);
    publish(&node, NODE, "a").await.unwrap();
    wait_for(|| complete(&node) == 1, || "no copy".into()).await;
    node.wait_for_calls("loop0: another file", 1).await;
    node.kernel.allow();
    // The kernel keeps what is mounted, and the double what somebody holds.
    let _earlier = std::sync::Arc::clone(&node.volumes);
    node.restart();
    node.volumes.tend_copies_now().await.unwrap();
    moved(&node).await;
    let _earlier = std::sync::Arc::clone(&node.volumes);
    node.restart();
    node.log();
    node.volumes.tend_copies_now().await.unwrap();
    let asked = node.log().into_iter().any(|call| call.starts_with("mount") || call.starts_with("loop"));
    assert!(!asked, "what stands on its copy is left alone, and no server is asked");
}

#[tokio::test]
async fn a_staged_volume_is_known_again_on_the_copy_that_it_was_moved_to() {
    let mut node = Node::new().await;
    let mount = volume(&node, NODE);
    node.volumes.stage("v", &mount).await.unwrap();
    let target = node.target("a");
    let publication = Publication { volume_id: "v".into(), ..Publication::by_hand(target, mount, true) };
    node.volumes.publish(publication.clone(), true).await.unwrap();
    moved(&node).await;
    let _earlier = std::sync::Arc::clone(&node.volumes);
    node.restart();
    node.stop_server().await;
    let other = Publication { target: node.target("b"), ..publication };
    node.volumes.publish(other, true).await.unwrap();
    assert_eq!(node.kernel.live_loop_devices(), [0]);
    assert!(!node.log().iter().any(|call| call.starts_with("mount nfs")));
}

#[tokio::test]
async fn a_copy_that_somebody_cut_is_thrown_away_and_made_again() {
    let node = Node::new().await;
    publish(&node, NODE, "a").await.unwrap();
    moved(&node).await;
    unpublish(&node, "a").await;
    node.assert_nothing_held().await;
    let id = copies::list(&node.cache_dir()).unwrap()[0].original.id();
    let path = node.cache_dir().join(format!("{id}.image"));
    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path).unwrap().write_all_at(b"hsqs", 0).unwrap();
    publish(&node, NODE, "b").await.unwrap();
    moved(&node).await;
    assert_eq!(std::fs::metadata(path).unwrap().len(), 4096);
}

#[tokio::test]
async fn an_image_that_is_verified_shares_no_device_with_the_same_one_that_is_not_and_both_are_moved_to_the_copy() {
    let node = Node::new().await;
    let image = std::fs::File::options().read(true).write(true).open(node.kernel.export().join("image.sqsh")).unwrap();
    let root = verity::hexadecimal(&verity::seal(&image).unwrap());
    let verified: &[(&str, &str)] = &[("verity", &root)];
    for (parameters, pod) in [(verified, "a"), (verified, "b"), (&[], "c")] {
        publish(&node, parameters, pod).await.unwrap();
    }
    let log = node.log();
    let of = |what: &str| log.iter().filter(|call| call.contains(what)).count();
    assert_eq!((of("an image of"), of("verified by"), of("source=/dev/loop1")), (2, 1, 2), "{log:#?}");
    assert_eq!(condition(&node, "a").await, None);
    publish(&node, &[("verity", &root), ("cache", "node")], "d").await.unwrap();
    node.wait_for_calls("loop", 2).await;
    assert_eq!(node.kernel.live_loop_devices(), [0, 1]);
    node.kernel.corrupt();
    let abnormal = condition(&node, "b").await.unwrap();
    assert!(abnormal.contains("other bytes than its root hash says"), "{abnormal}");
    assert_eq!(condition(&node, "c").await, None);
    for pod in ["a", "b", "c", "d"] {
        unpublish(&node, pod).await;
    }
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn of_a_sif_the_whole_file_is_copied_and_the_device_of_its_part_moved() {
    let mut node = Node::new().await;
    let sif = sif::example(&squashfs(4096), 36864, 1);
    std::fs::write(node.kernel.export().join("image.sqsh"), &sif).unwrap();
    let of_sif: &[(&str, &str)] = &[("fsType", "sif"), ("cache", "node")];
    publish(&node, of_sif, "a").await.unwrap();
    node.wait_for_calls("loop0: another file of 40960 bytes", 1).await;
    node.stop_server().await;
    publish(&node, of_sif, "b").await.unwrap();
    assert_eq!(node.kernel.live_loop_devices(), [0]);
    for pod in ["a", "b"] {
        unpublish(&node, pod).await;
    }
    node.assert_nothing_held().await;
    // Of the copy alone, after a reboot.
    node.restart();
    node.log();
    publish(&node, of_sif, "c").await.unwrap();
    assert!(node.log().contains(&"loop0: 4096 bytes at 36864 of an image of 40960 bytes".to_owned()));
}

#[tokio::test]
async fn an_image_without_a_hash_tree_is_refused_where_its_volume_names_a_root_hash() {
    let node = Node::new().await;
    let error = publish(&node, &[("verity", &"0".repeat(64))], "a").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("see 'seal'"), "{error}");
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn a_signed_image_is_attached_only_where_the_signature_beside_it_is_one() {
    let mut node = Node::new().await;
    // The public key in the documentation of minisign.
    node.policy("trustedKeys: [RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3]");
    let refused = async |node: &Node, kind, why: &str| {
        let error = publish(node, &[("verity", "signed")], "a").await.unwrap_err();
        assert!(error.kind == kind && error.message.contains(why), "{error}");
        assert_eq!(node.kernel.live_loop_devices(), [0; 0]);
    };
    let image = std::fs::File::options().read(true).write(true).open(node.kernel.export().join("image.sqsh")).unwrap();
    verity::seal(&image).unwrap();
    refused(&node, Kind::NotFound, "image.sqsh.root").await;
    let write = |end: &str, text: &str| {
        std::fs::write(node.kernel.export().join(format!("image.sqsh.root{end}")), text).unwrap()
    };
    write("", &"0".repeat(64));
    refused(&node, Kind::NotFound, "image.sqsh.root.minisig").await;
    for signature in ["", "untrusted comment: a\n", &"x".repeat(10_000)] {
        write(".minisig", signature);
        refused(&node, Kind::PermissionDenied, "is no signature of minisign(1)").await;
    }
    // A right signature of other bytes.
    let signature = "untrusted comment: signature from minisign secret key\n\
        RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n\
        trusted comment: timestamp:1556193335\tfile:test\n\
        y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==\n";
    write(".minisig", signature);
    refused(&node, Kind::PermissionDenied, "by none of the policy's trustedKeys").await;
    node.assert_nothing_held().await;
}
