//! What a user may ask for: the typed mount spec, and the texts it is read from. Pure: nothing here does I/O.
//!
//! A volume names its mount in one of two forms: the JSON `mount` object of the Kraken ImageAPI ([`json`]) or flat
//! parameters ([`parameters`]). Both become the same [`Mount`]; the admin's [`policy`] then says whether it is allowed.

pub mod error;
mod image_parameters;
pub mod index;
pub mod json;
pub mod location;
mod mount_options;
pub mod naming;
pub mod options;
pub mod parameters;
mod parsed;
mod pattern;
pub mod plan;
pub mod policy;
pub mod quantity;
mod read;
pub mod replicas;
pub mod schema;
pub mod source;
pub mod template;
mod text;
mod tree;
mod upper;
mod wire;

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use error::SpecError;
pub use image_parameters::{Cache, Digest, Prefetch, Verity};
pub use parsed::{Allowed, Parsed};
pub use read::yaml_value;
pub use upper::{Upper, UpperRoot};

/// The parameter that holds a JSON `mount` object.
pub const MOUNT_SPEC: &str = "mountSpec";
/// The parameter that names a directory of the node in place of a server and its share.
const HOST_PATH: &str = "hostPath";
/// The deepest nesting of mounts accepted in one spec.
pub const MAX_DEPTH: usize = 8;
/// The most lower layers accepted in one overlay: their names must fit into one mount option of 256 bytes.
pub const MAX_LOWER: usize = 20;

/// One mount of a spec. The tree is owned: every nested mount belongs to exactly one parent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Mount {
    /// A file system on a block device.
    Attach(Attach),
    /// A directory of another mount, or of the host.
    Bind(Bind),
    /// An NFS export as it is.
    Nfs(Nfs),
    /// Layers, uppermost first, with or without a writable layer on top.
    Overlay(Overlay),
}

/// An NFS export and how to mount it (nfs(5)).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Nfs {
    /// A host name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// Further servers that hold the same image, in the order in which they are asked: see [`replicas`].
    pub replicas: Vec<String>,
    /// The list that this server was taken from, where that has several; no spec says so.
    pub one_of: Vec<String>,
    /// The exported path: absolute, without `..`.
    pub path: String,
    pub read_only: bool,
    pub version: NfsVersion,
    /// Options of nfs(5), each checked to be one known option; never `vers`, `addr` or `clientaddr`.
    pub options: Vec<NfsOption>,
}

/// As mount(8) writes it: `192.168.3.253:/images`, `[fd00::2]:/images`; of several servers `a,b:/images`.
impl fmt::Display for Nfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, host) in self.hosts().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            match host.contains(':') {
                true => write!(f, "{comma}[{host}]")?,
                false => write!(f, "{comma}{host}")?,
            }
        }
        write!(f, ":{}", self.path)
    }
}

/// The NFS protocol versions that Linux speaks.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NfsVersion {
    #[serde(rename = "3")]
    V3,
    #[serde(rename = "4.0")]
    V4_0,
    #[serde(rename = "4.1")]
    V4_1,
    #[default]
    #[serde(rename = "4.2")]
    V4_2,
}

impl NfsVersion {
    pub const ALL: [NfsVersion; 4] = [NfsVersion::V3, NfsVersion::V4_0, NfsVersion::V4_1, NfsVersion::V4_2];

    /// The value of the kernel's `vers=` option.
    pub fn as_str(self) -> &'static str {
        match self {
            NfsVersion::V3 => "3",
            NfsVersion::V4_0 => "4.0",
            NfsVersion::V4_1 => "4.1",
            NfsVersion::V4_2 => "4.2",
        }
    }

    /// Reads a version as a user writes it. `4` is the newest minor version, as in nfs(5); it is not negotiated down.
    pub fn parse(text: &str) -> Result<NfsVersion, String> {
        match text {
            "3" => Ok(NfsVersion::V3),
            "4.0" => Ok(NfsVersion::V4_0),
            "4.1" => Ok(NfsVersion::V4_1),
            "4.2" | "4" => Ok(NfsVersion::V4_2),
            _ => {
                let given = error::quote(text);
                Err(format!("{given} is not a version of NFS: one of 3, 4.0, 4.1, 4.2"))
            }
        }
    }
}

impl fmt::Display for NfsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One option of nfs(5): `hard`, or `timeo=600`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NfsOption {
    pub key: String,
    pub value: Option<String>,
}

impl fmt::Display for NfsOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={}", self.key, value),
            None => f.write_str(&self.key),
        }
    }
}

/// A file system, always mounted read-only, and the device that holds it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attach {
    pub fs_type: FsType,
    pub flags: MountFlags,
    pub device: Device,
}

/// What the mount options of an image take from who uses it. Without them its mount has none of these flags: what a container's user
/// namespace locks, its runtime could not mount otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MountFlags {
    /// `noexec`
    pub no_exec: bool,
    /// `nosuid`
    pub no_suid: bool,
    /// `nodev`
    pub no_dev: bool,
}

