//! From a spec to what it needs of the kernel: NFS mounts and loop devices, held until dropped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use super::Config;
use super::blocking;
use super::build;
use super::error::Result;
use super::exports::{Exports, NfsMount};
use super::shared::Shared;
use crate::kernel::image::{Identity, Image};
use crate::kernel::loop_device::{LoopDevice, Tag};
use crate::kernel::mount::{self, DetachedMount, Symlinks};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::nfs::Export;
use crate::spec::{Attach, Base, Bind, Device, FsType, Loopback, Mount, Nfs};

/// A spec whose servers were asked and whose images are attached: what is left to do needs this node alone.
#[derive(Clone)]
pub enum Prepared {
    Nfs {
        mount: Arc<NfsMount>,
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
        device: Arc<LoopDevice>,
        _base: PreparedBase,
    },
    Local(PathBuf),
}

#[derive(Clone)]
pub enum PreparedBase {
    HostRoot(Arc<OwnedFd>),
    Mount(Box<Prepared>),
}

/// A base while paths are opened below it.
enum OpenBase {
    HostRoot(Arc<OwnedFd>),
    Nfs(Arc<NfsMount>),
    Detached(DetachedMount),
}

impl AsFd for OpenBase {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            OpenBase::HostRoot(root) => root.as_fd(),
            OpenBase::Nfs(mount) => mount.as_fd(),
            OpenBase::Detached(mount) => mount.as_fd(),
        }
    }
}

impl OpenBase {
    /// The admin's policy compares paths of the node as text, which is true only where no symlink is followed.
    fn symlinks(&self) -> Symlinks {
        match self {
            OpenBase::HostRoot(_) => Symlinks::Refused,
            OpenBase::Nfs(_) | OpenBase::Detached(_) => Symlinks::Inside,
        }
    }
}

/// Makes what is not there yet and finds what is.
pub struct Preparer {
    namespace: Arc<PrivateNamespace>,
    driver_name: Arc<str>,
    tag: Tag,
    host_root: Arc<OwnedFd>,
    exports: Exports,
    devices: Shared<Identity, LoopDevice>,
}

impl Preparer {
    pub fn new(namespace: Arc<PrivateNamespace>, config: &Config) -> Result<Self> {
        Ok(Preparer {
            driver_name: config.driver_name.as_str().into(),
            tag: Tag::new(&config.driver_name),
            host_root: Arc::new(mount::open_directory(&config.host_root)?),
            exports: Exports::new(Arc::clone(&namespace)),
            devices: Shared::default(),
            namespace,
        })
    }

    /// Asks the servers and attaches the images of `spec`, innermost first.
    pub fn prepare<'a>(&'a self, spec: &'a Mount) -> Pin<Box<dyn Future<Output = Result<Prepared>> + Send + 'a>> {
        Box::pin(async move {
            Ok(match spec {
                Mount::Nfs(nfs) => {
                    Prepared::Nfs { mount: self.exports.get(&export(nfs)).await?, read_only: nfs.read_only }
                }
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

    async fn base(&self, base: &Base) -> Result<PreparedBase> {
        Ok(match base {
            Base::Root => PreparedBase::HostRoot(Arc::clone(&self.host_root)),
            // An image file is only read, whatever else the export is mounted for.
            Base::Mount(mount) => PreparedBase::Mount(Box::new(self.prepare(mount).await?)),
        })
    }

    /// The loop device of an image file, which is opened, and looked at, each time: its name may mean another file by now.
    async fn attach(&self, loopback: &Loopback, fs_type: FsType) -> Result<BlockDevice> {
        let base = self.base(&loopback.base).await?;
        let name = format!("{} ({fs_type}) of {}", loopback.path, describe(&loopback.base));
        let open = {
            let (base, path, namespace) = (base.clone(), loopback.path.clone(), Arc::clone(&self.namespace));
            move || {
                let base = match base {
                    PreparedBase::HostRoot(root) => OpenBase::HostRoot(root),
                    PreparedBase::Mount(mount) => match *mount {
                        Prepared::Nfs { mount, .. } => OpenBase::Nfs(mount),
                        other => OpenBase::Detached(build::build(&other, &namespace, None)?),
                    },
                };
                let image = Image::open(&base, &path, base.symlinks())?;
                image.check(&path, fs_type.as_str())?;
                Ok(image)
            }
        };
        let image: Result<Image> = blocking::run(format!("open image {name}"), open).await?;
        let image = image.map_err(|error| error.about(&format!("image {name}")))?;
        let tag = self.tag.clone();
        let identity = image.identity;
        let device = self.devices.get(&identity, async {
            Ok(blocking::run(format!("attach image {name}"), move || LoopDevice::of(&image, &tag)).await??)
        });
        Ok(BlockDevice::Loop { device: device.await?, _base: base })
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
