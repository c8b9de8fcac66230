//! The file systems that an image may hold: how each is recognised, and how it is mounted without ever being written to.

use std::path::Path;

use super::mount::NewMount;
use super::sif;

/// How much of an image is read to look at its superblock.
pub const SUPERBLOCK: usize = 2048;

/// A file system on blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Squashfs,
    Erofs,
    Ext4,
    Xfs,
    /// A squashfs in a part of the image: see [`sif`].
    Sif,
}

impl FileSystem {
    pub const ALL: [FileSystem; 5] =
        [FileSystem::Squashfs, FileSystem::Erofs, FileSystem::Ext4, FileSystem::Xfs, FileSystem::Sif];

    /// As users name it.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Sif => "sif",
            other => other.kernel_name(),
        }
    }

    /// The kernel's name of what is mounted.
    pub fn kernel_name(self) -> &'static str {
        match self {
            FileSystem::Squashfs | FileSystem::Sif => "squashfs",
            FileSystem::Erofs => "erofs",
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// A mount of the file system on a block device. Reads the device where none of its mounts is left.
    ///
    /// Its superblock is read-only, and the mount has no flags: a user namespace would lock them.
    pub fn on(self, device: &Path) -> NewMount {
        let name = self.kernel_name();
        let new = NewMount::new(name, format!("{name} on {}", device.display())).unrestricted();
        let new = new.set("source", device.display()).flag("ro");
        match self {
            FileSystem::Squashfs | FileSystem::Sif | FileSystem::Erofs => new,
            // A journal is replayed by writing, and an image is never written. An image may ask for a panic of the node at its first
            // error; an option has the last word.
            FileSystem::Ext4 => new.flag("noload").set("errors", "continue"),
            // Copies of one image have the same UUID.
            FileSystem::Xfs => new.flag("norecovery").flag("nouuid"),
        }
    }

    /// The file system whose superblock is in `head`, the first [`SUPERBLOCK`] bytes of an image.
    pub fn recognise(head: &[u8]) -> Option<Self> {
        FileSystem::ALL.into_iter().find(|file_system| file_system.stated_size(head).is_some())
    }

    /// The bytes that the superblock in `head` says the image has; `None` if it is not of this file system. A SIF has its superblock elsewhere,
    /// and its head says nothing of bytes.
    pub fn stated_size(self, head: &[u8]) -> Option<u64> {
        let bytes = |at: usize, length: usize| head.get(at..at + length);
        let little =
            |at, length| Some(bytes(at, length)?.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
        let big = |at, length| Some(bytes(at, length)?.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
        match self {
            // fs/squashfs/squashfs_fs.h: magic, version 4.0, bytes_used.
            FileSystem::Squashfs => (bytes(0, 4)? == b"hsqs" && little(28, 4)? == 4).then(|| little(40, 8))?,
            FileSystem::Sif => sif::is_sif(head).then_some(0),
            // fs/erofs/erofs_fs.h: magic, blkszbits, blocks.
            FileSystem::Erofs => {
                let shift = little(1024 + 12, 1)?;
                let is_erofs = little(1024, 4)? == 0xE0F5_E1E2 && shift < 32;
                is_erofs.then(|| little(1024 + 36, 4))?.map(|blocks| blocks << shift)
            }
            // Documentation/filesystems/ext4/super.rst: s_magic, s_blocks_count (its high half with the 64bit feature),
            // s_log_block_size.
            FileSystem::Ext4 => {
                let shift = little(1024 + 24, 4)?;
                let high = if little(1024 + 96, 4)? & 0x80 != 0 { little(1024 + 0x150, 4)? } else { 0 };
                let blocks = little(1024 + 4, 4)? | high << 32;
                (little(1024 + 56, 2)? == 0xEF53 && shift < 8).then(|| blocks.saturating_mul(1024 << shift))
            }
            // fs/xfs/libxfs/xfs_format.h: sb_magicnum, sb_blocksize, sb_dblocks, all big-endian.
            FileSystem::Xfs => (bytes(0, 4)? == b"XFSB").then(|| Some(big(4, 4)?.saturating_mul(big(8, 8)?)))?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_system_is_ever_written_to_and_what_an_image_asks_for_is_overruled() {
        for file_system in FileSystem::ALL {
            let new = file_system.on(Path::new("/dev/loop3"));
            assert!(new.options.contains(&("ro".into(), None)), "{new:?}");
            assert!(new.attributes.is_empty(), "{new:?}");
        }
        let options = |file_system: FileSystem| {
            let options = file_system.on(Path::new("/dev/loop3")).options.into_iter();
            options.map(|(key, value)| value.map_or(key.clone(), |value| format!("{key}={value}"))).collect::<Vec<_>>()
        };
        assert_eq!(options(FileSystem::Squashfs), ["source=/dev/loop3", "ro"]);
        assert_eq!(options(FileSystem::Ext4), ["source=/dev/loop3", "ro", "noload", "errors=continue"]);
        assert_eq!(options(FileSystem::Xfs), ["source=/dev/loop3", "ro", "norecovery", "nouuid"]);
    }
}
