//! Hash trees behind the file system of an image, as dm-verity reads them: in the format of veritysetup(8), with its superblock
//! (Documentation/admin-guide/device-mapper/verity.rst; cryptsetup, "DM-Verity on-disk format").
//!
//! Behind the data, filled up to a whole block, lie a block with the superblock and the levels of the tree, the uppermost first. A level
//! is the hashes of the blocks of the one below it, 128 in each block; the lowest is of the data. The root hash is that of the uppermost
//! block, and says all.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::error::{Doing, Error, Result, Subject, errno_of};

/// A SHA-256.
pub type RootHash = [u8; HASH];

const HASH: usize = 32;
/// Of data and of hashes.
const BLOCK: usize = 4096;
const HASHES_IN_BLOCK: u64 = (BLOCK / HASH) as u64;
/// `struct verity_sb` of cryptsetup.
const SUPERBLOCK: usize = 512;
const MAGIC: &[u8; 8] = b"verity\0\0";
const MAX_SALT: usize = 256;
/// In the place of a superblock whose tree is not written yet; the size of the image follows.
const UNFINISHED: &[u8; 8] = b"unsealed";
/// How much of an image is read at a time.
const CHUNK: usize = 1 << 20;

/// Where the tree of an image is, and how its hashes are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Of the data, in blocks.
    data: u64,
    salt: Vec<u8>,
}

impl Tree {
    /// That of an image, or of the device on it, of `size` bytes. It may be anything that somebody wrote there.
    ///
    /// `EMEDIUMTYPE` where there is none.
    pub fn find(image: &File, size: u64) -> Result<Tree> {
        let missing =
            |hint| Error::new("look for the hash tree", Errno::MEDIUMTYPE).about(Subject::Image).with_hint(hint);
        let data = data_blocks(size).ok_or_else(|| missing("there is none at the image's end: see 'seal'"))?;
        let mut superblock = [0; SUPERBLOCK];
        image.read_exact_at(&mut superblock, data * BLOCK as u64).doing(|| "read the hash tree".into())?;
        let number = |at: usize, length: usize| {
            superblock[at..at + length].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        };
        if superblock[..8] != *MAGIC {
            return Err(missing("there is none at the image's end: see 'seal'"));
        }
        let salt = number(80, 2) as usize;
        let algorithm = superblock[32..64].split(|&byte| byte == 0).next();
        let as_ours = (number(8, 4), number(12, 4), algorithm) == (1, 1, Some(b"sha256"))
            && (number(64, 4), number(68, 4), number(72, 8)) == (BLOCK as u64, BLOCK as u64, data)
            && salt <= MAX_SALT;
        if !as_ours {
            let hint = "it is not of version 1, SHA-256, blocks of 4096 bytes and of all the data before it, as 'seal' makes it";
            return Err(missing(hint));
        }
        Ok(Tree { data, salt: superblock[88..88 + salt].to_vec() })
    }

    /// How many bytes the data has.
    pub fn data_size(&self) -> u64 {
        self.data * BLOCK as u64
    }

    /// How many sectors of 512 bytes the data has.
    pub fn data_sectors(&self) -> u64 {
        self.data * (BLOCK as u64 / 512)
    }

    /// The parameters of the device-mapper target `verity` for an image on this device (`MAJOR:MINOR`).
    pub fn parameters(&self, device: &str, root: &RootHash) -> String {
        let salt = if self.salt.is_empty() { "-".to_owned() } else { hexadecimal(&self.salt) };
        let (data, tree) = (self.data, self.data + 1);
        format!("1 {device} {device} {BLOCK} {BLOCK} {data} {tree} sha256 {} {salt}", hexadecimal(root))
    }

    fn superblock(&self, root: &RootHash) -> [u8; SUPERBLOCK] {
        let mut superblock = [0; SUPERBLOCK];
        let mut put = |at: usize, bytes: &[u8]| superblock[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &1u32.to_le_bytes());
        put(12, &1u32.to_le_bytes());
        // A UUID that is the same for the same bytes.
        put(16, &root[..16]);
        put(32, b"sha256");
        put(64, &(BLOCK as u32).to_le_bytes());
        put(68, &(BLOCK as u32).to_le_bytes());
        put(72, &self.data.to_le_bytes());
        put(80, &(self.salt.len() as u16).to_le_bytes());
        put(88, &self.salt);
        superblock
    }

