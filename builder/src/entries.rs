//! What is in a tar, entry by entry: of layers of container images, which anybody may have made.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use tar::EntryType;

use super::members::{Member, Members};

/// Of a name, and of a path, in bytes (`NAME_MAX` and `PATH_MAX` of limits.h).
const LONGEST_NAME: usize = 255;
const LONGEST_PATH: usize = 4095;
/// In a layer a file `.wh.NAME` stands for the removal of NAME, and this one for that of all that its directory had
/// (image-spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What else begins so is aufs' own.
const OF_AUFS: &[u8] = b".wh..wh.";

/// Where something lies: components with a `/` between them, and none of them `.` or `..`. The root's is empty.
pub type Path = Vec<u8>;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// Of so many bytes.
    File(u64),
    /// Another name of a file of the same tar.
    Link(Path),
    Symlink(Vec<u8>),
    Device {
        is_block: bool,
        major: u32,
        minor: u32,
    },
    Fifo,
    /// There is no such path any more in what lies below.
    Whiteout,
    /// The directory shows nothing of what lies below.
    Opaque,
}

impl Kind {
    /// Of no larger numbers than squashfs has.
    pub fn device(is_block: bool, major: u32, minor: u32) -> Result<Kind> {
        ensure!(major < 1 << 12 && minor < 1 << 20, "device {major}:{minor} is none");
        Ok(Kind::Device { is_block, major, minor })
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub mode: u32,
    pub user: u32,
    pub group: u32,
    /// In seconds since 1970.
    pub modified: u32,
    pub extended: Vec<(String, Vec<u8>)>,
}

#[derive(Clone, Debug)]
pub struct Entry {
    pub path: Path,
    pub kind: Kind,
    pub attributes: Attributes,
}

/// What a tar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Its entries are files and nothing else.
    Files,
    /// A layer, which has whiteouts.
    Layer,
    /// One that is complete by its digest: it may end without the blocks that say so.
    LayerByDigest,
}

/// How much may be in what is read, so that nothing small becomes too large.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub entries: u64,
    /// Of files.
    pub bytes: u64,
    /// Of names and attributes, which are kept in memory.
    pub names: u64,
}

impl Limits {
    /// One entry less, with names and attributes of so many bytes.
    pub fn entry(&mut self, names: usize) -> Result<()> {
        self.entries = self.entries.checked_sub(1).context("it has too many entries: see --max-entries")?;
        self.names = self.names.checked_sub(names as u64).context("its names and attributes are too large")?;
        Ok(())
    }

    /// Directories that are made because something lies in them: all that `last`, the path before, does not lie in, too.
    fn directories_above(&mut self, path: &[u8], last: &[u8]) -> Result<()> {
        let is_known = |above: &&[u8]| *above == last || parents(last).any(|known| known == *above);
        parents(path)
            .take_while(|above| !above.is_empty() && !is_known(above))
            .try_for_each(|above| self.entry(above.len()))
    }

    pub fn file(&mut self, size: u64) -> Result<()> {
        self.bytes = self.bytes.checked_sub(size).context("it is too large unpacked: see --max-size")?;
        Ok(())
    }
}