impl MountFlags {
    /// Those that one of both has.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        MountFlags {
            no_exec: self.no_exec || other.no_exec,
            no_suid: self.no_suid || other.no_suid,
            no_dev: self.no_dev || other.no_dev,
        }
    }

    /// As mount(8) spells them.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        let all = [(self.no_suid, "nosuid"), (self.no_dev, "nodev"), (self.no_exec, "noexec")];
        all.into_iter().filter_map(|(is_set, word)| is_set.then_some(word))
    }
}

/// The file systems an image may hold, `sif` being a squashfs in an image of Apptainer.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, Eq, Hash, JsonSchema, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    Squashfs,
    Erofs,
    Ext4,
    Xfs,
    Sif,
}

impl FsType {
    pub const ALL: [FsType; 5] = [FsType::Squashfs, FsType::Erofs, FsType::Ext4, FsType::Xfs, FsType::Sif];

    /// The kernel's name of the file system, or that of the format which has it inside.
    pub fn as_str(self) -> &'static str {
        match self {
            FsType::Squashfs => "squashfs",
            FsType::Erofs => "erofs",
            FsType::Ext4 => "ext4",
            FsType::Xfs => "xfs",
            FsType::Sif => "sif",
        }
    }

    /// Reads what [`Self::as_str`] writes.
    pub fn parse(text: &str) -> Result<FsType, String> {
        let known = FsType::ALL.map(FsType::as_str);
        let found = FsType::ALL.into_iter().find(|fs_type| fs_type.as_str() == text);
        found.ok_or_else(|| error::unknown("file system", text, &known))
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What provides the blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// A regular file behind a loop device.
    Loopback(Loopback),
    /// A block device of the node, by absolute path.
    Local { path: String },
}

/// An image file: `path` below `base`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Loopback {
    /// Relative to the base, without a leading slash.
    pub path: String,
    pub symlinks: Symlinks,
    /// `None` leaves it to the node.
    pub cache: Option<Cache>,
    /// What its bytes must be.
    pub digest: Option<Digest>,
    /// By what the kernel verifies them.
    pub verity: Option<Verity>,
    /// `None` is [`Prefetch::Learned`].
    pub prefetch: Option<Prefetch>,
    /// The path of the index that named it, of a layer; no spec names one.
    pub index: Option<String>,
    pub base: Base,
}

impl Loopback {
    /// Whether it is several images, which the file of this name names: see [`index`].
    pub fn is_index(&self) -> bool {
        self.path.ends_with(index::ENDING)
    }

    /// A layer that this index names.
    pub fn layer(&self, layer: &index::Layer) -> Loopback {
        let index::Layer { name, verity } = layer;
        let directory = self.path.rfind('/').map_or("", |at| &self.path[..=at]);
        Loopback { path: format!("{directory}{name}"), verity: *verity, index: Some(self.path.clone()), ..self.clone() }
    }

    /// What this index named an image by, if it did.
    pub fn named(&self, image: &Loopback) -> Option<index::Layer> {
        let name = image.path.rsplit('/').next()?.to_owned();
        let layer = index::Layer { name, verity: image.verity };
        (self.layer(&layer) == *image).then_some(layer)
    }

    /// One that says no more of the file than where it is.
    pub fn new(path: String, base: Base) -> Loopback {
        let (cache, digest, verity, prefetch, index) = (None, None, None, None, None);
        Loopback { path, symlinks: Symlinks::Follow, cache, digest, verity, prefetch, index, base }
    }
}

/// Whether the path of an image or a directory may go through symlinks below its base. They never lead out of it, and below the node's
/// root directory none is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Symlinks {
    #[default]
    Follow,
    Refuse,
}

/// Where a path starts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Base {
    /// The node's own root directory.
    Root,
    /// Another mount.
    Mount(Box<Mount>),
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Base::Root => f.write_str("the node's root directory"),
            Base::Mount(mount) => match &**mount {
                Mount::Nfs(nfs) => nfs.fmt(f),
                Mount::Attach(_) => f.write_str("another image"),
                Mount::Bind(_) => f.write_str("a bound directory"),
                Mount::Overlay(_) => f.write_str("an overlay"),
            },
        }
    }
}

/// A directory `path` below `base`, bind-mounted. One of the node is read-only, whatever `read_only` says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bind {
    /// Relative to the base, without a leading slash; empty means the base itself.
    pub path: String,
    pub symlinks: Symlinks,
    pub base: Base,
    pub recursive: bool,
    pub read_only: bool,
}

/// Layers of directories (Documentation/filesystems/overlayfs.rst).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Overlay {
    /// Uppermost first; never empty, at most [`MAX_LOWER`].
    pub lower: Vec<Mount>,
    pub upper: Upper,
    pub root: UpperRoot,
}

#[cfg(test)]
mod tests;
