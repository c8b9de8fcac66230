//! What the loop devices below a mount say of its images. No server is asked.

use std::path::PathBuf;
use std::sync::Arc;

use super::mark::loop_devices_of;
use super::prepare::Preparer;
use crate::blocking;
use crate::error::Result;
use crate::kernel;
use crate::kernel::image::{Content, ImageIdentity};
use crate::kernel::loop_device::Reads;
use crate::kernel::mountinfo;
use crate::spec::Loopback;
use crate::volume::cache::{Name, Original};

/// A loop device that a published path stands on.
pub struct Device {
    pub number: u32,
    pub identity: ImageIdentity,
    pub reads: Reads,
    /// The kernel has read something that did not fit the root hash.
    pub is_corrupted: bool,
    /// The ID of the copy that it is read from.
    copy: Option<String>,
}

impl Device {
    #[cfg(test)]
    pub fn on_server(number: u32, identity: ImageIdentity, reads: Reads) -> Self {
        Device { number, identity, reads, is_corrupted: false, copy: None }
    }

    /// Whether it is read from this node, whatever a server does.
    pub fn is_local(&self) -> bool {
        self.copy.is_some()
    }

    /// Whether it is of this image, whose content was this.
    pub fn is_of(&self, image: &Loopback, content: Content) -> bool {
        let ImageIdentity { inode, size, changed, .. } = self.identity;
        match (&self.copy, Name::of(image)) {
            (Some(copy), Some(name)) => Original::new(name, content, changed).id() == *copy,
            (Some(_), None) => false,
            (None, _) => (inode, size) == (content.inode, content.size),
        }
    }
}

impl Preparer {
    /// Those below what is mounted at `target`, and below images that are in one another.
    pub async fn devices_below(&self, target: PathBuf) -> Result<Vec<Device>> {
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let look = move || {
            let mounts = kernel.mounts()?.into_iter().filter(|mount| target.as_os_str() == mount.mount_point.as_str());
            let mut numbers: Vec<_> = mounts.flat_map(|mount| loop_devices_of(&mount)).collect();
            let (mut others, mut found) = (kernel.loop_devices(mark.tag())?, Vec::new());
            let verified = kernel.verified_devices(mark.tag())?;
            while let Some(number) = numbers.pop() {
                let Some(at) = others.iter().position(|attached| attached.device.number() == number) else { continue };
                let attached = others.swap_remove(at);
                numbers.extend(mountinfo::loop_device_below(attached.identity.device));
                found.push(Device {
                    number,
                    identity: attached.identity,
                    reads: attached.reads,
                    is_corrupted: verified.iter().any(|it| it.is_corrupted && it.loop_device == number),
                    copy: cache.below(&attached),
                });
            }
            Ok::<_, kernel::Error>(found)
        };
        blocking::run("look at the loop devices", look).await
    }
}
