//! The attributes of a volume: a JSON `mount` object in `mountSpec`, or the flat form that covers one image on one
//! export, or on a file system that the node has mounted.

use std::collections::BTreeMap;

use super::error::{SpecError, quote, unknown};
use super::image_parameters::{CACHE, DIGEST, ImageParameters, PREFETCH, VERITY};
use super::mount_options::{self, MountOptions};
use super::parsed::{Form, Parsed};
use super::source::Source;
use super::{
    Attach, Base, Device, FsType, HOST_PATH, Loopback, MOUNT_SPEC, Mount, Nfs, NfsVersion, Overlay, Symlinks, Upper,
    UpperRoot, json, options, quantity, replicas, text,
};

/// The parameter that says whether symlinks are followed, in either form.
pub(super) const SYMLINKS: &str = "symlinks";
/// Its value for a volume whose path others than the admin had a say in.
pub(super) const REFUSE: &str = "refuse";

/// The parameter that names a container image in place of the image that was made of it.
pub(super) const SOURCE: &str = "source";

/// Every parameter, in the spelling that is documented. Other spellings that differ only in case are understood.
pub(super) const KNOWN: &[&str] = &[
    MOUNT_SPEC,
    "server",
    "share",
    HOST_PATH,
    "image",
    SOURCE,
    "fsType",
    "nfsVersion",
    "nfsOptions",
    "overlay",
    "overlaySize",
    "overlayUid",
    "overlayGid",
    "overlayMode",
    SYMLINKS,
    CACHE,
    DIGEST,
    VERITY,
    PREFETCH,
    mount_options::PARAMETER,
];

/// What says where an export is and how to mount it.
const OF_EXPORTS: &[&str] = &["server", "share", "nfsVersion", "nfsOptions"];

/// What says how a writable layer is made.
const OF_UPPERS: &[&str] = &["overlaySize", "overlayUid", "overlayGid", "overlayMode"];

pub(super) const BESIDE_IMAGE: &str = "stands beside \"image\": a volume names the one or the other";

/// What Kubernetes and its sidecars put beside our parameters.
const FOREIGN: &[&str] = &["csi.storage.k8s.io/", "storage.kubernetes.io/"];

/// Reads a volume's attributes and mount options. `attributes` is a map of strings, by reference.
///
/// Either `mountSpec` holds a JSON `mount` object, or the flat form is used: `server`, `share` and `image` (required, or else `source`, the
/// container image that it was made of; `server` may be several, separated by commas; `hostPath`, a directory of the node, in place of
/// `server` and `share`), `fsType` (`squashfs`), `nfsVersion` (`4.2`), `nfsOptions` (separated by commas), `overlay` (`none`, `directory` or
/// `tmpfs`), and for both `overlaySize` (a quantity) and `overlayUid`, `overlayGid` and `overlayMode` of the root directory. White space around flat values is dropped. In either form `symlinks` says
/// whether those in the path of an image or a directory below an export are followed: `follow` or `refuse`; `cache`
/// (`node` or `none`) whether its images are copied to the node; `digest` what the one image is, as `sha256:` and its sum; `verity` the root
/// hash by which the kernel verifies it; and `prefetch` (`learned`, `all` or `none`) what of its images is read ahead of their readers.
///
/// `mount_options` and the attribute `mountOptions` are one list in either form: options of nfs(5) for every NFS export
/// of the spec, and `noexec` for every image. They may repeat what an export says but not contradict it.
pub fn parse_attributes<'a>(
    attributes: impl IntoIterator<Item = (&'a String, &'a String)>,
    mount_options: &[String],
) -> Result<Parsed, SpecError> {
    let mut attributes = canonical(attributes, KNOWN)?;
    let mut mount_options = mount_options.to_vec();
    mount_options.extend(attributes.remove(mount_options::PARAMETER));
    let mount_options = mount_options::parse(&mount_options)?;
    let symlinks = match attributes.remove(SYMLINKS).as_deref() {
        Some("follow") if attributes.contains_key(HOST_PATH) => {
            return Err(invalid(SYMLINKS, "none is followed below \"hostPath\": leave it out, or say \"refuse\""));
        }
        None | Some("follow") => Symlinks::Follow,
        Some(REFUSE) => Symlinks::Refuse,
        Some(other) => return Err(invalid(SYMLINKS, unknown("value", other, &["follow", REFUSE]))),
    };
    let of_images = ImageParameters::take_from(&mut attributes)?;
    let parsed = match (attributes.remove(MOUNT_SPEC), attributes.keys().next()) {
        (None, _) => flat(&attributes, &mount_options),
        (Some(_), Some(key)) => Err(invalid(key, "stands beside \"mountSpec\": use one form or the other")),
        (Some(spec), None) => json::parse_with(&spec, &mount_options),
    };
    parsed?.with_symlinks(symlinks).with_image_parameters(of_images)
}

/// The parameters in the spelling of `known`, without those of Kubernetes.
pub(super) fn canonical<'a>(
    parameters: impl IntoIterator<Item = (&'a String, &'a String)>,
    known: &[&'static str],
) -> Result<BTreeMap<&'static str, String>, SpecError> {
    let mut canonical = BTreeMap::new();
    for (key, value) in parameters {
        if FOREIGN.iter().any(|prefix| key.starts_with(prefix)) {
            continue;
        }
        let Some(name) = known.iter().find(|name| name.eq_ignore_ascii_case(key)) else {
            return Err(invalid(key, unknown("parameter", key, known)));
        };
        if canonical.insert(*name, value.clone()).is_some() {
            return Err(invalid(name, "given twice, in spellings that differ only in case"));
        }
    }
    Ok(canonical)
}