    /// Reads the data and makes its tree: `each` gets each block of that, and where it belongs in the file. Returns the root hash.
    fn build(&self, image: &File, each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<RootHash> {
        let mut position = (self.data + 1) * BLOCK as u64;
        let mut levels = Vec::new();
        for blocks in level_sizes(self.data).into_iter().rev() {
            levels.push(Level { position, block: Vec::with_capacity(BLOCK) });
            position += blocks * BLOCK as u64;
        }
        levels.reverse();
        let mut build = Build { salt: &self.salt, levels, each, root: RootHash::default() };
        let (size, mut at, mut chunk) = (self.data * BLOCK as u64, 0, vec![0; CHUNK]);
        while at < size {
            let chunk = &mut chunk[..CHUNK.min((size - at) as usize)];
            image.read_exact_at(chunk, at)?;
            for block in chunk.chunks_exact(BLOCK) {
                build.add(0, hash(&self.salt, block))?;
            }
            at += chunk.len() as u64;
        }
        build.finish()
    }
}

/// A tree that is being made: of each level the block that is not full yet, the lowest level first.
struct Build<'a, F> {
    salt: &'a [u8],
    levels: Vec<Level>,
    each: F,
    root: RootHash,
}

struct Level {
    /// Of the block in the file.
    position: u64,
    block: Vec<u8>,
}

impl<F: FnMut(u64, &[u8]) -> io::Result<()>> Build<'_, F> {
    fn add(&mut self, level: usize, mut hash: RootHash) -> io::Result<()> {
        for at in level..self.levels.len() {
            self.levels[at].block.extend(hash);
            if self.levels[at].block.len() < BLOCK {
                return Ok(());
            }
            hash = self.end_block(at)?;
        }
        self.root = hash;
        Ok(())
    }

    fn end_block(&mut self, level: usize) -> io::Result<RootHash> {
        let level = &mut self.levels[level];
        level.block.resize(BLOCK, 0);
        (self.each)(level.position, &level.block)?;
        let hash = hash(self.salt, &level.block);
        level.position += BLOCK as u64;
        level.block.clear();
        Ok(hash)
    }

    fn finish(mut self) -> io::Result<RootHash> {
        for level in 0..self.levels.len() {
            if !self.levels[level].block.is_empty() {
                let hash = self.end_block(level)?;
                self.add(level + 1, hash)?;
            }
        }
        Ok(self.root)
    }
}

/// Appends the hash tree to an image that has none, and returns its root hash: the same for the same bytes. The superblock is written last,
/// so that a tree that is cut short is none; until then there is a mark in its place, by which the next call takes it off again.
///
/// Nobody may use the image meanwhile: a running pod sees that it was changed.
pub fn seal(image: &File) -> Result<RootHash> {
    let doing = || "write the hash tree".to_owned();
    let size = image.metadata().doing(|| "look at the image".into())?.len();
    if let Ok(tree) = Tree::find(image, size) {
        let root = check(image, &tree)?;
        let hint = format!("it has one already, and its root hash is {}", hexadecimal(&root));
        return Err(Error::new(doing(), Errno::EXIST).about(Subject::Image).with_hint(hint));
    }
    if size == 0 {
        return Err(Error::new(doing(), Errno::NODATA).about(Subject::Image).with_hint("the image is empty"));
    }
    let size = size_before(image, size).unwrap_or(size);
    append(image, size)
        .inspect_err(|_| {
            // The first error is the one to report.
            let _ = image.set_len(size);
        })
        .doing(doing)
}

fn append(image: &File, size: u64) -> io::Result<RootHash> {
    let tree = Tree { data: size.div_ceil(BLOCK as u64), salt: Vec::new() };
    let put = |start: &[u8]| {
        let mut block = [0; BLOCK];
        block[..start.len()].copy_from_slice(start);
        image.write_all_at(&block, tree.data_size())?;
        image.sync_all()
    };
    // What lies behind the data is from an earlier call.
    image.set_len(size)?;
    // The mark first: there is no moment at which the image is longer without one.
    put(&[&UNFINISHED[..], &size.to_le_bytes()].concat())?;
    image.set_len(with_tree(tree.data) * BLOCK as u64)?;
    let root = tree.build(image, |at, block| image.write_all_at(block, at))?;
    image.sync_all()?;
    put(&tree.superblock(&root))?;
    Ok(root)
}

