//! An image on two servers: pods read on when one of them dies, and what lies or differs is not read.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tonic::Code;

use super::harness::nfs_server::{NfsServer, fresh_caches};
use super::harness::node::{in_time, node_is_well, start_with};
use super::harness::readers::{Files, Readers};
use super::harness::{Driver, Volume, killed, multipath, soak, wait_for, wait_up_to};
use super::verity::{damage, root_of};

/// More than it takes until a server that is back is read from again: its grace period, and the pauses between attempts.
const RETURN: Duration = Duration::from_secs(120);

fn start() -> Driver {
    start_with(&["--timeout=20"], None)
}

/// `server: a,b`
fn both(servers: [NfsServer; 2]) -> String {
    servers.map(NfsServer::address).join(",")
}

/// The same image on both servers; returns what is in it.
fn replicate(servers: [NfsServer; 2], image: &str) -> Files {
    let files = Files::random(16, 64);
    files.tree().squashfs(servers[0].images().join(image));
    servers[1].copy_from(servers[0], image);
    files
}

fn volume(id: &str, servers: [NfsServer; 2], image: &str, further: &[(&str, &str)]) -> Volume {
    let servers = both(servers);
    let of = [("server", servers.as_str()), ("share", "/images"), ("image", image)];
    Volume::flat(id, &[&of, further].concat())
}

/// The servers, that from which the node reads first: nodes differ in that.
fn in_use(servers: [NfsServer; 2], target: &Path, files: &Files) -> [NfsServer; 2] {
    fresh_caches();
    let before = servers.map(NfsServer::received);
    files.assert_in(target);
    let read = [0, 1].map(|at| servers[at].received() - before[at]);
    if read[0] > read[1] { servers } else { [servers[1], servers[0]] }
}

