//! From prepared objects to one detached mount, ready to be attached at a target.

use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::blocking::measured;
use super::exports::{io_error, make_directory};
use super::prepare::{BlockDevice, Prepared, PreparedBase};
use crate::kernel::mount::{
    CONFINED, DetachedMount, FsContext, MountAttrFlags, Symlinks, open_directory, open_directory_beneath, unmount_all,
};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::{self, overlay};
use crate::spec::FsType;

/// The writable layer of the outermost overlay.
pub enum UpperLayer {
    /// Memory, at most `size` bytes.
    Tmpfs { size: u64 },
    /// An existing directory of this published path alone, in which the upper and work directories are made.
    Directory(PathBuf),
}

/// Mounts `prepared`, attached nowhere; `upper` is for an overlay alone.
///
/// Asks no server except for layers that are NFS mounts themselves, and for the way to a directory of an image.
pub fn build(
    prepared: &Prepared,
    namespace: &PrivateNamespace,
    upper: Option<&UpperLayer>,
) -> kernel::Result<DetachedMount> {
    match prepared {
        Prepared::Nfs { mount, directory, read_only } => {
            namespace.run(|| DetachedMount::bind(mount.open(directory)?, false, attributes(*read_only)))?
        }
        Prepared::FileSystem { device, fs_type, no_exec } => file_system(&device.path(), *fs_type, *no_exec),
        Prepared::Bind { base, path, recursive, read_only } => {
            match base {
                // What is the node's own is shown to pods, and never given to them.
                PreparedBase::HostRoot(root) => {
                    let directory = open_directory_beneath(&**root, path, Symlinks::Refused)?;
                    DetachedMount::bind(directory, *recursive, attributes(true))
                }
                PreparedBase::Mount(base) => {
                    let base = build(base, namespace, None)?;
                    namespace.run(|| {
                        let workspace = Workspace::new()?;
                        workspace.attach("base", &base)?;
                        let directory = open_directory_beneath(&base, path, Symlinks::Inside)?;
                        DetachedMount::bind(directory, *recursive, attributes(*read_only))
                    })?
                }
            }
        }
        Prepared::Overlay { lower, source } => {
            let mut layers = Vec::with_capacity(lower.len());
            for layer in lower {
                layers.push((layer_name(layer), build(layer, namespace, None)?));
            }
            stack(layers, upper, namespace, source)
        }
    }
}

fn attributes(read_only: bool) -> MountAttrFlags {
    if read_only { CONFINED | MountAttrFlags::MOUNT_ATTR_RDONLY } else { CONFINED }
}

/// A mount of the file system on a block device, never written to. Reads the device where none of its mounts is left.
pub fn file_system(device: &Path, fs_type: FsType, no_exec: bool) -> kernel::Result<DetachedMount> {
    let context = FsContext::new(fs_type.as_str(), format!("{fs_type} on {}", device.display()))?;
    context.set("source", &device.to_string_lossy())?;
    context.set_flag("ro")?;
    match fs_type {
        FsType::Squashfs | FsType::Erofs => {}
        FsType::Ext4 => {
            // A journal is replayed by writing, and an image is never written.
            context.set_flag("noload")?;
            // An image may ask for a panic of the node at its first error; an option has the last word.
            context.set("errors", "continue")?;
        }
        FsType::Xfs => {
            context.set_flag("norecovery")?;
            // Copies of one image have the same UUID.
            context.set_flag("nouuid")?;
        }
    }
    let mut attributes = attributes(true);
    if no_exec {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
    }
    measured(fs_type.as_str(), || context.mount(attributes))
}

/// What the mount table calls a layer: the loop device where there is one.
fn layer_name(layer: &Prepared) -> String {
    match layer {
        Prepared::FileSystem { device: BlockDevice::Loop { image, .. }, .. } => {
            format!("loop{}", image.device.number())
        }
        Prepared::FileSystem { .. } => "local".into(),
        Prepared::Nfs { .. } => "nfs".into(),
        Prepared::Bind { .. } => "bind".into(),
        Prepared::Overlay { .. } => "overlay".into(),
    }
}

