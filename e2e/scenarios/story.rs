//! The main job: one image, several pods, nothing left.

use std::fs;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, kernel};
use super::{seed, server};

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_seeds_spec_is_published_twice_from_one_mount_and_one_loop_device_and_leaves_nothing() {
    let tree = Tree::new(&[("etc/motd", "hello\n"), ("usr/bin/tool", "#!/bin/sh\n")]);
    tree.squashfs("/images/image.sqsh");
    let driver = Driver::start();
    let volume = Volume::spec("v1", &seed("/image.sqsh")).writable();
    driver.stage(&volume).unwrap();
    let one = driver.publish(&volume, "pod-1").unwrap();
    let two = driver.publish(&volume, "pod-2").unwrap();

    assert_eq!(driver.loop_devices().len(), 1);
    assert_eq!(driver.mounts().len(), 2);
    assert_eq!(kernel::nfs_connections(), 1);
    assert_eq!(kernel::visible_nfs_mounts(), 0);
    let line = kernel::mount_line(&one);
    assert!(line.contains("nosuid,nodev"), "{line}");

    assert_eq!(fs::read_to_string(one.join("etc/motd")).unwrap(), "hello\n");
    fs::write(one.join("etc/motd"), "mine\n").unwrap();
    fs::write(two.join("new"), "ours\n").unwrap();
    assert_eq!(fs::read_to_string(two.join("etc/motd")).unwrap(), "hello\n");
    assert!(!one.join("new").exists());

    driver.unpublish(&volume, "pod-1").unwrap();
    assert_eq!(fs::read_to_string(two.join("new")).unwrap(), "ours\n");
    driver.unpublish(&volume, "pod-2").unwrap();
    driver.unstage(&volume).unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_published_path_again_starts_with_a_clean_scratch_layer() {
    Tree::new(&[("file", "1")]).squashfs("/images/clean.sqsh");
    let driver = Driver::start();
    let volume = Volume::spec("v1", &seed("/clean.sqsh")).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    fs::write(target.join("file"), "2").unwrap();
    driver.unpublish(&volume, "pod").unwrap();
    let target = driver.publish(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "1");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn volumes_of_one_image_share_it_and_the_hundredth_pod_costs_no_rpc() {
    Tree::new(&[("file", "1")]).squashfs("/images/shared.sqsh");
    let driver = Driver::start();
    let attributes = [("server", server()), ("share", "/images".into()), ("image", "shared.sqsh".into())];
    let attributes: Vec<(&str, &str)> = attributes.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let claimed = Volume::flat("v1", &attributes);
    let other = Volume::flat("v2", &attributes);
    let inline = Volume::flat("v3", &attributes).inline();
    driver.mount(&claimed, "pod-1").unwrap();
    driver.mount(&other, "pod-2").unwrap();
    driver.publish(&inline, "pod-3").unwrap();
    assert_eq!(driver.loop_devices().len(), 1);
    assert_eq!(kernel::nfs_connections(), 1);
    assert_eq!(driver.mounts().len(), 3);

    fs::read(driver.publish(&claimed, "pod-4").unwrap().join("file")).unwrap();
    let before = kernel::rpcs();
    assert!(before > 0, "the client's counters were not found");
    for number in 5..105 {
        let target = driver.publish(&claimed, &format!("pod-{number}")).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "1");
    }
    assert_eq!(kernel::rpcs(), before, "publishing a staged volume asked the server");

    for number in 4..105 {
        driver.unpublish(&claimed, &format!("pod-{number}")).unwrap();
    }
    driver.unmount(&claimed, "pod-1");
    driver.unmount(&other, "pod-2");
    driver.unpublish(&inline, "pod-3").unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn every_call_can_be_repeated_and_comes_in_any_order() {
    Tree::new(&[("file", "1")]).squashfs("/images/again.sqsh");
    let driver = Driver::start();
    let volume = Volume::spec("v1", &seed("/again.sqsh")).writable();
    driver.unpublish(&volume, "pod").unwrap();
    driver.unstage(&volume).unwrap();
    for _ in 0..3 {
        driver.stage(&volume).unwrap();
    }
    for _ in 0..3 {
        driver.publish(&volume, "pod").unwrap();
    }
    assert_eq!(driver.mounts().len(), 1);
    assert_eq!(driver.loop_devices().len(), 1);
    driver.unstage(&volume).unwrap();
    assert_eq!(fs::read_to_string(driver.target("pod").join("file")).unwrap(), "1");
    for _ in 0..3 {
        driver.unpublish(&volume, "pod").unwrap();
    }
    for _ in 0..3 {
        driver.unstage(&volume).unwrap();
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_killed_driver_hurts_no_reader_and_the_next_one_goes_on() {
    Tree::new(&[("file", "1")]).squashfs("/images/killed.sqsh");
    let mut driver = Driver::start();
    let volume = Volume::spec("v1", &seed("/killed.sqsh")).writable();
    let one = driver.mount(&volume, "pod-1").unwrap();
    driver.kill();
    assert_eq!(fs::read_to_string(one.join("file")).unwrap(), "1");
    driver.launch();
    driver.publish(&volume, "pod-1").unwrap();
    driver.publish(&volume, "pod-2").unwrap();
    assert_eq!(driver.mounts().len(), 2);
    assert_eq!(driver.loop_devices().len(), 1, "the image is attached twice");
    driver.unpublish(&volume, "pod-1").unwrap();
    driver.unmount(&volume, "pod-2");
    driver.assert_nothing_left();
}
