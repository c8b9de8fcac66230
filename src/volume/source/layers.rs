//! Images that are several: an index on the server names the layers beside it.

use std::os::unix::fs::FileExt;

use super::local::Opened;
use super::prepare::Preparer;
use super::prepared::{Known, PreparedBase};
use crate::blocking::OffThread;
use crate::error::{Error, Kind, Result, first_that_can};
use crate::kernel::image::Image;
use crate::kernel::{self, Doing};
use crate::places::run_at;
use crate::spec::{Loopback, Verity, index};

/// The largest index.
const MAX: usize = 64 << 10;

impl Preparer {
    /// The images that one is, uppermost first: itself, or the layers that its index names now, or did when those that are `known` were
    /// attached. What the policy says of the index holds for them: they lie in its directory.
    pub(super) async fn layers(&self, spec: &Loopback, known: &[Known]) -> Result<Vec<Loopback>> {
        if !spec.is_index() {
            return Ok(vec![spec.clone()]);
        }
        let of_then: Vec<_> =
            known.iter().map(|known| &known.image).filter(|image| spec.named(image).is_some()).cloned().collect();
        if !of_then.is_empty() {
            return Ok(of_then);
        }
        if spec.digest.is_some() || matches!(spec.verity, Some(Verity::Root(_))) {
            let message =
                format!("image {} is an index of layers: a digest and a root hash are those of one file", spec.path);
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let (there, base, image) = self.open_index(spec, known).await?;
        let (path, places) = (spec.path.clone(), base.as_ref().and_then(PreparedBase::places));
        let text = run_at(places, format!("read index {path}"), move || read(&image, &path, MAX)).await?;
        let wrong = |kind, why: &str| Error::new(kind, format!("image {} of {}: {why}", spec.path, spec.base));
        let mut layers = index::parse(&text).map_err(|why| wrong(Kind::FailedPrecondition, &why))?;
        match spec.verity {
            Some(_) => {
                self.check_signed(&there, base.as_ref(), &spec.path, &text).await?;
                if let Some(layer) = layers.iter().find(|layer| layer.verity.is_none()) {
                    let why = format!("it is signed, and names no root hash of its layer {}", layer.name);
                    return Err(wrong(Kind::FailedPrecondition, &why));
                }
            }
            // Nobody vouches for what it says.
            None => layers.iter_mut().for_each(|layer| layer.verity = None),
        }
        Ok(layers.iter().map(|layer| spec.layer(layer)).collect())
    }

    /// The index on the first of its servers that has it, or on this node.
    async fn open_index(
        &self,
        spec: &Loopback,
        known: &[Known],
    ) -> Result<(Loopback, Option<PreparedBase>, OffThread<Image>)> {
        let open = |(_, there): (u8, Loopback)| async move {
            let (base, image) = self.open_index_on(&there, known).await?;
            Ok((there, base, image))
        };
        first_that_can(self.in_order(spec), open).await
    }

    async fn open_index_on(
        &self,
        spec: &Loopback,
        known: &[Known],
    ) -> Result<(Option<PreparedBase>, OffThread<Image>)> {
        let opened = self.open_image(spec, known, None);
        let Some(name) = self.copied(spec)? else {
            return opened.await.map(|(base, image)| (Some(base), image));
        };
        Ok(match self.open_or_copy(spec, &name, opened).await? {
            Opened::OnServer(base, image) => {
                if image.identity.size <= MAX as u64 {
                    self.copy_small(name, &image, &base).await?;
                }
                (Some(base), image)
            }
            Opened::Copied(_, copy) => (None, copy),
        })
    }
}

/// What is in a small file: at most so many bytes.
pub(super) fn read(image: &Image, path: &str, max: usize) -> kernel::Result<Vec<u8>> {
    let (mut content, mut length) = (vec![0; max], 0);
    while length < max {
        match image.file.read_at(&mut content[length..], length as u64).doing(|| format!("read {path}"))? {
            0 => break,
            more => length += more,
        }
    }
    content.truncate(length);
    Ok(content)
}
