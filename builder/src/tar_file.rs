//! Tars in files, compressed or not.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::entries::{self, Entry, Form, Limits};
use super::pack::Layer;

pub struct TarFile {
    pub path: PathBuf,
    pub form: Form,
    pub name: String,
}

/// The name of what comes from there.
pub const STANDARD_INPUT: &str = "-";

impl TarFile {
    /// The file `text`, or standard input, which is written into `work` first: a tar is read more than once.
    pub fn read(text: &str, form: Form, work: &Path, limits: Limits) -> Result<TarFile> {
        if text != STANDARD_INPUT {
            let is_file = fs::metadata(text).with_context(|| format!("look at {text}"))?.is_file();
            ensure!(is_file, "{text} is no file: what is a pipe is given by the name {STANDARD_INPUT}");
            return Ok(TarFile { path: text.into(), form, name: text.into() });
        }
        let path = work.join("standard-input");
        let copy = || io::copy(&mut io::stdin().lock().take(limits.bytes), &mut File::create(&path)?);
        let copied = copy().with_context(|| format!("write standard input to {}: see --work", path.display()))?;
        ensure!(copied < limits.bytes, "standard input is too large: see --max-size");
        ensure!(copied > 0, "standard input is empty: did the program that writes it fail?");
        Ok(TarFile { path, form, name: "standard input".into() })
    }

    /// Of the bytes that it has, as a registry would say it.
    pub fn digest(&self) -> Result<String> {
        let digest = || {
            let (mut file, mut hash, mut chunk) = (File::open(&self.path)?, Sha256::new(), vec![0; 1 << 20]);
            loop {
                match file.read(&mut chunk)? {
                    0 => return Ok::<_, io::Error>(hash.finalize()),
                    length => hash.update(&chunk[..length]),
                }
            }
        };
        let digest = digest().with_context(|| format!("read {}", self.name))?;
        Ok(format!("sha256:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()))
    }

    pub fn open(&self) -> Result<Box<dyn Read>> {
        let file = File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        unpacked(BufReader::with_capacity(1 << 20, file))
    }
}

impl Layer for TarFile {
    fn read(&self, limits: Limits, each: &mut dyn FnMut(Entry, &mut dyn Read) -> Result<()>) -> Result<()> {
        entries::read(self.open()?, self.form, limits, each)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// By what it begins with, as media types and names say other things.
fn unpacked<'a>(mut file: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    Ok(match file.fill_buf()? {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            Box::new(zstd::Decoder::with_buffer(file).context("unpack zstd")?)
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            bail!("it is compressed by xz, which is not read here: xz --decompress it")
        }
        [b'B', b'Z', b'h', ..] => bail!("it is compressed by bzip2, which is not read here: bzip2 --decompress it"),
        _ => Box::new(file),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        unpacked(bytes)?.read_to_end(&mut all)?;
        Ok(all)
    }

    #[test]
    fn what_is_compressed_in_several_parts_is_read_to_its_end() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        assert_eq!(read(&[gzip(b"one"), gzip(b"two")].concat()).unwrap(), b"onetwo");
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
        assert_eq!(read(&[&zstd(b"one")[..], &skippable, &zstd(b"two")].concat()).unwrap(), b"onetwo");
        assert_eq!(read(b"plain").unwrap(), b"plain");
        assert_eq!(read(b"").unwrap(), b"");
        assert!(read(&zstd(&[1; 100_000])[..12]).is_err(), "cut short");
        assert!(read(b"\xfd7zXZ\0").unwrap_err().to_string().contains("xz"));
    }
}
