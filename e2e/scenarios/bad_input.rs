//! Bad input: each with its code and its words, and nothing left behind.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use tonic::Code;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, run};
use super::{attach, nfs, seed, server, squashfs};

/// A volume that staging must refuse: why it is here, the volume, the code, and words of the message.
type Case = (&'static str, Volume, Code, &'static str);

fn refused(driver: &Driver, cases: Vec<Case>) {
    for (why, volume, code, words) in cases {
        let error = driver.stage(&volume).expect_err(why);
        assert_eq!(error.code(), code, "{why}: {error}");
        assert!(error.message().contains(words), "{why}: {} does not say {words:?}", error.message());
        let error = driver.publish(&volume, "pod").expect_err(why);
        assert_eq!(error.code(), code, "{why}: publish: {error}");
        driver.unpublish(&volume, "pod").unwrap();
        driver.unstage(&volume).unwrap();
        driver.assert_nothing_left();
    }
}

fn spec(spec: &Value) -> Volume {
    Volume::spec("bad", spec)
}

fn flat(attributes: &[(&str, &str)]) -> Volume {
    Volume::flat("bad", attributes)
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_server_that_does_not_answer_is_unavailable() {
    let on = |host: &str| json!({"kind": "nfs", "nfs": {"host": host, "path": "/images", "ro": true}});
    let port = json!({"kind": "nfs", "nfs": {"host": server(), "path": "/images", "options": ["port=2050"]}});
    let driver = Driver::start();
    let cases = vec![
        ("absent server", spec(&attach("squashfs", "a", &on("10.99.0.77"))), Code::Unavailable, "is the server up"),
        (
            "unknown name",
            spec(&attach("squashfs", "a", &on("no-such.invalid"))),
            Code::Unavailable,
            "resolve no-such.invalid",
        ),
        (
            "closed port",
            spec(&attach("squashfs", "a", &port)),
            Code::Unavailable,
            "connection refused: is nfsd running",
        ),
    ];
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_is_not_on_the_server_is_not_found() {
    let absent = json!({"kind": "nfs", "nfs": {"host": server(), "path": "/nowhere", "ro": true}});
    let driver = Driver::start();
    let cases = vec![
        ("absent export", spec(&attach("squashfs", "a", &absent)), Code::NotFound, "no such export"),
        ("absent image", spec(&seed("/absent.sqsh")), Code::NotFound, "open image absent.sqsh: no such file"),
    ];
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_file_that_is_no_image_is_an_error_of_stage() {
    let tree = Tree::new(&[]);
    // What does not compress.
    run("dd", &["if=/dev/urandom", &format!("of={}/file", tree.path().display()), "bs=64K", "count=8", "status=none"]);
    tree.squashfs("/images/whole.sqsh");
    let content = fs::read("/images/whole.sqsh").unwrap();
    fs::write("/images/truncated.sqsh", &content[..content.len() / 2]).unwrap();
    fs::write("/images/empty.sqsh", "").unwrap();
    fs::write("/images/text.sqsh", "a text, not an image\n".repeat(1000)).unwrap();
    fs::create_dir_all("/images/directory.sqsh").unwrap();
    let driver = Driver::start();
    let cases = vec![
        ("directory", spec(&seed("/directory.sqsh")), Code::FailedPrecondition, "this is a directory"),
        ("empty", spec(&seed("/empty.sqsh")), Code::FailedPrecondition, "the file is empty"),
        ("truncated", spec(&seed("/truncated.sqsh")), Code::FailedPrecondition, "truncated"),
        ("text", spec(&seed("/text.sqsh")), Code::FailedPrecondition, "not a squashfs image"),
        ("other type", spec(&attach("erofs", "whole.sqsh", &nfs("4.2"))), Code::FailedPrecondition, "it is squashfs"),
    ];
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn no_path_leaves_the_export() {
    Tree::new(&[("file", "x")]).squashfs("/var/lib/secret.sqsh");
    for link in ["/images/absolute.sqsh", "/images/parent.sqsh"] {
        let _ = fs::remove_file(link);
    }
    symlink("/var/lib/secret.sqsh", "/images/absolute.sqsh").unwrap();
    symlink("../var/lib/secret.sqsh", "/images/parent.sqsh").unwrap();
    let bind = |path: &str| json!({"kind": "bind", "bind": {"path": path, "base": "mount", "mount": nfs("4.2")}});
    let driver = Driver::start();
    let cases = vec![
        ("absolute symlink", spec(&seed("/absolute.sqsh")), Code::PermissionDenied, "leads out of its base"),
        ("relative symlink", spec(&seed("/parent.sqsh")), Code::PermissionDenied, "leads out of its base"),
        ("dots", spec(&seed("../../etc/shadow")), Code::InvalidArgument, ".."),
        ("dots in the middle", spec(&seed("/a/../../etc/shadow")), Code::InvalidArgument, ".."),
        ("dots in a bind", spec(&bind("../etc")), Code::InvalidArgument, ".."),
    ];
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_the_grammar_does_not_know_is_refused_at_its_place() {
    let mut misspelt = squashfs("a.sqsh");
    misspelt["attach"]["fstype"] = json!("squashfs");
    let mut deep = squashfs("a.sqsh");
    for _ in 0..20 {
        deep = attach("squashfs", "a.sqsh", &deep);
    }
    let text = |text: String| flat(&[("mountSpec", &text)]);
    let levels = format!("{}{}", "{\"kind\":".repeat(10_000), "}".repeat(10_000));
    let arrays = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let large = json!({"kind": "nfs", "nfs": {"host": "h", "path": format!("/{}", "a".repeat(2 << 20))}});
    let driver = Driver::start();
    let cases = vec![
        ("unknown kind", spec(&json!({"kind": "nsf"})), Code::InvalidArgument, "\"nfs\""),
        ("kind of the ImageAPI that is not here", spec(&json!({"kind": "uri"})), Code::InvalidArgument, "uri"),
        ("unknown field", spec(&misspelt), Code::InvalidArgument, "did you mean \"fs_type\""),
        ("deep mounts", spec(&deep), Code::InvalidArgument, "deep"),
        ("10,000 levels", text(levels), Code::InvalidArgument, "mountSpec"),
        ("10,000 arrays", text(arrays), Code::InvalidArgument, "mountSpec"),
        ("2 MB", text(large.to_string()), Code::InvalidArgument, "mountSpec"),
        ("not JSON", text("mount me".into()), Code::InvalidArgument, "mountSpec"),
        ("unknown attribute", flat(&[("sever", "h")]), Code::InvalidArgument, "server"),
        (
            "container",
            spec(&json!({"name": "c", "command": "/init", "mount": seed("a")})),
            Code::InvalidArgument,
            "mount",
        ),
    ];
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn no_string_smuggles_a_second_option_host_or_path() {
    let with = |host: &str, path: &str, options: Value| {
        spec(&json!({"kind": "nfs", "nfs": {"host": host, "path": path, "options": options}}))
    };
    let server = server();
    let driver = Driver::start();
    let mut cases: Vec<Case> = vec![
        ("host with a path", with("10.99.0.2:/export2", "/images", json!([])), Code::InvalidArgument, "/nfs/host"),
        ("host with an option", with("10.99.0.2,rw", "/images", json!([])), Code::InvalidArgument, "/nfs/host"),
        ("path with a newline", with(&server, "/images\nrw", json!([])), Code::InvalidArgument, "/nfs/path"),
        ("relative path", with(&server, "images", json!([])), Code::InvalidArgument, "/nfs/path"),
        ("path with dots", with(&server, "/images/../etc", json!([])), Code::InvalidArgument, "/nfs/path"),
    ];
    for option in
        ["hard,addr=10.99.0.3", "addr=10.99.0.3", "clientaddr=1.2.3.4", "mountaddr=10.99.0.3", "rw", "timeo=1,rw"]
    {
        cases.push(("option", with(&server, "/images", json!([option])), Code::InvalidArgument, "/nfs/options/0"));
    }
    cases.push((
        "flat option",
        flat(&[("server", &server), ("share", "/images"), ("image", "a"), ("nfsOptions", "hard,addr=10.99.0.3")]),
        Code::InvalidArgument,
        "nfsOptions",
    ));
    refused(&driver, cases);
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_target_in_use_or_that_is_a_file_is_refused() {
    Tree::new(&[("file", "1")]).squashfs("/images/target.sqsh");
    let driver = Driver::start();
    let one = Volume::spec("one", &seed("/target.sqsh")).writable();
    let two = Volume { id: "two".into(), ..one.clone() };
    driver.mount(&one, "pod").unwrap();
    driver.stage(&two).unwrap();
    let error = driver.publish(&two, "pod").unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    assert!(error.message().contains("in use by volume one"), "{error}");
    let error = driver.publish(&one.clone().read_only(), "pod").unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    let error = driver.unpublish(&two, "pod").unwrap_err();
    assert!(error.message().contains("in use by volume one"), "{error}");
    assert_eq!(driver.mounts().len(), 1);
    driver.unpublish(&one, "pod").unwrap();

    let target = driver.target("file");
    fs::write(&target, "precious").unwrap();
    let error = driver.publish(&one, "file").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    fs::remove_file(&target).unwrap();
    driver.unstage(&one).unwrap();
    driver.unstage(&two).unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn no_symlink_on_the_server_leads_out_of_what_the_policy_names() {
    fs::create_dir_all("/images/allowed/team").unwrap();
    fs::create_dir_all("/images/secret").unwrap();
    Tree::new(&[("file", "allowed")]).squashfs("/images/allowed/team/a.sqsh");
    Tree::new(&[("file", "secret")]).squashfs("/images/secret/a.sqsh");
    symlink("../secret", "/images/allowed/escape").unwrap();
    symlink("/images/secret", "/images/allowed/absolute").unwrap();
    symlink("team", "/images/allowed/inside").unwrap();
    let driver = Driver::with_policy(&format!("servers: [{{host: {}, exports: [/images/allowed]}}]", server()));
    for version in ["3", "4.2"] {
        let on = |path: &str| json!({"kind": "nfs", "nfs": {"host": server(), "path": path, "ro": true, "version": version}});
        let mut cases = Vec::new();
        for path in ["/images/allowed/escape", "/images/allowed/absolute", "/images/allowed/inside"] {
            cases.push((
                "an image behind a symlink",
                spec(&attach("squashfs", "a.sqsh", &on(path))),
                Code::PermissionDenied,
                "symlink",
            ));
        }
        refused(&driver, cases);
        // Staging asks nothing of an export but that it can be mounted.
        let plain = spec(&on("/images/allowed/escape"));
        driver.stage(&plain).unwrap();
        let error = driver.publish(&plain, "plain").unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied, "{error}");
        driver.unpublish(&plain, "plain").unwrap();
        driver.unstage(&plain).unwrap();

        let allowed = spec(&attach("squashfs", "a.sqsh", &on("/images/allowed/team")));
        let target = driver.mount(&allowed, "pod").unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "allowed");
        driver.unmount(&allowed, "pod");
        let plain = spec(&on("/images/allowed/team"));
        let target = driver.mount(&plain, "plain").unwrap();
        assert!(target.join("a.sqsh").exists());
        driver.unmount(&plain, "plain");
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn one_volume_id_has_one_spec() {
    for name in ["one", "two"] {
        Tree::new(&[("file", name)]).squashfs(format!("/images/id-{name}.sqsh"));
    }
    let driver = Driver::start();
    let one = Volume::spec("v", &seed("/id-one.sqsh")).writable();
    let two = Volume::spec("v", &seed("/id-two.sqsh")).writable();
    driver.stage(&one).unwrap();
    assert_eq!(driver.stage(&two).unwrap_err().code(), Code::AlreadyExists);
    driver.unstage(&one).unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_command_line_says_the_same_about_a_spec_that_is_not_utf8() {
    fs::write("/root/bad.json", b"{\"kind\": \"\xff\"}").unwrap();
    let output = std::process::Command::new(super::harness::binary())
        .args(["mount", "/root/bad.json", "/mnt/bad"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("/root/bad.json") && message.contains("UTF-8"), "{message}");
    assert!(!std::path::Path::new("/mnt/bad").exists());
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_volume_without_overlay_offers_readers_modes_only_and_no_volume_is_a_block_device() {
    use csi_driver_squashfs::csi::v1::volume_capability::{AccessType, BlockVolume};
    use csi_driver_squashfs::csi::v1::{NodeStageVolumeRequest, VolumeCapability};
    let driver = Driver::start();
    let error = driver.stage(&Volume::spec("v", &squashfs("any.sqsh")).writable()).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("ReadOnlyMany"), "{error}");

    let volume = Volume::spec("v", &seed("any.sqsh")).writable();
    let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..volume.capability() };
    let request = NodeStageVolumeRequest {
        volume_id: "v".into(),
        staging_target_path: driver.staging(),
        volume_capability: Some(block),
        volume_context: volume.attributes.clone(),
    };
    let error = driver.block_on(driver.node().node_stage_volume(request)).unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    driver.assert_nothing_left();
}
