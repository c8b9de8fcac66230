//! What of images is read first, for those who make images: a file to lie beside one, and the order of its files.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::kernel::mount::is_mount;
use crate::kernel::page_cache::Watched;
use crate::volume::cache::Original;
use crate::volume::source::Learned;
pub use crate::volume::source::Profile;

/// What this node learned of an image: of its last content that was used here. `image` is its path on the server, or a part of its name that
/// no other image has.
pub fn learned(data_dir: &Path, image: &str) -> Result<Profile> {
    let learned = Learned::new(data_dir);
    let known = learned.known().map_err(|error| Error::file("list what is learned in", data_dir, &error))?;
    let is_exact = |it: &Original| image == it.name.file() || image == it.name.to_string();
    let any_exact = known.iter().any(is_exact);
    let wanted = |it: &&Original| if any_exact { is_exact(it) } else { it.name.to_string().contains(image) };
    let wanted: Vec<_> = known.iter().filter(wanted).collect();
    let names: BTreeSet<_> = wanted.iter().map(|it| it.name.to_string()).collect();
    match wanted.last() {
        Some(original) if names.len() == 1 => Ok(Profile::new(original.size, learned.read(original))),
        None => {
            let message = format!(
                "nothing is learned of an image {image:?} in {}: the node must have a budget for what it reads ahead (--prefetch-budget), \
                 and writes down what was read two minutes after the image was attached, and when its last pod ends",
                data_dir.display()
            );
            Err(Error::new(Kind::NotFound, message))
        }
        Some(_) => {
            let names = names.into_iter().collect::<Vec<_>>().join("; ");
            Err(Error::new(Kind::InvalidArgument, format!("{image:?} is in the names of several images: {names}")))
        }
    }
}

/// What of an image file is in the page cache of this machine now. Where it lies on NFS, its server may be waited for.
pub fn cached(image: &Path) -> Result<Profile> {
    let open = || File::open(image).and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = open().map_err(|error| Error::file("open", image, &error))?;
    Ok(Profile::new(metadata.len(), cached_of(file, &metadata, image)?))
}

/// All regular files below a directory, as lines of the file that mksquashfs(1) reads by `-sort`: those of which something is in the page cache of
/// this machine now come first. What is deleted meanwhile is left out. `left_out` is told of the files that no line can name.
pub fn files(directory: &Path, mut left_out: impl FnMut(&str)) -> Result<Vec<u8>> {
    let directory = fs::canonicalize(directory).map_err(|error| failed(directory, error))?;
    if !directory.is_dir() {
        return Err(failed(&directory, io::ErrorKind::NotADirectory.into()));
    }
    let (mut first, mut others, mut left) = (Vec::new(), Vec::new(), vec![directory.clone()]);
    while let Some(path) = left.pop() {
        match look(&path, path != directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path, error)),
            Ok(Found::Other) => {}
            Ok(Found::Directory(entries)) => left.extend(entries),
            Ok(Found::File(file, metadata)) => {
                let is_first = !cached_of(file, &metadata, &path)?.is_empty();
                let name = path.strip_prefix(&directory).unwrap_or(&path).as_os_str().as_bytes();
                match (name.contains(&b'\n'), is_first) {
                    (true, _) => left_out(&format!("{path:?}")),
                    (false, true) => first.push(name.to_owned()),
                    (false, false) => others.push(name.to_owned()),
                }
            }
        }
    }
    Ok(order(&first, &others))
}

/// The name may be anything that an image or a pod wrote.
fn failed(path: &Path, error: io::Error) -> Error {
    Error::new(Kind::Internal, format!("read {path:?}: {error}"))
}

/// What a path is, to those who look for files with something in them.
enum Found {
    File(File, Metadata),
    /// What is in it; the one to be taken next is the last.
    Directory(Vec<PathBuf>),
    Other,
}

