//! A base of paths, opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::build::build;
use super::prepared::{Prepared, PreparedBase};
use crate::kernel::image::Image;
use crate::kernel::mount::{DetachedMount, Symlinks};
use crate::kernel::{self, Kernel};

/// A base while paths are opened below it.
pub(super) enum OpenBase {
    HostRoot(Arc<OwnedFd>),
    Directory(OwnedFd),
    Detached(DetachedMount),
}

impl AsFd for OpenBase {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            OpenBase::HostRoot(root) => root.as_fd(),
            OpenBase::Directory(directory) => directory.as_fd(),
            OpenBase::Detached(mount) => mount.as_fd(),
        }
    }
}

impl OpenBase {
    /// See [`Image::open`]. The mounts of the driver open no device; the node's own do.
    pub(super) fn open_image(&self, path: &str, symlinks: Symlinks) -> kernel::Result<Image> {
        match self {
            OpenBase::HostRoot(root) => Image::open_on_node(root, path, symlinks),
            OpenBase::Directory(_) | OpenBase::Detached(_) => Image::open(self, path, symlinks),
        }
    }

    pub(super) fn new(base: PreparedBase, kernel: &dyn Kernel) -> kernel::Result<Self> {
        Ok(match base {
            PreparedBase::HostRoot(root, _) => OpenBase::HostRoot(root),
            PreparedBase::Mount(mount) => match *mount {
                Prepared::Nfs { mount, directory, .. } => OpenBase::Directory(mount.open(&directory)?),
                other => OpenBase::Detached(build(&other, kernel, None)?),
            },
        })
    }
}
