//! Which parts of an image are read first, as a file beside it says, `IMAGE.profile`: nodes that have not learned it themselves begin with that.
//!
//! It comes from whoever writes images, and is a hint: what is wrong in it costs calls that nobody needed, and nothing else.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// What lies no further apart is read together: a call costs as much as so many bytes.
pub const GAP: u64 = 64 << 10;
/// The most parts of an image.
pub const PARTS: usize = 2048;
/// Of the format. Another is for nodes that know it.
const VERSION: u32 = 1;
/// The largest file.
pub const MAX: usize = 256 << 10;

/// What later versions add, nodes with this one do not know and need not.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    version: u32,
    /// The bytes of the image: it is for no other.
    size: u64,
    /// The beginning of each and its end, in bytes and in their order.
    parts: Vec<(u64, u64)>,
}

/// What another version begins with, too.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl Profile {
    pub fn new(size: u64, parts: Vec<Range<u64>>) -> Self {
        Profile { version: VERSION, size, parts: pairs(&bounded(parts)) }
    }

    /// The parts of an image of this size, in their order, that this text says.
    pub fn parse(text: &[u8], size: u64) -> Result<Vec<Range<u64>>> {
        let unfit = |why: String| Error::new(Kind::FailedPrecondition, why);
        if text.len() > MAX {
            return Err(unfit(format!("it has more than {MAX} bytes")));
        }
        // Nothing of the text: it may have any file of the export in it, and lines like those of the log.
        let place = |error: serde_json::Error| {
            unfit(format!("it is no profile in line {}, column {}", error.line(), error.column()))
        };
        let Version { version } = serde_json::from_slice(text).map_err(place)?;
        if version != VERSION {
            return Err(unfit(format!("it is of version {version}, and this driver knows {VERSION}")));
        }
        let profile: Profile = serde_json::from_slice(text).map_err(place)?;
        if profile.size != size {
            return Err(unfit(format!("it is of an image of {} bytes, and this one has {size}", profile.size)));
        }
        // Many small ones would cost many calls, of which the budget knows nothing.
        Ok(bounded(parts_of(profile.parts, size)))
    }
}

/// As they are written down.
pub fn pairs(parts: &[Range<u64>]) -> Vec<(u64, u64)> {
    parts.iter().map(|part| (part.start, part.end)).collect()
}

/// Those that were written down for an image of this size, whoever wrote them.
pub fn parts_of(pairs: Vec<(u64, u64)>, size: u64) -> Vec<Range<u64>> {
    merge(pairs.into_iter().map(|(start, end)| start..end.min(size)).collect(), 0)
}

/// As many parts as are kept of an image, with all that there is in these.
pub fn bounded(parts: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let (mut all, mut gap) = (merge(parts, GAP), GAP);
    while all.len() > PARTS {
        gap *= 2;
        all = merge(all, gap);
    }
    all
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
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_again_for_an_image_of_the_same_size_alone() {
        let parts = vec![1 << 20..2 << 20, 8 << 20..9 << 20, (2 << 20) + GAP..3 << 20];
        let text = serde_json::to_string(&Profile::new(9 << 20, parts)).unwrap();
        // As it lies on servers, written by this version or an earlier one.
        let golden = r#"{"version":1,"size":9437184,"parts":[[1048576,3145728],[8388608,9437184]]}"#;
        assert_eq!(text, golden);
        assert_eq!(Profile::parse(golden.as_bytes(), 9 << 20).unwrap(), [1 << 20..3 << 20, 8 << 20..9 << 20]);
        let error = Profile::parse(golden.as_bytes(), 10 << 20).unwrap_err();
        assert_eq!(error.message, "it is of an image of 9437184 bytes, and this one has 10485760");
    }

    #[test]
    fn whoever_writes_one_gets_nothing_but_reads_within_the_image_and_no_line_of_the_log() {
        let size = 1 << 30;
        let parse = |parts: &str| {
            let text = format!(r#"{{"version": 1, "size": {size}, "more": [], "parts": [{parts}]}}"#);
            Profile::parse(text.as_bytes(), size)
        };
        assert_eq!(parse("").unwrap(), []);
        let end = size - 100..size;
        let far =
            format!("[5, 3], [{}, 18446744073709551615], [18446744073709551614, 18446744073709551615]", end.start);
        assert_eq!(parse(&far).unwrap(), [end]);
        assert_eq!(parse("[500, 700], [0, 10], [600, 200000], [5, 20]").unwrap(), [0..200_000]);
        let small: Vec<_> = (0..9000).map(|at| format!("[{}, {}]", at * 100_000, at * 100_000 + 1)).collect();
        assert!((1..=PARTS).contains(&parse(&small.join(",")).unwrap().len()));
        for parts in ["[-1, 5]", "[1, 2, 3]", "[0.5, 1]", r#""all""#, "[0, 18446744073709551616]", "[0, 1]]"] {
            assert!(parse(parts).is_err(), "{parts}");
        }
        let lines = r#"{"version": "\n2026-11-30 INFO all is well", "size": 1, "parts": []}"#;
        for text in ["", "{", "[]", "{}", lines, &"[".repeat(100_000), &" ".repeat(300_000)] {
            let error = Profile::parse(text.as_bytes(), size).unwrap_err().message;
            assert!(error.len() < 60 && !error.contains("well"), "{error}");
        }
        let later = format!(r#"{{"version": 2, "size": {size}, "parts": "elsewhere"}}"#);
        assert!(Profile::parse(later.as_bytes(), size).unwrap_err().message.contains("version 2"));
        assert!(Profile::parse(&[0xff; 100], size).is_err());
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
