//! What is in a directory that others may write to: no symbolic link is followed, and no image is read, for that would be its last use.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use serde::Serializer;

use super::File;
use crate::error::{Error, Kind, Result};
use crate::spec::index;

/// How names of images end: what is in a file with another is not known without reading it.
const IMAGES: [&str; 5] = [".sqsh", ".squashfs", ".sfs", ".erofs", ".sif"];
const INDEX: &str = ".json";
const LONGEST_INDEX: u64 = 64 << 10;
/// The most files that are looked at.
const MOST: usize = 1_000_000;

/// The images and indexes, by their paths.
pub fn files(directory: &OwnedFd) -> Result<Vec<File>> {
    let (mut files, mut directories, mut seen) = (Vec::new(), vec![String::new()], 0);
    while let Some(below) = directories.pop() {
        let mut look = || -> rustix::io::Result<()> {
            let open = open(directory, &below, OFlags::RDONLY | OFlags::DIRECTORY)?;
            for entry in Dir::read_from(&open)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                seen += 1;
                if seen > MOST {
                    return Err(Errno::OVERFLOW);
                }
                // A name that no spec can have is that of no image. Those with a dot are for what is not complete, and for snapshots.
                let Some(name) = std::str::from_utf8(name).ok().filter(|name| !name.starts_with('.')) else { continue };
                let path = if below.is_empty() { name.to_owned() } else { format!("{below}/{name}") };
                let stat = match rustix::fs::statat(&open, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => continue,
                    stat => stat?,
                };
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => directories.push(path),
                    FileType::RegularFile => files.extend(file(directory, path, &stat)),
                    _ => {}
                }
            }
            Ok(())
        };
        match look() {
            // It was there a moment ago.
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
            Err(errno) => {
                let hint =
                    if errno == Errno::OVERFLOW { ": there are too many files: name a directory in it" } else { "" };
                return Err(Error::new(Kind::Internal, format!("look into {below:?} of the directory: {errno}{hint}")));
            }
        }
    }
    files.sort_by(|one: &File, other| one.path.cmp(&other.path));
    // What an index is read for is no use of it: it was used when its layers were.
    let uses: BTreeMap<_, _> = files.iter().map(|file| (file.path.clone(), file.last_used)).collect();
    for file in &mut files {
        let layers = file.layers.iter().flatten().filter_map(|layer| uses.get(&file.beside(layer)));
        file.last_used = layers.copied().fold(file.last_used, SystemTime::max);
    }
    Ok(files)
}

fn file(directory: &OwnedFd, path: String, stat: &Stat) -> Option<File> {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
    let (changed, size) = (time(stat.st_mtime).max(time(stat.st_ctime)), stat.st_size.unsigned_abs());
    let used_by = BTreeSet::new();
    if IMAGES.iter().any(|ending| path.ends_with(ending)) {
        return Some(File { path, size, last_used: changed.max(time(stat.st_atime)), layers: None, used_by });
    }
    if !path.ends_with(INDEX) {
        return None;
    }
    let layers = layers(directory, &path)?;
    Some(File { path, size, last_used: changed, layers: Some(layers), used_by })
}

/// The layers of an index, if it is one.
fn layers(directory: &OwnedFd, path: &str) -> Option<Vec<String>> {
    let file = open(directory, path, OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
    let mut text = Vec::new();
    std::fs::File::from(file).take(LONGEST_INDEX).read_to_end(&mut text).ok()?;
    Some(index::parse(&text).ok()?.into_iter().map(|layer| layer.name).collect())
}

/// Opens what is below the directory, without following a symbolic link.
pub fn open(directory: impl AsFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { "." } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Where a path below the directory leads, by symlinks that do not leave it; `None` where it leads nowhere.
pub fn real_path(directory: &OwnedFd, path: &str) -> Option<PathBuf> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?;
    let name = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    Some(name(&opened)?.strip_prefix(name(directory)?).ok()?.to_owned())
}

pub fn seconds<S: Serializer>(time: &SystemTime, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// The directory and the name of a path.
pub fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
