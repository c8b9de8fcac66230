//! Images that are several: an index on the server names the layers beside it.

use std::os::unix::fs::FileExt;

use super::prepare::Preparer;
use super::prepared::Known;
use crate::error::{Error, Kind, Result};
use crate::kernel::image::Image;
use crate::kernel::{self, Doing};
use crate::places::run_at;
use crate::spec::{Loopback, index};

/// The largest index.
const MAX: usize = 64 << 10;

impl Preparer {
    /// The images that one is, uppermost first: itself, or the layers that its index names now, or did when those that are `known` were
    /// attached. What the policy says of the index holds for them: they lie in its directory.
    pub(super) async fn layers(&self, spec: &Loopback, known: &[Known]) -> Result<Vec<Loopback>> {
        if !spec.is_index() {
            return Ok(vec![spec.clone()]);
        }
        let of_then: Vec<_> = known
            .iter()
            .map(|known| &known.image)
            .filter(|image| spec.name_of_layer(image).is_some())
            .cloned()
            .collect();
        if !of_then.is_empty() {
            return Ok(of_then);
        }
        if spec.digest.is_some() || spec.verity.is_some() {
            let message =
                format!("image {} is an index of layers: a digest and a root hash are those of one file", spec.path);
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let (base, image) = self.open_image(spec, known, None).await?;
        let path = spec.path.clone();
        let text = run_at(base.places(), format!("read index {path}"), move || read(&image, &path, MAX)).await?;
        let names = index::parse(&text).map_err(|why| {
            Error::new(Kind::FailedPrecondition, format!("image {} of {}: {why}", spec.path, spec.base))
        })?;
        Ok(names.iter().map(|name| spec.layer(name)).collect())
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
