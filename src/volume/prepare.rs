//! From a spec to what it needs of the kernel: NFS mounts and loop devices, held until dropped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use super::Config;
use super::blocking::{self, Aside, Places, measured};
use super::build;
use super::error::Result;
use super::exports::{Exports, NfsMount};
use super::shared::Shared;
use crate::kernel::image::{Content, Identity, Image};
use crate::kernel::loop_device::{LoopDevice, Tag};
use crate::kernel::mount::{self, DetachedMount, Symlinks};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::nfs::Export;
use crate::kernel::{self};
use crate::spec::policy::Policy;
use crate::spec::{Attach, Base, Bind, Device, FsType, Loopback, Mount, Nfs};

/// A spec whose servers were asked and whose images are attached: what is left to do needs this node alone.
#[derive(Clone)]
pub enum Prepared {
    /// `directory` is relative to the mount; empty is its root.
    Nfs {
        mount: Arc<Aside<NfsMount>>,
        directory: String,
        read_only: bool,
    },
    FileSystem {
        device: BlockDevice,
        fs_type: FsType,
        no_exec: bool,
    },
    Bind {
        base: PreparedBase,
        path: String,
        recursive: bool,
        read_only: bool,
    },
    /// `source` is what the mount table shows.
    Overlay {
        lower: Vec<Prepared>,
        source: Arc<str>,
    },
}

#[derive(Clone)]
pub enum BlockDevice {
    /// The base is kept so that the next image of the same export finds its NFS mount.
    Loop {
        image: Arc<Aside<AttachedImage>>,
        content: Content,
        base: PreparedBase,
    },
    Local(PathBuf),
}

impl BlockDevice {
    pub fn path(&self) -> PathBuf {
        match self {
            BlockDevice::Loop { image, .. } => image.device.path(),
            BlockDevice::Local(path) => path.clone(),
        }
    }
}

/// An image on its loop device, and its file system mounted, attached nowhere: the superblock is read while its server answers,
/// and each further mount of it asks nobody.
pub struct AttachedImage {
    // Dropped before the device that it stands on.
    _mount: DetachedMount,
    pub device: LoopDevice,
}

