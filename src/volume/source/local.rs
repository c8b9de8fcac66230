//! Images that are to be read from this node's disk: from their copies, or from their servers until there is one.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::prepare::Preparer;
use super::prepared::{ImageOnLoop, Origin, PreparedBase};
use crate::blocking::OffThread;
use crate::error::{Error, Kind, Result, first_that_can};
use crate::kernel::Doing;
use crate::kernel::file_system::FileSystem;
use crate::kernel::image::{Content, Image};
use crate::metrics;
use crate::spec::Loopback;
use crate::step::{self, Step};
use crate::volume::abnormal::{Abnormal, IMAGE_CORRUPTED};
use crate::volume::cache::{Cache, Entry, Name, Original, Source, other_bytes};

/// How long a server may take to say what an image is, where there is a copy to begin with.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A file that is open.
pub(super) enum Opened {
    OnServer(PreparedBase, OffThread<Image>),
    /// What the server had last.
    Copied(Original, OffThread<Image>),
}

impl Preparer {
    /// The name of an image that is to be copied to this node.
    pub(super) fn copied(&self, image: &Loopback) -> Result<Option<Name>> {
        let Some(name) = Name::of(image) else { return Ok(None) };
        let allowed = self.policy().node_cache(step::namespace().as_deref());
        Ok(self.cache.wants(image, allowed)?.then_some(name))
    }

    /// The loop device of an image that is to be copied: of the copy, where there is one of what the server has now, or where the server
    /// does not answer. Else it is of the file on the server, until that is copied.
    pub(super) async fn image_or_copy(
        &self,
        spec: &Loopback,
        name: Name,
        opened: impl Future<Output = Result<(PreparedBase, OffThread<Image>)>>,
        file_system: FileSystem,
    ) -> Result<ImageOnLoop> {
        let (base, image) = match self.open_or_copy(spec, &name, opened).await? {
            Opened::OnServer(base, image) => (base, image),
            Opened::Copied(original, copy) => {
                let root = self.root_hash(spec, None).await?;
                let attached = self.attach(spec, copy, root, file_system, Origin::Copy).await?;
                return Ok(ImageOnLoop { spec: spec.clone(), content: original.content(), attached });
            }
        };
        let (original, content) = (Original::of(name, &image), image.content);
        let root = self.root_hash(spec, Some(&base)).await?;
        if let Some(copy) = self.cache.confirmed(&original, spec.digest).await? {
            metrics::cache().hits.inc();
            let attached = self.attach(spec, copy, root, file_system, Origin::Copy).await?;
            return Ok(ImageOnLoop { spec: spec.clone(), content, attached });
        }
        metrics::cache().misses.inc();
        let source = self.source(original, &image, &base)?;
        let identity = image.identity;
        let attached = self.attach(spec, image, root, file_system, Origin::Bases(vec![base.clone()])).await?;
        self.copy_behind(source, identity, base);
        Ok(ImageOnLoop { spec: spec.clone(), content, attached })
    }

    /// A file that is to be copied, as its server has it, or as the copy has it where that does not answer.
    pub(super) async fn open_or_copy(
        &self,
        spec: &Loopback,
        name: &Name,
        opened: impl Future<Output = Result<(PreparedBase, OffThread<Image>)>>,
    ) -> Result<Opened> {
        let opened = match self.cache.has(name, spec.digest).await {
            false => opened.await,
            true => tokio::time::timeout(PATIENCE, opened).await.unwrap_or_else(|_| Err(no_answer())),
        };
        match opened {
            Ok((base, image)) => Ok(Opened::OnServer(base, image)),
            Err(error) if error.kind == Kind::Unavailable => {
                let Some((original, copy)) = self.cache.last_known(name, spec.digest).await? else {
                    return Err(error);
                };
                metrics::cache().hits.inc();
                tracing::warn!("{name} begins with its copy on this node: {error}");
                Ok(Opened::Copied(original, copy))
            }
            Err(error) => {
                self.mark_gone(name, &error).await;
                Err(error)
            }
        }
    }

    /// What a server says that it has no more is not begun with when it is silent.
    pub(super) async fn mark_gone(&self, name: &Name, error: &Error) {
        if is_of_server(error)
            && let Err(error) = self.cache.is_gone(name).await
        {
            tracing::warn!(%error, "an older copy is not marked");
        }
    }

