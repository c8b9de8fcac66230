//! The tests that need root and this machine's loop devices, but no NFS: images of the node itself. `make test-host`.

#[path = "../harness/mod.rs"]
mod harness;

mod commit;
mod connections;
mod enter;
mod history;
mod hung;
mod killed;
mod long_life;
mod sif;

use std::fs;
use std::path::{Path, PathBuf};

use harness::image::Tree;
use harness::{Driver, Volume, run, wait_for};
use serde_json::{Value, json};

/// A directory with images that the drivers of a test may use.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        Images(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn driver(&self) -> Driver {
        Driver::with_policy(&format!("hostPaths: [{}]", self.0.path().display()))
    }

    /// A volume with an overlay on an image that holds `file` with the image's name in it.
    fn volume(&self, id: &str, name: &str) -> Volume {
        Volume::spec(id, &json!({"kind": "overlay", "overlay": {"lower": [squashfs(&self.image(name))]}})).writable()
    }

    /// An image that holds `file` with the image's name in it.
    fn image(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        if !path.exists() {
            Tree::new(&[("file", name)]).squashfs(&path);
        }
        path
    }
}

fn squashfs(image: &Path) -> Value {
    json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {
        "kind": "loopback", "loopback": {"path": image, "base": "root"}
    }}})
}

