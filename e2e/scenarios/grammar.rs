//! Every row of the grammar, used once.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, kernel, run, wait_for};
use super::{attach, nfs, server, server6, squashfs};

fn read(target: &Path, file: &str) -> String {
    fs::read_to_string(target.join(file)).unwrap()
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_uppermost_of_three_layers_wins() {
    for (name, files) in [
        ("base", &[("a", "base"), ("b", "base"), ("c", "base")][..]),
        ("middle", &[("b", "middle"), ("c", "middle")][..]),
        ("top", &[("c", "top")][..]),
    ] {
        Tree::new(files).squashfs(format!("/images/{name}.sqsh"));
    }
    let driver = Driver::start();
    let lower = ["top", "middle", "base"].map(|name| squashfs(&format!("{name}.sqsh")));
    let volume = Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(["a", "b", "c"].map(|file| read(&target, file)), ["base", "middle", "top"]);
    assert_eq!(driver.loop_devices().len(), 3);
    assert_eq!(driver.mounts().len(), 1);
    driver.unmount(&volume, "pod");

    let stacked = json!({"kind": "overlay", "overlay": {"lower": lower, "upper": {"kind": "none"}}});
    let volume = Volume::spec("v", &stacked);
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(["a", "b", "c"].map(|file| read(&target, file)), ["base", "middle", "top"]);
    let error = fs::write(target.join("a"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_plain_nfs_directory_can_be_a_layer_or_the_volume() {
    fs::create_dir_all("/images/tree").unwrap();
    fs::write("/images/tree/plain", "nfs").unwrap();
    Tree::new(&[("file", "image")]).squashfs("/images/with-nfs.sqsh");
    let driver = Driver::start();
    let directory = json!({"kind": "nfs", "nfs": {"host": server(), "path": "/images/tree", "ro": true}});
    let lower = [squashfs("with-nfs.sqsh"), directory.clone()];
    let volume = Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!([read(&target, "plain"), read(&target, "file")], ["nfs", "image"]);
    fs::write(target.join("plain"), "mine").unwrap();
    assert_eq!(fs::read_to_string("/images/tree/plain").unwrap(), "nfs");
    driver.unmount(&volume, "pod");

    let volume = Volume::spec("v", &directory);
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(read(&target, "plain"), "nfs");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_directory_of_an_image_is_bound() {
    Tree::new(&[("opt/app/bin/tool", "tool"), ("etc/secret", "no")]).squashfs("/images/bind.sqsh");
    let driver = Driver::start();
    let bind = json!({"kind": "bind", "bind": {
        "path": "/opt/app", "base": "mount", "recursive": true, "ro": true, "mount": squashfs("bind.sqsh")
    }});
    let volume = Volume::spec("v", &bind);
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(read(&target, "bin/tool"), "tool");
    assert!(!target.join("etc").exists());
    assert_eq!(driver.mounts().len(), 1);
    driver.unmount(&volume, "pod");

    let lower = [bind];
    let volume = Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    fs::write(target.join("bin/tool"), "mine").unwrap();
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_image_inside_an_image_is_mounted() {
    let outer = Tree::new(&[]);
    Tree::new(&[("file", "inner")]).squashfs(outer.path().join("inner.sqsh"));
    outer.squashfs("/images/outer.sqsh");
    let driver = Driver::start();
    let volume = Volume::spec("v", &attach("squashfs", "inner.sqsh", &squashfs("outer.sqsh")));
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(read(&target, "file"), "inner");
    assert_eq!(driver.loop_devices().len(), 2);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_other_file_systems_are_mounted_where_the_admin_allows_them() {
    let tree = Tree::new(&[("file", "content")]);
    tree.erofs("/images/image.erofs");
    tree.ext4("/images/image.ext4");
    run("sh", &["-c", "truncate -s 320M /images/image.xfs && mkfs.xfs -q -f /images/image.xfs"]);
    let spec = |fs_type: &str| attach(fs_type, &format!("image.{fs_type}"), &nfs("4.2"));

    let driver = Driver::start();
    let volume = Volume::spec("erofs", &spec("erofs"));
    assert_eq!(read(&driver.mount(&volume, "pod").unwrap(), "file"), "content");
    driver.unmount(&volume, "pod");
    for fs_type in ["ext4", "xfs"] {
        let error = driver.stage(&Volume::spec("v", &spec(fs_type))).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
    }
    drop(driver);

    let driver = Driver::with_policy("fsTypes: [squashfs, erofs, ext4, xfs]");
    for fs_type in ["ext4", "xfs"] {
        let before = run("sha256sum", &[&format!("/images/image.{fs_type}")]);
        let volume = Volume::spec(fs_type, &spec(fs_type));
        let target = driver.mount(&volume, "pod").unwrap();
        assert!(kernel::mount_line(&target).contains(&format!(" - {fs_type} ")));
        if fs_type == "ext4" {
            assert_eq!(read(&target, "file"), "content");
        }
        driver.unmount(&volume, "pod");
        assert_eq!(run("sha256sum", &[&format!("/images/image.{fs_type}")]), before, "the image was written");
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_image_and_a_directory_of_the_node_are_mounted_where_the_admin_allows_them() {
    Tree::new(&[("file", "local")]).squashfs("/srv/local.sqsh");
    fs::create_dir_all("/srv/directory").unwrap();
    let image = json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {
        "kind": "loopback", "loopback": {"path": "/srv/local.sqsh", "base": "root"}
    }}});
    let bind = json!({"kind": "bind", "bind": {"path": "/srv/directory", "base": "root"}});
    // A file system of its own, which may be writable where the node's root directory is not.
    run("mount", &["-t", "tmpfs", "tmpfs", "/srv/directory"]);
    fs::write("/srv/directory/file", "bound").unwrap();
    let device = run("losetup", &["--find", "--show", "--read-only", "/srv/local.sqsh"]);
    let local = json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {
        "kind": "local", "local": {"path": device.trim()}
    }}});
    let driver = Driver::with_policy("hostPaths: [/srv]\nlocalDevices: true");
    let error = driver.mount(&Volume::spec("v", &bind), "pod").unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
    driver.unmount(&Volume::spec("v", &bind), "pod");
    for (spec, content) in [(&image, "local"), (&bind, "bound"), (&local, "local")] {
        let volume = Volume { read_only: true, ..Volume::spec("v", spec) };
        let target = driver.mount(&volume, "pod").unwrap();
        assert_eq!(read(&target, "file"), content);
        assert_eq!(fs::write(target.join("file"), "").unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        driver.unmount(&volume, "pod");
    }
    run("losetup", &["--detach", device.trim()]);
    run("umount", &["/srv/directory"]);
    driver.assert_nothing_left();
    drop(driver);

    let driver = Driver::start();
    for spec in [&image, &bind, &local] {
        let error = driver.stage(&Volume::spec("v", spec)).unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn every_nfs_version_and_ip_version_serves_the_image() {
    Tree::new(&[("file", "content")]).squashfs("/images/versions.sqsh");
    let driver = Driver::start();
    for version in ["3", "4.0", "4.1", "4.2"] {
        for host in [server(), server6(), "nfs-server".to_owned()] {
            let volume = Volume::flat(
                "v",
                &[("server", &host), ("share", "/images"), ("image", "versions.sqsh"), ("nfsVersion", version)],
            );
            let target = driver.mount(&volume, "pod").unwrap_or_else(|error| panic!("{version} {host}: {error}"));
            assert_eq!(read(&target, "file"), "content");
            driver.unmount(&volume, "pod");
            driver.assert_nothing_left();
        }
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn mount_options_of_a_volume_reach_the_nfs_mount() {
    Tree::new(&[("file", "content")]).squashfs("/images/options.sqsh");
    let driver = Driver::start();
    let attributes = [("server", server()), ("share", "/images".into()), ("image", "options.sqsh".into())];
    let attributes: Vec<(&str, &str)> = attributes.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let volume = Volume {
        mount_options: vec!["nfsvers=4.1".into(), "nconnect=4".into(), "ro".into()],
        ..Volume::flat("v", &attributes)
    };
    let target = driver.mount(&volume, "pod").unwrap();
    assert_eq!(read(&target, "file"), "content");
    assert_eq!(kernel::nfs_connections(), 4);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_tmpfs_upper_is_full_at_its_size() {
    Tree::new(&[("file", "content")]).squashfs("/images/tmpfs.sqsh");
    let driver = Driver::start();
    let upper = json!({"kind": "tmpfs", "size": "8Mi"});
    let lower = [squashfs("tmpfs.sqsh")];
    let spec = json!({"kind": "overlay", "overlay": {"lower": lower, "upper": upper}});
    let volume = Volume::spec("v", &spec).writable();
    let target = driver.mount(&volume, "pod").unwrap();
    fs::write(target.join("fits"), vec![1; 4 << 20]).unwrap();
    let error = fs::write(target.join("too-much"), vec![1; 8 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    let usage = driver.stats(&volume, "pod").unwrap().usage;
    assert_eq!(usage[0].total, 8 << 20);
    assert!(usage[0].used >= 4 << 20, "{usage:?}");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_read_only_publish_of_an_overlay_has_no_scratch_layer() {
    Tree::new(&[("file", "content")]).squashfs("/images/read-only.sqsh");
    let driver = Driver::start();
    let lower = [squashfs("read-only.sqsh")];
    let volume = Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    driver.stage(&volume).unwrap();
    let writer = driver.publish(&volume, "writer").unwrap();
    let reader = driver.publish(&volume.clone().read_only(), "reader").unwrap();
    fs::write(writer.join("file"), "mine").unwrap();
    let error = fs::write(reader.join("file"), "mine").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(read(&reader, "file"), "content");
    assert_eq!(driver.loop_devices().len(), 1);
    driver.unpublish(&volume, "writer").unwrap();
    driver.unmount(&volume, "reader");
    driver.assert_nothing_left();
}

fn mode_and_owner(path: &Path) -> (u32, u32, u32) {
    use std::os::unix::fs::MetadataExt;
    let found = fs::metadata(path).unwrap();
    (found.mode() & 0o7777, found.uid(), found.gid())
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_root_of_an_overlay_has_the_owner_and_mode_of_the_image() {
    let tree = Tree::new(&[("file", "content")]);
    run("chmod", &["1777", tree.path().to_str().unwrap()]);
    run("chown", &["1000:2000", tree.path().to_str().unwrap()]);
    tree.squashfs("/images/owner.sqsh");
    let driver = Driver::start();
    let lower = [squashfs("owner.sqsh")];
    let volume = Volume::spec("v", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    assert_eq!(mode_and_owner(&driver.mount(&volume, "pod").unwrap()), (0o1777, 1000, 2000));
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_group_of_a_pod_writes_to_the_root_of_a_writable_layer_and_nothing_else_changes() {
    let tree = Tree::new(&[("directory/file", "content")]);
    run("chmod", &["0750", tree.path().to_str().unwrap()]);
    tree.squashfs("/images/group.sqsh");
    let driver = Driver::start();
    for (id, upper) in [
        ("disk", json!({"kind": "directory"})),
        ("bounded", json!({"kind": "directory", "size": "16Mi"})),
        ("memory", json!({"kind": "tmpfs", "size": "1Mi"})),
        ("none", json!({"kind": "none"})),
    ] {
        let is_writable = id != "none";
        let spec = json!({"kind": "overlay", "overlay": {"lower": [squashfs("group.sqsh")], "upper": upper}});
        let volume = Volume::spec(id, &spec).of_group(4000);
        let volume = if is_writable { volume.writable() } else { volume };
        let target = driver.mount(&volume, id).unwrap();
        let root = if is_writable { (0o2770, 0, 4000) } else { (0o750, 0, 0) };
        assert_eq!(mode_and_owner(&target), root, "{id}");
        assert_eq!(mode_and_owner(&target.join("directory")).2, 0, "{id}");
        // Entered as root: others do not get through the directories above.
        let mut touch = Command::new("setpriv");
        touch.args(["--reuid=1000", "--regid=1000", "--groups=4000", "touch", "new"]).current_dir(&target);
        let written = touch.status().unwrap();
        assert_eq!(written.success(), is_writable, "{id}");
        if is_writable {
            let (_, user, group) = mode_and_owner(&target.join("new"));
            assert_eq!((user, group), (1000, 4000), "{id}");
        }
        // For a kubelet that has started again, as for one that knew no group before.
        driver.publish(&Volume { group: None, ..volume.clone() }, id).unwrap();
        driver.unmount(&volume, id);
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_root_of_a_writable_layer_belongs_to_whom_the_volume_says_and_to_the_group_of_the_pod() {
    let tree = Tree::new(&[("directory/file", "content")]);
    run("chmod", &["0755", tree.path().to_str().unwrap()]);
    tree.squashfs("/images/owned.sqsh");
    let driver = Driver::start();
    let server = server();
    let owned = vec![("overlay", "directory"), ("overlayUid", "1000"), ("overlayGid", "100"), ("overlayMode", "0700")];
    for (id, attributes, group, root) in [
        ("owned", owned.clone(), None, (0o700, 1000, 100)),
        ("sized", [&owned[..], &[("overlaySize", "16Mi")]].concat(), None, (0o700, 1000, 100)),
        ("shared", owned, Some(4000), (0o2770, 1000, 4000)),
        ("open", vec![("overlay", "tmpfs"), ("overlaySize", "1Mi"), ("overlayMode", "1777")], None, (0o1777, 0, 0)),
    ] {
        let image = [("server", &*server), ("share", "/images"), ("image", "owned.sqsh")];
        let volume = Volume::flat(id, &[&image[..], &attributes].concat()).writable();
        let volume = Volume { group, ..volume };
        let target = driver.mount(&volume, id).unwrap();
        assert_eq!(mode_and_owner(&target), root, "{id}");
        assert_eq!(mode_and_owner(&target.join("directory")), (0o755, 0, 0), "{id}");
        let mut touch = Command::new("setpriv");
        touch.args(["--reuid=1000", "--regid=1000", "--clear-groups", "touch", "new"]).current_dir(&target);
        assert!(touch.status().unwrap().success(), "{id}");
        driver.publish(&volume, id).unwrap();
        driver.unmount(&volume, id);
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn stats_tell_the_use_of_the_image_or_of_the_scratch_layer() {
    Tree::new(&[("file", "content")]).squashfs("/images/stats.sqsh");
    let driver = Driver::start();
    let image = Volume::spec("image", &squashfs("stats.sqsh"));
    driver.mount(&image, "image").unwrap();
    let stats = driver.stats(&image, "image").unwrap();
    assert!(!stats.volume_condition.unwrap().abnormal);
    assert_eq!(stats.usage[0].available, 0);
    assert!(stats.usage[0].used > 0 && stats.usage[1].used > 0, "{:?}", stats.usage);

    let lower = [squashfs("stats.sqsh")];
    let overlay = Volume::spec("overlay", &json!({"kind": "overlay", "overlay": {"lower": lower}})).writable();
    let target = driver.mount(&overlay, "overlay").unwrap();
    let before = driver.stats(&overlay, "overlay").unwrap().usage[0];
    fs::write(target.join("new"), vec![1; 1 << 20]).unwrap();
    let after = driver.stats(&overlay, "overlay").unwrap().usage[0];
    assert!(after.used - before.used >= 1 << 20, "{before:?} {after:?}");
    assert!(after.available > 0);

    let error = driver.stats(&image, "overlay").unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound);
    run("umount", &[target.to_str().unwrap()]);
    let condition = driver.stats(&overlay, "overlay").unwrap().volume_condition.unwrap();
    assert!(condition.abnormal, "{}", condition.message);
    driver.unmount(&overlay, "overlay");
    driver.unmount(&image, "image");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_writable_layer_on_the_disk_holds_what_its_size_says_and_tells_it() {
    Tree::new(&[("file", "content")]).squashfs("/images/sized.sqsh");
    let mut driver = Driver::start();
    let volume = Volume::flat(
        "v",
        &[
            ("server", &server()),
            ("share", "/images"),
            ("image", "sized.sqsh"),
            ("overlay", "directory"),
            ("overlaySize", "64Mi"),
        ],
    )
    .writable();
    let target = driver.mount(&volume, "pod").unwrap();
    fs::write(target.join("mine"), "written").unwrap();
    let fill = || fs::write(target.join("large"), vec![1; 100 << 20]).unwrap_err().kind();
    assert_eq!(fill(), std::io::ErrorKind::StorageFull);
    // An inode for each 16 KiB, and a group of them at least.
    let mut files = 0;
    fs::remove_file(target.join("large")).unwrap();
    while fs::write(target.join(format!("file-{files}")), "").is_ok() {
        files += 1;
        assert!(files < 20_000, "files have no end");
    }
    let usage = driver.stats(&volume, "pod").unwrap().usage;
    let (bytes, inodes) = (&usage[0], &usage[1]);
    assert!((40 << 20..=64 << 20).contains(&bytes.total), "{usage:?}");
    assert!(inodes.total == 8192 && inodes.available == 0 && inodes.used == inodes.total, "{usage:?}");
    // The node starts again; the kernel tries an overlay with a few files of its own.
    (0..10).for_each(|file| fs::remove_file(target.join(format!("file-{file}"))).unwrap());
    driver.kill();
    run("umount", &[target.to_str().unwrap()]);
    driver.launch();
    driver.publish(&volume, "pod").unwrap();
    assert_eq!(read(&target, "mine"), "written");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
    wait_for("the layer's loop device to go", || !run("losetup", &["--list"]).contains("layer"));
}
