//! Tars in files, compressed or not.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use flate2::bufread::MultiGzDecoder;

use super::entries::{self, Entry, Limits};
use super::pack::Layer;

pub struct TarFile {
    pub path: PathBuf,
    pub is_layer: bool,
    pub name: String,
}

impl TarFile {
    pub fn open(&self) -> Result<Box<dyn Read>> {
        let file = File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        unpacked(BufReader::with_capacity(1 << 20, file))
    }
}

impl Layer for TarFile {
    fn read(&self, limits: Limits, each: &mut dyn FnMut(Entry, &mut dyn Read) -> Result<()>) -> Result<()> {
        entries::read(self.open()?, self.is_layer, limits, each)
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