/// Calls `each` with all entries of a tar, in their order, and the bytes of those that are files.
pub fn read(
    tar: impl Read,
    form: Form,
    limits: Limits,
    mut each: impl FnMut(Entry, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let (mut left, mut last) = (limits, Path::new());
    let members = Members::new(tar, form == Form::LayerByDigest);
    members.read(|member, data| {
        let extended = member.extended.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        left.entry(member.path.len() + member.link.len() + extended)?;
        // Data that are skipped are unpacked all the same.
        left.file(member.size)?;
        let name = shown(&member.path);
        let read = || {
            let Some(entry) = entry(member, form != Form::Files)? else { return Ok(()) };
            left.directories_above(&entry.path, &last)?;
            last.clone_from(&entry.path);
            each(entry, data)
        };
        read().with_context(|| name)
    })
}

/// A path as others may see it.
pub fn shown(path: &[u8]) -> String {
    format!("/{}", path.escape_ascii())
}

/// `None` where it stands for no file.
fn entry(member: Member, is_layer: bool) -> Result<Option<Entry>> {
    let Member { kind, path: name, link, size, mode, user, group, modified, device, mut extended, is_sparse } = member;
    ensure!(!is_sparse, "a sparse file in a format of GNU tar, which is not read: pack it without --sparse");
    let path = path(&name)?;
    extended.retain(|(name, _)| is_kept(name));
    extended.sort();
    let attributes = Attributes {
        mode: mode & 0o7777,
        user: u32::try_from(user).context("the number of its user")?,
        group: u32::try_from(group).context("the number of its group")?,
        modified: seconds(modified),
        extended,
    };
    if is_layer {
        match whiteout(&path)? {
            Name::OfAFile => {}
            Name::OfNothing => return Ok(None),
            Name::Of(kind, path) => return Ok(Some(Entry { path, kind, attributes })),
        }
    }
    let is_link = matches!(kind, EntryType::Link | EntryType::Symlink);
    if is_link && (link.is_empty() || link.len() > LONGEST_PATH || link.contains(&0)) {
        bail!("a link to nothing, or to a path of more than {LONGEST_PATH} bytes");
    }
    let kind = match kind {
        EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File(size),
        EntryType::Directory => Kind::Directory,
        EntryType::Link => Kind::Link(self::path(&link)?),
        EntryType::Symlink => Kind::Symlink(link),
        EntryType::Block | EntryType::Char => Kind::device(kind == EntryType::Block, device.0, device.1)?,
        EntryType::Fifo => Kind::Fifo,
        other => bail!("an entry of type {:?}, which is not known", char::from(other.as_byte())),
    };
    ensure!(!path.is_empty() || kind == Kind::Directory, "the root is no directory");
    Ok(Some(Entry { path, kind, attributes }))
}

/// squashfs has no others.
fn seconds(seconds: u64) -> u32 {
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

/// Others say something about the machine that an image was made on, or, as those of overlayfs, would lead a mount elsewhere.
pub fn is_kept(attribute: &str) -> bool {
    attribute == "security.capability" || attribute.starts_with("user.") && !attribute.starts_with("user.overlay.")
}

fn path(name: &[u8]) -> Result<Path> {
    let wrong = |why: &str| anyhow::anyhow!("{:?} {why}", name.escape_ascii().to_string());
    let mut path = Path::new();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(wrong("leads out of its directory")),
            _ if component.contains(&0) => return Err(wrong("has a null byte")),
            _ if component.len() > LONGEST_NAME => return Err(wrong("has a name that is too long")),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(component);
    }
    if path.len() > LONGEST_PATH {
        return Err(wrong("is too long"));
    }
    Ok(path)
}

/// What a name in a layer stands for.
enum Name {
    OfAFile,
    OfNothing,
    Of(Kind, Path),
}

fn whiteout(path: &Path) -> Result<Name> {
    let at = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (directory, name) = path.split_at(at);
    Ok(match name.strip_prefix(WHITEOUT) {
        None => Name::OfAFile,
        Some(_) if name == OPAQUE => Name::Of(Kind::Opaque, directory.strip_suffix(b"/").unwrap_or_default().to_vec()),
        Some(_) if name.starts_with(OF_AUFS) => Name::OfNothing,
        Some(b"" | b"." | b"..") => bail!("{}: a whiteout of nothing", shown(path)),
        Some(gone) => Name::Of(Kind::Whiteout, [directory, gone].concat()),
    })
}

/// The directory that a path lies in; `None` for the root.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => Some(&path[..at]),
        None => (!path.is_empty()).then_some(&[]),
    }
}

