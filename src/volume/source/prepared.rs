//! A spec whose servers were asked and whose images are attached: what is left to do needs this node alone.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::ahead::OfImage;
use super::mark::{Layer, Mark};
use super::nfs_mount::NfsMount;
use crate::blocking::{OffThread, measured};
use crate::error::Result;
use crate::kernel::device_mapper::{MultipathDevice, VerifiedDevice};
use crate::kernel::file_system::FileSystem;
use crate::kernel::image::{Content, ImageIdentity};
use crate::kernel::loop_device::{LoopDevice, Purpose};
use crate::kernel::mount::{DetachedMount, Symlinks};
use crate::kernel::verity::RootHash;
use crate::kernel::{self, Kernel, Subject};
use crate::lock::lock;
use crate::places::Places;
use crate::spec::Loopback;

/// A mount whose parts are held until this is dropped.
#[derive(Clone)]
pub enum Prepared {
    /// `directory` is relative to the mount; empty is its root.
    Nfs {
        mount: Arc<OffThread<NfsMount>>,
        directory: String,
        read_only: bool,
    },
    FileSystem {
        device: BlockDevice,
        file_system: FileSystem,
    },
    Bind {
        base: PreparedBase,
        path: String,
        symlinks: Symlinks,
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
    Loop(ImageOnLoop),
    Local(PathBuf),
}

/// An image file on a loop device.
#[derive(Clone)]
pub struct ImageOnLoop {
    /// The image as the spec names it.
    pub spec: Loopback,
    /// What the file was when it was attached.
    pub content: Content,
    pub attached: Arc<OffThread<AttachedImage>>,
}

/// Where an image comes from.
pub enum Origin {
    /// One for each server, kept so that the next image of the same export finds its NFS mount.
    Bases(Vec<PreparedBase>),
    /// A copy on this node: nobody is asked, and no export is needed any more.
    Copy,
    /// An earlier process attached it: nobody knows any more whom who reads in it asks.
    Earlier(Places),
}

/// An image of a spec, and which file it was when it was attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub image: Loopback,
    pub content: Content,
    pub key: ImageKey,
}

/// Which image is attached, and how: one that is verified shares nothing with one that is not, nor the whole with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey {
    pub identity: ImageIdentity,
    pub verity: Option<RootHash>,
    /// What is mounted is a part of the file; none that is verified is.
    pub is_sif: bool,
    /// Of an image that several servers have, the place in their list of the one whose file this is: its first path.
    pub server: Option<u8>,
}

impl ImageKey {
    /// What the loop device of the image is for.
    pub fn purpose(&self) -> Purpose {
        match (self.server, self.verity, self.is_sif) {
            (Some(server), verity, _) => Purpose::Path { server, verified: verity.is_some() },
            (None, Some(_), _) => Purpose::Verity,
            (None, None, true) => Purpose::Sif,
            (None, None, false) => Purpose::FileSystem,
        }
    }
}

/// What stands on the loop device of an image, and is mounted in its place.
pub enum Over {
    Verified(VerifiedDevice),
    /// Of several servers, which may have a verified device each, and the image that they have.
    Paths(MultipathDevice, Loopback),
}

impl Over {
    fn path(&self) -> &Path {
        match self {
            Over::Verified(device) => device.path(),
            Over::Paths(device, _) => device.path(),
        }
    }
}

/// An image on its loop device, and its file system mounted, attached nowhere: the superblock is read while its server answers,
/// and each further mount of it asks nobody.
pub struct AttachedImage {
    key: ImageKey,
    // Each is dropped before what it stands on.
    _mount: DetachedMount,
    over: Option<Over>,
    pub device: LoopDevice,
    /// What its file was when it was attached.
    pub content: Content,
    origin: Mutex<Origin>,
    pub ahead: OfImage,
}

impl AttachedImage {
    /// Finds or makes what verifies the device, and mounts its file system. May wait for the image's server where that is not mounted yet.
    pub fn new(
        kernel: &dyn Kernel,
        key: ImageKey,
        content: Content,
        device: LoopDevice,
        file_system: FileSystem,
        mark: &Mark,
        origin: Origin,
    ) -> kernel::Result<Self> {
        let ImageKey { identity, verity, .. } = key;
        let verify =
            |root: RootHash| measured("verity", || kernel.verified_device(&device, identity.size, &root, mark.tag()));
        let over = verity.map(verify).transpose()?.map(Over::Verified);
        AttachedImage::over(kernel, key, content, device, over, file_system, origin)
    }

    /// Mounts the file system of what stands on the device, or of the device itself.
    pub fn over(
        kernel: &dyn Kernel,
        key: ImageKey,
        content: Content,
        device: LoopDevice,
        over: Option<Over>,
        file_system: FileSystem,
        origin: Origin,
    ) -> kernel::Result<Self> {
        let path = path_of(over.as_ref(), &device);
        let mount = measured(file_system.kernel_name(), || kernel.mount(file_system.on(&path)))?;
        Ok(AttachedImage {
            key,
            _mount: mount,
            over,
            device,
            content,
            origin: Mutex::new(origin),
            ahead: OfImage::default(),
        })
    }

    pub fn key(&self) -> ImageKey {
        self.key
    }

    /// The image, if several servers have it.
    pub fn replicated(&self) -> Option<&Loopback> {
        match &self.over {
            Some(Over::Paths(_, image)) => Some(image),
            Some(Over::Verified(_)) | None => None,
        }
    }

    /// The device that is mounted.
    pub fn path(&self) -> PathBuf {
        path_of(self.over.as_ref(), &self.device)
    }

