//! What a container runtime, the node itself and other volumes may do, and what must hold all the same.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Value, json};

use super::harness::image::Tree;
use super::harness::{Driver, Volume, kernel, run, wait_for};
use super::{nfs, seed, server, squashfs};

/// As runc does since 1.2 for a container that mounts a volume read-write.
fn clear_flags(target: &Path) {
    run("mount", &["-o", "remount,bind,rw,suid,dev,exec", target.to_str().unwrap()]);
}

fn writable_nfs(options: &[&str]) -> Value {
    json!({"kind": "nfs", "nfs": {"path": "/images", "host": server(), "options": options}})
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn who_clears_the_flags_of_a_mount_writes_to_nothing_that_is_read_only() {
    Tree::new(&[("file", "content")]).squashfs("/images/flags.sqsh");
    let driver = Driver::start();
    let bind = json!({"kind": "bind", "bind": {"path": "", "base": "mount", "ro": true, "mount": writable_nfs(&[])}});
    let layer = |layer: Value| json!({"kind": "overlay", "overlay": {"lower": [layer], "upper": {"kind": "none"}}});
    for (name, spec) in [
        ("image", squashfs("/flags.sqsh")),
        ("export", nfs("4.2")),
        ("export of NFS 3", nfs("3")),
        ("directory of a writable export", bind.clone()),
        ("one layer of a writable export", layer(writable_nfs(&[]))),
        (
            "two layers",
            json!({"kind": "overlay", "overlay": {"lower": [bind, squashfs("/flags.sqsh")],
            "upper": {"kind": "none"}}}),
        ),
    ] {
        let volume = Volume::spec("v", &spec);
        let target = driver.mount(&volume, "pod").unwrap_or_else(|error| panic!("{name}: {error}"));
        clear_flags(&target);
        let error = fs::write(target.join("written"), "").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{name}");
        driver.unmount(&volume, "pod");
    }
    assert!(!Path::new("/images/written").exists());
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_export_that_the_node_has_mounted_writable_is_shown_read_only_all_the_same() {
    let export = format!("{}:/images", server());
    run("mount", &["-t", "nfs4", "-o", "vers=4.2", &export, "/mnt"]);
    let driver = Driver::start();
    let volume = Volume::spec("v", &nfs("4.2"));
    let target = driver.mount(&volume, "pod").unwrap();
    clear_flags(&target);
    assert_eq!(fs::write(target.join("written"), "").unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    driver.unmount(&volume, "pod");
    run("umount", &["/mnt"]);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_the_node_mounts_later_does_not_appear_in_a_volume_and_the_end_of_one_takes_nothing_of_it() {
    fs::create_dir_all("/srv/tools/inside").unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", "/srv/tools/inside"]);
    fs::create_dir("/srv/tools/inside/later").unwrap();
    let driver = Driver::with_policy("hostPaths: [/srv/tools]");
    let bind = json!({"kind": "bind", "bind": {"path": "/srv/tools", "base": "root", "recursive": true}});
    let volume = Volume::spec("v", &bind).read_only();
    let target = driver.mount(&volume, "pod").unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", "/srv/tools/inside/later"]);
    fs::write("/srv/tools/inside/later/file", "").unwrap();
    assert!(target.join("inside/later").exists() && !target.join("inside/later/file").exists());
    driver.unmount(&volume, "pod");
    assert!(Path::new("/srv/tools/inside/later/file").exists());
    run("umount", &["--recursive", "/srv/tools/inside"]);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_volume_that_gives_up_early_makes_no_other_do_so() {
    let driver = Driver::start();
    let hasty = Volume::spec("hasty", &writable_nfs(&["soft", "timeo=1", "retrans=0"])).writable();
    let patient = Volume::spec("patient", &writable_nfs(&["soft"])).writable();
    let target = driver.mount(&hasty, "hasty").unwrap();
    assert!(kernel::mount_line(&target).contains("timeo=1,retrans=0"), "{}", kernel::mount_line(&target));
    let target = driver.mount(&patient, "patient").unwrap();
    assert!(kernel::mount_line(&target).contains("timeo=600,retrans=2"), "{}", kernel::mount_line(&target));
    driver.unmount(&hasty, "hasty");
    driver.unmount(&patient, "patient");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_staged_volume_is_published_by_a_new_process_while_its_server_is_gone() {
    Tree::new(&[("file", "content")]).squashfs("/images/staged.sqsh");
    let mut driver = Driver::start();
    let volume = Volume::spec("v", &seed("/staged.sqsh")).writable();
    driver.mount(&volume, "old").unwrap();
    driver.kill();
    driver.launch();
    run("nfs-server", &["stop"]);
    let target = driver.publish(&volume, "new");
    run("nfs-server", &["start"]);
    assert_eq!(fs::read_to_string(target.unwrap().join("file")).unwrap(), "content");
    driver.unpublish(&volume, "old").unwrap();
    driver.unmount(&volume, "new");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_server_that_passes_on_what_another_says_of_itself_opens_no_way_to_that_one() {
    Tree::new(&[("file", "content")]).squashfs("/images/other.sqsh");
    let driver = Driver::with_policy(r#"nfsVersions: ["4.2"]"#);
    let real = Volume::spec("real", &seed("/other.sqsh")).writable();
    driver.mount(&real, "real").unwrap();
    let target = format!("TCP:{}:2049", server());
    let mut relay =
        std::process::Command::new("socat").args(["TCP-LISTEN:2050,fork,reuseaddr", &target]).spawn().unwrap();
    wait_for("the relay", || std::net::TcpStream::connect("127.0.0.1:2050").is_ok());
    let relayed =
        json!({"kind": "nfs", "nfs": {"path": "/images", "host": "127.0.0.1", "ro": true, "options": ["port=2050"]}});
    let relayed = Volume::spec("relayed", &super::attach("squashfs", "/other.sqsh", &relayed));
    let error = driver.mount(&relayed, "relayed").unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    assert!(error.message().contains(&format!("it says that it is the server at {}", server())), "{error}");
    // Where another minor version may be used, it is a server of its own, and asked by itself.
    let connections =
        || run("ss", &["--tcp", "--no-header", "--numeric", "state", "established", "dport", "=", ":2050"]);
    let before = connections().lines().count();
    let other = Driver::start();
    let target = other.mount(&relayed, "relayed").unwrap();
    assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "content");
    assert!(connections().lines().count() > before, "{}", connections());
    other.unmount(&relayed, "relayed");
    relay.kill().unwrap();
    relay.wait().unwrap();
    driver.unmount(&real, "real");
    for driver in [driver, other] {
        driver.assert_nothing_left();
    }
}
