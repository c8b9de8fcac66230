//! The driver is killed between any two system calls: the next one goes on, and nothing is left.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::harness::image::Tree;
use crate::harness::tracer::Tracer;
use crate::harness::{Volume, killed, run};
use crate::{Images, squashfs};

/// An image whose root has an owner and a mode that no directory gets by itself.
fn image(images: &Images) -> PathBuf {
    let tree = Tree::new(&[("file", "image")]);
    let root = tree.path().to_str().unwrap();
    run("chown", &["1234:2345", root]);
    run("chmod", &["2751", root]);
    tree.squashfs(images.path("image"))
}

fn is_image(target: &Path) {
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "image");
    let root = fs::metadata(target).unwrap();
    assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (1234, 2345, 0o2751), "owner and mode of the root");
}

/// Reads and writes: of an upper layer that is left from before, and of a new one.
fn is_writable_image(target: &Path) {
    is_image(target);
    fs::write(target.join("mine"), "1").unwrap();
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_driver_killed_anywhere_with_an_overlay_goes_on_and_leaves_nothing() {
    let images = Images::new();
    let spec = json!({"kind": "overlay", "overlay": {"lower": [squashfs(&image(&images))]}});
    let volume = Volume::spec("overlay", &spec).writable();
    let points = killed::anywhere(&mut images.driver(), &volume, &is_writable_image);
    assert!(points > 30, "only {points} points");
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_driver_killed_anywhere_with_an_overlay_in_memory_goes_on_and_leaves_nothing() {
    let images = Images::new();
    let spec = json!({"kind": "overlay", "overlay": {
        "lower": [squashfs(&image(&images))], "upper": {"kind": "tmpfs", "size": "1Mi"}
    }});
    let volume = Volume::spec("overlay in memory", &spec).writable();
    let points = killed::anywhere(&mut images.driver(), &volume, &is_writable_image);
    assert!(points > 30, "only {points} points");
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_driver_killed_anywhere_with_a_plain_image_goes_on_and_leaves_nothing() {
    let images = Images::new();
    let volume = Volume::spec("plain", &squashfs(&image(&images)));
    let points = killed::anywhere(&mut images.driver(), &volume, &is_image);
    assert!(points > 15, "only {points} points");
}

/// What the tests above stand on.
#[test]
#[ignore = "needs root: make test-host"]
fn a_traced_process_dies_before_the_call_and_not_after_it() {
    let directory = tempfile::tempdir().unwrap();
    for (number, made) in [(1, 0), (2, 1), (3, 2)] {
        let names = [directory.path().join(format!("{number}-a")), directory.path().join(format!("{number}-b"))];
        let mut shell = Command::new("sh")
            .args(["-c", "read line; exec mkdir \"$@\"", "sh"])
            .args(&names)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let tracer = Tracer::kill_before(shell.id(), number);
        shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let report = tracer.wait();
        // The tracer has waited for it where it was not killed.
        let _ = shell.wait();
        assert_eq!(report.killed, number <= 2, "{report:?}");
        assert_eq!(names.iter().filter(|name| name.exists()).count(), made, "{report:?}");
    }
}
