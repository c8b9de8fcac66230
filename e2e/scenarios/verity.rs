//! Images that the kernel verifies: what fits is read, what does not is an error, and nothing else.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tonic::Code;

use super::harness::image::Tree;
use super::harness::killed;
use super::harness::nfs_server::{Link, fresh_caches};
use super::harness::node::in_time;
use super::harness::{Driver, Volume, binary, run, wait_for};
use super::server;

fn tool(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().unwrap()
}

/// Keys of minisign(1), as a person has them, by name.
pub(super) struct Keys(tempfile::TempDir);

impl Keys {
    pub(super) fn none() -> Self {
        Keys(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Makes one and returns its public part.
    pub(super) fn make(&self, name: &str) -> String {
        let public = self.path(&format!("{name}.pub"));
        run("minisign", &["-G", "-W", "-p", &public, "-s", &self.path(&format!("{name}.key"))]);
        fs::read_to_string(public).unwrap().lines().nth(1).unwrap().to_owned()
    }

    /// Makes `FILE.minisig`.
    pub(super) fn sign(&self, name: &str, file: &Path) {
        run("minisign", &["-S", "-s", &self.path(&format!("{name}.key")), "-m", file.to_str().unwrap()]);
    }
}

/// `seal` and `verify` print a root hash.
pub(super) fn root_of(arguments: &[&str]) -> String {
    let output = tool(arguments);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// An image with two files of 1 MiB that no compression makes smaller, the first filled with what the second is not.
fn make_image(name: &str) -> PathBuf {
    let tree = Tree::new(&[]);
    for file in ["one", "two"] {
        let path = tree.path().join(file);
        run("dd", &["if=/dev/urandom", &format!("of={}", path.display()), "bs=1M", "count=1", "status=none"]);
    }
    tree.squashfs(format!("/images/{name}"))
}

/// Turns one bit of a file.
pub(super) fn damage(image: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

fn volume(id: &str, image: &str, further: &[(&str, &str)]) -> Volume {
    let of = [("server", server()), ("share", "/images".to_owned()), ("image", image.to_owned())];
    let of: Vec<_> = of.iter().map(|(key, value)| (*key, value.as_str())).chain(further.iter().copied()).collect();
    Volume::flat(id, &of)
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_seal_and_veritysetup_make_is_understood_by_the_other_and_by_the_kernel() {
    let image = make_image("interop.sqsh");
    let path = image.to_str().unwrap();
    let size = fs::metadata(&image).unwrap().len();
    let offset = format!("--hash-offset={}", size.next_multiple_of(4096));
    run("cp", &[path, "/images/theirs.sqsh"]);
    run("truncate", &["--size=%4096", "/images/theirs.sqsh"]);
    let root = root_of(&["seal", path]);
    assert_eq!(root_of(&["verify", path]), root);
    run("veritysetup", &["verify", path, path, &root, &offset]);
    // Theirs, with a salt.
    let told = run("veritysetup", &["format", "/images/theirs.sqsh", "/images/theirs.sqsh", &offset]);
    let theirs = told.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim().to_owned();
    assert_ne!(theirs, root);
    assert_eq!(root_of(&["verify", "/images/theirs.sqsh"]), theirs);
    let driver = Driver::start();
    for (image, root) in [("interop.sqsh", &root), ("theirs.sqsh", &theirs)] {
        let volume = volume(image, image, &[("verity", root)]);
        let target = driver.mount(&volume, image).unwrap();
        assert_eq!(fs::read(target.join("two")).unwrap().len(), 1 << 20);
        driver.unmount(&volume, image);
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_block_that_does_not_fit_its_root_hash_is_an_error_and_told_and_all_else_is_read() {
    let image = make_image("verified.sqsh");
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let mut driver = Driver::start();
    let verified = volume("verified", "verified.sqsh", &[("verity", &root), ("overlay", "directory")]).inline();
    let bare = volume("bare", "verified.sqsh", &[("verity", &root)]).inline();
    let unverified = volume("unverified", "verified.sqsh", &[]).inline();
    let target = driver.publish(&verified, "verified").unwrap();
    let two = fs::read(target.join("two")).unwrap();
    // A new process finds the device, and who does not verify gets another.
    driver.kill();
    driver.launch();
    driver.publish(&bare, "bare").unwrap();
    assert_eq!((driver.verified_devices(), driver.loop_devices().len()), (1, 1));
    driver.publish(&unverified, "unverified").unwrap();
    assert_eq!((driver.verified_devices(), driver.loop_devices().len()), (1, 2));
    let devices = || driver.status()["loopDevices"].as_array().unwrap().clone();
    let of = |devices: Vec<Value>| devices.into_iter().find(|device| device["verified"] == true).unwrap();
    assert_eq!((of(devices())["published"].clone(), of(devices())["corrupted"].clone()), (2.into(), false.into()));
    assert!(!driver.stats(&bare, "bare").unwrap().volume_condition.unwrap().abnormal);

    // In the first file: squashfs puts its data behind the superblock.
    damage(&image, 100_000);
    fresh_caches();
    for pod in ["verified", "bare"] {
        let error = fs::read(driver.target(pod).join("one")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(fs::read(driver.target(pod).join("two")).unwrap() == two);
    }
    assert!(fs::read(driver.target("unverified").join("one")).is_ok(), "nobody looks");
    assert_eq!(of(devices())["corrupted"], true);
    let condition = driver.stats(&bare, "bare").unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("other bytes than its root hash says"), "{condition:?}");
    for (volume, pod) in [(&verified, "verified"), (&bare, "bare"), (&unverified, "unverified")] {
        driver.unpublish(volume, pod).unwrap();
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_image_with_another_root_hash_without_a_tree_or_truncated_is_refused_before_it_is_mounted() {
    let image = make_image("refused.sqsh");
    let plain = fs::read(&image).unwrap();
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let sealed = fs::read(&image).unwrap();
    let driver = Driver::start();
    let refused = |root: &str, content: &[u8], why: &str| {
        fs::write(&image, content).unwrap();
        let error = driver.mount(&volume("v", "refused.sqsh", &[("verity", root)]), "pod").unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains(why), "{error}");
        driver.assert_nothing_left();
    };
    refused(&"0".repeat(64), &sealed, "does not have the root hash 0000");
    refused(&root, &plain, "see 'seal'");
    refused(&root, &sealed[..sealed.len() - 4096], "see 'seal'");
    let mut damaged = sealed.clone();
    damaged[500] ^= 1;
    refused(&root, &damaged, "does not have the root hash");
    // The tree of another image behind this one's data.
    let other = make_image("other.sqsh");
    root_of(&["seal", other.to_str().unwrap()]);
    refused(&root, &fs::read(other).unwrap(), "does not have the root hash");
    assert!(!driver.log().contains("step=\"squashfs\""), "no file system was mounted");
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_image_is_mounted_whose_root_hash_beside_it_is_signed_by_a_key_that_the_policy_trusts() {
    let image = make_image("signed.sqsh");
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let beside = |end: &str| PathBuf::from(format!("{}.root{end}", image.display()));
    fs::write(beside(""), format!("{root}\n")).unwrap();
    let keys = Keys::none();
    let (ours, _) = (keys.make("ours"), keys.make("stranger"));
    let sign = |name: &str| keys.sign(name, &beside(""));
    let policy = format!("requireVerity: true\ntrustedKeys: [{ours}]");
    let mut driver = Driver::with_policy(&policy);
    let volume = volume("v", "signed.sqsh", &[("verity", "signed")]);
    let refused = |driver: &Driver, code: Code, why: &str| {
        let error = driver.mount(&volume, "pod").unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(why), "{error}");
        driver.assert_nothing_left();
    };
    refused(&driver, Code::NotFound, "signed.sqsh.root.minisig");
    sign("stranger");
    refused(&driver, Code::PermissionDenied, "by none of the policy's trustedKeys");
    sign("ours");
    fs::write(beside(""), format!("{}\n", "0".repeat(64))).unwrap();
    refused(&driver, Code::PermissionDenied, "by none of the policy's trustedKeys");
    fs::write(beside(".minisig"), "untrusted comment: nothing\n").unwrap();
    refused(&driver, Code::PermissionDenied, "is no signature of minisign(1)");
    assert!(!driver.log().contains("step=\"squashfs\""), "no file system was mounted");
    fs::write(beside(""), format!("{root}\n")).unwrap();
    sign("ours");
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(fs::read(target.join("two")).unwrap().len(), 1 << 20);
    // Another image in its place, sealed again: the signature is not of it. What runs goes on, also for a new process without its server.
    let other = make_image("resealed.sqsh");
    let other_root = root_of(&["seal", other.to_str().unwrap()]);
    driver.kill();
    driver.launch();
    let link = Link::cut();
    in_time("a pod of a staged volume", || driver.publish(&volume, "later")).unwrap();
    link.restore();
    assert_eq!((driver.verified_devices(), driver.loop_devices().len()), (1, 1));
    driver.unpublish(&volume, "later").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    fs::rename(other, &image).unwrap();
    refused(&driver, Code::FailedPrecondition, "does not have the root hash");
    fs::write(beside(""), format!("{other_root}\n")).unwrap();
    refused(&driver, Code::PermissionDenied, "by none of the policy's trustedKeys");
    let bare = self::volume("bare", "signed.sqsh", &[]);
    let error = driver.mount(&bare, "pod").unwrap_err();
    assert!(error.code() == Code::PermissionDenied && error.message().starts_with("verity: "), "{error}");
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_keys_that_the_policy_names_for_a_server_take_the_place_of_all_others() {
    let image = make_image("own-keys.sqsh");
    let hash = PathBuf::from(format!("{}.root", image.display()));
    fs::write(&hash, root_of(&["seal", image.to_str().unwrap()])).unwrap();
    let keys = Keys::none();
    let (ours, other) = (keys.make("ours"), keys.make("other"));
    keys.sign("ours", &hash);
    let mount = |of_all: &str, of_server: &str| {
        let servers = format!("[{{host: {}, exports: [/images], trustedKeys: [{of_server}]}}]", server());
        let driver = Driver::with_policy(&format!("trustedKeys: [{of_all}]\nservers: {servers}"));
        let volume = volume("v", "own-keys.sqsh", &[("verity", "signed")]);
        let answer = driver.mount(&volume, "pod").map(|_| driver.unmount(&volume, "pod"));
        driver.assert_nothing_left();
        answer
    };
    mount(&other, &ours).unwrap();
    assert_eq!(mount(&ours, &other).unwrap_err().code(), Code::PermissionDenied);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_verified_image_is_moved_to_its_copy_and_verified_there() {
    let image = make_image("copied-verified.sqsh");
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let driver = Driver::start_with(&["--cache-quota=1Gi", "--cache-min-free=1Mi", "--timeout=20"], None);
    let volume = volume("v", "copied-verified.sqsh", &[("verity", &root), ("cache", "node")]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for("the copy", || driver.status()["loopDevices"][0]["local"] == true);
    let link = Link::cut();
    fresh_caches();
    let one = fs::read(target.join("one")).unwrap();
    let later = in_time("a pod", || driver.publish(&volume, "later")).unwrap();
    assert!(fs::read(later.join("one")).unwrap() == one);
    let copies = fs::read_dir(driver.data_dir().join("cache")).unwrap().map(|file| file.unwrap().path());
    let copy = copies.into_iter().find(|path| path.extension().is_some_and(|end| end == "image")).unwrap();
    damage(&copy, 100_000);
    fresh_caches();
    assert_eq!(fs::read(target.join("one")).unwrap_err().raw_os_error(), Some(libc::EIO));
    let condition = in_time("its condition", || driver.stats(&volume, "pod")).unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("look after the disk of its copy"), "{condition:?}");
    driver.unpublish(&volume, "later").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    link.restore();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_killed_anywhere_while_it_verifies_goes_on_and_leaves_nothing() {
    let image = make_image("killed-verified.sqsh");
    let root = root_of(&["seal", image.to_str().unwrap()]);
    let mut driver = Driver::start();
    let volume = volume("v", "killed-verified.sqsh", &[("verity", &root)]);
    let is_right = |target: &Path| assert_eq!(fs::read(target.join("two")).unwrap().len(), 1 << 20);
    killed::anywhere(&mut driver, &volume, &is_right);
}
