//! What this process and the kernel have at this moment, for the metrics.

use std::sync::Arc;

use super::Report;
use super::status::{self, Loop, PublishedVolume};
use crate::blocking;
use crate::error::{Error, Result};
use crate::kernel::mountstats::NfsCounters;
use crate::lock::lock;
use crate::volume::cache::Kept;

/// The volumes of a node at one moment.
#[derive(Debug)]
pub struct Observation {
    /// How many volumes are staged.
    pub staged: usize,
    /// How many published paths were abnormal when the kubelet last asked about them.
    pub abnormal: usize,
    /// How many records cannot be read.
    pub unreadable_records: usize,
    pub published: Vec<PublishedVolume>,
    pub loop_devices: Vec<Loop>,
    pub nfs: Vec<NfsCounters>,
    /// The copies of images; `None` where none are kept.
    pub cache: Option<Kept>,
}

impl Report {
    /// Asks no server. `staged` is how many volumes are.
    pub async fn observe(&self, staged: usize) -> Result<Observation> {
        let (kernel, mark, records) = (Arc::clone(&self.kernel), self.mark.clone(), self.records.clone());
        let cache = Arc::clone(self.preparer.cache());
        let look = move || {
            let list = records.list()?;
            let published = status::volumes(&list.records, &kernel.mounts()?);
            let kept = cache.kept()?;
            let (attached, verified) = (kernel.loop_devices(mark.tag())?, kernel.verified_devices(mark.tag())?);
            let multipaths = kernel.multipath_devices(mark.tag())?;
            let copy_of = |device: &_| cache.image_below(device);
            let loop_devices = status::loop_devices(attached, &verified, &multipaths, &published, copy_of);
            Ok::<_, Error>((list.unreadable, published, loop_devices, kernel.nfs_counters()?, kept))
        };
        let looked = blocking::run("look at the volumes of this node", look).await?;
        let (unreadable, published, loop_devices, nfs, cache) = looked;
        let abnormal = {
            let mut abnormal = lock(&self.abnormal);
            // An answer about a volume may come after its end.
            abnormal.retain(|target, _| {
                published.iter().any(|volume| volume.target == *target)
                    || unreadable.iter().any(|record| record.target.as_ref() == Some(target))
            });
            abnormal.len()
        };
        Ok(Observation { staged, abnormal, unreadable_records: unreadable.len(), published, loop_devices, nfs, cache })
    }
}
