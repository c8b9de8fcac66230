//! What was read of images when they were used last, written down so that it can be read ahead.
//!
//! It is a hint: what is torn, of another image or of no use costs calls that nobody needed, and nothing else.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::lock::lock;
use crate::volume::cache::Original;

/// What lies no further apart is read together: a call costs as much as so many bytes.
const GAP: u64 = 64 << 10;
/// The most parts of an image, and the most images of which something is kept.
const PARTS: usize = 2048;
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
    /// It is made when something is written down.
    pub fn new(directory: &Path) -> Self {
        Learned { directory: directory.to_owned(), writing: Arc::default() }
    }

    /// The parts of an image that were read, in their order; none where nothing is known.
    pub fn read(&self, original: &Original) -> Vec<Range<u64>> {
        let path = self.path(original);
        let read = || match fs::metadata(&path)?.len() {
            ..=MAX => fs::read(&path),
            _ => Err(io::ErrorKind::FileTooLarge.into()),
        };
        let text = match read() {
            Ok(text) => serde_json::from_slice::<Text>(&text).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => Err(error),
        };
        match text {
            Ok(text) if text.original == *original => {
                // Nobody else writes there; what is not as it was written is of no use.
                merge(text.parts.into_iter().map(|(start, end)| start..end.min(original.size)).collect(), 0)
            }
            Ok(_) => Vec::new(),
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
        let mut all = merge([known.clone(), parts].concat(), GAP);
        let mut gap = GAP;
        while all.len() > PARTS {
            gap *= 2;
            all = merge(all, gap);
        }
        let path = self.path(original);
        if all == known {
            return touch(&path);
        }
        let text = Text { original: original.clone(), parts: all.iter().map(|part| (part.start, part.end)).collect() };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        self.make_room()?;
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(&text)?)?;
        fs::rename(new, path)
    }

    /// Forgets the images that were used longest ago.
    fn make_room(&self) -> io::Result<()> {
        // What is gone meanwhile makes room, too.
        let used = |entry: io::Result<fs::DirEntry>| {
            let entry = entry.ok()?;
            Some((entry.metadata().and_then(|metadata| metadata.modified()).ok()?, entry.path()))
        };
        let mut files: Vec<_> = fs::read_dir(&self.directory)?.filter_map(used).collect();
        files.sort();
        let surplus = (files.len() + 1).saturating_sub(IMAGES);
        files.iter().take(surplus).try_for_each(|(_, path)| match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    fn path(&self, original: &Original) -> PathBuf {
        self.directory.join(format!("{}.json", original.id()))
    }
}

/// It was used now.
fn touch(path: &Path) -> io::Result<()> {
    match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        file => file?.set_modified(std::time::SystemTime::now()),
    }
}

/// In their order, those together that lie no further apart than this.
fn merge(mut parts: Vec<Range<u64>>, gap: u64) -> Vec<Range<u64>> {
    parts.retain(|part| part.start < part.end);
    parts.sort_by_key(|part| part.start);
    let mut merged = Vec::<Range<u64>>::new();
    for part in parts {
        match merged.last_mut().filter(|last| part.start <= last.end.saturating_add(gap)) {
            Some(last) => last.end = last.end.max(part.end),
            None => merged.push(part),
        }
    }
    merged
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "that is one part")]
mod tests {
    use super::*;
    use crate::volume::cache::Name;
    use proptest::prelude::*;

    fn original(changed: u64) -> Original {
        let name = Name { server: "s".into(), mount: "m".into(), export: "/e".into(), path: "p".into() };
        Original { name, inode: 1, size: 100 << 20, modified: 2, changed }
    }

    #[test]
    fn what_is_learned_is_added_up_and_is_of_one_content_of_one_image() {
        let directory = tempfile::tempdir().unwrap();
        let learned = Learned::new(&directory.path().join("learned"));
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
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), IMAGES);
        assert!(learned.read(&large).is_empty() && !learned.read(&original(IMAGES as u64)).is_empty());
    }

    proptest! {
        #[test]
        fn merged_parts_are_in_order_apart_and_have_all_that_there_was(
            parts in prop::collection::vec((0_u64..1000, 0_u64..50), 0..40),
            gap in 0_u64..30,
        ) {
            let parts: Vec<_> = parts.into_iter().map(|(start, length)| start..start + length).collect();
            let merged = merge(parts.clone(), gap);
            prop_assert!(merged.windows(2).all(|two| two[0].end + gap < two[1].start));
            prop_assert!(parts.iter().flat_map(Clone::clone).all(|at| merged.iter().any(|part| part.contains(&at))));
        }
    }
}
