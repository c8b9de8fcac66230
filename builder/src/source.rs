//! What images are made of.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::directory::Directory;
use super::entries::Limits;
use super::image::Blobs;
use super::layout::Layout;
use super::pack::Layer;
use super::registry::{Access, Registry};
use super::tar_file::TarFile;

pub enum Source {
    /// A directory or a tar.
    Tree(Box<dyn Layer>),
    /// A container image.
    Image(Box<dyn Blobs>),
}

impl Source {
    /// `oci://REGISTRY/NAME:TAG`, `oci://REGISTRY/NAME@DIGEST`, a directory, or a tar; the last two may be OCI layouts, of which `image` is the
    /// one of this name.
    pub fn find(text: &str, image: Option<String>, access: &Access, work: &Path, limits: Limits) -> Result<Source> {
        if let Some(name) = text.strip_prefix("oci://") {
            return Ok(Source::Image(Box::new(Registry::new(name, access)?)));
        }
        let path = Path::new(text);
        let kind = std::fs::metadata(path).with_context(|| format!("look at {text}"))?;
        if kind.is_dir() && Layout::is_one(path) {
            return Ok(Source::Image(Box::new(Layout::open(path, image))));
        }
        if kind.is_dir() {
            return Ok(Source::Tree(Box::new(Directory::new(path))));
        }
        ensure!(kind.is_file(), "{text} is no directory and no file");
        let tar = TarFile { path: path.to_owned(), is_layer: false, name: text.to_owned() };
        let layout = Layout::unpack(path, tar.open()?, image, work, limits).with_context(|| format!("read {text}"))?;
        Ok(match layout {
            Some(layout) => Source::Image(Box::new(layout)),
            None => Source::Tree(Box::new(tar)),
        })
    }
}
