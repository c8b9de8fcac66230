//! What is there: the usage and the condition of a volume, what a pod wrote to it, what a node has, and whether a node could have it. Nothing
//! here makes a mount for a pod; that is in [`super::source`].

pub mod commit;
mod condition;
mod examine;
mod layer;
mod observe;
mod paths;
pub mod profile;
mod stats;
pub mod status;
pub mod waiting;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use examine::try_overlay;
pub use observe::Observation;
pub use stats::{Stats, Usage};

use super::abnormal::Abnormal;
use super::record::Records;
use super::source::Preparer;
use super::source::mark::Mark;
use crate::kernel::Kernel;
use crate::lock::lock;
use condition::Conditions;

/// What looks at the volumes of one node.
pub struct Report {
    kernel: Arc<dyn Kernel>,
    mark: Mark,
    preparer: Arc<Preparer>,
    records: Records,
    timeout: Duration,
    conditions: Conditions,
    /// What was wrong with published paths when they were last asked about.
    abnormal: Mutex<HashMap<PathBuf, Abnormal>>,
}

impl Report {
    /// A look that takes longer than `timeout` is given up.
    pub fn new(
        kernel: Arc<dyn Kernel>,
        mark: Mark,
        preparer: Arc<Preparer>,
        records: Records,
        timeout: Duration,
    ) -> Self {
        let conditions = Conditions::new(Arc::clone(&preparer));
        Report { kernel, mark, preparer, records, timeout, conditions, abnormal: Mutex::default() }
    }

    /// A path that is not published any more.
    pub fn forget(&self, target: &Path) {
        lock(&self.abnormal).remove(target);
    }
}