/// What is mounted below the directory itself is another file system.
fn look(path: &Path, is_below: bool) -> io::Result<Found> {
    let metadata = fs::symlink_metadata(path)?;
    // Not by the device: the files of an overlay have others than its directories.
    if is_below && is_mount(path).map_err(|error| error.errno())? {
        return Ok(Found::Other);
    }
    if metadata.is_dir() {
        let mut entries = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        entries.sort_by(|a, b| b.cmp(a));
        return Ok(Found::Directory(entries));
    }
    if !metadata.is_file() || metadata.len() == 0 {
        return Ok(Found::Other);
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    Ok(if metadata.len() == 0 { Found::Other } else { Found::File(file, metadata) })
}

/// `NAME PRIORITY` for each: from 32767 to 1 and from -1 to -32767, so that what is in neither list comes in between. Each has one of its own as far
/// as they go: what has the same, mksquashfs writes in the reverse of the order that readers like.
fn order(first: &[Vec<u8>], others: &[Vec<u8>]) -> Vec<u8> {
    const MOST: usize = 32767;
    let mut lines = Vec::new();
    let of = |at: usize, all: &[Vec<u8>]| at * MOST / all.len();
    let first = first.iter().enumerate().map(|(at, name)| (name, (MOST - of(at, first)).to_string()));
    let others = others.iter().enumerate().map(|(at, name)| (name, format!("-{}", 1 + of(at, others))));
    for (name, priority) in first.chain(others) {
        for &byte in name {
            // What is taken as the end of a name, or as a comment.
            if byte.is_ascii_whitespace() || matches!(byte, b'\x0b' | b'\\' | b'#') {
                lines.push(b'\\');
            }
            lines.push(byte);
        }
        lines.extend(format!(" {priority}\n").bytes());
    }
    lines
}

fn cached_of(file: File, metadata: &Metadata, path: &Path) -> Result<Vec<Range<u64>>> {
    let asker = rustix::process::geteuid().as_raw();
    if asker != 0 && asker != metadata.uid() {
        let message = format!("see what is cached of {path:?}: the kernel tells root and its owner alone");
        return Err(Error::new(Kind::PermissionDenied, message));
    }
    let cached = Watched::untouched(file, metadata.len()).and_then(|watched| watched.cached());
    cached.map_err(|error| Error::from(error).about(&format!("{path:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_read_come_first_and_all_in_their_order_with_names_that_mksquashfs_reads() {
        let names = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect::<Vec<_>>();
        let order = |first: &[&str], others: &[&str]| String::from_utf8(order(&names(first), &names(others))).unwrap();
        assert_eq!(order(&[], &[]), "");
        assert_eq!(
            order(&["b", "#c d"], &["a", r"e\f", "g"]),
            "b 32767\n\\#c\\ d 16384\na -1\ne\\\\f -10923\ng -21845\n"
        );
        let many: Vec<_> = (0..100_000).map(|at| format!("{at:06}").into_bytes()).collect();
        let lines = String::from_utf8(super::order(&many, &many)).unwrap();
        let priorities: Vec<i32> = lines.lines().map(|line| line.split(' ').nth(1).unwrap().parse().unwrap()).collect();
        assert!(priorities.is_sorted_by(|a, b| a >= b) && !priorities.contains(&0));
        assert_eq!((priorities[0], priorities[99_999]), (32767, 1));
        assert_eq!((priorities[100_000], priorities[199_999]), (-1, -32767));
    }

    #[test]
    fn the_files_of_a_directory_are_in_the_order_of_their_paths_but_for_empty_ones_and_symlinks() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir_all(at("b/c")).unwrap();
        for (name, content) in [("b/c/2", "2"), ("a", "1"), ("b/1", "1"), ("c", "3"), ("empty", ""), ("new\nline", "4")]
        {
            fs::write(at(name), content).unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", at("link")).unwrap();
        let mut left_out = Vec::new();
        let lines = String::from_utf8(files(directory.path(), |name| left_out.push(name.to_owned())).unwrap()).unwrap();
        // Just written, and so in the page cache.
        assert_eq!(lines, "a 32767\nb/1 24576\nb/c/2 16384\nc 8192\n");
        for none in ["none", "a"] {
            assert_eq!(files(&at(none), |_| ()).unwrap_err().kind, Kind::Internal);
        }
        assert_eq!(left_out, [format!("{:?}", fs::canonicalize(at("new\nline")).unwrap())]);
    }

    #[test]
    fn what_is_cached_of_a_file_is_a_profile_for_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, [1; 10_000]).unwrap();
        let text = serde_json::to_vec(&cached(&image).unwrap()).unwrap();
        assert_eq!(Profile::parse(&text, 10_000).unwrap().first(), Some(&(0..10_000)));
        fs::write(&image, "").unwrap();
        assert!(cached(&image).is_err());
    }
}
