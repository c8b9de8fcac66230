use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, mknodat, setxattr};
use tar::Archive;

use super::*;

fn open(directory: &Path) -> OwnedFd {
    rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn tar_of(directory: &Path) -> Result<(Vec<u8>, Vec<String>)> {
    let (mut out, mut left_out) = (Vec::new(), Vec::new());
    write(open(directory), &mut out, |what| left_out.push(what.to_owned()))?;
    Ok((out, left_out))
}

/// Of each entry its path, kind, link and content, by path.
fn list(tar: &[u8]) -> Vec<(String, EntryType, String, Vec<u8>)> {
    let mut list = Vec::new();
    for entry in Archive::new(tar).entries().unwrap() {
        let mut entry = entry.unwrap();
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        let link = entry.link_name_bytes().map_or(String::new(), |link| text(&link));
        let (path, kind, mut content) = (text(&entry.path_bytes()), entry.header().entry_type(), Vec::new());
        entry.read_to_end(&mut content).unwrap();
        list.push((path, kind, link, content));
    }
    list.sort_by(|one, other| one.0.cmp(&other.0));
    list
}

fn make(path: &Path, kind: FileType) {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), 0).unwrap();
}

#[test]
fn a_layer_has_what_an_upper_directory_has_and_says_what_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let long = "long".repeat(30);
    fs::create_dir_all(path("dir/sub")).unwrap();
    fs::write(path("dir/sub/file"), vec![b'x'; 200_000]).unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path(&long), "1").unwrap();
    symlink(format!("/no/{long}"), path("link")).unwrap();
    make(&path("fifo"), FileType::Fifo);
    make(&path("dir/gone"), FileType::CharacterDevice);
    make(&path("socket"), FileType::Socket);
    let (tar, left_out) = tar_of(directory.path()).unwrap();
    assert_eq!(left_out, ["/socket is a socket: it is left out"]);
    let entry = |path: &str, kind, link: &str, content: &[u8]| (path.into(), kind, link.into(), content.to_vec());
    let expected = [
        entry("./", EntryType::Directory, "", b""),
        entry("dir/", EntryType::Directory, "", b""),
        entry("dir/.wh.gone", EntryType::Regular, "", b""),
        entry("dir/sub/", EntryType::Directory, "", b""),
        entry("dir/sub/file", EntryType::Regular, "", &[b'x'; 200_000]),
        entry("empty", EntryType::Regular, "", b""),
        entry("fifo", EntryType::Fifo, "", b""),
        entry("link", EntryType::Symlink, &format!("/no/{long}"), b""),
        entry(&long, EntryType::Regular, "", b"1"),
    ];
    assert_eq!(list(&tar), expected);
    assert!(tar.ends_with(&[0; 1024]) && tar.len() % 512 == 0);
}

#[test]
fn names_of_one_file_are_links_and_attributes_of_it_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a");
    fs::write(&file, "1").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4751)).unwrap();
    let set = |name: &str, value: &[u8]| setxattr(&file, name, value, rustix::fs::XattrFlags::empty());
    let has_attributes = set("user.lines", b"one\ntwo\n").is_ok() && set("user.overlay.opaque", b"y").is_ok();
    for name in ["b", "c"] {
        fs::hard_link(&file, directory.path().join(name)).unwrap();
    }
    let (tar, _) = tar_of(directory.path()).unwrap();
    let list = list(&tar);
    let files: Vec<_> = list.iter().filter(|entry| entry.1 == EntryType::Regular).collect();
    let [(first, .., content)] = &files[..] else { panic!("{files:?}") };
    assert_eq!(content, b"1");
    let links: Vec<_> = list.iter().filter(|entry| entry.1 == EntryType::Link).collect();
    assert!(links.len() == 2 && links.iter().all(|link| link.2 == *first), "{links:?}");
    let mut archive = Archive::new(&tar[..]);
    let mut entries = archive.entries().unwrap().map(|entry| entry.unwrap());
    let entry = entries.find(|entry| entry.header().entry_type() == EntryType::Regular).unwrap();
    let metadata = fs::metadata(&file).unwrap();
    let header = entry.header();
    assert_eq!(header.mode().unwrap(), 0o4751);
    let (user, group, modified) = (header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap());
    assert_eq!((user, group), (metadata.uid().into(), metadata.gid().into()));
    assert_eq!(modified, u64::try_from(metadata.mtime()).unwrap());
    if has_attributes {
        let text = String::from_utf8_lossy(&tar);
        assert!(text.contains("SCHILY.xattr.user.lines=one\ntwo\n\n") && !text.contains("overlay"));
    }
}

