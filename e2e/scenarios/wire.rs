//! What protects the wire: Kerberos and TLS, whoever reads in a pod; what either of them lacks is told, and never gone without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{sleep, spawn};
use std::time::Duration;

use tonic::{Code, Status};

use super::harness::kernel::private_mounts;
use super::harness::nfs_server::fresh_caches;
use super::harness::readers::{Files, hash};
use super::harness::wire::{self, Exported, Stopped, is_readable_on_the_wire};
use super::harness::{Driver, Volume, run, soak};
use super::server;

const EVERY_FLAVOUR: &str = "sec=sys:krb5:krb5i:krb5p";

/// Files, and the image of them that the server has.
fn image(name: &str) -> Files {
    let files = Files::random(2, 256);
    files.tree().squashfs(Path::new("/images").join(name));
    files
}

fn volume(image: &str, version: &str, options: &str) -> Volume {
    let server = server();
    let attributes = [
        ("server", server.as_str()),
        ("share", "/images"),
        ("image", image),
        ("nfsVersion", version),
        ("nfsOptions", options),
    ];
    Volume::flat("v", &attributes)
}

/// A pod's process that is nobody's in particular: no key, no ticket.
fn assert_a_user_reads(target: &Path, file: &str) {
    let user = ["--reuid", "1000", "--regid", "1000", "--clear-groups", "cat", file];
    let read = Command::new("setpriv").args(user).current_dir(target).output().unwrap();
    assert!(read.status.success() && !read.stdout.is_empty(), "{read:?}");
}

/// A pod reads the volume, whoever it is, and who listens on the wire does or does not.
#[track_caller]
fn assert_on_the_wire(driver: &Driver, volume: &Volume, files: &Files, is_readable: bool) {
    let target = driver.mount(volume, "pod").unwrap();
    let original = files.tree().path().join("file-0");
    let is_read = is_readable_on_the_wire(&target, "file-0", &original);
    assert_eq!(is_read, is_readable, "{:?}", volume.attributes);
    assert_a_user_reads(&target, "file-1");
    driver.unmount(volume, "pod");
    driver.assert_nothing_left();
}

#[track_caller]
fn assert_refused(answer: Result<PathBuf, Status>, code: Code, words: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(words), "{status}");
}

/// What the call is answered that joins the others: those are told what they wait for.
fn in_the_end(call: impl Fn() -> Result<PathBuf, Status>, waited_for: &str) -> Result<PathBuf, Status> {
    loop {
        match call() {
            Err(late) if late.code() == Code::DeadlineExceeded => {
                assert!(late.message().contains(waited_for), "{late}");
            }
            answer => return answer,
        }
    }
}

