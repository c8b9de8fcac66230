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
use super::progress;
use super::sign::Key;
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
    /// By which what is made is signed.
    pub key: Option<Key>,
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

    fn flat(&self, name: &str, make: impl FnOnce(&Path) -> Result<String>) -> Result<Built> {
        check_name(name)?;
        let file = format!("{name}.sqsh");
        let is_there = || format!("{} is there: give each version a name of its own", self.store.path(&file).display());
        ensure!(!self.store.has(&file)?, is_there());
        let (made, root) = self.made(&file, make)?;
        ensure!(made == Made::Now, is_there());
        if self.key.is_some() {
            let (beside, root) = (format!("{file}.root"), root + "\n");
            self.store.make(&beside, |new| Ok(fs::write(new, &root)?))?;
            self.sign(&beside, &root)?;
        }
        Ok(Built::Flat(file))
    }

    fn image(&self, blobs: &dyn Blobs, name: Option<String>) -> Result<Built> {
        let image = Image::find(blobs, &self.platform)?;
        let digits = hexadecimal(&image.digest)?;
        let name = name.unwrap_or_else(|| format!("{}-{}", blobs.name(), &digits[..12]));
        check_name(&name)?;
        let source = format!("@{}", image.digest);
        if let Some(stack) = self.there(&name, &source)?
            && self.is_signed(&name, &stack)?
        {
            image.layers.iter().try_for_each(|layer| blobs.look_for(layer))?;
            eprintln!("{name}.json: was there");
            return Ok(Built::Stack { name, stack });
        }
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
            let root = self.pack(&tars, is_more, image)?;
            // Layers are large, and read once.
            fetched.iter().try_for_each(|tar| fs::remove_file(&tar.path)).context("remove what was fetched")?;
            Ok(root)
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
            let (made, root) = self.made(&file, |new| make(layer, is_more, new))?;
            if made == Made::Before {
                // Who knows its digest may not be who may read it.
                layer.iter().try_for_each(|layer| blobs.look_for(layer))?;
            }
            verity.insert(file.clone(), root);
            eprintln!("{file}: {}", if made == Made::Now { "made" } else { "was there" });
            layers.push(file);
        }
        let stack = Stack { source: blobs.by_digest(&image.digest), layers, verity };
        let stack = self.keep(&name, stack, &source)?;
        for layer in &stack.layers {
            ensure!(self.store.has(layer)?, "{layer} is gone again: make the image once more");
        }
        Ok(Built::Stack { name, stack })
    }

    /// A file of the store, and its root hash, which `make` knows of one that is new.
    pub(super) fn made(&self, file: &str, make: impl FnOnce(&Path) -> Result<String>) -> Result<(Made, String)> {
        let mut packed = None;
        let made = self.store.make(file, |new| make(new).map(|root| packed = Some(root)))?;
        let root = self.root_hash(file)?;
        let is_it = made == Made::Before || packed.as_ref() == Some(&root);
        ensure!(is_it, "{} is not what was made: somebody else writes to it", self.store.path(file).display());
        Ok((made, root))
    }

    /// What is there by this name, where that is of a source that ends like this, and whole: it may have been made with other layers in one,
    /// and from another registry.
    fn there(&self, name: &str, source: &str) -> Result<Option<Stack>> {
        let file = format!("{name}.json");
        if !self.store.has(&file)? {
            return Ok(None);
        }
        let path = self.store.path(&file);
        let there = || Ok::<Stack, anyhow::Error>(serde_json::from_slice(&fs::read(&path)?)?);
        let there = there().with_context(|| format!("read {}", path.display()))?;
        ensure!(
            there.source.ends_with(source),
            "{} is there, and of another image, {}: choose another --name, or delete it where no volume has it",
            path.display(),
            there.source
        );
        let is_whole =
            |layer: &String| Ok::<_, anyhow::Error>(there.verity.get(layer) == Some(&self.root_hash(layer)?));
        for layer in &there.layers {
            if !self.store.has(layer)? || !is_whole(layer)? {
                return Ok(None);
            }
        }
        Ok(Some(there))
    }

    /// Writes an index, and signs it. Another builder may have been faster: then it is his.
    pub(super) fn keep(&self, name: &str, stack: Stack, source: &str) -> Result<Stack> {
        let file = format!("{name}.json");
        let text = text_of(&stack)?;
        let mut kept = stack;
        if self.store.make(&file, |new| Ok(fs::write(new, text)?))? == Made::Before {
            let path = self.store.path(&file);
            let there = self.there(name, source)?.with_context(|| {
                format!("{} is there, and names layers that are not, or other ones by now: delete it", path.display())
            })?;
            // Anybody who may write there may have written it.
            let is_ours = self.key.is_none() || (&there.layers, &there.verity) == (&kept.layers, &kept.verity);
            ensure!(is_ours, "{} is there, names other layers, and is not signed: delete it", path.display());
            kept = there;
        }
        self.sign(&file, &text_of(&kept)?)?;
        Ok(kept)
    }

    /// Whether an index that is there is signed by the key, or need not be.
    fn is_signed(&self, name: &str, stack: &Stack) -> Result<bool> {
        let Some(key) = &self.key else { return Ok(true) };
        let signature = format!("{name}.json.minisig");
        if !self.store.has(&signature)? {
            return Ok(false);
        }
        let path = self.store.path(&signature);
        let signature = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(key.check(&signature, text_of(stack)?.as_bytes()).is_ok())
    }

    /// Puts beside a file, of which this is the content, its signature.
    fn sign(&self, file: &str, content: &str) -> Result<()> {
        let Some(key) = &self.key else { return Ok(()) };
        let signature = format!("{file}.minisig");
        let made = self.store.make(&signature, |new| Ok(fs::write(new, key.sign(file, content.as_bytes())?)?))?;
        let (file, signature) = (self.store.path(file), self.store.path(&signature));
        // What lies there is believed by it: it is what was looked at, by the byte.
        let there = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        ensure!(there == content, "{} is not as this program writes it, and is not signed", file.display());
        if made == Made::Before {
            let there = fs::read_to_string(&signature).with_context(|| format!("read {}", signature.display()))?;
            key.check(&there, content.as_bytes()).with_context(|| {
                format!("{} is there, and of another key or content: delete it", signature.display())
            })?;
        }
        Ok(())
    }

    /// Returns the root hash. With a key it is packed where nobody else writes: what is signed is what was packed.
    pub(super) fn pack(&self, tars: &[&dyn Layer], is_more: bool, image: &Path) -> Result<String> {
        let plan = plan(tars, is_more, self.limits)?;
        let bar = progress::bar("write the squashfs", None);
        let own = self.key.is_some().then(|| self.work.path().join("image"));
        let packed = own.as_deref().unwrap_or(image);
        self.format.make(packed, |out| pack(&plan, tars, self.limits, bar.wrap_write(out)))?;
        let file = File::options().read(true).write(true).open(packed).context("open the image")?;
        let root = seal(&file).context("seal the image")?;
        if let Some(own) = own {
            fs::copy(&own, image).with_context(|| format!("write {}", image.display()))?;
            fs::remove_file(own).context("remove what was packed")?;
        }
        Ok(hexadecimal_of(&root))
    }

    /// Of a file of the store, of which all is read: it may have been there for long.
    pub(super) fn root_hash(&self, name: &str) -> Result<String> {
        let path = self.store.path(name);
        let read = || Ok::<_, anyhow::Error>(hexadecimal_of(&verify(&File::open(&path)?)?));
        read().with_context(|| format!("verify {}", path.display()))
    }
}

fn text_of(stack: &Stack) -> Result<String> {
    Ok(serde_json::to_string_pretty(stack).context("write the stack")? + "\n")
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
