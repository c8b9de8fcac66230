//! A layer on what is there already: what `csi-driver-squashfs commit` wrote of a volume, on the image that the volume shows.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::build::{Builder, Built, Stack};
use super::image::hexadecimal;
use super::store::{Made, check_name};
use super::tar_file::TarFile;

const INDEX: &str = ".json";
const IMAGE: &str = ".sqsh";

/// What a layer lies on. An index may have been written by hand.
#[derive(Deserialize)]
struct Base {
    source: Option<String>,
    layers: Vec<String>,
    #[serde(default)]
    verity: BTreeMap<String, String>,
}

impl Builder {
    /// `base` is the name of an index, or of an image, in the store. Its layers are verified, and stay as they are.
    pub fn build_on(&self, base: &str, layer: &TarFile, name: Option<String>) -> Result<Built> {
        let name = name.context("name what is to be made, with its version, by --name")?;
        check_name(&name)?;
        let Base { source, mut layers, verity: named } = self.base(base)?;
        let digest = layer.digest()?;
        let file = format!("sha256-{}{IMAGE}", hexadecimal(&digest)?);
        // One that lies above itself has the same effect alone.
        layers.retain(|other| *other != file);
        let (there, most) = (layers.len(), self.most_layers);
        ensure!(
            there < most,
            "{base} has {there} layers, and with this one there would be {}, where {most} may be (--max-layers): make it one first: mount \
             it, make an image of the directory by csi-driver-squashfs-build DIRECTORY --to {} --name NAME, and put the layer --on NAME{IMAGE}",
            there + 1,
            self.store.path("").display(),
        );
        let mut verity = BTreeMap::new();
        for layer in &layers {
            let root = self.root_hash(layer)?;
            if named.get(layer).is_some_and(|named| !named.eq_ignore_ascii_case(&root)) {
                bail!("{layer} has the root hash {root}, and {base} says another: it is not what it was");
            }
            verity.insert(layer.clone(), root);
        }
        let (made, root) = self.made(&file, |new| self.pack(&[layer], true, new))?;
        verity.insert(file.clone(), root);
        eprintln!("{file}: {}", if made == Made::Now { "made" } else { "was there" });
        layers.push(file);
        let source = format!("{} + {digest}", source.as_deref().unwrap_or(base));
        let stack = self.keep(&name, Stack { source: source.clone(), layers: layers.clone(), verity }, &source)?;
        ensure!(stack.layers == layers, "{name}.json is there, and names other layers: choose another --name");
        Ok(Built::Stack { name, stack })
    }

    fn base(&self, name: &str) -> Result<Base> {
        if let Some(stem) = name.strip_suffix(IMAGE) {
            check_name(stem)?;
            return Ok(Base { source: None, layers: vec![name.to_owned()], verity: BTreeMap::new() });
        }
        let Some(stem) = name.strip_suffix(INDEX) else {
            bail!(
                "--on {name:?}: name an index that ends with {INDEX}, or an image that ends with {IMAGE}, of the directory --to"
            );
        };
        check_name(stem)?;
        let path = self.store.path(name);
        let base = || Ok::<Base, anyhow::Error>(serde_json::from_slice(&fs::read(&path)?)?);
        let base = base().with_context(|| format!("read the index {}", path.display()))?;
        let is_beside = |layer: &String| !layer.contains('/') && layer.ends_with(IMAGE);
        let is_one = !base.layers.is_empty() && base.layers.iter().all(is_beside);
        ensure!(is_one, "{} names no layers that are files beside it and end with {IMAGE}", path.display());
        Ok(base)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use csi_driver_squashfs::kernel::verity::{hexadecimal as hexadecimal_of, seal};
    use serde_json::{Value, json};

    use super::super::entries::{Form, Limits};
    use super::super::image::digest_of;
    use super::super::squashfs::Format;
    use super::super::store::Store;
    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        format: Format,
    }

    fn builder(directory: &Path) -> Builder {
        Builder {
            store: Store::open(directory).unwrap(),
            format: Flags::parse_from(["build"]).format,
            limits: Limits { entries: 100, bytes: 1 << 20, names: 1 << 20 },
            platform: "linux/amd64".parse().unwrap(),
            most_layers: 3,
            work: tempfile::tempdir().unwrap(),
            key: None,
        }
    }

