//! Whether an image is still what it was when it was attached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::paths;
use crate::error::{Error, Kind, Result};
use crate::kernel::image::Content;
use crate::lock::lock;
use crate::single_flight::Flights;
use crate::spec::Loopback;
use crate::volume::abnormal::{Abnormal, Harm, IMAGE_CORRUPTED, IMAGE_REPLACED, SERVER_SILENT};
use crate::volume::record::Record;
use crate::volume::source::{Device, Preparer, Unanswered};

/// How long an answer is good for: the kubelet asks about every volume each minute or so, and many volumes share an image.
const FRESH: Duration = Duration::from_secs(30);
/// How long a caller waits for a server; the question goes on, and its answer is there for the next caller.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long nothing is read although somebody reads, until that is worth a word.
const LONG: Duration = Duration::from_secs(20);
const HANGS: &str = "is well where its server is now, and reads of it get no answer: if the server has moved, tell this node by \
                     'csi-driver-squashfs move OLD NEW'";

const CORRUPTED: &str = "has other bytes than its root hash says, where it was read: who reads them gets errors. Put the image back, or \
                         look after the disk of its copy, and delete the pods";

/// What images are now, and when that was asked.
type Answers = HashMap<Loopback, (Instant, Result<Content>)>;

/// Asks about images.
pub struct Conditions {
    preparer: Arc<Preparer>,
    answers: Arc<Mutex<Answers>>,
    questions: Flights<Loopback, (), Content>,
    reads: Mutex<Unanswered>,
}

impl Conditions {
    pub fn new(preparer: Arc<Preparer>) -> Self {
        Conditions { preparer, answers: Arc::default(), questions: Flights::default(), reads: Mutex::default() }
    }

    /// What is wrong with the images of a published volume; `None` where nothing is.
    ///
    /// Never waits longer than a few seconds for an image. Images inside of images cannot change by themselves and are not looked at.
    pub async fn of(&self, record: &Record) -> Option<Abnormal> {
        let below = self.preparer.devices_below(record.target.clone()).await.unwrap_or_else(|error| {
            // Nothing better is known then than what the server says.
            tracing::debug!(%error, "what a volume stands on is not known");
            Vec::new()
        });
        for (image, attached) in &record.images {
            if image.is_replicated() {
                if let Some(wrong) = self.of_replicated(image, attached, &below).await {
                    return Some(wrong.of(format_args!("image {} of {}", image.path, image.base)));
                }
                continue;
            }
            let (place, on_server) = match image.base.export() {
                Some(export) => (export.to_string(), true),
                None if image.base.is_of_the_node() => (image.base.to_string(), false),
                None => continue,
            };
            if let Some(wrong) = self.of_image(image, attached, &below, on_server).await {
                return Some(wrong.of(format_args!("image {} of {place}", image.path)));
            }
        }
        None
    }

    /// The file on the server of its first path is looked at as that of an image which has one; of all servers it is told which are read.
    async fn of_replicated(&self, image: &Loopback, attached: &Content, below: &[Device]) -> Option<Abnormal> {
        let device = below.iter().find(|device| device.is_of(image, *attached))?;
        let there = image.on(device.server);
        if let Some(trouble) = self.preparer.digest_trouble(&there, *attached).await {
            return Some(trouble);
        }
        if device.is_local() || device.server.is_none() {
            return None;
        }
        match self.preparer.paths(device.number).await {
            Ok(paths) => {
                if let Some(trouble) = paths.and_then(|paths| paths::trouble(&paths, image)) {
                    return Some(trouble);
                }
            }
            Err(error) => tracing::debug!(%error, "by which servers a volume is read is not known"),
        }
        let now = self.look_at(&there).await.ok()?;
        let wrong = changed(attached, &now, false, &format!(" on {}", there.base))?;
        // What does not verify is read from the next server.
        Some(if image.verity.is_some() { Abnormal { harm: Harm::Degraded, ..wrong } } else { wrong })
    }

    async fn of_image(
        &self,
        image: &Loopback,
        attached: &Content,
        below: &[Device],
        on_server: bool,
    ) -> Option<Abnormal> {
        let devices: Vec<_> = below.iter().filter(|device| device.is_of(image, *attached)).collect();
        if let Some(trouble) = self.preparer.digest_trouble(image, *attached).await {
            return Some(trouble);
        }
        if devices.iter().any(|device| device.is_corrupted) {
            return Some(Abnormal::data_loss(IMAGE_CORRUPTED, CORRUPTED));
        }
        let now = self.look_at(image).await;
        if now.as_ref().is_ok_and(|now| now == attached) {
            let hang = on_server && hang(&mut lock(&self.reads), &devices, Instant::now());
            return hang.then(|| Abnormal::inaccessible(SERVER_SILENT, HANGS));
        }
        let is_local = !devices.is_empty() && devices.iter().all(|device| device.is_local());
        let place = if on_server { " on the server" } else { "" };
        match now {
            Ok(now) => changed(attached, &now, is_local, place),
            Err(error) if error.kind == Kind::NotFound => {
                let message = match (on_server, is_local) {
                    (_, true) => "is gone from the server: this volume goes on with its copy on this node",
                    (true, false) => "is gone from the server: what is not cached yet may be unreadable",
                    (false, false) => "is gone: this volume keeps the file; pods that start anew have none",
                };
                Some(Abnormal::degraded("ImageRemoved", message))
            }
            Err(_) if is_local => None,
            Err(error) => Some(Abnormal::unanswered(&error, format!("cannot be looked at: {error}"))),
        }
    }

