//! The live graph of this driver's volumes on a node, read from the kernel by any process.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::blocking::{RELEASING, WAITING};
use super::error::Result;
use super::record::{self, Record};
use crate::kernel::loop_device::{self, Attached, Tag};
use crate::kernel::mountinfo::{self, MountInfo};
use crate::kernel::thread;
use crate::spec::{Base, Device, Mount};

/// What the driver has on this node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub volumes: Vec<PublishedVolume>,
    pub loop_devices: Vec<Loop>,
    /// The threads of drivers on this node that are in the kernel now. One that stays waits for a server that does not answer.
    pub threads: Vec<Thread>,
}

/// One thread of a driver.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Thread {
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
    /// The image's path, relative to the root of its mount.
    pub image: Option<String>,
    pub size: u64,
    /// How much was read from it since it was attached.
    pub read_bytes: u64,
    /// How many published paths stand on it.
    pub published: usize,
}

/// Reads the driver's records, the mount table, the loop devices and the threads. Asks no server.
pub fn read(driver_name: &str, data_dir: &Path) -> Result<Status> {
    let volumes = volumes(data_dir)?;
    let loop_devices = loop_devices(driver_name, &volumes)?;
    Ok(Status { volumes, loop_devices, threads: threads() })
}

fn threads() -> Vec<Thread> {
    let describe = |thread: thread::Thread| Thread {
        process: thread.process,
        id: thread.id,
        purpose: if thread.name == RELEASING { Purpose::Release } else { Purpose::Work },
        state: thread.state,
        seconds: thread.age.as_secs(),
    };
    thread::list(&[WAITING, RELEASING]).into_iter().map(describe).collect()
}

/// The published paths, by name.
pub fn volumes(data_dir: &Path) -> Result<Vec<PublishedVolume>> {
    let mounts = mountinfo::read()?;
    let mounts: BTreeMap<&str, &MountInfo> = mounts.iter().map(|mount| (mount.mount_point.as_str(), mount)).collect();
    let mut records = record::all(data_dir)?;
    records.sort_by(|a, b| a.publication.target.cmp(&b.publication.target));
    Ok(records.iter().map(|record| volume(record, &mounts)).collect())
}

/// The loop devices of the driver of this name, and which of `volumes` stand on each.
pub fn loop_devices(driver_name: &str, volumes: &[PublishedVolume]) -> Result<Vec<Loop>> {
    let describe = |attached: Attached| {
        let number = attached.device.number();
        Loop {
            number,
            image: loop_device::backing_file(number).map(|path| without_mount_point(&path).to_owned()),
            size: attached.identity.size,
            read_bytes: loop_device::read_bytes(number),
            published: volumes.iter().filter(|volume| volume.loop_devices.contains(&number)).count(),
        }
    };
    Ok(loop_device::list(&Tag::new(driver_name))?.into_iter().map(describe).collect())
}

/// The kernel shows a file's path with the mount point in the driver's namespace, while that lives: `/nfs-0/image.sqsh`.
fn without_mount_point(path: &str) -> &str {
    let rest = path.strip_prefix("/nfs-").map(|rest| rest.trim_start_matches(|letter: char| letter.is_ascii_digit()));
    rest.filter(|rest| rest.starts_with('/')).unwrap_or(path)
}

fn volume(Record { publication, .. }: &Record, mounts: &BTreeMap<&str, &MountInfo>) -> PublishedVolume {
    let mount = publication.target.to_str().and_then(|target| mounts.get(target));
    let mut sources = Vec::new();
    list_sources(&publication.mount, &mut sources);
    PublishedVolume {
        volume_id: publication.volume_id.clone(),
        target: publication.target.clone(),
        mounted: mount.map(|mount| format!("{} ({})", mount.fs_type, mount.options)),
        loop_devices: mount.map(|mount| loops_of(mount)).unwrap_or_default(),
        sources,
    }
}

/// The device that is mounted, or the `lowerdir` names by which the driver stacks devices: `0-loop3`.
fn loops_of(mount: &MountInfo) -> Vec<u32> {
    if mount.device.0 == loop_device::MAJOR {
        return vec![mount.device.1];
    }
    let options = mount.super_options.split(',');
    let layers = options.filter_map(|option| option.strip_prefix("lowerdir=").or(option.strip_prefix("lowerdir+=")));
    layers.flat_map(|layers| layers.split(':')).filter_map(|layer| layer.split_once("-loop")?.1.parse().ok()).collect()
}

/// One line for each image, export and directory that is shown: `image.sqsh (squashfs) of 10.0.0.5:/images (nfs 4.2)`.
fn list_sources(mount: &Mount, sources: &mut Vec<String>) {
    match mount {
        Mount::Nfs(nfs) => sources.push(format!("{}:{} (nfs {})", nfs.host, nfs.path, nfs.version)),
        Mount::Attach(attach) => match &attach.device {
            Device::Loopback(loopback) => {
                list_below(format!("{} ({})", loopback.path, attach.fs_type), &loopback.base, sources)
            }
            Device::Local { path } => sources.push(format!("{path} ({})", attach.fs_type)),
        },
        Mount::Bind(bind) => list_below(format!("directory {}", bind.path), &bind.base, sources),
        Mount::Overlay(overlay) => overlay.lower.iter().for_each(|lower| list_sources(lower, sources)),
    }
}

fn list_below(what: String, base: &Base, sources: &mut Vec<String>) {
    match base {
        Base::Root => sources.push(format!("{what} of this node")),
        Base::Mount(mount) => {
            let mut below = Vec::new();
            list_sources(mount, &mut below);
            sources.push(format!("{what} of {}", below.join(" and ")));
        }
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
            let Loop { number, image, size, read_bytes, published } = device;
            let image = image.as_deref().unwrap_or("?");
            writeln!(f, "/dev/loop{number}: image {image}, {size} bytes, {read_bytes} read, {published} published")?;
        }
        for Thread { process, id, purpose, state, seconds } in &self.threads {
            let what = match purpose {
                Purpose::Work => "waits for the kernel",
                Purpose::Release => "lets go of what a teardown left",
            };
            writeln!(f, "thread {id} of process {process} {what}, for {seconds} s (state {state})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: (u32, u32), super_options: &str) -> MountInfo {
        MountInfo {
            id: 1,
            parent: 0,
            device,
            mount_point: "/t".into(),
            options: "rw".into(),
            shared: true,
            fs_type: "overlay".into(),
            source: "squashfs.csi.dev".into(),
            super_options: super_options.into(),
        }
    }

    #[test]
    fn the_loop_devices_of_a_mount_are_read_from_the_mount_table() {
        assert_eq!(loops_of(&mount((7, 12), "ro")), [12]);
        let old = "rw,lowerdir=0-loop3:1-nfs:2-loop11,upperdir=upper/upper,workdir=upper/work";
        assert_eq!(loops_of(&mount((0, 50), old)), [3, 11]);
        assert_eq!(loops_of(&mount((0, 50), "ro,lowerdir+=0-loop3,lowerdir+=1-loop4")), [3, 4]);
    }
}
