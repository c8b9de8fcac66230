//! Images of Apptainer: of the file, the part with the file system is attached, and nothing else.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tonic::Code;

use crate::Images;
use crate::harness::Volume;
use crate::harness::image::{Tree, sif};

fn attach(fs_type: &str, image: &Path) -> Value {
    json!({"kind": "attach", "attach": {"fs_type": fs_type, "attach": {
        "kind": "loopback", "loopback": {"path": image, "base": "root"}
    }}})
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_squashfs_in_a_sif_is_mounted_from_its_part_of_the_file_and_found_again() {
    let images = Images::new();
    let image = Tree::new(&[("file", "content"), ("bin/tool", "tool")]).sif(images.path("tools.sif"));
    let mut driver = images.driver();
    let volume = Volume::spec("v", &attach("sif", &image));
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("bin/tool")).unwrap(), "tool");
    let devices = driver.loop_devices();
    let of_device = |name: &str| {
        let device = devices[0].rsplit('/').next().unwrap();
        fs::read_to_string(format!("/sys/block/{device}/loop/{name}")).unwrap().trim_end().to_owned()
    };
    let partition = fs::metadata(&image).unwrap().len() - 36864 - "signature".len() as u64;
    assert_eq!((of_device("offset"), of_device("sizelimit")), ("36864".to_owned(), partition.to_string()));
    driver.kill();
    driver.launch();
    let later = driver.publish(&volume, "later").unwrap();
    assert_eq!(fs::read_to_string(later.join("file")).unwrap(), "content");
    assert_eq!(driver.loop_devices(), devices);
    driver.unpublish(&volume, "later").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn a_sif_that_cannot_be_mounted_is_refused_in_words_and_leaves_nothing() {
    let images = Images::new();
    let driver = images.driver();
    // More than a block, whatever compresses it.
    let file: String = (0..5000).map(|number: u32| format!("{:x} ", number.wrapping_mul(0x9e37_79b9))).collect();
    let image = Tree::new(&[("file", &file)]).squashfs(images.path("image.sqsh"));
    let squashfs = fs::read(&image).unwrap();
    let whole = images.path("whole.sif");
    sif(&whole, &squashfs, 36864, 1);
    let made = |name: &str, partition: &[u8], offset, fs_type| {
        sif(&images.path(name), partition, offset, fs_type);
        images.path(name)
    };
    fs::write(images.path("cut.sif"), &fs::read(&whole).unwrap()[..36864 + 100]).unwrap();
    for (fs_type, image, why) in [
        ("sif", image, "this is not a sif image: it is squashfs; name that"),
        ("squashfs", whole.clone(), "it is sif; name that as the file system type"),
        ("sif", made("encrypted.sif", &squashfs, 36864, 5), "an encrypted squashfs"),
        ("sif", made("unaligned.sif", &squashfs, 36865, 1), "a multiple of 512"),
        ("sif", made("other.sif", &[1; 4096], 36864, 1), "this is not a squashfs image in its partition"),
        ("sif", made("short.sif", &squashfs[..4096], 36864, 1), "the image is truncated: its superblock states"),
        ("sif", images.path("cut.sif"), "the image is truncated, or its header is wrong"),
    ] {
        let error = driver.stage(&Volume::spec("v", &attach(fs_type, &image))).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains(why), "{error}");
    }
    driver.assert_nothing_left();
}
