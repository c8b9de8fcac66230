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
use crate::kernel::image::Content;
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
        let opened = open(directory, &below, OFlags::RDONLY | OFlags::DIRECTORY);
        let look = || -> rustix::io::Result<()> {
            let open = match opened {
                // Gone since, or others': what is in it is not judged, and its indexes name what is in it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) if !below.is_empty() => return Ok(()),
                opened => opened?,
            };
            for entry in Dir::read_from(&open)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                seen += 1;
                if seen > MOST {
                    return Err(Errno::OVERFLOW);
                }
                // A name that no spec can have is that of no image. Those with a dot are for what is not complete, and for snapshots.
                let Some(name) = std::str::from_utf8(name).ok().filter(|name| !name.starts_with('.')) else { continue };
                let path = join(&below, name);
                let stat = match rustix::fs::statat(&open, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => continue,
                    stat => stat?,
                };
                match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => directories.push(path),
                    FileType::RegularFile => files.extend(file(directory, path, &stat)?),
                    _ => {}
                }
            }
            Ok(())
        };
        look().map_err(|errno| {
            let hint = match errno {
                Errno::OVERFLOW => ": there are too many files: name a directory in it",
                _ => ": what cannot be read may name any image",
            };
            Error::new(Kind::Internal, format!("look into {below:?} of the directory: {errno}{hint}"))
        })?;
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

fn file(directory: &OwnedFd, path: String, stat: &Stat) -> rustix::io::Result<Option<File>> {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs());
    let (changed, size) = (time(stat.st_mtime).max(time(stat.st_ctime)), stat.st_size.unsigned_abs());
    let (content, used_by) = (content(stat), BTreeSet::new());
    if IMAGES.iter().any(|ending| path.ends_with(ending)) {
        let last_used = changed.max(time(stat.st_atime));
        return Ok(Some(File { path, size, last_used, content, layers: None, used_by }));
    }
    let layers = if path.ends_with(INDEX) { layers(directory, &path)? } else { None };
    Ok(layers.map(|layers| File { path, size, last_used: changed, content, layers: Some(layers), used_by }))
}

/// Which file it is, and which bytes it has, as far as stat(2) can tell.
pub fn content(stat: &Stat) -> Content {
    let modified = stat.st_mtime.unsigned_abs().saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec);
    Content { inode: stat.st_ino, size: stat.st_size.unsigned_abs(), modified }
}

/// The layers of an index; `None` where it is none, and an error where nobody can say: its layers would pass for files of nobody.
fn layers(directory: &OwnedFd, path: &str) -> rustix::io::Result<Option<Vec<String>>> {
    let file = match open(directory, path, OFlags::RDONLY | OFlags::NONBLOCK) {
        Err(Errno::NOENT) => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    let read = std::fs::File::from(file).take(LONGEST_INDEX).read_to_end(&mut text);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(index::parse(&text).ok().map(|layers| layers.into_iter().map(|layer| layer.name).collect()))
}

/// Opens what is below the directory, without following a symbolic link.
pub fn open(directory: impl AsFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { "." } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// The directories below it, with itself: those that can be read.
pub fn directories(directory: &OwnedFd) -> Vec<String> {
    let (mut found, mut next) = (Vec::new(), vec![String::new()]);
    while let Some(below) = next.pop() {
        let Ok(opened) = open(directory, &below, OFlags::RDONLY | OFlags::DIRECTORY) else { continue };
        let Ok(entries) = Dir::read_from(&opened) else { continue };
        for entry in entries.filter_map(|entry| entry.ok()) {
            let name = entry.file_name().to_str().unwrap_or_default().to_owned();
            let is_directory = !name.is_empty()
                && !name.starts_with('.')
                && rustix::fs::statat(&opened, &*name, AtFlags::SYMLINK_NOFOLLOW)
                    .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            if is_directory {
                next.push(join(&below, &name));
            }
        }
        found.push(below);
        if found.len() > MOST {
            break;
        }
    }
    found
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

/// The path of a name in a directory, which is empty for the first one.
pub fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

/// The directory and the name of a path.
pub fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