    async fn look_at(&self, image: &Loopback) -> Result<Content> {
        let last = lock(&self.answers).get(image).cloned();
        if let Some((_, content)) = last.filter(|(since, _)| since.elapsed() < FRESH) {
            return content;
        }
        let ask = || {
            let (preparer, answers, image) = (Arc::clone(&self.preparer), Arc::clone(&self.answers), image.clone());
            async move {
                let content = preparer.look_at(&image).await;
                let mut answers = lock(&answers);
                // Nobody has asked about these for a while.
                answers.retain(|_, (since, _)| since.elapsed() < 10 * FRESH);
                answers.insert(image, (Instant::now(), content.clone()));
                content
            }
        };
        let of_server = image.base.export().is_some();
        tokio::time::timeout(PATIENCE, self.questions.run(image, ask)).await.unwrap_or_else(|_| {
            let whose = if of_server { "server" } else { "file system" };
            let message = format!("no answer in {} s: is the {whose} up?", PATIENCE.as_secs());
            Err(Error::new(Kind::Unavailable, message))
        })
    }
}

/// Whether nothing was read of one of these for a while although somebody reads: its server may answer, and be elsewhere.
fn hang(unanswered: &mut Unanswered, devices: &[&Device], now: Instant) -> bool {
    let mut hang = |device: &Device| {
        // A copy hangs with its disk.
        unanswered.of(device.number, device.identity, device.reads, now) >= LONG && !device.is_local()
    };
    // Each is looked at.
    devices.iter().filter(|device| hang(device)).count() > 0
}

/// What became of an image, `place` being where: on the server, or nothing for one of the node.
fn changed(attached: &Content, now: &Content, is_local: bool, place: &str) -> Option<Abnormal> {
    if attached == now {
        return None;
    }
    Some(if attached.inode != now.inode {
        let message = "this volume keeps the old file; pods that start anew get the new one";
        Abnormal::degraded(IMAGE_REPLACED, format!("was replaced{place}: {message}"))
    } else if is_local {
        let message = "this volume goes on with its copy on this node; pods that start anew get the new one";
        Abnormal::degraded(IMAGE_REPLACED, format!("was written over{place}: {message}"))
    } else if now.size < attached.size {
        let (before, now) = (attached.size, now.size);
        let message = format!("was truncated{place}, from {before} to {now} bytes: its content is damaged");
        Abnormal::data_loss("ImageTruncated", message)
    } else {
        let message = "its content is damaged; publish a new version under a new file";
        Abnormal::data_loss("ImageOverwritten", format!("was written over{place}: {message}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::image::ImageIdentity;
    use crate::kernel::loop_device::Reads;

    #[test]
    fn reads_that_get_no_answer_for_a_while_are_told_from_those_that_are_under_way() {
        let (mut unanswered, start) = (Unanswered::default(), Instant::now());
        let identity = ImageIdentity { device: 1, inode: 2, size: 3, changed: 4 };
        let mut look = |bytes, under_way, seconds| {
            let device =
                |number, under_way| Device::on_server(number, identity, Reads { bytes, under_way, answered: 0 });
            let (idle, busy) = (device(9, 0), device(7, under_way));
            hang(&mut unanswered, &[&busy, &idle], start + Duration::from_secs(seconds))
        };
        assert!(!look(10, 1, 0) && !look(20, 1, 60) && !look(20, 1, 79) && look(20, 2, 80));
        assert!(!look(20, 0, 81) && !look(20, 1, 82) && look(20, 1, 102));
    }

    #[test]
    fn each_way_in_which_an_image_can_change_has_its_words_and_its_harm() {
        let attached = Content { inode: 1, size: 100, modified: 5 };
        let words = |now| changed(&attached, &now, false, " on the server").unwrap().message;
        assert_eq!(changed(&attached, &attached, false, ""), None);
        assert!(words(Content { inode: 2, ..attached }).contains("replaced"));
        assert!(words(Content { size: 50, ..attached }).contains("truncated on the server, from 100 to 50"));
        assert!(words(Content { modified: 6, ..attached }).contains("its content is damaged"));
        let damaged = changed(&attached, &Content { modified: 6, ..attached }, false, "").unwrap();
        assert_eq!((damaged.harm, damaged.reason), (Harm::DataLoss, "ImageOverwritten"));
        let with_copy = changed(&attached, &Content { modified: 6, ..attached }, true, " on the server").unwrap();
        assert_eq!((with_copy.harm, with_copy.reason), (Harm::Degraded, "ImageReplaced"));
        let with_copy = with_copy.message;
        assert!(with_copy.contains("goes on with its copy"), "{with_copy}");
        let of_the_node = changed(&attached, &Content { inode: 2, ..attached }, false, "").unwrap().message;
        assert!(of_the_node.starts_with("was replaced: "), "{of_the_node}");
    }
}
