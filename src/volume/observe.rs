//! What this process and the kernel have at this moment, for the metrics.

use std::sync::Arc;

use super::error::Result;
use super::status::{self, Loop, PublishedVolume};
use super::{Volumes, blocking, lock};
use crate::kernel::mountstats::{self, NfsCounters};

/// The volumes of a node at one moment.
#[derive(Debug)]
pub struct Observation {
    /// How many volumes are staged.
    pub staged: usize,
    /// How many published paths were abnormal when the kubelet last asked about them.
    pub abnormal: usize,
    pub published: Vec<PublishedVolume>,
    pub loop_devices: Vec<Loop>,
    pub nfs: Vec<NfsCounters>,
}

impl Volumes {
    /// Asks no server.
    pub async fn observe(self: &Arc<Self>) -> Result<Observation> {
        let this = Arc::clone(self);
        let observe = move || {
            let published = status::volumes(&this.config.data_dir)?;
            let loop_devices = status::loop_devices(&this.config.driver_name, &published)?;
            let nfs = mountstats::read(&this.namespace)?;
            let abnormal = {
                let mut abnormal = lock(&this.abnormal);
                // An answer about a volume may come after its end.
                abnormal.retain(|target, _| published.iter().any(|volume| volume.target == *target));
                abnormal.len()
            };
            Ok(Observation { staged: lock(&this.staged).len(), abnormal, published, loop_devices, nfs })
        };
        blocking::run("look at the volumes of this node", observe).await?
    }
}
