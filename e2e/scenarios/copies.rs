//! Copies of images on the node's disk: pods that go on and start without their server, and what is left when that is cut short.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;
use tonic::Code;

use super::harness::image::Tree;
use super::harness::nfs_server::{Link, fresh_caches};
use super::harness::node::in_time;
use super::harness::readers::hash;
use super::harness::tracer::Tracer;
use super::harness::{Driver, Volume, run, wait_for};
use super::server;

/// A driver that keeps copies; a call of it ends in 20 s.
fn start(further: &[&str]) -> Driver {
    Driver::start_with(&[&["--cache-quota=1Gi", "--cache-min-free=1Mi", "--timeout=20"], further].concat(), None)
}

/// A volume of an image on the server that is to be copied to the node.
fn copied(id: &str, image: &str) -> Volume {
    Volume::flat(id, &[("server", &server()), ("share", "/images"), ("image", image), ("cache", "node")])
}

/// An image with a file of `mib` that no compression makes smaller; returns the file's digest.
pub(super) fn make_image(name: &str, mib: u32) -> Vec<u8> {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", &format!("count={mib}"), "status=none"]);
    let digest = hash(&file).unwrap();
    tree.squashfs(format!("/images/{name}"));
    digest
}

/// Whether each device of the driver stands on a copy; false where it has none.
fn local(driver: &Driver) -> bool {
    let status = driver.status();
    let devices = status["loopDevices"].as_array().unwrap();
    !devices.is_empty() && devices.iter().all(|device| device["local"] == Value::Bool(true))
}

fn wait_until_local(driver: &Driver) {
    wait_for("the image to be local", || local(driver));
}

fn cache_dir(driver: &Driver) -> PathBuf {
    driver.data_dir().join("cache")
}

fn files(driver: &Driver) -> Vec<String> {
    let files = fs::read_dir(cache_dir(driver)).unwrap();
    files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
}

/// `csi-driver-squashfs cache ...` beside a driver.
fn cache(driver: &Driver, arguments: &[&str]) -> Output {
    let of = [format!("--driver-name={}", driver.name), format!("--data-dir={}", driver.data_dir().display())];
    Command::new(&driver.binary).arg("cache").args(arguments).args(of).output().unwrap()
}

