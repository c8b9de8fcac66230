//! Images that are several: an index names their layers, and a pod sees them as one.

use std::fs;
use std::path::Path;
use std::process::Command;

use tonic::Code;

use super::harness::image::Tree;
use super::harness::nfs_server::Link;
use super::harness::node::in_time;
use super::harness::{Driver, Volume, run, wait_for};
use super::server;
use super::verity::{Keys, root_of};

fn volume(id: &str, image: &str, further: &[(&str, &str)]) -> Volume {
    let of = [("server", &*server()), ("share", "/images"), ("image", image)];
    Volume::flat(id, &[&of, further].concat())
}

/// As the builder writes them: a whiteout is a device of the numbers 0 and 0, an opaque directory has an attribute.
fn make_layers() {
    let base =
        Tree::new(&[("a", "base"), ("gone", "base"), ("dir/old", "base"), ("kept", "base"), ("opt/tool", "base")]);
    base.squashfs("/images/team/base.sqsh");
    let upper = Tree::new(&[("a", "upper"), ("dir/new", "upper")]);
    let path = |name: &str| upper.path().join(name).display().to_string();
    run("mknod", &[&path("gone"), "c", "0", "0"]);
    run("setfattr", &["-n", "trusted.overlay.opaque", "-v", "y", &path("dir")]);
    upper.squashfs("/images/team/upper.sqsh");
    index("tools", &["base.sqsh", "upper.sqsh"]);
}

fn index(name: &str, layers: &[&str]) {
    let text = serde_json::json!({"source": "oci://registry.example.com/tools@sha256:0", "layers": layers});
    fs::write(format!("/images/team/{name}.new"), text.to_string()).unwrap();
    fs::rename(format!("/images/team/{name}.new"), format!("/images/team/{name}.json")).unwrap();
}