    /// From now on it comes from this server too.
    pub fn comes_from(&self, base: PreparedBase) {
        if let Origin::Bases(bases) = &mut *lock(&self.origin) {
            bases.push(base);
        }
    }

    /// From now on it is read from this node: lets go of what it came from.
    pub fn is_local_now(&self) {
        let before = std::mem::replace(&mut *lock(&self.origin), Origin::Copy);
        drop(before);
        self.ahead.end();
    }
}

fn path_of(over: Option<&Over>, device: &LoopDevice) -> PathBuf {
    over.map_or_else(|| device.path(), |over| over.path().to_owned())
}

#[derive(Clone)]
pub enum PreparedBase {
    HostRoot(Arc<OwnedFd>, Places),
    Mount(Box<Prepared>),
}

impl BlockDevice {
    pub fn path(&self) -> PathBuf {
        match self {
            BlockDevice::Loop(image) => image.attached.path(),
            BlockDevice::Local(path) => path.clone(),
        }
    }

    /// Whose affair it is when the device cannot be mounted: a spec names local devices, and nobody a loop device.
    pub fn subject(&self) -> Subject {
        match self {
            BlockDevice::Loop(_) => Subject::Node,
            BlockDevice::Local(_) => Subject::Image,
        }
    }
}

impl Prepared {
    /// Whether what is built without an upper layer is an image, or a directory of one: read-only by its superblock.
    pub fn is_image(&self) -> bool {
        match self {
            Prepared::FileSystem { .. } => true,
            Prepared::Bind { base: PreparedBase::Mount(base), .. } => base.is_image(),
            // One layer is mounted as it is.
            Prepared::Overlay { lower, .. } => lower.len() == 1 && lower[0].is_image(),
            Prepared::Bind { .. } | Prepared::Nfs { .. } => false,
        }
    }

    /// The images that are attached, each with what it was then; an image inside of another comes after it.
    pub fn images(&self) -> Vec<Known> {
        match self {
            Prepared::Nfs { .. } | Prepared::FileSystem { device: BlockDevice::Local(_), .. } => Vec::new(),
            Prepared::FileSystem { device: BlockDevice::Loop(image), .. } => {
                let mut images = match &*lock(&image.attached.origin) {
                    Origin::Bases(bases) => bases.iter().flat_map(PreparedBase::images).collect(),
                    Origin::Copy | Origin::Earlier(_) => Vec::new(),
                };
                images.push(Known { image: image.spec.clone(), content: image.content, key: image.attached.key });
                images
            }
            Prepared::Bind { base, .. } => base.images(),
            Prepared::Overlay { lower, .. } => lower.iter().flat_map(Prepared::images).collect(),
        }
    }

    /// The places of the servers that are asked by who reads below the mount.
    pub fn places(&self) -> Option<Places> {
        match self {
            Prepared::Nfs { mount, .. } => Some(mount.places().clone()),
            Prepared::FileSystem { device: BlockDevice::Loop(image), .. } => match &*lock(&image.attached.origin) {
                Origin::Bases(bases) => Places::of_all(bases.iter().filter_map(PreparedBase::places)),
                Origin::Copy => None,
                Origin::Earlier(places) => Some(places.clone()),
            },
            Prepared::Bind { base, .. } => base.places(),
            Prepared::FileSystem { device: BlockDevice::Local(_), .. } => None,
            Prepared::Overlay { lower, .. } => Places::of_all(lower.iter().filter_map(Prepared::places)),
        }
    }

    /// The places of the servers that are asked by [`super::build()`]: an image is mounted already, and a directory is looked for.
    pub fn places_to_build(&self) -> Option<Places> {
        match self {
            Prepared::Nfs { .. } | Prepared::Bind { .. } => self.places(),
            Prepared::FileSystem { .. } => None,
            Prepared::Overlay { lower, .. } => Places::of_all(lower.iter().filter_map(Prepared::places_to_build)),
        }
    }

    /// Asks the servers of what [`super::build()`] shows as it is.
    pub async fn probe(&self) -> Result<()> {
        for mount in self.exports_shown() {
            mount.probe().await?;
        }
        Ok(())
    }

    fn exports_shown(&self) -> Vec<&NfsMount> {
        match self {
            Prepared::Nfs { mount, .. } => vec![mount],
            Prepared::Bind { base: PreparedBase::Mount(base), .. } => base.exports_shown(),
            Prepared::Bind { base: PreparedBase::HostRoot(..), .. } | Prepared::FileSystem { .. } => Vec::new(),
            Prepared::Overlay { lower, .. } => lower.iter().flat_map(Prepared::exports_shown).collect(),
        }
    }

    /// What the mount is as a layer of an overlay.
    pub fn layer(&self) -> Layer {
        match self {
            Prepared::FileSystem { device: BlockDevice::Loop(image), .. } => {
                Layer::LoopDevice(image.attached.device.number())
            }
            Prepared::FileSystem { device: BlockDevice::Local(_), .. } => Layer::LocalDevice,
            Prepared::Nfs { .. } => Layer::Nfs,
            Prepared::Bind { .. } => Layer::Bind,
            Prepared::Overlay { .. } => Layer::Overlay,
        }
    }
}

impl PreparedBase {
    fn images(&self) -> Vec<Known> {
        match self {
            PreparedBase::Mount(mount) => mount.images(),
            PreparedBase::HostRoot(..) => Vec::new(),
        }
    }

    /// The places of whom is asked by who opens a file below this base.
    pub fn places(&self) -> Option<Places> {
        match self {
            PreparedBase::Mount(mount) => mount.places(),
            PreparedBase::HostRoot(_, places) => Some(places.clone()),
        }
    }
}
