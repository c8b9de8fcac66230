//! What every scenario needs: a driver process and its CSI client, images, and a look at what the kernel has.

#![allow(dead_code, reason = "each test binary uses its part")]

pub mod image;
#[allow(unsafe_code, reason = "it visits another mount namespace")]
pub mod kernel;
pub mod killed;
pub mod layer;
pub mod multipath;
pub mod nfs_server;
pub mod node;
pub mod readers;
#[allow(unsafe_code, reason = "no safe wrapper covers ptrace(2)")]
pub mod tracer;
pub mod wire;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use csi_driver_squashfs::csi::v1::controller_client::ControllerClient;
use csi_driver_squashfs::csi::v1::identity_client::IdentityClient;
use csi_driver_squashfs::csi::v1::node_client::NodeClient;
use csi_driver_squashfs::csi::v1::volume_capability::access_mode::Mode;
use csi_driver_squashfs::csi::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use csi_driver_squashfs::csi::v1::{
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, VolumeCapability,
};
use csi_driver_squashfs::kernel::{device_mapper::verified, loop_device};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// The driver's binary: the one in PATH in the VM, else the one that cargo built beside this test.
pub const BINARY: &str = "csi-driver-squashfs";

/// Tests that look at the state of the whole machine run one at a time, but a name is used once all the same.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A driver process, with a directory of its own that stands for the kubelet's.
pub struct Driver {
    pub directory: PathBuf,
    pub name: String,
    /// What [`Self::launch`] starts.
    pub binary: PathBuf,
    process: Option<Child>,
    arguments: Vec<String>,
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

/// A volume as Kubernetes would ask for it.
#[derive(Clone, Debug)]
pub struct Volume {
    pub id: String,
    pub attributes: HashMap<String, String>,
    pub mount_options: Vec<String>,
    pub mode: Mode,
    pub read_only: bool,
    /// The `fsGroup` of the pod.
    pub group: Option<u32>,
}

impl Volume {
    /// A volume with the flat attributes.
    pub fn flat(id: &str, attributes: &[(&str, &str)]) -> Self {
        let attributes = attributes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let mode = Mode::MultiNodeReaderOnly;
        Volume { id: id.into(), attributes, mount_options: Vec::new(), mode, read_only: false, group: None }
    }

    /// A volume with a JSON mount spec.
    pub fn spec(id: &str, spec: &serde_json::Value) -> Self {
        Volume::flat(id, &[("mountSpec", &spec.to_string())])
    }

    /// The same with an access mode that allows writes.
    pub fn writable(self) -> Self {
        Volume { mode: Mode::MultiNodeMultiWriter, ..self }
    }

    /// The same, published read-only.
    pub fn read_only(self) -> Self {
        Volume { read_only: true, ..self }
    }

    /// The same for a pod with this `fsGroup`.
    pub fn of_group(self, group: u32) -> Self {
        Volume { group: Some(group), ..self }
    }

    /// The same as an inline volume.
    pub fn inline(mut self) -> Self {
        self.attributes.insert("csi.storage.k8s.io/ephemeral".into(), "true".into());
        Volume { mode: Mode::SingleNodeWriter, ..self }
    }

    pub fn capability(&self) -> VolumeCapability {
        let mount = MountVolume {
            mount_flags: self.mount_options.clone(),
            volume_mount_group: self.group.map(|group| group.to_string()).unwrap_or_default(),
            ..Default::default()
        };
        VolumeCapability {
            access_mode: Some(AccessMode { mode: self.mode.into() }),
            access_type: Some(AccessType::Mount(mount)),
        }
    }
}

impl Driver {
    pub fn start() -> Self {
        Driver::start_with(&[], None)
    }

    pub fn with_policy(policy: &str) -> Self {
        Driver::start_with(&[], Some(policy))
    }

