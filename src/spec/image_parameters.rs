//! What a volume says of its images whatever the form of its mount: which bytes they are to have, and how they come to the node.

use std::collections::BTreeMap;
use std::fmt;

use super::error::{SpecError, quote, unknown};
use super::{Attach, Device, FsType, Mount};

/// The parameters, in either form.
pub(super) const CACHE: &str = "cache";
pub(super) const DIGEST: &str = "digest";
pub(super) const VERITY: &str = "verity";
pub(super) const PREFETCH: &str = "prefetch";

/// Whether an image on an export is copied to the disk of each node that uses it, and read there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cache {
    Node,
    None,
}

impl Cache {
    /// Reads it as a user writes it.
    pub fn parse(text: &str) -> Result<Cache, String> {
        match text {
            "node" => Ok(Cache::Node),
            "none" => Ok(Cache::None),
            _ => Err(unknown("value", text, &["node", "none"])),
        }
    }
}

/// Whether an image on an export is read into a node's memory ahead of those who will read in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prefetch {
    /// From its beginning to its end.
    All,
    /// What of it was read when it was used last on this node.
    Learned,
    None,
}

impl Prefetch {
    /// Reads it as a user writes it.
    pub fn parse(text: &str) -> Result<Prefetch, String> {
        match text {
            "all" => Ok(Prefetch::All),
            "learned" => Ok(Prefetch::Learned),
            "none" => Ok(Prefetch::None),
            _ => Err(unknown("value", text, &["learned", "all", "none"])),
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Prefetch::All => "all",
            Prefetch::Learned => "learned",
            Prefetch::None => "none",
        }
    }
}

/// The SHA-256 of a whole image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads `sha256:` and 64 hexadecimal digits.
    pub fn parse(text: &str) -> Result<Digest, String> {
        let digest = text.strip_prefix("sha256:").and_then(hexadecimal).map(Digest);
        digest.ok_or_else(|| {
            format!("{} is no digest: \"sha256:\" and 64 hexadecimal digits, as sha256sum prints them", quote(text))
        })
    }
}

/// 64 hexadecimal digits.
fn hexadecimal(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// By what the kernel verifies each block of an image: the root hash of the tree behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verity {
    Root([u8; 32]),
    /// The one that lies beside the image, signed by a key of the policy's.
    Signed,
}

pub(super) const NOT_OF_SIF: &str = "is not for \"sif\": a hash tree is that of a whole file, and of a SIF a part is mounted: seal a squashfs \
                                     image in its place";

/// [`Verity::Signed`] as a user writes it.
const SIGNED: &str = "signed";

impl Verity {
    /// Reads 64 hexadecimal digits, or `signed`.
    pub fn parse(text: &str) -> Result<Verity, String> {
        if text == SIGNED {
            return Ok(Verity::Signed);
        }
        let expected = || {
            format!("{} is no root hash: 64 hexadecimal digits, as 'seal' prints them, or \"{SIGNED}\"", quote(text))
        };
        hexadecimal(text).map(Verity::Root).ok_or_else(expected)
    }
}

impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verity::Root(root) = self else { return f.write_str(SIGNED) };
        root.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// All of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ImageParameters {
    cache: Option<Cache>,
    digest: Option<Digest>,
    verity: Option<Verity>,
    prefetch: Option<Prefetch>,
}

impl ImageParameters {
    /// Takes its parameters from those of a volume.
    pub fn take_from(attributes: &mut BTreeMap<&'static str, String>) -> Result<ImageParameters, SpecError> {
        let cache = take(attributes, CACHE, Cache::parse)?;
        let digest = take(attributes, DIGEST, Digest::parse)?;
        let verity = take(attributes, VERITY, Verity::parse)?;
        let prefetch = take(attributes, PREFETCH, Prefetch::parse)?;
        if digest.is_some() && cache == Some(Cache::None) {
            let message =
                "is checked where the image is copied, and \"cache: none\" says not to: leave one of them out";
            return Err(SpecError::invalid(DIGEST, "", message));
        }
        // Nobody names the bytes of an image to have them looked at or not.
        Ok(ImageParameters { cache: cache.or(digest.map(|_| Cache::Node)), digest, verity, prefetch })
    }

    /// Applies it to the images of a mount that lie on exports, and the root hash also to those on file systems of the node.
    pub fn apply(self, mount: &mut Mount) -> Result<(), SpecError> {
        let (mut on_exports, mut of_the_node, mut other, mut is_sif) = (0, 0, None, false);
        mount.visit_mut(&mut |mount| {
            if let Mount::Attach(Attach { device: Device::Loopback(image), fs_type, .. }) = mount
                && (image.base.export().is_some() || image.base.is_of_the_node())
            {
                if image.base.is_of_the_node() {
                    of_the_node += 1;
                } else {
                    on_exports += 1;
                    (image.cache, image.digest, image.prefetch) = (self.cache, self.digest, self.prefetch);
                }
                is_sif |= *fs_type == FsType::Sif;
                if let Some(root) = self.verity {
                    other = image.verity.replace(root).filter(|before| *before != root).or(other);
                }
            }
        });
        if is_sif && self.verity.is_some() {
            return Err(SpecError::invalid(VERITY, "", NOT_OF_SIF));
        }
        if let Some(other) = other {
            return Err(SpecError::invalid(VERITY, "", format!("contradicts that of \"mountSpec\", {other}")));
        }
        // Implied by a digest, which is told first.
        let of_exports = [
            (DIGEST, self.digest.is_some()),
            (CACHE, self.cache == Some(Cache::Node)),
            (PREFETCH, self.prefetch.is_some_and(|prefetch| prefetch != Prefetch::None)),
        ];
        if let Some((name, _)) =
            of_exports.into_iter().find(|(_, is_given)| *is_given && on_exports == 0 && of_the_node > 0)
        {
            let message =
                "is for images on NFS exports: what lies on a file system of the node is neither copied nor read ahead";
            return Err(SpecError::invalid(name, "", message));
        }
        let all = on_exports + of_the_node;
        for (name, is_given, images, place) in
            [(DIGEST, self.digest.is_some(), on_exports, " on an export"), (VERITY, self.verity.is_some(), all, "")]
        {
            if is_given && images != 1 {
                let message = format!("is that of one image{place}, and the volume has {images}");
                return Err(SpecError::invalid(name, "", message));
            }
        }
        Ok(())
    }
}

fn take<T>(
    attributes: &mut BTreeMap<&'static str, String>,
    name: &'static str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, SpecError> {
    let parsed = attributes.remove(name).map(|text| parse(text.trim())).transpose();
    parsed.map_err(|message| SpecError::invalid(name, "", message))
}
