//! What was read of images when they were used last, written down so that it can be read ahead.
//!
//! It is a hint: what is torn, of another image or of no use costs calls that nobody needed, and nothing else.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::profile::{bounded, pairs, parts_of};
use crate::lock::lock;
use crate::volume::cache::Original;

/// The most images of which something is kept.
const IMAGES: usize = 1000;
/// The largest file that is read.
const MAX: u64 = 256 << 10;

/// The directory in which it is written down.
#[derive(Clone, Debug)]
pub struct Learned {
    directory: PathBuf,
    /// Taken while something is written, by the threads that wait for the disk.
    writing: Arc<Mutex<()>>,
}

#[derive(Serialize, Deserialize)]
struct Text {
    original: Original,
    /// The beginning of each and its end, in their order.
    parts: Vec<(u64, u64)>,
}

impl Learned {
    /// It is made, in this data directory, when something is written down.
    pub fn new(data_dir: &Path) -> Self {
        Learned { directory: data_dir.join("learned"), writing: Arc::default() }
    }

    /// The images of which something is known, the one that was used last at the end.
    pub fn known(&self) -> io::Result<Vec<Original>> {
        let files = match self.files() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            files => files?,
        };
        // What cannot be read, or is just being written, is of no use to anybody.
        let whole = files.into_iter().filter(|(_, path)| path.extension().is_some_and(|extension| extension == "json"));
        Ok(whole.filter_map(|(_, path)| Some(text(&path).ok()?.original)).collect())
    }

    /// The parts of an image that were read, in their order; none where nothing is known.
    pub fn read(&self, original: &Original) -> Vec<Range<u64>> {
        let path = self.path(original);
        match text(&path) {
            Ok(text) if text.original == *original => {
                // Nobody else writes there; what is not as it was written is of no use.
                parts_of(text.parts, original.size)
            }
            Ok(_) => Vec::new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!("what was read of {} is not known: {}: {error}", original.name, path.display());
                Vec::new()
            }
        }
    }

    /// Adds these parts to what is known of an image.
    pub fn add(&self, original: &Original, parts: Vec<Range<u64>>) -> io::Result<()> {
        let _writing = lock(&self.writing);
        let known = self.read(original);
        let all = bounded([known.clone(), parts].concat());
        let path = self.path(original);
        if all == known {
            return touch(&path);
        }
        let text = Text { original: original.clone(), parts: pairs(&all) };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        self.make_room()?;
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&text)?)?;
        fs::rename(new, path)
    }

    /// Forgets the images that were used longest ago.
    fn make_room(&self) -> io::Result<()> {
        let files = self.files()?;
        let surplus = (files.len() + 1).saturating_sub(IMAGES);
        files.iter().take(surplus).try_for_each(|(_, path)| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// With the times when they were used, in that order; but for those that are gone meanwhile.
    fn files(&self) -> io::Result<Vec<(SystemTime, PathBuf)>> {
        let used = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            Some((entry.metadata().and_then(|metadata| metadata.modified()).ok()?, entry.path()))
        };
        let mut files: Vec<_> = fs::read_dir(&self.directory)?.filter_map(used).collect();
        files.sort();
        Ok(files)
    }

    fn path(&self, original: &Original) -> PathBuf {
        self.directory.join(format!("{}.json", original.id()))
    }
}

fn text(path: &Path) -> io::Result<Text> {
    match fs::metadata(path)?.len() {
        ..=MAX => Ok(serde_json::from_slice(&fs::read(path)?)?),
        _ => Err(io::ErrorKind::FileTooLarge.into()),
    }
}

/// It was used now.
fn touch(path: &Path) -> io::Result<()> {
    match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        file => file?.set_modified(SystemTime::now()),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "that is one part")]
mod tests {
    use super::*;
    use crate::volume::cache::Name;
    use crate::volume::source::profile::{GAP, PARTS};

    fn original(changed: u64) -> Original {
        let name = Name { server: "s".into(), mount: "m".into(), export: "/e".into(), path: "p".into() };
        Original { name, inode: 1, size: 100 << 20, modified: 2, changed }
    }

    #[test]
    fn what_is_learned_is_added_up_and_is_of_one_content_of_one_image() {
        let directory = tempfile::tempdir().unwrap();
        let learned = Learned::new(directory.path());
        assert!(learned.read(&original(1)).is_empty());
        learned.add(&original(1), vec![1 << 20..2 << 20]).unwrap();
        learned.add(&original(1), vec![8 << 20..9 << 20, (2 << 20) + GAP..3 << 20]).unwrap();
        assert_eq!(learned.read(&original(1)), [1 << 20..3 << 20, 8 << 20..9 << 20]);
        assert!(learned.read(&original(2)).is_empty());
    }

    #[test]
    fn what_somebody_spoilt_costs_nothing_but_what_was_learned() {
        let directory = tempfile::tempdir().unwrap();
        let learned = Learned::new(directory.path());
        learned.add(&original(1), vec![0..4096]).unwrap();
        let path = learned.path(&original(1));
        let good = fs::read_to_string(&path).unwrap();
        for text in
            ["", "{", &good.replace("[0,4096]", "[-1,5]"), &good.replace("\"s\"", "\"t\""), &" ".repeat(300_000)]
        {
            fs::write(&path, text).unwrap();
            assert!(learned.read(&original(1)).is_empty());
        }
        fs::write(&path, good.replace("[0,4096]", "[5,3],[99999999,18446744073709551615],[200000000,300000000]"))
            .unwrap();
        assert_eq!(learned.read(&original(1)), [99_999_999..100 << 20]);
        learned.add(&original(1), vec![0..1]).unwrap();
    }

    #[test]
    fn no_more_is_kept_than_is_bounded_and_what_was_used_longest_ago_goes() {
        let directory = tempfile::tempdir().unwrap();
        let learned = Learned::new(directory.path());
        let scattered: Vec<_> = (0..3 * PARTS as u64).map(|at| at * (GAP + 4097)..at * (GAP + 4097) + 1).collect();
        let large = Original { size: u64::MAX, ..original(0) };
        learned.add(&large, scattered).unwrap();
        assert!((1..=PARTS).contains(&learned.read(&large).len()));
        for changed in 1..=IMAGES as u64 {
            learned.add(&original(changed), vec![0..1]).unwrap();
        }
        assert_eq!(fs::read_dir(&learned.directory).unwrap().count(), IMAGES);
        assert!(learned.read(&large).is_empty() && !learned.read(&original(IMAGES as u64)).is_empty());
    }
}
