//! The command line: its subcommands, flags and environment variables.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::builder::Resettable;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use csi_driver_squashfs::csi::Endpoint;
use csi_driver_squashfs::kernel::selinux::Contexts;
use csi_driver_squashfs::spec::quantity;
use csi_driver_squashfs::volume::{Bounds, CacheConfig, PrefetchConfig};
use tracing_subscriber::filter::LevelFilter;

/// Read-only images from an NFS server as directories in pods: a CSI driver, and the same by hand.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub global: Global,
}

/// Ends the process where the arguments are none of this program's, as clap does. The environment of `enter` is its command's, which may mean
/// something else by LOG_LEVEL: write no flag before `enter`.
pub fn parse(arguments: Vec<OsString>) -> Cli {
    read(arguments).unwrap_or_else(|error| error.exit())
}

fn read(arguments: Vec<OsString>) -> Result<Cli, clap::Error> {
    let mut command = Cli::command();
    if arguments.get(1).is_some_and(|name| name == "enter") {
        command = command.mut_args(|argument| argument.env(Resettable::Reset));
    }
    Cli::from_arg_matches(&command.try_get_matches_from(arguments)?)
}

#[derive(Args)]
pub struct Global {
    /// The CSI driver's name; the data directory and the driver's marks on loop devices and mounts follow from it
    #[arg(long, global = true, env = "DRIVER_NAME", default_value = "squashfs.csi.dev", value_parser = driver_name)]
    pub driver_name: String,
    /// What to log: error, warn, info, debug, trace
    #[arg(long, global = true, env = "LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,
    #[arg(long, global = true, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// The flag of subcommands that read a spec.
#[derive(Args)]
pub struct PolicyFile {
    /// What users may mount (YAML) [default: any NFS server, nothing from the node]
    #[arg(long, env = "POLICY", value_name = "FILE")]
    pub policy: Option<PathBuf>,
}

/// The flag of subcommands that look at volumes.
#[derive(Args)]
pub struct DataDir {
    /// Where scratch layers and records live [default: /var/lib/kubelet/plugins/DRIVER_NAME]
    #[arg(long, env = "DATA_DIR", value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
}

impl Mounting {
    /// For what mounts nothing.
    pub fn nothing(data_dir: DataDir, timeout: Timeout) -> Self {
        Mounting {
            data_dir,
            timeout,
            host_root: "/".into(),
            nfs_read_ahead: None,
            zone: None,
            labels: Labels::default(),
        }
    }
}

impl DataDir {
    pub fn path(&self, driver_name: &str) -> PathBuf {
        let default = || Path::new("/var/lib/kubelet/plugins").join(driver_name);
        self.data_dir.clone().unwrap_or_else(default)
    }
}

/// The flags of subcommands that mount volumes.
#[derive(Args)]
pub struct Mounting {
    #[command(flatten)]
    pub data_dir: DataDir,
    /// Where the node's root directory is seen, for specs with base "root"
    #[arg(long, env = "HOST_ROOT", value_name = "DIRECTORY", default_value = "/")]
    pub host_root: PathBuf,
    /// How far the kernel reads ahead in files of NFS exports: an image is read in calls of up to this size, where the server
    /// takes them [default: the kernel's, 128]
    #[arg(long, env = "NFS_READ_AHEAD", value_name = "KIB", value_parser = clap::value_parser!(u32).range(4..=65536))]
    pub nfs_read_ahead: Option<u32>,
    /// The node's zone: of several servers of an image, those to which the policy gives the same one are asked first. None where it is empty
    #[arg(long, env = "ZONE")]
    pub zone: Option<String>,
    #[command(flatten)]
    pub labels: Labels,
    #[command(flatten)]
    pub timeout: Timeout,
}

/// What files are labelled with on a node with SELinux.
#[derive(Args, Default)]
pub struct Labels {
    /// The label of images where SELinux is on, which all containers may read. Empty: images have their own
    #[arg(
        long,
        env = "SELINUX_IMAGE_CONTEXT",
        value_name = "CONTEXT",
        default_value = "system_u:object_r:container_ro_file_t:s0"
    )]
    selinux_image_context: String,
    /// The label of overlays where SELinux is on, which all containers may write to. Empty: files have those of their layers
    #[arg(
        long,
        env = "SELINUX_OVERLAY_CONTEXT",
        value_name = "CONTEXT",
        default_value = "system_u:object_r:container_file_t:s0"
    )]
    selinux_overlay_context: String,
}

impl Labels {
    pub fn contexts(self) -> Contexts {
        Contexts { images: self.selinux_image_context, overlays: self.selinux_overlay_context }
    }
}

