//! What is left of some layers, written as one tar for who makes a file system of it.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, bail, ensure};
use tar::{Builder, EntryType, Header};

use super::entries::{Attributes, Entry, Kind, Limits, Path, shown};
use super::plan::{Directory, Plan, Survey};

/// By what overlayfs knows an opaque directory (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"). A whiteout is
/// a character device of the numbers 0 and 0.
const OPAQUE: (&str, &[u8]) = ("trusted.overlay.opaque", b"y");

/// What can be read more than once, and is the same each time.
pub trait Layer {
    /// Calls `each` with all that is in it, in one order, and the bytes of those that are files.
    fn read(&self, limits: Limits, each: &mut dyn FnMut(Entry, &mut dyn Read) -> Result<()>) -> Result<()>;

    /// Names it to people.
    fn name(&self) -> String;
}

/// Reads `layers`, the lowest first, and says what is left of them; `is_more` as for [`Plan::new`].
pub fn plan(layers: &[&dyn Layer], is_more: bool, limits: Limits) -> Result<Plan> {
    let survey = |layer: &&dyn Layer| {
        let mut survey = Survey::default();
        let mut add = |entry, _: &mut dyn Read| {
            survey.add(entry);
            Ok(())
        };
        layer.read(limits, &mut add).with_context(|| layer.name())?;
        Ok(survey)
    };
    Plan::new(layers.iter().map(survey).collect::<Result<_>>()?, is_more)
}

/// Writes what `plan` leaves of `layers`.
pub fn pack(plan: &Plan, layers: &[&dyn Layer], limits: Limits, out: impl Write) -> Result<()> {
    let mut out = Builder::new(out);
    for (path, Directory { attributes, is_opaque }) in &plan.directories {
        let mut new = New { kind: EntryType::Directory, ..New::of(attributes) };
        if *is_opaque {
            new.attributes.extended.push((OPAQUE.0.into(), OPAQUE.1.into()));
        }
        new.append(&mut out, path, io::empty())?;
    }
    for (layer, kept) in layers.iter().zip(&plan.kept) {
        let mut number = 0;
        let mut each = |entry: Entry, data: &mut dyn Read| {
            let path = kept.get(&number);
            number += 1;
            path.map_or(Ok(()), |path| append_entry(&mut out, path, entry, data))
        };
        layer.read(limits, &mut each).with_context(|| layer.name())?;
    }
    for (path, to) in &plan.links {
        let new = New { kind: EntryType::Link, to: to.clone(), ..New::of(&Attributes::default()) };
        new.append(&mut out, path, io::empty())?;
    }
    for path in &plan.whiteouts {
        let new = New { kind: EntryType::Char, ..New::of(&Attributes::default()) };
        new.append(&mut out, path, io::empty())?;
    }
    out.into_inner()?.flush()?;
    Ok(())
}

fn append_entry(out: &mut Builder<impl Write>, path: &Path, entry: Entry, data: &mut dyn Read) -> Result<()> {
    let mut new = New::of(&entry.attributes);
    new.kind = match entry.kind {
        Kind::File(size) => {
            let mut data = data.take(size);
            new.size = size;
            new.append(out, path, &mut data)?;
            ensure!(data.limit() == 0, "it is shorter than it was said to be");
            return Ok(());
        }
        Kind::Symlink(to) => {
            new.to = to;
            EntryType::Symlink
        }
        Kind::Device { is_block, major, minor } => {
            new.device = (major, minor);
            if is_block { EntryType::Block } else { EntryType::Char }
        }
        Kind::Fifo => EntryType::Fifo,
        Kind::Directory | Kind::Link(_) | Kind::Whiteout | Kind::Opaque => {
            bail!("{}: what lies there changed while it was read", shown(path))
        }
    };
    new.append(out, path, io::empty())
}

/// An entry that is to be written.
struct New {
    kind: EntryType,
    attributes: Attributes,
    /// Of a file.
    size: u64,
    /// Of a link.
    to: Vec<u8>,
    /// Major and minor.
    device: (u32, u32),
}

impl New {
    fn of(attributes: &Attributes) -> Self {
        New { kind: EntryType::Regular, attributes: attributes.clone(), size: 0, to: Vec::new(), device: (0, 0) }
    }

    /// What does not fit into a header, as names of any length, goes into extensions (pax(1)).
    fn append(self, out: &mut Builder<impl Write>, path: &[u8], content: impl Read) -> Result<()> {
        let New { kind, attributes, size, to, device } = self;
        let name = |(name, value)| (format!("SCHILY.xattr.{name}"), value);
        let mut extensions: Vec<_> = attributes.extended.into_iter().map(name).collect();
        let mut header = Header::new_ustar();
        let fields = header.as_ustar_mut().context("make a header of tar")?;
        let path = if path.is_empty() { b"./" } else { path };
        for (field, key, value) in [(&mut fields.name, "path", path), (&mut fields.linkname, "linkpath", &to)] {
            match field.get_mut(..value.len()) {
                Some(field) => field.copy_from_slice(value),
                None => extensions.push((key.into(), value.to_vec())),
            }
        }
        header.set_entry_type(kind);
        header.set_mode(attributes.mode);
        header.set_uid(attributes.user.into());
        header.set_gid(attributes.group.into());
        header.set_mtime(attributes.modified.into());
        header.set_size(size);
        header.set_device_major(device.0)?;
        header.set_device_minor(device.1)?;
        header.set_cksum();
        out.append_pax_extensions(extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        out.append(&header, content)?;
        Ok(())
    }
}
