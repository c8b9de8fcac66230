//! The mount options of a volume (a PersistentVolume's `mountOptions`), as users of other NFS drivers write them:
//! options of nfs(5), the protocol version among them, mixed with words of mount(8).

use super::error::{SpecError, quote};
use super::{Mount, MountFlags, NfsOption, NfsVersion, options};

/// The parameter that errors of this module name.
pub(super) const PARAMETER: &str = "mountOptions";

/// What a volume's mount options ask of every NFS export and image in its spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// `vers=`, `nfsvers=` or `v4.1`.
    pub version: Option<NfsVersion>,
    /// Sorted, each once.
    pub nfs: Vec<NfsOption>,
    /// `ro`: exports are mounted read-only, whatever the spec says.
    pub read_only: bool,
    /// Images are mounted with these.
    pub flags: MountFlags,
}

impl MountOptions {
    /// The version of an export that asks for `own`.
    pub fn version_for(&self, own: Option<NfsVersion>) -> Result<NfsVersion, String> {
        match (own, self.version) {
            (Some(own), Some(volume)) if own != volume => {
                Err(format!("{own} contradicts the volume's mount options, which ask for {volume}"))
            }
            _ => Ok(own.or(self.version).unwrap_or_default()),
        }
    }

    /// The options of an export that asks for `own`.
    pub fn merge_into(&self, mut own: Vec<NfsOption>) -> Result<Vec<NfsOption>, String> {
        own.extend(self.nfs.iter().cloned());
        options::canonical(own)
    }

    /// Refuses options that have nothing in `mount` to act on.
    pub fn check_use(&self, mount: &Mount) -> Result<(), SpecError> {
        let (mut exports, mut images) = (0, 0);
        mount.try_visit(&mut |_, mount| {
            match mount {
                Mount::Nfs(_) => exports += 1,
                Mount::Attach(_) => images += 1,
                Mount::Bind(_) | Mount::Overlay(_) => {}
            }
            Ok(())
        })?;
        let for_nfs = self.version.is_some() || !self.nfs.is_empty();
        let unused = if for_nfs && exports == 0 {
            "these are options of NFS, and nothing in the spec is NFS"
        } else if self.flags.no_exec && images == 0 {
            "\"noexec\" is for images, and there is none in the spec"
        } else {
            return Ok(());
        };
        Err(SpecError::invalid(PARAMETER, "", unused))
    }
}

/// Words of mount(8) that already hold, or that say nothing about a mount made by this driver.
const HELD: &[&str] = &[
    "_netdev",
    "async",
    "defaults",
    "fg",
    "intr",
    "noatime",
    "nodiratime",
    "nofail",
    "nointr",
    "relatime",
    "sharecache",
];

/// Words of mount(8) that ask for what a volume does not get.
const REFUSED: &[(&str, &str)] = &[
    ("dev", "exports are mounted nodev, and images only where \"nodev\" is set"),
    ("exec", "files are executable unless \"noexec\" is set"),
    ("rw", "images are read-only: for a writable volume set \"overlay\""),
    ("strictatime", "volumes keep no access times"),
    ("suid", "exports are mounted nosuid, and images only where \"nosuid\" is set"),
    ("sync", "images are never written to"),
];

