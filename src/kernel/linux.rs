//! [`Kernel`] by the kernel that runs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;

use super::device_mapper::{self, Message, Multipath, MultipathDevice, Verified, VerifiedDevice, multipath, verified};
use super::image::Image;
use super::loop_device::{self, Attached, LoopDevice, Purpose, Tag};
use super::mount::{self, DetachedMount, MountAttrFlags, NewMount};
use super::mountinfo::{self, MountInfo};
use super::mountstats::{self, NfsCounters};
use super::namespace::PrivateNamespace;
use super::selinux::{self, Contexts};
use super::transport::{self, Transport};
use super::verity::RootHash;
use super::{Doing, Kernel, Result, nfs, scratch};

/// The kernel, and a mount namespace of this process's own in it.
pub struct Linux {
    namespace: PrivateNamespace,
    /// For threads in the namespace, which has none.
    proc: OwnedFd,
    /// `None` where SELinux is off.
    contexts: Option<Contexts>,
}

impl Linux {
    /// Makes the namespace, which needs root.
    pub fn new(contexts: Contexts) -> Result<Self> {
        let (namespace, proc) = (PrivateNamespace::new()?, mount::open_directory(Path::new("/proc"))?);
        Ok(Linux { namespace, proc, contexts: contexts.in_force() })
    }
}

impl Kernel for Linux {
    fn mount(&self, new: NewMount) -> Result<DetachedMount> {
        let Some(contexts) = &self.contexts else { return mount::create(new) };
        let labelled = |context: Option<&str>| {
            mount::create(match context {
                Some(context) => new.clone().set("context", context),
                None => new.clone(),
            })
        };
        let wanted = contexts.of(&new);
        let error = match labelled(wanted) {
            Err(error) if error.errno() == Errno::INVAL && selinux::is_of_images(&new) => error,
            answer => return answer,
        };
        let source = new.options.iter().find(|(key, _)| key == "source").and_then(|(_, value)| value.as_deref());
        let table = mountinfo::read()?;
        let Some(mounted) = table.iter().find(|mount| Some(&*mount.source) == source) else { return Err(error) };
        let label = selinux::label_in(&mounted.super_options);
        let mount = labelled(label).map_err(|_| error)?;
        let (label, what) = (label.unwrap_or("its own labels"), &new.what);
        tracing::warn!("{what} is mounted already and keeps {label} until it is nowhere");
        Ok(mount)
    }

    fn bind(&self, directory: BorrowedFd<'_>, recursive: bool, attributes: MountAttrFlags) -> Result<DetachedMount> {
        mount::bind(directory, recursive, attributes)
    }

    fn super_options(&self, mount: &DetachedMount) -> Result<String> {
        let id = mount::id_of(mount)?;
        let table = mountinfo::read_thread_by(self.proc.as_fd())?;
        let found = table.into_iter().find(|mount| mount.id == id).ok_or(Errno::NOENT);
        Ok(found.doing(|| format!("find {} in the mount table", mount.what()))?.super_options)
    }

    fn restrict(&self, mount: &DetachedMount, attributes: MountAttrFlags) -> Result<()> {
        mount::restrict(mount, attributes)
    }

    fn attach(&self, mount: &DetachedMount, directory: BorrowedFd<'_>) -> Result<()> {
        mount::attach(mount, directory)
    }

    fn unmount_all(&self, path: &Path) -> Result<()> {
        mount::unmount_all(path)
    }

    fn abort_calls(&self, path: &Path) -> Result<()> {
        mount::abort_calls(path)
    }

    fn is_mount(&self, path: &Path) -> Result<bool> {
        mount::is_mount(path)
    }

    fn mounts(&self) -> Result<Vec<MountInfo>> {
        mountinfo::read()
    }

    fn scratch(&self, path: &Path, size: u64) -> Result<DetachedMount> {
        scratch::mount(path, size)
    }

    fn set_read_ahead(&self, mount: &DetachedMount, kib: u32) -> Result<()> {
        nfs::set_read_ahead(mount, kib)
    }

    fn loop_device(&self, image: &Image, purpose: Purpose, tag: &Tag) -> Result<LoopDevice> {
        LoopDevice::of(image, purpose, tag)
    }

    fn verified_device(&self, device: &LoopDevice, size: u64, root: &RootHash, tag: &Tag) -> Result<VerifiedDevice> {
        VerifiedDevice::on(device, size, root, tag)
    }

    fn verified_devices(&self, tag: &Tag) -> Result<Vec<Verified>> {
        verified::list(tag)
    }

    fn multipath_device(&self, first: u32, paths: &[(u32, u32)], sectors: u64, tag: &Tag) -> Result<MultipathDevice> {
        MultipathDevice::on(first, paths, sectors, tag)
    }

    fn find_multipath_device(&self, first: u32, tag: &Tag) -> Result<Option<MultipathDevice>> {
        multipath::find(first, tag)
    }

    fn multipath_devices(&self, tag: &Tag) -> Result<Vec<Multipath>> {
        multipath::list(tag)
    }

    fn tell_multipath(&self, loop_device: u32, message: Message, tag: &Tag) -> Result<()> {
        multipath::tell(loop_device, message, tag)
    }

    fn change_paths(&self, loop_device: u32, paths: &[(u32, u32)], queue: bool, tag: &Tag) -> Result<()> {
        multipath::change_paths(loop_device, paths, queue, tag)
    }

    fn sweep_mapped(&self, tag: &Tag) -> Result<()> {
        device_mapper::sweep(tag)
    }

    fn change_backing(&self, device: &LoopDevice, copy: &Image) -> Result<()> {
        device.change_backing(copy)
    }

    fn loop_devices(&self, tag: &Tag) -> Result<Vec<Attached>> {
        loop_device::list(tag)
    }

    fn nfs_counters(&self) -> Result<Vec<NfsCounters>> {
        mountstats::read(&self.namespace)
    }

    fn transports(&self) -> Result<Vec<Transport>> {
        transport::list()
    }

    fn run_in_namespace(&self, work: &mut (dyn FnMut() + Send)) -> Result<()> {
        self.namespace.run(work)
    }
}
