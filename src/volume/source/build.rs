//! From prepared objects to one detached mount, ready to be attached at a target.

use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::mark::{Layer, layer_name};
use super::prepared::{Prepared, PreparedBase};
use crate::blocking::measured;
use crate::kernel::mount::{CONFINED, DetachedMount, MountAttrFlags, Symlinks, open_directory, open_directory_beneath};
use crate::kernel::overlay::overlay;
use crate::kernel::tmpfs::tmpfs;
use crate::kernel::{self, Doing, Kernel, in_namespace};
use crate::spec::UpperRoot;

/// The writable layer of the outermost overlay.
pub struct UpperLayer {
    pub storage: Storage,
    pub root: UpperRoot,
    /// Who may write to its root, beside its owner.
    pub group: Option<u32>,
}

/// Where a writable layer is.
pub enum Storage {
    /// Memory, at most `size` bytes.
    Tmpfs { size: u64 },
    /// An existing directory of this published path alone, in which the upper and work directories are made.
    Directory(PathBuf),
    /// A file of this published path alone, in which there is a file system of at most `size` bytes, or will be.
    File { path: PathBuf, size: u64 },
}

/// Mounts `prepared`, attached nowhere; `upper` is for an overlay alone.
///
/// Asks no server except for layers that are NFS mounts themselves, and for the way to a directory of an image.
pub fn build(prepared: &Prepared, kernel: &dyn Kernel, upper: Option<&UpperLayer>) -> kernel::Result<DetachedMount> {
    match prepared {
        Prepared::Nfs { mount, directory, read_only } => {
            in_namespace(kernel, || kernel.bind(mount.open(directory)?.as_fd(), false, attributes(*read_only)))?
        }
        Prepared::FileSystem { device, file_system } => {
            let new = file_system.on(&device.path()).about(device.subject());
            measured(file_system.kernel_name(), || kernel.mount(new))
        }
        // What is the node's own is shown to pods, and never given to them.
        Prepared::Bind { base: PreparedBase::HostRoot(root, _), path, recursive, .. } => {
            let directory = open_directory_beneath(&**root, path, Symlinks::Refused)?;
            kernel.bind(directory.as_fd(), *recursive, attributes(true))
        }
        Prepared::Bind { base: PreparedBase::Mount(base), path, symlinks, recursive, read_only } => {
            let flags = if base.is_image() { MountAttrFlags::empty() } else { attributes(*read_only) };
            let base = build(base, kernel, None)?;
            in_namespace(kernel, || {
                let workspace = Workspace::new(kernel)?;
                workspace.attach("base", &base)?;
                let directory = open_directory_beneath(&base, path, *symlinks)?;
                kernel.bind(directory.as_fd(), *recursive, flags)
            })?
        }
        Prepared::Overlay { lower, source } => {
            let mut layers = Vec::with_capacity(lower.len());
            for layer in lower {
                layers.push((layer.layer(), build(layer, kernel, None)?));
            }
            stack(layers, upper, kernel, source)
        }
    }
}

fn attributes(read_only: bool) -> MountAttrFlags {
    if read_only { CONFINED | MountAttrFlags::MOUNT_ATTR_RDONLY } else { CONFINED }
}

/// An overlay of one empty layer and an upper in `directory`.
pub fn overlay_on(directory: &Path, kernel: &dyn Kernel) -> kernel::Result<DetachedMount> {
    let upper =
        UpperLayer { storage: Storage::Directory(directory.to_owned()), root: UpperRoot::default(), group: None };
    let empty = kernel.mount(tmpfs("an empty layer", Some(4096)))?;
    stack(vec![(Layer::Tmpfs, empty)], Some(&upper), kernel, "try")
}

