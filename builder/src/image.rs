//! Container images: which layers one has, by its manifest (image-spec, manifest.md and image-index.md).

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use oci_client::manifest::{ImageIndexEntry, OciDescriptor, OciManifest};
use sha2::{Digest, Sha256};

/// No program makes an image of more: 127 is the most of most.
const MOST_LAYERS: usize = 512;

/// Where manifests and layers are.
pub trait Blobs {
    /// A name for people, and for files; it may lead to another image tomorrow.
    fn name(&self) -> String;

    /// The image with this digest, for ever.
    fn by_digest(&self, digest: &str) -> String;

    /// The manifest or index that was named.
    fn named(&self) -> Result<Vec<u8>>;

    /// The manifest with this digest, which nobody has checked.
    fn manifest(&self, digest: &str) -> Result<Vec<u8>>;

    /// Writes a layer into a file, and checks its digest and size.
    fn fetch(&self, layer: &OciDescriptor, into: &Path) -> Result<()>;

    /// An error where there is no such layer, of whoever may read this image.
    fn look_for(&self, layer: &OciDescriptor) -> Result<()>;
}

/// What an image is made for: `linux/arm64/v8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl std::str::FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => {
                Ok(Platform { os, architecture, variant })
            }
            _ => Err("a platform is OS/ARCHITECTURE, as in linux/amd64".into()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

impl Platform {
    fn is_of(&self, entry: &ImageIndexEntry) -> bool {
        entry.platform.as_ref().is_some_and(|platform| {
            (platform.os.to_string(), platform.architecture.to_string()) == (self.os.clone(), self.architecture.clone())
                && (self.variant.is_none() || self.variant == platform.variant)
        })
    }
}

/// One image for one platform.
#[derive(Debug)]
pub struct Image {
    /// Of its manifest.
    pub digest: String,
    /// The lowest first.
    pub layers: Vec<OciDescriptor>,
}

impl Image {
    /// The one that is named, or of those that it is an index of the one for this platform.
    pub fn find(blobs: &dyn Blobs, platform: &Platform) -> Result<Image> {
        let mut bytes = blobs.named()?;
        let mut digest = digest_of(&bytes);
        // An index of indexes is one by the letter of the specification.
        for _ in 0..3 {
            let index = match read(&bytes).with_context(|| format!("read manifest {digest}"))? {
                OciManifest::Image(image) => return Image::new(digest, image.layers),
                OciManifest::ImageIndex(index) => index.manifests,
            };
            // The one and only may say nothing.
            let only = index.first().filter(|entry| index.len() == 1 && entry.platform.is_none());
            let entry = index.iter().find(|entry| platform.is_of(entry)).or(only).with_context(|| {
                let known = index.iter().filter_map(|entry| entry.platform.as_ref());
                let known: Vec<_> = known.map(|it| format!("{}/{}", it.os, it.architecture)).collect();
                format!("there is none for {platform}; there are: {}", known.join(", "))
            })?;
            bytes = blobs.manifest(&entry.digest)?;
            digest = digest_of(&bytes);
            ensure!(digest == entry.digest, "manifest {} has other bytes, whose digest is {digest}", entry.digest);
        }
        bail!("an index in an index in an index")
    }

    fn new(digest: String, mut layers: Vec<OciDescriptor>) -> Result<Image> {
        ensure!(layers.len() <= MOST_LAYERS, "it has {} layers, and up to {MOST_LAYERS} are taken", layers.len());
        for layer in &mut layers {
            // Other hosts, of which the image's author would choose which are asked.
            layer.urls = None;
            hexadecimal(&layer.digest)?;
            let kind = &layer.media_type;
            ensure!(
                kind.contains("tar") && !kind.contains("foreign") && !kind.contains("nondistributable"),
                "layer {} is of type {kind}: only layers that are a tar, and in the registry, are taken",
                layer.digest
            );
        }
        ensure!(!layers.is_empty(), "it has no layers");
        Ok(Image { digest, layers })
    }
}

fn read(bytes: &[u8]) -> Result<OciManifest> {
    // What is told apart by its fields alone says of a mistake only that it is neither.
    let fields = serde_json::from_slice::<serde_json::Value>(bytes)?;
    match (fields["schemaVersion"].as_u64(), fields.get("manifests")) {
        (Some(2), Some(_)) => Ok(OciManifest::ImageIndex(serde_json::from_value(fields)?)),
        (Some(2), None) => Ok(OciManifest::Image(serde_json::from_value(fields)?)),
        (version, _) => {
            bail!("it is of version {version:?}, and 2 alone is known: push the image again with a newer program")
        }
    }
}

pub fn digest_of(bytes: &[u8]) -> String {
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// The digits of a digest, which are safe in names of files.
pub fn hexadecimal(digest: &str) -> Result<&str> {
    let digits = digest
        .strip_prefix("sha256:")
        .filter(|digits| digits.len() == 64 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
    digits.with_context(|| format!("{digest:?} is no digest of the form sha256:..."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::HashMap;

    struct Double(Vec<u8>, HashMap<String, Vec<u8>>);

    impl Blobs for Double {
        fn name(&self) -> String {
            "double".into()
        }

        fn by_digest(&self, digest: &str) -> String {
            digest.into()
        }

        fn named(&self) -> Result<Vec<u8>> {
            Ok(self.0.clone())
        }

        fn manifest(&self, digest: &str) -> Result<Vec<u8>> {
            self.1.get(digest).cloned().context("there is none")
        }

        fn look_for(&self, _: &OciDescriptor) -> Result<()> {
            Ok(())
        }

        fn fetch(&self, _: &OciDescriptor, _: &Path) -> Result<()> {
            bail!("nothing is fetched")
        }
    }

    fn manifest(media_type: &str, digest: &str) -> Vec<u8> {
        let layer = |media_type: &str, digest: &str| json!({"mediaType": media_type, "digest": digest, "size": 5});
        let config = layer("application/vnd.oci.image.config.v1+json", &digest_of(b"config"));
        json!({"schemaVersion": 2, "config": config, "layers": [layer(media_type, digest)]}).to_string().into()
    }

    fn entry(bytes: &[u8], platform: &[&str]) -> Value {
        let mut platform_of = json!({"os": platform[0], "architecture": platform[1]});
        if let Some(variant) = platform.get(2) {
            platform_of["variant"] = json!(variant);
        }
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest_of(bytes), "size": bytes.len(), "platform": platform_of})
    }

    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn find(named: Vec<u8>, others: &[Vec<u8>], platform: &str) -> Result<Image> {
        let others = others.iter().map(|bytes| (digest_of(bytes), bytes.clone())).collect();
        Image::find(&Double(named, others), &platform.parse().unwrap())
    }

    #[test]
    fn of_an_index_the_image_for_the_platform_is_taken() {
        let images = ["a", "b", "c"].map(|layer| manifest(LAYER, &digest_of(layer.as_bytes())));
        let platforms: [&[&str]; 3] = [&["linux", "amd64"], &["linux", "arm64", "v8"], &["windows", "amd64"]];
        let entries: Vec<_> = images.iter().zip(platforms).map(|(image, platform)| entry(image, platform)).collect();
        let index: Vec<u8> = json!({"schemaVersion": 2, "manifests": entries}).to_string().into();
        for (platform, at) in [("linux/amd64", 0), ("linux/arm64", 1), ("linux/arm64/v8", 1), ("windows/amd64", 2)] {
            let image = find(index.clone(), &images, platform).unwrap();
            assert_eq!(image.digest, digest_of(&images[at]));
        }
        let error = find(index, &images, "linux/s390x").unwrap_err().to_string();
        assert!(error.contains("none for linux/s390x") && error.contains("linux/arm64, windows/amd64"), "{error}");
        let image = find(images[0].clone(), &[], "linux/s390x").unwrap();
        assert_eq!(image.layers[0].digest, digest_of(b"a"));
    }

    #[test]
    fn a_manifest_with_other_bytes_than_it_says_is_refused() {
        let (real, lie) = (manifest(LAYER, &digest_of(b"a")), manifest(LAYER, &digest_of(b"b")));
        let index = json!({"schemaVersion": 2, "manifests": [entry(&real, &["linux", "amd64"])]}).to_string();
        let blobs = Double(index.into(), [(digest_of(&real), lie)].into());
        let error = Image::find(&blobs, &"linux/amd64".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("has other bytes"), "{error}");
    }

    #[test]
    fn what_is_no_image_is_refused_with_a_reason() {
        let digest = digest_of(b"a");
        for (bytes, reason) in [
            (manifest("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", &digest), "in the registry"),
            (manifest("application/vnd.oci.empty.v1+json", &digest), "only layers that are a tar"),
            (manifest(LAYER, "sha256:../../etc/passwd"), "is no digest"),
            (manifest(LAYER, &digest.to_uppercase()), "is no digest"),
            (json!({"schemaVersion": 1, "fsLayers": []}).to_string().into(), "is of version Some(1)"),
            (json!({"schemaVersion": 2}).to_string().into(), "missing field"),
            (b"<html>".to_vec(), "expected value"),
        ] {
            let error = format!("{:#}", find(bytes, &[], "linux/amd64").unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
