//! The writable layer on top of an overlay.

use std::fmt;

use super::error::quote;

/// The writable layer on top of an overlay; it ends with the published path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Upper {
    /// On the node's disk, where the driver keeps its data: a directory, or a file system of at most `size` bytes in a file.
    Directory { size: Option<u64> },
    /// Memory, at most `size` bytes.
    Tmpfs { size: u64 },
    /// None: the layers are stacked read-only.
    None,
}

impl Default for Upper {
    fn default() -> Self {
        Upper::Directory { size: None }
    }
}

impl Upper {
    /// The least size of one on the node's disk: a file system has structures of its own.
    pub const SMALLEST_DIRECTORY: u64 = 16 << 20;

    /// The most bytes that it may hold, where that is limited.
    pub fn size(self) -> Option<u64> {
        match self {
            Upper::Tmpfs { size } => Some(size),
            Upper::Directory { size } => size,
            Upper::None => None,
        }
    }

    /// One on the node's disk of this size.
    pub(super) fn directory_of(size: u64) -> Result<Self, String> {
        match size >= Self::SMALLEST_DIRECTORY {
            true => Ok(Upper::Directory { size: Some(size) }),
            false => Err("is too small for a file system of its own: at least 16Mi".into()),
        }
    }
}

/// Who the root directory of a writable layer belongs to, and what they may do there: as the uppermost lower has it, where nothing is said.
/// A pod's `fsGroup` comes on top of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct UpperRoot {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// As chmod(2) takes it.
    pub mode: Option<u32>,
}

impl fmt::Display for UpperRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = [("uid", self.uid), ("gid", self.gid)];
        let ids = ids.into_iter().filter_map(|(name, id)| Some(format!("{name} {}", id?)));
        let mode = self.mode.map(|mode| format!("mode {mode:04o}"));
        f.write_str(&ids.chain(mode).collect::<Vec<_>>().join(", "))
    }
}

impl UpperRoot {
    /// A user or a group. The kernel takes the last number for none at all (chown(2)).
    pub(super) fn id(id: u32) -> Result<u32, String> {
        if id == u32::MAX {
            Err(format!("{id} is no user and no group: the kernel has none of this number"))
        } else {
            Ok(id)
        }
    }

    /// The same as a user writes it, in decimal.
    pub(super) fn parse_id(text: &str) -> Result<u32, String> {
        // Not str::parse alone: it takes a leading plus.
        let number = text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        number
            .ok_or_else(|| format!("{} is not the number of a user or a group, such as 1000", quote(text)))
            .and_then(Self::id)
    }

    /// Reads a mode as chmod(1) has it: up to four octal digits, and a zero before them.
    pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
        let digits = text.len() <= 5 && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o7777);
        mode.ok_or_else(|| format!("{} is not a mode: up to four octal digits, such as 0770", quote(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (text, bits) in [("0770", 0o770), ("770", 0o770), ("1777", 0o1777), ("02775", 0o2775), ("0", 0)] {
            assert_eq!(UpperRoot::parse_mode(text), Ok(bits), "{text}");
        }
        for text in ["", "8", "u+w", "rwxrwx---", "+770", "0o770", "10000", "017777", "000770", " 770", "７"] {
            assert!(UpperRoot::parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn users_and_groups_are_numbers() {
        assert_eq!(UpperRoot::parse_id("1000"), Ok(1000));
        assert_eq!(UpperRoot::parse_id("4294967294"), Ok(u32::MAX - 1));
        for text in ["", "root", "-1", "+1", "4294967295", "4294967296", "1e3", " 1", "0x10"] {
            assert!(UpperRoot::parse_id(text).is_err(), "{text}");
        }
    }
}
