//! Nodes on which the kernel has no squashfs or no erofs, as hardening guides have it.

use std::fs;
use std::process::Command;

use csi_driver_squashfs::csi::v1::ProbeRequest;
use tonic::Code;

use super::harness::image::Tree;
use super::harness::{Driver, Volume, run, wait_for};
use super::operations::{doctor, get, start_served};
use super::server;

/// A line of modprobe.d(5) that keeps the kernel from loading a module, while this lives.
struct Forbidden {
    file: String,
}

impl Forbidden {
    fn by(line: &str) -> Self {
        let module = line.split(' ').nth(1).unwrap();
        fs::create_dir_all("/etc/modprobe.d").unwrap();
        let file = format!("/etc/modprobe.d/hardening-{module}.conf");
        fs::write(&file, format!("{line}\n")).unwrap();
        let unload = || Command::new("modprobe").args(["-r", module]).status().unwrap().success();
        wait_for("nobody to use the module", unload);
        Forbidden { file }
    }
}

impl Drop for Forbidden {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

fn volume(fs_type: &str) -> Volume {
    let tree = Tree::new(&[("file", fs_type)]);
    let image = format!("module.{fs_type}");
    match fs_type {
        "erofs" => tree.erofs(format!("/images/{image}")),
        _ => tree.squashfs(format!("/images/{image}")),
    };
    Volume::flat(fs_type, &[("server", &server()), ("share", "/images"), ("image", &image), ("fsType", fs_type)])
}

fn assert_works(driver: &Driver, volume: &Volume, content: &str) {
    let target = driver.mount(volume, "pod").unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), content);
    driver.unmount(volume, "pod");
}

fn is_in(lines: &str, beginning: &str) -> bool {
    lines.lines().any(|line| line.starts_with(beginning))
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_node_without_squashfs_or_without_erofs_is_ready_and_a_volume_that_needs_it_says_what_to_do() {
    for (absent, present, line) in [
        ("squashfs", "erofs", "install squashfs /bin/false"),
        ("erofs", "squashfs", "install erofs /bin/false"),
        ("squashfs", "erofs", "blacklist squashfs"),
    ] {
        let forbidden = Forbidden::by(line);
        let driver = start_served(&[]);
        assert_eq!(get("/readyz"), (200, "ok\n".into()), "{line}");
        let (is_well, findings) = doctor(&[]);
        assert!(is_well, "{findings}");
        let warning =
            format!("warn file system {absent}: mount {absent}: no such device: this kernel has no {absent}: ");
        assert!(is_in(&findings, &warning), "{findings}");
        assert!(is_in(&findings, &format!("ok   file system {present}: ")), "{findings}");

        assert_works(&driver, &volume(present), present);
        let refused = volume(absent);
        let error = driver.stage(&refused).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
        assert!(error.message().contains(&format!(": no such device: this kernel has no {absent}: ")), "{error}");

        // What the message says to do, word for word.
        let words: Vec<_> = error.message().split('\'').collect();
        let command = |name| *words.iter().find(|words| words.starts_with(name)).expect(name);
        let found = run("sh", &["-c", command("grep")]);
        assert_eq!(found.trim(), format!("{}:{line}", forbidden.file));
        drop(forbidden);
        run("sh", &["-c", command("modprobe")]);
        assert_works(&driver, &refused, absent);
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_node_without_any_file_system_for_images_is_not_ready() {
    let forbidden = [Forbidden::by("install squashfs /bin/false"), Forbidden::by("install erofs /bin/false")];
    let driver = Driver::start_with(&["--health-address=127.0.0.1:29660"], None);
    let (status, problems) = get("/readyz");
    assert_eq!(status, 503, "{problems}");
    let probe = driver.block_on(async { driver.identity().probe(ProbeRequest {}).await }).unwrap_err();
    assert_eq!(probe.code(), Code::FailedPrecondition);
    let (is_well, findings) = doctor(&[]);
    assert!(!is_well, "{findings}");
    for name in ["squashfs", "erofs"] {
        assert!(is_in(&problems, &format!("this node lacks: mount {name}: no such device: ")), "{problems}");
        assert!(probe.message().contains(&format!("this kernel has no {name}: ")), "{probe}");
        assert!(is_in(&findings, &format!("FAIL file system {name}: ")), "{findings}");
    }
    drop(forbidden);
    assert_eq!(get("/readyz"), (200, "ok\n".into()));
    driver.assert_nothing_left();
}