fn shows_both(target: &Path) {
    let text = |path: &str| fs::read_to_string(target.join(path)).unwrap();
    assert_eq!((text("a"), text("kept"), text("dir/new")), ("upper".into(), "base".into(), "upper".into()));
    for gone in ["gone", "dir/old"] {
        assert!(!target.join(gone).exists(), "{gone}");
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_index_is_mounted_as_an_overlay_of_its_layers_and_layers_are_shared_by_images() {
    fs::create_dir_all("/images/team").unwrap();
    make_layers();
    let mut driver = Driver::start();
    let one = volume("one", "team/tools.json", &[]);
    shows_both(&driver.mount(&one, "one").unwrap());
    assert_eq!(driver.loop_devices().len(), 2);
    let writable = volume("writable", "team/tools.json", &[("overlay", "directory")]).writable();
    let target = driver.mount(&writable, "writable").unwrap();
    shows_both(&target);
    fs::write(target.join("gone"), "again").unwrap();
    fs::remove_file(target.join("kept")).unwrap();
    shows_both(&driver.target("one"));

    // Another image on the same base, and a directory of it.
    Tree::new(&[("b", "other")]).squashfs("/images/team/other.sqsh");
    index("others", &["base.sqsh", "other.sqsh"]);
    let other = volume("other", "team/others.json", &[]);
    let target = driver.mount(&other, "other").unwrap();
    assert_eq!(fs::read_to_string(target.join("gone")).unwrap(), "base");
    assert_eq!(driver.loop_devices().len(), 3);
    let nfs = serde_json::json!({"kind": "nfs", "nfs": {"path": "/images", "host": server(), "ro": true}});
    let stack = super::attach("squashfs", "team/tools.json", &nfs);
    let directory = serde_json::json!({"kind": "bind", "bind": {"path": "opt", "base": "mount", "mount": stack}});
    let directory = Volume::spec("directory", &directory).read_only();
    let target = driver.mount(&directory, "directory").unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 1);

    // What is staged knows its layers when the driver starts anew, also where the server is silent.
    driver.kill();
    driver.launch();
    let link = Link::cut();
    let again = in_time("publish without the server", || driver.publish(&one, "again").unwrap());
    shows_both(&again);
    link.restore();
    for (volume, pod) in
        [(&one, "again"), (&one, "one"), (&writable, "writable"), (&other, "other"), (&directory, "directory")]
    {
        driver.unpublish(volume, pod).unwrap();
    }
    for volume in [&one, &writable, &other, &directory] {
        driver.unstage(volume).unwrap();
    }
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_pod_with_copied_layers_starts_without_their_server() {
    fs::create_dir_all("/images/team").unwrap();
    make_layers();
    let keys = Keys::none();
    let policy = format!("trustedKeys: [{}]", keys.make("ours"));
    let roots = ["base.sqsh", "upper.sqsh"].map(|name| root_of(&["seal", &format!("/images/team/{name}")]));
    let text = serde_json::json!({
        "layers": ["base.sqsh", "upper.sqsh"], "verity": {"base.sqsh": roots[0], "upper.sqsh": roots[1]}
    });
    fs::write("/images/team/tools.json", text.to_string()).unwrap();
    keys.sign("ours", Path::new("/images/team/tools.json"));
    let driver = Driver::start_with(&["--cache-quota=1Gi", "--cache-min-free=1Mi", "--timeout=20"], Some(&policy));
    let copies = || {
        let of = [format!("--driver-name={}", driver.name), format!("--data-dir={}", driver.data_dir().display())];
        let listed = Command::new(&driver.binary).args(["cache", "list", "--output=json"]).args(of).output().unwrap();
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        listed.as_array().unwrap().iter().filter(|copy| copy["digest"].is_string()).count()
    };
    let of = |id: &str| volume(id, "team/tools.json", &[("cache", "node")]);
    let signed = |id: &str| volume(id, "team/tools.json", &[("cache", "node"), ("verity", "signed")]);
    let shown = |volume: &Volume| {
        shows_both(&in_time("a pod", || driver.mount(volume, "pod").unwrap()));
        (driver.verified_devices(), driver.unpublish(volume, "pod").unwrap(), driver.unstage(volume).unwrap()).0
    };
    assert_eq!(shown(&of("first")), 0);
    wait_for("the index and both layers to be copied", || copies() == 3);
    let link = Link::cut();
    assert_eq!(shown(&of("later")), 0);
    let error = in_time("a pod without the signature", || driver.mount(&signed("unknown"), "pod")).unwrap_err();
    assert!(error.code() == Code::Unavailable && error.message().contains("tools.json.minisig"), "{error}");
    link.restore();
    assert_eq!(shown(&signed("first")), 2);
    wait_for("the signature to be copied", || copies() == 4);
    let link = Link::cut();
    assert_eq!(shown(&signed("later")), 2);
    link.restore();
    // Of an index that is another by now, the copy is of the past.
    index("tools", &["base.sqsh"]);
    let target = driver.mount(&of("last"), "last").unwrap();
    assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "base");
    driver.unpublish(&of("last"), "last").unwrap();
    driver.unstage(&of("last")).unwrap();
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn one_signature_is_that_of_all_layers_of_an_image() {
    fs::create_dir_all("/images/team").unwrap();
    make_layers();
    let index = Path::new("/images/team/signed.json");
    let roots = ["base.sqsh", "upper.sqsh"].map(|name| root_of(&["seal", &format!("/images/team/{name}")]));
    let write = |upper: Option<&str>| {
        let mut text = serde_json::json!({"layers": ["base.sqsh", "upper.sqsh"], "verity": {"base.sqsh": roots[0]}});
        if let Some(root) = upper {
            text["verity"]["upper.sqsh"] = root.into();
        }
        fs::write(index, text.to_string()).unwrap();
    };
    let keys = Keys::none();
    let (ours, _) = (keys.make("ours"), keys.make("stranger"));
    let mut driver = Driver::with_policy(&format!("requireVerity: true\ntrustedKeys: [{ours}]"));
    let signed = volume("signed", "team/signed.json", &[("verity", "signed")]);
    let refused = |driver: &Driver, volume: &Volume, code: Code, why: &str| {
        let error = driver.mount(volume, "pod").unwrap_err();
        assert!(error.code() == code && error.message().contains(why), "{error}");
        driver.assert_nothing_left();
    };
    write(Some(&roots[1]));
    refused(&driver, &signed, Code::NotFound, "signed.json.minisig");
    keys.sign("stranger", index);
    refused(&driver, &signed, Code::PermissionDenied, "by none of the policy's trustedKeys");
    keys.sign("ours", index);
    write(Some(&roots[0]));
    refused(&driver, &signed, Code::PermissionDenied, "by none of the policy's trustedKeys");
    keys.sign("ours", index);
    refused(&driver, &signed, Code::FailedPrecondition, "does not have the root hash");
    write(None);
    keys.sign("ours", index);
    refused(&driver, &signed, Code::FailedPrecondition, "names no root hash of its layer upper.sqsh");
    refused(&driver, &volume("bare", "team/signed.json", &[]), Code::PermissionDenied, "verity: ");
    let root = volume("root", "team/signed.json", &[("verity", &roots[0])]);
    refused(&driver, &root, Code::InvalidArgument, "is an index of layers");
    write(Some(&roots[1]));
    keys.sign("ours", index);
    shows_both(&driver.mount(&signed, "pod").unwrap());
    assert_eq!((driver.verified_devices(), driver.loop_devices().len()), (2, 2));
    driver.kill();
    driver.launch();
    let link = Link::cut();
    shows_both(&in_time("publish without the server", || driver.publish(&signed, "again").unwrap()));
    link.restore();
    assert_eq!(driver.verified_devices(), 2);
    driver.unpublish(&signed, "again").unwrap();
    driver.unmount(&signed, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn an_index_leads_nowhere_but_to_files_beside_it() {
    fs::create_dir_all("/images/team").unwrap();
    make_layers();
    Tree::new(&[("secret", "")]).squashfs("/images/elsewhere.sqsh");
    let driver = Driver::start();
    let refused = |layers: &[&str], symlinks: &str, code: Code, why: &str| {
        index("hostile", layers);
        let volume = volume("hostile", "team/hostile.json", &[("symlinks", symlinks)]).inline();
        let error = driver.publish(&volume, "pod").unwrap_err();
        assert!(error.code() == code && error.message().contains(why), "{error}");
        driver.assert_nothing_left();
    };
    refused(&["../elsewhere.sqsh"], "follow", Code::FailedPrecondition, "a file beside the index");
    refused(&["/images/elsewhere.sqsh"], "follow", Code::FailedPrecondition, "a file beside the index");
    refused(&["hostile.json"], "follow", Code::FailedPrecondition, "a file beside the index");
    refused(&["absent.sqsh", "base.sqsh"], "follow", Code::NotFound, "team/absent.sqsh");
    refused(&["hostile"], "follow", Code::NotFound, "team/hostile");
    let _ = fs::remove_file("/images/team/link.sqsh");
    std::os::unix::fs::symlink("../elsewhere.sqsh", "/images/team/link.sqsh").unwrap();
    refused(&["link.sqsh"], "refuse", Code::PermissionDenied, "team/link.sqsh");
    fs::write("/images/team/hostile.json", vec![b'['; 100_000]).unwrap();
    let volume = volume("hostile", "team/hostile.json", &[]).inline();
    let error = driver.publish(&volume, "pod").unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    driver.assert_nothing_left();
}
