//! What the kubelet and an operator see of the driver: registration, health, metrics, `status` and `doctor`.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use csi_driver_squashfs::csi::v1::NodeGetInfoRequest;
use csi_driver_squashfs::csi::v1::node_client::NodeClient;
use csi_driver_squashfs::kubernetes::registration::v1::registration_client::RegistrationClient;
use csi_driver_squashfs::kubernetes::registration::v1::{InfoRequest, RegistrationStatus};
use serde_json::json;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use super::harness::image::Tree;
use super::harness::kernel::rpcs;
use super::harness::nfs_server::{Link, StuckServer, fresh_caches};
use super::harness::node::{in_time, start_with};
use super::harness::{Driver, Volume, binary, run, wait_for};
use super::{seed, server, squashfs};

const HEALTH: &str = "127.0.0.1:29660";
const METRICS: &str = "127.0.0.1:29661";

/// The status and the body of a GET.
pub(super) fn get(path: &str) -> (u16, String) {
    let (address, mut served) = (if path == "/metrics" { METRICS } else { HEALTH }, None);
    wait_for("it to be served", || {
        served = TcpStream::connect(address).ok();
        served.is_some()
    });
    let mut stream = served.unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// A driver that serves both.
pub(super) fn start_served(more: &[&str]) -> Driver {
    let (health, metrics) = (format!("--health-address={HEALTH}"), format!("--metrics-address={METRICS}"));
    start_with(&[&[health.as_str(), metrics.as_str()], more].concat(), None)
}

/// The value of one metric; 0 where it is not there.
fn metric(name: &str) -> f64 {
    let (status, text) = get("/metrics");
    assert_eq!(status, 200, "{text}");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// Whether volumes work here, and what was looked at.
pub(super) fn doctor(arguments: &[&str]) -> (bool, String) {
    fs::create_dir_all("/var/lib/kubelet/pods").unwrap();
    let output = Command::new(binary()).arg("doctor").args(arguments).output().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

/// The part of the kubelet that finds a plugin's socket, asks whose it is, and tells the outcome.
struct Kubelet {
    registry: PathBuf,
}

impl Kubelet {
    fn connect(&self, driver: &Driver, socket: &Path) -> Channel {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
        driver.block_on(async { endpoint.connect_lazy() })
    }

    fn socket(&self, driver: &Driver) -> PathBuf {
        self.registry.join(format!("{}@reg.sock", driver.name))
    }

    /// What the kubelet does with a new socket (pkg/kubelet/pluginmanager/operationexecutor), to the name of the node.
    fn register(&self, driver: &Driver, error: &str) -> String {
        let socket = self.socket(driver);
        wait_for("the registration socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        let mut registration = RegistrationClient::new(self.connect(driver, &socket));
        let info = driver.block_on(registration.get_info(InfoRequest {})).unwrap().into_inner();
        assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", driver.name.as_str()));
        assert_eq!(info.supported_versions, ["1.0.0"]);
        let mut node = NodeClient::new(self.connect(driver, Path::new(&info.endpoint)));
        let node_id = driver.block_on(node.node_get_info(NodeGetInfoRequest {})).unwrap().into_inner().node_id;
        let status = RegistrationStatus { plugin_registered: error.is_empty(), error: error.into() };
        driver.block_on(registration.notify_registration_status(status)).unwrap();
        node_id
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_kubelet_registers_the_driver_and_registers_it_again() {
    let kubelet = Kubelet { registry: "/var/lib/kubelet/plugins_registry".into() };
    fs::create_dir_all(&kubelet.registry).unwrap();
    let registry = format!("--plugin-registry={}", kubelet.registry.display());
    let mut driver = start_served(&[&registry]);

    assert_eq!(get("/healthz").0, 200);
    assert_eq!(get("/readyz"), (503, "the kubelet has not registered the driver yet\n".into()));
    assert_eq!(kubelet.register(&driver, ""), "node-1");
    assert_eq!(get("/readyz"), (200, "ok\n".into()));
    assert_eq!(metric("squashfs_csi_registered"), 1.0);

    // Somebody empties the directory: the kubelet finds a new socket there.
    fs::remove_file(kubelet.socket(&driver)).unwrap();
    kubelet.register(&driver, "");

    kubelet.register(&driver, "no such version");
    assert_eq!(get("/readyz"), (503, "the kubelet refused the driver: no such version\n".into()));
    assert_eq!(metric("squashfs_csi_registered"), 0.0);

    // What a killed process left is in nobody's way.
    driver.kill();
    assert!(kubelet.socket(&driver).exists());
    driver.launch();
    kubelet.register(&driver, "");

    // Uninstalled in good order, the driver is forgotten by the kubelet.
    driver.terminate();
    assert!(!kubelet.socket(&driver).exists());
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_metrics_say_what_the_node_has_and_what_it_did() {
    Tree::new(&[("file", "metrics")]).squashfs("/images/metrics.sqsh");
    let driver = start_served(&[]);
    let volume = Volume::spec("v", &seed("/metrics.sqsh")).writable();
    let other = Volume::spec("absent", &seed("/absent.sqsh"));
    let target = driver.mount(&volume, "one").unwrap();
    driver.publish(&volume, "two").unwrap();
    fs::read(target.join("file")).unwrap();
    driver.stage(&other).unwrap_err();

    for (name, value) in [
        (concat!("build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
        ("staged_volumes", 1.0),
        ("published_volumes", 2.0),
        ("loop_devices", 1.0),
        ("images", 1.0),
        ("call_duration_seconds_count{method=\"NodePublishVolume\",code=\"OK\"}", 2.0),
        ("call_duration_seconds_count{method=\"NodeStageVolume\",code=\"NotFound\"}", 1.0),
        ("step_errors_total{step=\"image\",errno=\"ENOENT\"}", 1.0),
        ("step_duration_seconds_count{step=\"probe\"}", 2.0),
        ("step_duration_seconds_count{step=\"nfs\"}", 1.0),
        ("step_duration_seconds_count{step=\"image\"}", 1.0),
        ("step_duration_seconds_count{step=\"loop\"}", 1.0),
        // Once while the server was there, and once for each pod.
        ("step_duration_seconds_count{step=\"squashfs\"}", 3.0),
        ("step_duration_seconds_count{step=\"overlay\"}", 2.0),
        ("step_duration_seconds_count{step=\"attach\"}", 2.0),
        ("unfinished_releases", 0.0),
    ] {
        assert_eq!(metric(&format!("squashfs_csi_{name}")), value, "{name} in\n{}", get("/metrics").1);
    }
    let export = format!("{{server=\"{}\",export=\"/images\"}}", server());
    assert!(metric(&format!("squashfs_csi_nfs_rpcs_total{export}")) >= 5.0, "{}", get("/metrics").1);
    assert!(metric(&format!("squashfs_csi_nfs_round_trip_seconds_total{export}")) > 0.0);
    let device = &driver.loop_devices()[0];
    let read = format!("squashfs_csi_image_read_bytes_total{{image=\"/metrics.sqsh\",device=\"{device}\"}}");
    assert!(metric(&read) >= 4096.0, "{}", get("/metrics").1);

    // A process that is new counts from nothing, and sees what is there.
    driver.unpublish(&volume, "two").unwrap();
    driver.unmount(&volume, "one");
    assert_eq!(metric("squashfs_csi_step_duration_seconds_count{step=\"unmount\"}"), 2.0);
    assert_eq!(metric("squashfs_csi_loop_devices"), 0.0);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn threads_that_a_stuck_server_holds_are_bounded_and_seen() {
    let server = StuckServer::start();
    let mut driver = start_served(&["--timeout=5"]);
    assert_eq!(driver.status()["threads"], json!([]));
    let calls: Vec<_> = (0..24)
        .map(|number| {
            let volume = Volume::spec(&format!("v{number}"), &server.export(&format!("/{number}")));
            let (mut node, request) = (driver.node(), driver.stage_request(&volume));
            driver.spawn(async move { node.node_stage_volume(request).await })
        })
        .collect();
    for call in calls {
        let error = driver.block_on(call).unwrap().unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    }
    assert_eq!(metric("squashfs_csi_waiting_threads{server=\"127.0.0.1\"}"), 16.0, "{}", get("/metrics").1);
    let threads = driver.status()["threads"].as_array().unwrap().clone();
    assert_eq!(threads.len(), 16, "{threads:?}");
    assert!(threads.iter().all(|thread| thread["purpose"] == "work"), "{threads:?}");
    assert_eq!(get("/healthz").0, 200);
    // Only the end of its process lets go of a mount that the kernel will not give up.
    driver.kill();
    drop(server);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn clients_that_say_nothing_keep_nobody_from_asking() {
    let driver = start_served(&[]);
    let files = || fs::read_dir(format!("/proc/{}/fd", driver.pid())).unwrap().count();
    let before = files();
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(METRICS).unwrap()).collect();
    wait_for("connections", || files() >= before + 64);
    std::thread::sleep(Duration::from_millis(500));
    assert!(files() < before + 80, "{} files more", files() - before);
    assert_eq!(get("/healthz").0, 200);
    drop(silent);
    wait_for("the connections to go", || files() <= before);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn whoever_may_look_at_metrics_keeps_no_probe_of_the_kubelet_waiting() {
    let driver = start_served(&[]);
    let (stop, clients) = (Arc::new(AtomicBool::new(false)), 300);
    let connect = || {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // One that says nothing, until it is hung up on.
                if let Ok(mut stream) = TcpStream::connect(METRICS) {
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                    let _ = stream.read(&mut [0]);
                }
            }
        })
    };
    let clients: Vec<_> = (0..clients).map(|_| connect()).collect();
    let seconds = if std::env::var_os("SOAK").is_some() { 90 } else { 20 };
    let mut late = 0;
    for _ in 0..seconds {
        let start = Instant::now();
        assert_eq!((get("/healthz").0, get("/readyz").0), (200, 200));
        // The kubelet's patience, by the chart.
        late += usize::from(start.elapsed() > Duration::from_secs(5));
        std::thread::sleep(Duration::from_secs(1));
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    assert_eq!(late, 0, "of {seconds} probes");
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn forty_stuck_servers_leave_threads_for_a_good_one_and_status_says_who_has_them() {
    Tree::new(&[("file", "good")]).squashfs("/images/good.sqsh");
    let server = StuckServer::start();
    let mut driver = start_served(&["--timeout=20"]);
    // The kernel introduces itself to one NFS 4 server at a time, so that it knows the good one before.
    driver.stage(&Volume::spec("known", &seed("/good.sqsh")).writable()).unwrap();
    let calls: Vec<_> = (0..240)
        .map(|number| {
            let stuck = server.export_at(&format!("127.0.0.{}", 2 + number / 6), &format!("/{number}"));
            let layers = json!({"kind": "overlay", "overlay": {"lower": [squashfs("/good.sqsh"), stuck]}});
            let volume = match number % 2 {
                0 => Volume::spec(&format!("v{number}"), &stuck),
                _ => Volume::spec(&format!("v{number}"), &layers).writable(),
            };
            let (mut node, request) = (driver.node(), driver.stage_request(&volume));
            driver.spawn(async move { node.node_stage_volume(request).await })
        })
        .collect();
    let held = |address: &str| {
        let waiting = driver.status()["waiting"].as_array().unwrap().clone();
        waiting.iter().filter(|waiting| waiting["servers"] == address).count()
    };
    let stuck: Vec<_> = (2..42).map(|number| format!("127.0.0.{number}")).collect();
    wait_for("a thread for each of them", || stuck.iter().all(|address| held(address) > 0));
    let good = Volume::spec("good", &seed("/good.sqsh")).writable();
    let target = in_time("mount", || driver.mount(&good, "pod")).unwrap();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "good");
    let threads = driver.status()["threads"].as_array().unwrap().len();
    assert!((40..=128).contains(&threads), "{threads} threads");
    assert!(stuck.iter().all(|address| held(address) <= 16));
    for call in calls {
        let error = driver.block_on(call).unwrap().unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    }
    in_time("unmount", || driver.unmount(&good, "pod"));
    driver.kill();
    drop(server);
    driver.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_link_cut_in_the_middle_of_any_call_delays_it_and_nothing_else() {
    Tree::new(&[("file", "middle")]).squashfs("/images/middle.sqsh");
    let driver = start_served(&["--timeout=8"]);
    let volume = Volume::spec("v", &seed("/middle.sqsh")).writable();
    let inline = Volume::spec("inline", &seed("/middle.sqsh")).inline();
    // Every round trip takes 0.2 s, so that the cut meets another step each time.
    for after in [100, 500, 900, 1300, 1700, 2100, 2500] {
        run("nfs-server", &["delay", "100"]);
        let stage = {
            let (mut node, request) = (driver.node(), driver.stage_request(&volume));
            driver.spawn(async move { node.node_stage_volume(request).await.map(drop) })
        };
        let publish = {
            let (mut node, request) = (driver.node(), driver.publish_request(&inline, &driver.target("inline")));
            driver.spawn(async move { node.node_publish_volume(request).await.map(drop) })
        };
        std::thread::sleep(Duration::from_millis(after));
        let link = Link::cut();
        for call in [stage, publish] {
            let answer = driver.block_on(call).unwrap();
            if let Err(error) = answer {
                let late = [Code::DeadlineExceeded, Code::Unavailable, Code::Aborted];
                assert!(late.contains(&error.code()), "cut after {after} ms: {error}");
            }
        }
        assert_eq!(get("/healthz").0, 200);
        // The teardown of what may still be under way waits for nobody.
        in_time("unpublish", || driver.unpublish(&inline, "inline")).unwrap();
        link.restore();
        driver.mount(&volume, "pod").unwrap();
        driver.unmount(&volume, "pod");
        wait_for("the threads to come back", || driver.status()["threads"] == json!([]));
        driver.assert_nothing_left();
    }
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_longer_read_ahead_reads_an_image_in_fewer_calls() {
    let tree = Tree::new(&[]);
    let file = tree.path().join("file").display().to_string();
    run("dd", &["if=/dev/urandom", &format!("of={file}"), "bs=1M", "count=8", "status=none"]);
    tree.squashfs("/images/read-ahead.sqsh");
    let calls = |arguments: &[&str]| {
        let driver = start_with(arguments, None);
        let volume = Volume::spec("v", &seed("/read-ahead.sqsh")).writable();
        let target = driver.mount(&volume, "pod").unwrap();
        fresh_caches();
        let before = rpcs();
        fs::read(target.join("file")).unwrap();
        let calls = rpcs() - before;
        driver.unmount(&volume, "pod");
        driver.assert_nothing_left();
        calls
    };
    let (short, long) = (calls(&[]), calls(&["--nfs-read-ahead=1024"]));
    assert!(long * 2 < short, "{long} calls with 1 MiB, {short} with the kernel's own");
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn the_doctor_finds_a_well_node_well_and_says_what_is_wrong_with_another() {
    let (well, text) = doctor(&[&server(), "nowhere.test"]);
    assert!(well, "{text}");
    assert!(!text.contains("FAIL"), "{text}");
    assert!(text.contains(&format!("ok   server {}: answers NFS 4 at", server())), "{text}");
    assert!(text.contains("warn server nowhere.test: resolve nowhere.test"), "{text}");
    run("mount", &["-t", "tmpfs", "private", "/mnt"]);
    run("mount", &["--make-private", "/mnt"]);
    fs::create_dir("/mnt/pods").unwrap();
    let (well, text) = doctor(&["--kubelet-dir=/mnt"]);
    run("umount", &["/mnt"]);
    assert!(!well);
    assert!(text.contains("FAIL kubelet directory: /mnt/pods is below the mount /mnt, which is not shared"), "{text}");
}