/// How large an image was, where its tree was cut short.
fn size_before(image: &File, size: u64) -> Option<u64> {
    let before = |data: u64| {
        let mut mark = [0; 16];
        image.read_exact_at(&mut mark, data * BLOCK as u64).ok()?;
        let before = u64::from_le_bytes(mark[8..].try_into().ok()?);
        (mark[..8] == *UNFINISHED && before.div_ceil(BLOCK as u64) == data).then_some(before)
    };
    // The mark is the last block until there is room for the tree.
    let last = size.is_multiple_of(BLOCK as u64).then(|| size / BLOCK as u64)?.checked_sub(1)?;
    data_blocks(size).and_then(before).or_else(|| before(last))
}

/// Reads an image and its hash tree, and returns the root hash. `EIO` where they do not fit.
pub fn verify(image: &File) -> Result<RootHash> {
    let size = image.metadata().doing(|| "look at the image".into())?.len();
    check(image, &Tree::find(image, size)?)
}

fn check(image: &File, tree: &Tree) -> Result<RootHash> {
    let mut differs = None;
    let root = tree.build(image, |at, block| {
        let mut there = vec![0; block.len()];
        image.read_exact_at(&mut there, at)?;
        if there != block {
            differs.get_or_insert(at);
        }
        Ok(())
    });
    let root = root.map_err(|error| Error::new("read the image", errno_of(&error)).about(Subject::Image))?;
    match differs {
        Some(at) => {
            let hint = format!("the image has other bytes than when it was sealed, or its tree has, at {at}");
            Err(Error::new("compare the image with its hash tree", Errno::IO).about(Subject::Image).with_hint(hint))
        }
        None => Ok(root),
    }
}

/// How many blocks each level of the tree has, the lowest first.
fn level_sizes(data: u64) -> Vec<u64> {
    let mut sizes = Vec::new();
    let mut below = data;
    while below > 1 {
        below = below.div_ceil(HASHES_IN_BLOCK);
        sizes.push(below);
    }
    sizes
}

/// How many blocks an image with a tree has, by those of its data.
fn with_tree(data: u64) -> u64 {
    data + 1 + level_sizes(data).iter().sum::<u64>()
}

/// How many blocks of data an image with a tree has, by its size.
fn data_blocks(size: u64) -> Option<u64> {
    let all = size.is_multiple_of(BLOCK as u64).then_some(size / BLOCK as u64)?;
    let (mut low, mut high) = (1, all);
    while low < high {
        let middle = low + (high - low) / 2;
        if with_tree(middle) < all { low = middle + 1 } else { high = middle }
    }
    (low > 0 && with_tree(low) == all).then_some(low)
}

fn hash(salt: &[u8], block: &[u8]) -> RootHash {
    Sha256::new().chain_update(salt).chain_update(block).finalize().into()
}

