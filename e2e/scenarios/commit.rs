//! A writable layer becomes a layer of a container image.

use std::fs;

use super::harness::{Driver, Volume, layer, run, wait_for};
use super::server;

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_a_pod_wrote_is_a_layer_in_a_directory_or_in_a_file_system_of_its_own() {
    layer::image("/images/commit.sqsh");
    let mut driver = Driver::start();
    for size in ["", "32Mi"] {
        let server = server();
        let mut of =
            vec![("server", &*server), ("share", "/images"), ("image", "commit.sqsh"), ("overlay", "directory")];
        of.extend((!size.is_empty()).then_some(("overlaySize", size)));
        let volume = Volume::flat("v", &of).writable();
        let target = driver.mount(&volume, "pod").unwrap();
        let tar = layer::assert_committed(&mut driver, &target);
        fs::write(target.join("later"), "").unwrap();
        assert_ne!(driver.commit(&target).unwrap(), tar);
        if !size.is_empty() {
            run("umount", &[target.to_str().unwrap()]);
            let why = "its writable layer is not mounted";
            wait_for("the layer to be gone", || driver.commit(&target).is_err_and(|error| error.contains(why)));
        }
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
    }
}
