//! One function for each subcommand.

mod cli;
mod plugin;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use csi_driver_squashfs::csi::{self, Controller, Identity, Node};
use csi_driver_squashfs::enter::{self, Entered};
use csi_driver_squashfs::kernel::{Linux, verity};
use csi_driver_squashfs::kubernetes::Cluster;
use csi_driver_squashfs::kubernetes::build::JobTemplate;
use csi_driver_squashfs::kubernetes::convert::{self, Surroundings};
use csi_driver_squashfs::kubernetes::registration::{self, Registered};
use csi_driver_squashfs::ops::doctor::{self, Examined, Verdict};
use csi_driver_squashfs::ops::{self, Served, Watched, moved};
use csi_driver_squashfs::spec::policy::Policy;
use csi_driver_squashfs::spec::{self, Parsed};
use csi_driver_squashfs::volume::copies::{self, Verified};
use csi_driver_squashfs::volume::{
    self, CacheConfig, Config, PrefetchConfig, Publication, Volumes, commit, profile, status, waiting,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use cli::{
    CacheCommand, CacheDir, Cli, Command, Copying, DataDir, Global, LogFormat, Mounting, NodeArguments, Output,
    PolicyFile, ProfileCommand, Serve,
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let cli = cli::parse(plugin::arguments(std::env::args_os()));
    start_log(&cli.global);
    // Before there is a runtime: the command gets this process.
    if let Command::Enter { directory, command, systemd, keep_sys_admin } = cli.command {
        return enter(&Entered { directory, command, systemd, keep_sys_admin });
    }
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
    let Cli { command, global } = cli;
    let name = &global.driver_name;
    match command {
        Command::Node(arguments) => node(name, arguments).await,
        Command::Controller { serve, build_job, policy } => {
            controller(name, serve, build_job.as_deref(), &policy).await
        }
        Command::Mount { spec, target, read_only, mounting, policy } => {
            mount(name, &spec, &target, read_only, mounting, &policy).await
        }
        Command::Unmount { target, data_dir, timeout } => {
            unmount(name, &target, Mounting::nothing(data_dir, timeout)).await
        }
        Command::Plan { spec, policy } => plan(&spec, &policy),
        Command::Doctor { servers, kubelet_dir, data_dir, policy } => {
            let data_dir = data_dir.path(name);
            doctor(Examined { data_dir, kubelet_dir, policy: read_policy(&policy)?, servers }).await
        }
        Command::Convert { container, namespace, container_image, policy } => {
            let surroundings =
                Surroundings { driver_name: name, namespace: &namespace, container_image: &container_image };
            convert(&container, &policy, &surroundings)
        }
        Command::Enter { .. } => unreachable!("it is done before there is a runtime"),
        Command::Status { output, cache_dir, data_dir } => show_status(name, &data_dir, &cache_dir, output),
        Command::Commit { target, data_dir } => commit(&data_dir.path(name), &target),
        Command::Move { old, new } => Ok(moved::move_server(old, &new, |moved| println!("{moved}")).await?),
        Command::Seal { image } => seal(&image),
        Command::Verify { image } => verify(&image),
        Command::Profile(command) => profile(name, command),
        Command::Cache(command) => cache(name, command).await,
        Command::Cluster(command) => plugin::run(name, command).await,
    }
}

async fn node(driver_name: &str, arguments: NodeArguments) -> Outcome {
    let NodeArguments { serve, node_id, controller, plugin_registry, mounting, copying, prefetching, policy } =
        arguments;
    let Serve { endpoint, health_address, metrics_address } = serve;
    let policy = Arc::new(read_policy(&policy)?);
    let identity = Identity { driver_name: driver_name.to_owned(), controller, node: true };
    let controller = controller.then(|| Controller::new(Arc::clone(&policy), Cluster::new(driver_name, None)));
    raise_file_limit();
    for missing in volume::missing().await? {
        tracing::warn!("this node lacks: {missing}");
    }
    let data_dir = mounting.data_dir.path(driver_name);
    let (cache, prefetch) = (copying.config(&data_dir), prefetching.config());
    let volumes = volumes(driver_name, mounting, cache, prefetch, policy)?;
    volumes.sweep();
    volumes.tend_copies();
    volumes.tend_paths();
    let node = Node { node_id, volumes: Arc::clone(&volumes) };
    let stop = stop()?;
    let registered = watch::Sender::new(Registered::NotYet);
    let known = plugin_registry.is_some().then(|| registered.subscribe());
    let watched = Arc::new(Watched::new(endpoint.path().to_owned(), Some(Arc::clone(&volumes)), known));
    let register = async {
        match &plugin_registry {
            Some(registry) => {
                registration::serve(registry, driver_name, endpoint.path(), registered, stopped(&stop)).await
            }
            None => Ok(()),
        }
    };
    tokio::try_join!(
        csi::serve(&endpoint, identity, controller, Some(node), stopped(&stop)),
        register,
        tell_status(&data_dir, &volumes, &stop),
        serve_http(health_address, Served::Health, &watched, &stop),
        serve_http(metrics_address, Served::Metrics, &watched, &stop),
    )?;
    Ok(())
}

async fn controller(driver_name: &str, arguments: Serve, build_job: Option<&Path>, policy: &PolicyFile) -> Outcome {
    let template = |file: &Path| {
        let template = JobTemplate::parse(driver_name, &read(file)?);
        template.map_err(|error| format!("read {}: {error}", file.display()))
    };
    let cluster = Cluster::new(driver_name, build_job.map(template).transpose()?);
    let controller = Controller::new(Arc::new(read_policy(policy)?), cluster);
    let identity = Identity { driver_name: driver_name.to_owned(), controller: true, node: false };
    let stop = stop()?;
    let Serve { endpoint, health_address, metrics_address } = arguments;
    let watched = Arc::new(Watched::new(endpoint.path().to_owned(), None, None));
    tokio::try_join!(
        csi::serve(&endpoint, identity, Some(controller), None, stopped(&stop)),
        serve_http(health_address, Served::Health, &watched, &stop),
        serve_http(metrics_address, Served::Metrics, &watched, &stop),
    )?;
    Ok(())
}

/// What it is for, the driver can do without.
async fn tell_status(data_dir: &Path, volumes: &Volumes, stop: &watch::Receiver<bool>) -> io::Result<()> {
    if let Err(error) =
        waiting::serve(data_dir, || (volumes.copies_under_way(), volumes.prefetching()), stopped(stop)).await
    {
        tracing::error!("'status' will not know what threads wait for, and what is copied: {error}");
    }
    Ok(())
}

async fn serve_http(
    address: Option<SocketAddr>,
    served: Served,
    watched: &Arc<Watched>,
    stop: &watch::Receiver<bool>,
) -> io::Result<()> {
    match address {
        Some(address) => ops::serve(address, served, Arc::clone(watched), stopped(stop)).await,
        None => Ok(()),
    }
}

async fn mount(
    driver_name: &str,
    spec: &Path,
    target: &Path,
    read_only: bool,
    mounting: Mounting,
    policy: &PolicyFile,
) -> Outcome {
    let (spec, policy) = read_spec(spec, policy)?;
    let target = std::path::absolute(target)?;
    let volumes = volumes(driver_name, mounting, None, PrefetchConfig::default(), Arc::new(policy))?;
    let mount = volumes.allow(spec, None)?;
    let mounted = volumes.publish(Publication::by_hand(target, mount, read_only), false).await;
    volumes.finish_deletions();
    Ok(mounted?)
}

async fn unmount(driver_name: &str, target: &Path, mounting: Mounting) -> Outcome {
    let target = std::path::absolute(target)?;
    let volumes = volumes(driver_name, mounting, None, PrefetchConfig::default(), Arc::default())?;
    let unmounted = volumes.unpublish(&volume::by_hand(&target), &target).await;
    volumes.finish_deletions();
    Ok(unmounted?)
}

fn plan(spec: &Path, policy: &PolicyFile) -> Outcome {
    let (spec, policy) = read_spec(spec, policy)?;
    for (step, line) in spec::plan::plan(&*spec.allowed_by(&policy, None)?).iter().enumerate() {
        println!("{}. {line}", step + 1);
    }
    Ok(())
}

async fn doctor(examined: Examined) -> Outcome {
    let findings = doctor::examine(&examined).await;
    for finding in &findings {
        println!("{finding}");
    }
    match findings.iter().any(|finding| matches!(finding.verdict, Verdict::Bad(_))) {
        true => Err("no volume can be mounted here before what failed is mended".into()),
        false => Ok(()),
    }
}

fn convert(file: &Path, policy: &PolicyFile, surroundings: &Surroundings) -> Outcome {
    let (container, policy) = read_with_policy(file, policy)?;
    let converted = convert::convert(&container, &policy, surroundings)?;
    warn(&converted.notes);
    print!("{}", converted.documents);
    Ok(())
}

fn enter(entered: &Entered) -> ExitCode {
    let Err(failure) = enter::enter(entered, |warning| warn(&[warning]));
    eprintln!("csi-driver-squashfs: {failure}");
    ExitCode::from(failure.status)
}

fn show_status(driver_name: &str, data_dir: &DataDir, cache_dir: &CacheDir, output: Output) -> Outcome {
    let data_dir = data_dir.path(driver_name);
    let status = status::read(driver_name, &data_dir, &cache_dir.path(&data_dir))?;
    match output {
        Output::Text => print!("{status}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(())
}

fn commit(data_dir: &Path, target: &Path) -> Outcome {
    let stdout = io::stdout();
    if stdout.is_terminal() {
        return Err("a tar is nothing for a terminal: write it to a file, or into csi-driver-squashfs-build".into());
    }
    raise_file_limit();
    let out = stdout.as_fd().try_clone_to_owned()?;
    let note = |what: &str| eprintln!("csi-driver-squashfs: {what}");
    let out = io::BufWriter::with_capacity(1 << 18, fs::File::from(out));
    Ok(commit::commit(data_dir, &std::path::absolute(target)?, out, note)?)
}

fn seal(image: &Path) -> Outcome {
    let file = fs::File::options().read(true).write(true).open(image);
    let file = file.map_err(|error| format!("open {} to write to it: {error}", image.display()))?;
    let root = verity::seal(&file).map_err(|error| format!("{}: {error}", image.display()))?;
    println!("{}", verity::hexadecimal(&root));
    Ok(())
}

fn verify(image: &Path) -> Outcome {
    let file = fs::File::open(image).map_err(|error| format!("open {}: {error}", image.display()))?;
    let root = verity::verify(&file).map_err(|error| format!("{}: {error}", image.display()))?;
    println!("{}", verity::hexadecimal(&root));
    Ok(())
}

fn profile(driver_name: &str, command: ProfileCommand) -> Outcome {
    let mut out = io::stdout().lock();
    let profile = match command {
        ProfileCommand::Learned { image, data_dir } => profile::learned(&data_dir.path(driver_name), &image)?,
        ProfileCommand::Cached { image } => profile::cached(&image)?,
        ProfileCommand::Files { directory } => {
            let lines = profile::files(&directory, |name| warn(&[format!("no line of a sort file can name {name}")]))?;
            return Ok(out.write_all(&lines)?);
        }
    };
    serde_json::to_writer(&mut out, &profile)?;
    Ok(writeln!(out)?)
}

async fn cache(driver_name: &str, command: CacheCommand) -> Outcome {
    match command {
        CacheCommand::List { output, directory, data_dir } => {
            let entries = copies::list(&directory.path(&data_dir.path(driver_name)))?;
            match output {
                Output::Text => entries.iter().for_each(|entry| println!("{entry}")),
                Output::Json => println!("{}", serde_json::to_string_pretty(&entries)?),
            }
        }
        CacheCommand::Warm { specs, copying, mounting, policy } => {
            warm(driver_name, &specs, &copying, mounting, &policy).await?;
        }
        CacheCommand::Evict { images, directory, data_dir } => {
            let mut used = 0;
            copies::evict(&directory.path(&data_dir.path(driver_name)), &images, |entry, evicted| {
                used += usize::from(!evicted);
                println!("{}: {}", entry.original.name, if evicted { "removed" } else { "in use, and left" });
            })?;
            if used > 0 {
                return Err(
                    format!("{used} copies are in use: they can be removed when no volume stands on them").into()
                );
            }
        }
        CacheCommand::Verify { directory, data_dir } => {
            let mut wrong = 0;
            copies::verify(&directory.path(&data_dir.path(driver_name)), |entry, verified| {
                wrong += usize::from(verified == Verified::Wrong);
                let words = match verified {
                    Verified::Right => "as it was copied",
                    Verified::Wrong => "damaged, and removed",
                };
                println!("{}: {words}", entry.original.name);
            })?;
            if wrong > 0 {
                return Err(format!(
                    "{wrong} copies were damaged: look after this node's disk; what runs on them reads wrong bytes"
                )
                .into());
            }
        }
    }
    Ok(())
}

async fn warm(
    driver_name: &str,
    specs: &[PathBuf],
    copying: &Copying,
    mounting: Mounting,
    policy: &PolicyFile,
) -> Outcome {
    let Some(config) = copying.config(&mounting.data_dir.path(driver_name)) else {
        return Err("how much of the disk copies may take is not known: set --cache-quota".into());
    };
    let config = CacheConfig { by_default: true, ..config };
    let volumes =
        volumes(driver_name, mounting, Some(config), PrefetchConfig::default(), Arc::new(read_policy(policy)?))?;
    for spec in specs {
        let parsed = spec::json::parse(&read(spec)?)?;
        warn(parsed.warnings());
        for entry in volumes.warm(&volumes.allow(parsed, None)?).await? {
            println!("{entry}");
        }
    }
    Ok(())
}

fn volumes(
    driver_name: &str,
    mounting: Mounting,
    cache: Option<CacheConfig>,
    prefetch: PrefetchConfig,
    policy: Arc<Policy>,
) -> Outcome<Arc<Volumes>> {
    let kernel = Linux::new(mounting.labels.contexts())?;
    let config = Config {
        policy,
        data_dir: mounting.data_dir.path(driver_name),
        driver_name: driver_name.to_owned(),
        host_root: mounting.host_root,
        nfs_read_ahead: mounting.nfs_read_ahead,
        zone: mounting.zone.filter(|zone| !zone.is_empty()),
        cache,
        prefetch,
        timeout: Duration::from_secs(mounting.timeout.seconds),
    };
    Ok(Volumes::new(config, Arc::new(kernel))?)
}

fn read_spec(file: &Path, policy: &PolicyFile) -> Outcome<(Parsed, Policy)> {
    let (text, policy) = read_with_policy(file, policy)?;
    let parsed = spec::json::parse(&text)?;
    warn(parsed.warnings());
    Ok((parsed, policy))
}

/// What is read from a pipe is gone: each is read once, and one of them alone can be standard input.
fn read_with_policy(file: &Path, policy: &PolicyFile) -> Outcome<(String, Policy)> {
    if file == Path::new("-") && policy.policy.as_deref() == Some(file) {
        return Err("both the policy and what it is about cannot be standard input".into());
    }
    Ok((read(file)?, read_policy(policy)?))
}

fn read_policy(file: &PolicyFile) -> Outcome<Policy> {
    let Some(file) = &file.policy else { return Ok(Policy::default()) };
    Ok(Policy::parse(&read(file)?)?)
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