/// As veritysetup(8) prints it.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A root hash that [`hexadecimal`] wrote.
pub fn read_hexadecimal(text: &str) -> Option<RootHash> {
    let mut root = RootHash::default();
    for (at, byte) in root.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    (hexadecimal(&root) == text).then_some(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image(content: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(content, 0).unwrap();
        file
    }

    fn size(file: &File) -> u64 {
        file.metadata().unwrap().len()
    }

    fn content(blocks: usize) -> Vec<u8> {
        (0..blocks * BLOCK).map(|at| (at / 7 % 251) as u8).collect()
    }

    #[test]
    fn a_sealed_image_is_verified_and_its_tree_found_whatever_its_size() {
        for blocks in [1, 2, 127, 128, 129, 128 * 128 + 1] {
            let file = image(&content(blocks));
            let root = seal(&file).unwrap();
            let tree = Tree::find(&file, size(&file)).unwrap();
            assert_eq!((tree.data, tree.data_sectors()), (blocks as u64, 8 * blocks as u64));
            assert_eq!(verify(&file).unwrap(), root);
        }
    }

    #[test]
    fn the_hashes_are_those_that_veritysetup_makes() {
        // veritysetup format --salt=- --hash-offset: of one block the root hash is the block's own, of two it is that of a block with both.
        let one = content(1);
        assert_eq!(seal(&image(&one)).unwrap(), hash(&[], &one));
        let two = content(2);
        let mut above = [hash(&[], &two[..BLOCK]), hash(&[], &two[BLOCK..])].concat();
        above.resize(BLOCK, 0);
        let file = image(&two);
        assert_eq!(seal(&file).unwrap(), hash(&[], &above));
        let mut there = vec![0; BLOCK];
        file.read_exact_at(&mut there, 3 * BLOCK as u64).unwrap();
        assert_eq!(there, above);
    }

    #[test]
    fn the_target_is_told_where_data_and_tree_are() {
        let file = image(&content(3));
        let root = seal(&file).unwrap();
        let parameters = Tree::find(&file, size(&file)).unwrap().parameters("7:3", &root);
        assert_eq!(parameters, format!("1 7:3 7:3 4096 4096 3 4 sha256 {} -", hexadecimal(&root)));
    }

    #[test]
    fn an_image_is_sealed_once_and_the_same_bytes_have_the_same_root_hash() {
        let file = image(&content(5)[..5 * BLOCK - 100]);
        let root = seal(&file).unwrap();
        let error = seal(&file).unwrap_err();
        assert_eq!(error.errno(), Errno::EXIST);
        assert!(error.to_string().contains(&hexadecimal(&root)), "{error}");
        assert_eq!(seal(&image(&content(5)[..5 * BLOCK - 100])).unwrap(), root);
        assert_eq!(seal(&image(&[])).unwrap_err().errno(), Errno::NODATA);
    }

    #[test]
    fn a_tree_that_was_cut_short_is_taken_off_by_the_next_call() {
        let bytes = &content(300)[..300 * BLOCK - 100];
        let root = seal(&image(bytes)).unwrap();
        for blocks in [301, with_tree(300)] {
            let file = image(bytes);
            file.write_all_at(&[&UNFINISHED[..], &(bytes.len() as u64).to_le_bytes()].concat(), 300 * BLOCK as u64)
                .unwrap();
            file.set_len(blocks * BLOCK as u64).unwrap();
            if blocks > 301 {
                file.write_all_at(&[0xff; 5000], 301 * BLOCK as u64).unwrap();
            }
            assert_eq!(verify(&file).unwrap_err().errno(), Errno::MEDIUMTYPE);
            assert_eq!(seal(&file).unwrap(), root);
            assert_eq!((verify(&file).unwrap(), size(&file)), (root, with_tree(300) * BLOCK as u64));
        }
    }

    #[test]
    fn whatever_is_changed_of_a_sealed_image_is_found() {
        let file = image(&content(200));
        let root = seal(&file).unwrap();
        for at in [0, 100 * BLOCK as u64 + 5, 201 * BLOCK as u64, 202 * BLOCK as u64] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert!(verify(&file).is_err(), "at {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(verify(&file).unwrap(), root);
        for size in [size(&file) - 1, size(&file) - BLOCK as u64, 200 * BLOCK as u64, BLOCK as u64, 1, 0] {
            file.set_len(size).unwrap();
            assert_eq!(Tree::find(&file, size).unwrap_err().errno(), Errno::MEDIUMTYPE, "{size} bytes");
        }
    }

    proptest! {
        #[test]
        fn no_superblock_makes_anything_panic(
            blocks in 1_usize..300,
            head in prop::collection::vec(any::<u8>(), 0..SUPERBLOCK),
            from in 0_usize..100,
        ) {
            let file = image(&content(blocks));
            seal(&file).unwrap();
            let length = head.len().min(SUPERBLOCK - from);
            file.write_all_at(&head[..length], (blocks * BLOCK + from) as u64).unwrap();
            if let Ok(tree) = Tree::find(&file, size(&file)) {
                prop_assert_eq!(tree.data, blocks as u64);
                let _ = check(&file, &tree);
            }
        }
    }
}
