//! A node for unit tests: volumes over a double of the kernel, and an NFS server that answers a NULL call and nothing else.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::publication::Publication;
use super::{Bounds, CacheConfig, Config, PrefetchConfig, Volumes};
use crate::error::Result;
use crate::kernel::double::Double;
use crate::lock::lock;
use crate::spec::policy::Policy;
use crate::spec::{Allowed, json};

pub struct Node {
    pub kernel: Arc<Double>,
    pub volumes: Arc<Volumes>,
    /// Of the NFS server on loopback.
    pub port: u16,
    pub timeout: Duration,
    /// For the next process.
    pub prefetch: PrefetchConfig,
    directory: tempfile::TempDir,
    policy: Arc<Policy>,
    server: tokio::task::AbortHandle,
}

impl Node {
    /// With one image of 4096 bytes at `image.sqsh` of every export.
    pub async fn new() -> Self {
        Node::with("{}", Duration::from_secs(60)).await
    }

    pub async fn with(policy: &str, timeout: Duration) -> Self {
        let (kernel, directory) = (Double::new(), tempfile::tempdir().unwrap());
        std::fs::write(kernel.export().join("image.sqsh"), squashfs(4096)).unwrap();
        std::fs::create_dir_all(directory.path().join("host/srv/tools")).unwrap();
        std::fs::write(directory.path().join("host/srv/image.sqsh"), squashfs(4096)).unwrap();
        let listener = TcpListener::bind(("0.0.0.0", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(answer_null_calls(listener)).abort_handle();
        let policy = Arc::new(Policy::parse(policy).unwrap());
        let prefetch = PrefetchConfig::default();
        let volumes = start(&kernel, directory.path(), &policy, timeout, prefetch);
        Node { kernel, volumes, port, timeout, prefetch, directory, policy, server }
    }

    /// From now on the NFS server refuses all connections.
    pub async fn stop_server(&self) {
        self.server.abort();
        while tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// A new process in the place of the one that was killed.
    pub fn restart(&mut self) {
        self.volumes = start(&self.kernel, self.directory.path(), &self.policy, self.timeout, self.prefetch);
    }

    /// A new process with another policy.
    pub fn policy(&mut self, policy: &str) {
        self.policy = Arc::new(Policy::parse(policy).unwrap());
        self.restart();
    }

    /// The JSON of an image on the server, with further fields of `attach`.
    pub fn image(&self, fields: &str) -> String {
        format!(
            r#"{{"kind":"attach","attach":{{"fs_type":"squashfs"{fields},"attach":{{"kind":"loopback","loopback":
            {{"path":"image.sqsh","base":"mount","mount":{}}}}}}}}}"#,
            self.nfs("/images")
        )
    }

    /// Where the node's root directory is seen, with an image of 4096 bytes at `srv/image.sqsh`.
    pub fn host_root(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    /// The JSON of that image, with further fields of `loopback`.
    pub fn image_of_the_node(&self, fields: &str) -> String {
        format!(
            r#"{{"kind":"attach","attach":{{"fs_type":"squashfs","attach":{{"kind":"loopback","loopback":
            {{"path":"srv/image.sqsh","base":"root"{fields}}}}}}}}}"#
        )
    }

    /// The same of another type.
    pub fn image_of_type(&self, fs_type: &str) -> String {
        self.image("").replace("squashfs", fs_type)
    }

    /// The JSON of an export of the server.
    pub fn nfs(&self, path: &str) -> String {
        self.nfs_at("127.0.0.1", path)
    }

    /// The same at another of its addresses, which are all of 127.0.0.0/8.
    pub fn nfs_at(&self, host: &str, path: &str) -> String {
        let port = self.port;
        format!(r#"{{"kind":"nfs","nfs":{{"host":"{host}","path":"{path}","ro":true,"options":["port={port}"]}}}}"#)
    }

    /// The JSON of an overlay on that image.
    pub fn overlay(&self, upper: &str) -> String {
        format!(r#"{{"kind":"overlay","overlay":{{"upper":{upper},"lower":[{}]}}}}"#, self.image(""))
    }

    pub fn allowed(&self, spec: &str) -> Allowed {
        self.volumes.allow(json::parse(spec).unwrap(), None).unwrap()
    }

    /// The target path of a pod, whose directory is there.
    pub fn target(&self, pod: &str) -> PathBuf {
        let directory = self.directory.path().join("pods").join(pod);
        std::fs::create_dir_all(&directory).unwrap();
        directory.join("mount")
    }

    /// Where copies of images are kept.
    pub fn cache_dir(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn publication(&self, volume_id: &str, spec: &str, pod: &str) -> Publication {
        let (mount, target) = (self.allowed(spec), self.target(pod));
        Publication { volume_id: volume_id.into(), ..Publication::by_hand(target, mount, false) }
    }

    pub async fn publish(&self, volume_id: &str, spec: &str, pod: &str) -> Result<PathBuf> {
        let publication = self.publication(volume_id, spec, pod);
        let target = publication.target.clone();
        self.volumes.publish(publication, true).await.map(|()| target)
    }

    /// What was asked of the kernel since this was last asked, without what differs from run to run.
    pub fn log(&self) -> Vec<String> {
        let (directory, port) = (format!("{}/", self.directory.path().display()), format!("={}", self.port));
        let line = |line: String| {
            let line = line.replace(&directory, "").replace(&port, "=PORT");
            // Numbers that all tests of the process share.
            let mut words: Vec<String> = Vec::new();
            for word in line.split('/') {
                let (name, number) = word.split_once('-').unwrap_or((word, ""));
                let numbered = matches!(name, "nfs" | "build") && number.bytes().all(|byte| byte.is_ascii_digit());
                words.push(if numbered && !number.is_empty() { format!("{name}-N") } else { word.to_owned() });
            }
            words.join("/")
        };
        self.kernel.log().into_iter().map(line).collect()
    }

    /// Waits until so many calls that begin with this were made since the log was last asked.
    pub async fn wait_for_calls(&self, of: &str, count: usize) {
        let seen = Mutex::new(0);
        let all_are_there = || {
            let mut seen = lock(&seen);
            *seen += self.log().iter().filter(|call| call.starts_with(of)).count();
            *seen >= count
        };
        wait_for(all_are_there, || format!("{} of {count} calls: {of}", lock(&seen))).await;
    }

    /// The directories of published paths on the disk.
    pub fn records(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.data_dir().join("published")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Fails unless all loop devices and NFS mounts go, which threads of their own let go of.
    pub async fn assert_nothing_held(&self) {
        let left = || (self.kernel.live_loop_devices(), self.kernel.left_in_namespace());
        wait_for(|| left() == (Vec::new(), Vec::new()), || format!("these are still held: {:?}", left())).await;
    }
}

/// Waits up to 30 s for something that other threads do; a timing is never asserted, but a hang must end.
pub async fn wait_for(is_true: impl Fn() -> bool, what: impl Fn() -> String) {
    for _ in 0..30_000 {
        if is_true() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{}", what());
}

/// An image as far as anybody looks at it before the kernel does.
pub fn squashfs(size: usize) -> Vec<u8> {
    let mut image = vec![0; size];
    image[..4].copy_from_slice(b"hsqs");
    image[28] = 4;
    image[40..48].copy_from_slice(&(size as u64).to_le_bytes());
    image
}

fn start(
    kernel: &Arc<Double>,
    directory: &Path,
    policy: &Arc<Policy>,
    timeout: Duration,
    prefetch: PrefetchConfig,
) -> Arc<Volumes> {
    let config = Config {
        driver_name: "test.csi.dev".into(),
        data_dir: directory.join("data"),
        host_root: directory.join("host"),
        nfs_read_ahead: None,
        zone: None,
        cache: Some(CacheConfig {
            directory: directory.join("cache"),
            bounds: Bounds { quota: 1 << 20, min_free: 1 },
            rate: None,
            copies: 1,
            by_default: false,
        }),
        prefetch,
        policy: Arc::clone(policy),
        timeout,
    };
    Volumes::new(config, Arc::clone(kernel) as _).unwrap()
}

pub async fn answer_null_calls(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut call = [0; 44];
            stream.read_exact(&mut call).await?;
            // The fragment's length, the call's number, and that it is a reply.
            stream.write_all(&[&[0x80, 0, 0, 8], &call[4..8], &[0, 0, 0, 1]].concat()).await
        });
    }
}
