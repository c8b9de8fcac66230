//! The driver is killed between any two system calls while it talks to a server, too.

use std::fs;
use std::path::Path;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, killed};
use super::seed;

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_killed_anywhere_with_an_image_on_nfs_goes_on_and_leaves_nothing() {
    Tree::new(&[("file", "1")]).squashfs("/images/killed-anywhere.sqsh");
    let volume = Volume::spec("nfs", &seed("/killed-anywhere.sqsh")).writable();
    let is_right = |target: &Path| assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "1");
    let points = killed::anywhere(&mut Driver::start(), &volume, &is_right);
    assert!(points > 50, "only {points} points");
}
