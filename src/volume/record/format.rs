//! The text of a record, `volume.json`, which outlives the driver that wrote it.
//!
//! It has types of its own, so that neither the driver's other types nor what users may write change it. Each version that was ever
//! written is read for ever, and has its examples in `golden`: a change of what is written is a new version. Of a version that is
//! newer than the driver `version`, `volumeId` and `target` can be read; the first version had no `version`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::kernel::image::Content;
use crate::spec::{self, Symlinks, index};

/// What is written.
const VERSION: u32 = 10;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    /// Missing in 0.
    #[serde(default)]
    version: u32,
    volume_id: String,
    target: PathBuf,
    mount: Mount,
    read_only: bool,
    #[serde(default)]
    exclusive: bool,
    /// From version 2 on.
    #[serde(default)]
    namespace: Option<String>,
    #[serde(default)]
    scratch: Option<String>,
    /// Of version 0: the images' [`Loopback::content`], an image before the one that lies in it.
    #[serde(default, skip_serializing)]
    contents: Vec<Image>,
}

#[derive(Serialize, Deserialize)]
pub enum Mount {
    Attach {
        /// `sif` from version 7 on.
        fs_type: String,
        no_exec: bool,
        /// From version 9 on.
        #[serde(default)]
        no_suid: bool,
        /// From version 9 on.
        #[serde(default)]
        no_dev: bool,
        device: Device,
    },
    Bind {
        path: String,
        /// From version 2 on.
        #[serde(default)]
        refuse_symlinks: bool,
        base: Base,
        recursive: bool,
        read_only: bool,
    },
    Nfs {
        host: String,
        /// From version 8 on.
        #[serde(default)]
        replicas: Vec<String>,
        path: String,
        read_only: bool,
        version: NfsVersion,
        options: Vec<NfsOption>,
    },
    Overlay {
        lower: Vec<Mount>,
        upper: Upper,
        /// From version 10 on.
        #[serde(default)]
        root: UpperRoot,
    },
}

#[derive(Serialize, Deserialize)]
pub enum NfsVersion {
    V3,
    V4_0,
    V4_1,
    V4_2,
}

#[derive(Serialize, Deserialize)]
pub struct NfsOption {
    key: String,
    value: Option<String>,
}

#[derive(Serialize, Deserialize)]
pub enum Device {
    Loopback(Loopback),
    Local { path: String },
}

#[derive(Serialize, Deserialize)]
pub struct Loopback {
    path: String,
    /// From version 2 on.
    #[serde(default)]
    refuse_symlinks: bool,
    /// From version 3 on.
    #[serde(default)]
    cache: Option<Cache>,
    #[serde(default)]
    digest: Option<String>,
    /// From version 4 on.
    #[serde(default)]
    verity: Option<String>,
    /// From version 5 on.
    #[serde(default)]
    prefetch: Option<String>,
    base: Base,
    /// What the image was when it was attached.
    #[serde(default)]
    content: Option<Image>,
    /// From version 6 on: of an index, uppermost first.
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Serialize, Deserialize)]
pub struct Layer {
    /// Of a file beside the index.
    name: String,
    verity: Option<String>,
    content: Image,
}

#[derive(Serialize, Deserialize)]
pub enum Cache {
    Node,
    None,
}

#[derive(Serialize, Deserialize)]
pub enum Base {
    Root,
    Mount(Box<Mount>),
}

#[derive(Serialize, Deserialize)]
pub enum Upper {
    Directory,
    /// From version 2 on.
    SizedDirectory {
        size: u64,
    },
    Tmpfs {
        size: u64,
    },
    None,
}

#[derive(Default, Serialize, Deserialize)]
pub struct UpperRoot {
    uid: Option<u32>,
    gid: Option<u32>,
    mode: Option<u32>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Image {
    inode: u64,
    size: u64,
    modified: u64,
}

impl From<Content> for Image {
    fn from(Content { inode, size, modified }: Content) -> Self {
        Image { inode, size, modified }
    }
}

impl From<Image> for Content {
    fn from(Image { inode, size, modified }: Image) -> Self {
        Content { inode, size, modified }
    }
}

/// What can be said of a record of any version.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Head {
    version: u32,
    pub volume_id: Option<String>,
    pub target: Option<PathBuf>,
}

/// Why a record cannot be read, and what of it can.
#[derive(Debug)]
pub struct Failure {
    pub head: Head,
    pub why: String,
    /// It is no record of any version: nobody wrote it so.
    pub is_torn: bool,
}

pub type Images = Vec<(spec::Loopback, Content)>;