#[derive(Clone)]
pub enum PreparedBase {
    HostRoot(Arc<OwnedFd>),
    Mount(Box<Prepared>),
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
    fn new(base: PreparedBase, namespace: &PrivateNamespace) -> kernel::Result<Self> {
        Ok(match base {
            PreparedBase::HostRoot(root) => OpenBase::HostRoot(root),
            PreparedBase::Mount(mount) => match *mount {
                Prepared::Nfs { mount, directory, .. } => OpenBase::Directory(mount.open(&directory)?),
                other => OpenBase::Detached(build::build(&other, namespace, None)?),
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

/// Makes what is not there yet and finds what is.
pub struct Preparer {
    namespace: Arc<PrivateNamespace>,
    policy: Policy,
    driver_name: Arc<str>,
    tag: Tag,
    host_root: Arc<OwnedFd>,
    exports: Exports,
    images: Shared<Identity, Aside<AttachedImage>>,
}

impl Preparer {
    pub fn new(namespace: Arc<PrivateNamespace>, config: &Config) -> Result<Self> {
        Ok(Preparer {
            policy: config.policy.clone(),
            driver_name: config.driver_name.as_str().into(),
            tag: Tag::new(&config.driver_name),
            host_root: Arc::new(mount::open_directory(&config.host_root)?),
            exports: Exports::new(Arc::clone(&namespace), config.nfs_read_ahead),
            images: Shared::default(),
            namespace,
        })
    }

    /// Asks the servers and attaches the images of `spec`, innermost first.
    pub fn prepare<'a>(&'a self, spec: &'a Mount) -> Pin<Box<dyn Future<Output = Result<Prepared>> + Send + 'a>> {
        Box::pin(async move {
            Ok(match spec {
                Mount::Nfs(nfs) => self.nfs(nfs, nfs.read_only).await?,
                Mount::Attach(Attach { fs_type, no_exec, device }) => Prepared::FileSystem {
                    device: match device {
                        Device::Loopback(loopback) => self.attach(loopback, *fs_type).await?,
                        Device::Local { path } => BlockDevice::Local(path.into()),
                    },
                    fs_type: *fs_type,
                    no_exec: *no_exec,
                },
                Mount::Bind(Bind { path, base, recursive, read_only }) => Prepared::Bind {
                    base: self.base(base).await?,
                    path: path.clone(),
                    recursive: *recursive,
                    read_only: *read_only,
                },
                Mount::Overlay(overlay) => {
                    let mut lower = Vec::with_capacity(overlay.lower.len());
                    for layer in &overlay.lower {
                        lower.push(self.prepare(layer).await?);
                    }
                    Prepared::Overlay { lower, source: Arc::clone(&self.driver_name) }
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
        (Export { path: path.to_owned(), ..export(nfs) }, directory.to_owned())
    }

    async fn base(&self, base: &Base) -> Result<PreparedBase> {
        Ok(match base {
            Base::Root => PreparedBase::HostRoot(Arc::clone(&self.host_root)),
            Base::Mount(mount) => PreparedBase::Mount(Box::new(self.prepare(mount).await?)),
        })
    }

    /// The base of an image file, which is only read: an export is mounted once for images, whether its spec says `ro` or not.
    async fn image_base(&self, base: &Base) -> Result<PreparedBase> {
        if let Base::Mount(mount) = base
            && let Mount::Nfs(nfs) = &**mount
        {
            return Ok(PreparedBase::Mount(Box::new(self.nfs(nfs, true).await?)));
        }
        self.base(base).await
    }

    /// The loop device of an image file, which is opened, and looked at, each time: its name may mean another file by now.
    async fn attach(&self, loopback: &Loopback, fs_type: FsType) -> Result<BlockDevice> {
        let base = self.image_base(&loopback.base).await?;
        let name = format!("{} ({fs_type}) of {}", loopback.path, describe(&loopback.base));
        let path = loopback.path.clone();
        let image = self.below(&base, format!("open image {name}"), move |base, symlinks| {
            measured("image", || {
                let image = Image::open(base, &path, symlinks)?;
                image.check(&path, fs_type.as_str())?;
                Ok(Aside::new(image))
            })
        });
        let image = image.await.map_err(|error| error.about(&format!("image {name}")))?;
        let tag = self.tag.clone();
        let (identity, content, places) = (image.identity, image.content, base.places());
        let attached = self.images.get(&identity, async {
            let attach = move || {
                let device = measured("loop", || LoopDevice::of(&image, &tag))?;
                let mount = build::file_system(&device.path(), fs_type, false)?;
                Ok::<_, kernel::Error>(Aside::new(AttachedImage { _mount: mount, device }))
            };
            Ok(blocking::run_at(places, format!("attach image {name}"), attach).await??)
        });
        let image = attached.await.map_err(|error| error.about(&format!("image {name}")))?;
        Ok(BlockDevice::Loop { image, content, base })
    }

    /// Asks the servers of the NFS directories that a mount shows as they are, and returns the places of the last: whoever makes
    /// the mount, or looks at it, may wait for them. `None` where images are all that is shown.
    pub fn ask<'a>(&'a self, mount: &'a Mount) -> Pin<Box<dyn Future<Output = Result<Option<Places>>> + Send + 'a>> {
        Box::pin(async move {
            match mount {
                Mount::Nfs(nfs) => Ok(Some(self.exports.get(&self.export(nfs).0).await?.places().clone())),
                Mount::Bind(Bind { base: Base::Mount(base), .. }) => self.ask(base).await,
                Mount::Overlay(overlay) => {
                    let mut places = None;
                    for lower in &overlay.lower {
                        places = self.ask(lower).await?.or(places);
                    }
                    Ok(places)
                }
                Mount::Attach(_) | Mount::Bind(_) => Ok(None),
            }
        })
    }

    /// What the image is now, for comparison with what was attached. Its server may answer or not.
    pub async fn look_at(&self, loopback: &Loopback) -> Result<Content> {
        let base = self.image_base(&loopback.base).await?;
        let path = loopback.path.clone();
        let step = format!("look at image {} of {}", loopback.path, describe(&loopback.base));
        self.below(&base, step, move |base, symlinks| Ok(Image::open(base, &path, symlinks)?.content)).await
    }

    /// Runs `work` with the open base, on a thread that may wait for the base's server.
    async fn below<T: Send + 'static>(
        &self,
        base: &PreparedBase,
        step: String,
        work: impl FnOnce(&OpenBase, Symlinks) -> kernel::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (namespace, base, places) = (Arc::clone(&self.namespace), base.clone(), base.places());
        let work = move || {
            let base = OpenBase::new(base, &namespace)?;
            work(&base, base.symlinks())
        };
        Ok(blocking::run_at(places, step, work).await??)
    }
}

impl Prepared {
    /// What the images were when they were attached, in the order of [`super::condition::list_images`].
    pub fn contents(&self, contents: &mut Vec<Content>) {
        match self {
            Prepared::Nfs { .. } | Prepared::Bind { base: PreparedBase::HostRoot(_), .. } => {}
            Prepared::FileSystem { device, .. } => {
                if let BlockDevice::Loop { content, base, .. } = device {
                    if let PreparedBase::Mount(base) = base {
                        base.contents(contents);
                    }
                    contents.push(*content);
                }
            }
            Prepared::Bind { base: PreparedBase::Mount(base), .. } => base.contents(contents),
            Prepared::Overlay { lower, .. } => lower.iter().for_each(|lower| lower.contents(contents)),
        }
    }

    /// Of the server that reading below the mount asks: of an overlay's, the last.
    fn places(&self) -> Option<Places> {
        match self {
            Prepared::Nfs { mount, .. } => Some(mount.places().clone()),
            Prepared::FileSystem { device: BlockDevice::Loop { base, .. }, .. } | Prepared::Bind { base, .. } => {
                base.places()
            }
            Prepared::FileSystem { device: BlockDevice::Local(_), .. } => None,
            Prepared::Overlay { lower, .. } => lower.iter().rev().find_map(Prepared::places),
        }
    }
}

impl PreparedBase {
    /// Of the server that opening a file below this base asks.
    fn places(&self) -> Option<Places> {
        match self {
            PreparedBase::Mount(mount) => mount.places(),
            PreparedBase::HostRoot(_) => None,
        }
    }
}

fn export(nfs: &Nfs) -> Export {
    Export {
        host: nfs.host.clone(),
        path: nfs.path.clone(),
        version: nfs.version.as_str(),
        read_only: nfs.read_only,
        options: nfs.options.iter().map(|option| (option.key.clone(), option.value.clone())).collect(),
    }
}

fn describe(base: &Base) -> String {
    match base {
        Base::Root => "the node's root directory".to_owned(),
        Base::Mount(mount) => match &**mount {
            Mount::Nfs(nfs) => export(nfs).to_string(),
            Mount::Attach(_) => "another image".to_owned(),
            Mount::Bind(_) => "a bound directory".to_owned(),
            Mount::Overlay(_) => "an overlay".to_owned(),
        },
    }
}