/// There is one device, and the kernel reads from both servers if need be.
fn wait_for_both_paths() {
    wait_up_to(RETURN, "two live paths", || multipath::live() == 2);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn readers_read_on_from_the_other_server() {
    let servers = NfsServer::two();
    let files = replicate(servers, "failover.sqsh");
    let driver = start();
    let volume = volume("v", servers, "failover.sqsh", &[]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let readers = Readers::start(50, &target, &files);
    readers.wait_for_another_round();
    for round in 0..soak(3, 100) {
        let server = servers[round % 2];
        let link = server.kill();
        readers.wait_for_another_round();
        link.restore();
        wait_for_both_paths();
        eprintln!("round {round}: without {} the slowest file took {:?}", server.address(), readers.slowest());
    }
    readers.end();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

/// One whose machine is there and whose nfsd is not answers at once: another way to die.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn readers_read_on_when_a_server_refuses_connections() {
    let servers = NfsServer::two();
    let files = replicate(servers, "refused.sqsh");
    let driver = start();
    // The long form of the same.
    let mut export = super::nfs("4.2");
    export["nfs"]["host"] = json!(both(servers));
    let volume = Volume::spec("v", &super::attach("squashfs", "refused.sqsh", &export));
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let readers = Readers::start(10, &target, &files);
    for server in servers {
        let link = server.stop();
        readers.wait_for_another_round();
        link.restore();
        wait_for_both_paths();
    }
    readers.end();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn readers_wait_without_an_error_while_both_servers_are_dead() {
    let servers = NfsServer::two();
    let files = replicate(servers, "both.sqsh");
    let driver = start();
    let volume = volume("v", servers, "both.sqsh", &[]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let readers = Readers::start(10, &target, &files);
    let [first, second] = servers.map(NfsServer::kill);
    wait_up_to(RETURN, "the kernel to have no path", || multipath::live() == 0);
    node_is_well(&driver);
    second.restore();
    readers.wait_for_another_round();
    assert_eq!(multipath::live(), 1);
    first.restore();
    wait_for_both_paths();
    readers.end();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn readers_read_on_while_there_is_no_driver_and_the_next_one_takes_the_server_back() {
    let servers = NfsServer::two();
    let files = replicate(servers, "without-driver.sqsh");
    let mut driver = start();
    let volume = volume("v", servers, "without-driver.sqsh", &[]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let [first, second] = in_use(servers, &target, &files);
    let readers = Readers::start(10, &target, &files);
    driver.kill();
    let link = first.kill();
    readers.wait_for_another_round();
    assert_eq!(multipath::live(), 1);
    // It starts while the server is dead, too.
    driver.launch();
    node_is_well(&driver);
    driver.kill();
    link.restore();
    driver.launch();
    wait_for_both_paths();
    let link = second.kill();
    readers.wait_for_another_round();
    link.restore();
    readers.end();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_pod_starts_by_one_server_and_the_other_one_is_added_when_it_is_back() {
    let servers = NfsServer::two();
    let files = replicate(servers, "late.sqsh");
    let driver = start();
    for (dead, alive) in [(0, 1), (1, 0)] {
        let volume = volume("v", servers, "late.sqsh", &[]);
        let link = servers[dead].kill();
        let target = in_time("a pod's start by one server", || driver.mount(&volume, "pod")).unwrap();
        let readers = Readers::start(10, &target, &files);
        readers.wait_for_another_round();
        link.restore();
        wait_for_both_paths();
        let link = servers[alive].kill();
        readers.wait_for_another_round();
        link.restore();
        readers.end();
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
    }
}

/// What is there when no server answers is what is there when the only one does not.
#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_volume_whose_servers_are_all_dead_is_refused_in_time_and_leaves_nothing() {
    let servers = NfsServer::two();
    replicate(servers, "dead.sqsh");
    let driver = start();
    let volume = volume("v", servers, "dead.sqsh", &[]);
    let links = servers.map(NfsServer::kill);
    let error = in_time("stage", || driver.stage(&volume)).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    in_time("unstage", || driver.unstage(&volume)).unwrap();
    assert_eq!(multipath::devices().len(), 0);
    drop(links);
    driver.mount(&volume, "pod").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn replicas_that_differ_are_refused_by_name_and_leave_nothing() {
    let servers = NfsServer::two();
    let driver = start();
    let image = |server: NfsServer, files, kib| {
        Files::random(files, kib).tree().squashfs(server.images().join("differ.sqsh"));
    };
    image(servers[0], 4, 64);
    // Of the same size when they are packed, and not.
    for (files, kib) in [(4, 64), (4, 128)] {
        // The superblock has the second of its making.
        std::thread::sleep(Duration::from_secs(1));
        image(servers[1], files, kib);
        let volume = volume("v", servers, "differ.sqsh", &[]);
        let error = driver.mount(&volume, "pod").unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        for server in servers {
            assert!(error.message().contains(&server.address()), "{error}");
        }
        driver.unstage(&volume).unwrap();
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_replica_that_returns_as_another_image_is_not_read() {
    let servers = NfsServer::two();
    let files = replicate(servers, "restored.sqsh");
    let driver = start();
    let volume = volume("v", servers, "restored.sqsh", &[]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let readers = Readers::start(10, &target, &files);
    let link = servers[0].kill();
    readers.wait_for_another_round();
    // Somebody brings the server back with what was built last.
    let next = servers[0].images().join("next");
    Files::random(16, 64).tree().squashfs(&next);
    fs::rename(next, servers[0].images().join("restored.sqsh")).unwrap();
    link.restore();
    // For NFS 4 the file that is open stays: what its name stands for now is another one.
    std::thread::sleep(Duration::from_secs(30));
    readers.wait_for_another_round();
    readers.end();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_verified_image_is_read_from_the_server_that_does_not_lie() {
    let servers = NfsServer::two();
    for liar in servers {
        let files = Files::random(16, 64);
        let image = files.tree().squashfs(servers[0].images().join("lie.sqsh"));
        let root = root_of(&["seal", image.to_str().unwrap()]);
        servers[1].copy_from(servers[0], "lie.sqsh");
        let driver = start();
        let volume = volume("v", servers, "lie.sqsh", &[("verity", &root)]);
        let target = driver.mount(&volume, "pod").unwrap();
        wait_for_both_paths();
        let [first, _] = in_use(servers, &target, &files);
        // In the first file: squashfs puts its data behind the superblock.
        damage(&liar.images().join("lie.sqsh"), 100_000);
        let readers = Readers::start(10, &target, &files);
        readers.wait_for_another_round();
        if liar == first {
            wait_for("the lie to be found", || multipath::live() == 1);
            // Long enough for somebody to try again.
            let before = liar.received();
            std::thread::sleep(Duration::from_secs(30));
            readers.wait_for_another_round();
            assert_eq!(multipath::live(), 1);
            let read = liar.received() - before;
            assert!(read < 1 << 20, "{read} bytes were read from a server that lies");
        }
        readers.end();
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_verified_image_is_read_on_from_the_other_server() {
    let servers = NfsServer::two();
    let files = Files::random(16, 64);
    let image = files.tree().squashfs(servers[0].images().join("sealed.sqsh"));
    let root = root_of(&["seal", image.to_str().unwrap()]);
    servers[1].copy_from(servers[0], "sealed.sqsh");
    let driver = start();
    let volume = volume("v", servers, "sealed.sqsh", &[("verity", &root)]);
    let target = driver.mount(&volume, "pod").unwrap();
    wait_for_both_paths();
    let readers = Readers::start(10, &target, &files);
    for server in servers {
        let link = server.kill();
        readers.wait_for_another_round();
        link.restore();
        wait_for_both_paths();
    }
    readers.end();
    let condition = driver.stats(&volume, "pod").unwrap().volume_condition.unwrap();
    assert!(!condition.abnormal, "an outage is no lie: {}", condition.message);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn pods_end_in_time_and_leave_nothing_whichever_server_is_dead() {
    let servers = NfsServer::two();
    let files = replicate(servers, "end.sqsh");
    let driver = start();
    let [first, second] = servers;
    for dead in [&[first][..], &[second], &[first, second]] {
        let volume = volume("v", servers, "end.sqsh", &[]);
        let target = driver.mount(&volume, "pod").unwrap();
        wait_for_both_paths();
        assert_eq!(driver.loop_devices().len(), 2);
        files.assert_in(&target);
        let links: Vec<_> = dead.iter().map(|server| server.kill()).collect();
        in_time("unpublish", || driver.unpublish(&volume, "pod")).unwrap();
        in_time("unstage", || driver.unstage(&volume)).unwrap();
        node_is_well(&driver);
        assert_eq!(driver.mounts(), [""; 0]);
        wait_for("the device to go", || multipath::devices().is_empty());
        drop(links);
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_node_reads_from_the_server_of_its_zone() {
    let servers = NfsServer::two();
    let files = replicate(servers, "near.sqsh");
    for near in servers {
        let policy = format!("servers: [{{host: {}, zone: here}}, {{host: '*', zone: there}}]", near.address());
        let driver = start_with(&["--zone=here"], Some(&policy));
        let volume = volume("v", servers, "near.sqsh", &[]);
        let target = driver.mount(&volume, "pod").unwrap();
        assert_eq!(in_use(servers, &target, &files)[0], near);
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn volumes_of_the_same_image_share_one_device() {
    let servers = NfsServer::two();
    let files = replicate(servers, "shared.sqsh");
    let driver = start();
    let volumes = ["one", "two"].map(|id| volume(id, servers, "shared.sqsh", &[]));
    let targets = volumes.each_ref().map(|volume| driver.mount(volume, &volume.id).unwrap());
    wait_for_both_paths();
    assert_eq!(driver.loop_devices().len(), 2);
    let devices: HashSet<_> = multipath::devices().concat().into_iter().map(|path| path.device).collect();
    assert_eq!(devices.len(), 2, "a path for each server");
    driver.unmount(&volumes[0], &volumes[0].id);
    fresh_caches();
    files.assert_in(&targets[1]);
    assert_eq!(multipath::live(), 2);
    driver.unmount(&volumes[1], &volumes[1].id);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_driver_killed_anywhere_with_two_servers_goes_on_and_leaves_nothing() {
    let servers = NfsServer::two();
    let files = replicate(servers, "killed-replicas.sqsh");
    let volume = volume("v", servers, "killed-replicas.sqsh", &[("overlay", "directory")]).writable();
    let is_right = |target: &Path| files.assert_in(target);
    killed::anywhere_with(&mut Driver::start(), &volume, 2, &is_right);
}
