//! What the core asks of the kernel, in which order and with which flags; and what it leaves when the kernel refuses.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::TcpListener;

use super::fixture::{Node, answer_null_calls, squashfs, wait_for};
use super::publication::{Publication, by_hand};
use crate::error::Kind;
use crate::kernel::Kernel;
use crate::kernel::loop_device::Tag;
use crate::kernel::mount::{NewMount, open_directory};
use crate::kernel::sif;
use crate::kernel::verity::{self, hexadecimal};
use crate::spec::parameters::parse_attributes;

const DIRECTORY: &str = r#"{"kind":"directory"}"#;

/// The calls by which the image of a [`Node`] comes to a loop device.
const STAGED: [&str; 4] = [
    "mount nfs4 source=127.0.0.1:/images,vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,port=PORT,ro [ro,nosuid,nodev]",
    "attach 127.0.0.1:/images (nfs 4.2, 127.0.0.1) at namespace/nfs-N",
    "loop0: an image of 4096 bytes",
    "mount squashfs source=/dev/loop0,ro []",
];

#[tokio::test]
async fn staging_mounts_the_export_out_of_sight_and_reads_the_superblock_while_the_server_answers() {
    let node = Node::new().await;
    let mount = node.allowed(&node.image(""));
    node.volumes.stage("v", &mount).await.unwrap();
    assert_eq!(node.log(), STAGED);
    node.volumes.stage("v", &mount).await.unwrap();
    assert_eq!(node.log(), [""; 0], "staging the same again is no work");
    let error = node.volumes.stage("v", &node.allowed(&node.nfs("/images"))).await.unwrap_err();
    assert_eq!(error.kind, Kind::AlreadyExists);
    node.volumes.unstage("v").await.unwrap();
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn a_staged_image_is_published_by_one_mount_and_attached_last() {
    let node = Node::new().await;
    node.volumes.stage("v", &node.allowed(&node.image(""))).await.unwrap();
    node.log();
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    let calls = ["mount squashfs source=/dev/loop0,ro []", "attach squashfs on /dev/loop0 at pods/pod/mount"];
    assert_eq!(node.log(), calls);
    assert_eq!(node.publish("v", &node.image(""), "pod").await.unwrap(), target);
    assert_eq!(node.log(), [""; 0], "publishing the same again is no work");
    assert_eq!(node.publish("w", &node.image(""), "pod").await.unwrap_err().kind, Kind::AlreadyExists);
    node.volumes.unpublish("v", &target).await.unwrap();
    assert_eq!(node.log(), ["unmount pods/pod/mount"]);
    assert!(!target.exists() && node.records().is_empty());
    node.volumes.unpublish("v", &target).await.unwrap();
    assert_eq!(node.kernel.live_loop_devices(), [0], "the volume is still staged");
}

#[tokio::test]
async fn an_overlay_is_put_together_out_of_sight_with_its_upper_on_the_disk() {
    let node = Node::new().await;
    let spec = node.overlay(DIRECTORY);
    let target = node.publish("v", &spec, "pod").await.unwrap();
    let calls = node.log();
    assert_eq!(calls[..4], STAGED);
    let [image, upper, one, two, overlay, rest @ ..] = &calls[4..] else { panic!("{calls:?}") };
    assert_eq!(image, "mount squashfs source=/dev/loop0,ro []");
    assert!(upper.starts_with("bind data/published/") && upper.ends_with(" [nosuid,nodev]"), "{upper}");
    assert_eq!(one, "attach squashfs on /dev/loop0 at namespace/build-N/0-loop0");
    assert_eq!(two, "attach directory at namespace/build-N/upper");
    let options = "source=test.csi.dev,lowerdir=0-loop0,redirect_dir=nofollow,metacopy=off,index=off,upperdir=upper/upper,\
                   workdir=upper/work";
    assert_eq!(*overlay, format!("mount overlay {options} [nosuid,nodev]"));
    let mut workspace = rest[..2].to_vec();
    workspace.sort();
    assert_eq!(workspace, ["unmount namespace/build-N/0-loop0", "unmount namespace/build-N/upper"], "{calls:?}");
    assert_eq!(rest[2..], ["attach overlay of 1 layers at pods/pod/mount"]);
    node.volumes.unpublish("v", &target).await.unwrap();
    node.volumes.finish_deletions();
    assert!(node.records().is_empty());
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn what_dead_servers_keep_from_being_released_is_in_the_way_of_no_unpublish() {
    let node = Node::new().await;
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = Arc::new(Mutex::new(gate));
    let stuck = |_| {
        let gate = Arc::clone(&gate);
        tokio::spawn(crate::blocking::release("a release that hangs", move || {
            let _ = gate.lock().unwrap().recv();
            Ok::<_, crate::error::Error>(())
        }))
    };
    let stuck: Vec<_> = (0..200).map(stuck).collect();
    node.volumes.unpublish("v", &target).await.unwrap();
    assert!(!target.exists());
    drop(open);
    for release in stuck {
        release.await.unwrap().unwrap();
    }
}

#[test]
fn a_layer_is_as_small_as_the_template_and_no_smaller() {
    assert_eq!(crate::kernel::scratch::SMALLEST, crate::spec::Upper::SMALLEST_DIRECTORY);
}

#[tokio::test]
async fn an_upper_with_a_size_is_a_file_system_in_a_file() {
    let node = Node::new().await;
    let spec = node.overlay(r#"{"kind":"directory","size":"1Gi"}"#);
    let target = node.publish("v", &spec, "pod").await.unwrap();
    let calls = node.log();
    assert!(calls.contains(&"mount layer of 1073741824 bytes".to_owned()), "{calls:?}");
    node.volumes.unpublish("v", &target).await.unwrap();
    node.volumes.finish_deletions();
    assert!(node.records().is_empty());
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn an_image_has_the_flags_that_are_asked_for_and_no_others() {
    let node = Node::new().await;
    let publish = async |spec: String, pod: &str, read_only| {
        let publication = Publication { read_only, ..node.publication(pod, &spec, pod) };
        node.volumes.publish(publication, false).await.unwrap();
        node.log().into_iter().filter(|call| call.starts_with("restrict")).collect::<Vec<_>>()
    };
    // The kernel refuses an overlay of one layer alone, and nothing is written to it: its superblock is read-only.
    let tmpfs = node.overlay(r#"{"kind":"tmpfs","size":"1Mi"}"#);
    assert_eq!(publish(tmpfs.clone(), "a", true).await, [""; 0]);
    assert_eq!(publish(tmpfs, "b", false).await, [""; 0]);
    let flags = node.image(r#","mount_options":["noexec","nosuid","nodev"]"#);
    assert_eq!(publish(flags, "c", false).await, ["restrict squashfs on /dev/loop0 [nosuid,nodev,noexec]"]);
    // Neither has a directory of an image, but what is no image is confined.
    let directory =
        |mount: &str| format!(r#"{{"kind":"bind","bind":{{"path":"","base":"mount","ro":true,"mount":{mount}}}}}"#);
    let image = node.image("");
    let read_only = async |spec: String, pod: &str| {
        let publication = Publication { read_only: true, ..node.publication(pod, &spec, pod) };
        node.volumes.publish(publication, false).await.unwrap();
        node.log()
            .into_iter()
            .filter(|call| call.starts_with("bind") || call.starts_with("restrict"))
            .collect::<Vec<_>>()
    };
    let bound = read_only(directory(&image), "e").await;
    assert!(bound.len() == 1 && bound[0].ends_with(" []"), "{bound:?}");
    let layers = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{image},{}]}}}}"#, directory(&image));
    assert_eq!(read_only(layers, "f").await.last().unwrap(), "restrict overlay of 2 layers [ro]");
    // Where somebody mounts one by hand, anybody on the node may come.
    let mount = node.publication("d", &node.image(""), "d");
    let by_hand = Publication { volume_id: by_hand(&mount.target), ..mount };
    node.volumes.publish(by_hand, false).await.unwrap();
    assert!(node.log().contains(&"restrict squashfs on /dev/loop0 [nosuid,nodev]".to_owned()));
}

#[tokio::test]
async fn a_directory_of_the_node_is_given_only_to_who_mounts_it_read_only() {
    let node = Node::with("hostPaths: [/srv]", Duration::from_secs(60)).await;
    let bind = r#"{"kind":"bind","bind":{"path":"/srv/tools","base":"root","recursive":true,"ro":false}}"#;
    let publication = Publication { read_only: true, ..node.publication("v", bind, "pod") };
    node.volumes.publish(publication, false).await.unwrap();
    assert_eq!(node.log()[0], "bind recursively host/srv/tools [ro,nosuid,nodev]");
    let inside = format!(r#"{{"kind":"bind","bind":{{"path":"a","base":"mount","ro":true,"mount":{bind}}}}}"#);
    let single = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{bind}],"upper":{{"kind":"none"}}}}}}"#);
    for spec in [bind, &inside, &single] {
        let error = node.publish("v", spec, "other").await.unwrap_err();
        assert_eq!(error.kind, Kind::FailedPrecondition);
        assert!(error.message.contains("\"readOnly: true\""), "{error}");
        assert_eq!(node.log(), [""; 0]);
    }
    let layer = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{bind}],"upper":{DIRECTORY}}}}}"#);
    node.publish("w", &layer, "other").await.unwrap();
}

