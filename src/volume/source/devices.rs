//! What the loop devices below a mount say of its images. No server is asked.

use std::path::PathBuf;
use std::sync::Arc;

use super::mark::loop_devices_of;
use super::prepare::Preparer;
use crate::blocking;
use crate::error::Result;
use crate::kernel::image::{Content, ImageIdentity};
use crate::kernel::loop_device::{Attached, Purpose, Reads, Tag};
use crate::kernel::{self, Kernel, mountinfo};
use crate::spec::Loopback;
use crate::volume::cache::{Cache, Name, Original};

/// A loop device that a published path stands on.
pub struct Device {
    pub number: u32,
    pub identity: ImageIdentity,
    pub reads: Reads,
    /// The kernel has read something that did not fit the root hash.
    pub is_corrupted: bool,
    /// Of an image that several servers have, the place of its own in their list.
    pub server: Option<u8>,
    /// The ID of the copy that it is read from.
    copy: Option<String>,
}

impl Device {
    #[cfg(test)]
    pub fn on_server(number: u32, identity: ImageIdentity, reads: Reads) -> Self {
        Device { number, identity, reads, is_corrupted: false, server: None, copy: None }
    }

    /// Whether it is read from this node, whatever a server does.
    pub fn is_local(&self) -> bool {
        self.copy.is_some()
    }

    /// Whether it is of this image, whose content was this.
    pub fn is_of(&self, image: &Loopback, content: Content) -> bool {
        let ImageIdentity { inode, size, changed, .. } = self.identity;
        match (&self.copy, Name::of(&image.on(self.server))) {
            (Some(copy), Some(name)) => Original::new(name, content, changed).id() == *copy,
            (Some(_), None) => false,
            (None, _) => (inode, size) == (content.inode, content.size),
        }
    }
}

/// All of the driver with this mark, and none else.
pub(super) fn all(kernel: &dyn Kernel, tag: &Tag, cache: &Cache) -> kernel::Result<Vec<Device>> {
    let verified = kernel.verified_devices(tag)?;
    let describe = |attached: Attached| {
        let number = attached.device.number();
        let server = match attached.purpose {
            Purpose::Path { server, .. } => Some(server),
            Purpose::FileSystem | Purpose::Sif | Purpose::Verity => None,
        };
        Device {
            number,
            identity: attached.identity,
            reads: attached.reads,
            is_corrupted: verified.iter().any(|it| it.is_corrupted && it.loop_device == number),
            server,
            copy: cache.below(&attached),
        }
    };
    Ok(kernel.loop_devices(tag)?.into_iter().map(describe).collect())
}

impl Preparer {
    /// Those below what is mounted at `target`, and below images that are in one another.
    pub async fn devices_below(&self, target: PathBuf) -> Result<Vec<Device>> {
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let look = move || {
            let mounts = kernel.mounts()?.into_iter().filter(|mount| target.as_os_str() == mount.mount_point.as_str());
            let mut numbers: Vec<_> = mounts.flat_map(|mount| loop_devices_of(&mount)).collect();
            let (mut others, mut found) = (all(&*kernel, mark.tag(), &cache)?, Vec::new());
            while let Some(number) = numbers.pop() {
                let Some(at) = others.iter().position(|device| device.number == number) else { continue };
                let device = others.swap_remove(at);
                numbers.extend(mountinfo::loop_device_below(device.identity.device));
                found.push(device);
            }
            Ok::<_, kernel::Error>(found)
        };
        blocking::run("look at the loop devices", look).await
    }
}
