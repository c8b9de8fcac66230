//! Devices that the kernel verifies (Documentation/admin-guide/device-mapper/verity.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::io::Errno;

use super::{Control, Opened, Table, device_in, find_or_make, is_loaded, status};
use crate::kernel::error::{Doing, Error, Result, Subject};
use crate::kernel::loop_device::{LoopDevice, Tag};
use crate::kernel::verity::{self, RootHash, Tree, hexadecimal};

/// What a target that verifies begins its status with, once a block did not fit.
const CORRUPTED: char = 'C';

/// A device that reads as its loop device does, or not at all where that has other bytes than its root hash says. Held open.
#[derive(Debug)]
pub struct VerifiedDevice(Opened);

impl VerifiedDevice {
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Its number, major and minor.
    pub fn device(&self) -> (u32, u32) {
        self.0.device
    }

    #[cfg(test)]
    pub(in crate::kernel) fn of_path(path: std::path::PathBuf, device: (u32, u32), fd: std::os::fd::OwnedFd) -> Self {
        VerifiedDevice(Opened { path, device, _fd: fd })
    }

    /// The device of this root hash on a loop device, whose image has `size` bytes: the one that is there already, for which nothing is read, or a new one.
    ///
    /// `EBADMSG` where the image has another root hash, `EMEDIUMTYPE` where it has no tree.
    pub fn on(device: &LoopDevice, size: u64, root: &RootHash, tag: &Tag) -> Result<Self> {
        let control = Control::open()?;
        let name = name(device.number(), root, tag);
        let make = || make(&control, &name, device, size, root);
        find_or_make(|| control.open_device(&name), make).map(VerifiedDevice)
    }
}

/// The version of the kernel's dm-verity, whose module is loaded if need be. Linux 5.4.
pub fn version() -> Result<String> {
    super::version("verity")
}

/// A device of the driver, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Its number, major and minor.
    pub device: (u32, u32),
    /// The loop device that it stands on.
    pub loop_device: u32,
    pub root: RootHash,
    /// A block was read that did not fit.
    pub is_corrupted: bool,
}

/// All devices with this mark. Loads no module.
pub fn list(tag: &Tag) -> Result<Vec<Verified>> {
    if !is_loaded() {
        return Ok(Vec::new());
    }
    let control = Control::open()?;
    let mut devices = Vec::new();
    for name in control.names()? {
        let Some((loop_device, root)) = read_name(&name, tag) else { continue };
        if let Some(answer) = control.ask(&name, 0)? {
            let (device, is_corrupted) = (device_in(&answer), status(&answer).starts_with(CORRUPTED));
            devices.push(Verified { device, loop_device, root, is_corrupted });
        }
    }
    Ok(devices)
}

/// `csi-squashfs-0123abcd-loop3-ROOT`, at most 103 bytes: all of the root hash, so that no device passes for that of another.
fn name(loop_device: u32, root: &RootHash, tag: &Tag) -> String {
    format!("{}{loop_device}-{}", prefix(tag), hexadecimal(root))
}

fn prefix(tag: &Tag) -> String {
    format!("{}-loop", tag.as_str().replace(':', "-"))
}

pub(super) fn read_name(name: &str, tag: &Tag) -> Option<(u32, RootHash)> {
    let (loop_device, root) = name.strip_prefix(&prefix(tag))?.split_once('-')?;
    Some((loop_device.parse().ok()?, verity::read_hexadecimal(root)?))
}

fn make(control: &Control, name: &str, device: &LoopDevice, size: u64, root: &RootHash) -> Result<Opened> {
    let doing = |what: &str| format!("{what} the verified device on {} ({name})", device.path().display());
    let image = File::open(device.path()).doing(|| format!("open {}", device.path().display()))?;
    let tree = Tree::find(&image, size)?;
    let (major, minor) = device.device();
    let table = Table {
        target: "verity",
        sectors: tree.data_sectors(),
        parameters: tree.parameters(&format!("{major}:{minor}"), root),
        hint: "does this kernel have dm-verity with SHA-256? Try 'modprobe dm-verity' on the node",
    };
    let made = control.make(name, &table, &doing)?;
    let mut block = [0; 4096];
    let Err(error) = File::open(&made.path).and_then(|file| file.read_exact_at(&mut block, 0)) else {
        return Ok(made);
    };
    let doing = || format!("read {}", made.path.display());
    let told = control.ask(name, 0)?.unwrap_or_default();
    // Else it is the server, or the disk, that gave nothing.
    if status(&told).starts_with(CORRUPTED) {
        let hint = format!("the image does not have the root hash {}", hexadecimal(root));
        return Err(Error::new(doing(), Errno::BADMSG).about(Subject::Image).with_hint(hint));
    }
    Err(error).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::super::NAME_LENGTH;
    use super::*;

    #[test]
    fn a_device_is_known_by_the_mark_in_its_name() {
        let (mine, other) = (Tag::new("a.csi.dev"), Tag::new("b.csi.dev"));
        let name = name(12, &[0xab; 32], &mine);
        assert!(name.ends_with(&format!("-loop12-{}", "ab".repeat(32))) && name.len() < NAME_LENGTH);
        assert_eq!((read_name(&name, &mine), read_name(&name, &other)), (Some((12, [0xab; 32])), None));
    }
}