#[tokio::test]
async fn what_is_shown_read_only_of_a_writable_export_has_a_superblock_that_is() {
    let node = Node::new().await;
    let nfs = node.nfs("/images").replace(r#""ro":true"#, r#""ro":false"#);
    let bind = format!(r#"{{"kind":"bind","bind":{{"path":"","base":"mount","ro":true,"mount":{nfs}}}}}"#);
    let single = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{nfs}],"upper":{{"kind":"none"}}}}}}"#);
    for (pod, spec) in [("a", &bind), ("b", &single)] {
        let target = node.publish(pod, spec, pod).await.unwrap();
        let log = node.log();
        assert!(log[0].ends_with(",ro [ro,nosuid,nodev]"), "{log:?}");
        node.volumes.unpublish(pod, &target).await.unwrap();
        node.assert_nothing_held().await;
        node.log();
    }
    node.publish("c", &nfs, "c").await.unwrap();
    assert!(node.log()[0].ends_with("PORT [nosuid,nodev]"));
}

#[tokio::test]
async fn a_kernel_that_makes_a_read_only_export_writable_is_told_from_others() {
    let node = Node::new().await;
    node.kernel.ignore_read_only();
    let error = node.publish("v", &node.nfs("/images"), "pod").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("mount 127.0.0.1:/images read-only"), "{error}");
    node.assert_nothing_held().await;
    // What is in an image is only read.
    node.publish("v", &node.image(""), "pod").await.unwrap();
}

