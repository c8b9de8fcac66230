//! Whose a loop device is, and what for: the name that it carries in `lo_file_name`.

use linux_raw_sys::loop_device::loop_info64;
use sha2::{Digest, Sha256};

use crate::kernel::image::ImageIdentity;

/// In the name of devices below another that verifies, of those that have a part of their image, and, before the number of a server, of
/// paths that are not verified and that are.
const VERITY: &str = "v";
const SIF: &str = "s";
const PATH: &str = "p";
const VERIFIED_PATH: &str = "w";

/// What stands on a device. Each claims it for itself: an image that is used both ways has two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    FileSystem,
    /// A file system in the part of the image that [`crate::kernel::image::Image::partition`] says.
    Sif,
    /// A [`crate::kernel::device_mapper::VerifiedDevice`].
    Verity,
    /// A [`crate::kernel::device_mapper::MultipathDevice`], of which this is the path to the server with this index in the volume's list.
    Path {
        server: u8,
        /// There is a [`crate::kernel::device_mapper::VerifiedDevice`] in between.
        verified: bool,
    },
}

impl Purpose {
    /// Whether what stands on it verifies it.
    pub fn is_verified(self) -> bool {
        matches!(self, Purpose::Verity | Purpose::Path { verified: true, .. })
    }

    /// The end of a device's name.
    fn word(self) -> Option<String> {
        match self {
            Purpose::FileSystem => None,
            Purpose::Sif => Some(SIF.to_owned()),
            Purpose::Verity => Some(VERITY.to_owned()),
            Purpose::Path { server, verified } => {
                Some(format!("{}{server}", if verified { VERIFIED_PATH } else { PATH }))
            }
        }
    }

    fn read(word: Option<&str>) -> Option<Self> {
        let path = |server: &str, verified| Some(Purpose::Path { server: server.parse().ok()?, verified });
        match word {
            None => Some(Purpose::FileSystem),
            Some(SIF) => Some(Purpose::Sif),
            Some(VERITY) => Some(Purpose::Verity),
            Some(word) => match (word.strip_prefix(PATH), word.strip_prefix(VERIFIED_PATH)) {
                (Some(server), _) => path(server, false),
                (_, Some(server)) => path(server, true),
                _ => None,
            },
        }
    }
}

/// Whose device it is: the mark of one driver name in `lo_file_name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// Drivers of different names on one node never touch each other's devices.
    pub fn new(driver_name: &str) -> Self {
        let digest = Sha256::digest(driver_name.as_bytes());
        let digest: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        Tag(format!("csi-squashfs:{digest}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole name: at most 60 of the 63 bytes that `lo_file_name` holds. Device and inode the kernel adds itself.
    pub(super) fn name(&self, image: &ImageIdentity, purpose: Purpose) -> String {
        let purpose = purpose.word().map(|word| format!(":{word}")).unwrap_or_default();
        format!("{}:{:x}:{:x}{purpose}", self.0, image.size, image.changed)
    }

    pub(super) fn read(&self, info: &loop_info64) -> Option<(ImageIdentity, Purpose)> {
        let name = info.lo_file_name.split(|&byte| byte == 0).next()?;
        let rest = std::str::from_utf8(name).ok()?.strip_prefix(&self.0)?.strip_prefix(':')?;
        let (size, rest) = rest.split_once(':')?;
        let (changed, word) = rest.split_once(':').map_or((rest, None), |(changed, word)| (changed, Some(word)));
        let purpose = Purpose::read(word)?;
        // Whatever its name says: one of a part is never taken for one of the whole, nor the other way.
        let is_whole = (info.lo_offset, info.lo_sizelimit) == (0, 0);
        if is_whole == (purpose == Purpose::Sif) {
            return None;
        }
        let identity = ImageIdentity {
            device: info.lo_device,
            inode: info.lo_inode,
            size: u64::from_str_radix(size, 16).ok()?,
            changed: u64::from_str_radix(changed, 16).ok()?,
        };
        Some((identity, purpose))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str) -> loop_info64 {
        // SAFETY: an integer-only C struct, for which all zeroes is a value.
        let mut info: loop_info64 = unsafe { std::mem::zeroed() };
        info.lo_file_name[..name.len()].copy_from_slice(name.as_bytes());
        (info.lo_device, info.lo_inode) = (5, 7);
        info
    }

    #[test]
    fn the_largest_identity_fits_into_the_name_and_is_read_back() {
        let identity = ImageIdentity { device: 5, inode: 7, size: u64::MAX, changed: u64::MAX };
        let tag = Tag::new("squashfs.csi.dev");
        let path = |server, verified| Purpose::Path { server, verified };
        let paths = [path(0, false), path(0, true), path(255, false), path(255, true)];
        for purpose in [Purpose::FileSystem, Purpose::Verity].into_iter().chain(paths) {
            let name = tag.name(&identity, purpose);
            assert!(name.len() < 64, "{name}");
            assert_eq!(tag.read(&info(&name)), Some((identity, purpose)));
        }
        assert!(
            tag.name(&identity, path(0, false)).ends_with(":p0") && tag.name(&identity, path(1, true)).ends_with(":w1")
        );
    }

    #[test]
    fn a_device_with_a_purpose_of_a_later_version_is_none_of_another_purpose() {
        let identity = ImageIdentity { device: 5, inode: 7, size: 1, changed: 2 };
        let tag = Tag::new("squashfs.csi.dev");
        let name = tag.name(&identity, Purpose::FileSystem);
        for word in ["x", "p", "w", "p256", "v1", "p0:", "v:p0", ""] {
            assert_eq!(tag.read(&info(&format!("{name}:{word}"))), None, "{word}");
        }
    }

    #[test]
    fn a_device_of_a_part_is_none_of_the_whole_whatever_its_name_says() {
        let identity = ImageIdentity { device: 5, inode: 7, size: u64::MAX, changed: u64::MAX };
        let tag = Tag::new("squashfs.csi.dev");
        let path = Purpose::Path { server: 1, verified: false };
        for purpose in [Purpose::FileSystem, Purpose::Verity, Purpose::Sif, path] {
            let name = tag.name(&identity, purpose);
            assert!(name.len() < 64, "{name}");
            for part in [(0, 0), (36864, 4096), (36864, 0), (0, 4096)] {
                let mut info = info(&name);
                (info.lo_offset, info.lo_sizelimit) = part;
                let is_whole = part == (0, 0);
                let expected = (is_whole != (purpose == Purpose::Sif)).then_some((identity, purpose));
                assert_eq!(tag.read(&info), expected);
            }
        }
    }

    #[test]
    fn a_foreign_device_is_not_ours() {
        let identity = ImageIdentity { device: 5, inode: 7, size: 1, changed: 2 };
        let name = Tag::new("a.example.org").name(&identity, Purpose::FileSystem);
        assert_eq!(Tag::new("b.example.org").read(&info(&name)), None);
        for name in ["", "/var/lib/images/a.img", "csi-squashfs:", "csi-squashfs:00000000:x:y"] {
            assert_eq!(Tag::new("b.example.org").read(&info(name)), None, "{name}");
        }
    }
}
