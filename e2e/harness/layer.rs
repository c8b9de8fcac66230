//! A writable layer that becomes a layer of a container image: what a pod writes, and what is in the tar.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use rustix::fs::{XattrFlags, setxattr};

use super::image::Tree;
use super::{Driver, run};

/// What is below a writable layer here.
pub fn image(path: impl AsRef<Path>) {
    let tree = Tree::new(&[
        ("kept", "1"),
        ("gone", "1"),
        ("changed", "1"),
        ("replaced/old", "1"),
        ("dir/gone", "1"),
        ("dir/kept", "1"),
    ]);
    tree.squashfs(path.as_ref());
}

/// Writes into a volume and commits it, and again while no driver serves it; returns the tar.
pub fn assert_committed(driver: &mut Driver, target: &Path) -> Vec<u8> {
    write(target);
    let tar = driver.commit(target).unwrap();
    assert_is_written(&tar);
    // It stands on nothing that the driver's process has, and changes nothing.
    driver.kill();
    assert_eq!(driver.commit(target).unwrap(), tar);
    driver.launch();
    assert_eq!(fs::read_to_string(target.join("changed")).unwrap(), "22");
    tar
}

/// Writes over, removes, replaces a directory, and makes all kinds of files.
fn write(target: &Path) {
    let path = |name: &str| target.join(name).display().to_string();
    fs::write(path("changed"), "22").unwrap();
    fs::remove_file(path("gone")).unwrap();
    fs::remove_file(path("dir/gone")).unwrap();
    fs::remove_dir_all(path("replaced")).unwrap();
    fs::create_dir(path("replaced")).unwrap();
    fs::write(path("replaced/new"), "new").unwrap();
    fs::hard_link(path("replaced/new"), path("replaced/too")).unwrap();
    symlink("../etc/passwd", path("link")).unwrap();
    run("mkfifo", &[&path("fifo")]);
    run("mknod", &[&path("null"), "c", "1", "3"]);
    run("chown", &["12:70000", &path("changed")]);
    run("chmod", &["4750", &path("changed")]);
    for (name, value) in [("user.kept", b"yes"), ("user.overlay.opaque", b"yes")] {
        setxattr(path("changed"), name, value, XattrFlags::empty()).unwrap();
    }
    assert_eq!(fs::metadata(path("changed")).unwrap().mode() & 0o7777, 0o4750);
    drop(std::os::unix::net::UnixListener::bind(path("socket")).unwrap());
}

/// `tar` is a whole one of what [`write`] did.
fn assert_is_written(tar: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("layer.tar");
    fs::write(&file, tar).unwrap();
    let list = run("tar", &["--numeric-owner", "-tvf", file.to_str().unwrap()]);
    // Mode, owner, and from the name on: the size of directories, and times, are whose they are.
    let mut lines: Vec<_> = list
        .lines()
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            format!("{} {} {}", words[0], words[1], words[5..].join(" "))
        })
        .collect();
    lines.sort_by(|one, other| one.split(' ').nth(2).cmp(&other.split(' ').nth(2)));
    let is_first = |name: &str| lines.iter().any(|line| line.contains(name) && line.starts_with('-'));
    let (first, other) = if is_first("replaced/new") { ("new", "too") } else { ("too", "new") };
    let mut expected = vec![
        "drwxr-xr-x 0/0 ./".to_owned(),
        "-rwsr-x--- 12/70000 changed".into(),
        "drwxr-xr-x 0/0 dir/".into(),
        "---------- 0/0 dir/.wh.gone".into(),
        "prw-r--r-- 0/0 fifo".into(),
        "---------- 0/0 .wh.gone".into(),
        "lrwxrwxrwx 0/0 link -> ../etc/passwd".into(),
        "crw-r--r-- 0/0 null".into(),
        "drwxr-xr-x 0/0 replaced/".into(),
        "---------- 0/0 replaced/.wh..wh..opq".into(),
        format!("-rw-r--r-- 0/0 replaced/{first}"),
        format!("hrw-r--r-- 0/0 replaced/{other} link to replaced/{first}"),
    ];
    expected.sort_by(|one, other| one.split(' ').nth(2).cmp(&other.split(' ').nth(2)));
    assert_eq!(lines, expected);
    let text = String::from_utf8_lossy(tar);
    assert!(text.contains("SCHILY.xattr.user.kept=yes\n") && !text.contains("overlay"));
    assert!(tar.ends_with(&[0; 1024]));
}
