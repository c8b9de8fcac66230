//! From a spec to what it needs of the kernel: NFS mounts and loop devices, made where they are not there yet.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};

use futures_util::{StreamExt, TryStreamExt, stream};
use rustix::io::Errno;
use tokio::sync::Semaphore;

use super::ahead::Prefetcher;
use super::exports::Exports;
use super::mark::Mark;
use super::open_base::OpenBase;
use super::order::Order;
use super::paths::{Trials, Unanswered};
use super::prepared::{AttachedImage, BlockDevice, ImageKey, ImageOnLoop, Known, Origin, Prepared, PreparedBase};
use super::shared::Shared;
use crate::blocking::{OffThread, measured};
use crate::error::{Error, Kind, Result};
use crate::kernel::file_system::FileSystem;
use crate::kernel::image::{Content, Image};
use crate::kernel::mount::{Symlinks, open_directory};
use crate::kernel::nfs::{Export, Version};
use crate::kernel::verity::RootHash;
use crate::kernel::{self, Kernel};
use crate::places::{Places, run_at};
use crate::spec::policy::Policy;
use crate::spec::replicas::{RETRANS, TIMEO};
use crate::spec::{self, Allowed, Attach, Base, Device, FsType, Loopback, MAX_LOWER, Mount, Nfs, NfsVersion};
use crate::volume::cache::Cache;

/// How many layers of an image are attached at a time: the others wait, and leave others their turn with the server.
const LAYERS_AT_ONCE: usize = 4;

type Preparation<'a> = Pin<Box<dyn Future<Output = Result<Prepared>> + Send + 'a>>;

/// The images that are attached, by what the kernel says of their files.
pub(super) type Images = Shared<ImageKey, OffThread<AttachedImage>>;

/// Makes what is not there yet and finds what is.
pub struct Preparer {
    pub(super) kernel: Arc<dyn Kernel>,
    policy: Arc<Policy>,
    pub(super) mark: Mark,
    host_root: Arc<OwnedFd>,
    pub(super) exports: Arc<Exports>,
    pub(super) images: Arc<Images>,
    pub(super) cache: Arc<Cache>,
    pub(super) prefetcher: Arc<Prefetcher>,
    /// The servers whose copies are seen to, while that lives.
    pub(super) tending: Mutex<HashMap<String, Weak<()>>>,
    /// One at a time attaches an image of several servers, by its name.
    pub(super) attaching: Mutex<HashMap<String, Arc<Semaphore>>>,
    pub(super) trials: Mutex<Trials>,
    pub(super) unanswered: Mutex<Unanswered>,
    pub(super) order: Order,
}

/// What the driver is told of its node.
pub struct Node<'a> {
    /// Where its root directory is seen.
    pub host_root: &'a Path,
    /// How far NFS mounts read ahead, in KiB, if not as the kernel does.
    pub read_ahead: Option<u32>,
    /// Its zone, as the policy calls it.
    pub zone: Option<String>,
}

impl Preparer {
    pub fn new(
        kernel: Arc<dyn Kernel>,
        policy: Arc<Policy>,
        mark: Mark,
        node: Node,
        cache: Arc<Cache>,
        prefetcher: Prefetcher,
    ) -> Result<Self> {
        let host_root = Arc::new(open_directory(node.host_root)?);
        let order = Order::new(node.zone)?;
        let exports = Arc::new(Exports::new(Arc::clone(&kernel), Arc::clone(&policy), node.read_ahead));
        Ok(Preparer {
            kernel,
            policy,
            mark,
            host_root,
            exports,
            images: Arc::default(),
            cache,
            prefetcher: Arc::new(prefetcher),
            tending: Mutex::default(),
            attaching: Mutex::default(),
            trials: Mutex::default(),
            unanswered: Mutex::default(),
            order,
        })
    }

    /// What volumes may ask for.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Asks the servers and attaches the images of `spec`, innermost first. An image that is among `known` and still attached is taken as
    /// it is, and its server is not asked.
    pub async fn prepare(&self, spec: &Allowed, known: &[Known]) -> Result<Prepared> {
        self.mount(spec, known, false).await
    }

