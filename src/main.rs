//! One function for each subcommand.

mod cli;

use std::fs;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use csi_driver_squashfs::csi::{self, Controller, Identity, Node};
use csi_driver_squashfs::kubernetes::convert::{self, Surroundings};
use csi_driver_squashfs::kubernetes::registration::{self, Registered};
use csi_driver_squashfs::ops::doctor::{self, Patient, Verdict};
use csi_driver_squashfs::ops::{self, Watched};
use csi_driver_squashfs::spec::policy::Policy;
use csi_driver_squashfs::spec::{self, Mount};
use csi_driver_squashfs::volume::{self, Config, Publication, Volumes, status};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use cli::{Cli, Command, Global, LogFormat, NodeArguments, Output, Serve};

type Outcome = Result<(), Box<dyn std::error::Error>>;

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
        Command::Node(arguments) => node(global, arguments).await,
        Command::Controller { serve } => controller(global, serve).await,
        Command::Mount { spec, target, read_only } => mount(global, &spec, &target, read_only).await,
        Command::Unmount { target } => unmount(global, &target).await,
        Command::Plan { spec } => plan(&global, &spec),
        Command::Doctor { servers, kubelet_dir } => doctor(&global, servers, kubelet_dir).await,
        Command::Convert { container, namespace, container_image } => {
            convert(&global, &container, &namespace, &container_image)
        }
        Command::Status { output } => show_status(&global, output),
    }
}

async fn node(global: Global, arguments: NodeArguments) -> Outcome {
    let NodeArguments { serve: Serve { endpoint, http_address }, node_id, controller, plugin_registry } = arguments;
    let policy = policy(&global)?;
    let driver_name = global.driver_name.clone();
    let identity = Identity { driver_name: driver_name.clone(), controller, node: true };
    let controller = controller.then(|| Controller::new(policy.clone(), &driver_name));
    raise_file_limit();
    for missing in volume::missing().await? {
        tracing::warn!("this node lacks: {missing}");
    }
    let volumes = volumes(global)?;
    volumes.sweep();
    let node = Node { node_id, policy, volumes: Arc::clone(&volumes) };
    let stop = stop()?;
    let registered = watch::Sender::new(Registered::NotYet);
    let known = plugin_registry.is_some().then(|| registered.subscribe());
    let watched = Watched::new(endpoint.path().to_owned(), Some(volumes), known);
    let register = async {
        match &plugin_registry {
            Some(registry) => {
                registration::serve(registry, &driver_name, endpoint.path(), registered, stopped(&stop)).await
            }
            None => Ok(()),
        }
    };
    tokio::try_join!(
        csi::serve(&endpoint, identity, controller, Some(node), stopped(&stop)),
        register,
        watch_over(http_address, watched, stopped(&stop)),
    )?;
    Ok(())
}

async fn controller(global: Global, arguments: Serve) -> Outcome {
    let controller = Controller::new(policy(&global)?, &global.driver_name);
    let identity = Identity { driver_name: global.driver_name, controller: true, node: false };
    let stop = stop()?;
    let watched = Watched::new(arguments.endpoint.path().to_owned(), None, None);
    tokio::try_join!(
        csi::serve(&arguments.endpoint, identity, Some(controller), None, stopped(&stop)),
        watch_over(arguments.http_address, watched, stopped(&stop)),
    )?;
    Ok(())
}

async fn watch_over(
    address: Option<SocketAddr>,
    watched: Watched,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    match address {
        Some(address) => ops::serve(address, watched, stop).await,
        None => Ok(()),
    }
}

async fn mount(global: Global, spec: &Path, target: &Path, read_only: bool) -> Outcome {
    let mount = read_spec(&global, spec)?;
    let target = std::path::absolute(target)?;
    let volumes = volumes(global)?;
    let mounted = volumes.publish(Publication::by_hand(target, mount, read_only), false).await;
    volumes.finish_deletions();
    Ok(mounted?)
}

async fn unmount(global: Global, target: &Path) -> Outcome {
    let target = std::path::absolute(target)?;
    let volumes = volumes(global)?;
    let unmounted = volumes.unpublish(&volume::by_hand(&target), &target).await;
    volumes.finish_deletions();
    Ok(unmounted?)
}

fn plan(global: &Global, spec: &Path) -> Outcome {
    for (step, line) in spec::plan::plan(&read_spec(global, spec)?).iter().enumerate() {
        println!("{}. {line}", step + 1);
    }
    Ok(())
}

async fn doctor(global: &Global, servers: Vec<String>, kubelet_dir: PathBuf) -> Outcome {
    let patient = Patient { data_dir: global.data_dir(), kubelet_dir, policy: policy(global)?, servers };
    let findings = doctor::examine(&patient).await;
    for finding in &findings {
        println!("{finding}");
    }
    match findings.iter().any(|finding| matches!(finding.verdict, Verdict::Bad(_))) {
        true => Err("no volume can be mounted here before what failed is mended".into()),
        false => Ok(()),
    }
}

fn convert(global: &Global, file: &Path, namespace: &str, container_image: &str) -> Outcome {
    let surroundings = Surroundings { driver_name: &global.driver_name, namespace, container_image };
    let converted = convert::convert(&read(file)?, &policy(global)?, &surroundings)?;
    warn(&converted.notes);
    print!("{}", converted.documents);
    Ok(())
}

fn show_status(global: &Global, output: Output) -> Outcome {
    let status = status::read(&global.driver_name, &global.data_dir())?;
    match output {
        Output::Text => print!("{status}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(())
}

fn volumes(global: Global) -> Result<Arc<Volumes>, Box<dyn std::error::Error>> {
    Ok(Volumes::new(config(global)?)?)
}

fn config(global: Global) -> Result<Config, Box<dyn std::error::Error>> {
    Ok(Config {
        policy: policy(&global)?,
        data_dir: global.data_dir(),
        driver_name: global.driver_name,
        host_root: global.host_root,
        nfs_read_ahead: global.nfs_read_ahead,
        timeout: Duration::from_secs(global.timeout),
    })
}

fn read_spec(global: &Global, file: &Path) -> Result<Mount, Box<dyn std::error::Error>> {
    let parsed = spec::json::parse(&read(file)?)?;
    warn(&parsed.warnings);
    parsed.check(&policy(global)?)?;
    Ok(parsed.mount)
}

/// A file, or standard input by the name `-`.
fn read(file: &Path) -> Result<String, String> {
    let text = if file == Path::new("-") { io::read_to_string(io::stdin()) } else { fs::read_to_string(file) };
    text.map_err(|error| format!("read {}: {error}", file.display()))
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("csi-driver-squashfs: warning: {warning}");
    }
}

fn policy(global: &Global) -> Result<Policy, Box<dyn std::error::Error>> {
    let Some(file) = &global.policy else { return Ok(Policy::default()) };
    Ok(Policy::parse(&read(file)?)?)
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

/// Each staged image is a few open files.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("raise the limit of open files: {error}");
    }
}

/// Becomes true when the process is asked to end, by Kubernetes or at a terminal.
fn stop() -> io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        sender.send_replace(true);
    });
    Ok(receiver)
}

fn stopped(stop: &watch::Receiver<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stop = stop.clone();
    // Where the sender is gone there is no more to wait for either.
    async move { drop(stop.wait_for(|stop| *stop).await) }
}