/// An overlay of one empty layer and an upper in `directory`.
pub fn stack_on(directory: &Path, namespace: &PrivateNamespace) -> kernel::Result<DetachedMount> {
    let upper = UpperLayer::Directory(directory.to_owned());
    stack(vec![("empty".into(), tmpfs(4096)?)], Some(&upper), namespace, "try")
}

fn stack(
    mut layers: Vec<(String, DetachedMount)>,
    upper: Option<&UpperLayer>,
    namespace: &PrivateNamespace,
    source: &str,
) -> kernel::Result<DetachedMount> {
    let upper = match upper {
        // Nothing to stack, and the kernel refuses to.
        None if layers.len() == 1 => return Ok(layers.remove(0).1),
        None => None,
        Some(UpperLayer::Tmpfs { size }) => Some(tmpfs(*size)?),
        Some(UpperLayer::Directory(path)) => Some(DetachedMount::bind(open_directory(path)?, false, CONFINED)?),
    };
    let stack = || {
        let workspace = Workspace::new()?;
        let mut lower = Vec::with_capacity(layers.len());
        for (index, (name, mount)) in layers.iter().enumerate() {
            let name = format!("{index}-{name}");
            workspace.attach(&name, mount)?;
            lower.push(name);
        }
        let Some(upper) = &upper else { return overlay::mount(source, &lower, None) };
        workspace.attach("upper", upper)?;
        make_upper(&lower[0])?;
        overlay::mount(source, &lower, Some(("upper/upper", "upper/work")))
    };
    measured("overlay", || namespace.run(stack)?)
}

/// The root of an overlay shows the owner and mode of its upper: they are those of the uppermost lower.
fn make_upper(lower: &str) -> kernel::Result<()> {
    let failed = |error| io_error("make the upper and work directories".into(), &error);
    let make = || {
        // There already after a reboot of the node, with what the pod wrote.
        if !Path::new("upper/upper").exists() {
            let new = "upper/new";
            if !Path::new(new).exists() {
                std::fs::create_dir(new)?;
            }
            let root = std::fs::metadata(lower)?;
            std::os::unix::fs::chown(new, Some(root.uid()), Some(root.gid()))?;
            std::fs::set_permissions(new, std::fs::Permissions::from_mode(root.mode() & 0o7777))?;
            std::fs::rename(new, "upper/upper")?;
        }
        std::fs::create_dir_all("upper/work")
    };
    make().map_err(failed)
}

fn tmpfs(size: u64) -> kernel::Result<DetachedMount> {
    let context = FsContext::new("tmpfs", format!("tmpfs of {size} bytes"))?;
    context.set("size", &size.to_string())?;
    context.set("mode", "0700")?;
    context.mount(CONFINED)
}

/// A directory in the driver's namespace where mounts are attached while they are put together. All of it goes with the value.
struct Workspace {
    directory: String,
}

impl Workspace {
    /// Makes the directory and enters it: call it in the driver's namespace.
    fn new() -> kernel::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let workspace = Workspace { directory: format!("/build-{}", COUNT.fetch_add(1, Ordering::Relaxed)) };
        make_directory(&workspace.directory)?;
        std::env::set_current_dir(&workspace.directory)
            .map_err(|error| io_error(format!("enter {}", workspace.directory), &error))?;
        Ok(workspace)
    }

    fn attach(&self, name: &str, mount: &DetachedMount) -> kernel::Result<()> {
        make_directory(name)?;
        mount.attach(open_directory(Path::new(name))?.as_fd())
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        let remove = || -> std::io::Result<()> {
            std::env::set_current_dir("/")?;
            for entry in std::fs::read_dir(&self.directory)? {
                let path = entry?.path();
                unmount_all(&path).map_err(std::io::Error::other)?;
                std::fs::remove_dir(path)?;
            }
            std::fs::remove_dir(&self.directory)
        };
        if let Err(error) = remove() {
            tracing::error!("clean up {} in the driver's mount namespace: {error}", self.directory);
        }
    }
}