    /// `read_only` is that of what shows the mount: flags of a bind do not hold in a container, those of a superblock do.
    fn mount<'a>(&'a self, spec: &'a Mount, known: &'a [Known], read_only: bool) -> Preparation<'a> {
        Box::pin(async move {
            Ok(match spec {
                Mount::Nfs(nfs) => {
                    let mount = self.nfs(nfs, read_only || nfs.read_only).await?;
                    if let Prepared::Nfs { mount, .. } = &mount {
                        mount.check_read_only()?;
                    }
                    mount
                }
                Mount::Attach(attach) => {
                    let mut lower = self.attached(attach, known).await?;
                    match lower.len() {
                        1 => lower.remove(0),
                        _ => Prepared::Overlay { lower, source: self.mark.overlay_source() },
                    }
                }
                Mount::Bind(bind) => {
                    let read_only = read_only || bind.read_only;
                    let (base, path) = (self.base(&bind.base, known, read_only).await?, bind.path.clone());
                    let symlinks = symlinks(&bind.base, bind.symlinks);
                    Prepared::Bind { base, path, symlinks, recursive: bind.recursive, read_only }
                }
                Mount::Overlay(overlay) => {
                    let mut lower = Vec::with_capacity(overlay.lower.len());
                    for layer in &overlay.lower {
                        match layer {
                            Mount::Attach(attach) => lower.extend(self.attached(attach, known).await?),
                            _ => lower.push(self.mount(layer, known, true).await?),
                        }
                    }
                    if lower.len() > MAX_LOWER {
                        let layers = lower.len();
                        let message = format!(
                            "the overlay has {layers} layers with those of its indexes, and may have {MAX_LOWER}"
                        );
                        return Err(Error::new(Kind::FailedPrecondition, message));
                    }
                    Prepared::Overlay { lower, source: self.mark.overlay_source() }
                }
            })
        })
    }

    /// The file systems of an image, uppermost first: of one that is several, those of its layers.
    async fn attached(&self, attach: &Attach, known: &[Known]) -> Result<Vec<Prepared>> {
        let file_system = file_system(attach.fs_type);
        let images = match &attach.device {
            Device::Loopback(image) => self.layers(image, known).await?,
            Device::Local { path } => {
                let device = BlockDevice::Local(path.into());
                return Ok(vec![Prepared::FileSystem { device, file_system }]);
            }
        };
        let attach = |image: Loopback| async move {
            let device = BlockDevice::Loop(self.image(&image, known, file_system).await?);
            Ok(Prepared::FileSystem { device, file_system })
        };
        stream::iter(images.into_iter().map(attach)).buffered(LAYERS_AT_ONCE).try_collect().await
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
        let mut options: Vec<_> = nfs.options.iter().map(|option| (option.key.clone(), option.value.clone())).collect();
        // One that does not answer is given up in seconds: there is another.
        if !nfs.one_of.is_empty() {
            let number = |number: u32| Some(number.to_string());
            let impatient = [("softerr", None), ("timeo", number(TIMEO)), ("retrans", number(RETRANS))];
            let missing = impatient.into_iter().filter(|(key, _)| nfs.options.iter().all(|option| option.key != *key));
            options.extend(missing.map(|(key, value)| (key.to_owned(), value)));
        }
        let export = Export {
            host: nfs.host.clone(),
            path: path.to_owned(),
            version: version(nfs.version),
            read_only: nfs.read_only,
            options,
            one_of: nfs.one_of.clone(),
        };
        (export, directory.to_owned())
    }

    /// That which images on it are opened on.
    pub(super) fn image_export(&self, nfs: &Nfs) -> Export {
        Export { read_only: true, ..self.export(nfs).0 }
    }

    async fn base(&self, base: &Base, known: &[Known], read_only: bool) -> Result<PreparedBase> {
        Ok(match base {
            Base::Root => PreparedBase::HostRoot(Arc::clone(&self.host_root), self.exports.places_of_the_node()),
            Base::Mount(mount) => PreparedBase::Mount(Box::new(self.mount(mount, known, read_only).await?)),
        })
    }

    /// The base of an image file, which is only read: an export is mounted once for images, whether its spec says `ro` or not.
    async fn image_base(&self, base: &Base, known: &[Known]) -> Result<PreparedBase> {
        match base {
            Base::Mount(mount) => match &**mount {
                Mount::Nfs(nfs) => Ok(PreparedBase::Mount(Box::new(self.nfs(nfs, true).await?))),
                Mount::Attach(_) | Mount::Bind(_) | Mount::Overlay(_) => self.base(base, known, true).await,
            },
            Base::Root => self.base(base, known, true).await,
        }
    }

    /// The loop device of an image file, which is opened, and looked at, each time: its name may mean another file by now.
    async fn image(&self, spec: &Loopback, known: &[Known], file_system: FileSystem) -> Result<ImageOnLoop> {
        if let Some(known) = known.iter().find(|known| known.image == *spec)
            && let Some(attached) = self.still_attached(known, file_system).await?
        {
            return Ok(ImageOnLoop { spec: spec.clone(), content: known.content, attached });
        }
        if spec.is_replicated() {
            return self.replicated(spec, known, file_system).await;
        }
        let copied = self.copied(spec)?;
        let opened = self.open_image(spec, known, Some(file_system));
        if let Some(name) = copied {
            return self.image_or_copy(spec, name, opened, file_system).await;
        }
        let (base, image) = opened.await?;
        let (content, root) = (image.content, self.root_hash(spec, Some(&base)).await?);
        let to_prefetch = self.to_prefetch(spec, &base, &image)?;
        let attached = self.attach(spec, image, root, file_system, Origin::Bases(vec![base.clone()])).await?;
        if let Some(to_prefetch) = to_prefetch {
            self.prefetch(to_prefetch, &attached);
        }
        Ok(ImageOnLoop { spec: spec.clone(), content, attached })
    }

    /// Opens an image on its base, and looks whether it is one of this file system.
    pub(super) async fn open_image(
        &self,
        spec: &Loopback,
        known: &[Known],
        file_system: Option<FileSystem>,
    ) -> Result<(PreparedBase, OffThread<Image>)> {
        match self.open_once(spec, known, file_system).await {
            // The file system that was exported when it was mounted is there no more.
            Err(error) if error.errno() == Some(Errno::STALE) => {
                let Some(nfs) = spec.base.export() else { return Err(error) };
                self.exports.forget(&self.image_export(nfs));
                self.open_once(spec, known, file_system).await
            }
            opened => opened,
        }
    }

    async fn open_once(
        &self,
        spec: &Loopback,
        known: &[Known],
        file_system: Option<FileSystem>,
    ) -> Result<(PreparedBase, OffThread<Image>)> {
        let base = self.image_base(&spec.base, known).await?;
        let name = of_base(spec, file_system);
        let (path, symlinks, sealed) = (spec.path.clone(), symlinks(&spec.base, spec.symlinks), spec.verity.is_some());
        let image = self.below(&base, format!("open image {name}"), move |base| {
            measured("image", || {
                let image = base.open_image(&path, symlinks)?;
                if let Some(file_system) = file_system {
                    image.check(&path, file_system, sealed)?;
                }
                Ok(OffThread::new(image))
            })
        });
        let image = image.await.map_err(|error| error.about(&format!("image {name}")))?;
        Ok((base, image))
    }

    /// Attaches an open image to a loop device, and mounts it out of sight.
    pub(super) async fn attach(
        &self,
        spec: &Loopback,
        image: OffThread<Image>,
        root: Option<RootHash>,
        file_system: FileSystem,
        origin: Origin,
    ) -> Result<Arc<OffThread<AttachedImage>>> {
        let places = match &origin {
            Origin::Bases(bases) => Places::of_all(bases.iter().filter_map(PreparedBase::places)),
            Origin::Earlier(places) => Some(places.clone()),
            Origin::Copy => None,
        };
        let name = of_base(spec, Some(file_system));
        let (identity, is_sif, content) = (image.identity, file_system == FileSystem::Sif, image.content);
        let key = ImageKey { identity, verity: root, is_sif, server: None };
        let (kernel, mark, step) = (Arc::clone(&self.kernel), self.mark.clone(), format!("attach image {name}"));
        let attach = move || {
            let device = measured("loop", || kernel.loop_device(&image, key.purpose(), mark.tag()))?;
            let attached = AttachedImage::new(&*kernel, key, content, device, file_system, &mark, origin)?;
            Ok::<_, kernel::Error>(OffThread::new(attached))
        };
        let admitted = self.exports.admit(&step).await;
        let make = async move {
            let _admitted = admitted;
            run_at(places, step, attach).await
        };
        let attached = self.images.get(&key, make).await;
        attached.map_err(|error| error.about(&format!("image {name}")))
    }

    /// Asks the servers of the exports that a mount shows as they are, and returns their places: whoever looks at the mount may wait for
    /// them. `None` where images are all that is shown.
    pub async fn probe_shown(&self, mount: &Allowed) -> Result<Option<Places>> {
        let mut places = Vec::new();
        for (nfs, read_only) in mount.exports_shown() {
            let export = Export { read_only, ..self.export(nfs).0 };
            places.push(self.exports.get(&export).await?.places().clone());
        }
        Ok(Places::of_all(places))
    }

    /// What an image of an allowed mount is now, for comparison with what was attached. Its server may answer or not.
    pub async fn look_at(&self, spec: &Loopback) -> Result<Content> {
        Ok(self.open_image(spec, &[], None).await?.1.content)
    }

    /// Runs `work` with the open base, on a thread that may wait for the base's server.
    pub(super) async fn below<T: Send + 'static>(
        &self,
        base: &PreparedBase,
        step: String,
        work: impl FnOnce(&OpenBase) -> kernel::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (kernel, base, places) = (Arc::clone(&self.kernel), base.clone(), base.places());
        let work = move || work(&OpenBase::new(base, &*kernel)?);
        run_at(places, step, work).await
    }
}

/// An image in the words of steps and errors: `image.sqsh (squashfs) of 10.0.0.5:/images`.
fn of_base(spec: &Loopback, file_system: Option<FileSystem>) -> String {
    let file_system = file_system.map_or(String::new(), |file_system| format!(" ({})", file_system.name()));
    format!("{}{file_system} of {}", spec.path, spec.base)
}

pub(super) fn symlinks(base: &Base, asked: spec::Symlinks) -> Symlinks {
    match (base, asked) {
        // The admin's policy compares paths of the node as text, which is true only where no symlink is followed.
        (Base::Root, _) | (Base::Mount(_), spec::Symlinks::Refuse) => Symlinks::Refused,
        (Base::Mount(_), spec::Symlinks::Follow) => Symlinks::Inside,
    }
}

fn file_system(fs_type: FsType) -> FileSystem {
    match fs_type {
        FsType::Squashfs => FileSystem::Squashfs,
        FsType::Erofs => FileSystem::Erofs,
        FsType::Ext4 => FileSystem::Ext4,
        FsType::Xfs => FileSystem::Xfs,
        FsType::Sif => FileSystem::Sif,
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