fn stack(
    mut layers: Vec<(Layer, DetachedMount)>,
    layer: Option<&UpperLayer>,
    kernel: &dyn Kernel,
    source: &str,
) -> kernel::Result<DetachedMount> {
    let upper = match layer.map(|layer| &layer.storage) {
        // Nothing to stack, and the kernel refuses to.
        None if layers.len() == 1 => return Ok(layers.remove(0).1),
        None => None,
        Some(Storage::Tmpfs { size }) => Some(kernel.mount(tmpfs(format!("tmpfs of {size} bytes"), Some(*size)))?),
        Some(Storage::Directory(path)) => Some(kernel.bind(open_directory(path)?.as_fd(), false, CONFINED)?),
        Some(Storage::File { path, size }) => Some(measured("scratch", || kernel.scratch(path, *size))?),
    };
    let stack = || {
        let workspace = Workspace::new(kernel)?;
        let mut lower = Vec::with_capacity(layers.len());
        for (index, (layer, mount)) in layers.iter().enumerate() {
            let name = layer_name(index, *layer);
            workspace.attach(&name, mount)?;
            lower.push(name);
        }
        let Some((upper, layer)) = upper.as_ref().zip(layer) else {
            return kernel.mount(overlay(source, &lower, None));
        };
        workspace.attach("upper", upper)?;
        make_upper(&lower[0], layer).doing(|| "make the upper and work directories".into())?;
        kernel.mount(overlay(source, &lower, Some(("upper/upper", "upper/work"))))
    };
    measured("overlay", || in_namespace(kernel, stack)?)
}

/// The root of an overlay shows the owner and mode of its upper: they are those of the uppermost lower, as far as `root` says nothing. A
/// `group` may do what its owner may, and what is made there belongs to it too: as the kubelet has it with `fsGroup`, which for all other
/// directories would copy them up.
fn make_upper(lower: &str, &UpperLayer { root, group, .. }: &UpperLayer) -> std::io::Result<()> {
    // There already after a reboot of the node, with what the pod wrote.
    if !Path::new("upper/upper").exists() {
        let new = "upper/new";
        if !Path::new(new).exists() {
            std::fs::create_dir(new)?;
        }
        let image = std::fs::metadata(lower)?;
        let (uid, gid) = (root.uid.unwrap_or(image.uid()), group.or(root.gid).unwrap_or(image.gid()));
        std::os::unix::fs::chown(new, Some(uid), Some(gid))?;
        let mode = root.mode.unwrap_or(image.mode() & 0o7777) | group.map_or(0, |_| 0o2770);
        std::fs::set_permissions(new, std::fs::Permissions::from_mode(mode))?;
        std::fs::rename(new, "upper/upper")?;
    }
    std::fs::create_dir_all("upper/work")
}

/// A directory in the driver's namespace where mounts are attached while they are put together. All of it goes with the value.
struct Workspace<'a> {
    kernel: &'a dyn Kernel,
    directory: String,
}

impl<'a> Workspace<'a> {
    /// Makes the directory and enters it: call it in the driver's namespace.
    fn new(kernel: &'a dyn Kernel) -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let directory = format!("build-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        std::fs::create_dir(&directory).doing(|| format!("make directory {directory}"))?;
        if let Err(error) = std::env::set_current_dir(&directory) {
            // The first error is the one to report.
            let _ = std::fs::remove_dir(&directory);
            return Err(error).doing(|| format!("enter {directory}"));
        }
        Ok(Workspace { kernel, directory })
    }

    fn attach(&self, name: &str, mount: &DetachedMount) -> kernel::Result<()> {
        std::fs::create_dir(name).doing(|| format!("make directory {name}"))?;
        self.kernel.attach(mount, open_directory(Path::new(name))?.as_fd())
    }

    fn remove(&self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(".")? {
            let path = entry?.path();
            self.kernel.unmount_all(&path).map_err(std::io::Error::other)?;
            std::fs::remove_dir(path)?;
        }
        std::env::set_current_dir("..")?;
        std::fs::remove_dir(&self.directory)
    }
}

impl Drop for Workspace<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::error!("clean up {} in the driver's mount namespace: {error}", self.directory);
        }
    }
}
