//! What a person does with the copies of a node, beside a driver that runs or without one.

use std::path::Path;

use super::copy;
use super::original::Entry;
use super::store::Store;
use crate::error::{Error, Kind, Result};

/// What a look at the bytes of a copy found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verified {
    Right,
    /// They are not those that were written: the copy is thrown away, and what starts from now on is read from the server.
    Wrong,
}

/// All copies in a directory, complete or not, the one that was used last at the end; none where there is no directory.
pub fn list(directory: &Path) -> Result<Vec<Entry>> {
    Ok(open(directory)?.map(|store| store.entries()).transpose()?.unwrap_or_default())
}

/// Reads each complete copy from the disk and compares it with its digest. `each` is told of one after the other.
pub fn verify(directory: &Path, mut each: impl FnMut(&Entry, Verified)) -> Result<()> {
    let Some(store) = open(directory)? else { return Ok(()) };
    for entry in store.entries()? {
        // Gone meanwhile.
        let Some((entry, file)) = store.peek(&entry.original)? else { continue };
        let failed = |error| Error::file(&format!("read the copy of {} in", entry.original.name), directory, &error);
        let verified = match copy::verify(&file, entry.original.size) {
            Ok(digest) if entry.has(Some(digest)) => Verified::Right,
            // A disk that cannot read it back has not kept it either.
            Ok(_) => Verified::Wrong,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO)) => Verified::Wrong,
            Err(error) => return Err(failed(error)),
        };
        if verified == Verified::Wrong {
            store.remove(&entry)?;
        }
        each(&entry, verified);
    }
    Ok(())
}

/// Removes the copies of images whose name contains one of `images`, and are not in use; `each` is told which, and whether that was done.
pub fn evict(directory: &Path, images: &[String], mut each: impl FnMut(&Entry, bool)) -> Result<()> {
    let entries = match open(directory)? {
        Some(store) => {
            let mut entries = store.entries()?;
            entries.retain(|entry| images.iter().any(|image| entry.original.name.to_string().contains(image)));
            for entry in &entries {
                each(entry, store.evict(entry)?);
            }
            entries
        }
        None => Vec::new(),
    };
    if entries.is_empty() {
        let message = format!("there is no copy of {} in {}", images.join(" or "), directory.display());
        return Err(Error::new(Kind::NotFound, message));
    }
    Ok(())
}

/// The directory, if it is there.
pub fn open(directory: &Path) -> Result<Option<Store>> {
    match directory.try_exists() {
        Ok(false) => Ok(None),
        _ => Store::open(directory).map(Some),
    }
}
