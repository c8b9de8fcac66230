//! The members of a tar, each with all that its headers say of it: in the formats ustar, pax and GNU (tar(5)).
//!
//! The crate `tar` reads the fields of one header. Its reader is not used: it ends the records of pax where a line does, and names and
//! attributes may have line ends in them.

use std::io::{self, Read};

use anyhow::{Context, Result, bail, ensure};
use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// The largest set of pax records, and the longest name in GNU's way.
const EXTENSION: u64 = 1 << 20;

/// What is said of a member. Where several headers do, the later one of the specification's order counts.
#[derive(Debug)]
pub struct Member {
    pub kind: EntryType,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub size: u64,
    pub mode: u32,
    pub user: u64,
    pub group: u64,
    /// In seconds since 1970; 0 for all that was before.
    pub modified: u64,
    pub device: (u32, u32),
    /// `SCHILY.xattr.` stands before the name of each.
    pub extended: Vec<(String, Vec<u8>)>,
    /// In one of GNU's formats, of which the data are not those of the file.
    pub is_sparse: bool,
}

pub struct Members<R> {
    tar: R,
    /// Whether a tar may end without the blocks that say so.
    may_just_end: bool,
}

impl<R: Read> Members<R> {
    pub fn new(tar: R, may_just_end: bool) -> Self {
        Members { tar, may_just_end }
    }

    /// Calls `each` with all of them and their data, of which it need not read all.
    pub fn read(mut self, mut each: impl FnMut(Member, &mut dyn Read) -> Result<()>) -> Result<()> {
        let (mut records, mut path, mut link) = (Vec::new(), None, None);
        while let Some(header) = self.header()? {
            let size = header.entry_size().context("read the size of a member")?;
            match header.entry_type() {
                EntryType::XHeader => records = read_records(&self.body(size)?)?,
                // Of all members, or of none: what others say by it is about the tar.
                EntryType::XGlobalHeader => drop(self.body(size)?),
                EntryType::GNULongName => path = Some(name(self.body(size)?)),
                EntryType::GNULongLink => link = Some(name(self.body(size)?)),
                _ => {
                    let member = member(&header, std::mem::take(&mut records), path.take(), link.take())?;
                    let size = member.size;
                    let mut data = (&mut self.tar).take(size);
                    each(member, &mut data)?;
                    let left = data.limit().saturating_add(padding(size));
                    self.skip(left)?;
                }
            }
        }
        Ok(())
    }

    /// `None` at the end.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let mut length = 0;
        while length < BLOCK {
            match self.tar.read(&mut header.as_mut_bytes()[length..]) {
                Ok(0) if length == 0 && self.may_just_end => return Ok(None),
                Ok(0) => bail!("it is cut short"),
                Ok(more) => length += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        // The field itself counts as blanks.
        let sum =
            bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum::<u32>() + 8 * u32::from(b' ');
        ensure!(header.cksum().is_ok_and(|expected| expected == sum), "it is no tar, or damaged");
        Ok(Some(header))
    }

    fn body(&mut self, size: u64) -> Result<Vec<u8>> {
        ensure!(size <= EXTENSION, "a name or a set of attributes of {size} bytes");
        let mut body = Vec::new();
        (&mut self.tar).take(size).read_to_end(&mut body)?;
        ensure!(body.len() as u64 == size, "it is cut short");
        self.skip(padding(size))?;
        Ok(body)
    }

    fn skip(&mut self, length: u64) -> Result<()> {
        let skipped = io::copy(&mut (&mut self.tar).take(length), &mut io::sink())?;
        ensure!(skipped == length, "it is cut short");
        Ok(())
    }
}

/// What fills the last block.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Without the null byte at its end.
fn name(mut body: Vec<u8>) -> Vec<u8> {
    body.truncate(body.iter().position(|byte| *byte == 0).unwrap_or(body.len()));
    body
}

/// Each is `LENGTH KEY=VALUE` and a line end, of which the length counts all bytes (pax(1)).
fn read_records(mut bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let record = || {
            let digits = bytes.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..digits]).ok()?.parse().ok()?;
            let record = bytes.get(digits + 1..length)?.strip_suffix(b"\n")?;
            let at = record.iter().position(|byte| *byte == b'=')?;
            let key = std::str::from_utf8(&record[..at]).ok()?.to_owned();
            Some((length, (key, record[at + 1..].to_vec())))
        };
        let (length, record) = record().context("an extension that is none")?;
        bytes = &bytes[length..];
        records.push(record);
    }
    Ok(records)
}

