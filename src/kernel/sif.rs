//! SIF, the image format of Apptainer and Singularity: where in such a file its file system is (github.com/sylabs/sif, `pkg/sif`).
//!
//! A header of 128 bytes says where a table of descriptors is, and each of those what an object in the file is. All numbers are
//! little-endian. Anybody may have written them: nothing is read but in the file, and no more of it than a table of [`MOST`] descriptors.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::error::{Doing, Error, Result, Subject};

const HEADER: usize = 128;
/// Behind the line by which a shell starts a runtime.
const MAGIC_AT: usize = 32;
const MAGIC: &[u8; 10] = b"SIF_MAGIC\0";
const VERSION_AT: usize = MAGIC_AT + MAGIC.len();
const VERSION: &[u8; 3] = b"01\0";
/// How many descriptors the table has, and where it is.
const TOTAL_AT: usize = 88;
const TABLE_AT: usize = 96;

/// Of one descriptor.
const DESCRIPTOR: usize = 585;
const USED_AT: usize = 4;
const OFFSET_AT: usize = 17;
const SIZE_AT: usize = 25;
/// What only a partition has: its file system, and its purpose.
const FS_TYPE_AT: usize = 201;
const PART_TYPE_AT: usize = 205;
/// What is used here has 48 of them unless somebody asks for more.
const MOST: u64 = 1024;

const PARTITION: u64 = 0x4004;
const PRIMARY_SYSTEM: u64 = 2;
const SQUASHFS: u64 = 1;

/// The bytes of a loop device that has a part of a file; it begins at a block of a disk.
const SECTOR: u64 = 512;

/// A file system in a file, in bytes: never all of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    pub offset: u64,
    pub size: u64,
}

/// Whether `head`, the first bytes of a file, are those of a SIF.
pub fn is_sif(head: &[u8]) -> bool {
    head.get(MAGIC_AT..VERSION_AT) == Some(MAGIC)
}

/// The primary system partition of a SIF of `size` bytes, which is a squashfs and lies in the file.
///
/// `EMEDIUMTYPE` where there is no such partition, `ENODATA` where the file ends before it does.
pub fn find(file: &File, size: u64) -> Result<Partition> {
    let read = |at: u64, length: usize| {
        let end = at.checked_add(length as u64);
        if end.is_none_or(|end| end > size) {
            return Err(truncated("its table of objects ends", end, size));
        }
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at)
            .doing(|| "read a SIF".into())
            .map_err(|error| error.about(Subject::Image))?;
        Ok(bytes)
    };
    let header = read(0, HEADER)?;
    if !is_sif(&header) || header[VERSION_AT..].get(..VERSION.len()) != Some(VERSION) {
        return Err(refused("it is no SIF of version 01"));
    }
    let total = number(&header, TOTAL_AT, 8);
    if total > MOST {
        return Err(refused(format!("its header names {total} objects, and {MOST} are the most that are looked at")));
    }
    let table = read(number(&header, TABLE_AT, 8), total as usize * DESCRIPTOR)?;
    let is_primary = |descriptor: &&[u8]| {
        descriptor[USED_AT] != 0
            && number(descriptor, 0, 4) == PARTITION
            && number(descriptor, PART_TYPE_AT, 4) == PRIMARY_SYSTEM
    };
    let mut primary = table.chunks_exact(DESCRIPTOR).filter(is_primary);
    let (Some(descriptor), None) = (primary.next(), primary.next()) else {
        return Err(refused("it has no primary system partition, or several: 'apptainer sif list' shows what it has"));
    };
    match number(descriptor, FS_TYPE_AT, 4) {
        SQUASHFS => {}
        other => {
            let what = match other {
                2 => "ext3".to_owned(),
                3 => "an archive".to_owned(),
                4 => "raw data".to_owned(),
                5 => "an encrypted squashfs, for which a key would be needed".to_owned(),
                other => format!("of type {other}, which may be an encrypted one"),
            };
            return Err(refused(format!("its primary system partition is {what}: only squashfs is mounted")));
        }
    }
    let partition = Partition { offset: number(descriptor, OFFSET_AT, 8), size: number(descriptor, SIZE_AT, 8) };
    let end = partition.offset.checked_add(partition.size);
    if end.is_none_or(|end| end > size) {
        return Err(truncated("its primary system partition ends", end, size));
    }
    if partition.offset == 0 || !partition.offset.is_multiple_of(SECTOR) || partition.size == 0 {
        let Partition { offset, size } = partition;
        let hint = format!(
            "its primary system partition has {size} bytes at {offset}, and a device begins at a multiple of {SECTOR}: make the image anew \
             with 'apptainer build NEW.sif OLD.sif', which aligns it"
        );
        return Err(refused(hint));
    }
    Ok(partition)
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

