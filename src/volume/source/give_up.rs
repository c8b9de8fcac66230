//! Paths whose server does not answer those who read: given up by the driver in seconds. The kernel takes a path for failed after its
//! first error, and goes on with what is on its way there: one read after another, each of which waits for as long as NFS does.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::moving::Published;
use super::paths::{Paths, ServerPath};
use super::prepare::Preparer;
use crate::blocking;
use crate::error::Result;
use crate::kernel::device_mapper::Message;
use crate::kernel::loop_device;
use crate::lock::lock;
use crate::spec::Loopback;

/// For how long a path may be read without an answer until its server is asked, and how long that may take.
const SILENT: Duration = Duration::from_secs(2);

/// For how long reads may have no answer of a server that says it is there.
const HANGS: Duration = Duration::from_secs(20);

/// Loop devices, and for how long reads of them have no answer.
pub type Silent = HashMap<u32, Duration>;

impl Preparer {
    /// The loop devices of paths that are read and have no answer for a while, and for how long; `None` where no image has several servers.
    /// Asks none.
    pub async fn silent_paths(&self, now: Instant) -> Result<Option<Silent>> {
        let there = self.all_paths().await?;
        if there.is_empty() {
            return Ok(None);
        }
        let each: Vec<_> = there.iter().flat_map(|paths| &paths.each).collect();
        let mut unanswered = lock(&self.unanswered);
        unanswered.keep(|device| each.iter().any(|path| path.loop_device == device));
        let silence = |path: &&ServerPath| {
            let silence = unanswered.of(path.loop_device, path.identity, path.reads, now);
            // A copy is as slow as its disk.
            let is_silent = silence >= SILENT && !path.state.is_failed && !path.is_local;
            is_silent.then_some((path.loop_device, silence))
        };
        Ok(Some(each.iter().filter_map(silence).collect()))
    }

    /// Gives up those of the `silent` paths of published images whose servers do not answer: what is read there goes on at another server.
    pub async fn give_up_paths(
        &self,
        published: impl Future<Output = Result<Vec<(PathBuf, Published)>>>,
        silent: &Silent,
    ) -> Result<()> {
        let there = self.paths_in_use(published).await?;
        let mut asked = Vec::new();
        for (paths, Published { image, .. }) in there.values() {
            for path in &paths.each {
                if let Some(silence) = silent.get(&path.loop_device) {
                    asked.push(self.give_up(paths, path, image.on(Some(path.server)), *silence));
                }
            }
        }
        join_all(asked).await.into_iter().collect()
    }

    async fn give_up(&self, paths: &Paths, path: &ServerPath, there: Loopback, silence: Duration) -> Result<()> {
        let Some(nfs) = there.base.export() else { return Ok(()) };
        let export = self.image_export(nfs);
        // Its disk may hang, or it waits for other clients after a restart: better read elsewhere, if there is another.
        let is_tried = silence >= HANGS && paths.each.iter().filter(|path| !path.state.is_failed).count() > 1;
        if !is_tried && matches!(tokio::time::timeout(SILENT, self.exports.answers(&export)).await, Ok(true)) {
            return Ok(());
        }
        tracing::warn!("{export} does not answer: {} is read on from another server", there.path);
        self.tell(paths.first, Message::FailPath(path.state.device)).await?;
        // An earlier process's mount is not there to do this with: then the kernel takes its time.
        let Some(mount) = self.exports.find(&export) else { return Ok(()) };
        let (device, identity) = (path.loop_device, path.identity);
        let abort = move || match mount.has(identity)? {
            true => mount.abort_calls(|| loop_device::reads(device).under_way == 0),
            false => Ok(()),
        };
        blocking::run(format!("end the calls to {export}"), abort).await
    }
}
