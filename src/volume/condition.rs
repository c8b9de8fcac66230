//! Whether an image is still what it was when it was attached.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::error::{Error, Kind, Result};
use super::record::Record;
use super::{Volumes, lock};
use crate::kernel::image::Content;
use crate::spec::{Base, Bind, Device, Loopback, Mount, Nfs};

/// How long an answer is good for: the kubelet asks about every volume each minute or so, and many volumes share an image.
const FRESH: Duration = Duration::from_secs(30);
/// How long a caller waits for a server; the question goes on, and its answer is there for the next caller.
const PATIENCE: Duration = Duration::from_secs(3);

/// The last answers, by image.
#[derive(Default)]
pub struct Conditions(Mutex<HashMap<Loopback, Answer>>);

#[derive(Clone)]
struct Answer {
    since: Instant,
    /// `None` while the first question is under way.
    content: Option<Result<Content>>,
    under_way: bool,
}

impl Volumes {
    /// What is wrong with the images of a published volume, in a sentence; `None` where nothing is.
    ///
    /// Never waits longer than a few seconds. Images of the node, and images inside of images, cannot change unnoticed by the node's own
    /// people and are not looked at.
    pub async fn condition(self: &Arc<Self>, record: &Record) -> Option<String> {
        let mut images = Vec::new();
        list_images(&record.publication.mount, &mut images);
        for (image, attached) in images.into_iter().zip(&record.contents) {
            if let Some(nfs) = server_of(&image.base) {
                let wrong = match self.look_at(image).await {
                    Ok(now) => changed(attached, &now),
                    Err(error) if error.kind == Kind::NotFound => {
                        Some("is gone from the server: what is not cached yet may be unreadable".to_owned())
                    }
                    Err(error) => Some(format!("cannot be looked at: {error}")),
                };
                if let Some(wrong) = wrong {
                    return Some(format!("image {} of {}:{} {wrong}", image.path, nfs.host, nfs.path));
                }
            }
        }
        None
    }

    async fn look_at(self: &Arc<Self>, image: &Loopback) -> Result<Content> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = lock(&self.conditions.0).get(image).cloned();
            match answer {
                Some(Answer { since, content: Some(content), .. }) if since.elapsed() < FRESH => return content,
                Some(Answer { under_way: true, .. }) => {}
                _ => self.ask_about(image),
            }
            if Instant::now() >= deadline {
                let message = format!("no answer in {} s: is the server up?", PATIENCE.as_secs());
                return Err(Error::new(Kind::Unavailable, message));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn ask_about(self: &Arc<Self>, image: &Loopback) {
        {
            let mut answers = lock(&self.conditions.0);
            // Nobody has asked about these for a while.
            answers.retain(|_, answer| answer.under_way || answer.since.elapsed() < 10 * FRESH);
            let answer = Answer { since: Instant::now(), content: None, under_way: true };
            answers.insert(image.clone(), answer);
        }
        let (this, image) = (Arc::clone(self), image.clone());
        tokio::spawn(async move {
            let content = Some(this.preparer.look_at(&image).await);
            let answer = Answer { since: Instant::now(), content, under_way: false };
            lock(&this.conditions.0).insert(image, answer);
        });
    }
}

fn changed(attached: &Content, now: &Content) -> Option<String> {
    if attached == now {
        return None;
    }
    Some(if attached.inode != now.inode {
        "was replaced on the server: this volume keeps the old file; pods that start anew get the new one".into()
    } else if now.size < attached.size {
        format!("was truncated on the server, from {} to {} bytes: its content is damaged", attached.size, now.size)
    } else {
        "was written over on the server: its content is damaged; publish a new version under a new file".into()
    })
}

/// The export that an image file lies on, itself or a directory of it.
fn server_of(base: &Base) -> Option<&Nfs> {
    match base {
        Base::Mount(mount) => match &**mount {
            Mount::Nfs(nfs) => Some(nfs),
            Mount::Bind(bind) => server_of(&bind.base),
            Mount::Attach(_) | Mount::Overlay(_) => None,
        },
        Base::Root => None,
    }
}

/// The image files of a spec, in the order in which they are prepared.
pub fn list_images<'a>(mount: &'a Mount, images: &mut Vec<&'a Loopback>) {
    match mount {
        Mount::Nfs(_) => {}
        Mount::Attach(attach) => {
            if let Device::Loopback(loopback) = &attach.device {
                if let Base::Mount(base) = &loopback.base {
                    list_images(base, images);
                }
                images.push(loopback);
            }
        }
        Mount::Bind(Bind { base: Base::Mount(base), .. }) => list_images(base, images),
        Mount::Bind(_) => {}
        Mount::Overlay(overlay) => overlay.lower.iter().for_each(|lower| list_images(lower, images)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_in_which_an_image_can_change_has_its_words() {
        let attached = Content { inode: 1, size: 100, modified: 5 };
        let words = |now| changed(&attached, &now).unwrap_or_default();
        assert_eq!(words(attached), "");
        assert!(words(Content { inode: 2, ..attached }).contains("replaced"));
        assert!(words(Content { size: 50, ..attached }).contains("truncated on the server, from 100 to 50"));
        assert!(words(Content { modified: 6, ..attached }).contains("written over"));
    }
}
