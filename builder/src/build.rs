//! From a source to images in a store.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use csi_driver_squashfs::kernel::verity::{hexadecimal as hexadecimal_of, seal, verify};
use oci_client::manifest::OciDescriptor;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::entries::{Form, Limits};
use super::image::{Blobs, Image, Platform, digest_of, hexadecimal};
use super::pack::{Layer, pack, plan};
use super::source::Source;
use super::squashfs::Format;
use super::store::{Made, Store, check_name};
use super::tar_file::TarFile;

/// How images are made.
pub struct Builder {
    pub store: Store,
    pub format: Format,
    pub limits: Limits,
    pub platform: Platform,
    /// The most layers of a stack.
    pub most_layers: usize,
    /// Where layers lie while they are read.
    pub work: TempDir,
}

/// Which files show a container image together: beside them, by the image's name.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Stack {
    /// What it was made of; the same for ever.
    pub source: String,
    /// The files, the lowest first.
    pub layers: Vec<String>,
    /// The root hashes of their trees, by which the kernel verifies them where somebody has signed this.
    pub verity: BTreeMap<String, String>,
}

/// What was made, or was there.
#[derive(Debug, PartialEq, Eq)]
pub enum Built {
    Flat(String),
    Stack { name: String, stack: Stack },
}

impl Builder {
    pub fn build(&self, source: Source, name: Option<String>) -> Result<Built> {
        let needed = || name.clone().context("name what is to be made, with its version, by --name");
        match source {
            Source::Tree(tree) => self.flat(&needed()?, |image| self.pack(&[&*tree], false, image)),
            Source::Image(blobs) => self.image(&*blobs, name),
        }
    }

