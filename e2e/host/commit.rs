//! A writable layer becomes a layer of a container image.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Volume, layer, run};
use crate::{Images, squashfs};

fn volume(images: &Images, upper: &Value) -> Volume {
    layer::image(images.path("image"));
    let lower = [squashfs(&images.path("image"))];
    Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower, "upper": upper}})).writable()
}

#[test]
#[ignore = "needs root: make test-host"]
fn what_a_pod_wrote_is_a_layer() {
    let images = Images::new();
    let mut driver = images.driver();
    let volume = volume(&images, &json!({"kind": "directory"}));
    let target = driver.mount(&volume, "pod").unwrap();
    layer::assert_committed(&mut driver, &target);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_volume_without_a_layer_on_the_disk_says_what_to_do() {
    let images = Images::new();
    let driver = images.driver();
    let refused = |target: &Path, why: &str| {
        let error = driver.commit(target).unwrap_err();
        assert!(error.starts_with(&format!("csi-driver-squashfs: commit {}: ", target.display())), "{error}");
        assert!(error.contains(why), "{error}");
    };
    refused(&driver.target("nobody"), "no volume is published there");
    let memory = volume(&images, &json!({"kind": "tmpfs", "size": "1Mi"}));
    refused(&driver.mount(&memory, "pod").unwrap(), "in memory, where the pod alone sees it: publish it with");
    driver.unmount(&memory, "pod");
    let none = Volume::spec("none", &squashfs(&images.path("image")));
    refused(&driver.mount(&none, "pod").unwrap(), "it has no writable layer: publish it with");
    driver.unmount(&none, "pod");
    let read_only = volume(&images, &json!({"kind": "directory"})).read_only();
    refused(&driver.mount(&read_only, "pod").unwrap(), "it is published read-only");
    driver.unmount(&read_only, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_layer_that_cannot_be_written_down_is_an_error() {
    let images = Images::new();
    let driver = images.driver();
    let volume = volume(&images, &json!({"kind": "directory"}));
    let target = driver.mount(&volume, "pod").unwrap();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(&driver.binary);
    command.arg("commit").arg(&target).arg(format!("--driver-name={}", driver.name));
    let output = command.arg(format!("--data-dir={}", driver.data_dir().display())).stdout(full).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("write the layer: No space left on device"), "{said}");
    let command = format!("{} commit /a", driver.binary.display());
    let said = run("script", &["--quiet", "--command", &command, "/dev/null"]);
    assert!(said.contains("a tar is nothing for a terminal"), "{said}");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}
