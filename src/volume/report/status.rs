//! The live graph of this driver's volumes on a node, read from the kernel by any process.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::waiting::{self, Told, Waiting};
use crate::blocking::{RELEASING, WAITING};
use crate::error::Result;
use crate::kernel::device_mapper::{Multipath, Verified, multipath, verified};
use crate::kernel::loop_device::{self, Attached};
use crate::kernel::mountinfo::{self, MountInfo};
use crate::kernel::thread;
use crate::volume::cache::{UnderWay, by_hand};
use crate::volume::record::{self, List, Record, Unreadable};
use crate::volume::source::Prefetching;
use crate::volume::source::mark::{Mark, loop_devices_of, without_nfs_directory};

/// What the driver has on this node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub volumes: Vec<PublishedVolume>,
    pub loop_devices: Vec<Loop>,
    /// The threads of drivers on this node that are in the kernel now. One that stays waits for a server that does not answer.
    pub threads: Vec<WaitingThread>,
    /// What the threads of the driver that serves the node wait for.
    pub waiting: Vec<Waiting>,
    /// What it copies to this node, and what it failed to.
    pub copies: Vec<UnderWay>,
    /// What it reads into the node's memory ahead of those who read.
    pub prefetching: Vec<Prefetching>,
    /// Why it did not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silent: Option<String>,
    pub unreadable_records: Vec<Unreadable>,
}

/// One thread of a driver.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WaitingThread {
    pub process: u32,
    pub id: u32,
    pub purpose: Purpose,
    /// `D` waits and cannot be interrupted; see proc_pid_stat(5).
    pub state: char,
    pub seconds: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Purpose {
    /// A step of a call.
    Work,
    /// Letting go of what a teardown left.
    Release,
}

/// One published path.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedVolume {
    pub volume_id: String,
    pub target: PathBuf,
    /// File system type and options from the mount table; `None` where the record says published and the kernel does not.
    pub mounted: Option<String>,
    /// The loop devices below it, uppermost layer first.
    pub loop_devices: Vec<u32>,
    /// The images and exports of its spec.
    pub sources: Vec<String>,
}

/// One loop device of this driver.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Loop {
    pub number: u32,
    /// The image's path, relative to the root of its mount; of a copy, on its server.
    pub image: Option<String>,
    /// It is read from a copy on this node.
    pub local: bool,
    /// The kernel verifies each block of it, and of some that were read it found that they do not fit.
    pub verified: bool,
    pub corrupted: bool,
    pub size: u64,
    /// How much was read from it since it was attached.
    pub read_bytes: u64,
    /// How many published paths stand on it.
    pub published: usize,
    /// Of an image that several servers have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<ServerPath>,
}

/// A loop device as one of several, of which the kernel reads by one.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerPath {
    /// The loop device of the first, on which the volumes stand.
    pub of: u32,
    /// The place of its server in the list of the volume, from 0.
    pub server: u8,
    /// It got an error there, and is not read by until the server is well.
    pub failed: bool,
}

/// Reads the driver's records, the mount table, the loop devices and the threads, and asks the driver that runs. Asks no server.
pub fn read(driver_name: &str, data_dir: &Path, cache_dir: &Path) -> Result<Status> {
    let List { records, unreadable } = record::list(data_dir)?;
    let volumes = volumes(&records, &mountinfo::read()?);
    let mark = Mark::new(driver_name);
    let (attached, verified) = (loop_device::list(mark.tag())?, verified::list(mark.tag())?);
    let multipaths = multipath::list(mark.tag())?;
    let copies = by_hand::open(cache_dir)?;
    let copy_of = |device: &Attached| copies.as_ref()?.image_below(device);
    let loop_devices = loop_devices(attached, &verified, &multipaths, &volumes, copy_of);
    // A driver that does not answer is no reason to say nothing of what it has.
    let (Told { waiting, copies, prefetching }, silent) = match waiting::ask(data_dir) {
        Ok(told) => (told, None),
        Err(error) => (Told::default(), Some(error.message)),
    };
    let threads = threads();
    Ok(Status { volumes, loop_devices, threads, waiting, copies, prefetching, silent, unreadable_records: unreadable })
}

fn threads() -> Vec<WaitingThread> {
    let describe = |thread: thread::Thread| WaitingThread {
        process: thread.process,
        id: thread.id,
        purpose: if thread.name == RELEASING { Purpose::Release } else { Purpose::Work },
        state: thread.state,
        seconds: thread.age.as_secs(),
    };
    thread::list(&[WAITING, RELEASING]).into_iter().map(describe).collect()
}

/// The published paths, by name.
pub fn volumes(records: &[Record], mounts: &[MountInfo]) -> Vec<PublishedVolume> {
    let mounts: BTreeMap<&str, &MountInfo> = mounts.iter().map(|mount| (mount.mount_point.as_str(), mount)).collect();
    let mut volumes: Vec<_> = records.iter().map(|record| volume(record, &mounts)).collect();
    volumes.sort_by(|a, b| a.target.cmp(&b.target));
    volumes
}

