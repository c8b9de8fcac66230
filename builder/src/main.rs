//! Makes images for csi-driver-squashfs: a squashfs of a directory or a tar, and of a container image one for each layer.
//!
//! A program of its own, for a pod without privileges: it reads what anybody has written, and talks to registries. Nothing of that
//! belongs into the driver, which is root on the nodes.

mod build;
mod directory;
mod entries;
mod image;
mod layout;
mod members;
mod on;
mod pack;
mod plan;
mod progress;
mod registry;
mod sign;
mod source;
mod squashfs;
mod store;
mod tar_file;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;

use build::{Builder, Built, Stack};
use entries::{Form, Limits};
use image::Platform;
use registry::Access;
use sign::Key;
use source::Source;
use squashfs::Format;
use store::Store;
use tar_file::TarFile;

/// Make squashfs images of container images, tars and directories
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// oci://REGISTRY/NAME:TAG, oci://REGISTRY/NAME@sha256:..., a directory, or a tar, which is standard input by the name -; a directory or
    /// a tar may be an OCI layout
    source: String,
    /// Where the images are to be: a directory of an export that is mounted here
    #[arg(long, value_name = "DIRECTORY")]
    to: PathBuf,
    /// The name of what is made, without its ending [default: of a container image its own name, tag and digest]
    #[arg(long)]
    name: Option<String>,
    /// The tar is a layer, as `csi-driver-squashfs commit` writes it: put it on this index (NAME.json) or image (NAME.sqsh) of the directory
    #[arg(long, value_name = "BASE", requires = "name", conflicts_with_all = ["flat", "image_name", "sign_key"])]
    on: Option<String>,
    /// Make one layer of all: the same as --max-layers 1
    #[arg(long)]
    flat: bool,
    /// Which of the images that a name stands for
    #[arg(long, value_name = "OS/ARCHITECTURE", default_value = "linux/amd64")]
    platform: Platform,
    /// Which of the images of an OCI layout
    #[arg(long, value_name = "NAME")]
    image_name: Option<String>,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    access: Access,
    /// The most files and directories of one layer or tar
    #[arg(long, value_name = "NUMBER", default_value_t = 10_000_000)]
    max_entries: u64,
    /// The most GiB of one layer or tar, unpacked
    #[arg(long, value_name = "GIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    max_size: u64,
    /// The most layers of a stack, which are those of an overlay of the driver: of more, the uppermost are made one
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    max_layers: u16,
    /// Sign what is made, by a secret key of minisign(1) without a password, so that nodes verify it by its public key
    #[arg(long, value_name = "FILE")]
    sign_key: Option<PathBuf>,
    /// Where layers lie while they are read [default: the system's directory for temporary files]
    #[arg(long, value_name = "DIRECTORY")]
    work: Option<PathBuf>,
    /// The host of the NFS server: print the mount spec of what was made
    #[arg(long, value_name = "HOST", requires = "share")]
    server: Option<String>,
    /// What the server calls the directory that --to names
    #[arg(long, value_name = "PATH", requires = "server")]
    share: Option<String>,
}

/// The most bytes of names and attributes of one layer or tar.
const NAMES: u64 = 2 << 30;

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("csi-driver-squashfs-build: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let Arguments { source, to, name, flat, platform, image_name, format, access, max_entries, max_size, .. } =
        &arguments;
    let work = match &arguments.work {
        Some(directory) => TempDir::new_in(directory),
        None => TempDir::new(),
    };
    let work = work.context("make a directory for layers: see --work")?;
    let limits = Limits { entries: *max_entries, bytes: max_size << 30, names: NAMES };
    let builder = Builder {
        store: Store::open(to)?,
        format: format.clone(),
        limits,
        most_layers: if *flat { 1 } else { arguments.max_layers.into() },
        platform: platform.clone(),
        key: arguments.sign_key.as_deref().map(Key::read).transpose()?,
        work,
    };
    let work = builder.work.path();
    let built = match &arguments.on {
        Some(base) => builder.build_on(base, &TarFile::read(source, Form::Layer, work, limits)?, name.clone())?,
        None => builder.build(Source::find(source, image_name.clone(), access, work, limits)?, name.clone())?,
    };
    println!(
        "{}",
        match (&arguments.server, &arguments.share) {
            (Some(server), Some(share)) => serde_json::to_string_pretty(&mount_spec(&built, server, share))?,
            _ => match built {
                Built::Flat(file) => file,
                Built::Stack { name, .. } => format!("{name}.json"),
            },
        }
    );
    Ok(())
}

/// As the driver's documents have it: the first layer hides what has the same name in the next.
fn mount_spec(built: &Built, server: &str, share: &str) -> Value {
    let image = |file: &String| {
        json!({"kind": "attach", "attach": {"fs_type": "squashfs", "attach": {"kind": "loopback", "loopback": {
            "path": format!("/{file}"), "base": "mount",
            "mount": {"kind": "nfs", "nfs": {"host": server, "path": share, "ro": true}},
        }}}})
    };
    match built {
        Built::Flat(file) => image(file),
        Built::Stack { stack: Stack { layers, .. }, .. } if layers.len() == 1 => image(&layers[0]),
        Built::Stack { stack: Stack { layers, .. }, .. } => {
            let lower: Vec<_> = layers.iter().rev().map(image).collect();
            json!({"kind": "overlay", "overlay": {"upper": {"kind": "none"}, "lower": lower}})
        }
    }
}
