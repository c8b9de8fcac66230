//! Whether two files have the same bytes, as far as a few samples of them say.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{Advice, fadvise};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::error::{Doing, Error, Result, Subject};

const SAMPLES: u64 = 16;
const SAMPLE: u64 = 4096;

/// The size of an image, and samples of it, its beginning and its end among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    size: u64,
    samples: Vec<(u64, [u8; 32])>,
}

impl Fingerprint {
    /// Of a file, or of a device that has the whole sectors of one, of this size. A file on NFS is asked of its server.
    pub fn of(file: &File, size: u64) -> Result<Self> {
        let end = size / 512 * 512;
        let last = end.saturating_sub(SAMPLE);
        // Each is one call: what lies around it is not read ahead.
        fadvise(file, 0, None, Advice::Random).doing(|| "look at samples of an image".into())?;
        let mut samples = Vec::new();
        // Pages, and all of the end.
        let between = (0..SAMPLES - 1).map(|sample| last / (SAMPLES - 1) * sample / SAMPLE * SAMPLE);
        for at in between.chain([last]) {
            if samples.last().is_some_and(|(last, _)| *last == at) {
                continue;
            }
            let mut bytes = vec![0; SAMPLE.min(end - at) as usize];
            let read = file.read_exact_at(&mut bytes, at);
            read.doing(|| format!("read {} bytes of an image at {at}", bytes.len()))?;
            samples.push((at, Sha256::digest(&bytes).into()));
        }
        fadvise(file, 0, None, Advice::Normal).doing(|| "look at samples of an image".into())?;
        Ok(Fingerprint { size, samples })
    }

    /// `EBADMSG` where it differs from that of what should be the same image elsewhere.
    pub fn compare(&self, here: &str, other: &Fingerprint, there: &str) -> Result<()> {
        let differ = match self.size == other.size {
            false => format!("it has {} bytes on {here} and {} on {there}", self.size, other.size),
            true => match self.samples.iter().zip(&other.samples).find(|(one, other)| one != other) {
                Some(((at, _), _)) => format!("it has other bytes on {here} than on {there}, from {at} on or before"),
                None => return Ok(()),
            },
        };
        let hint = format!("{differ}: give each server the same file, or name one server");
        Err(Error::new("compare the image on its servers", Errno::BADMSG).about(Subject::Image).with_hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Fingerprint {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Fingerprint::of(&file, bytes.len() as u64).unwrap()
    }

    #[test]
    fn images_of_one_size_and_the_same_samples_pass_for_one() {
        for size in [512, 4096, 5000, 100_000, 1 << 20] {
            let image: Vec<u8> = (0..size).map(|at| (at / 7) as u8).collect();
            of(&image).compare("a", &of(&image), "b").unwrap();
        }
    }

    #[test]
    fn another_size_and_another_beginning_or_end_are_told() {
        let image = vec![1; 100_000];
        let told = |other: &[u8]| of(&image).compare("a:/x", &of(other), "b:/x").unwrap_err().to_string();
        assert!(told(&image[..99_000]).contains("100000 bytes on a:/x and 99000 on b:/x"));
        for at in [0, 4095, 98_304] {
            let mut other = image.clone();
            other[at] = 2;
            assert!(told(&other).contains("other bytes on a:/x than on b:/x"), "{at}");
        }
    }
}