/// All directories that a path lies in, the innermost first.
pub fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::successors(parent(path), |path| parent(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tar::{Builder, Header};

    const LIMITS: Limits = Limits { entries: 10, bytes: 1000, names: 10_000 };

    /// A tar of one entry, whose name no library would write.
    fn tar_of(name: &[u8], kind: EntryType, link: &[u8], extensions: &[(&str, &[u8])]) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        let fields = header.as_ustar_mut().unwrap();
        fields.name[..name.len()].copy_from_slice(name);
        fields.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        let mut builder = Builder::new(Vec::new());
        builder.append_pax_extensions(extensions.iter().copied()).unwrap();
        builder.append(&header, &[][..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn all(tar: &[u8], is_layer: bool) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        let form = if is_layer { Form::LayerByDigest } else { Form::Files };
        read(tar, form, LIMITS, |entry, _| {
            all.push(entry);
            Ok(())
        })?;
        Ok(all)
    }

    fn one(name: &[u8], is_layer: bool) -> Option<(String, Kind)> {
        let entry = all(&tar_of(name, EntryType::Regular, b"", &[]), is_layer).unwrap().pop()?;
        Some((String::from_utf8(entry.path).unwrap(), entry.kind))
    }

    #[test]
    fn a_name_in_a_layer_may_stand_for_what_is_gone() {
        let some = |path: &str, kind| Some((path.to_owned(), kind));
        assert_eq!(one(b"./a//b/./c", true), some("a/b/c", Kind::File(0)));
        assert_eq!(one(b"/etc/passwd", true), some("etc/passwd", Kind::File(0)));
        assert_eq!(one(b"a/.wh.b", true), some("a/b", Kind::Whiteout));
        assert_eq!(one(b".wh.b", true), some("b", Kind::Whiteout));
        assert_eq!(one(b"a/.wh..wh..opq", true), some("a", Kind::Opaque));
        assert_eq!(one(b".wh..wh..opq", true), some("", Kind::Opaque));
        assert_eq!(one(b".wh..wh.aufs", true), None);
        assert_eq!(one(b"a/.wh.b", false), some("a/.wh.b", Kind::File(0)));
    }

    #[test]
    fn what_leads_elsewhere_or_is_not_known_is_refused() {
        let file = |name: &[u8]| tar_of(name, EntryType::Regular, b"", &[]);
        for (tar, why) in [
            (file(b"a/../../b"), "leads out of its directory"),
            (file(b".wh."), "a whiteout of nothing"),
            (file(b"a/.wh..."), "a whiteout of nothing"),
            (tar_of(b"a", EntryType::Link, b"../b", &[]), "leads out of its directory"),
            (tar_of(b"a", EntryType::Link, b"", &[]), "a link to nothing"),
            (tar_of(b"a", EntryType::Symlink, b"", &[]), "a link to nothing"),
            (tar_of(b"./", EntryType::Symlink, b"b", &[]), "the root is no directory"),
            (tar_of(b"a", EntryType::new(b'Q'), b"", &[]), "an entry of type 'Q'"),
            (tar_of(b"a", EntryType::Regular, b"", &[("path", &[b'x'; 5000])]), "too long"),
            (tar_of(b"a", EntryType::Regular, b"", &[("path", b"a\0b")]), "a null byte"),
            (tar_of(b"a", EntryType::Regular, b"", &[("uid", b"99999999999")]), "out of range"),
            (tar_of(b"a", EntryType::Regular, b"", &[("GNU.sparse.major", b"1")]), "a sparse file"),
        ] {
            let error = format!("{:#}", all(&tar, true).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn attributes_that_would_lead_overlayfs_elsewhere_are_left_out() {
        let tar = tar_of(
            b"a",
            EntryType::Directory,
            b"",
            &[
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ("SCHILY.xattr.user.kept", b"1"),
                ("SCHILY.xattr.security.capability", b"2"),
                ("SCHILY.xattr.security.selinux", b"3"),
                ("mtime", b"12.9"),
                ("gid", b"70000"),
            ],
        );
        let attributes = all(&tar, true).unwrap().remove(0).attributes;
        let extended =
            [("security.capability", b"2"), ("user.kept", b"1")].map(|(name, value)| (name.to_owned(), value.to_vec()));
        assert_eq!(
            attributes,
            Attributes { mode: 0o640, user: 0, group: 70000, modified: 12, extended: extended.into() }
        );
    }

    #[test]
    fn nothing_becomes_larger_than_it_may() {
        let mut many = Vec::new();
        for _ in 0..11 {
            many.extend(&tar_of(b"a", EntryType::Regular, b"", &[])[..512]);
        }
        assert!(format!("{:#}", all(&many, true).unwrap_err()).contains("--max-entries"));
        let long = [("SCHILY.xattr.user.a", &[0; 10_000][..])];
        let error = all(&tar_of(b"a", EntryType::Directory, b"", &long), true).unwrap_err();
        assert!(format!("{error:#}").contains("names and attributes"));
        // What is no file has no bytes, whatever it says.
        let endless = [("size", &b"18446744073709551615"[..])];
        for kind in [EntryType::Directory, EntryType::Link, EntryType::Symlink, EntryType::Fifo] {
            assert_eq!(all(&tar_of(b"a", kind, b"b", &endless), true).unwrap().len(), 1);
        }
        // What stands for nothing is unpacked all the same.
        let large = tar_of(b".wh..wh.aufs", EntryType::Regular, b"", &[("size", b"1001")]);
        assert!(format!("{:#}", all(&large, true).unwrap_err()).contains("--max-size"));
        // Directories that nobody names count too, once for those that lie in them one after another.
        let deep = |names: [&str; 2]| {
            let tars = names.map(|name| tar_of(name.as_bytes(), EntryType::Regular, b"", &[])[..512].to_vec());
            all(&tars.concat(), true)
        };
        assert_eq!(deep(["a/b/c/d/e", "a/b/c/d/f"]).unwrap().len(), 2);
        assert!(format!("{:#}", deep(["a/b/c/d/e/f", "b/b/c/d/e"]).unwrap_err()).contains("--max-entries"));
        let mut header = Header::new_gnu();
        header.set_path("a").unwrap();
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(1 << 50);
        header.set_cksum();
        assert!(format!("{:#}", all(header.as_bytes(), true).unwrap_err()).contains("--max-size"));
    }

    #[test]
    fn what_has_no_digest_is_whole_by_its_end() {
        let whole = tar_of(b"a", EntryType::Regular, b"", &[]);
        let read = |tar: &[u8], form| read(tar, form, LIMITS, |_, _| Ok(()));
        for form in [Form::Files, Form::Layer, Form::LayerByDigest] {
            read(&whole, form).unwrap();
            assert_eq!(read(&whole[..512], form).is_ok(), form == Form::LayerByDigest, "{form:?}");
            read(&whole[..500], form).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_tar_makes_anything_panic_or_lead_out(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            name in prop::collection::vec(any::<u8>(), 0..100),
            kind in any::<u8>(),
        ) {
            let _ = all(&bytes, true);
            for entry in all(&tar_of(&name, EntryType::new(kind), b"x", &[]), true).unwrap_or_default() {
                let mut names = entry.path.split(|byte| *byte == b'/');
                prop_assert!(entry.path.is_empty() || names.all(|name| !matches!(name, b"" | b"." | b"..")));
            }
        }
    }
}
