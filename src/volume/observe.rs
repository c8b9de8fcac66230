//! What this process and the kernel have at this moment, for the metrics.

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
    pub async fn observe(&self) -> Result<Observation> {
        let (staged, abnormal) = (lock(&self.staged).len(), lock(&self.abnormal).len());
        let (namespace, config) = (self.namespace.clone(), self.config.clone());
        let observe = move || {
            let published = status::volumes(&config.data_dir)?;
            let loop_devices = status::loop_devices(&config.driver_name, &published)?;
            let nfs = mountstats::read(&namespace)?;
            Ok(Observation { staged, abnormal, published, loop_devices, nfs })
        };
        blocking::run("look at the volumes of this node", observe).await?
    }
}
