//! One volume at one published path.

use std::path::{Path, PathBuf};

use crate::spec::Allowed;

/// What is asked for at one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publication {
    pub volume_id: String,
    pub target: PathBuf,
    pub mount: Allowed,
    pub read_only: bool,
    /// Of the pod, where the kubelet names it.
    pub namespace: Option<String>,
    /// The group that may write to a writable layer. What is mounted, or was written to, keeps the one that it has.
    pub group: Option<u32>,
    /// No other path may be published while this one is (access mode `SINGLE_NODE_SINGLE_WRITER`).
    pub exclusive: bool,
}

impl Publication {
    /// What a person mounts, and not the kubelet.
    pub fn by_hand(target: PathBuf, mount: Allowed, read_only: bool) -> Self {
        let volume_id = by_hand(&target);
        Publication { volume_id, target, mount, read_only, namespace: None, group: None, exclusive: false }
    }

    pub fn is_by_hand(&self) -> bool {
        self.volume_id == by_hand(&self.target)
    }
}

/// The volume ID of what a person mounted at `target`.
pub fn by_hand(target: &Path) -> String {
    format!("by hand: {}", target.display())
}
