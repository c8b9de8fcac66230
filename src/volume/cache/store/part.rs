//! A copy while it is made.

use std::fs::File;
use std::io;

use rustix::fs::{Advice, FlockOperation, Mode, OFlags, fadvise, flock};
use rustix::io::Errno;

use super::{Bounds, Store};
use crate::error::{Error, Result};
use crate::spec::Digest;
use crate::volume::cache::original::{Entry, Original};

impl Store {
    /// Begins a copy, or goes on with one that was cut short. `None` where another process is at it, or it is complete.
    ///
    /// Copies that nobody uses make way, those first that the server has no more, then those that were used longest ago. Where that is not
    /// enough, `RESOURCE_EXHAUSTED`.
    pub fn begin(&self, original: &Original, bounds: Bounds) -> Result<Option<Part<'_>>> {
        let id = original.id();
        let _lock = self.lock()?;
        let begin = || {
            let found = self.read(&id)?.map(|(_, entry)| entry);
            let is_there = |kind| self.is_there(&format!("{id}.{kind}"));
            // One whose bytes somebody removed is none.
            let found = found.filter(|entry| !entry.is_complete() || is_there("image"));
            if found.as_ref().is_some_and(Entry::is_complete) {
                return Ok(None);
            }
            // Cut short between getting its name and being described so.
            if found.is_some() && !is_there("part") && is_there("image") {
                self.rename(&format!("{id}.image"), &format!("{id}.part"))?;
            }
            let file = self.open_at(&format!("{id}.part"), OFlags::RDWR | OFlags::CREATE)?;
            if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
                return if errno == Errno::WOULDBLOCK { Ok(None) } else { Err(errno.into()) };
            }
            let new = Entry { original: original.clone(), synced: 0, digest: None, superseded: false };
            let mut entry = found.unwrap_or(new);
            entry.synced = entry.synced.min(file.metadata()?.len());
            Ok(Some(Part { store: self, entry, file, min_free: bounds.min_free }))
        };
        let failed = |error: io::Error| self.failed_copy("write", original, &error);
        let Some(part) = begin().map_err(failed)? else { return Ok(None) };
        let there = self.make_room(original, part.entry.synced, bounds).and_then(|()| {
            // From here on its bytes count.
            self.write(&part.entry).map_err(failed)
        });
        match there {
            Ok(()) => Ok(Some(part)),
            Err(error) => {
                if part.entry.synced == 0 {
                    let _ = self.unlink(&id);
                }
                Err(error)
            }
        }
    }
}

/// A copy that is being made, and nobody else's while this lives.
pub struct Part<'a> {
    store: &'a Store,
    pub entry: Entry,
    file: File,
    min_free: u64,
}

impl Part<'_> {
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What failed on the disk.
    pub fn failed(&self, action: &str, error: &io::Error) -> Error {
        self.store.failed_copy(action, &self.entry.original, error)
    }

    /// Puts what was written on the disk, and says that it is there.
    pub fn sync(&mut self, length: u64) -> io::Result<()> {
        self.file.sync_data()?;
        // It will not be read again soon.
        let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        let _lock = self.store.lock_directory()?;
        self.entry.synced = length;
        self.hear()?;
        self.store.write(&self.entry)?;
        // Others may have taken what was free.
        match self.store.free()? >= self.min_free {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::StorageFull, "others need what is left of the disk")),
        }
    }

    /// What the server has said meanwhile.
    fn hear(&mut self) -> io::Result<()> {
        if let Some((_, entry)) = self.store.read(&self.entry.original.id())? {
            self.entry.superseded = entry.superseded;
        }
        Ok(())
    }

    /// Gives the copy, which is on the disk and right, its name.
    pub fn complete(mut self, digest: &Digest) -> Result<()> {
        let id = self.entry.original.id();
        let _lock = self.store.lock()?;
        let mut complete = || {
            rustix::fs::fchmod(&self.file, Mode::RUSR)?;
            self.file.sync_all()?;
            self.store.rename(&format!("{id}.part"), &format!("{id}.image"))?;
            self.hear()?;
            self.entry.digest = Some(digest.to_string());
            self.store.write(&self.entry)
        };
        let completed: io::Result<()> = complete();
        completed.map_err(|error| self.failed("complete", &error))
    }

    /// Throws away what is no copy of anything.
    pub fn discard(self) -> Result<()> {
        let id = self.entry.original.id();
        let _lock = self.store.lock()?;
        self.store.unlink(&id).map_err(self.store.failed("remove", &id))
    }
}
