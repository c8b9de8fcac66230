//! A tar that is being written.

use std::io::{self, Write};
use std::mem::ManuallyDrop;

use rustix::fs::Stat;
use tar::{Builder, EntryType, Header};

/// It has its end once it is complete, and not before: whoever drops a builder ends its tar, also after an error.
pub struct Tar<W: Write>(ManuallyDrop<Builder<W>>);

impl<W: Write> Tar<W> {
    pub fn new(out: W) -> Self {
        Tar(ManuallyDrop::new(Builder::new(out)))
    }

    pub fn finish(self) -> io::Result<()> {
        ManuallyDrop::into_inner(self.0).into_inner()?.flush()
    }

    pub fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    /// After all data of a file.
    pub fn pad(&mut self, size: u64) -> io::Result<()> {
        self.data(&[0; 512][..(size.wrapping_neg() % 512) as usize])
    }

    /// A file by whose name a layer says something.
    pub fn empty(&mut self, path: &[u8]) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_mode(0);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        self.append(header, EntryType::Regular, 0, path, b"", Vec::new())
    }

    /// What the kernel says of a file, with its extensions; the data of a file come next, by [`Self::data`] and [`Self::pad`]. `to` is the
    /// file that a link is a name of, or leads to.
    pub fn entry(
        &mut self,
        kind: EntryType,
        path: &[u8],
        stat: &Stat,
        to: &[u8],
        extensions: Vec<(String, Vec<u8>)>,
    ) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
        }
        let size = if kind == EntryType::Regular { size(stat) } else { 0 };
        self.append(header, kind, size, path, to, extensions)
    }

    /// What does not fit into a header, as names of any length, goes into extensions (pax(1)).
    fn append(
        &mut self,
        mut header: Header,
        kind: EntryType,
        size: u64,
        path: &[u8],
        to: &[u8],
        mut extensions: Vec<(String, Vec<u8>)>,
    ) -> io::Result<()> {
        header.set_entry_type(kind);
        header.set_size(size);
        // The root's.
        let path = if path == b"/" { b"./" } else { path };
        if let Some(fields) = header.as_ustar_mut() {
            for (field, key, value) in [(&mut fields.name, "path", path), (&mut fields.linkname, "linkpath", to)] {
                match field.get_mut(..value.len()) {
                    Some(field) => field.copy_from_slice(value),
                    None => extensions.push((key.into(), value.to_vec())),
                }
            }
        }
        header.set_cksum();
        let extensions = extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
        self.0.append_pax_extensions(extensions)?;
        self.0.append(&header, io::empty())
    }
}

/// Of a file, in bytes.
pub fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}