/// Does something to the directory that is read, once so many bytes are written.
struct Meanwhile<F> {
    written: Vec<u8>,
    after: usize,
    act: RefCell<Option<F>>,
}

impl<F: FnOnce()> Write for &mut Meanwhile<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.written.extend(bytes);
        if self.written.len() > self.after
            && let Some(act) = self.act.take()
        {
            act();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_changes_while_it_is_read_is_an_error_and_the_tar_has_no_end() {
    let file = |directory: &Path| File::options().write(true).open(directory.join("file")).unwrap();
    let acts: [&dyn Fn(&Path); 5] = [
        &|directory| file(directory).set_len(400_000).unwrap(),
        &|directory| file(directory).set_len(200_000).unwrap(),
        &|directory| (&file(directory)).write_all(b"other").unwrap(),
        &|directory| fs::write(directory.join("new"), "").unwrap(),
        &|directory| fs::remove_file(directory.join("file")).unwrap(),
    ];
    for (number, act) in acts.iter().enumerate() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), vec![b'x'; 300_000]).unwrap();
        // The times of files are those of the last tick of a clock.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let act = RefCell::new(Some(|| act(directory.path())));
        let mut out = Meanwhile { written: Vec::new(), after: 100_000, act };
        let error = write(open(directory.path()), &mut out, |_| {}).unwrap_err();
        assert!(error.message.contains("it changed while it was read"), "{number}: {error}");
        assert!(out.act.borrow().is_none() && !out.written.ends_with(&[0; 1024]), "{number}");
    }
}

#[test]
fn what_a_layer_cannot_say_is_an_error_and_a_link_is_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(".wh.a");
    fs::write(&file, "").unwrap();
    let error = tar_of(directory.path()).unwrap_err();
    assert!(error.message.starts_with("/.wh.a: a layer can have no name that begins with"), "{error}");
    fs::remove_file(&file).unwrap();
    symlink("/etc", directory.path().join("etc")).unwrap();
    let (tar, _) = tar_of(directory.path()).unwrap();
    assert_eq!(list(&tar).len(), 2);
    let mut full = [0; 100];
    let error = write(open(directory.path()), &mut full[..], |_| {}).unwrap_err();
    assert!(error.message.starts_with("write the layer: "), "{error}");
}

#[test]
fn what_overlayfs_says_by_attributes_is_said_by_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["opaque", "merged"] {
        fs::create_dir(path(name)).unwrap();
    }
    fs::write(path("merged/gone"), "").unwrap();
    let set = |name: &str, attribute: &str, value: &[u8]| {
        setxattr(path(name), attribute, value, rustix::fs::XattrFlags::empty())
    };
    if set("opaque", "trusted.overlay.opaque", b"y").is_err() {
        eprintln!("this needs root");
        return;
    }
    set("merged", "trusted.overlay.opaque", b"x").unwrap();
    set("merged/gone", "trusted.overlay.whiteout", b"").unwrap();
    let (tar, _) = tar_of(directory.path()).unwrap();
    let paths: Vec<_> = list(&tar).into_iter().map(|entry| entry.0).collect();
    assert_eq!(paths, ["./", "merged/", "merged/.wh.gone", "opaque/", "opaque/.wh..wh..opq"]);
}