    fn flat(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Built> {
        check_name(name)?;
        let file = format!("{name}.sqsh");
        let made = self.store.make(&file, make)?;
        ensure!(
            made == Made::Now,
            "{} is there: give each version a name of its own",
            self.store.path(&file).display()
        );
        Ok(Built::Flat(file))
    }

    fn image(&self, blobs: &dyn Blobs, name: Option<String>) -> Result<Built> {
        let image = Image::find(blobs, &self.platform)?;
        let digits = hexadecimal(&image.digest)?;
        let name = name.unwrap_or_else(|| format!("{}-{}", blobs.name(), &digits[..12]));
        check_name(&name)?;
        let fetched = |layers: &[_]| -> Result<Vec<TarFile>> {
            let fetch = |layer: &OciDescriptor| {
                let path = self.work.path().join(hexadecimal(&layer.digest)?);
                let is_small = u64::try_from(layer.size).is_ok_and(|size| size <= self.limits.bytes);
                ensure!(is_small, "layer {} has {} bytes: see --max-size", layer.digest, layer.size);
                eprintln!("layer {}: {} bytes", layer.digest, layer.size);
                blobs.fetch(layer, &path)?;
                Ok(TarFile { path, form: Form::LayerByDigest, name: format!("layer {}", layer.digest) })
            };
            layers.iter().map(fetch).collect()
        };
        let make = |layers: &[_], is_more, image: &Path| {
            let fetched = fetched(layers)?;
            let tars: Vec<&dyn Layer> = fetched.iter().map(|tar| tar as _).collect();
            self.pack(&tars, is_more, image)?;
            // Layers are large, and read once.
            fetched.iter().try_for_each(|tar| fs::remove_file(&tar.path)).context("remove what was fetched")
        };
        let (mut layers, mut verity) = (Vec::new(), BTreeMap::new());
        for layer in stack(&once(image.layers), self.most_layers) {
            // One is the same wherever it lies; of several the whiteouts go where nothing is below.
            let is_more = layer.len() == 1 || !layers.is_empty();
            let digest = match layer {
                [one] => one.digest.clone(),
                several => {
                    let digests: Vec<_> = several.iter().map(|layer| layer.digest.as_str()).collect();
                    digest_of(format!("{}{}", if is_more { "upper\n" } else { "" }, digests.join("\n")).as_bytes())
                }
            };
            let file = format!("sha256-{}.sqsh", hexadecimal(&digest)?);
            let made = self.store.make(&file, |new| make(layer, is_more, new))?;
            verity.insert(file.clone(), self.root_hash(&file)?);
            eprintln!("{file}: {}", if made == Made::Now { "made" } else { "was there" });
            layers.push(file);
        }
        let stack = Stack { source: blobs.by_digest(&image.digest), layers, verity };
        self.keep(&name, &stack)?;
        Ok(Built::Stack { name, stack })
    }

    /// What is there by this name must be the same image, but may have come from another registry.
    pub(super) fn keep(&self, name: &str, stack: &Stack) -> Result<()> {
        let file = format!("{name}.json");
        let text = serde_json::to_string_pretty(stack).context("write the stack")? + "\n";
        if self.store.make(&file, |new| Ok(fs::write(new, text)?))? == Made::Before {
            let path = self.store.path(&file);
            let there = || Ok::<Stack, anyhow::Error>(serde_json::from_slice(&fs::read(&path)?)?);
            let there = there().with_context(|| format!("read {}", path.display()))?;
            let is_same = there.layers == stack.layers && there.verity == stack.verity;
            ensure!(is_same, "{} is there, and says something else: choose another --name", path.display());
        }
        Ok(())
    }

    pub(super) fn pack(&self, tars: &[&dyn Layer], is_more: bool, image: &Path) -> Result<()> {
        let plan = plan(tars, is_more, self.limits)?;
        self.format.make(image, |out| pack(&plan, tars, self.limits, out))?;
        let file = File::options().read(true).write(true).open(image).context("open the image")?;
        seal(&file).map(drop).context("seal the image")
    }

    /// Of a file of the store, of which all is read: it may have been there for long.
    pub(super) fn root_hash(&self, name: &str) -> Result<String> {
        let path = self.store.path(name);
        let read = || Ok::<_, anyhow::Error>(hexadecimal_of(&verify(&File::open(&path)?)?));
        read().with_context(|| format!("verify {}", path.display()))
    }
}

/// A layer that lies above itself, as empty ones do, has the same effect alone; overlayfs takes none twice.
fn once(layers: Vec<OciDescriptor>) -> Vec<OciDescriptor> {
    let mut seen = HashSet::new();
    let mut once: Vec<_> = layers.into_iter().rev().filter(|layer| seen.insert(layer.digest.clone())).collect();
    once.reverse();
    once
}

/// What becomes a file each. Where there are more than `most`, the uppermost are made one: those below are shared by more images.
fn stack<T>(layers: &[T], most: usize) -> Vec<&[T]> {
    let (single, merged) = layers.split_at(if layers.len() > most { most - 1 } else { layers.len() });
    let mut stack: Vec<_> = single.chunks(1).collect();
    stack.extend((!merged.is_empty()).then_some(merged));
    stack
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_an_image_has_twice_is_there_once_where_it_is_uppermost() {
        let layer = |digest: &&str| OciDescriptor { digest: (*digest).to_owned(), ..OciDescriptor::default() };
        let layers = once(["a", "b", "a", "c", "b"].iter().map(layer).collect());
        assert_eq!(layers.iter().map(|layer| layer.digest.as_str()).collect::<Vec<_>>(), ["a", "c", "b"]);
    }

    #[test]
    fn a_stack_that_is_too_high_has_its_uppermost_layers_in_one() {
        assert_eq!(stack(&[1, 2, 3], 3), [&[1][..], &[2], &[3]]);
        assert_eq!(stack(&[1, 2, 3, 4], 3), [&[1][..], &[2], &[3, 4]]);
        assert_eq!(stack(&[1, 2], 1), [&[1, 2][..]]);
        assert!(stack::<u8>(&[], 1).is_empty());
    }
}
