//! Images on file systems that the node has mounted: found by their path, and under the policy alone.

use std::fs;
use std::os::unix::fs::symlink;

use tonic::Code;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, run};
use super::server;
use super::verity::root_of;

/// A file system that the node has mounted, away from its root directory's.
struct Mounted(&'static str);

impl Mounted {
    fn new(path: &'static str) -> Self {
        fs::create_dir_all(path).unwrap();
        run("mount", &["-t", "tmpfs", "tmpfs", path]);
        Mounted(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0]);
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn hostpath_names_an_image_on_a_file_system_that_the_node_mounts_while_the_driver_runs() {
    let driver = Driver::with_policy("hostPaths: [/srv/lustre]");
    let lustre = Mounted::new("/srv/lustre");
    fs::create_dir("/srv/lustre/images").unwrap();
    Tree::new(&[("file", "content")]).squashfs("/srv/lustre/images/tools.sqsh");
    let of = |id: &str, image: &str| Volume::flat(id, &[("hostPath", "/srv/lustre/images"), ("image", image)]);
    let (volume, inline) = (of("v", "tools.sqsh"), of("inline", "tools.sqsh").inline());
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    let target = driver.publish(&inline, "inline").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    assert_eq!((driver.loop_devices().len(), driver.mounts().len()), (1, 2));
    assert!(!driver.stats(&volume, "pod").unwrap().volume_condition.unwrap().abnormal);

    // No link is followed, also none that stays below the path that the policy allows.
    symlink("tools.sqsh", "/srv/lustre/images/link.sqsh").unwrap();
    symlink("images", "/srv/lustre/other").unwrap();
    let through = Volume::flat("w", &[("hostPath", "/srv/lustre/other"), ("image", "tools.sqsh")]);
    for volume in [of("w", "link.sqsh"), through] {
        let error = driver.stage(&volume).unwrap_err();
        assert!(error.message().contains("symlink that may not be followed"), "{error}");
    }
    let error = driver.stage(&Volume::flat("w", &[("hostPath", "/srv"), ("image", "local.sqsh")])).unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    assert!(error.message().contains("hostPath: path \"/srv/local.sqsh\""), "{error}");
    let error = driver
        .stage(&Volume::flat("w", &[("hostPath", "/srv/lustre"), ("server", &server()), ("image", "a.sqsh")]))
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");

    // Whoever may write there replaces it.
    Tree::new(&[("file", "new")]).squashfs("/srv/lustre/images/next");
    fs::rename("/srv/lustre/images/next", "/srv/lustre/images/tools.sqsh").unwrap();
    let later = driver.mount(&of("later", "tools.sqsh"), "later").unwrap();
    assert_eq!(fs::read_to_string(later.join("file")).unwrap(), "new");
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    driver.unmount(&of("later", "tools.sqsh"), "later");
    driver.unpublish(&inline, "inline").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    drop(lustre);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn hostpath_images_are_verified_where_the_policy_requires_it() {
    let lustre = Mounted::new("/srv/lustre");
    let image = Tree::new(&[("file", "content")]).squashfs("/srv/lustre/verified.sqsh");
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let mut driver = Driver::with_policy("hostPaths: [/srv/lustre]\nrequireVerity: true");
    let of = |more: &[(&str, &str)]| {
        Volume::flat("v", &[&[("hostPath", "/srv/lustre"), ("image", "verified.sqsh")], more].concat())
    };
    let error = driver.stage(&of(&[])).unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    let error = driver.stage(&of(&[("verity", &"0".repeat(64))])).unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    let volume = of(&[("verity", &root), ("overlay", "directory")]).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    driver.kill();
    driver.launch();
    driver.publish(&volume, "later").unwrap();
    assert_eq!((driver.verified_devices(), driver.loop_devices().len()), (1, 1));
    driver.unpublish(&volume, "later").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    drop(lustre);
}