    /// Keeps a copy of a small file that belongs to images, for when its server is silent: they have theirs.
    pub(super) async fn copy_small(&self, name: Name, image: &Image, base: &PreparedBase) -> Result<()> {
        let original = Original::of(name, image);
        if self.cache.confirmed(&original, None).await?.is_none() {
            let (cache, source) = (Arc::clone(&self.cache), self.source(original, image, base)?);
            // What failed is logged, and tried again at the next volume.
            let copy = async move { drop(cache.copy(source).await) };
            tokio::spawn(Step::for_namespace(step::namespace().as_deref()).observe(copy));
        }
        Ok(())
    }

    /// Copies an image to this node, with its layers if it has any, and waits for it, whether a volume uses it or not; says what it is.
    pub async fn warm(&self, spec: &Loopback) -> Result<Vec<Entry>> {
        let mut copies = Vec::new();
        if spec.is_index() {
            copies.push(self.warm_any(spec).await?);
        }
        for layer in self.layers(spec, &[]).await? {
            copies.push(self.warm_any(&layer).await?);
        }
        Ok(copies)
    }

    /// From the first of its servers that has it.
    async fn warm_any(&self, spec: &Loopback) -> Result<Entry> {
        let warm = |(_, there): (u8, Loopback)| async move { self.warm_one(&there).await };
        first_that_can(self.in_order(spec), warm).await
    }

    async fn warm_one(&self, spec: &Loopback) -> Result<Entry> {
        let Some(name) = Name::of(spec) else {
            let message = format!("image {} lies on no export: only such images are copied", spec.path);
            return Err(Error::new(Kind::FailedPrecondition, message));
        };
        if !self.policy().node_cache(None) {
            let message = format!("the policy does not allow copies on the node: {name} is not copied");
            return Err(Error::new(Kind::FailedPrecondition, message));
        }
        let (base, image) = self.open_image(spec, &[], None).await?;
        let original = Original::of(name.clone(), &image);
        if self.cache.confirmed(&original, spec.digest).await?.is_none() {
            self.cache.copy(self.source(original.clone(), &image, &base)?).await?;
        }
        let copies = self.cache.copies_of(&name).await?;
        copies.into_iter().find(|copy| copy.original == original).ok_or_else(|| {
            Error::new(Kind::Aborted, format!("{name} is being copied by another process: see 'status' there"))
        })
    }

    /// The copies of this node.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    pub(super) fn source(&self, original: Original, image: &Image, base: &PreparedBase) -> Result<Source> {
        let file = image.file.try_clone().doing(|| "keep an image open".into())?;
        Ok(Source { original, file: OffThread::new(file), places: base.places() })
    }

    /// What is wrong with the digest of an image that a volume has: it turned out to be another, or nobody can look.
    pub async fn digest_trouble(&self, image: &Loopback, content: Content) -> Option<Abnormal> {
        let (Some(name), Some(_)) = (Name::of(image), image.digest) else { return None };
        let mut copies = self.cache.copies_of(&name).await.unwrap_or_default();
        copies.retain(|copy| copy.original.content() == content);
        if let Some(wrong) = copies.iter().find(|copy| !copy.has(image.digest)) {
            let message = format!("is not the one that is wanted: {}", other_bytes(wrong, image.digest));
            return Some(Abnormal::data_loss(IMAGE_CORRUPTED, message));
        }
        let why = self.cache.failure(&name, content).filter(|_| copies.is_empty())?;
        let message = format!("was not checked for the digest that the volume names, as it could not be copied: {why}");
        Some(Abnormal::degraded("DigestUnchecked", message))
    }
}

pub(super) fn no_answer() -> Error {
    Error::new(Kind::Unavailable, format!("no answer in {} s: is the server up?", PATIENCE.as_secs()))
}

/// Whether an error is the server's answer about a file, and not that there is none, or that this node cannot ask.
fn is_of_server(error: &Error) -> bool {
    match error.kind {
        Kind::NotFound | Kind::PermissionDenied => true,
        // There is something else by that name.
        Kind::FailedPrecondition => {
            matches!(error.errno(), Some(Errno::MEDIUMTYPE | Errno::NODATA | Errno::ISDIR | Errno::NOTDIR))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests;