/// The driver's loop devices, and how many of `volumes` stand on each; of those that stand on a copy, `copy_of` says which image it is of.
pub fn loop_devices(
    attached: Vec<Attached>,
    verified: &[Verified],
    multipaths: &[Multipath],
    volumes: &[PublishedVolume],
    copy_of: impl Fn(&Attached) -> Option<String>,
) -> Vec<Loop> {
    let describe = |attached: Attached| {
        let number = attached.device.number();
        let image = copy_of(&attached);
        let path = path_of(&attached, verified, multipaths);
        let stands_on = path.map_or(number, |path| path.of);
        Loop {
            number,
            local: image.is_some(),
            verified: attached.purpose.is_verified(),
            corrupted: verified.iter().any(|it| it.is_corrupted && it.loop_device == number),
            image: image.or(attached.backing_file.map(|path| without_nfs_directory(&path).to_owned())),
            size: attached.identity.size,
            read_bytes: attached.reads.bytes,
            published: volumes.iter().filter(|volume| volume.loop_devices.contains(&stands_on)).count(),
            path,
        }
    };
    attached.into_iter().map(describe).collect()
}

fn path_of(attached: &Attached, verified: &[Verified], multipaths: &[Multipath]) -> Option<ServerPath> {
    let loop_device::Purpose::Path { server, .. } = attached.purpose else { return None };
    let number = attached.device.number();
    let verified = verified.iter().find(|it| it.loop_device == number);
    let device = verified.map_or_else(|| attached.device.device(), |it| it.device);
    multipaths.iter().find_map(|it| {
        let path = it.paths.iter().find(|path| path.device == device)?;
        Some(ServerPath { of: it.loop_device, server, failed: path.is_failed })
    })
}

fn volume(record: &Record, mounts: &BTreeMap<&str, &MountInfo>) -> PublishedVolume {
    let mount = record.target.to_str().and_then(|target| mounts.get(target));
    PublishedVolume {
        volume_id: record.volume_id.clone(),
        target: record.target.clone(),
        mounted: mount.map(|mount| format!("{} ({})", mount.fs_type, mount.options)),
        loop_devices: mount.map(|mount| loop_devices_of(mount)).unwrap_or_default(),
        sources: record.mount.sources(),
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.volumes.is_empty() && self.loop_devices.is_empty() {
            writeln!(f, "no volumes, no loop devices")?;
        }
        for volume in &self.volumes {
            writeln!(f, "volume {}", volume.volume_id)?;
            writeln!(f, "  published at {}", volume.target.display())?;
            writeln!(f, "  mounted as   {}", volume.mounted.as_deref().unwrap_or("nothing: not mounted any more"))?;
            for number in &volume.loop_devices {
                writeln!(f, "  stands on    /dev/loop{number}")?;
            }
            for source in &volume.sources {
                writeln!(f, "  made of      {source}")?;
            }
        }
        for device in &self.loop_devices {
            let Loop { number, image, local, verified, corrupted, size, read_bytes, published, path } = device;
            let (image, copy) = (image.as_deref().unwrap_or("?"), if *local { " (a copy on this node)" } else { "" });
            let verified = match (verified, corrupted) {
                (_, true) => ", verified: other bytes than the root hash says",
                (true, false) => ", verified",
                (false, false) => "",
            };
            let path = path.map_or(String::new(), |ServerPath { of, server, failed }| {
                let failed = if failed { ", which failed" } else { "" };
                format!(", path {server} of /dev/loop{of}{failed}")
            });
            writeln!(
                f,
                "/dev/loop{number}: image {image}{copy}{verified}{path}, {size} bytes, {read_bytes} read, {published} published"
            )?;
        }
        for UnderWay { image, size, copied, failed } in &self.copies {
            match failed {
                None => writeln!(f, "copying {image} to this node: {copied} of {size} bytes")?,
                Some(why) => writeln!(f, "not copied to this node, and tried again: {image}: {why}")?,
            }
        }
        for Prefetching { image, size, read } in &self.prefetching {
            writeln!(f, "reading {image} ahead: {read} of {size} bytes")?;
        }
        for WaitingThread { process, id, purpose, state, seconds } in &self.threads {
            let what = match purpose {
                Purpose::Work => "waits for the kernel",
                Purpose::Release => "lets go of what a teardown left",
            };
            writeln!(f, "thread {id} of process {process} {what}, for {seconds} s (state {state})")?;
        }
        for Waiting { servers, step, namespace, seconds } in &self.waiting {
            let what = if servers.is_empty() { "this node" } else { servers };
            let whose = namespace.as_ref().map_or(String::new(), |namespace| format!(" (namespace {namespace})"));
            writeln!(f, "waiting for {what}, for {seconds} s: {step}{whose}")?;
        }
        if let Some(why) = &self.silent {
            writeln!(f, "what the driver waits for is not known: {why}")?;
        }
        for unreadable in &self.unreadable_records {
            let volume = unreadable.volume_id.as_deref().unwrap_or("?");
            let target = unreadable.target.as_deref().unwrap_or(Path::new("?")).display();
            writeln!(f, "volume {volume}, published at {target}: {unreadable}")?;
        }
        Ok(())
    }
}
