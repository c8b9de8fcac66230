//! The server dies: every call ends, what was mounted goes on, and teardown needs nobody's help.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use super::harness::image::Tree;
use super::harness::nfs_server::{Link, StuckServer, fresh_caches};
use super::harness::node::{in_time, node_is_well, start_with};
use super::harness::{Driver, Volume, run, wait_for};
use super::{nfs, seed, squashfs};

fn start() -> Driver {
    start_with(&["--timeout=20"], None)
}

/// The threads and open files of the driver.
fn resources(driver: &Driver) -> (usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", driver.pid())).unwrap().count();
    (count("task"), count("fd"))
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_dead_server_fails_new_volumes_in_time_and_no_others() {
    Tree::new(&[("file", "1")]).squashfs("/images/outage.sqsh");
    Tree::new(&[("file", "local")]).squashfs("/srv/other.sqsh");
    let driver = start_with(&["--timeout=20"], Some("hostPaths: [/srv]"));
    let volume = Volume::spec("v", &seed("/outage.sqsh"));
    let inline = Volume::spec("inline", &seed("/outage.sqsh")).inline();
    let other = Volume::spec(
        "other",
        &json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {
            "kind": "loopback", "loopback": {"path": "/srv/other.sqsh", "base": "root"}
        }}}),
    );
    let before = resources(&driver);
    let link = Link::cut();
    for _ in 0..3 {
        let error = in_time("stage", || driver.stage(&volume)).unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        let error = in_time("publish", || driver.publish(&inline, "pod")).unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error}");
    }
    let target = in_time("another server's volume", || driver.mount(&other, "other")).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "local");
    node_is_well(&driver);
    in_time("unpublish", || driver.unpublish(&inline, "pod")).unwrap();
    in_time("unstage", || driver.unstage(&volume)).unwrap();
    link.restore();
    driver.unmount(&other, "other");
    driver.mount(&volume, "pod").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    wait_for("threads and files to go", || resources(&driver) <= before);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn pods_of_a_dead_server_can_be_torn_down_and_started() {
    Tree::new(&[("file", "1")]).squashfs("/images/teardown.sqsh");
    let driver = start();
    let before = resources(&driver);
    let volume = Volume::spec("v", &seed("/teardown.sqsh")).writable();
    let image = Volume::spec("image", &squashfs("/teardown.sqsh"));
    driver.mount(&volume, "one").unwrap();
    driver.mount(&image, "image").unwrap();
    let plain = Volume::spec("plain", &nfs("4.2"));
    driver.stage(&plain).unwrap();
    // So large that reading its head does not read all of it.
    let large = Tree::new(&[]);
    let file = large.path().join("file").display().to_string();
    run("dd", &["if=/dev/urandom", &format!("of={file}"), "bs=1M", "count=4", "status=none"]);
    large.squashfs("/images/unused.sqsh");
    let unused = Volume::spec("unused", &squashfs("/unused.sqsh"));
    driver.stage(&unused).unwrap();
    let link = Link::cut();
    // A staged volume needs the server for nothing but what is not cached; one that shows the export itself does.
    in_time("publish of a staged volume", || driver.publish(&volume, "two")).unwrap();
    in_time("the first publish of a staged volume", || driver.publish(&unused, "unused")).unwrap();
    in_time("unpublish", || driver.unpublish(&unused, "unused")).unwrap();
    node_is_well(&driver);
    let condition = in_time("stats", || driver.stats(&volume, "one")).unwrap().volume_condition.unwrap();
    assert!(condition.abnormal, "{}", condition.message);
    let error = in_time("publish of plain NFS", || driver.publish(&plain, "plain")).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    node_is_well(&driver);
    for (volume, pod) in [(&volume, "one"), (&volume, "two"), (&image, "image")] {
        in_time("unpublish", || driver.unpublish(volume, pod)).unwrap();
    }
    in_time("unstage", || driver.unstage(&volume)).unwrap();
    in_time("unstage", || driver.unstage(&image)).unwrap();
    in_time("unstage", || driver.unstage(&plain)).unwrap();
    in_time("unstage", || driver.unstage(&unused)).unwrap();
    assert_eq!(driver.mounts(), [""; 0]);
    link.restore();
    driver.assert_nothing_left();
    wait_for("threads and files to go", || resources(&driver) <= before);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn readers_wait_for_a_server_and_go_on_without_an_error() {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=8", "status=none"]);
    let sum = run("sha256sum", &[file.to_str().unwrap()]);
    tree.squashfs("/images/readers.sqsh");
    let sum_at = |target: &Path| {
        let file = target.join("file").display().to_string();
        Command::new("sha256sum").arg(file).stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    for end_of_outage in ["restore", "restart"] {
        let driver = start();
        let volume = Volume::spec("v", &seed("/readers.sqsh")).writable();
        let target = driver.mount(&volume, "pod").unwrap();
        fresh_caches();
        let reader = if end_of_outage == "restore" {
            let link = Link::cut();
            let reader = sum_at(&target);
            std::thread::sleep(Duration::from_secs(5));
            link.restore();
            reader
        } else {
            run("nfs-server", &["stop"]);
            let reader = sum_at(&target);
            std::thread::sleep(Duration::from_secs(3));
            run("nfs-server", &["start"]);
            reader
        };
        let output = reader.wait_with_output().unwrap();
        assert!(output.status.success(), "a reader saw an error after {end_of_outage}");
        assert_eq!(output.stdout[..64], sum.as_bytes()[..64]);
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_call_that_hangs_is_answered_and_undone_by_the_next() {
    // The probe gets an answer, the mount does not.
    let server = StuckServer::start();
    let mut driver = Driver::start_with(&["--timeout=3"], None);
    let volume = Volume::spec("v", &super::attach("squashfs", "a.sqsh", &server.export("/images")));
    let inline = Volume { id: "inline".into(), ..volume.clone() }.inline();
    let error = in_time("stage", || driver.stage(&volume)).unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    assert!(error.message().contains("still at: mount"), "{error}");
    let error = in_time("publish", || driver.publish(&inline, "pod")).unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    in_time("unpublish", || driver.unpublish(&inline, "pod")).unwrap();
    in_time("unstage", || driver.unstage(&volume)).unwrap();
    node_is_well(&driver);

    assert_eq!(driver.mounts(), [""; 0]);
    assert_eq!(driver.published_directories(), 0);
    // Only the end of its process lets go of a mount that the kernel will not give up.
    driver.kill();
    drop(server);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_changed_image_is_reported_in_words_and_its_readers_fare_as_documented() {
    let driver = start();
    let image = |name: &str, content: &str| {
        let tree = Tree::new(&[("file", content)]);
        let file = tree.path().join("data").display().to_string();
        run("dd", &["if=/dev/urandom", &format!("of={file}"), "bs=64K", "count=16", "status=none"]);
        tree.squashfs(format!("/images/{name}"))
    };
    for version in ["3", "4.2"] {
        // A server of NFS 4 knows that the file is open and keeps it; for NFS 3 a file without a name is gone.
        let is_kept = version != "3";
        let change = |name: &str, words: &str, readable: Option<bool>, change: &dyn Fn(&Path)| {
            let path = image(name, "old");
            let volume = Volume::spec(name, &super::attach("squashfs", name, &nfs(version)));
            let target = driver.mount(&volume, name).unwrap();
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "old");
            change(&path);
            let mut message = String::new();
            // The NFS client may believe its cached name for up to a minute (nfs(5), acdirmax): the driver asks past it.
            let condition = driver.stats(&volume, name).unwrap().volume_condition.unwrap();
            if condition.abnormal {
                message = condition.message;
            }
            assert!(message.contains(words), "NFS {version}, {name}: {message:?} does not say {words:?}");
            fresh_caches();
            let read = fs::read(target.join("data"));
            if let Some(readable) = readable {
                assert_eq!(
                    read.is_ok(),
                    readable,
                    "NFS {version}, {name}: reading what is not cached: {:?}",
                    read.err()
                );
            }
            driver.unmount(&volume, name);
        };
        change(&format!("replaced-{version}"), "was replaced", Some(is_kept), &|path| {
            let new = image("next", "new");
            fs::rename(new, path).unwrap();
        });
        change(&format!("truncated-{version}"), "was truncated", Some(false), &|path| {
            fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
        });
        change(&format!("gone-{version}"), "is gone", Some(is_kept), &|path| fs::remove_file(path).unwrap());
        change(&format!("written-{version}"), "was written over", None, &|path| {
            use std::os::unix::fs::FileExt;
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(b"x", fs::metadata(path).unwrap().len() - 1).unwrap();
        });
    }
    fs::create_dir_all("/images/below").unwrap();
    let path = image("below/bound", "old");
    let bind = json!({"kind": "bind", "bind": {"path": "below", "base": "mount", "mount": nfs("4.2")}});
    let volume = Volume::spec("bound", &super::attach("squashfs", "bound", &bind));
    driver.mount(&volume, "bound").unwrap();
    fs::rename(image("next", "new"), path).unwrap();
    let condition = driver.stats(&volume, "bound").unwrap().volume_condition.unwrap();
    assert!(condition.message.contains("was replaced"), "{}", condition.message);
    driver.unmount(&volume, "bound");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_killed_under_load_hurts_no_reader_and_the_next_one_ends_all() {
    replaced_under_load(|_| {});
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_upgraded_under_load_hurts_no_reader_and_the_new_one_ends_all() {
    // The same code in another file, as an upgrade brings it.
    run("sh", &["-c", "cp $(command -v csi-driver-squashfs) /root/upgraded"]);
    replaced_under_load(|driver| driver.binary = "/root/upgraded".into());
}

fn replaced_under_load(replace: impl FnOnce(&mut Driver)) {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=2", "status=none"]);
    tree.squashfs("/images/load.sqsh");
    let mut driver = start();
    let volumes: Vec<_> = (0..50).map(|n| Volume::spec(&format!("v{n}"), &seed("/load.sqsh")).writable()).collect();
    let pod = |n: usize| format!("pod-{n}");
    let targets: Vec<_> =
        volumes.iter().enumerate().map(|(n, volume)| driver.mount(volume, &pod(n)).unwrap()).collect();
    fresh_caches();
    let readers: Vec<_> = targets
        .iter()
        .map(|target| Command::new("cat").arg(target.join("file")).stdout(std::process::Stdio::null()).spawn().unwrap())
        .collect();
    driver.kill();
    replace(&mut driver);
    driver.launch();
    for mut reader in readers {
        assert!(reader.wait().unwrap().success(), "a reader saw an error");
    }
    assert_eq!(driver.loop_devices().len(), 1);
    for (n, volume) in volumes.iter().enumerate() {
        driver.unpublish(volume, &pod(n)).unwrap();
        driver.unstage(volume).unwrap();
    }
    let program = fs::read_link(format!("/proc/{}/exe", driver.pid())).unwrap();
    assert_eq!(program.file_name(), driver.binary.file_name());
    driver.assert_nothing_left();
}