fn refused(hint: impl Into<String>) -> Error {
    Error::new("look for the file system in a SIF", Errno::MEDIUMTYPE).about(Subject::Image).with_hint(hint)
}

fn truncated(what: &str, end: Option<u64>, size: u64) -> Error {
    let end = end.map_or("behind all files".to_owned(), |end| format!("at {end} bytes"));
    let hint = format!("the image is truncated, or its header is wrong: {what} {end}, and the file has {size}");
    Error::new("look for the file system in a SIF", Errno::NODATA).about(Subject::Image).with_hint(hint)
}

/// A SIF as Apptainer writes it: the definition first, and the primary partition, of this type of file system, at `offset`.
#[cfg(test)]
pub fn example(partition: &[u8], offset: usize, fs_type: u32) -> Vec<u8> {
    let mut sif = vec![0; 4096 + 48 * DESCRIPTOR];
    let mut put = |at: usize, bytes: &[u8]| sif[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"#!/usr/bin/env run-singularity\n");
    put(MAGIC_AT, MAGIC);
    put(VERSION_AT, VERSION);
    put(TOTAL_AT, &48u64.to_le_bytes());
    put(TABLE_AT, &4096u64.to_le_bytes());
    for (index, kind, at, size) in [(0, 0x4001u32, 32176u64, 4u64), (3, 0x4004, offset as u64, partition.len() as u64)]
    {
        let descriptor = 4096 + index * DESCRIPTOR;
        put(descriptor, &kind.to_le_bytes());
        put(descriptor + USED_AT, &[1]);
        put(descriptor + OFFSET_AT, &at.to_le_bytes());
        put(descriptor + SIZE_AT, &size.to_le_bytes());
    }
    put(4096 + 3 * DESCRIPTOR + FS_TYPE_AT, &fs_type.to_le_bytes());
    put(4096 + 3 * DESCRIPTOR + PART_TYPE_AT, &2u32.to_le_bytes());
    sif.resize(sif.len().max(offset), 0);
    sif.extend_from_slice(partition);
    sif
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find_in(bytes: &[u8]) -> Result<Partition> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        find(&file, bytes.len() as u64)
    }

    /// With other bytes in the descriptor of the partition.
    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut sif = example(&[7; 4096], 36864, 1);
        let at = 4096 + 3 * DESCRIPTOR + at;
        sif[at..at + bytes.len()].copy_from_slice(bytes);
        sif
    }

    #[test]
    fn the_primary_system_partition_is_found_where_its_descriptor_says() {
        let sif = example(&[7; 4096], 36864, 1);
        assert!(is_sif(&sif[..128]));
        assert_eq!(find_in(&sif).unwrap(), Partition { offset: 36864, size: 4096 });
        // What is signed is behind it.
        assert_eq!(find_in(&[&sif[..], &[0; 999]].concat()).unwrap(), Partition { offset: 36864, size: 4096 });
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_by_its_name() {
        let sif = |fs_type| example(&[7; 4096], 36864, fs_type);
        let header = |at: usize, bytes: &[u8]| {
            let mut sif = sif(1);
            sif[at..at + bytes.len()].copy_from_slice(bytes);
            sif
        };
        let second = {
            let mut sif = sif(1);
            sif.copy_within(4096 + 3 * DESCRIPTOR..4096 + 4 * DESCRIPTOR, 4096 + 47 * DESCRIPTOR);
            sif
        };
        for (sif, errno, why) in [
            (sif(2), Errno::MEDIUMTYPE, "is ext3"),
            (sif(4), Errno::MEDIUMTYPE, "is raw data"),
            (sif(5), Errno::MEDIUMTYPE, "an encrypted squashfs"),
            (sif(6), Errno::MEDIUMTYPE, "of type 6"),
            (second, Errno::MEDIUMTYPE, "no primary system partition, or several"),
            (with(USED_AT, &[0]), Errno::MEDIUMTYPE, "no primary system partition"),
            (with(PART_TYPE_AT, &[1]), Errno::MEDIUMTYPE, "no primary system partition"),
            (
                with(OFFSET_AT, &36865u64.to_le_bytes()[..]),
                Errno::NODATA,
                "ends at 40961 bytes, and the file has 40960",
            ),
            (example(&[7; 4096], 36865, 1), Errno::MEDIUMTYPE, "a multiple of 512"),
            (with(OFFSET_AT, &0u64.to_le_bytes()), Errno::MEDIUMTYPE, "a multiple of 512"),
            (with(SIZE_AT, &0u64.to_le_bytes()), Errno::MEDIUMTYPE, "has 0 bytes"),
            (with(OFFSET_AT, &u64::MAX.to_le_bytes()), Errno::NODATA, "behind all files"),
            (with(SIZE_AT, &u64::MAX.to_le_bytes()), Errno::NODATA, "behind all files"),
            (header(VERSION_AT, b"02"), Errno::MEDIUMTYPE, "no SIF of version 01"),
            (header(TOTAL_AT, &1025u64.to_le_bytes()), Errno::MEDIUMTYPE, "names 1025 objects"),
            (header(TOTAL_AT, &u64::MAX.to_le_bytes()), Errno::MEDIUMTYPE, "objects"),
            (header(TOTAL_AT, &0u64.to_le_bytes()), Errno::MEDIUMTYPE, "no primary system partition"),
            (header(TABLE_AT, &u64::MAX.to_le_bytes()), Errno::NODATA, "its table of objects ends behind all files"),
            (header(TABLE_AT, &40000u64.to_le_bytes()), Errno::NODATA, "its table of objects"),
            (sif(1)[..127].to_vec(), Errno::NODATA, "the file has 127"),
            (sif(1)[..40959].to_vec(), Errno::NODATA, "the file has 40959"),
        ] {
            let error = find_in(&sif).unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    /// Whatever is found lies in the file.
    fn is_inside(bytes: &[u8]) {
        if let Ok(Partition { offset, size }) = find_in(bytes) {
            assert!(offset > 0 && offset.is_multiple_of(512) && size > 0 && offset + size <= bytes.len() as u64);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_find_something_outside_of_the_file(
            bytes in proptest::collection::vec(any::<u8>(), 0..2048), total in any::<u64>(), table in any::<u64>(),
        ) {
            is_inside(&bytes);
            let mut sif = bytes;
            sif.resize(sif.len().max(HEADER), 0);
            sif[MAGIC_AT..VERSION_AT].copy_from_slice(MAGIC);
            sif[VERSION_AT..VERSION_AT + 3].copy_from_slice(VERSION);
            for (total, table) in [(total, table), (total % 4, table % 2048)] {
                sif[TOTAL_AT..TABLE_AT].copy_from_slice(&total.to_le_bytes());
                sif[TABLE_AT..TABLE_AT + 8].copy_from_slice(&table.to_le_bytes());
                is_inside(&sif);
            }
        }

        #[test]
        fn no_number_in_a_descriptor_leads_outside_of_the_file(
            offset in any::<u64>(), size in any::<u64>(), small in 0u64..100_000, cut in 0usize..45_000,
        ) {
            for (offset, size) in [(offset, size), (offset, small), (small, size), (small * 512 % 50_000, small % 9000)] {
                let sif = with(OFFSET_AT, &[offset.to_le_bytes(), size.to_le_bytes()].concat());
                is_inside(&sif);
                is_inside(&sif[..cut.min(sif.len())]);
            }
        }
    }
}