/// The flag of subcommands that look at the copies of images.
#[derive(Args)]
pub struct CacheDir {
    /// Where copies of images are kept: on a disk of the node [default: the directory "cache" of the data directory]
    #[arg(long, env = "CACHE_DIR", value_name = "DIRECTORY")]
    cache_dir: Option<PathBuf>,
}

impl CacheDir {
    pub fn path(&self, data_dir: &Path) -> PathBuf {
        self.cache_dir.clone().unwrap_or_else(|| data_dir.join("cache"))
    }
}

/// The flags of subcommands that copy images to the node.
#[derive(Args)]
pub struct Copying {
    #[command(flatten)]
    pub directory: CacheDir,
    /// How much of the disk copies of images may take, such as 20Gi [default: no image is copied]
    #[arg(long, env = "CACHE_QUOTA", value_name = "QUANTITY", value_parser = quantity::bytes)]
    cache_quota: Option<u64>,
    /// How much of the disk they leave free
    #[arg(long, env = "CACHE_MIN_FREE", value_name = "QUANTITY", default_value = "1Gi", value_parser = quantity::bytes)]
    cache_min_free: u64,
    /// The most bytes that one copy reads in a second, such as 100Mi [default: as fast as it goes]
    #[arg(long, env = "CACHE_RATE", value_name = "QUANTITY", value_parser = quantity::bytes)]
    cache_rate: Option<u64>,
    /// How many images are copied at a time
    #[arg(long, env = "CACHE_COPIES", value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cache_copies: u32,
    /// Copy also the images of volumes that do not say whether
    #[arg(long, env = "CACHE_BY_DEFAULT")]
    cache_by_default: bool,
}

impl Copying {
    /// `None` where nothing is to be copied.
    pub fn config(&self, data_dir: &Path) -> Option<CacheConfig> {
        Some(CacheConfig {
            directory: self.directory.path(data_dir),
            bounds: Bounds { quota: self.cache_quota?, min_free: self.cache_min_free },
            rate: self.cache_rate,
            copies: self.cache_copies as usize,
            by_default: self.cache_by_default,
        })
    }
}

/// The flags of what reads images ahead.
#[derive(Args)]
pub struct Prefetching {
    /// How much of images is read into memory ahead of their readers, all together, such as 256Mi: of the memory that the driver's
    /// container may have [default: nothing]
    #[arg(long, env = "PREFETCH_BUDGET", value_name = "QUANTITY", value_parser = quantity::bytes)]
    prefetch_budget: Option<u64>,
    /// The most bytes of one image that are read ahead in a second, such as 100Mi [default: as fast as it goes]
    #[arg(long, env = "PREFETCH_RATE", value_name = "QUANTITY", value_parser = quantity::bytes)]
    prefetch_rate: Option<u64>,
}

impl Prefetching {
    pub fn config(&self) -> PrefetchConfig {
        PrefetchConfig { budget: self.prefetch_budget.unwrap_or_default(), rate: self.prefetch_rate }
    }
}

