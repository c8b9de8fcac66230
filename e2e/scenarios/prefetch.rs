//! Images that are read into the node's memory ahead of their readers.

use std::fs;
use std::io;
use std::path::Path;

use super::copies::{make_image, rpcs};
use super::harness::image::Tree;
use super::harness::nfs_server::{Link, fresh_caches};
use super::harness::node::in_time;
use super::harness::readers::hash;
use super::harness::{Driver, Volume, binary, run, wait_for};
use super::server;

fn ahead(id: &str, image: &str) -> Volume {
    let of = [("server", &*server()), ("share", "/images"), ("image", image), ("prefetch", "all")];
    Volume::flat(id, &of).inline()
}

/// Images that are being read ahead.
fn under_way(driver: &Driver) -> usize {
    driver.status()["prefetching"].as_array().unwrap().len()
}

fn wait_until_read(driver: &Driver) {
    wait_for("the image to be read ahead", || driver.log().contains("was read ahead"));
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_image_is_read_ahead_in_large_calls_and_its_readers_need_none() {
    let digest = make_image("ahead.sqsh", 32);
    let driver = Driver::start_with(&["--prefetch-budget=1Gi"], None);
    let volume = ahead("v", "ahead.sqsh");
    fresh_caches();
    let before = rpcs();
    let target = driver.publish(&volume, "pod").unwrap();
    wait_until_read(&driver);
    let calls = rpcs() - before;
    assert!(calls < 32 * 4, "{calls} calls for 32 MiB");
    let before = rpcs();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    assert!(rpcs() - before < 10, "its reader asked the server {} times", rpcs() - before);
    assert_eq!(under_way(&driver), 0);
    driver.unpublish(&volume, "pod").unwrap();
    driver.assert_nothing_left();
}

/// Eight files of 2 MiB, of which a pod reads two.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_was_read_of_an_image_is_read_ahead_in_fewer_calls_the_next_time() {
    let make = || {
        let tree = Tree::new(&[]);
        for file in 0..8 {
            let path = format!("of={}/{file}", tree.path().display());
            run("dd", &["if=/dev/urandom", &path, "bs=1M", "count=2", "status=none"]);
        }
        // Written elsewhere and renamed: another file.
        tree.squashfs("/images/learned.new");
        fs::rename("/images/learned.new", "/images/learned.sqsh").unwrap();
    };
    make();
    let mut driver = Driver::start_with(&["--prefetch-budget=64Mi"], None);
    let of = [("server", &*server()), ("share", "/images"), ("image", "learned.sqsh")];
    let volume = Volume::flat("v", &of).inline();
    let read_ahead = |driver: &Driver| driver.log().matches("was read ahead").count();
    // How often the server was asked for two files, and how often before that.
    let use_it = |driver: &Driver, wait: bool| {
        fresh_caches();
        let before = rpcs();
        let target = driver.publish(&volume, "pod").unwrap();
        if wait {
            wait_until_read(driver);
        }
        let published = rpcs();
        let digests = ["3", "6"].map(|file| hash(&target.join(file)).unwrap());
        let read = rpcs();
        driver.unpublish(&volume, "pod").unwrap();
        driver.assert_nothing_left();
        (published - before, read - published, digests)
    };
    let (published, read, digests) = use_it(&driver, false);
    assert_eq!(read_ahead(&driver), 0);
    wait_for("something to be learned", || driver.data_dir().join("learned").exists());
    driver.restart_with(&[]);
    let (published_again, read_again, digests_again) = use_it(&driver, true);
    println!("{published} calls and {read}; then {published_again} and {read_again}");
    assert_eq!(digests, digests_again);
    assert!(read > 20 && read_again < 5, "{read} calls, and then {read_again}");
    let ahead = published_again - published;
    assert!(ahead < read / 2, "{ahead} calls in place of {read}");
    let log = driver.log();
    let bytes = log.lines().find(|line| line.contains("was read ahead")).unwrap().split("bytes=").nth(1).unwrap();
    let bytes: u64 = bytes.split_whitespace().next().unwrap().parse().unwrap();
    assert!((4 << 20..6 << 20).contains(&bytes), "{bytes} bytes were read ahead for two files of 2 MiB");

    // What somebody wrote there costs a line of the log, and what is of another image nothing.
    let learned = fs::read_dir(driver.data_dir().join("learned")).unwrap().next().unwrap().unwrap().path();
    fs::write(learned, r#"{"parts":[[0,18446744073709551615]]}"#).unwrap();
    assert_eq!(use_it(&driver, false).2, digests);
    assert!(driver.log().contains("is not known: "));
    make();
    assert_ne!(use_it(&driver, false).2, digests);
    assert_eq!(read_ahead(&driver), 1);
}

/// What a node learned is put beside the image for one that knows nothing, and its files into the order that suits it.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_one_node_learned_saves_another_calls_and_more_where_files_lie_in_the_order_in_which_they_are_read() {
    let tree = Tree::new(&[]);
    for file in 0..64 {
        let path = format!("of={}/{}", tree.path().display(), name(file));
        run("dd", &["if=/dev/urandom", &path, "bs=1K", "count=300", "status=none"]);
    }
    let image = tree.squashfs("/images/profiled.sqsh");
    let profile = Path::new("/images/profiled.sqsh.profile");
    let _ = fs::remove_file(profile);
    let of = [("server", &*server()), ("share", "/images"), ("image", "profiled.sqsh"), ("overlay", "directory")];
    let volume = Volume::flat("v", &of).inline().writable();
    let mut driver = Driver::start_with(&["--prefetch-budget=64Mi"], None);
    let data_dir = driver.data_dir().display().to_string();
    let learned = || run_driver(&["profile", "learned", "/images/profiled.sqsh", "--data-dir", &data_dir]);
    // As a node that never had the image: how often the server was asked until the log had `words`, and then by readers.
    let use_it = |driver: &mut Driver, words: &str| {
        fresh_caches();
        let directory = driver.data_dir().join("learned");
        let _ = fs::remove_dir_all(&directory);
        driver.restart_with(&[]);
        let logged = |driver: &Driver| driver.log().matches(words).count();
        let (before, earlier) = (rpcs(), logged(driver));
        let target = driver.publish(&volume, "pod").unwrap();
        wait_for(words, || logged(driver) > earlier);
        let read_ahead = rpcs();
        let digests: Vec<_> = (3..64).step_by(8).map(|file| hash(&target.join(name(file))).unwrap()).collect();
        let read = rpcs();
        let order = run_driver(&["profile", "files", target.to_str().unwrap()]);
        driver.unpublish(&volume, "pod").unwrap();
        driver.assert_nothing_left();
        let is_learned =
            |file: io::Result<fs::DirEntry>| file.unwrap().path().extension().is_some_and(|it| it == "json");
        wait_for("something to be learned", || fs::read_dir(&directory).into_iter().flatten().any(is_learned));
        (read_ahead - before, read - read_ahead, digests, order)
    };
    let (begun, read, digests, order) = use_it(&mut driver, "watch what is read of");
    fs::write(profile, learned()).unwrap();
    let (begun_again, read_again, digests_again, _) = use_it(&mut driver, "was read ahead");
    assert_eq!(digests, digests_again);
    assert!(read > 20 && read_again < 5, "{read} calls, and then {read_again}");

    assert_eq!(order.lines().filter(|line| !line.contains(" -")).count(), digests.len(), "{order}");
    assert_eq!(order.lines().count(), 64, "{order}");
    fs::write("/tmp/order", &order).unwrap();
    let (tree, to) = (tree.path().to_str().unwrap(), image.to_str().unwrap());
    run("mksquashfs", &[tree, to, "-noI", "-noX", "-noappend", "-quiet", "-sort", "/tmp/order"]);
    fs::remove_file(profile).unwrap();
    assert_eq!(use_it(&mut driver, "watch what is read of").2, digests);
    fs::write(profile, learned()).unwrap();
    let (begun_sorted, read_sorted, digests_sorted, _) = use_it(&mut driver, "was read ahead");
    assert_eq!(digests, digests_sorted);
    let (ahead, sorted) = (begun_again - begun, begun_sorted - begun);
    println!("{read} calls; {ahead} and {read_again} with a profile; {sorted} and {read_sorted} in that order");
    assert!(read_sorted < 5 && sorted < ahead && ahead < read, "{read} calls, {ahead}, {sorted}");

    for text in ["", r#"{"version": 1, "size": 1, "parts": []}"#, &" ".repeat(300_000)] {
        fs::write(profile, text).unwrap();
        assert_eq!(use_it(&mut driver, "profiled.sqsh.profile of").2, digests);
    }
    fs::remove_file(profile).unwrap();
}

