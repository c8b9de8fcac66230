//! Images of Apptainer on a server: the squashfs inside of the file, whatever else is done with the file.

use std::fs;

use serde_json::Value;
use tonic::Code;

use super::harness::image::Tree;
use super::harness::nfs_server::{Link, fresh_caches};
use super::harness::node::in_time;
use super::harness::readers::hash;
use super::harness::{Driver, Volume, run, wait_for};
use super::server;

/// A SIF on the server, with a file of 3 MiB that no compression makes smaller; returns the file's digest.
fn make_sif(name: &str) -> Vec<u8> {
    let tree = Tree::new(&[("etc/os-release", "ID=test")]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=3", "status=none"]);
    tree.sif(format!("/images/{name}"));
    hash(&file).unwrap()
}

fn volume(id: &str, image: &str, further: &[(&str, &str)]) -> Volume {
    let server = server();
    let of = [("server", &*server), ("share", "/images"), ("image", image), ("fsType", "sif")];
    Volume::flat(id, &[&of[..], further].concat())
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn sif_images_on_a_server_are_mounted_with_and_without_a_writable_layer() {
    let digest = make_sif("tools.sif");
    let mut driver = Driver::start();
    let (plain, writable) =
        (volume("plain", "tools.sif", &[]), volume("w", "tools.sif", &[("overlay", "directory")]).writable());
    let target = driver.mount(&plain, "plain").unwrap();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    driver.kill();
    driver.launch();
    let target = driver.mount(&writable, "writable").unwrap();
    fs::write(target.join("etc/os-release"), "ID=mine").unwrap();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    assert_eq!(driver.loop_devices().len(), 1, "one for both");
    driver.unmount(&writable, "writable");
    driver.unmount(&plain, "plain");
    for (further, code) in
        [(("verity", "signed"), Code::InvalidArgument), (("fsType", "squashfs"), Code::FailedPrecondition)]
    {
        let error = driver.stage(&volume("v", "tools.sif", &[further])).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    driver.assert_nothing_left();
    drop(driver);
    let driver = Driver::with_policy("fsTypes: [squashfs]");
    let error = driver.stage(&plain).unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn sif_images_are_copied_whole_and_their_devices_moved_and_read_on_without_the_server() {
    let digest = make_sif("copied.sif");
    let sum = run("sha256sum", &["/images/copied.sif"]);
    let sum = format!("sha256:{}", sum.split(' ').next().unwrap());
    let mut driver = Driver::start_with(&["--cache-quota=1Gi", "--cache-min-free=1Mi", "--timeout=20"], None);
    let copied = volume("v", "copied.sif", &[("digest", &sum)]);
    let target = driver.mount(&copied, "pod").unwrap();
    let local = |driver: &Driver| {
        let status = driver.status();
        let devices = status["loopDevices"].as_array().unwrap().clone();
        !devices.is_empty() && devices.iter().all(|device| device["local"] == Value::Bool(true))
    };
    wait_for("the image to be local", || local(&driver));
    let link = Link::cut();
    fresh_caches();
    assert_eq!(in_time("a read of the copy", || hash(&target.join("file"))).unwrap(), digest);
    // Of the copy, a device that another process makes has the same part.
    in_time("the end of the pod", || driver.unmount(&copied, "pod"));
    driver.kill();
    driver.launch();
    let target = in_time("a pod without the server", || driver.mount(&copied, "later")).unwrap();
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    link.restore();
    driver.unmount(&copied, "later");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn sif_images_lie_on_a_hostpath_as_well() {
    Tree::new(&[("file", "content")]).sif("/srv/tools.sif");
    let driver = Driver::with_policy("hostPaths: [/srv]");
    let volume = Volume::flat("v", &[("hostPath", "/srv"), ("image", "tools.sif"), ("fsType", "sif")]);
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}