fn member(
    header: &Header,
    records: Vec<(String, Vec<u8>)>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
) -> Result<Member> {
    let device = |number: io::Result<Option<u32>>| number.ok().flatten().unwrap_or_default();
    let mut member = Member {
        kind: header.entry_type(),
        path: path.unwrap_or_else(|| header.path_bytes().into_owned()),
        link: link.or_else(|| Some(header.link_name_bytes()?.into_owned())).unwrap_or_default(),
        size: header.entry_size()?,
        mode: header.mode()?,
        user: header.uid()?,
        group: header.gid()?,
        modified: header.mtime()?,
        device: (device(header.device_major()), device(header.device_minor())),
        extended: Vec::new(),
        is_sparse: header.entry_type() == EntryType::GNUSparse,
    };
    for (key, value) in records {
        let text = || std::str::from_utf8(&value).with_context(|| format!("{key} of {}", member.path.escape_ascii()));
        let number = || Ok::<_, anyhow::Error>(text()?.parse()?);
        match key.as_str() {
            "path" => member.path = value,
            "linkpath" => member.link = value,
            "size" => member.size = number()?,
            "uid" => member.user = number()?,
            "gid" => member.group = number()?,
            // A fraction may follow.
            "mtime" => member.modified = text()?.parse::<f64>()?.max(0.0) as u64,
            _ if key.starts_with("GNU.sparse.") => member.is_sparse = true,
            _ => member.extended.extend(key.strip_prefix("SCHILY.xattr.").map(|name| (name.to_owned(), value))),
        }
    }
    // They have no data, whatever they say: so it is read by all who unpack layers.
    use EntryType::{Block, Char, Directory, Fifo, Link, Symlink};
    if matches!(member.kind, Link | Symlink | Directory | Char | Block | Fifo) {
        member.size = 0;
    }
    Ok(member)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tar::Builder;

    fn all(tar: &[u8], may_just_end: bool) -> Result<Vec<(Member, Vec<u8>)>> {
        let mut all = Vec::new();
        Members::new(tar, may_just_end).read(|member, data| {
            let mut bytes = Vec::new();
            // Not all of it.
            data.take(3).read_to_end(&mut bytes)?;
            all.push((member, bytes));
            Ok(())
        })?;
        Ok(all)
    }

    fn header(size: u64) -> Header {
        let mut header = Header::new_gnu();
        for set in [Header::set_uid, Header::set_gid, Header::set_mtime, Header::set_size] {
            set(&mut header, 0);
        }
        header.set_mode(0o644);
        header.set_size(size);
        header
    }

    #[test]
    fn names_of_any_length_and_any_bytes_are_read_whichever_way_they_are_written() {
        let mut builder = Builder::new(Vec::new());
        let long = "long/".repeat(100) + "name";
        builder.append_data(&mut header(5), &long, &b"12345"[..]).unwrap();
        builder
            .append_pax_extensions([("path", &b"a\nb=c"[..]), ("SCHILY.xattr.user.a", b"\n\0\xff"), ("size", b"600")])
            .unwrap();
        let mut whole = header(0);
        whole.set_cksum();
        builder.append(&whole, &[7; 600][..]).unwrap();
        builder.append_link(&mut header(0), "link", &long).unwrap();
        let tar = builder.into_inner().unwrap();
        let all = all(&tar, false).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!((&all[0].0.path[..], &all[0].1[..]), (long.as_bytes(), &b"123"[..]));
        assert_eq!((&all[1].0.path[..], all[1].0.size, &all[1].1[..]), (&b"a\nb=c"[..], 600, &[7; 3][..]));
        assert_eq!(all[1].0.extended, [("user.a".to_owned(), b"\n\0\xff".to_vec())]);
        assert_eq!((&all[2].0.path[..], &all[2].0.link[..]), (&b"link"[..], long.as_bytes()));
    }

    #[test]
    fn what_is_cut_short_or_damaged_is_an_error() {
        let mut builder = Builder::new(Vec::new());
        builder.append_data(&mut header(700), "a", &[1; 700][..]).unwrap();
        let tar = builder.into_inner().unwrap();
        let members = 512 + 1024;
        assert!(all(&tar, false).is_ok() && all(&tar[..members], true).is_ok());
        for length in [0, 1, 511, 512, 600, members - 1, members, members + 511] {
            let error = format!("{:#}", all(&tar[..length], false).unwrap_err());
            assert!(error.contains("cut short"), "{length}: {error}");
            assert!([0, members].contains(&length) || all(&tar[..length], true).is_err(), "{length}");
        }
        for at in [0, 130, 160] {
            let mut tar = tar.clone();
            tar[at] ^= 1;
            assert!(all(&tar, false).unwrap_err().to_string().contains("damaged"));
        }
        for records in ["4 a=\n", "99 a=b\n", "x a=b\n", "6 a=bc\n", "4 ab\n", "-1 a=b\n", "2 \n"] {
            assert!(read_records(records.as_bytes()).is_err(), "{records:?}");
        }
        assert_eq!(read_records(b"6 a=b\n6 c=\n\n").unwrap().len(), 2);
    }
}