#[derive(Subcommand)]
pub enum CacheCommand {
    /// Print the copies, the one that was used last at the end
    List {
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        directory: CacheDir,
        #[command(flatten)]
        data_dir: DataDir,
    },
    /// Copy the images of specs to this node, and wait for it
    Warm {
        /// Files with a JSON mount spec, or - for standard input
        #[arg(required = true)]
        specs: Vec<PathBuf>,
        #[command(flatten)]
        copying: Copying,
        #[command(flatten)]
        mounting: Mounting,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Remove the copies of images that no volume uses
    Evict {
        /// Parts of the images' names, as `cache list` prints them
        #[arg(required = true)]
        images: Vec<String>,
        #[command(flatten)]
        directory: CacheDir,
        #[command(flatten)]
        data_dir: DataDir,
    },
    /// Read all copies from the disk, and throw those away that it did not keep as they were
    Verify {
        #[command(flatten)]
        directory: CacheDir,
        #[command(flatten)]
        data_dir: DataDir,
    },
}

#[derive(Subcommand)]
pub enum ProfileCommand {
    /// What the pods of this node have read of an image
    Learned {
        /// Its path on the server, or a part of its name that no other image has
        image: String,
        #[command(flatten)]
        data_dir: DataDir,
    },
    /// What of an image file is in the page cache of this machine now
    Cached {
        /// The image file
        image: PathBuf,
    },
    /// The files below a directory as `mksquashfs -sort` takes them: first those that are in the page cache of this machine now
    Files {
        /// Where an image is mounted, or what one is made of
        directory: PathBuf,
    },
}

/// The flag of subcommands that wait for the kernel.
#[derive(Args)]
pub struct Timeout {
    /// How many seconds a call may take before it is answered
    #[arg(long = "timeout", env = "TIMEOUT", value_name = "SECONDS", default_value_t = 90)]
    pub seconds: u64,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
pub enum Command {
    /// Serve the CSI node service, on every node
    // A chart's further arguments may replace its own.
    #[command(args_override_self = true)]
    Node(NodeArguments),
    /// Serve the CSI controller service, once in a cluster
    #[command(args_override_self = true)]
    Controller {
        #[command(flatten)]
        serve: Serve,
        /// The Job that makes an image where a claim names a source (YAML), but for its name and what is to be made [default: none are
        /// made]
        #[arg(long, env = "BUILD_JOB", value_name = "FILE")]
        build_job: Option<PathBuf>,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Mount a spec by hand
    Mount {
        /// A file with the JSON mount spec, or - for standard input
        spec: PathBuf,
        /// The directory to mount at; it is made if it is not there
        target: PathBuf,
        /// Without the writable layer
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        mounting: Mounting,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Unmount what `mount` mounted
    Unmount {
        /// The directory that was mounted at; it is removed
        target: PathBuf,
        #[command(flatten)]
        data_dir: DataDir,
        #[command(flatten)]
        timeout: Timeout,
    },
    /// Print the steps that mounting a spec would take
    Plan {
        /// A file with the JSON mount spec, or - for standard input
        spec: PathBuf,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Look whether this node can do what the driver needs, and say what to do where it cannot
    Doctor {
        /// NFS servers to ask, besides those that the policy names
        servers: Vec<String>,
        /// Where the kubelet keeps its pods
        #[arg(long, env = "KUBELET_DIR", value_name = "DIRECTORY", default_value = "/var/lib/kubelet")]
        kubelet_dir: PathBuf,
        #[command(flatten)]
        data_dir: DataDir,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Print the Kubernetes objects that do what a container of the Kraken ImageAPI does
    Convert {
        /// A file with the JSON of the container, or - for standard input
        container: PathBuf,
        /// The namespace of the pod and its claim
        #[arg(long, default_value = "default")]
        namespace: String,
        /// The driver's own container image: it makes the volume the command's root, by `enter`
        #[arg(long, default_value = concat!("ghcr.io/csi-driver-squashfs/csi-driver-squashfs:", env!("CARGO_PKG_VERSION")))]
        container_image: String,
        #[command(flatten)]
        policy: PolicyFile,
    },
    /// Run a command with a directory as its root, and what this container has around it: /proc, /dev, the pod's volumes and names
    Enter {
        /// For systemd: give it control groups of its own to write to, and tell it that it is in a container
        #[arg(long)]
        systemd: bool,
        /// Leave the command the capability SYS_ADMIN, which it takes to mount all this
        #[arg(long)]
        keep_sys_admin: bool,
        /// The directory: a volume with a root file system
        directory: PathBuf,
        /// The command, which replaces this process, and its arguments
        #[arg(required = true, last = true)]
        command: Vec<OsString>,
    },
    /// Print the volumes of this node, down to loop device, image and export
    Status {
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        cache_dir: CacheDir,
        #[command(flatten)]
        data_dir: DataDir,
    },
    /// Write the writable layer of a volume to standard output, as a tar that is a layer of a container image
    Commit {
        /// Where the volume is published, as `status` prints it
        target: PathBuf,
        #[command(flatten)]
        data_dir: DataDir,
    },
    /// Let this node's NFS mounts of a server that has moved, whoever made them, go on at its new address: pods that wait for it read on
    Move {
        /// The address that the server had
        old: IpAddr,
        /// Its address now, or a name that has it: the same file systems must be there
        new: String,
    },
    /// Append a hash tree to an image, by which the kernel can verify each block, and print its root hash
    Seal {
        /// The image, which nobody may use meanwhile
        image: PathBuf,
    },
    /// Read an image and its hash tree, and print the root hash where they fit
    Verify {
        /// The image
        image: PathBuf,
    },
    /// Print what of an image is read first: IMAGE.profile beside it is where nodes begin that have not used it
    #[command(subcommand)]
    Profile(ProfileCommand),
    /// See to the copies of images on this node
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Look at a whole cluster, by its API server: what `kubectl squashfs` does, where this program is there as kubectl-squashfs
    #[command(subcommand)]
    Cluster(ClusterCommand),
}

/// The flag of subcommands that ask one cluster.
#[derive(Args)]
pub struct Context {
    /// The cluster, as a context of the KUBECONFIG [default: the current one, or that of the pod]
    #[arg(long)]
    pub context: Option<String>,
}

/// The flags of subcommands that look into a directory of an export.
#[derive(Args)]
pub struct Share {
    /// What nodes call the directory: its path on the server [default: as the mount table of this machine says]
    #[arg(long, value_name = "PATH")]
    pub share: Option<String>,
    /// All clusters that have images of it, as contexts of the KUBECONFIG [default: the current one, or that of the pod]
    #[arg(long = "context", value_name = "CONTEXT")]
    pub contexts: Vec<String>,
}

#[derive(Subcommand)]
pub enum ClusterCommand {
    /// Print the images that volumes name; or those in a directory, and who names each
    Images {
        /// The directory of an export, mounted on this machine
        directory: Option<PathBuf>,
        #[command(flatten)]
        share: Share,
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Print the volumes, with their claims, images and pods
    Volumes {
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        context: Context,
    },
    /// Print the nodes, and what they have of the driver
    Nodes {
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        context: Context,
    },
    /// Print which images in a directory nobody names and nobody has used for a while, and delete them if told so
    Gc {
        /// The directory of an export, mounted on this machine
        directory: PathBuf,
        /// Delete them
        #[arg(long)]
        delete: bool,
        /// How long an image is kept after it was read or changed last, whether somebody names it or not
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        grace: u32,
        #[command(flatten)]
        share: Share,
    },
    /// Look whether all nodes have the driver, and what of the cluster's objects it cannot use
    Doctor {
        #[command(flatten)]
        context: Context,
    },
}

#[derive(Args)]
pub struct NodeArguments {
    #[command(flatten)]
    pub serve: Serve,
    /// This node's name in the cluster
    #[arg(long, env = "NODE_ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub node_id: String,
    /// Serve the controller service too
    #[arg(long, env = "CONTROLLER")]
    pub controller: bool,
    /// The kubelet's directory of plugin sockets, by one of which the driver registers itself; the kubelet must know the
    /// endpoint by the same path [default: something else registers it]
    #[arg(long, env = "PLUGIN_REGISTRY", value_name = "DIRECTORY")]
    pub plugin_registry: Option<PathBuf>,
    #[command(flatten)]
    pub mounting: Mounting,
    #[command(flatten)]
    pub copying: Copying,
    #[command(flatten)]
    pub prefetching: Prefetching,
    #[command(flatten)]
    pub policy: PolicyFile,
}

#[derive(Args)]
pub struct Serve {
    /// The Unix socket to serve
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    pub endpoint: Endpoint,
    /// Where to serve /healthz and /readyz, such as 127.0.0.1:29660 [default: nowhere]
    #[arg(long, env = "HEALTH_ADDRESS", value_name = "ADDRESS:PORT")]
    pub health_address: Option<SocketAddr>,
    /// Where to serve /metrics, such as 127.0.0.1:29661 [default: nowhere]
    #[arg(long, env = "METRICS_ADDRESS", value_name = "ADDRESS:PORT")]
    pub metrics_address: Option<SocketAddr>,
}

/// The rules of the CSI spec for a plugin's name (GetPluginInfo): a domain name of at most 63 characters.
fn driver_name(name: &str) -> Result<String, String> {
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let inside = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    let bytes = name.as_bytes();
    if bytes.len() <= 63 && end(bytes.first()) && end(bytes.last()) && bytes.iter().all(inside) {
        return Ok(name.to_owned());
    }
    Err("a driver name is a domain name of at most 63 letters, digits, '-' and '.'".into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Two fields of one name in structs that are flattened into one subcommand would be one flag's value for both: clap says so in debug
    /// builds alone.
    #[test]
    fn the_flags_of_a_subcommand_are_fields_of_different_names() {
        fn look_at(command: &clap::Command) {
            let fields: Vec<_> = command.get_arguments().map(clap::Arg::get_id).collect();
            let different: BTreeSet<_> = fields.iter().collect();
            assert_eq!(different.len(), fields.len(), "{}: {fields:?}", command.get_name());
            command.get_subcommands().for_each(look_at);
        }
        look_at(&Cli::command());
    }

    #[test]
    fn copies_and_what_is_read_ahead_have_each_their_own_rate() {
        let of = |flags: &[&str]| {
            let flags = ["csi-driver-squashfs", "node", "--node-id=n"].iter().chain(flags).copied();
            let Command::Node(arguments) = Cli::try_parse_from(flags).unwrap().command else { panic!("not the node") };
            let copies = arguments.copying.config(Path::new("/data")).unwrap();
            (copies.rate, arguments.prefetching.config().rate)
        };
        assert_eq!(of(&["--cache-quota=1Gi", "--cache-rate=1", "--prefetch-rate=2"]), (Some(1), Some(2)));
        assert_eq!(of(&["--cache-quota=1Gi", "--prefetch-rate=2"]), (None, Some(2)));
        assert_eq!(of(&["--cache-quota=1Gi", "--cache-rate=1"]), (Some(1), None));
    }
}
