//! How Linux does it: one file per kernel facility, each a few functions over file descriptors.
//!
//! Nothing here knows CSI, JSON or the volume that a call serves, and no program is started: every step is a system call. [`Kernel`]
//! lists what takes root, the driver's mount namespace or a loop device; [`Linux`] does it. Files and directories are opened directly.

#![allow(unsafe_code, reason = "system calls that no safe wrapper covers")]

pub mod boot;
pub mod capabilities;
pub mod device_mapper;
mod device_node;
#[cfg(test)]
pub mod double;
mod error;
pub mod file_lock;
pub mod file_system;
pub mod fingerprint;
pub mod image;
mod linux;
pub mod loop_device;
pub mod mount;
pub mod mountinfo;
pub mod mountstats;
pub mod namespace;
pub mod new_root;
pub mod nfs;
pub mod overlay;
pub mod page_cache;
pub mod scratch;
pub mod selinux;
pub mod sif;
pub mod sock_diag;
pub mod support;
pub mod thread;
pub mod tmpfs;
pub mod transport;
pub mod verity;

pub use error::{Doing, Error, Result, Subject, errno_of};
pub use linux::Linux;

use std::os::fd::BorrowedFd;
use std::path::Path;

use device_mapper::{Message, Multipath, MultipathDevice, Verified, VerifiedDevice};
use image::Image;
use loop_device::{Attached, LoopDevice, Purpose, Tag};
use mount::{DetachedMount, MountAttrFlags, NewMount};
use mountinfo::MountInfo;
use mountstats::NfsCounters;
use transport::Transport;
use verity::RootHash;

/// What takes root, and what only a kernel can show: a unit test puts a double here that writes down what it is asked.
pub trait Kernel: Send + Sync {
    /// Finds or makes a superblock, and a mount of it that is attached nowhere. May wait for a server.
    fn mount(&self, new: NewMount) -> Result<DetachedMount>;
    /// A new mount of a directory that is visible in the calling thread's namespace, private, with `attributes` added.
    fn bind(&self, directory: BorrowedFd<'_>, recursive: bool, attributes: MountAttrFlags) -> Result<DetachedMount>;
    /// What the mount table says of the superblock of a mount that is attached in the calling thread's namespace: `ro` or `rw` first, then
    /// options, separated by commas. Asks no server.
    fn super_options(&self, mount: &DetachedMount) -> Result<String>;
    /// Adds attributes to a mount and to those that a recursive bind brought along.
    fn restrict(&self, mount: &DetachedMount, attributes: MountAttrFlags) -> Result<()>;
    /// Puts a mount on top of a directory.
    fn attach(&self, mount: &DetachedMount, directory: BorrowedFd<'_>) -> Result<()>;
    /// Takes off every mount that is attached at `path`; asks no server, and no mount there is no error.
    fn unmount_all(&self, path: &Path) -> Result<()>;
    /// Ends the calls of the mount at `path` that wait for its server. See [`mount::abort_calls`].
    fn abort_calls(&self, path: &Path) -> Result<()>;
    /// Whether a mount is attached at `path`, which need not exist.
    fn is_mount(&self, path: &Path) -> Result<bool>;
    /// The mounts that this process sees.
    fn mounts(&self) -> Result<Vec<MountInfo>>;
    /// The file system of at most `size` bytes in the file `path`, made where it is not there yet. See [`scratch::mount`].
    fn scratch(&self, path: &Path, size: u64) -> Result<DetachedMount>;
    /// Sets how many KiB are read ahead in the files of an NFS mount.
    fn set_read_ahead(&self, mount: &DetachedMount, kib: u32) -> Result<()>;
    /// The loop device of this image with this mark: the one that has it already, or a new one. One thread at a time for one image.
    fn loop_device(&self, image: &Image, purpose: Purpose, tag: &Tag) -> Result<LoopDevice>;
    /// What verifies an image of `size` bytes on a loop device of this purpose. See [`VerifiedDevice::on`].
    fn verified_device(&self, device: &LoopDevice, size: u64, root: &RootHash, tag: &Tag) -> Result<VerifiedDevice>;
    /// All of these with this mark. Asks no server.
    fn verified_devices(&self, tag: &Tag) -> Result<Vec<Verified>>;
    /// The device over these paths in this order. See [`MultipathDevice::on`].
    fn multipath_device(&self, first: u32, paths: &[(u32, u32)], sectors: u64, tag: &Tag) -> Result<MultipathDevice>;
    /// The multipath device whose first path is of this loop device, if there is one. See [`multipath::find`](device_mapper::multipath::find).
    fn find_multipath_device(&self, first: u32, tag: &Tag) -> Result<Option<MultipathDevice>>;
    /// All of these with this mark. Asks no server.
    fn multipath_devices(&self, tag: &Tag) -> Result<Vec<Multipath>>;
    /// See [`device_mapper::multipath::tell`]. Asks no server.
    fn tell_multipath(&self, loop_device: u32, message: Message, tag: &Tag) -> Result<()>;
    /// Other paths for a device, under whoever reads in it. See [`device_mapper::multipath::change_paths`].
    fn change_paths(&self, loop_device: u32, paths: &[(u32, u32)], queue: bool, tag: &Tag) -> Result<()>;
    /// Removes those of both kinds that a killed process left.
    fn sweep_mapped(&self, tag: &Tag) -> Result<()>;
    /// Puts a copy of the device's image in its place. See [`LoopDevice::change_backing`].
    fn change_backing(&self, device: &LoopDevice, copy: &Image) -> Result<()>;
    /// All loop devices with this mark, by number; each is held open while the answer lives.
    fn loop_devices(&self, tag: &Tag) -> Result<Vec<Attached>>;
    /// What the NFS client counts for the mounts of the driver's namespace. Asks no server.
    fn nfs_counters(&self) -> Result<Vec<NfsCounters>>;
    /// The connections of the NFS client to its servers. Asks none of them.
    fn transports(&self) -> Result<Vec<Transport>>;
    /// Runs `work` once, on a thread in the driver's own mount namespace, where the current directory is an empty one to make mount
    /// points in. See [`in_namespace`].
    fn run_in_namespace(&self, work: &mut (dyn FnMut() + Send)) -> Result<()>;
}

/// [`Kernel::run_in_namespace`] for work that returns something.
pub fn in_namespace<T: Send>(kernel: &dyn Kernel, work: impl FnOnce() -> T + Send) -> Result<T> {
    let (mut work, mut done) = (Some(work), None);
    kernel.run_in_namespace(&mut || done = work.take().map(|work| work()))?;
    Ok(done.expect("the work was run"))
}
