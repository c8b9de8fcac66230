//! Images that an earlier process attached: found again by what is written down of them, without their servers.

use std::sync::Arc;

use super::prepare::Preparer;
use super::prepared::{AttachedImage, ImageKey, Known, Origin, Over};
use crate::blocking::{self, OffThread};
use crate::error::Result;
use crate::kernel;
use crate::kernel::file_system::FileSystem;
use crate::kernel::loop_device::Attached;
use crate::spec::Verity;
use crate::volume::cache::{Name, Original};

impl Preparer {
    /// The loop device that an earlier process attached, while something is mounted on it; where it is verified, by the hash of then.
    pub(super) async fn still_attached(
        &self,
        known: &Known,
        file_system: FileSystem,
    ) -> Result<Option<Arc<OffThread<AttachedImage>>>> {
        let (key, verity) = (known.key, known.key.verity);
        let is_as_named = match known.image.verity {
            None => verity.is_none(),
            Some(Verity::Root(root)) => verity == Some(root),
            Some(Verity::Signed) => verity.is_some(),
        };
        if !is_as_named || key.is_sif != (file_system == FileSystem::Sif) {
            return Ok(None);
        }
        if let Some(attached) = self.images.find(&key) {
            return Ok(Some(attached));
        }
        // It may have been moved there since it was written down.
        let copy = Name::of(&known.image.on(key.server))
            .map(|name| Original::new(name, known.content, key.identity.changed).id());
        let (content, image) = (known.content, known.image.clone());
        let (kernel, mark, cache) = (Arc::clone(&self.kernel), self.mark.clone(), Arc::clone(&self.cache));
        let unknown = match known.image.base.is_of_the_node() {
            true => self.exports.places_of_the_node(),
            false => self.exports.places_of_unknown(),
        };
        let look = move || {
            let is_copy = |attached: &Attached| copy.is_some() && cache.below(attached) == copy;
            let is_it = |attached: &Attached| {
                attached.purpose == key.purpose() && (attached.identity == key.identity || is_copy(attached))
            };
            let Some(attached) = kernel.loop_devices(mark.tag())?.into_iter().find(is_it) else { return Ok(None) };
            let number = attached.device.number();
            if let Some(root) = verity
                && !kernel.verified_devices(mark.tag())?.iter().any(|it| (it.loop_device, it.root) == (number, root))
            {
                return Ok(None);
            }
            let origin = if is_copy(&attached) { Origin::Copy } else { Origin::Earlier(unknown) };
            let Attached { device, identity, .. } = attached;
            let key = ImageKey { identity, ..key };
            // Its superblock is there: nothing is read.
            let attached = match key.server {
                None => AttachedImage::new(&*kernel, key, content, device, file_system, &mark, origin)?,
                Some(_) => {
                    let Some(over) = kernel.find_multipath_device(number, mark.tag())? else { return Ok(None) };
                    let over = Some(Over::Paths(over, image));
                    AttachedImage::over(&*kernel, key, content, device, over, file_system, origin)?
                }
            };
            Ok::<_, kernel::Error>(Some((key, OffThread::new(attached))))
        };
        match blocking::run("look for the image on a loop device", look).await? {
            Some((key, attached)) => Ok(Some(self.images.get(&key, async { Ok(attached) }).await?)),
            None => Ok(None),
        }
    }
}
