//! The JSON forms, field by field, as serde reads them. The JSON schema is generated from these types, so their
//! comments are its descriptions. What they cannot say, such as what a host may look like, [`super::json`] checks.

use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::FsType;
use super::read::{Object, Reference, word, words};

/// A field whose value does not matter.
type Ignored = Option<IgnoredAny>;

/// What to mount: a kind, and the object of that name.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_mount)]
pub(super) struct Mount {
    #[serde(deserialize_with = "word")]
    pub kind: MountKind,
    /// A file system on a block device, always mounted read-only.
    pub attach: Option<Object<MountAttach>>,
    /// A directory of another mount, or of the node.
    pub bind: Option<Object<MountBind>>,
    /// An NFS export as it is.
    pub nfs: Option<Object<MountNfs>>,
    /// Layers. Only allowed as the outermost mount.
    pub overlay: Option<Object<MountOverlay>>,
    #[schemars(skip)]
    #[serde(rename = "id")]
    pub _id: Option<Reference>,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub mountpoint: Ignored,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub refs: Ignored,
}

#[derive(Clone, Copy, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum MountKind {
    Attach,
    Bind,
    Nfs,
    Overlay,
}

/// A file system on a block device.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MountAttach {
    #[serde(deserialize_with = "word")]
    pub fs_type: FsType,
    /// `noexec`, `nosuid` and `nodev` are set where asked for. The others hold anyway: `ro` always, and a read-only file system
    /// keeps no access times.
    #[serde(default, deserialize_with = "words")]
    pub mount_options: Vec<AttachOption>,
    pub attach: Object<Device>,
}

#[derive(Clone, Copy, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum AttachOption {
    Ro,
    NoSuid,
    NoDev,
    NoExec,
    NoAtime,
    NoDirAtime,
    RelAtime,
    Loop,
}

/// What provides the blocks: a kind, and the object of that name.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = one_device)]
pub(super) struct Device {
    #[serde(deserialize_with = "word")]
    pub kind: DeviceKind,
    /// An image file behind a loop device.
    pub loopback: Option<Object<Loopback>>,
    /// A block device of the node.
    pub local: Option<Object<Local>>,
    #[schemars(skip)]
    #[serde(rename = "id")]
    pub _id: Option<Reference>,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub device_file: Ignored,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub refs: Ignored,
}

#[derive(Clone, Copy, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum DeviceKind {
    Loopback,
    Local,
}

/// An image file.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = base_mount)]
pub(super) struct Loopback {
    /// The file, relative to the base; a leading slash means the base. No `..`.
    #[schemars(length(min = 1, max = 4095))]
    pub path: String,
    #[serde(deserialize_with = "word")]
    pub base: Base,
    /// The mount that holds the file, for the base `mount`.
    pub mount: Option<Box<Object<Mount>>>,
    /// Partition tables are not read.
    #[serde(default, rename = "readPartitions")]
    #[schemars(extend("const" = false))]
    pub read_partitions: bool,
    /// The root hash of the image's hash tree, by which the kernel verifies each block of it; or `signed`.
    #[schemars(with = "Option<String>", extend("pattern" = "^([0-9a-fA-F]{64}|signed)$"))]
    pub verity: Option<String>,
}

/// Where a path starts: in another mount, or at the root directory of the node (which the admin's policy must allow).
#[derive(Clone, Copy, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(super) enum Base {
    Mount,
    Root,
}

/// A block device of the node, which the admin's policy must allow.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Local {
    /// A path below /dev, without `..`.
    #[schemars(length(max = 4095), extend("pattern" = "^/dev/"))]
    pub path: String,
}

/// A directory, bind-mounted.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = base_mount)]
pub(super) struct MountBind {
    /// The directory, relative to the base; a leading slash means the base. No `..`.
    #[schemars(length(max = 4095))]
    pub path: String,
    #[serde(deserialize_with = "word")]
    pub base: Base,
    /// Take the mounts below the directory along.
    #[serde(default)]
    pub recursive: bool,
    /// A directory of the node, and one of an image, is read-only in any case.
    #[serde(default)]
    pub ro: bool,
    /// The mount that holds the directory, for the base `mount`.
    pub mount: Option<Box<Object<Mount>>>,
}