#[test]
#[ignore = "needs root: make test-host"]
fn an_image_is_published_written_over_and_gone() {
    let images = Images::new();
    let driver = images.driver();
    let volume = images.volume("v", "image");
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "image");
    fs::write(target.join("file"), "mine").unwrap();
    assert_eq!(driver.mounts().len(), 1);
    assert_eq!(driver.loop_devices().len(), 1);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_crowd_on_one_image_gets_one_loop_device_and_two_hundred_images_get_two_hundred() {
    let images = Images::new();
    let driver = images.driver();
    for count in [1, 64, 200] {
        let volumes: Vec<_> =
            (0..200).map(|n| images.volume(&format!("v{n}"), &format!("image{}", n % count))).collect();
        let publish = volumes.iter().enumerate().map(|(n, volume)| {
            let request = driver.publish_request(volume, &driver.target(&format!("pod-{n}")));
            let mut node = driver.node();
            async move { node.node_publish_volume(request).await }
        });
        let publish: Vec<_> = publish.collect();
        let answers = driver.block_on(async {
            let calls: Vec<_> = publish.into_iter().map(tokio::spawn).collect();
            let mut answers = Vec::new();
            for call in calls {
                answers.push(call.await.unwrap());
            }
            answers
        });
        for answer in answers {
            answer.unwrap();
        }
        assert_eq!(driver.loop_devices().len(), count);
        assert_eq!(driver.mounts().len(), 200);
        for (n, volume) in volumes.iter().enumerate() {
            let target = driver.target(&format!("pod-{n}"));
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), format!("image{}", n % count));
            driver.unmount(volume, &format!("pod-{n}"));
        }
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs root: make test-host"]
fn an_image_written_over_gets_a_device_of_its_own() {
    let images = Images::new();
    let driver = images.driver();
    let old = images.volume("old", "image");
    let old_target = driver.mount(&old, "old").unwrap();
    // What a careful publisher does: the name changes its meaning, the file stays as long as it is open.
    Tree::new(&[("file", "new")]).squashfs(images.path("next"));
    fs::rename(images.path("next"), images.path("image")).unwrap();
    let new = images.volume("new", "image");
    let new_target = driver.mount(&new, "new").unwrap();
    assert_eq!(fs::read_to_string(old_target.join("file")).unwrap(), "image");
    assert_eq!(fs::read_to_string(new_target.join("file")).unwrap(), "new");
    assert_eq!(driver.loop_devices().len(), 2);
    driver.unmount(&old, "old");
    driver.unmount(&new, "new");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn foreign_loop_devices_and_other_drivers_are_left_alone() {
    let images = Images::new();
    let (one, two) = (images.driver(), images.driver());
    let volume = images.volume("v", "image");
    let foreign = run("losetup", &["--find", "--show", "--read-only", images.path("image").to_str().unwrap()]);
    one.mount(&volume, "pod").unwrap();
    two.mount(&volume, "pod").unwrap();
    let devices = [one.loop_devices(), two.loop_devices(), vec![foreign.trim().replace("/dev/", "")]].concat();
    assert_eq!(devices.len(), 3, "{devices:?}");
    assert!(devices.iter().all(|device| devices.iter().filter(|other| *other == device).count() == 1), "{devices:?}");
    one.unmount(&volume, "pod");
    assert_eq!(fs::read_to_string(two.target("pod").join("file")).unwrap(), "image");
    two.unmount(&volume, "pod");
    run("losetup", &["--detach", foreign.trim()]);
    one.assert_nothing_left();
    two.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_command_line_mounts_plans_shows_and_unmounts() {
    let images = Images::new();
    let volume = images.volume("v", "image");
    let spec = images.path("spec.json");
    let (target, policy, data) = (images.path("target"), images.path("policy.yaml"), images.path("data"));
    fs::write(&spec, &volume.attributes["mountSpec"]).unwrap();
    fs::write(&policy, format!("hostPaths: [{}]", images.0.path().display())).unwrap();
    let driver = |arguments: &[&str]| {
        let all = [&["--driver-name", "by-hand.csi.dev"], arguments].concat();
        run(harness::binary().to_str().unwrap(), &all)
    };
    let (spec, path) = (spec.to_str().unwrap(), target.to_str().unwrap());
    let (policy, data) = (["--policy", policy.to_str().unwrap()], ["--data-dir", data.to_str().unwrap()]);
    assert!(driver(&[&["plan", spec][..], &policy].concat()).contains("1. open"));
    driver(&[&["mount", spec, path][..], &policy, &data].concat());
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "image");
    let status = driver(&[&["status"][..], &data].concat());
    assert!(status.contains(&format!("published at {path}")) && status.contains("1 published"), "{status}");
    let status: Value = serde_json::from_str(&driver(&[&["status", "--output", "json"][..], &data].concat())).unwrap();
    assert_eq!(status["volumes"][0]["target"], path);
    driver(&[&["unmount", path][..], &data].concat());
    wait_for("the loop device to go", || driver(&[&["status"][..], &data].concat()) == "no volumes, no loop devices\n");
    assert!(!target.exists());
}

/// As in a node that is a container: its /dev is a copy of the host's, and new devices do not appear in it.
#[test]
#[ignore = "needs root: make test-host"]
fn a_device_gets_its_node_where_dev_is_a_copy() {
    let images = Images::new();
    let volume = images.volume("v", "image");
    let path = |name: &str| images.path(name).display().to_string();
    fs::write(path("spec.json"), &volume.attributes["mountSpec"]).unwrap();
    fs::write(path("policy.yaml"), format!("hostPaths: [{}]", images.0.path().display())).unwrap();
    let script = r#"
        mount -t tmpfs copy /dev
        mknod /dev/null c 1 3
        mknod /dev/loop-control c 10 237
        "$0" --driver-name copy.csi.dev mount spec.json target --policy policy.yaml --data-dir data >&2
        cat target/file
        "$0" --driver-name copy.csi.dev unmount target --data-dir data >&2
        for node in /dev/loop[0-9]*; do test -b "$node"; done"#;
    let script = format!("cd {} && set -e{script}", images.0.path().display());
    let binary = harness::binary().display().to_string();
    assert_eq!(run("unshare", &["--mount", "sh", "-c", &script, &binary]), "image");
    // A driver that looks at the devices of this machine keeps one a moment longer.
    let status = || run(&binary, &["--driver-name", "copy.csi.dev", "status", "--data-dir", &path("data")]);
    wait_for("the loop device to go", || status() == "no volumes, no loop devices\n");
}
