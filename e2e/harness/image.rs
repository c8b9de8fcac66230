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

    /// As Apptainer writes it: the definition, then the squashfs at a page, then what is signed.
    pub fn sif(&self, image: impl Into<PathBuf>) -> PathBuf {
        let image = image.into();
        let squashfs = self.squashfs(image.with_extension("partition"));
        sif(&image, &fs::read(&squashfs).unwrap(), 36864, 1);
        fs::remove_file(squashfs).unwrap();
        image
    }

    pub fn ext4(&self, image: impl Into<PathBuf>) -> PathBuf {
        let image = image.into();
        run("mke2fs", &["-q", "-t", "ext4", "-d", self.path().to_str().unwrap(), image.to_str().unwrap(), "16M"]);
        image
    }
}

/// Writes a SIF whose primary system partition is of this type (1 is squashfs), at `offset`.
pub fn sif(image: &Path, partition: &[u8], offset: u64, fs_type: u32) {
    const TABLE: usize = 4096;
    const DESCRIPTOR: usize = 585;
    let mut sif = vec![0; TABLE + 48 * DESCRIPTOR];
    let mut put = |at: usize, bytes: &[u8]| sif[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\x0001\x0002\0");
    for (at, number) in [(80, 45), (88, 48), (96, TABLE), (104, 48 * DESCRIPTOR), (112, TABLE + 48 * DESCRIPTOR)] {
        put(at, &(number as u64).to_le_bytes());
    }
    let behind = offset + partition.len() as u64;
    let objects = [(0x4001u32, 32176, 4), (0x4004, offset, partition.len() as u64), (0x4005, behind, 9)];
    for (index, (kind, at, size)) in objects.into_iter().enumerate() {
        let descriptor = TABLE + index * DESCRIPTOR;
        put(descriptor, &kind.to_le_bytes());
        put(descriptor + 4, &[1]);
        put(descriptor + 5, &(index as u32 + 1).to_le_bytes());
        put(descriptor + 17, &at.to_le_bytes());
        put(descriptor + 25, &size.to_le_bytes());
        if kind == 0x4004 {
            put(descriptor + 201, &fs_type.to_le_bytes());
            put(descriptor + 205, &2u32.to_le_bytes());
        }
    }
    sif.extend_from_slice(b"def\n");
    sif.resize(offset as usize, 0);
    sif.extend_from_slice(partition);
    sif.extend_from_slice(b"signature");
    fs::write(image, sif).unwrap();
}
