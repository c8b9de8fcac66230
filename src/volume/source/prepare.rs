//! From a spec to what it needs of the kernel: NFS mounts and loop devices, made where they are not there yet.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use super::build::build;
use super::exports::Exports;
use super::mark::Mark;
use super::prepared::{AttachedImage, BlockDevice, ImageOnLoop, Prepared, PreparedBase};
use super::shared::Shared;
use crate::blocking::{self, OffThread, Places, measured};
use crate::error::Result;
use crate::kernel::file_system::FileSystem;
use crate::kernel::image::{Content, Image, ImageIdentity};
use crate::kernel::mount::{DetachedMount, Symlinks, open_directory};
use crate::kernel::nfs::{Export, Version};
use crate::kernel::{self, Kernel};
use crate::spec::policy::Policy;
use crate::spec::{Allowed, Attach, Base, Bind, Device, FsType, Loopback, Mount, Nfs, NfsVersion};

type Preparation<'a> = Pin<Box<dyn Future<Output = Result<Prepared>> + Send + 'a>>;

/// Makes what is not there yet and finds what is.
pub struct Preparer {
    kernel: Arc<dyn Kernel>,
    policy: Arc<Policy>,
    mark: Mark,
    host_root: Arc<OwnedFd>,
    exports: Arc<Exports>,
    images: Shared<ImageIdentity, OffThread<AttachedImage>>,
}

impl Preparer {
    /// `host_root` is where the node's root directory is seen; `read_ahead` is that of NFS mounts in KiB, if not the kernel's own.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        policy: Arc<Policy>,
        mark: Mark,
        host_root: &Path,
        read_ahead: Option<u32>,
    ) -> Result<Self> {
        let host_root = Arc::new(open_directory(host_root)?);
        let exports = Arc::new(Exports::new(Arc::clone(&kernel), read_ahead));
        Ok(Preparer { kernel, policy, mark, host_root, exports, images: Shared::default() })
    }

    /// What volumes may ask for.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Asks the servers and attaches the images of `spec`, innermost first.
    pub async fn prepare(&self, spec: &Allowed) -> Result<Prepared> {
        self.mount(spec).await
    }

    fn mount<'a>(&'a self, spec: &'a Mount) -> Preparation<'a> {
        Box::pin(async move {
            Ok(match spec {
                Mount::Nfs(nfs) => self.nfs(nfs, nfs.read_only).await?,
                Mount::Attach(Attach { fs_type, no_exec, device }) => {
                    let file_system = file_system(*fs_type);
                    let device = match device {
                        Device::Loopback(loopback) => BlockDevice::Loop(self.image(loopback, file_system).await?),
                        Device::Local { path } => BlockDevice::Local(path.into()),
                    };
                    Prepared::FileSystem { device, file_system, no_exec: *no_exec }
                }
                Mount::Bind(Bind { path, base, recursive, read_only }) => Prepared::Bind {
                    base: self.base(base).await?,
                    path: path.clone(),
                    recursive: *recursive,
                    read_only: *read_only,
                },
                Mount::Overlay(overlay) => {
                    let mut lower = Vec::with_capacity(overlay.lower.len());
                    for layer in &overlay.lower {
                        lower.push(self.mount(layer).await?);
                    }
                    Prepared::Overlay { lower, source: self.mark.overlay_source() }
                }
            })
        })
    }

    /// The mount of what the policy names, and in it the directory that the spec does: whoever can write there could lead its path
    /// elsewhere on the server by a symlink.
    async fn nfs(&self, nfs: &Nfs, read_only: bool) -> Result<Prepared> {
        let (export, directory) = self.export(nfs);
        let mount = self.exports.get(&Export { read_only, ..export }).await?;
        Ok(Prepared::Nfs { mount, directory, read_only })
    }

    fn export(&self, nfs: &Nfs) -> (Export, String) {
        let (path, directory) = self.policy.split(&nfs.host, &nfs.path);
        let export = Export {
            host: nfs.host.clone(),
            path: path.to_owned(),
            version: version(nfs.version),
            read_only: nfs.read_only,
            options: nfs.options.iter().map(|option| (option.key.clone(), option.value.clone())).collect(),
        };
        (export, directory.to_owned())
    }

    async fn base(&self, base: &Base) -> Result<PreparedBase> {
        Ok(match base {
            Base::Root => PreparedBase::HostRoot(Arc::clone(&self.host_root)),
            Base::Mount(mount) => PreparedBase::Mount(Box::new(self.mount(mount).await?)),
        })
    }

    /// The base of an image file, which is only read: an export is mounted once for images, whether its spec says `ro` or not.
    async fn image_base(&self, base: &Base) -> Result<PreparedBase> {
        match base {
            Base::Mount(mount) => match &**mount {
                Mount::Nfs(nfs) => Ok(PreparedBase::Mount(Box::new(self.nfs(nfs, true).await?))),
                Mount::Attach(_) | Mount::Bind(_) | Mount::Overlay(_) => self.base(base).await,
            },
            Base::Root => self.base(base).await,
        }
    }

    /// The loop device of an image file, which is opened, and looked at, each time: its name may mean another file by now.
    async fn image(&self, spec: &Loopback, file_system: FileSystem) -> Result<ImageOnLoop> {
        let base = self.image_base(&spec.base).await?;
        let name = format!("{} ({}) of {}", spec.path, file_system.name(), spec.base);
        let path = spec.path.clone();
        let image = self.below(&base, format!("open image {name}"), move |base, symlinks| {
            measured("image", || {
                let image = Image::open(base, &path, symlinks)?;
                image.check(&path, file_system)?;
                Ok(OffThread::new(image))
            })
        });
        let image = image.await.map_err(|error| error.about(&format!("image {name}")))?;
        let (identity, content, places) = (image.identity, image.content, base.places());
        let (kernel, mark, step) = (Arc::clone(&self.kernel), self.mark.clone(), format!("attach image {name}"));
        let attach = move || {
            let device = measured("loop", || kernel.loop_device(&image, mark.tag()))?;
            let mount = measured(file_system.name(), || kernel.mount(file_system.on(&device.path(), false)))?;
            Ok::<_, kernel::Error>(OffThread::new(AttachedImage { _mount: mount, device }))
        };
        let attached = self.images.get(&identity, async { blocking::run_at(places, step, attach).await }).await;
        let attached = attached.map_err(|error| error.about(&format!("image {name}")))?;
        Ok(ImageOnLoop { spec: spec.clone(), content, attached, base })
    }

    /// Asks the servers of the exports that a mount shows as they are, and returns the places of the last: whoever makes the mount,
    /// or looks at it, may wait for them. `None` where images are all that is shown.
    pub async fn probe_shown(&self, mount: &Allowed) -> Result<Option<Places>> {
        let mut places = None;
        for shown in mount.shown() {
            if let Mount::Nfs(nfs) = shown {
                places = Some(self.exports.get(&self.export(nfs).0).await?.places().clone());
            }
        }
        Ok(places)
    }

    /// What an image of an allowed mount is now, for comparison with what was attached. Its server may answer or not.
    pub async fn look_at(&self, spec: &Loopback) -> Result<Content> {
        let base = self.image_base(&spec.base).await?;
        let path = spec.path.clone();
        let step = format!("look at image {} of {}", spec.path, spec.base);
        self.below(&base, step, move |base, symlinks| Ok(Image::open(base, &path, symlinks)?.content)).await
    }

    /// Runs `work` with the open base, on a thread that may wait for the base's server.
    async fn below<T: Send + 'static>(
        &self,
        base: &PreparedBase,
        step: String,
        work: impl FnOnce(&OpenBase, Symlinks) -> kernel::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (kernel, base, places) = (Arc::clone(&self.kernel), base.clone(), base.places());
        let work = move || {
            let base = OpenBase::new(base, &*kernel)?;
            work(&base, base.symlinks())
        };
        blocking::run_at(places, step, work).await
    }
}