    /// A sealed file of these bytes, and its root hash.
    fn image(directory: &Path, name: &str, byte: u8) -> String {
        let path = directory.join(name);
        fs::write(&path, [byte; 4096]).unwrap();
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        hexadecimal_of(&seal(&file).unwrap())
    }

    fn layer(directory: &Path) -> (TarFile, String) {
        let (path, bytes) = (directory.join("layer.tar"), b"a layer");
        fs::write(&path, bytes).unwrap();
        let file = format!("sha256-{}.sqsh", hexadecimal(&digest_of(bytes)).unwrap());
        (TarFile { path, form: Form::Layer, name: "layer.tar".into() }, file)
    }

    #[test]
    fn an_index_is_that_of_its_base_and_the_layer_on_top() {
        let (store, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (builder, directory) = (builder(store.path()), store.path());
        let (layer, file) = layer(work.path());
        let (a, b, top) = (image(directory, "a.sqsh", 1), image(directory, "b.sqsh", 2), image(directory, &file, 3));
        let built = |base: &str, name: &str| {
            builder.build_on(base, &layer, Some(name.into())).unwrap();
            let index = fs::read(directory.join(format!("{name}.json"))).unwrap();
            serde_json::from_slice::<Value>(&index).unwrap()
        };
        let digest = digest_of(b"a layer");
        let expected = json!({
            "source": format!("a.sqsh + {digest}"), "layers": ["a.sqsh", file], "verity": {"a.sqsh": a, &*file: top}
        });
        assert_eq!(built("a.sqsh", "one"), expected);
        let index = json!({"source": "oci://r/i@sha256:0", "layers": ["a.sqsh", "b.sqsh"], "verity": {"b.sqsh": b}});
        fs::write(directory.join("base.json"), index.to_string()).unwrap();
        let two = built("base.json", "two");
        assert_eq!(two["layers"], json!(["a.sqsh", "b.sqsh", file]));
        assert_eq!(two["source"], format!("oci://r/i@sha256:0 + {digest}"));
        // What is uppermost already, or lies below.
        assert_eq!(built("two.json", "three")["layers"], two["layers"]);
    }

    #[test]
    fn a_base_that_is_none_or_not_what_it_was_is_refused_with_a_reason() {
        let (store, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (builder, directory) = (builder(store.path()), store.path());
        let (layer, _) = layer(work.path());
        for name in ["a.sqsh", "b.sqsh", "c.sqsh"] {
            image(directory, name, 1);
        }
        fs::write(directory.join("bare.sqsh"), [0; 4096]).unwrap();
        for (name, index) in [
            ("high", json!({"layers": ["a.sqsh", "b.sqsh", "c.sqsh"]})),
            ("other", json!({"layers": ["a.sqsh"], "verity": {"a.sqsh": "01".repeat(32)}})),
            ("out", json!({"layers": ["../a.sqsh"]})),
            ("none", json!({"layers": []})),
            ("text", json!("text")),
        ] {
            fs::write(directory.join(format!("{name}.json")), index.to_string()).unwrap();
        }
        for (base, why) in [
            ("high.json", "has 3 layers, and with this one there would be 4"),
            ("other.json", "and other.json says another"),
            ("out.json", "names no layers that are files beside it"),
            ("none.json", "names no layers"),
            ("text.json", "read the index"),
            ("absent.json", "read the index"),
            ("absent.sqsh", "absent.sqsh: No such file"),
            ("bare.sqsh", "see 'seal'"),
            ("../a.sqsh", "is no name of an image"),
            ("a", "name an index that ends with .json"),
        ] {
            let error = format!("{:#}", builder.build_on(base, &layer, Some("new".into())).err().unwrap());
            assert!(error.contains(why), "{base}: {error}");
        }
        let error = builder.build_on("a.sqsh", &layer, None).err().unwrap();
        assert!(error.to_string().contains("--name"), "{error}");
        assert!(!directory.join("new.json").exists());
    }
}