pub fn write(record: &Record) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec_pretty(&Text {
        version: VERSION,
        volume_id: record.volume_id.clone(),
        target: record.target.clone(),
        mount: Mount::of(&record.mount, &record.images),
        read_only: record.read_only,
        exclusive: record.exclusive,
        namespace: record.namespace.clone(),
        scratch: record.scratch.clone(),
        contents: Vec::new(),
    })
}

pub fn read(text: &[u8]) -> Result<Record, Failure> {
    let torn = |error: serde_json::Error| Failure { head: Head::default(), why: error.to_string(), is_torn: true };
    let head: Head = serde_json::from_slice(text).map_err(torn)?;
    if head.version > VERSION {
        let newer = head.version;
        let why = format!("it is of version {newer}, and this driver reads up to {VERSION}: a newer one wrote it");
        return Err(Failure { head, why, is_torn: false });
    }
    let record = serde_json::from_slice(text).map_err(|error| error.to_string()).and_then(Text::record);
    record.map_err(|why| Failure { head, why, is_torn: false })
}

impl Text {
    fn record(mut self) -> Result<Record, String> {
        self.mount.fill(&mut self.contents.into_iter());
        let mut images = Vec::new();
        Ok(Record {
            volume_id: self.volume_id,
            target: self.target,
            mount: self.mount.spec(&mut images)?,
            read_only: self.read_only,
            exclusive: self.exclusive,
            namespace: self.namespace,
            images,
            scratch: self.scratch,
        })
    }
}

impl Mount {
    pub fn of(mount: &spec::Mount, images: &Images) -> Mount {
        match mount {
            spec::Mount::Attach(spec::Attach { fs_type, flags, device }) => Mount::Attach {
                fs_type: fs_type.as_str().to_owned(),
                no_exec: flags.no_exec,
                no_suid: flags.no_suid,
                no_dev: flags.no_dev,
                device: match device {
                    spec::Device::Local { path } => Device::Local { path: path.clone() },
                    spec::Device::Loopback(image) => Device::Loopback(Loopback {
                        path: image.path.clone(),
                        refuse_symlinks: image.symlinks == Symlinks::Refuse,
                        cache: image.cache.map(|cache| match cache {
                            spec::Cache::Node => Cache::Node,
                            spec::Cache::None => Cache::None,
                        }),
                        digest: image.digest.map(|digest| digest.to_string()),
                        verity: image.verity.map(|verity| verity.to_string()),
                        prefetch: image.prefetch.map(|prefetch| prefetch.as_str().to_owned()),
                        base: Base::of(&image.base, images),
                        content: images.iter().find(|(other, _)| other == image).map(|(_, content)| (*content).into()),
                        layers: {
                            let layer = |(other, content): &(spec::Loopback, Content)| {
                                let index::Layer { name, verity } = image.named(other)?;
                                let verity = verity.map(|verity| verity.to_string());
                                Some(Layer { name, verity, content: (*content).into() })
                            };
                            images.iter().filter_map(layer).collect()
                        },
                    }),
                },
            },
            spec::Mount::Bind(spec::Bind { path, symlinks, base, recursive, read_only }) => Mount::Bind {
                path: path.clone(),
                refuse_symlinks: *symlinks == Symlinks::Refuse,
                base: Base::of(base, images),
                recursive: *recursive,
                read_only: *read_only,
            },
            spec::Mount::Nfs(spec::Nfs { host, replicas, path, read_only, version, options, one_of: _ }) => {
                Mount::Nfs {
                    host: host.clone(),
                    replicas: replicas.clone(),
                    path: path.clone(),
                    read_only: *read_only,
                    version: match version {
                        spec::NfsVersion::V3 => NfsVersion::V3,
                        spec::NfsVersion::V4_0 => NfsVersion::V4_0,
                        spec::NfsVersion::V4_1 => NfsVersion::V4_1,
                        spec::NfsVersion::V4_2 => NfsVersion::V4_2,
                    },
                    options: {
                        let option = |spec::NfsOption { key, value }: &spec::NfsOption| NfsOption {
                            key: key.clone(),
                            value: value.clone(),
                        };
                        options.iter().map(option).collect()
                    },
                }
            }
            spec::Mount::Overlay(spec::Overlay { lower, upper, root }) => Mount::Overlay {
                lower: lower.iter().map(|layer| Mount::of(layer, images)).collect(),
                upper: match upper {
                    spec::Upper::Directory { size: None } => Upper::Directory,
                    spec::Upper::Directory { size: Some(size) } => Upper::SizedDirectory { size: *size },
                    spec::Upper::Tmpfs { size } => Upper::Tmpfs { size: *size },
                    spec::Upper::None => Upper::None,
                },
                root: UpperRoot { uid: root.uid, gid: root.gid, mode: root.mode },
            },
        }
    }

