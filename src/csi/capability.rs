//! What a volume can be used for, and the checks that every request shares.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::v1::VolumeCapability;
use super::v1::volume_capability::AccessType;
use super::v1::volume_capability::access_mode::Mode;
use crate::error::{Error, Kind, Result};
use crate::spec::{Mount, Parsed, parameters};

/// The key by which the kubelet marks an inline volume (podInfoOnMount).
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

/// Reads a volume's attributes and the mount options of its capability into a spec.
pub fn spec_of(context: &HashMap<String, String>, capability: &VolumeCapability) -> Result<Parsed> {
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return Err(invalid("volume_capability: block access is not supported: an image is a file system"));
        }
        None => return Err(invalid("volume_capability: an access type is required")),
    };
    let parsed = parameters::parse_attributes(context, &mount.mount_flags)?;
    check_fs_type(parsed.mount(), &mount.fs_type)?;
    for warning in parsed.warnings() {
        tracing::warn!("{warning}");
    }
    Ok(parsed)
}

/// Where a volume names what its image was made of, and that is not there, what would make it: nodes make none.
pub fn with_source(error: Error, context: &HashMap<String, String>) -> Error {
    match parameters::source_of(context) {
        Some(source) if error.kind == Kind::NotFound => {
            let name = source.image_name();
            let make = format!("csi-driver-squashfs-build {source} --name {name} --to DIRECTORY");
            Error::new(
                Kind::NotFound,
                format!("{error}: where the share is mounted as DIRECTORY, this makes it: {make}"),
            )
        }
        _ => error,
    }
}

/// A PersistentVolume's `fsType`, or that of a StorageClass, may repeat what the attributes say, and not contradict it.
fn check_fs_type(mount: &Mount, fs_type: &str) -> Result<()> {
    let known = mount.fs_types();
    if fs_type.is_empty() || known.iter().any(|known| known.as_str() == fs_type) {
        return Ok(());
    }
    let known: Vec<_> = known.iter().map(|known| known.as_str()).collect();
    let known = if known.is_empty() { "no image at all".to_owned() } else { known.join(", ") };
    let message = "is not what the volume's attributes name: leave it out, or name the file system of the image there";
    Err(invalid(&format!("volume_capability: fs_type {fs_type:?} {message} (they name {known})")))
}

/// A volume that takes no writes offers no mode that promises them, unless `any` mode will do: that of an inline volume, for all of
/// which the kubelet names a writer's mode, and of a read-only publish.
pub fn check_access_mode(mount: &Mount, capability: &VolumeCapability, any: bool) -> Result<()> {
    let mode = mode_of(capability);
    if mode == Mode::Unknown {
        return Err(invalid("volume_capability: an access mode is required"));
    }
    if any || reads_only(capability) || mount.is_writable() {
        return Ok(());
    }
    Err(invalid(&format!(
        "volume_capability: access mode {} promises writes, and this volume has no writable layer: use ReadOnlyMany, or \
         an overlay",
        in_words_of_kubernetes(mode)
    )))
}

/// Whether the access mode is one of readers.
pub fn reads_only(capability: &VolumeCapability) -> bool {
    matches!(mode_of(capability), Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly)
}

fn mode_of(capability: &VolumeCapability) -> Mode {
    capability.access_mode.as_ref().map_or(Mode::Unknown, |mode| mode.mode())
}

/// The access mode that the author of a claim wrote, beside what external-provisioner and the kubelet make of it
/// (kubernetes-csi/csi-lib-utils, accessmodes).
fn in_words_of_kubernetes(mode: Mode) -> String {
    let written = match mode {
        Mode::SingleNodeWriter | Mode::SingleNodeMultiWriter => "ReadWriteOnce",
        Mode::SingleNodeSingleWriter => "ReadWriteOncePod",
        Mode::MultiNodeReaderOnly => "ReadOnlyMany",
        Mode::MultiNodeMultiWriter => "ReadWriteMany",
        Mode::Unknown | Mode::SingleNodeReaderOnly | Mode::MultiNodeSingleWriter => return mode.as_str_name().into(),
    };
    format!("{written} ({})", mode.as_str_name())
}

/// The namespace and the name of the pod that a volume is published for, where the kubelet names it (podInfoOnMount).
pub fn pod_of(context: &HashMap<String, String>) -> Option<(String, String)> {
    let get = |key: &str| context.get(&format!("csi.storage.k8s.io/pod.{key}")).cloned();
    Some((get("namespace")?, get("name")?))
}

pub fn is_ephemeral(context: &HashMap<String, String>) -> bool {
    context.get(EPHEMERAL).is_some_and(|value| value == "true")
}

/// The group that may write: `volume_mount_group`, a number in the kubelet's words (the pod's `fsGroup`).
pub fn group_of(capability: &VolumeCapability) -> Result<Option<u32>> {
    let Some(AccessType::Mount(mount)) = &capability.access_type else { return Ok(None) };
    match mount.volume_mount_group.as_str() {
        "" => Ok(None),
        // The kernel takes the last number for no group at all (chown(2)).
        text => match text.parse() {
            Ok(group) if group != u32::MAX => Ok(Some(group)),
            _ => Err(invalid(&format!("volume_capability: volume_mount_group {text:?} is not the number of a group"))),
        },
    }
}

pub fn is_single_writer(capability: &VolumeCapability) -> bool {
    mode_of(capability) == Mode::SingleNodeSingleWriter
}

/// The one capability of a request that must have one.
pub fn required(capability: Option<VolumeCapability>) -> Result<VolumeCapability> {
    capability.ok_or_else(|| invalid("volume_capability is required"))
}

/// A field that must not be empty.
pub fn required_text<'a>(name: &str, value: &'a str) -> Result<&'a str> {
    if value.is_empty() { Err(invalid(&format!("{name} is required"))) } else { Ok(value) }
}

/// A path that the kubelet names: absolute, and without `..`, so that one path has one name.
pub fn required_path(name: &str, value: &str) -> Result<PathBuf> {
    let path = Path::new(required_text(name, value)?);
    if path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir) {
        // Without trailing slashes and double slashes.
        return Ok(path.components().collect());
    }
    Err(invalid(&format!("{name}: {path:?} is not an absolute path without '..'")))
}

pub fn invalid(message: &str) -> Error {
    Error::new(Kind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_access_mode_as_the_author_of_the_claim_wrote_it() {
        assert_eq!(in_words_of_kubernetes(Mode::SingleNodeMultiWriter), "ReadWriteOnce (SINGLE_NODE_MULTI_WRITER)");
        assert_eq!(in_words_of_kubernetes(Mode::MultiNodeSingleWriter), "MULTI_NODE_SINGLE_WRITER");
    }

    #[test]
    fn a_path_has_one_name() {
        assert_eq!(required_path("target_path", "/a//b/").unwrap(), Path::new("/a/b"));
        for path in ["", "a/b", "/a/../b"] {
            assert_eq!(required_path("target_path", path).unwrap_err().kind, Kind::InvalidArgument, "{path}");
        }
    }
}
