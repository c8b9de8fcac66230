//! Container images in directories (image-spec, image-layout.md), and in tars of such.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use oci_client::manifest::OciDescriptor;
use sha2::{Digest, Sha256};
use tar::EntryType;
use tempfile::TempDir;

use super::entries::Limits;
use super::image::{Blobs, hexadecimal};
use super::members::Members;

/// By which a directory is known.
const MARK: &str = "oci-layout";
/// What may stand before it in a tar, some of which programs add that know an older form.
const BEFORE_MARK: &[&str] = &["", ".", "blobs", "blobs/sha256", "manifest.json", "repositories"];
/// The annotation that names one of several images.
const NAME: &str = "org.opencontainers.image.ref.name";
/// The largest manifest.
const MANIFEST: u64 = 4 << 20;

pub struct Layout {
    /// Of the directory or the tar.
    path: PathBuf,
    directory: PathBuf,
    /// Of the image.
    name: Option<String>,
    /// Where it was unpacked.
    _unpacked: Option<TempDir>,
}

impl Layout {
    /// The image of this name in a directory, or the only one.
    pub fn open(directory: &Path, name: Option<String>) -> Layout {
        Layout { path: directory.to_owned(), directory: directory.to_owned(), name, _unpacked: None }
    }

    pub fn is_one(directory: &Path) -> bool {
        directory.join(MARK).is_file()
    }

    /// `None` where the tar is none of a layout.
    pub fn unpack(
        path: &Path,
        tar: impl Read,
        name: Option<String>,
        work: &Path,
        limits: Limits,
    ) -> Result<Option<Layout>> {
        let directory = TempDir::new_in(work).context("make a directory to unpack into")?;
        let (mut is_layout, mut is_other, mut left) = (false, false, limits);
        let unpacked = Members::new(tar, false).read(|member, data| {
            left.entry(member.path.len())?;
            left.file(member.size)?;
            let file = String::from_utf8_lossy(member.path.strip_prefix(b"./").unwrap_or(&member.path)).into_owned();
            let blob = file.strip_prefix("blobs/sha256/").map(|digits| format!("sha256:{digits}"));
            match blob.as_deref().map(hexadecimal) {
                Some(Ok(_)) => fs::create_dir_all(directory.path().join("blobs/sha256"))?,
                _ if [MARK, "index.json"].contains(&file.as_str()) => is_layout |= file == MARK,
                // The first entries of a tar of something else.
                _ if !is_layout && !BEFORE_MARK.contains(&file.trim_end_matches('/')) => {
                    is_other = true;
                    bail!("it is no layout");
                }
                _ => return Ok(()),
            }
            ensure!(matches!(member.kind, EntryType::Regular | EntryType::Continuous), "{file} is no file");
            let mut unpack = || io::copy(data, &mut File::create_new(directory.path().join(&file))?);
            unpack().with_context(|| format!("unpack {file}"))?;
            Ok(())
        });
        if is_other {
            return Ok(None);
        }
        unpacked?;
        let path = path.to_owned();
        let layout = Layout { path, directory: directory.path().to_owned(), name, _unpacked: Some(directory) };
        Ok(is_layout.then_some(layout))
    }

    fn blob(&self, digest: &str) -> Result<PathBuf> {
        Ok(self.directory.join("blobs/sha256").join(hexadecimal(digest)?))
    }
}

/// The whole of a small file.
fn read(path: &Path) -> Result<Vec<u8>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(MANIFEST).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    read().with_context(|| format!("read {}", path.display()))
}

impl Blobs for Layout {
    fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn by_digest(&self, digest: &str) -> String {
        format!("{}@{digest}", self.path.file_name().unwrap_or_default().to_string_lossy())
    }

    fn named(&self) -> Result<Vec<u8>> {
        let index = read(&self.directory.join("index.json"))?;
        let mut fields: serde_json::Value = serde_json::from_slice(&index).context("read index.json")?;
        let manifests = fields["manifests"].as_array_mut().context("index.json has no manifests")?;
        if let Some(name) = &self.name {
            manifests.retain(|manifest| manifest["annotations"][NAME] == name.as_str());
        }
        match &manifests[..] {
            [one] => self.manifest(one["digest"].as_str().unwrap_or_default()),
            [] => bail!(
                "there is no image{}",
                self.name.iter().map(|name| format!(" of the name {name}")).collect::<String>()
            ),
            several => {
                let names: Vec<_> = several.iter().filter_map(|it| it["annotations"][NAME].as_str()).collect();
                bail!("there are {} images: choose one by --image-name; there are: {}", several.len(), names.join(", "))
            }
        }
    }

    fn manifest(&self, digest: &str) -> Result<Vec<u8>> {
        read(&self.blob(digest)?)
    }

    fn look_for(&self, layer: &OciDescriptor) -> Result<()> {
        let path = self.blob(&layer.digest)?;
        fs::metadata(&path).with_context(|| format!("look for layer {}", layer.digest)).map(drop)
    }

    fn fetch(&self, layer: &OciDescriptor, into: &Path) -> Result<()> {
        let path = self.blob(&layer.digest)?;
        let copy = || -> io::Result<_> {
            let (mut from, mut to, mut sum) = (File::open(&path)?, File::create(into)?, Sha256::new());
            let (mut size, mut buffer) = (0, vec![0; 1 << 20]);
            loop {
                match from.read(&mut buffer)? {
                    0 => return Ok((size, sum.finalize())),
                    length => {
                        to.write_all(&buffer[..length])?;
                        sum.update(&buffer[..length]);
                        size += length as i64;
                    }
                }
            }
        };
        let (size, sum) = copy().with_context(|| format!("read {}", path.display()))?;
        let digest = format!("sha256:{}", sum.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        ensure!(digest == layer.digest, "{} has other bytes, whose digest is {digest}", path.display());
        ensure!(size == layer.size, "{} has {size} bytes, and not {}", path.display(), layer.size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::{Builder, Header};

    const LIMITS: Limits = Limits { entries: 6, bytes: 100, names: 1000 };

    fn tar_of(files: &[&str]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for file in files {
            let mut header = Header::new_gnu();
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(20);
            builder.append_data(&mut header, file, &[b'x'; 20][..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpack(files: &[&str]) -> Result<Option<Layout>> {
        let work = tempfile::tempdir().unwrap();
        Layout::unpack(Path::new("image.tar"), &tar_of(files)[..], None, work.path(), LIMITS)
    }

    #[test]
    fn an_archive_is_known_in_whichever_order_it_was_written_and_is_bounded() {
        let blob = format!("blobs/sha256/{}", "a".repeat(64));
        for files in [
            [&blob, "index.json", "manifest.json", "oci-layout"],
            ["manifest.json", "repositories", "index.json", "oci-layout"],
            ["./oci-layout", "./index.json", "./readme", &blob],
        ] {
            assert!(unpack(&files).unwrap().is_some(), "{files:?}");
        }
        for files in [&["usr", "oci-layout"][..], &["manifest.json"], &[]] {
            assert!(unpack(files).unwrap().is_none(), "{files:?}");
        }
        let error = unpack(&["oci-layout", "a", "b", "c", "d", "e"]).err().unwrap();
        assert!(error.to_string().contains("--max-size"), "{error}");
    }
}
