//! Image files, made by the tools that users have.

use std::fs;
use std::path::{Path, PathBuf};

use super::run;

/// A directory tree, removed when dropped.
pub struct Tree(tempfile::TempDir);

impl Tree {
    /// Files by path, with their content.
    pub fn new(files: &[(&str, &str)]) -> Self {
        let tree = Tree(tempfile::tempdir().unwrap());
        // The mode of the image's root: that of a tempdir is 0700.
        run("chmod", &["755", tree.path().to_str().unwrap()]);
        for (path, content) in files {
            let path = tree.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        tree
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The seed document's own command.
    pub fn squashfs(&self, image: impl Into<PathBuf>) -> PathBuf {
        let image = image.into();
        let arguments = [self.path().to_str().unwrap(), image.to_str().unwrap(), "-noI", "-noX", "-noappend", "-quiet"];
        run("mksquashfs", &arguments);
        image
    }

    pub fn erofs(&self, image: impl Into<PathBuf>) -> PathBuf {
        let image = image.into();
        run("mkfs.erofs", &["--quiet", image.to_str().unwrap(), self.path().to_str().unwrap()]);
        image
    }

    pub fn ext4(&self, image: impl Into<PathBuf>) -> PathBuf {
        let image = image.into();
        run("mke2fs", &["-q", "-t", "ext4", "-d", self.path().to_str().unwrap(), image.to_str().unwrap(), "16M"]);
        image
    }
}