    /// Starts a driver with further arguments and waits until it listens.
    pub fn start_with(further: &[&str], policy: Option<&str>) -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/var/lib/kubelet/test-{}-{number}", std::process::id()));
        fs::create_dir_all(directory.join("pods")).unwrap();
        let name = format!("test-{number}.csi.dev");
        let path = |name: &str| directory.join(name).display().to_string();
        let mut arguments: Vec<String> =
            ["node", "--controller", "--node-id=node-1", "--log-level=debug"].map(Into::into).into();
        arguments.push(format!("--driver-name={name}"));
        arguments.push(format!("--endpoint=unix://{}", path("csi.sock")));
        arguments.push(format!("--data-dir={}", path("data")));
        if let Some(policy) = policy {
            fs::write(path("policy.yaml"), policy).unwrap();
            arguments.push(format!("--policy={}", path("policy.yaml")));
        }
        arguments.extend(further.iter().map(|argument| (*argument).to_owned()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let endpoint = Endpoint::try_from(format!("unix://{}", path("csi.sock"))).unwrap();
        let channel = runtime.block_on(async { endpoint.connect_lazy() });
        let mut driver = Driver { directory, name, binary: binary(), process: None, arguments, runtime, channel };
        driver.launch();
        driver
    }

    /// Starts the process again, as the kubelet does after it ended.
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "the driver runs");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.directory.join("log")).unwrap();
        let process =
            Command::new(&self.binary).args(&self.arguments).stderr(log).stdin(Stdio::null()).spawn().unwrap();
        self.process = Some(process);
        let socket = self.directory.join("csi.sock");
        wait_for("the driver to listen", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    /// Kills the process and starts it with further arguments.
    pub fn restart_with(&mut self, further: &[&str]) {
        self.kill();
        self.arguments.extend(further.iter().map(|argument| (*argument).to_owned()));
        self.launch();
    }

    /// Ends the process without a chance to clean up.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the driver runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Ends the process in good order, as Kubernetes does.
    pub fn terminate(&mut self) {
        let mut process = self.process.take().expect("the driver runs");
        run("kill", &[&process.id().to_string()]);
        assert!(process.wait().unwrap().success());
    }

    /// What `csi-driver-squashfs status` says of this driver.
    pub fn status(&self) -> serde_json::Value {
        let arguments = [format!("--driver-name={}", self.name), format!("--data-dir={}", self.data_dir().display())];
        let text =
            Command::new(&self.binary).args(["status", "--output=json"]).args(arguments).output().unwrap().stdout;
        serde_json::from_slice(&text).unwrap()
    }

    /// What `csi-driver-squashfs commit` writes of what is published at `target`, or says.
    pub fn commit(&self, target: &Path) -> Result<Vec<u8>, String> {
        let mut command = Command::new(&self.binary);
        command.arg("commit").arg(target).arg(format!("--driver-name={}", self.name));
        let output = command.arg(format!("--data-dir={}", self.data_dir().display())).output().unwrap();
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the driver runs").id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The target path of a pod, whose directory is there as the kubelet would have made it.
    pub fn target(&self, pod: &str) -> PathBuf {
        let directory = self.directory.join("pods").join(pod);
        fs::create_dir_all(&directory).unwrap();
        directory.join("mount")
    }

    pub fn staging(&self) -> String {
        self.directory.join("staging").display().to_string()
    }

    pub fn block_on<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    pub fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel.clone())
    }

    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// Starts a call that goes on while the test does something else.
    pub fn spawn<F: Future<Output: Send> + Send + 'static>(&self, call: F) -> tokio::task::JoinHandle<F::Output> {
        self.runtime.spawn(call)
    }

    pub fn stage_request(&self, volume: &Volume) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: volume.id.clone(),
            staging_target_path: self.staging(),
            volume_capability: Some(volume.capability()),
            volume_context: volume.attributes.clone(),
        }
    }

    pub fn stage(&self, volume: &Volume) -> Result<(), Status> {
        self.block_on(self.node().node_stage_volume(self.stage_request(volume))).map(drop)
    }

    pub fn unstage(&self, volume: &Volume) -> Result<(), Status> {
        let request = NodeUnstageVolumeRequest { volume_id: volume.id.clone(), staging_target_path: self.staging() };
        self.block_on(self.node().node_unstage_volume(request)).map(drop)
    }

    pub fn publish_request(&self, volume: &Volume, target: &Path) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: volume.id.clone(),
            staging_target_path: self.staging(),
            target_path: target.display().to_string(),
            volume_capability: Some(volume.capability()),
            readonly: volume.read_only,
            volume_context: volume.attributes.clone(),
        }
    }

    /// Publishes for a pod and returns the target path.
    pub fn publish(&self, volume: &Volume, pod: &str) -> Result<PathBuf, Status> {
        let target = self.target(pod);
        let request = self.publish_request(volume, &target);
        self.block_on(self.node().node_publish_volume(request)).map(|_| target)
    }

    pub fn unpublish(&self, volume: &Volume, pod: &str) -> Result<(), Status> {
        let target_path = self.target(pod).display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: volume.id.clone(), target_path };
        self.block_on(self.node().node_unpublish_volume(request)).map(drop)
    }

    pub fn stats(&self, volume: &Volume, pod: &str) -> Result<NodeGetVolumeStatsResponse, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume.id.clone(),
            volume_path: self.target(pod).display().to_string(),
            staging_target_path: self.staging(),
        };
        self.block_on(self.node().node_get_volume_stats(request)).map(tonic::Response::into_inner)
    }

    /// Stages and publishes for one pod, as the kubelet does for a claim.
    pub fn mount(&self, volume: &Volume, pod: &str) -> Result<PathBuf, Status> {
        self.stage(volume)?;
        self.publish(volume, pod)
    }

    /// Unpublishes and unstages, as the kubelet does with the last pod.
    pub fn unmount(&self, volume: &Volume, pod: &str) {
        self.unpublish(volume, pod).unwrap();
        self.unstage(volume).unwrap();
    }

    /// The scratch layers and records that are on the disk.
    pub fn published_directories(&self) -> usize {
        fs::read_dir(self.data_dir().join("published")).map_or(0, Iterator::count)
    }

    /// The lines of the mount table that are this driver's.
    pub fn mounts(&self) -> Vec<String> {
        kernel::mounts_below(&self.directory)
    }

    /// The loop devices that carry this driver's mark.
    pub fn loop_devices(&self) -> Vec<String> {
        let devices = loop_device::list(&loop_device::Tag::new(&self.name)).unwrap();
        devices.iter().map(|attached| format!("loop{}", attached.device.number())).collect()
    }

    /// The device-mapper devices that carry this driver's mark.
    pub fn verified_devices(&self) -> usize {
        verified::list(&loop_device::Tag::new(&self.name)).unwrap().len()
    }

    /// Fails unless the kernel and the disk have nothing of this driver's: mounts, loop devices, connections, scratch layers.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), [""; 0], "mounts are left");
        let in_vm = std::env::var_os("NFS_SERVER").is_some();
        // The kernel closes a connection a moment after its last user went.
        wait_for("loop devices and connections to go", || {
            let has_devices = !self.loop_devices().is_empty() || self.verified_devices() != 0;
            !has_devices && (!in_vm || multipath::devices().is_empty() && kernel::nfs_connections() == 0)
        });
        assert_eq!(self.published_directories(), 0, "records or scratch layers are left");
        // Deleted in the background.
        let trash = self.data_dir().join("trash");
        wait_for("the trash to be emptied", || fs::read_dir(&trash).map_or(0, Iterator::count) == 0);
        let pods = fs::read_dir(self.directory.join("pods")).unwrap();
        for pod in pods {
            let pod = pod.unwrap().path();
            assert_eq!(fs::read_dir(&pod).unwrap().count(), 0, "a target is left in {}", pod.display());
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the driver's log\n{}\n---", self.log());
        }
        if let Some(mut process) = self.process.take() {
            // Best effort: the assertion that matters has been made.
            let _ = process.kill();
            let _ = process.wait();
        }
        kernel::unmount_below(&self.directory);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Waits up to 30 s for something that is on its way; a timing is never asserted, but a hang must end.
pub fn wait_for(what: &str, is_true: impl FnMut() -> bool) {
    wait_up_to(Duration::from_secs(30), what, is_true);
}

/// The same for what takes longer, such as a server's return.
pub fn wait_up_to(limit: Duration, what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < limit, "gave up waiting for {what}");
        sleep(Duration::from_millis(20));
    }
}

/// How often something is done: `quick` in `make test`, `full` in `make soak`.
pub fn soak(quick: usize, full: usize) -> usize {
    if std::env::var_os("SOAK").is_some() { full } else { quick }
}

/// Runs a command that must succeed, and returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn binary() -> PathBuf {
    match option_env!("CARGO_BIN_EXE_csi-driver-squashfs") {
        Some(built) if Path::new(built).exists() => built.into(),
        _ => BINARY.into(),
    }
}
