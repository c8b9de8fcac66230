//! Images that an earlier process attached: found again by what is written down of them, without their servers.

use std::sync::Arc;

use super::prepare::Preparer;
use super::prepared::{AttachedImage, ImageKey, Known, Origin};
use crate::blocking::{self, OffThread};
use crate::error::Result;
use crate::kernel;
use crate::kernel::file_system::FileSystem;
use crate::kernel::loop_device::{Attached, Purpose};
use crate::spec::Verity;
use crate::volume::cache::stands_on;

impl Preparer {
    /// The loop device that an earlier process attached, while something is mounted on it.
    pub(super) async fn still_attached(
        &self,
        known: &Known,
        file_system: FileSystem,
    ) -> Result<Option<Arc<OffThread<AttachedImage>>>> {
        let (identity, verity) = (known.identity, known.image.verity);
        let named = match verity {
            Some(Verity::Root(root)) => Some(root),
            Some(Verity::Signed) | None => None,
        };
        if verity != Some(Verity::Signed)
            && let Some(attached) = self.images.find(&ImageKey { identity, verity: named })
        {
            return Ok(Some(attached));
        }
        // It may have been moved there since it was written down.
        let copy = self.copy_of(&known.image, known.content, identity);
        let (kernel, mark) = (Arc::clone(&self.kernel), self.mark.clone());
        let unknown = self.exports.places_of_unknown();
        let look = move || {
            let is_copy = |attached: &Attached| copy.as_deref().is_some_and(|copy| stands_on(attached, copy));
            let purpose = if verity.is_some() { Purpose::Verity } else { Purpose::FileSystem };
            let is_it = |attached: &Attached| {
                attached.purpose == purpose && (attached.identity == identity || is_copy(attached))
            };
            let Some(attached) = kernel.loop_devices(mark.tag())?.into_iter().find(is_it) else { return Ok(None) };
            let origin = if is_copy(&attached) { Origin::Copy } else { Origin::Earlier(unknown) };
            let Attached { device, identity, .. } = attached;
            let root = match verity {
                // The hash that was found signed when it was attached.
                Some(Verity::Signed) => {
                    let mut devices = kernel.verified_devices(mark.tag())?.into_iter();
                    let Some(verified) = devices.find(|verified| verified.loop_device == device.number()) else {
                        return Ok(None);
                    };
                    Some(verified.root)
                }
                Some(Verity::Root(_)) | None => named,
            };
            let key = ImageKey { identity, verity: root };
            // Its superblock is there: nothing is read.
            let attached = AttachedImage::new(&*kernel, key, device, file_system, &mark, origin)?;
            Ok::<_, kernel::Error>(Some((key, OffThread::new(attached))))
        };
        match blocking::run("look for the image on a loop device", look).await? {
            Some((key, attached)) => Ok(Some(self.images.get(&key, async { Ok(attached) }).await?)),
            None => Ok(None),
        }
    }
}