#[tokio::test]
async fn a_server_that_says_it_is_another_one_is_refused() {
    let node = Node::new().await;
    node.kernel.merge_with("127.0.0.9", "");
    let error = node.publish("v", &node.image(""), "pod").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("it says that it is the server at 127.0.0.9"), "{error}");
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn a_server_that_the_kernel_takes_for_another_one_is_mounted_by_another_minor_version() {
    let mut node = Node::new().await;
    node.kernel.merge_with("127.0.0.9", "4.2");
    node.publish("v", &node.image(""), "pod").await.unwrap();
    let log = node.log();
    assert!(log.iter().any(|line| line.contains("vers=4.1,addr=127.0.0.1")), "{log:?}");
    // Unless the admin has something against it.
    node.policy(r#"nfsVersions: ["4.2"]"#);
    let error = node.publish("w", &node.nfs("/images"), "other").await.unwrap_err();
    assert!(error.message.contains("it says that it is the server at 127.0.0.9"), "{error}");
}

#[tokio::test]
async fn what_the_kernel_would_read_by_a_connection_in_the_clear_is_mounted_by_another_minor_version_or_refused() {
    let mut node = Node::new().await;
    let spec = node.nfs_at("127.0.0.1", "/images").replace(r#""options":["#, r#""options":["xprtsec=tls","#);
    node.kernel.merge_with("127.0.0.1", "4.2");
    node.publish("v", &spec, "pod").await.unwrap();
    let log = node.log();
    assert!(log.iter().any(|line| line.contains("vers=4.1,addr=127.0.0.1") && line.contains("xprtsec=tls")), "{log:?}");
    node.policy(r#"nfsVersions: ["4.2"]"#);
    let error = node.publish("w", &spec, "other").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("has already, with sec=sys, xprtsec=none"), "{error}");
}

#[tokio::test]
async fn volumes_find_a_server_that_has_moved_and_those_that_run_keep_their_mount() {
    let mut node = Node::new().await;
    node.policy("servers: [{host: images, addresses: [127.0.0.8, 127.0.0.9]}]");
    let listen = async |address: &str, port| {
        let listener = TcpListener::bind((address, port)).await.unwrap();
        (listener.local_addr().unwrap().port(), tokio::spawn(answer_null_calls(listener)))
    };
    let (port, server) = listen("127.0.0.8", 0).await;
    let spec = node.nfs_at("images", "/images").replace(&node.port.to_string(), &port.to_string());
    let target = node.publish("v", &spec, "pod").await.unwrap();
    let mounts = |node: &Node| {
        let log = node.log().into_iter().filter(|line| line.starts_with("mount nfs4"));
        log.map(|line| line.split(',').find(|option| option.starts_with("addr=")).unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(mounts(&node), ["addr=127.0.0.8"]);
    server.abort();
    while tokio::net::TcpStream::connect(("127.0.0.8", port)).await.is_ok() {
        tokio::task::yield_now().await;
    }
    let error = node.publish("w", &spec, "other").await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert_eq!(mounts(&node), [""; 0]);
    let _server = listen("127.0.0.9", port).await;
    for volume in ["w", "x"] {
        node.publish(volume, &spec, volume).await.unwrap();
    }
    assert_eq!(mounts(&node), ["addr=127.0.0.9"]);
    assert_eq!(node.kernel.left_in_namespace().len(), 2);
    node.volumes.unpublish("v", &target).await.unwrap();
    wait_for(|| node.kernel.left_in_namespace().len() == 1, || "the old mount is still there".into()).await;
}

#[tokio::test]
async fn a_crowd_on_one_image_shares_one_mount_and_one_loop_device() {
    let node = Node::new().await;
    let stage = async |id: &str| node.volumes.stage(id, &node.allowed(&node.image(""))).await.unwrap();
    tokio::join!(stage("a"), stage("b"), stage("c"), stage("d"));
    assert_eq!(node.log(), STAGED);
    for id in ["a", "b", "c", "d"] {
        assert_eq!(node.kernel.live_loop_devices(), [0]);
        node.volumes.unstage(id).await.unwrap();
    }
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn an_image_that_was_replaced_gets_a_device_of_its_own() {
    let node = Node::new().await;
    node.volumes.stage("old", &node.allowed(&node.image(""))).await.unwrap();
    std::fs::write(node.kernel.export().join("next"), squashfs(8192)).unwrap();
    std::fs::rename(node.kernel.export().join("next"), node.kernel.export().join("image.sqsh")).unwrap();
    node.log();
    node.volumes.stage("new", &node.allowed(&node.image(""))).await.unwrap();
    assert_eq!(node.log()[0], "loop1: an image of 8192 bytes");
}

#[tokio::test]
async fn whatever_the_kernel_refuses_leaves_nothing() {
    let node = Node::new().await;
    let calls = [
        ("mount nfs4", Errno::ACCESS, Kind::PermissionDenied),
        ("attach 127.0.0.1", Errno::NOMEM, Kind::ResourceExhausted),
        ("loop0", Errno::NOENT, Kind::Internal),
        ("mount squashfs", Errno::INVAL, Kind::FailedPrecondition),
        ("data/published", Errno::IO, Kind::Internal),
        ("attach directory", Errno::IO, Kind::Internal),
        ("mount overlay", Errno::INVAL, Kind::FailedPrecondition),
        ("attach overlay", Errno::NOSPC, Kind::ResourceExhausted),
    ];
    for (call, errno, kind) in calls {
        node.kernel.refuse(call, errno);
        let error = node.publish("v", &node.overlay(DIRECTORY), "pod").await.expect_err(call);
        assert_eq!((error.kind, error.errno()), (kind, Some(errno)), "{call}: {error}");
        assert!(!node.target("pod").exists() && node.records().is_empty(), "{call}");
        node.assert_nothing_held().await;
        node.kernel.allow();
    }
    node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
}

#[tokio::test]
async fn a_late_call_names_its_step_a_repeated_one_joins_and_unstage_does_not_wait() {
    let node = Node::with("{}", Duration::from_secs(1)).await;
    node.kernel.hold("mount nfs4");
    let mount = node.allowed(&node.image(""));
    let stage = || node.volumes.stage("v", &mount);
    let (one, two) = tokio::join!(stage(), stage());
    for late in [one, two] {
        let error = late.unwrap_err();
        assert_eq!(error.kind, Kind::DeadlineExceeded);
        assert!(error.message.contains("still at: mount 127.0.0.1:/images (nfs 4.2, 127.0.0.1)"), "{error}");
    }
    assert_eq!(node.log().len(), 1, "the second call joined the first");
    // It takes the disk, which may be busy for longer than this timeout: asked again it joins, as a stage does.
    let mut unstaged = node.volumes.unstage("v").await;
    for _ in 0..30 {
        match &unstaged {
            Err(error) if error.kind == Kind::DeadlineExceeded => unstaged = node.volumes.unstage("v").await,
            Err(_) | Ok(()) => break,
        }
    }
    unstaged.unwrap();
    node.kernel.release();
    // What the stage waits for ends, and is let go of; nothing more is begun.
    let log = std::cell::RefCell::new(Vec::new());
    let is_unmounted = || {
        log.borrow_mut().extend(node.log());
        log.borrow().iter().any(|call| call == "unmount namespace/nfs-N")
    };
    wait_for(is_unmounted, || format!("{:?}", log.borrow())).await;
    assert!(!log.borrow().iter().any(|call| call.starts_with("mount squashfs")), "{log:?}");
    node.assert_nothing_held().await;
    assert_eq!(node.volumes.observe().await.unwrap().staged, 0);
}

#[tokio::test]
async fn a_server_that_hangs_below_an_overlay_takes_no_place_of_another() {
    let node = Node::new().await;
    node.kernel.hold("mount overlay");
    let (slow, good) = (node.nfs_at("127.0.0.1", "/slow"), node.nfs_at("127.0.0.2", "/good"));
    let spec = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{slow},{good}],"upper":{DIRECTORY}}}}}"#);
    let publish = |number: usize| {
        let publication = node.publication(&format!("v{number}"), &spec, &format!("pod-{number}"));
        let volumes = Arc::clone(&node.volumes);
        tokio::spawn(async move { volumes.publish(publication, false).await })
    };
    let publishes: Vec<_> = (0..20).map(publish).collect();
    node.wait_for_calls("mount overlay", 16).await;
    node.volumes.stage("good", &node.allowed(&node.nfs_at("127.0.0.2", "/other"))).await.unwrap();
    node.kernel.release();
    for publish in publishes {
        publish.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn who_unpublishes_another_volume_ends_no_publish() {
    let node = Node::new().await;
    node.volumes.stage("v", &node.allowed(&node.image(""))).await.unwrap();
    node.kernel.hold("mount squashfs");
    let publication = node.publication("v", &node.image(""), "pod");
    let (volumes, target) = (Arc::clone(&node.volumes), publication.target.clone());
    let publish = tokio::spawn(async move { volumes.publish(publication, true).await });
    node.wait_for_calls("mount squashfs source=/dev/loop0", 1).await;
    let (volumes, other) = (Arc::clone(&node.volumes), target.clone());
    let mut unpublish = tokio::spawn(async move { volumes.unpublish("w", &other).await });
    // It waits for its turn, or would have ended the publish by now.
    tokio::time::timeout(Duration::from_millis(50), &mut unpublish).await.unwrap_err();
    assert!(!publish.is_finished());
    node.kernel.release();
    publish.await.unwrap().unwrap();
    assert_eq!(unpublish.await.unwrap().unwrap_err().kind, Kind::NotFound);
    node.volumes.unpublish("v", &target).await.unwrap();
}

#[tokio::test]
async fn a_path_that_a_claim_named_goes_through_no_symlink() {
    let node = Node::new().await;
    std::os::unix::fs::symlink("image.sqsh", node.kernel.export().join("link.sqsh")).unwrap();
    let spec = node.image("").replace("image.sqsh", "link.sqsh");
    let allowed = |symlinks: &str| {
        let attributes = BTreeMap::from([("mountSpec".into(), spec.clone()), ("symlinks".into(), symlinks.into())]);
        node.volumes.allow(parse_attributes(&attributes, &[]).unwrap(), None).unwrap()
    };
    node.volumes.stage("v", &allowed("follow")).await.unwrap();
    let error = node.volumes.stage("w", &allowed("refuse")).await.unwrap_err();
    assert_eq!(error.kind, Kind::PermissionDenied);
    assert!(error.message.contains("goes through a symlink"), "{error}");
}

#[tokio::test]
async fn a_namespace_that_waits_for_its_share_makes_no_other_wait() {
    let node = Node::new().await;
    node.kernel.hold("mount nfs4 source=127.0.0.1:/pit");
    let publish = |host: &str, path: &str, namespace: &str, pod: String| {
        let spec = node.nfs_at(host, path);
        let publication = Publication { namespace: Some(namespace.into()), ..node.publication(&pod, &spec, &pod) };
        let volumes = Arc::clone(&node.volumes);
        tokio::spawn(async move { volumes.publish(publication, false).await })
    };
    let pits: Vec<_> =
        (0..40).map(|pit| publish("127.0.0.1", &format!("/pit-{pit}"), "pits", format!("pit-{pit}"))).collect();
    node.wait_for_calls("", 16).await;
    let late = publish("127.0.0.2", "/good", "pits", "late".into());
    tokio::task::yield_now().await;
    publish("127.0.0.2", "/good", "other", "other".into()).await.unwrap().unwrap();
    node.kernel.release();
    for publish in pits.into_iter().chain([late]) {
        publish.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn the_writable_layers_of_a_namespace_are_no_more_than_the_policy_says() {
    let policy = "writableLayers: {perNamespace: {count: 2, size: 100Mi}}";
    let node = Node::with(policy, Duration::from_secs(60)).await;
    let publish = async |pod: &str, namespace: &str, size: &str| {
        let spec = node.overlay(&format!(r#"{{"kind":"tmpfs","size":"{size}"}}"#));
        let publication = Publication { namespace: Some(namespace.into()), ..node.publication(pod, &spec, pod) };
        node.volumes.publish(publication, false).await
    };
    publish("a", "team", "40Mi").await.unwrap();
    let error = publish("b", "team", "61Mi").await.unwrap_err();
    assert_eq!(error.kind, Kind::ResourceExhausted);
    assert!(error.message.contains("namespace team on one node 104857600 bytes"), "{error}");
    publish("b", "team", "60Mi").await.unwrap();
    assert!(publish("c", "team", "1Mi").await.unwrap_err().message.contains("2 writable layers"));
    publish("c", "other", "100Mi").await.unwrap();
    node.volumes.unpublish("a", &node.target("a")).await.unwrap();
    publish("d", "team", "1Mi").await.unwrap();
}

#[tokio::test]
async fn a_published_path_survives_the_driver_with_its_scratch_layer() {
    let mut node = Node::new().await;
    let spec = node.overlay(DIRECTORY);
    let target = node.publish("v", &spec, "pod").await.unwrap();
    node.restart();
    node.publish("v", &spec, "pod").await.unwrap();
    // As after a reboot of the node: the mount is gone, and what the pod wrote is not.
    let scratch = std::fs::read_dir(&node.records()[0]).unwrap().map(|entry| entry.unwrap().path());
    let scratch = scratch.into_iter().find(|path| path.is_dir()).unwrap();
    std::fs::create_dir_all(scratch.join("upper")).unwrap();
    std::fs::write(scratch.join("upper/mine"), "1").unwrap();
    node.kernel.take_off(&target);
    node.restart();
    // It is not lost either where the first try fails.
    node.kernel.refuse("mount overlay", Errno::NOMEM);
    node.publish("v", &spec, "pod").await.unwrap_err();
    node.kernel.allow();
    node.publish("v", &spec, "pod").await.unwrap();
    assert!(scratch.join("upper/mine").exists());
    node.volumes.unpublish("v", &target).await.unwrap();
    assert!(node.records().is_empty());
}

/// Replaces the one record that there is.
fn rewrite(node: &Node, text: &str) {
    std::fs::write(node.records()[0].join("volume.json"), text).unwrap();
}

#[tokio::test]
async fn what_an_earlier_version_published_is_published_and_can_be_unpublished() {
    let mut node = Node::new().await;
    let target = node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
    let text = include_str!("record/golden/version-0/seed.json");
    let port = format!(r#"[{{"key": "port", "value": "{}"}}]"#, node.port);
    let text = text
        .replace("pvc-seed", "v")
        .replace("192.168.3.253", "127.0.0.1")
        .replace("\"options\": []", &format!("\"options\": {port}"));
    let text = text.replace("/var/lib/kubelet/pods/seed/mount", target.to_str().unwrap());
    rewrite(&node, &text.replace("\"exclusive\": true", "\"exclusive\": false"));
    node.restart();
    node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
    assert_eq!(node.volumes.observe().await.unwrap().published[0].volume_id, "v");
    node.volumes.unpublish("v", &target).await.unwrap();
    assert!(node.records().is_empty());
}

#[tokio::test]
async fn a_record_of_a_newer_version_costs_no_pod_its_scratch_layer_or_its_unmount() {
    let mut node = Node::new().await;
    let spec = node.overlay(DIRECTORY);
    let target = node.publish("v", &spec, "pod").await.unwrap();
    rewrite(&node, &format!(r#"{{"version": 99, "volumeId": "v", "target": "{}"}}"#, target.display()));
    let directory = node.records().remove(0);
    let files = || {
        let mut files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    };
    let before = files();
    assert_eq!(before.len(), 2);
    node.restart();
    for mounted in [true, false] {
        if !mounted {
            node.kernel.take_off(&target);
        }
        let error = node.publish("v", &spec, "pod").await.unwrap_err();
        assert_eq!(error.kind, Kind::FailedPrecondition);
        assert!(error.message.contains("volume.json cannot be read: it is of version 99"), "{error}");
    }
    let stats = node.volumes.stats("v", &target).await.unwrap();
    assert!(stats.usage.is_none() && stats.abnormal.unwrap().message.contains("version 99"));
    let observed = node.volumes.observe().await.unwrap();
    assert_eq!((observed.unreadable_records, observed.abnormal), (1, 1));

    // Its pod is gone, as is that of a record which can be read.
    let other = node.publish("w", &spec, "other").await.unwrap();
    node.kernel.take_off(&other);
    for gone in [&target, &other] {
        std::fs::remove_dir_all(gone.parent().unwrap()).unwrap();
    }
    node.volumes.sweep();
    wait_for(|| node.records().len() == 1, || "the other record stays".into()).await;
    assert_eq!(node.volumes.unpublish("w", &target).await.unwrap_err().kind, Kind::NotFound);
    assert_eq!(files(), before);
    node.volumes.unpublish("v", &target).await.unwrap();
    assert!(node.records().is_empty());
}

#[tokio::test]
async fn a_record_that_a_power_cut_tore_is_in_nobody_s_way_and_what_lies_beside_one_is_kept() {
    let mut node = Node::new().await;
    for text in ["", "{\"version\": 1, \"vol"] {
        let target = node.publish("v", &node.image(""), "pod").await.unwrap();
        rewrite(&node, text);
        node.kernel.take_off(&target);
        node.restart();
        node.publish("v", &node.image(""), "pod").await.unwrap();
        node.volumes.unpublish("v", &target).await.unwrap();
    }
    let target = node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
    rewrite(&node, "");
    node.kernel.take_off(&target);
    node.restart();
    let error = node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert_eq!(std::fs::read_dir(&node.records()[0]).unwrap().count(), 2);
    node.volumes.unpublish("v", &target).await.unwrap();
    assert!(node.records().is_empty());
}

#[tokio::test]
async fn a_record_that_the_disk_does_not_give_is_no_reason_to_remove_anything() {
    let node = Node::new().await;
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    let file = node.records()[0].join("volume.json");
    std::fs::remove_file(&file).unwrap();
    // To read a directory as a file fails, as a broken disk does.
    std::fs::create_dir(&file).unwrap();
    assert_eq!(node.volumes.unpublish("v", &target).await.unwrap_err().kind, Kind::Internal);
    assert_eq!(node.publish("v", &node.image(""), "pod").await.unwrap_err().kind, Kind::Internal);
    assert!(file.exists() && node.kernel.is_mount(&target).unwrap());
}

#[tokio::test]
async fn a_restarted_driver_finds_the_loop_device_of_what_is_mounted() {
    let mut node = Node::new().await;
    node.publish("v", &node.image(""), "pod").await.unwrap();
    // What is mounted holds the device, as this does.
    let _before = Arc::clone(&node.volumes);
    node.restart();
    node.log();
    node.publish("v", &node.image(""), "other").await.unwrap();
    assert!(!node.log().iter().any(|call| call.starts_with("loop")));
    assert_eq!(node.kernel.live_loop_devices(), [0]);
}

#[tokio::test]
async fn a_staged_volume_is_published_after_a_restart_without_its_server_and_with_the_image_it_had() {
    let mut node = Node::new().await;
    node.volumes.stage("v", &node.allowed(&node.image(""))).await.unwrap();
    node.publish("v", &node.image(""), "old").await.unwrap();
    std::fs::write(node.kernel.export().join("next"), squashfs(8192)).unwrap();
    std::fs::rename(node.kernel.export().join("next"), node.kernel.export().join("image.sqsh")).unwrap();
    // What the mount of the pod holds.
    let held = node.kernel.loop_devices(&Tag::new("test.csi.dev")).unwrap();
    node.restart();
    node.kernel.refuse("mount nfs", Errno::CONNREFUSED);
    wait_for(|| node.kernel.left_in_namespace().is_empty(), || "the export is still mounted".into()).await;
    node.log();
    node.publish("v", &node.image(""), "new").await.unwrap();
    let mount = "mount squashfs source=/dev/loop0,ro []";
    assert_eq!(node.log(), [mount, mount, "attach squashfs on /dev/loop0 at pods/new/mount"]);
    drop(held);
    assert_eq!(node.kernel.live_loop_devices(), [0], "the volume is staged again");
    for pod in ["old", "new"] {
        node.volumes.unpublish("v", &node.target(pod)).await.unwrap();
    }
    node.volumes.unstage("v").await.unwrap();
    node.assert_nothing_held().await;
    assert_eq!(std::fs::read_dir(node.data_dir().join("staged")).unwrap().count(), 0);
    // Nothing holds the image: it is what the server has now.
    node.kernel.allow();
    node.volumes.stage("v", &node.allowed(&node.image(""))).await.unwrap();
    assert!(node.log().contains(&"loop0: an image of 8192 bytes".to_owned()));
}

#[tokio::test]
async fn no_server_is_asked_for_a_volume_that_the_policy_does_not_allow_any_more() {
    let mut node = Node::new().await;
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    node.policy("servers: [{host: elsewhere}]");
    node.log();
    let stats = node.volumes.stats("v", &target).await.unwrap();
    assert!(stats.abnormal.unwrap().message.contains("server \"127.0.0.1\" is not allowed by the policy"));
    assert!(!node.log().iter().any(|call| call.starts_with("mount")));
    node.volumes.unpublish("v", &target).await.unwrap();
}

#[tokio::test]
async fn a_volume_for_one_pod_is_published_once_also_where_its_record_cannot_be_read() {
    let node = Node::new().await;
    let publish = async |pod: &str| {
        let publication = Publication { exclusive: true, ..node.publication("v", &node.image(""), pod) };
        node.volumes.publish(publication, true).await
    };
    publish("a").await.unwrap();
    assert_eq!(publish("b").await.unwrap_err().kind, Kind::FailedPrecondition);
    rewrite(&node, &format!(r#"{{"version": 99, "volumeId": "v", "target": "{}"}}"#, node.target("a").display()));
    assert_eq!(publish("b").await.unwrap_err().kind, Kind::FailedPrecondition);
}

#[tokio::test]
async fn a_foreign_mount_is_left_alone() {
    let node = Node::new().await;
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    node.volumes.unpublish("v", &target).await.unwrap();
    std::fs::create_dir(&target).unwrap();
    let foreign = node.kernel.mount(NewMount::new("tmpfs", "tmpfs of somebody")).unwrap();
    node.kernel.attach(&foreign, open_directory(&target).unwrap().as_fd()).unwrap();
    assert_eq!(node.publish("v", &node.image(""), "pod").await.unwrap_err().kind, Kind::AlreadyExists);
    assert_eq!(node.volumes.unpublish("v", &target).await.unwrap_err().kind, Kind::FailedPrecondition);
    assert!(node.kernel.is_mount(&target).unwrap());
}

#[tokio::test]
async fn a_volume_that_is_not_mounted_any_more_is_abnormal() {
    let node = Node::new().await;
    let target = node.publish("v", &node.image(""), "pod").await.unwrap();
    let stats = node.volumes.stats("v", &target).await.unwrap();
    assert!(stats.usage.is_some() && stats.abnormal.is_none(), "{stats:?}");
    assert_eq!(node.volumes.stats("w", &target).await.unwrap_err().kind, Kind::NotFound);
    node.kernel.take_off(&target);
    let stats = node.volumes.stats("v", &target).await.unwrap();
    assert!(stats.usage.is_none() && stats.abnormal.unwrap().message.contains("not mounted any more"));
    assert_eq!(node.volumes.observe().await.unwrap().abnormal, 1);
}

#[tokio::test]
async fn an_image_that_was_replaced_on_the_server_is_told_in_words() {
    let node = Node::new().await;
    let target = node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
    std::fs::write(node.kernel.export().join("next"), squashfs(4096)).unwrap();
    std::fs::rename(node.kernel.export().join("next"), node.kernel.export().join("image.sqsh")).unwrap();
    let abnormal = node.volumes.stats("v", &target).await.unwrap().abnormal.unwrap().message;
    assert!(abnormal.starts_with("image image.sqsh of 127.0.0.1:/images was replaced on the server"), "{abnormal}");
}

#[tokio::test]
async fn an_image_of_the_node_that_was_replaced_is_told_in_words() {
    let node = Node::with("hostPaths: [/srv]", Duration::from_secs(60)).await;
    let (image, next) = (node.host_root().join("srv/image.sqsh"), node.host_root().join("srv/next"));
    let target = node.publish("v", &node.image_of_the_node(""), "pod").await.unwrap();
    std::fs::write(&next, squashfs(4096)).unwrap();
    std::fs::rename(&next, &image).unwrap();
    let abnormal = node.volumes.stats("v", &target).await.unwrap().abnormal.unwrap().message;
    let of = "image srv/image.sqsh of the node's root directory";
    assert!(abnormal.starts_with(&format!("{of} was replaced: this volume keeps")), "{abnormal}");
}

#[tokio::test]
async fn an_image_of_the_node_is_verified_and_what_does_not_fit_is_told() {
    let node = Node::with("hostPaths: [/srv]\nrequireVerity: true", Duration::from_secs(60)).await;
    let file = std::fs::File::options().read(true).write(true).open(node.host_root().join("srv/image.sqsh")).unwrap();
    let root = hexadecimal(&verity::seal(&file).unwrap());
    let target = node.publish("v", &node.image_of_the_node(&format!(r#","verity":"{root}""#)), "pod").await.unwrap();
    assert!(node.log().contains(&format!("loop0: verified by {}", &root[..8])));
    node.kernel.corrupt();
    let abnormal = node.volumes.stats("v", &target).await.unwrap().abnormal.unwrap().message;
    assert!(abnormal.contains("other bytes than its root hash says"), "{abnormal}");
    node.volumes.unpublish("v", &target).await.unwrap();
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn of_a_sif_a_part_is_attached_and_found_again_by_the_next_process() {
    let mut node = Node::new().await;
    let sif = sif::example(&squashfs(4096), 36864, 1);
    std::fs::write(node.kernel.export().join("image.sqsh"), &sif).unwrap();
    let (of_sif, of_squashfs) = (node.image_of_type("sif"), node.image(""));
    node.volumes.stage("v", &node.allowed(&of_sif)).await.unwrap();
    node.publish("v", &of_sif, "pod").await.unwrap();
    let log = node.log();
    assert!(log.contains(&"loop0: 4096 bytes at 36864 of an image of 40960 bytes".to_owned()), "{log:?}");
    assert!(log.contains(&"mount squashfs source=/dev/loop0,ro []".to_owned()), "{log:?}");
    let error = node.publish("w", &of_squashfs, "other").await.unwrap_err();
    assert!(error.message.contains("it is sif; name that as the file system type"), "{error}");
    // What the mount of the pod holds.
    let held = node.kernel.loop_devices(&Tag::new("test.csi.dev")).unwrap();
    node.restart();
    node.stop_server().await;
    node.publish("v", &of_sif, "later").await.unwrap();
    drop(held);
    assert_eq!(node.kernel.live_loop_devices(), [0]);
}

#[tokio::test]
async fn what_pods_left_is_swept_and_what_was_mounted_by_hand_is_not() {
    let node = Node::new().await;
    let pod = node.publish("v", &node.overlay(DIRECTORY), "pod").await.unwrap();
    let by_hand_at = node.target("hand");
    let mount = node.allowed(&node.overlay(DIRECTORY));
    node.volumes.publish(Publication::by_hand(by_hand_at.clone(), mount, false), false).await.unwrap();
    for target in [&pod, &by_hand_at] {
        node.kernel.take_off(target);
        std::fs::remove_dir_all(target.parent().unwrap()).unwrap();
    }
    node.volumes.sweep();
    wait_for(|| node.records().len() == 1, || "the pod's record stays".into()).await;
    let left = node.volumes.observe().await.unwrap().published;
    let left: Vec<&Path> = left.iter().map(|volume| volume.target.as_path()).collect();
    assert_eq!(left, [&by_hand_at]);
    node.volumes.unpublish(&by_hand(&by_hand_at), &by_hand_at).await.unwrap();
}