pub(super) fn rpcs() -> u64 {
    let output = Command::new("nfs-server").arg("rpcs").output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// The drivers' first and last moments with a dead server, seen by a pod that reads all the time.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_pod_reads_on_and_others_start_when_their_server_is_gone() {
    let digest = make_image("local.sqsh", 48);
    let mut driver = start(&[]);
    let (volume, other) = (copied("v", "local.sqsh"), copied("other", "local.sqsh").inline());
    let target = driver.mount(&volume, "pod").unwrap();
    // It reads before, while and after its device is moved.
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let reader = {
        let (file, digest, stop, rounds) =
            (target.join("file"), digest.clone(), Arc::clone(&stop), Arc::clone(&rounds));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                fresh_caches();
                assert_eq!(hash(&file).unwrap(), digest);
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    wait_until_local(&driver);
    let moved = rounds.load(Ordering::Relaxed);
    wait_for("a whole round on the copy", || rounds.load(Ordering::Relaxed) >= moved + 2);
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    let before = rpcs();
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    assert!(rpcs() - before < 10, "48 MiB were read, and the server was asked {} times", rpcs() - before);

    let link = Link::cut();
    let begun = in_time("a new pod", || driver.publish(&other, "new")).unwrap();
    fresh_caches();
    for target in [&target, &begun] {
        assert_eq!(hash(&target.join("file")).unwrap(), digest);
    }
    let condition = in_time("its condition", || driver.stats(&volume, "pod")).unwrap().volume_condition.unwrap();
    assert!(!condition.abnormal, "{}", condition.message);
    let plain = Volume::flat("plain", &[("server", &server()), ("share", "/images"), ("image", "local.sqsh")]);
    assert_eq!(in_time("without a copy", || driver.stage(&plain)).unwrap_err().code(), Code::Unavailable);
    // The driver is killed; the kernel knows by itself what is in use.
    driver.kill();
    let evicted = cache(&driver, &["evict", "local.sqsh"]);
    assert!(!evicted.status.success() && String::from_utf8(evicted.stdout).unwrap().contains("in use"));
    driver.launch();
    assert_eq!(hash(&in_time("a pod", || driver.publish(&volume, "later")).unwrap().join("file")).unwrap(), digest);
    assert_eq!(driver.loop_devices().len(), 1);
    driver.unpublish(&other, "new").unwrap();
    driver.unpublish(&volume, "later").unwrap();
    in_time("the end of the pod", || driver.unmount(&volume, "pod"));
    // Nothing of the time before is left, and the server is still gone: as after a reboot.
    driver.kill();
    wait_for("the devices to go", || driver.loop_devices().is_empty());
    driver.launch();
    let target = in_time("a pod after a reboot", || driver.mount(&volume, "pod")).unwrap();
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    driver.unmount(&volume, "pod");
    link.restore();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_killed_anywhere_in_a_copy_or_a_move_goes_on_and_leaves_nothing() {
    let digest = make_image("killed-copy.sqsh", 3);
    let volume = copied("v", "killed-copy.sqsh").inline();
    let mut driver = start(&[]);
    let dead = |pid: u32| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z"));
    for number in 1.. {
        let pid = driver.pid();
        let tracer = Tracer::kill_before(pid, number);
        let _ = driver.publish(&volume, "pod");
        wait_for("a copy or a death", || dead(pid) || local(&driver));
        let report = tracer.finish();
        if report.killed {
            driver.kill();
            driver.launch();
        }
        driver.publish(&volume, "pod").unwrap();
        let last = report.changes.last().map(ToString::to_string).unwrap_or_default();
        println!("{number}: {last}");
        wait_until_local(&driver);
        fresh_caches();
        assert_eq!(hash(&driver.target("pod").join("file")).unwrap(), digest, "killed before {last}");
        driver.unpublish(&volume, "pod").unwrap();
        driver.assert_nothing_left();
        let mut names: Vec<_> =
            files(&driver).into_iter().filter_map(|name| Some(name.split_once('.')?.1.to_owned())).collect();
        names.sort();
        assert_eq!(names, ["image", "json"], "killed before {last}");
        assert!(cache(&driver, &["evict", "killed-copy"]).status.success());
        assert_eq!(files(&driver), ["driver"]);
        if !report.killed {
            assert!(number > 40, "only {number} points");
            return;
        }
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn pods_that_run_get_copies_when_they_are_switched_on_and_outlive_their_server() {
    let digest = make_image("switched.sqsh", 8);
    run("cp", &["/images/switched.sqsh", "/export2/"]);
    let mut driver = Driver::start_with(&["--timeout=20"], None);
    let of = |id: &str, share| {
        Volume::flat(id, &[("server", &server()), ("share", share), ("image", "switched.sqsh")]).inline()
    };
    let (volume, elsewhere) = (of("v", "/images"), of("elsewhere", "/export2"));
    let target = driver.publish(&volume, "pod").unwrap();
    driver.restart_with(&["--cache-quota=1Gi", "--cache-min-free=1Mi", "--cache-by-default"]);
    wait_until_local(&driver);
    // What replaces the server has the image too, as another file.
    let replaced = driver.publish(&elsewhere, "other").unwrap();
    wait_until_local(&driver);
    let link = Link::cut();
    fresh_caches();
    for target in [&target, &replaced] {
        assert_eq!(hash(&target.join("file")).unwrap(), digest);
    }
    for (volume, pod) in [(&volume, "pod"), (&elsewhere, "other")] {
        in_time("the end of a pod", || driver.unpublish(volume, pod)).unwrap();
    }
    link.restore();
    driver.assert_nothing_left();
}

/// Linux 6.6 and newer shut such a file system down when its device gets another file.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_ext4_image_is_copied_and_not_moved_and_the_next_pod_begins_with_the_copy() {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=8", "status=none"]);
    let digest = hash(&file).unwrap();
    tree.ext4("/images/copied.ext4");
    let driver = Driver::start_with(&["--cache-quota=1Gi", "--cache-min-free=1Mi"], Some("fsTypes: [ext4]"));
    let (server, share) = (server(), ("share", "/images"));
    let of = [("server", server.as_str()), share, ("image", "copied.ext4"), ("fsType", "ext4"), ("cache", "node")];
    let volume = Volume::flat("v", &of).inline();
    let target = driver.publish(&volume, "pod").unwrap();
    wait_for("a copy", || files(&driver).iter().any(|name| name.ends_with(".image")));
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    let next = driver.publish(&volume, "next").unwrap();
    assert_eq!(driver.loop_devices().len(), 2);
    let link = Link::cut();
    fresh_caches();
    assert_eq!(hash(&next.join("file")).unwrap(), digest);
    link.restore();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    for pod in ["pod", "next"] {
        driver.unpublish(&volume, pod).unwrap();
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_disk_that_fills_up_costs_a_pod_nothing_but_the_copy() {
    let digest = make_image("full.sqsh", 24);
    let disk = tempfile::tempdir().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=40M,mode=700", "tmpfs", disk.path().to_str().unwrap()]);
    let driver = start(&[&format!("--cache-dir={}", disk.path().join("cache").display()), "--cache-rate=8Mi"]);
    let volume = copied("v", "full.sqsh");
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for("a part of a copy", || !driver.status()["copies"][0]["copied"].is_null());
    // Somebody else takes what is left.
    let filler = disk.path().join("filler");
    let filled =
        Command::new("dd").args(["if=/dev/zero", &format!("of={}", filler.display()), "bs=1M"]).status().unwrap();
    assert!(!filled.success());
    wait_for("the copy to fail", || driver.status()["copies"][0]["failed"].is_string());
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    assert!(driver.log().contains("is read from its server: write the copy of /images/full.sqsh"), "it says so");
    let parts = fs::read_dir(disk.path().join("cache")).unwrap().count();
    assert_eq!(parts, 1, "what is of no use gives its room back");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    drop(driver);
    run("umount", &[disk.path().to_str().unwrap()]);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_disk_that_fails_costs_a_pod_nothing_but_the_copy() {
    let digest = make_image("eio.sqsh", 24);
    let disk = tempfile::tempdir().unwrap();
    let path = |name: &str| disk.path().join(name).display().to_string();
    run("truncate", &["--size=64M", &path("disk")]);
    run("mkfs.ext4", &["-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", &path("disk")]);
    fs::create_dir(path("mounted")).unwrap();
    run("mount", &["-o", "loop", &path("disk"), &path("mounted")]);
    // What lies beyond the end of a disk cannot be written, nor read: EIO.
    run("truncate", &["--size=8M", &path("disk")]);
    let device = run("losetup", &["--associated", &path("disk"), "--noheadings", "--output", "NAME"]);
    run("losetup", &["--set-capacity", device.trim()]);
    let driver = start(&[&format!("--cache-dir={}", path("mounted/cache"))]);
    let volume = copied("v", "eio.sqsh");
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for("the copy to fail", || driver.status()["copies"][0]["failed"].is_string());
    let failed = driver.status()["copies"][0]["failed"].to_string();
    assert!(failed.contains("write the copy of /images/eio.sqsh") && failed.contains("Input/output error"), "{failed}");
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    assert!(!local(&driver));
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    drop(driver);
    run("umount", &[&path("mounted")]);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_node_is_warmed_by_hand_and_a_damaged_copy_is_found() {
    let digest = make_image("warm.sqsh", 4);
    let driver = start(&[]);
    let spec = driver.directory.join("spec.json");
    fs::write(&spec, super::squashfs("/warm.sqsh").to_string()).unwrap();
    let warmed = cache(&driver, &["warm", spec.to_str().unwrap(), "--cache-quota=1Gi", "--cache-min-free=1Mi"]);
    assert!(warmed.status.success(), "{warmed:?}");
    let line = String::from_utf8(warmed.stdout).unwrap();
    assert!(line.starts_with("/images/warm.sqsh of ") && line.contains("sha256:"), "{line}");
    assert_eq!(String::from_utf8(cache(&driver, &["list"]).stdout).unwrap(), line);
    assert!(cache(&driver, &["verify"]).status.success());
    let volume = copied("v", "warm.sqsh");
    let target = driver.mount(&volume, "pod").unwrap();
    assert!(local(&driver), "it begins with the copy");
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    let image = files(&driver).into_iter().find(|name| name.ends_with(".image")).unwrap();
    let image = cache_dir(&driver).join(image).display().to_string();
    run(
        "dd",
        &["if=/dev/urandom", &format!("of={image}"), "bs=1k", "seek=2000", "count=1", "conv=notrunc", "status=none"],
    );
    let verified = cache(&driver, &["verify"]);
    assert!(!verified.status.success() && String::from_utf8(verified.stdout).unwrap().contains("damaged, and removed"));
    assert_eq!(files(&driver), ["driver"]);
}
