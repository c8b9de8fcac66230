//! A directory, as it is when it is read.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path as FilePath, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, lgetxattr, llistxattr};
use rustix::io::Errno;

use super::entries::{Attributes, Entry, Kind, Limits, Path, is_kept};
use super::pack::Layer;

pub struct Directory {
    path: PathBuf,
    /// What was there when it was read before.
    seen: Cell<Option<u64>>,
}

impl Directory {
    pub fn new(path: &FilePath) -> Self {
        Directory { path: path.to_owned(), seen: Cell::new(None) }
    }
}

impl Layer for Directory {
    fn read(&self, limits: Limits, each: &mut dyn FnMut(Entry, &mut dyn Read) -> Result<()>) -> Result<()> {
        let (mut left, mut links, mut seen) = (limits, HashMap::<_, Path>::new(), DefaultHasher::new());
        let mut paths = vec![Path::new()];
        while let Some(path) = paths.pop() {
            let file = self.path.join(std::ffi::OsStr::from_bytes(&path));
            let context = || format!("read {}", file.display());
            let metadata = fs::symlink_metadata(&file).with_context(context)?;
            let Some(kind) = kind(&file, &metadata).with_context(context)? else {
                eprintln!("{} is a socket: it is left out", file.display());
                continue;
            };
            left.entry(path.len())?;
            (&path, metadata.ino(), metadata.mode(), metadata.len(), metadata.ctime(), metadata.ctime_nsec())
                .hash(&mut seen);
            let names = (metadata.nlink() > 1 && kind != Kind::Directory).then_some((metadata.dev(), metadata.ino()));
            if let Some(first) = names.and_then(|inode| links.get(&inode)) {
                each(
                    Entry { path, kind: Kind::Link(first.clone()), attributes: Attributes::default() },
                    &mut io::empty(),
                )?;
                continue;
            }
            links.extend(names.map(|inode| (inode, path.clone())));
            if kind == Kind::Directory {
                let mut inside = Vec::new();
                for entry in fs::read_dir(&file).with_context(context)? {
                    let name = entry.with_context(context)?.file_name().into_vec();
                    inside.push(if path.is_empty() { name } else { [&path[..], b"/", &name].concat() });
                }
                // The first one is the next one.
                inside.sort_by(|one, other| other.cmp(one));
                paths.extend(inside);
            }
            let attributes = attributes(&file, &metadata).with_context(context)?;
            match kind {
                Kind::File(size) => {
                    left.file(size)?;
                    // By now something else may have this name, of which the kind is told once it is open.
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                    let mut data = File::from(rustix::fs::open(&file, flags, Mode::empty()).with_context(context)?);
                    ensure!(
                        data.metadata().with_context(context)?.is_file(),
                        "{} changed while it was read",
                        file.display()
                    );
                    each(Entry { path, kind, attributes }, &mut data).with_context(context)?;
                }
                _ => each(Entry { path, kind, attributes }, &mut io::empty())?,
            }
        }
        let seen = seen.finish();
        let before = self.seen.replace(Some(seen));
        ensure!(before.is_none_or(|before| before == seen), "it changed while it was read");
        Ok(())
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

fn kind(file: &FilePath, metadata: &Metadata) -> Result<Option<Kind>> {
    let kind = metadata.file_type();
    Ok(Some(match kind {
        _ if kind.is_dir() => Kind::Directory,
        _ if kind.is_file() => Kind::File(metadata.len()),
        _ if kind.is_symlink() => Kind::Symlink(fs::read_link(file)?.into_os_string().into_vec()),
        _ if kind.is_fifo() => Kind::Fifo,
        _ if kind.is_block_device() || kind.is_char_device() => {
            let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
            Kind::device(kind.is_block_device(), major, minor)?
        }
        _ => return Ok(None),
    }))
}

fn attributes(file: &FilePath, metadata: &Metadata) -> Result<Attributes> {
    let mut extended = Vec::new();
    for name in names(file)?.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok()) {
        if is_kept(name) {
            let mut value = vec![0; 64 << 10];
            let length = lgetxattr(file, name, &mut value[..])?;
            value.truncate(length);
            extended.push((name.to_owned(), value));
        }
    }
    extended.sort();
    Ok(Attributes {
        mode: metadata.mode() & 0o7777,
        user: metadata.uid(),
        group: metadata.gid(),
        modified: u32::try_from(metadata.mtime().max(0)).unwrap_or(u32::MAX),
        extended,
    })
}

/// Each ends with a null byte.
fn names(file: &FilePath) -> Result<Vec<u8>> {
    let mut names = vec![0; 64 << 10];
    match llistxattr(file, &mut names[..]) {
        Ok(length) => names.truncate(length),
        Err(Errno::OPNOTSUPP) => names.clear(),
        Err(errno) => return Err(errno.into()),
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_changes_between_two_reads_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a"), "1").unwrap();
        let read = |tree: &Directory| {
            let limits = Limits { entries: 10, bytes: 10, names: 100 };
            let mut paths = Vec::new();
            tree.read(limits, &mut |entry, _| {
                paths.push(String::from_utf8(entry.path)?);
                Ok(())
            })
            .map(|()| paths)
        };
        let tree = Directory::new(directory.path());
        for _ in 0..2 {
            assert_eq!(read(&tree).unwrap(), ["", "a"]);
        }
        fs::write(directory.path().join("b"), "2").unwrap();
        assert!(read(&tree).unwrap_err().to_string().contains("changed while it was read"));
        assert_eq!(read(&Directory::new(directory.path())).unwrap(), ["", "a", "b"]);
    }
}
