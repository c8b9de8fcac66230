//! Many volumes at once, and many one after the other: neither makes the driver slower or larger.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::harness::tracer::Tracer;
use crate::harness::{Driver, Volume, kernel, node, soak, wait_for};
use crate::{Images, squashfs};

/// What a driver process has, as the kernel counts it.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    files: usize,
    threads: usize,
    loop_devices: usize,
    mounts: usize,
    private_mounts: usize,
}

impl Size {
    fn of(driver: &Driver) -> Self {
        let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", driver.pid())).unwrap().count();
        Size {
            files: count("fd"),
            threads: count("task"),
            loop_devices: driver.loop_devices().len(),
            mounts: driver.mounts().len(),
            private_mounts: kernel::private_mounts(driver.pid()).len(),
        }
    }
}

/// The memory that a process uses (`VmRSS`), or used at most (`VmHWM`), in KiB.
fn memory(driver: &Driver, which: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", driver.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(which)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What a volume at the end of a long life costs the driver, in changes to the system and in system calls.
fn cost(driver: &Driver, call: impl FnOnce()) -> (Vec<&'static str>, usize) {
    let tracer = Tracer::watch(driver.pid());
    call();
    let report = tracer.finish();
    let mut changes: Vec<_> = report.changes.iter().map(|change| change.call).collect();
    // In which order a directory lists its entries is nobody's promise.
    changes.sort_unstable();
    (changes, report.calls)
}

#[test]
#[ignore = "needs root: make test-host"]
fn two_thousand_volumes_later_the_driver_is_no_larger() {
    let images = Images::new();
    let driver = images.driver();
    let two = json!({"kind": "overlay", "overlay": {
        "lower": [squashfs(&images.image("one")), squashfs(&images.image("two"))]
    }});
    let plain = Volume::spec("plain", &squashfs(&images.image("one")));
    let volumes = [images.volume("overlay", "one"), plain, Volume::spec("two layers", &two).writable()];
    let round = |number: usize| {
        let volume = &volumes[number % volumes.len()];
        let volume = Volume { id: format!("{}-{number}", volume.id), ..volume.clone() };
        let target = driver.mount(&volume, "pod").unwrap();
        assert!(target.join("file").exists());
        driver.unmount(&volume, "pod");
        // As the kubelet asks for something that is not there; also a thing to be forgotten.
        driver.unpublish(&volume, &format!("never-{}", number % 10)).unwrap();
    };
    (0..100).for_each(round);
    driver.assert_nothing_left();
    // A thread ends a moment after it did its work; what remains serves, and lets go of things.
    wait_for("threads to end", || Size::of(&driver).threads == 2);
    let (size, before) = (Size::of(&driver), memory(&driver, "VmRSS"));
    let rounds = soak(2_000, 20_000);
    (100..100 + rounds).for_each(round);
    driver.assert_nothing_left();
    wait_for("threads to end", || Size::of(&driver).threads == 2);
    assert_eq!(Size::of(&driver), size);
    let after = memory(&driver, "VmRSS");
    println!("{rounds} rounds: {before} KiB before, {after} KiB after; {size:?}");
    assert!(after < before + 1024, "{rounds} rounds: the driver grew from {before} to {after} KiB");
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_thousandth_volume_on_a_node_costs_what_the_first_did() {
    const COUNT: usize = 1000;
    let images = Images::new();
    let driver = images.driver();
    let volumes: Vec<_> =
        (0..COUNT + 10).map(|n| images.volume(&format!("v{n}"), &format!("image{}", n % 10))).collect();
    let pod = |n: usize| format!("pod-{n}");
    // The first of each image attaches it.
    for (n, volume) in volumes.iter().enumerate().take(10) {
        driver.mount(volume, &pod(n)).unwrap();
    }
    let measure = |n: usize| {
        let stage = cost(&driver, || driver.stage(&volumes[n]).unwrap());
        let publish = cost(&driver, || drop(driver.publish(&volumes[n], &pod(n)).unwrap()));
        (stage, publish)
    };
    let take_down = |n: usize| {
        let unpublish = cost(&driver, || driver.unpublish(&volumes[n], &pod(n)).unwrap());
        let unstage = cost(&driver, || driver.unstage(&volumes[n]).unwrap());
        (unpublish, unstage)
    };
    let first_up = measure(10);
    let first_down = take_down(10);
    for (n, volume) in volumes.iter().enumerate().take(COUNT).skip(10) {
        driver.mount(volume, &pod(n)).unwrap();
    }
    assert_eq!(driver.mounts().len(), COUNT);
    assert_eq!(driver.loop_devices().len(), 10);
    for n in 0..COUNT {
        let file = driver.target(&pod(n)).join("file");
        assert_eq!(fs::read_to_string(file).unwrap(), format!("image{}", n % 10));
    }
    let last_up = measure(COUNT);
    let last_down = take_down(COUNT);

    let costs = [
        ("stage", first_up.0, last_up.0),
        ("publish", first_up.1, last_up.1),
        ("unpublish", first_down.0, last_down.0),
        ("unstage", first_down.1, last_down.1),
    ];
    for (what, first, last) in costs {
        println!("{what}: {} system calls for the first, {} for number {COUNT}", first.1, last.1);
        assert_eq!(first.0, last.0, "{what} does something else on a full node");
        // Which thread is woken by which is a matter of luck, and costs a call or two.
        assert!(last.1 <= first.1 + 20, "{what}: {} system calls for the first, {} for the last", first.1, last.1);
    }
    for (n, volume) in volumes.iter().enumerate().take(COUNT) {
        driver.unmount(volume, &pod(n));
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs root: make test-host"]
fn what_a_pod_leaves_costs_neither_memory_nor_time_whatever_its_shape() {
    let count = soak(200_000, 2_000_000);
    let images = Images::new();
    let mut driver = images.driver();
    driver.terminate();
    // A million directories on a disk would take longer to make than to test.
    let (memory_disk, data) = (tempfile::tempdir_in("/dev/shm").unwrap(), driver.data_dir());
    fs::remove_dir_all(&data).unwrap();
    std::os::unix::fs::symlink(memory_disk.path(), &data).unwrap();
    make_directories(&data.join("trash/left"), count);
    make_directories(&data.join("trash"), count);
    driver.launch();
    let (before, volume) = (memory(&driver, "VmHWM"), images.volume("v", "image"));
    let entries = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<HashSet<_>>();
    let scratch = |pod: &str| {
        let before = entries(&data.join("published"));
        driver.publish(&volume, pod).unwrap();
        let new = entries(&data.join("published")).difference(&before).next().unwrap().clone();
        entries(&new).into_iter().find(|path| path.is_dir()).unwrap().join("upper")
    };
    driver.stage(&volume).unwrap();
    make_directories(&scratch("wide"), count);
    let deep = scratch("deep");
    make_directories(&deep.join("a/b/c"), count / 10);
    for pod in ["wide", "deep"] {
        node::in_time("unpublish", || driver.unpublish(&volume, pod)).unwrap();
    }
    let trash = data.join("trash");
    let mut meanwhile = 0;
    while fs::read_dir(&trash).unwrap().next().is_some() {
        node::in_time("mount", || driver.publish(&volume, "meanwhile")).unwrap();
        node::in_time("unmount", || driver.unpublish(&volume, "meanwhile")).unwrap();
        meanwhile += 1;
    }
    driver.unstage(&volume).unwrap();
    let after = memory(&driver, "VmHWM");
    println!("3 times {count} directories: at most {before} KiB before, {after} KiB after; {meanwhile} pods meanwhile");
    assert!(after < before + 2048, "from {before} to {after} KiB");
    driver.assert_nothing_left();
}

fn make_directories(parent: &Path, count: usize) {
    fs::create_dir_all(parent).unwrap();
    for number in 0..count {
        fs::create_dir(parent.join(number.to_string())).unwrap();
    }
}