/// A base while paths are opened below it.
enum OpenBase {
    HostRoot(Arc<OwnedFd>),
    Directory(OwnedFd),
    Detached(DetachedMount),
}

impl AsFd for OpenBase {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            OpenBase::HostRoot(root) => root.as_fd(),
            OpenBase::Directory(directory) => directory.as_fd(),
            OpenBase::Detached(mount) => mount.as_fd(),
        }
    }
}

impl OpenBase {
    fn new(base: PreparedBase, kernel: &dyn Kernel) -> kernel::Result<Self> {
        Ok(match base {
            PreparedBase::HostRoot(root) => OpenBase::HostRoot(root),
            PreparedBase::Mount(mount) => match *mount {
                Prepared::Nfs { mount, directory, .. } => OpenBase::Directory(mount.open(&directory)?),
                other => OpenBase::Detached(build(&other, kernel, None)?),
            },
        })
    }

    /// The admin's policy compares paths of the node as text, which is true only where no symlink is followed.
    fn symlinks(&self) -> Symlinks {
        match self {
            OpenBase::HostRoot(_) => Symlinks::Refused,
            OpenBase::Directory(_) | OpenBase::Detached(_) => Symlinks::Inside,
        }
    }
}

fn file_system(fs_type: FsType) -> FileSystem {
    match fs_type {
        FsType::Squashfs => FileSystem::Squashfs,
        FsType::Erofs => FileSystem::Erofs,
        FsType::Ext4 => FileSystem::Ext4,
        FsType::Xfs => FileSystem::Xfs,
    }
}

fn version(version: NfsVersion) -> Version {
    match version {
        NfsVersion::V3 => Version::V3,
        NfsVersion::V4_0 => Version::V4_0,
        NfsVersion::V4_1 => Version::V4_1,
        NfsVersion::V4_2 => Version::V4_2,
    }
}