/// Reads mount options; each string may hold several, separated by commas. Spaces around an option are dropped.
pub(super) fn parse(texts: &[String]) -> Result<MountOptions, SpecError> {
    let invalid = |message: String| SpecError::invalid(PARAMETER, "", message);
    let mut parsed = MountOptions::default();
    let mut minor = None;
    for text in texts.iter().flat_map(|text| list(text)) {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "ro" if key == text => parsed.read_only = true,
            "noexec" if key == text => parsed.flags.no_exec = true,
            "nosuid" if key == text => parsed.flags.no_suid = true,
            "nodev" if key == text => parsed.flags.no_dev = true,
            "vers" | "nfsvers" => set_version(&mut parsed.version, value).map_err(invalid)?,
            "v3" | "v4" | "v4.0" | "v4.1" | "v4.2" if key == text => {
                set_version(&mut parsed.version, &key[1..]).map_err(invalid)?;
            }
            "minorversion" => minor = Some(value),
            _ if HELD.contains(&text) => {}
            _ => {
                if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| *refused == text) {
                    return Err(invalid(format!("option {} cannot be set: {reason}", quote(text))));
                }
                parsed.nfs.push(options::parse(text).map_err(invalid)?);
            }
        }
    }
    if let Some(minor) = minor {
        // The old spelling of 4.1 is vers=4,minorversion=1, where 4 alone would mean the newest.
        if parsed.version == Some(NfsVersion::V4_2) {
            parsed.version = None;
        }
        set_version(&mut parsed.version, &format!("4.{minor}")).map_err(invalid)?;
    }
    parsed.nfs = options::canonical(parsed.nfs).map_err(invalid)?;
    Ok(parsed)
}

/// The items of a comma-separated list; none for an empty text.
pub(super) fn list(text: &str) -> impl Iterator<Item = &str> {
    let empty = text.trim().is_empty();
    text.split(',').map(str::trim).filter(move |_| !empty)
}

fn set_version(version: &mut Option<NfsVersion>, value: &str) -> Result<(), String> {
    let new = NfsVersion::parse(value)?;
    match *version {
        Some(old) if old != new => Err(format!("NFS versions {old} and {new} contradict each other")),
        _ => {
            *version = Some(new);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Result<MountOptions, SpecError> {
        parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn what_users_of_csi_driver_nfs_write_works() {
        let parsed = read(&["nfsvers=4.1", "hard", "noatime", "nolock", "timeo=600,retrans=2"]).unwrap();
        assert_eq!(parsed.version, Some(NfsVersion::V4_1));
        let options: Vec<String> = parsed.nfs.iter().map(ToString::to_string).collect();
        assert_eq!(options, ["hard", "nolock", "retrans=2", "timeo=600"]);
    }

    #[test]
    fn words_that_already_hold_change_nothing() {
        assert_eq!(read(HELD).unwrap(), MountOptions::default());
        assert_eq!(read(&["", " "]).unwrap(), MountOptions::default());
    }

    #[test]
    fn every_spelling_of_a_version_is_read() {
        for (texts, version) in [
            (&["vers=3"][..], NfsVersion::V3),
            (&["v4.0"], NfsVersion::V4_0),
            (&["vers=4", "minorversion=1"], NfsVersion::V4_1),
            (&["minorversion=0"], NfsVersion::V4_0),
            (&["nfsvers=4"], NfsVersion::V4_2),
            (&["vers=4.1", "nfsvers=4.1"], NfsVersion::V4_1),
        ] {
            assert_eq!(read(texts).unwrap().version, Some(version), "{texts:?}");
        }
    }

    #[test]
    fn ro_and_the_flags_of_images_have_an_effect() {
        let parsed = read(&["ro", "noexec", "nosuid,nodev"]).unwrap();
        assert!(parsed.read_only && parsed.flags.words().eq(["nosuid", "nodev", "noexec"]));
    }

    #[test]
    fn the_rest_is_refused() {
        for (texts, message) in [
            (&["rw"][..], "\"overlay\""),
            (&["suid"], "nosuid"),
            (&["ro=1"], "\"ro\""),
            (&["vers=4.1", "nfsvers=4.2"], "contradict"),
            (&["vers=3", "minorversion=1"], "contradict"),
            (&["vers=5"], "3, 4.0, 4.1, 4.2"),
            (&["vers"], "3, 4.0, 4.1, 4.2"),
            (&["minorversion=9"], "3, 4.0, 4.1, 4.2"),
            (&["hard,,soft"], "unknown option"),
            (&["hard", "soft"], "contradict"),
            (&["addr=10.0.0.1"], "cannot be set"),
        ] {
            let error = read(texts).unwrap_err();
            assert_eq!((error.parameter.as_str(), error.pointer.as_str()), (PARAMETER, ""));
            assert!(error.message.contains(message), "{texts:?}: {error}");
        }
    }
}