/// Reads all files from the server, in a thread.
fn read_beside(target: &Path, files: &Files) -> std::thread::JoinHandle<Vec<Vec<u8>>> {
    fresh_caches();
    let paths = files.names().map(|name| target.join(name)).collect::<Vec<_>>();
    spawn(move || paths.iter().map(|path| hash(path).unwrap()).collect())
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn images_are_read_with_kerberos_of_each_kind_by_users_without_a_ticket() {
    wire::kerberos();
    let files = image("kerberos.sqsh");
    let _export = Exported::with(EVERY_FLAVOUR);
    let driver = Driver::start();
    let kinds = [
        ("sys", "4.2", true),
        ("krb5", "4.2", true),
        ("krb5i", "4.1", true),
        ("krb5p", "4.2", false),
        ("krb5p", "3", false),
    ];
    for (sec, version, is_readable) in kinds {
        let volume = volume("kerberos.sqsh", version, &format!("sec={sec}"));
        assert_on_the_wire(&driver, &volume, &files, is_readable);
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_kerberos_lacks_is_named() {
    wire::kerberos();
    let files = image("kerberos.sqsh");
    let driver = Driver::start();
    let volume = volume("kerberos.sqsh", "4.2", "sec=krb5p");
    let mount = || driver.mount(&volume, "pod");
    assert_refused(mount(), Code::PermissionDenied, "the server refuses this node with sec=krb5p");
    let _export = Exported::with(EVERY_FLAVOUR);
    {
        let _daemon = Stopped::daemon("gssd");
        assert_refused(mount(), Code::FailedPrecondition, "is rpc.gssd running on this node");
    }
    {
        fs::rename("/etc/krb5.keytab", "/etc/krb5.keytab.away").unwrap();
        wire::restart("gssd");
        assert_refused(mount(), Code::PermissionDenied, "nobody vouches for this node");
        fs::rename("/etc/krb5.keytab.away", "/etc/krb5.keytab").unwrap();
        wire::restart("gssd");
    }
    {
        let _daemon = Stopped::daemon("svcgssd");
        // The kernel asks for half a minute.
        assert_refused(in_the_end(mount, "sec=krb5p"), Code::PermissionDenied, "the server's own daemon does not run");
    }
    {
        run("chmod", &["600", "/images/kerberos.sqsh"]);
        assert_refused(mount(), Code::PermissionDenied, "the node is nobody there");
        run("chmod", &["644", "/images/kerberos.sqsh"]);
    }
    files.assert_in(&mount().unwrap());
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn reads_go_on_when_the_ticket_has_expired_and_wait_while_nobody_gets_another() {
    wire::kerberos();
    let files = image("kerberos.sqsh");
    let _export = Exported::with(EVERY_FLAVOUR);
    let tickets_live = |time: &str| {
        for principal in ["nfs/node-1", "krbtgt/WIRE.TEST"] {
            run("kadmin.local", &["modprinc", "-maxlife", time, principal]);
        }
        let stopped = Stopped::daemon("gssd");
        run("sh", &["-c", "rm -f /tmp/krb5ccmachine_*"]);
        stopped.start();
    };
    tickets_live("20 seconds");
    let driver = Driver::start();
    let volume = volume("kerberos.sqsh", "4.2", "sec=krb5p");
    let target = driver.mount(&volume, "pod").unwrap();
    files.assert_in(&target);
    sleep(Duration::from_secs(25));
    fresh_caches();
    files.assert_in(&target);
    let gssd = Stopped::daemon("gssd");
    sleep(Duration::from_secs(25));
    let reader = read_beside(&target, &files);
    sleep(Duration::from_secs(5));
    assert!(!reader.is_finished(), "a reader without a ticket got {:?}", reader.join());
    gssd.start();
    reader.join().unwrap();
    files.assert_in(&target);
    tickets_live("1 day");
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn images_are_read_over_tls_by_either_version() {
    wire::tls();
    let files = image("tls.sqsh");
    let _export = Exported::with("xprtsec=none:tls:mtls");
    let driver = Driver::start();
    for (transport, version) in [("tls", "4.2"), ("mtls", "4.1"), ("mtls", "3")] {
        let volume = volume("tls.sqsh", version, &format!("xprtsec={transport}"));
        assert_on_the_wire(&driver, &volume, &files, false);
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_volume_over_tls_never_uses_a_connection_in_the_clear() {
    wire::tls();
    let files = image("tls.sqsh");
    let original = files.tree().path().join("file-0");
    let _export = Exported::with("xprtsec=none:tls:mtls");
    let mount_both = |driver: &Driver| {
        let plain = Volume { id: "plain".into(), ..volume("tls.sqsh", "4.2", "") };
        driver.mount(&plain, "plain-pod").unwrap();
        (plain, driver.mount(&volume("tls.sqsh", "4.2", "xprtsec=tls"), "pod"))
    };
    let driver = Driver::start();
    let (plain, target) = mount_both(&driver);
    assert!(!is_readable_on_the_wire(&target.unwrap(), "file-0", &original));
    let table = private_mounts(driver.pid());
    assert!(table.iter().any(|line| line.contains("vers=4.1") && line.contains("xprtsec=tls")), "{table:?}");
    driver.unmount(&volume("tls.sqsh", "4.2", "xprtsec=tls"), "pod");
    driver.unmount(&plain, "plain-pod");
    driver.assert_nothing_left();

    let driver = Driver::with_policy(r#"nfsVersions: ["4.2"]"#);
    let (plain, refused) = mount_both(&driver);
    assert_refused(refused, Code::FailedPrecondition, "has already, with sec=sys, xprtsec=none");
    driver.unmount(&plain, "plain-pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_tls_lacks_is_named() {
    wire::tls();
    let files = image("tls.sqsh");
    let driver = Driver::start();
    let over = |transport: &str| volume("tls.sqsh", "4.2", &format!("xprtsec={transport}"));
    let mount = |volume: &Volume| driver.mount(volume, "pod");
    {
        let _export = Exported::with("xprtsec=mtls");
        assert_refused(mount(&over("none")), Code::PermissionDenied, "with sec=sys, without TLS");
        assert_refused(mount(&over("tls")), Code::PermissionDenied, "the server refuses this node with xprtsec=tls");
    }
    {
        let _daemon = Stopped::daemon("tlshd");
        assert_refused(mount(&over("tls")), Code::FailedPrecondition, "is tlshd running on this node");
    }
    // The kernel may ask for three minutes.
    if soak(0, 1) == 1 {
        let _daemon = Stopped::daemon("server-tlshd");
        let refused = in_the_end(|| mount(&over("tls")), "xprtsec=tls");
        assert_refused(refused, Code::Unavailable, "no TLS session was made");
    }
    {
        let stranger = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=stranger -days 2 \
                        -keyout /dev/null -out /var/lib/wire/stranger.crt && cp /var/lib/wire/ca.crt /var/lib/wire/ca.away \
                        && cp /var/lib/wire/stranger.crt /var/lib/wire/ca.crt";
        run("sh", &["-c", stranger]);
        wire::restart("tlshd");
        assert_refused(mount(&over("tls")), Code::PermissionDenied, "no TLS session was made");
        run("mv", &["/var/lib/wire/ca.away", "/var/lib/wire/ca.crt"]);
        wire::restart("tlshd");
    }
    {
        run("cp", &["/var/lib/wire/server-tlshd.conf", "/var/lib/wire/conf.away"]);
        run("sed", &["-i", "s/nfs-server/node-1/", "/var/lib/wire/server-tlshd.conf"]);
        wire::restart("server-tlshd");
        assert_refused(
            mount(&over("tls")),
            Code::PermissionDenied,
            "a certificate that is not trusted, or for another name",
        );
        run("mv", &["/var/lib/wire/conf.away", "/var/lib/wire/server-tlshd.conf"]);
        wire::restart("server-tlshd");
    }
    files.assert_in(&mount(&over("mtls")).unwrap());
    driver.unmount(&over("mtls"), "pod");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_is_read_over_tls_is_read_on_when_the_connection_was_lost() {
    wire::tls();
    let files = image("tls.sqsh");
    let driver = Driver::start();
    let volume = volume("tls.sqsh", "4.2", "xprtsec=tls");
    let target = driver.mount(&volume, "pod").unwrap();
    let lose_connection = || run("nfs-server", &["exec", "ss", "--kill", "--tcp", "state", "connected"]);
    lose_connection();
    fresh_caches();
    files.assert_in(&target);
    // The kernel has no patience with a node that makes no session, `hard` or not: reads fail, and are right as soon as it does.
    let tlshd = Stopped::daemon("tlshd");
    lose_connection();
    fresh_caches();
    let error = fs::read(target.join("file-0")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    tlshd.start();
    files.assert_in(&target);
    driver.unmount(&volume, "pod");
    driver.assert_nothing_left();
}
