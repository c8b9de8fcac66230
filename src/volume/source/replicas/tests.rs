use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::Instant;

use crate::error::Kind;
use crate::kernel::Kernel;
use crate::kernel::device_mapper::Multipath;
use crate::kernel::loop_device::Tag;
use crate::volume::fixture::{Node, squashfs};

fn image_of(node: &Node, servers: &str) -> String {
    node.image("").replace("127.0.0.1", servers)
}

fn image(node: &Node) -> String {
    image_of(node, "127.0.0.1, 127.0.0.2")
}

fn devices(node: &Node) -> Vec<Multipath> {
    node.kernel.multipath_devices(&Tag::new("test.csi.dev")).unwrap()
}

/// Which paths failed of the only device.
fn failed(node: &Node) -> Vec<bool> {
    let devices = devices(node);
    assert_eq!(devices.len(), 1);
    devices[0].paths.iter().map(|path| path.is_failed).collect()
}

async fn condition(node: &Node, target: &Path) -> Option<String> {
    node.volumes.stats("v", target).await.unwrap().abnormal.map(|abnormal| abnormal.message)
}

#[tokio::test]
async fn an_image_of_several_servers_is_one_device_whose_reads_wait_with_a_path_to_each() {
    let node = Node::new().await;
    let target = node.publish("v", &image(&node), "p").await.unwrap();
    let log = node.log().join("\n");
    for server in ["127.0.0.1", "127.0.0.2"] {
        let mount = log.lines().find(|line| line.contains(&format!("source={server}:/images"))).unwrap();
        assert!(mount.contains(",softerr,timeo=30,retrans=1") && mount.contains("nosharecache"), "{mount}");
    }
    let devices = devices(&node);
    assert!(devices[0].queues && devices.len() == 1);
    assert_eq!(failed(&node), [false, false]);
    // The file system was there before anybody could have waited for it.
    assert!(log.find("mount squashfs").unwrap() < log.find("queue_if_no_path").unwrap(), "{log}");
    assert_eq!(condition(&node, &target).await, None);
    node.volumes.unpublish("v", &target).await.unwrap();
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn volumes_of_the_same_servers_share_a_device_and_that_of_one_server_is_another() {
    let node = Node::new().await;
    node.publish("a", &image(&node), "a").await.unwrap();
    let (image, more) = (image(&node), node.image(""));
    let (one, other) = tokio::join!(node.publish("b", &image, "b"), node.publish("c", &image, "c"));
    one.unwrap();
    other.unwrap();
    assert_eq!((devices(&node).len(), node.kernel.live_loop_devices().len()), (1, 2));
    node.publish("d", &more, "d").await.unwrap();
    assert_eq!((devices(&node).len(), node.kernel.live_loop_devices().len()), (1, 3));
}

#[tokio::test]
async fn a_server_that_is_silent_when_a_volume_begins_gets_its_path_when_it_answers() {
    let node = Node::new().await;
    node.kernel.refuse("source=127.0.0.2:", Errno::TIMEDOUT);
    let target = node.publish("v", &image(&node), "p").await.unwrap();
    assert_eq!(failed(&node), [false]);
    let told = condition(&node, &target).await.unwrap();
    assert!(told.contains("is read from 127.0.0.1 alone: 127.0.0.2 does not answer"), "{told}");
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert_eq!(failed(&node), [false]);
    node.kernel.allow();
    node.volumes.tend_paths_now(Instant::now() + Duration::from_secs(10)).await.unwrap();
    assert_eq!(failed(&node), [false, false]);
    assert_eq!(condition(&node, &target).await, None);
    node.volumes.unpublish("v", &target).await.unwrap();
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn a_path_that_failed_is_one_again_when_its_server_has_its_file() {
    let node = Node::new().await;
    let target = node.publish("v", &image(&node), "p").await.unwrap();
    let paths = devices(&node).remove(0).paths;
    node.kernel.fail_path(paths[0].device);
    assert_eq!(failed(&node), [true, false]);
    let told = condition(&node, &target).await.unwrap();
    assert!(told.contains(" alone: ") && told.contains("does not answer"), "{told}");
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert_eq!(failed(&node), [false, false]);
    // It is not gone back to at once.
    assert!(devices(&node)[0].paths[1].is_current);
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    node.volumes.tend_paths_now(Instant::now() + Duration::from_secs(61)).await.unwrap();
    assert!(devices(&node)[0].paths[0].is_current);
}

#[tokio::test]
async fn where_no_server_answers_reads_wait_and_where_none_has_the_file_any_more_they_fail() {
    let node = Node::new().await;
    node.publish("v", &image(&node), "p").await.unwrap();
    for path in devices(&node).remove(0).paths {
        node.kernel.fail_path(path.device);
    }
    node.kernel.refuse("source=", Errno::TIMEDOUT);
    std::fs::write(node.kernel.export().join("next"), squashfs(8192)).unwrap();
    std::fs::rename(node.kernel.export().join("next"), node.kernel.export().join("image.sqsh")).unwrap();
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert_eq!(failed(&node), [true, true]);
    assert!(!devices(&node)[0].queues);
}

#[tokio::test]
async fn servers_with_different_images_are_refused_and_nothing_is_left() {
    let node = Node::new().await;
    let mut other = squashfs(4096);
    other[3000] = 1;
    std::fs::write(node.kernel.export_of("127.0.0.2").join("image.sqsh"), other).unwrap();
    let error = node.publish("v", &image(&node), "p").await.unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition);
    assert!(error.message.contains("other bytes on") && error.message.contains("127.0.0.2:/images"), "{error}");
    node.assert_nothing_held().await;
}

#[tokio::test]
async fn an_image_that_one_server_does_not_have_begins_with_the_others() {
    let node = Node::new().await;
    node.kernel.export_of("127.0.0.2");
    node.publish("v", &image(&node), "p").await.unwrap();
    assert_eq!(failed(&node), [false]);
    // And one that none has is not there.
    node.kernel.export_of("127.0.0.3");
    let error = node.publish("w", &image_of(&node, "127.0.0.2,127.0.0.3"), "w").await.unwrap_err();
    assert_eq!(error.kind, Kind::NotFound);
    assert!(error.message.contains("127.0.0.2:/images") && error.message.contains("127.0.0.3:/images"), "{error}");
}

#[tokio::test]
async fn a_staged_volume_has_its_device_after_a_restart_and_no_server_is_asked() {
    let mut node = Node::new().await;
    let spec = image(&node);
    node.volumes.stage("v", &node.allowed(&spec)).await.unwrap();
    node.publish("v", &spec, "p").await.unwrap();
    let before = devices(&node);
    // What the mount of the pod holds.
    let held = node.kernel.find_multipath_device(before[0].loop_device, &Tag::new("test.csi.dev")).unwrap();
    node.restart();
    node.log();
    node.stop_server().await;
    node.publish("v", &spec, "q").await.unwrap();
    assert_eq!(devices(&node), before);
    let asked: Vec<_> = node.log().into_iter().filter(|line| line.starts_with("mount nfs")).collect();
    assert!(asked.is_empty(), "{asked:?}");
    drop(held);
}

#[tokio::test]
async fn a_volume_that_is_only_staged_has_its_paths_looked_after_too() {
    let node = Node::new().await;
    node.volumes.stage("v", &node.allowed(&image(&node))).await.unwrap();
    let paths = devices(&node).remove(0).paths;
    node.kernel.fail_path(paths[0].device);
    assert_eq!(failed(&node), [true, false]);
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert_eq!(failed(&node), [false, false]);
}

#[tokio::test]
async fn a_file_that_was_given_another_mode_on_all_servers_is_read_on_and_not_mixed_with_another() {
    let node = Node::new().await;
    node.publish("v", &image(&node), "p").await.unwrap();
    let paths = devices(&node).remove(0).paths;
    let image = node.kernel.export().join("image.sqsh");
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    node.kernel.fail_path(paths[0].device);
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert!(failed(&node)[0], "while there is another path it has to be the same file for certain");
    node.kernel.fail_path(paths[1].device);
    node.volumes.tend_paths_now(Instant::now() + Duration::from_secs(10)).await.unwrap();
    assert_eq!(failed(&node), [false, false]);
    assert!(devices(&node)[0].queues);
}

#[tokio::test]
async fn a_path_that_is_read_and_gets_no_answer_is_given_up_where_its_server_says_nothing_either() {
    let node = Node::new().await;
    node.publish("v", &image(&node), "p").await.unwrap();
    let (start, path) = (Instant::now(), devices(&node)[0].paths[0].device);
    node.kernel.stall(path.1);
    let look = async |seconds| node.volumes.give_up_paths_now(start + Duration::from_secs(seconds)).await.unwrap();
    assert!(look(0).await && look(3).await);
    assert_eq!(failed(&node), [false, false], "its server answers");
    node.stop_server().await;
    look(4).await;
    assert_eq!(failed(&node), [true, false]);
}

#[tokio::test]
async fn a_server_that_says_it_is_there_and_gives_nothing_is_not_read_while_there_is_another() {
    let node = Node::new().await;
    node.publish("v", &image(&node), "p").await.unwrap();
    let (start, paths) = (Instant::now(), devices(&node).remove(0).paths);
    let look = async |seconds| node.volumes.give_up_paths_now(start + Duration::from_secs(seconds)).await.unwrap();
    node.kernel.stall(paths[0].device.1);
    look(0).await;
    look(19).await;
    assert_eq!(failed(&node), [false, false]);
    look(20).await;
    assert_eq!(failed(&node), [true, false]);
    // The last one is waited for, as the only server of an image is.
    node.kernel.stall(paths[1].device.1);
    look(30).await;
    look(60).await;
    assert_eq!(failed(&node), [true, false]);
}

#[tokio::test]
async fn a_node_without_such_images_is_not_looked_at_often() {
    let node = Node::new().await;
    node.publish("v", &node.image(""), "p").await.unwrap();
    assert!(!node.volumes.give_up_paths_now(Instant::now()).await.unwrap());
}

#[tokio::test]
async fn the_paths_of_what_an_earlier_process_published_are_looked_after() {
    let mut node = Node::new().await;
    node.publish("v", &image(&node), "p").await.unwrap();
    let before = devices(&node).remove(0);
    // What the mount of the pod holds.
    let held = node.kernel.find_multipath_device(before.loop_device, &Tag::new("test.csi.dev")).unwrap();
    node.restart();
    node.kernel.fail_path(before.paths[0].device);
    assert_eq!(failed(&node), [true, false]);
    node.volumes.tend_paths_now(Instant::now()).await.unwrap();
    assert_eq!(failed(&node), [false, false]);
    drop(held);
}