/// With all that has a meaning in a sort file.
fn name(file: u32) -> String {
    match file % 8 {
        3 if file < 32 => format!("a file #{file}"),
        _ => format!("#{file}\\n"),
    }
}

fn run_driver(arguments: &[&str]) -> String {
    run(binary().to_str().unwrap(), arguments)
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_is_read_ahead_ends_with_its_volume_with_its_server_and_with_the_driver() {
    let digest = make_image("slow-ahead.sqsh", 32);
    let mut driver = Driver::start_with(&["--prefetch-budget=1Gi", "--prefetch-rate=1Mi", "--timeout=20"], None);
    let volume = ahead("v", "slow-ahead.sqsh");
    let begin = |driver: &Driver| {
        let target = driver.publish(&volume, "pod").unwrap();
        wait_for("a part of the image", || driver.status()["prefetching"][0]["read"].as_u64() > Some(0));
        target
    };
    begin(&driver);
    in_time("the end of the pod", || driver.unpublish(&volume, "pod")).unwrap();
    driver.assert_nothing_left();
    assert_eq!(under_way(&driver), 0);

    let target = begin(&driver);
    let link = Link::cut();
    in_time("the end of the pod", || driver.unpublish(&volume, "pod")).unwrap();
    link.restore();
    driver.assert_nothing_left();
    assert!(!target.exists());

    let target = begin(&driver);
    driver.kill();
    driver.launch();
    assert_eq!(under_way(&driver), 0);
    fresh_caches();
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    driver.unpublish(&volume, "pod").unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_that_may_have_less_memory_than_it_reads_ahead_lives_on() {
    let digest = make_image("larger.sqsh", 96);
    let driver = Driver::start_with(&["--prefetch-budget=1Gi"], None);
    let mounted = tempfile::tempdir().unwrap();
    let root = mounted.path();
    run("mount", &["-t", "cgroup2", "cgroup2", root.to_str().unwrap()]);
    let write = |path: &Path, text: &str| fs::write(path, text).unwrap();
    write(&root.join("cgroup.subtree_control"), "+memory");
    let group = root.join("ahead");
    fs::create_dir(&group).unwrap();
    write(&group.join("memory.max"), "32M");
    write(&group.join("cgroup.procs"), &driver.pid().to_string());
    let volume = ahead("v", "larger.sqsh");
    let target = driver.publish(&volume, "pod").unwrap();
    wait_until_read(&driver);
    let events = fs::read_to_string(group.join("memory.events")).unwrap();
    assert!(events.contains("oom_kill 0"), "{events}");
    assert!(!events.contains("max 0\n"), "the limit was never reached: {events}");
    assert_eq!(hash(&target.join("file")).unwrap(), digest);
    driver.unpublish(&volume, "pod").unwrap();
    driver.assert_nothing_left();
    write(&root.join("cgroup.procs"), &driver.pid().to_string());
    fs::remove_dir(&group).unwrap();
    run("umount", &[root.to_str().unwrap()]);
}
