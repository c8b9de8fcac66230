//! The command line: one function for each subcommand.

use std::fs;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use csi_driver_squashfs::csi::{Controller, Endpoint, Identity, Node, serve};
use csi_driver_squashfs::spec::policy::Policy;
use csi_driver_squashfs::spec::{self, Mount};
use csi_driver_squashfs::volume::{self, Config, Publication, Volumes, status};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Read-only images from an NFS server as directories in pods: a CSI driver, and the same by hand.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

#[derive(Args)]
struct Global {
    /// The CSI driver's name; the data directory and the driver's marks on loop devices and mounts follow from it
    #[arg(long, global = true, env = "DRIVER_NAME", default_value = "squashfs.csi.dev", value_parser = driver_name)]
    driver_name: String,
    /// Where scratch layers and records live [default: /var/lib/kubelet/plugins/DRIVER_NAME]
    #[arg(long, global = true, env = "DATA_DIR", value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
    /// Where the node's root directory is seen, for specs with base "root"
    #[arg(long, global = true, env = "HOST_ROOT", value_name = "DIRECTORY", default_value = "/")]
    host_root: PathBuf,
    /// What users may mount (YAML) [default: any NFS server, nothing from the node]
    #[arg(long, global = true, env = "POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
    /// How many seconds a call may take before it is answered; its work goes on
    #[arg(long, global = true, env = "TIMEOUT", value_name = "SECONDS", default_value_t = 90)]
    timeout: u64,
    /// What to log: error, warn, info, debug, trace
    #[arg(long, global = true, env = "LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
    #[arg(long, global = true, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the CSI node service, on every node
    Node {
        #[command(flatten)]
        serve: Serve,
        /// This node's name in the cluster
        #[arg(long, env = "NODE_ID", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        node_id: String,
        /// Serve the controller service too
        #[arg(long, env = "CONTROLLER")]
        controller: bool,
    },
    /// Serve the CSI controller service, once in a cluster
    Controller {
        #[command(flatten)]
        serve: Serve,
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
    },
    /// Unmount what `mount` mounted
    Unmount {
        /// The directory that was mounted at; it is removed
        target: PathBuf,
    },
    /// Print the steps that mounting a spec would take
    Plan {
        /// A file with the JSON mount spec, or - for standard input
        spec: PathBuf,
    },
    /// Print the volumes of this node, down to loop device, image and export
    Status {
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

#[derive(Args)]
struct Serve {
    /// The Unix socket to serve
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: Endpoint,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(&cli.global);
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("csi-driver-squashfs: {error}");
            ExitCode::FAILURE
        }
    }
}

/// One thread serves all calls: whatever waits for the kernel has a thread of its own.
#[tokio::main(flavor = "current_thread")]
async fn run(cli: Cli) -> Outcome {
    let global = cli.global;
    match cli.command {
        Command::Node { serve, node_id, controller } => node(global, serve, node_id, controller).await,
        Command::Controller { serve } => controller(global, serve).await,
        Command::Mount { spec, target, read_only } => mount(global, &spec, &target, read_only).await,
        Command::Unmount { target } => unmount(global, &target).await,
        Command::Plan { spec } => plan(&global, &spec),
        Command::Status { output } => show_status(&global, output),
    }
}

async fn node(global: Global, arguments: Serve, node_id: String, controller: bool) -> Outcome {
    let policy = policy(&global)?;
    let identity = Identity { driver_name: global.driver_name.clone(), controller, node: true };
    let controller = controller.then(|| Controller::new(policy.clone()));
    raise_file_limit();
    for missing in volume::missing().await? {
        tracing::warn!("this node lacks: {missing}");
    }
    let volumes = volumes(global)?;
    volumes.sweep();
    let node = Node { node_id, policy, volumes };
    Ok(serve(&arguments.endpoint, identity, controller, Some(node), stop()?).await?)
}

async fn controller(global: Global, arguments: Serve) -> Outcome {
    let controller = Controller::new(policy(&global)?);
    let identity = Identity { driver_name: global.driver_name, controller: true, node: false };
    Ok(serve(&arguments.endpoint, identity, Some(controller), None, stop()?).await?)
}

async fn mount(global: Global, spec: &Path, target: &Path, read_only: bool) -> Outcome {
    let mount = read_spec(&global, spec)?;
    let target = std::path::absolute(target)?;
    let publication = Publication { volume_id: by_hand(&target), target, mount, read_only, exclusive: false };
    Ok(volumes(global)?.publish(publication, false).await?)
}

async fn unmount(global: Global, target: &Path) -> Outcome {
    let target = std::path::absolute(target)?;
    Ok(volumes(global)?.unpublish(&by_hand(&target), &target).await?)
}

fn plan(global: &Global, spec: &Path) -> Outcome {
    for (step, line) in spec::plan::plan(&read_spec(global, spec)?).iter().enumerate() {
        println!("{}. {line}", step + 1);
    }
    Ok(())
}

fn show_status(global: &Global, output: Output) -> Outcome {
    let status = status::read(&global.driver_name, &data_dir(global))?;
    match output {
        Output::Text => print!("{status}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(())
}

fn volumes(global: Global) -> Result<Arc<Volumes>, Box<dyn std::error::Error>> {
    Ok(Volumes::new(config(global))?)
}

fn config(global: Global) -> Config {
    Config {
        data_dir: data_dir(&global),
        driver_name: global.driver_name,
        host_root: global.host_root,
        timeout: Duration::from_secs(global.timeout),
    }
}

fn data_dir(global: &Global) -> PathBuf {
    let default = || Path::new("/var/lib/kubelet/plugins").join(&global.driver_name);
    global.data_dir.clone().unwrap_or_else(default)
}

/// The volume ID of what was mounted without Kubernetes.
fn by_hand(target: &Path) -> String {
    format!("by hand: {}", target.display())
}

fn read_spec(global: &Global, file: &Path) -> Result<Mount, Box<dyn std::error::Error>> {
    let mut text = String::new();
    let named = |error: io::Error| format!("read {}: {error}", file.display());
    if file == Path::new("-") {
        io::stdin().read_to_string(&mut text).map_err(named)?;
    } else {
        text = fs::read_to_string(file).map_err(named)?;
    }
    let parsed = spec::json::parse(&text)?;
    for warning in &parsed.warnings {
        eprintln!("csi-driver-squashfs: warning: {warning}");
    }
    parsed.check(&policy(global)?)?;
    Ok(parsed.mount)
}

fn policy(global: &Global) -> Result<Policy, Box<dyn std::error::Error>> {
    let Some(file) = &global.policy else { return Ok(Policy::default()) };
    let text = fs::read_to_string(file).map_err(|error| format!("read policy {}: {error}", file.display()))?;
    Ok(Policy::parse(&text)?)
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

/// The level is the driver's own; of its libraries only warnings are of interest.
fn start_log(global: &Global) {
    let levels = Targets::new().with_default(LevelFilter::WARN).with_target("csi_driver_squashfs", global.log_level);
    let log = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false);
    let log = match global.log_format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => log.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(log.with_filter(levels)).init();
}

/// Each staged image is an open file.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("raise the limit of open files: {error}");
    }
}

/// Ready when the process is asked to end, by Kubernetes or at a terminal.
fn stop() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
