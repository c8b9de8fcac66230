//! What images are made of.

use std::path::Path;

use anyhow::{Context, Result};

use super::directory::Directory;
use super::entries::{Form, Limits};
use super::image::Blobs;
use super::layout::Layout;
use super::pack::Layer;
use super::registry::{Access, Registry};
use super::tar_file::{STANDARD_INPUT, TarFile};

pub enum Source {
    /// A directory or a tar.
    Tree(Box<dyn Layer>),
    /// A container image.
    Image(Box<dyn Blobs>),
}

impl Source {
    /// `oci://REGISTRY/NAME:TAG`, `oci://REGISTRY/NAME@DIGEST`, a directory, or a tar, which may be standard input by the name `-`; the last two may
    /// be OCI layouts, of which `image` is the one of this name.
    pub fn find(text: &str, image: Option<String>, access: &Access, work: &Path, limits: Limits) -> Result<Source> {
        if let Some(name) = text.strip_prefix("oci://") {
            return Ok(Source::Image(Box::new(Registry::new(name, access)?)));
        }
        let path = Path::new(text);
        if text == STANDARD_INPUT {
            return Source::of_tar(TarFile::read(text, Form::Files, work, limits)?, image, work, limits);
        }
        let kind = std::fs::metadata(path).with_context(|| format!("look at {text}"))?;
        if kind.is_dir() && Layout::is_one(path) {
            return Ok(Source::Image(Box::new(Layout::open(path, image))));
        }
        if kind.is_dir() {
            return Ok(Source::Tree(Box::new(Directory::new(path))));
        }
        Source::of_tar(TarFile::read(text, Form::Files, work, limits)?, image, work, limits)
    }

    fn of_tar(tar: TarFile, image: Option<String>, work: &Path, limits: Limits) -> Result<Source> {
        let layout = Layout::unpack(&tar.path, tar.open()?, image, work, limits);
        Ok(match layout.with_context(|| format!("read {}", tar.name))? {
            Some(layout) => Source::Image(Box::new(layout)),
            None => Source::Tree(Box::new(tar)),
        })
    }
}
