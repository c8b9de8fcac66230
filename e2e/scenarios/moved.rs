//! The server has another address, or another file system: volumes find it, and pods that wait for it read on.

use std::fs;
use std::process::{Command, Output};

use tonic::Code;

use super::harness::image::Tree;
use super::harness::nfs_server::{OtherAddress, fresh_caches};
use super::harness::node::in_time;
use super::harness::{Driver, Volume, run, wait_for};
use super::server;

/// A volume of an image on a server that the volume names so.
fn volume(id: &str, server: &str, share: &str, image: &str, version: &str) -> Volume {
    Volume::flat(id, &[("server", server), ("share", share), ("image", image), ("nfsVersion", version)])
}

/// The server by an alias of the policy.
fn policy(addresses: &[&str]) -> String {
    format!("servers: [{{host: images, addresses: [{}]}}, {{host: \"*\"}}]", addresses.join(", "))
}

fn move_server(driver: &Driver, old: &str, new: &str) -> Output {
    Command::new(&driver.binary).args(["move", old, new]).output().unwrap()
}

/// An image whose file is larger than what is read of it to mount it.
fn make_image(name: &str) -> Vec<u8> {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file");
    run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=4", "status=none"]);
    let content = fs::read(&file).unwrap();
    tree.squashfs(format!("/images/{name}"));
    content
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn pods_that_wait_for_a_server_that_has_moved_read_on_when_the_node_is_told() {
    let content = make_image("moved.sqsh");
    let driver = Driver::with_policy(&policy(&[&server(), OtherAddress::NEW]));
    let versions = ["3", "4.0", "4.2"];
    let volumes = versions.map(|version| volume(version, &server(), "/images", "moved.sqsh", version));
    let targets = volumes.each_ref().map(|volume| driver.mount(volume, &volume.id).unwrap());
    let by_alias = volume("alias", "images", "/images", "moved.sqsh", "4.2").inline();
    driver.publish(&by_alias, "before").unwrap();

    let moved = OtherAddress::instead(&server());
    fresh_caches();
    let readers = targets.clone().map(|target| std::thread::spawn(move || fs::read(target.join("file")).unwrap()));
    // By the address that the server had nothing can be found.
    let by_address = volume("address", &server(), "/images", "moved.sqsh", "4.2").inline();
    assert_eq!(
        in_time("a volume by address", || driver.publish(&by_address, "x")).unwrap_err().code(),
        Code::Unavailable
    );
    // By a name it can, beside a kernel that takes the server for the silent one.
    let after = driver.publish(&by_alias, "after").unwrap();
    assert!(fs::read(after.join("file")).unwrap() == content);
    assert!(readers.iter().all(|reader| !reader.is_finished()), "a reader got along without its server");
    wait_for("a condition of the pod that waits", || {
        let condition = driver.stats(&by_alias, "before").unwrap().volume_condition.unwrap();
        condition.abnormal && condition.message.contains("if the server has moved, tell this node")
    });

    let nobody = move_server(&driver, &server(), "10.99.0.77");
    assert!(!nobody.status.success(), "nobody answers there");
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    let told = move_server(&driver, &server(), OtherAddress::NEW);
    let words = String::from_utf8(told.stdout).unwrap();
    assert!(told.status.success(), "{words}{}", String::from_utf8_lossy(&told.stderr));
    assert!(words.contains(&format!("{} port 2049 is at {} now: connected", server(), OtherAddress::NEW)), "{words}");
    for reader in readers {
        assert!(in_time("a reader", || reader.join()).unwrap() == content);
    }
    wait_for("the condition to go", || !driver.stats(&by_alias, "before").unwrap().volume_condition.unwrap().abnormal);
    // What is mounted already is found where it is now.
    driver.publish(&by_address, "x").unwrap();
    let again = move_server(&driver, &server(), OtherAddress::NEW);
    let words = String::from_utf8(again.stderr).unwrap();
    assert!(words.contains(&format!("no connection to {}", server())) && words.contains(OtherAddress::NEW), "{words}");

    for volume in &volumes {
        driver.unmount(volume, &volume.id);
    }
    driver.unpublish(&by_address, "x").unwrap();
    driver.unpublish(&by_alias, "before").unwrap();
    driver.unpublish(&by_alias, "after").unwrap();
    driver.assert_nothing_left();
    drop(moved);
    wait_for("the server at its old address", || std::net::TcpStream::connect((server(), 2049)).is_ok());
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn pods_start_at_a_new_address_while_others_run_at_the_old_one() {
    Tree::new(&[("file", "content")]).squashfs("/images/planned.sqsh");
    let _moved = OtherAddress::added();
    let volume = volume("v", "images", "/images", "planned.sqsh", "4.2").inline();
    let old = Driver::with_policy(&policy(&[&server()]));
    let running = old.publish(&volume, "old").unwrap();
    let new = Driver::with_policy(&policy(&[OtherAddress::NEW]));
    let target = new.publish(&volume, "new").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    let connections = run("ss", &["--tcp", "--no-header", "--numeric", "dst", OtherAddress::NEW]);
    assert!(connections.contains(":2049"), "{connections}");
    assert_eq!(fs::read_to_string(running.join("file")).unwrap(), "content");
    new.unpublish(&volume, "new").unwrap();
    old.unpublish(&volume, "old").unwrap();
    for driver in [new, old] {
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_export_whose_file_system_was_made_anew_is_mounted_anew() {
    let driver = Driver::start();
    let inside = |command: &str| run("nfs-server", &["exec", "sh", "-ec", command]);
    let make = |content: &str| {
        let image = Tree::new(&[("file", content)]).squashfs("/root/anew.sqsh");
        inside("mkdir -p /anew; mount -t tmpfs anew /anew");
        inside(&format!(
            "cp {} /anew/anew.sqsh; exportfs -o ro,fsid=77,no_subtree_check,insecure '*:/anew'",
            image.display()
        ));
    };
    let volume = volume("v", &server(), "/anew", "anew.sqsh", "4.2").inline();
    make("old");
    driver.publish(&volume, "old").unwrap();
    inside("exportfs -u '*:/anew'; umount --lazy /anew");
    make("new");
    let target = driver.publish(&volume, "new").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "new");
    for pod in ["old", "new"] {
        driver.unpublish(&volume, pod).unwrap();
    }
    driver.assert_nothing_left();
    inside("exportfs -u '*:/anew'; umount --lazy /anew");
}