fn flat(attributes: &BTreeMap<&str, String>, options: &MountOptions) -> Result<Parsed, SpecError> {
    let get = |name: &'static str| attributes.get(name).map(|value| value.trim());
    let need = |name: &'static str| {
        let missing =
            "is required: the flat form needs server and share, or hostPath, and image; else use \"mountSpec\"";
        get(name).filter(|value| !value.is_empty()).ok_or_else(|| invalid(name, missing))
    };
    let (directory, base) = match get(HOST_PATH) {
        Some(directory) => {
            if let Some(other) = OF_EXPORTS.iter().find(|name| attributes.contains_key(**name)) {
                let message = format!(
                    "stands beside {}: an image lies on an NFS export (server and share) or on a file system that the node has mounted \
                     (hostPath)",
                    quote(other)
                );
                return Err(invalid(HOST_PATH, message));
            }
            (text::absolute(directory).map_err(at(HOST_PATH))?, Base::Root)
        }
        None => {
            let nfs = nfs(need("server")?, need("share")?, attributes, options)?;
            (String::new(), Base::Mount(Box::new(Mount::Nfs(nfs))))
        }
    };
    let image = match (get("image"), get(SOURCE)) {
        (Some(_), Some(_)) => return Err(invalid(SOURCE, BESIDE_IMAGE)),
        (None, Some(source)) => Source::parse(source).map_err(at(SOURCE))?.image(),
        _ => text::relative(need("image")?).map_err(at("image"))?,
    };
    if image.is_empty() {
        return Err(invalid("image", "names no file: the path of the image below the share, or below \"hostPath\""));
    }
    let image = text::relative(&format!("{directory}/{image}")).map_err(at("image"))?;
    let image = Mount::Attach(Attach {
        fs_type: get("fsType").map_or(Ok(FsType::Squashfs), FsType::parse).map_err(at("fsType"))?,
        flags: options.flags,
        device: Device::Loopback(Loopback::new(image, base)),
    });
    let root = UpperRoot {
        uid: get("overlayUid").map(UpperRoot::parse_id).transpose().map_err(at("overlayUid"))?,
        gid: get("overlayGid").map(UpperRoot::parse_id).transpose().map_err(at("overlayGid"))?,
        mode: get("overlayMode").map(UpperRoot::parse_mode).transpose().map_err(at("overlayMode"))?,
    };
    let mount = match overlay(get("overlay"), get("overlaySize"))? {
        Upper::None => match OF_UPPERS.iter().find(|name| attributes.contains_key(**name)) {
            Some(name) => return Err(invalid(name, "is for \"overlay: directory\" or \"tmpfs\"")),
            None => image,
        },
        upper => Mount::Overlay(Overlay { lower: vec![image], upper, root }),
    };
    options.check_use(&mount)?;
    replicas::check(&mount).map_err(|error| Form::Flat.place(error))?;
    Ok(Parsed::new(mount, Vec::new(), Form::Flat))
}

fn nfs(
    server: &str,
    share: &str,
    attributes: &BTreeMap<&str, String>,
    options: &MountOptions,
) -> Result<Nfs, SpecError> {
    let get = |name: &'static str| attributes.get(name).map(|value| value.trim());
    let version = get("nfsVersion").map(NfsVersion::parse).transpose();
    let own: Result<_, String> =
        mount_options::list(get("nfsOptions").unwrap_or_default()).map(options::parse).collect();
    let (host, replicas) = replicas::hosts(server).map_err(at("server"))?;
    Ok(Nfs {
        host,
        replicas,
        one_of: Vec::new(),
        path: text::absolute(share).map_err(at("share"))?,
        read_only: true,
        version: version.and_then(|version| options.version_for(version)).map_err(at("nfsVersion"))?,
        options: own.and_then(|own| options.merge_into(own)).map_err(at("nfsOptions"))?,
    })
}

/// The container image by which a volume with these attributes names its image.
pub fn source_of<'a>(attributes: impl IntoIterator<Item = (&'a String, &'a String)>) -> Option<Source> {
    let (_, source) = attributes.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(SOURCE))?;
    Source::parse(source.trim()).ok()
}

fn overlay(kind: Option<&str>, size: Option<&str>) -> Result<Upper, SpecError> {
    match (kind, size) {
        (None | Some("none"), _) => Ok(Upper::None),
        (Some("directory"), None) => Ok(Upper::Directory { size: None }),
        (Some("directory"), Some(size)) => {
            quantity::bytes(size).and_then(Upper::directory_of).map_err(at("overlaySize"))
        }
        (Some("tmpfs"), Some(size)) => Ok(Upper::Tmpfs { size: quantity::bytes(size).map_err(at("overlaySize"))? }),
        (Some("tmpfs"), None) => {
            Err(invalid("overlaySize", "is required for a tmpfs: the most it may hold, such as 256Mi"))
        }
        (Some(other), _) => Err(invalid("overlay", unknown("value", other, &["none", "directory", "tmpfs"]))),
    }
}

fn at(name: &'static str) -> impl Fn(String) -> SpecError {
    move |message| invalid(name, message)
}

fn invalid(name: &str, message: impl AsRef<str>) -> SpecError {
    SpecError::invalid(name, "", message)
}

#[cfg(test)]
mod tests;