/// An NFS export.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MountNfs {
    /// A host name, an IPv4 address or an IPv6 address. Of the export that an image lies on up to eight, separated by commas: servers
    /// that hold the same image.
    #[schemars(length(min = 1, max = super::replicas::MAX_TEXT))]
    pub host: String,
    /// The exported directory: absolute, without `..`.
    #[schemars(length(max = 4095), extend("pattern" = "^/"))]
    pub path: String,
    #[serde(default)]
    pub ro: bool,
    /// The NFS version; `4` is the newest minor version.
    #[schemars(extend("enum" = ["3", "4", "4.0", "4.1", "4.2", null], "default" = "4.2"))]
    pub version: Option<String>,
    /// Options of nfs(5), one in each string: `hard`, `timeo=600`. Not `vers`, `addr` and `clientaddr`.
    #[serde(default)]
    pub options: Vec<String>,
}

/// Layers of directories, and what takes the writes.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MountOverlay {
    /// The layers, uppermost first.
    #[schemars(length(min = 1, max = super::MAX_LOWER))]
    pub lower: Vec<Object<Mount>>,
    /// The writable layer: a directory on the node's disk unless said otherwise. Not part of the ImageAPI.
    pub upper: Option<Object<Upper>>,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub upperdir: Ignored,
    /// Returned by the ImageAPI; ignored here.
    #[schemars(with = "Option<Value>", extend("readOnly" = true))]
    pub workdir: Ignored,
}

/// The writable layer of an overlay; it ends with the published path.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = upper)]
pub(super) struct Upper {
    #[serde(deserialize_with = "word")]
    pub kind: UpperKind,
    /// The most that it may hold: a Kubernetes quantity, such as `256Mi`. Required of a tmpfs; of a directory at least `16Mi`.
    pub size: Option<String>,
    /// The user whom its root directory belongs to; that of the uppermost layer's unless said otherwise.
    #[schemars(range(max = 4_294_967_294_u32))]
    pub uid: Option<u32>,
    /// The group; the `fsGroup` of a pod takes its place.
    #[schemars(range(max = 4_294_967_294_u32))]
    pub gid: Option<u32>,
    /// Who may do what there: up to four octal digits, such as `0770`.
    #[schemars(extend("pattern" = "^0?[0-7]{1,4}$"))]
    pub mode: Option<String>,
}

/// A directory on the node's disk, memory, or none: then the overlay is read-only.
#[derive(Clone, Copy, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(super) enum UpperKind {
    Directory,
    Tmpfs,
    None,
}

fn one_mount(schema: &mut Schema) {
    one_object(schema, &["attach", "bind", "nfs", "overlay"]);
}

fn one_device(schema: &mut Schema) {
    one_object(schema, &["loopback", "local"]);
}

/// The object that `kind` names must be there, and no other.
fn one_object(schema: &mut Schema, kinds: &[&str]) {
    let branch = |kind: &&str| {
        let object = |name: &&str| {
            let only = if name == kind { "object" } else { "null" };
            ((*name).to_owned(), json!({ "type": only }))
        };
        let mut properties: serde_json::Map<String, Value> = kinds.iter().map(object).collect();
        properties.insert("kind".to_owned(), json!({ "const": kind }));
        json!({ "properties": properties, "required": [kind] })
    };
    schema.insert("oneOf".to_owned(), kinds.iter().map(branch).collect());
}

/// The base `mount` needs a mount, the base `root` none.
fn base_mount(schema: &mut Schema) {
    let branches = json!([
        {
            "properties": { "base": { "const": "mount" }, "mount": { "type": "object" } },
            "required": ["mount"],
        },
        { "properties": { "base": { "const": "root" }, "mount": { "type": "null" } } },
    ]);
    schema.insert("oneOf".to_owned(), branches);
}

/// A tmpfs needs a size, a directory may have one; and what is not there has nothing.
fn upper(schema: &mut Schema) {
    let branches = json!([
        {
            "properties": { "kind": { "const": "tmpfs" }, "size": { "type": "string" } },
            "required": ["size"],
        },
        { "properties": { "kind": { "const": "directory" } } },
        { "properties": {
            "kind": { "const": "none" }, "size": { "type": "null" }, "uid": { "type": "null" }, "gid": { "type": "null" },
            "mode": { "type": "null" },
        } },
    ]);
    schema.insert("oneOf".to_owned(), branches);
}