    /// Gives each image the next of `contents`: as [`Text::contents`] are ordered.
    fn fill(&mut self, contents: &mut impl Iterator<Item = Image>) {
        match self {
            Mount::Attach { device: Device::Loopback(image), .. } => {
                image.base.fill(contents);
                image.content = image.content.or_else(|| contents.next());
            }
            Mount::Bind { base, .. } => base.fill(contents),
            Mount::Overlay { lower, .. } => lower.iter_mut().for_each(|layer| layer.fill(contents)),
            Mount::Attach { device: Device::Local { .. }, .. } | Mount::Nfs { .. } => {}
        }
    }

    pub fn spec(self, images: &mut Images) -> Result<spec::Mount, String> {
        Ok(match self {
            Mount::Attach { fs_type, no_exec, no_suid, no_dev, device } => spec::Mount::Attach(spec::Attach {
                fs_type: spec::FsType::parse(&fs_type)?,
                flags: spec::MountFlags { no_exec, no_suid, no_dev },
                device: match device {
                    Device::Local { path } => spec::Device::Local { path },
                    Device::Loopback(image) => {
                        let Loopback { path, refuse_symlinks, cache, digest, verity, prefetch, base, content, layers } =
                            image;
                        let cache = cache.map(|cache| match cache {
                            Cache::Node => spec::Cache::Node,
                            Cache::None => spec::Cache::None,
                        });
                        let digest = digest.map(|digest| spec::Digest::parse(&digest)).transpose()?;
                        let verity = verity.map(|verity| spec::Verity::parse(&verity)).transpose()?;
                        let prefetch = prefetch.map(|prefetch| spec::Prefetch::parse(&prefetch)).transpose()?;
                        let (symlinks, base) = (symlinks(refuse_symlinks), base.spec(images)?);
                        let image =
                            spec::Loopback { path, symlinks, cache, digest, verity, prefetch, index: None, base };
                        images.extend(content.map(|content| (image.clone(), content.into())));
                        for Layer { name, verity, content } in layers {
                            let verity = verity.map(|verity| spec::Verity::parse(&verity)).transpose()?;
                            images.push((image.layer(&index::Layer { name, verity }), content.into()));
                        }
                        spec::Device::Loopback(image)
                    }
                },
            }),
            Mount::Bind { path, refuse_symlinks, base, recursive, read_only } => {
                let (symlinks, base) = (symlinks(refuse_symlinks), base.spec(images)?);
                spec::Mount::Bind(spec::Bind { path, symlinks, base, recursive, read_only })
            }
            Mount::Nfs { host, replicas, path, read_only, version, options } => spec::Mount::Nfs(spec::Nfs {
                host,
                replicas,
                one_of: Vec::new(),
                path,
                read_only,
                version: match version {
                    NfsVersion::V3 => spec::NfsVersion::V3,
                    NfsVersion::V4_0 => spec::NfsVersion::V4_0,
                    NfsVersion::V4_1 => spec::NfsVersion::V4_1,
                    NfsVersion::V4_2 => spec::NfsVersion::V4_2,
                },
                options: options.into_iter().map(|NfsOption { key, value }| spec::NfsOption { key, value }).collect(),
            }),
            Mount::Overlay { lower, upper, root } => spec::Mount::Overlay(spec::Overlay {
                lower: lower.into_iter().map(|layer| layer.spec(images)).collect::<Result<_, _>>()?,
                upper: match upper {
                    Upper::Directory => spec::Upper::Directory { size: None },
                    Upper::SizedDirectory { size } => spec::Upper::Directory { size: Some(size) },
                    Upper::Tmpfs { size } => spec::Upper::Tmpfs { size },
                    Upper::None => spec::Upper::None,
                },
                root: spec::UpperRoot { uid: root.uid, gid: root.gid, mode: root.mode },
            }),
        })
    }
}

fn symlinks(refuse: bool) -> Symlinks {
    if refuse { Symlinks::Refuse } else { Symlinks::Follow }
}

impl Base {
    fn of(base: &spec::Base, images: &Images) -> Base {
        match base {
            spec::Base::Root => Base::Root,
            spec::Base::Mount(mount) => Base::Mount(Box::new(Mount::of(mount, images))),
        }
    }

    fn fill(&mut self, contents: &mut impl Iterator<Item = Image>) {
        match self {
            Base::Root => {}
            Base::Mount(mount) => mount.fill(contents),
        }
    }

    fn spec(self, images: &mut Images) -> Result<spec::Base, String> {
        Ok(match self {
            Base::Root => spec::Base::Root,
            Base::Mount(mount) => spec::Base::Mount(Box::new(mount.spec(images)?)),
        })
    }
}

#[cfg(test)]
mod tests;
