//! The mount API of fsopen(2), fsmount(2), open_tree(2) and move_mount(2).
//!
//! A mount is a value: a [`DetachedMount`] nobody can see, gone when dropped, until [`attach`] puts it in its place as the last
//! step.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, makedev};
use rustix::io::Errno;
pub use rustix::mount::MountAttrFlags;
use rustix::mount::{FsMountFlags, FsOpenFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::error::{Doing, Error, Result, Subject, last_errno};

/// The attributes of every mount of this driver but those of images (mount_setattr(2)).
pub const CONFINED: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// A mount to be made: a file system, its options in order (fsconfig(2)), and the attributes of the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMount {
    pub fs_type: &'static str,
    /// Names the mount in errors: `squashfs on /dev/loop3`.
    pub what: String,
    /// Whose affair it is when the kernel refuses.
    pub subject: Subject,
    /// A flag has no value.
    pub options: Vec<(String, Option<String>)>,
    pub attributes: MountAttrFlags,
}

impl NewMount {
    /// A mount that is [`CONFINED`], about the node and without options.
    pub fn new(fs_type: &'static str, what: impl Into<String>) -> Self {
        let (what, subject) = (what.into(), Subject::default());
        NewMount { fs_type, what, subject, options: Vec::new(), attributes: CONFINED }
    }

    pub fn about(mut self, subject: Subject) -> Self {
        self.subject = subject;
        self
    }

    /// Sets `key=value`; the value may hold any byte but NUL, and at most 255 of them: more the kernel does not read.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.options.push((key.to_owned(), Some(value.to_string())));
        self
    }

    /// Sets an option that has no value.
    pub fn flag(mut self, key: &str) -> Self {
        self.options.push((key.to_owned(), None));
        self
    }

    /// Read-only: this mount, and its superblock.
    pub fn read_only(self) -> Self {
        self.flag("ro").with(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    /// Without any flag of its own.
    pub fn unrestricted(self) -> Self {
        NewMount { attributes: MountAttrFlags::empty(), ..self }
    }

    pub fn with(mut self, attributes: MountAttrFlags) -> Self {
        self.attributes |= attributes;
        self
    }

    fn error(&self, errno: Errno) -> Error {
        Error::new(format!("mount {}", self.what), errno).about(self.subject)
    }
}

/// Finds or creates the superblock, and makes a mount of it that is attached nowhere.
pub fn create(new: NewMount) -> Result<DetachedMount> {
    let context = rustix::mount::fsopen(new.fs_type, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| explain_fsopen(new.error(errno), new.fs_type))?;
    let failed = |errno| new.error(errno).with_log(log(&context));
    for (key, value) in &new.options {
        match value {
            Some(value) if value.len() > 255 => {
                let hint = format!("the kernel takes at most 255 bytes for '{key}', this is {}", value.len());
                return Err(new.error(Errno::NAMETOOLONG).with_hint(hint));
            }
            Some(value) => rustix::mount::fsconfig_set_string(&context, key, value).map_err(failed)?,
            None => rustix::mount::fsconfig_set_flag(&context, key).map_err(failed)?,
        }
    }
    rustix::mount::fsconfig_create(&context).map_err(failed)?;
    let fd = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, new.attributes).map_err(failed)?;
    Ok(DetachedMount::new(fd, new.what))
}

/// Whether the kernel takes `key=value` of a file system, as far as it can tell before a mount.
pub(super) fn check_option(fs_type: &str, key: &str, value: &str) -> rustix::io::Result<()> {
    let context = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, key, value)
}

/// Whether the kernel has a file system. To ask makes it load the module, as a mount would.
pub fn find_file_system(fs_type: &str) -> Result<()> {
    let found = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC).map(drop);
    found.doing(|| format!("mount {fs_type}")).map_err(|error| explain_fsopen(error, fs_type))
}

fn explain_fsopen(error: Error, fs_type: &str) -> Error {
    match error.errno() {
        Errno::NODEV => error.with_hint(format!(
            "this kernel has no {fs_type}: try 'modprobe {fs_type}' on the node; a line such as 'install {fs_type} /bin/false' or \
             'blacklist {fs_type}', which 'grep -rw {fs_type} /etc/modprobe.d' finds there, forbids it: remove it first"
        )),
        _ => error,
    }
}

/// The lines that the kernel left on a context of fsopen(2): one a read, without their `e ` (error) or `w ` (warning) mark.
fn log(context: &OwnedFd) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = [0; 1024];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut line) {
        let text = String::from_utf8_lossy(&line[..length]);
        let text = text.trim_end();
        lines.push(text.split_once(' ').map_or(text, |(_, rest)| rest).to_owned());
    }
    lines
}

/// A mount that is attached nowhere and goes with its file descriptor, unless something else holds it.
#[derive(Debug)]
pub struct DetachedMount {
    fd: OwnedFd,
    what: String,
}

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl DetachedMount {
    pub(super) fn new(fd: OwnedFd, what: String) -> Self {
        DetachedMount { fd, what }
    }

    /// Names the mount in errors.
    pub fn what(&self) -> &str {
        &self.what
    }
}

/// A new mount of a directory that is visible in the calling thread's namespace (open_tree(2)), with `attributes` added. What is mounted
/// below the directory later does not appear in it, nor the other way round.
pub fn bind(directory: impl AsFd, recursive: bool, attributes: MountAttrFlags) -> Result<DetachedMount> {
    let fd = clone_of(directory, recursive).doing(|| "clone a mount (open_tree)".into())?;
    set_attributes(fd.as_fd(), attributes, libc::MS_PRIVATE, recursive)?;
    Ok(DetachedMount::new(fd, "directory".into()))
}

/// The same with the attributes and the propagation that the old one has; also of a file.
pub(super) fn clone_of(found: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(found, "", flags)
}

/// Adds attributes to a mount and to those that a recursive bind brought along.
pub fn restrict(mount: &DetachedMount, attributes: MountAttrFlags) -> Result<()> {
    set_attributes(mount.as_fd(), attributes, 0, true)
}

/// Puts the mount on top of a directory.
pub fn attach(mount: &DetachedMount, directory: impl AsFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", directory, "", flags).doing(|| format!("attach {} (move_mount)", mount.what()))
}

/// Adds `attributes` to a mount and, if asked, to all below it (mount_setattr(2), Linux 5.12). A `propagation` of 0 stays as it is.
fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttrFlags,
    propagation: libc::c_ulong,
    recursive: bool,
) -> Result<()> {
    let argument = libc::mount_attr { attr_set: attributes.bits().into(), attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the kernel reads an empty C string and one mount_attr of the size given, and writes nothing.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const argument,
            size_of::<libc::mount_attr>(),
        )
    };
    if answer == 0 {
        return Ok(());
    }
    let error = Error::new("set the attributes of a mount (mount_setattr)", last_errno());
    Err(if error.errno() == Errno::NOSYS { error.with_hint("Linux 5.12 or newer is needed") } else { error })
}

/// Opens a directory without following a symlink in its last component, for use as a mount's target or base.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).doing(|| format!("open directory {}", path.display()))
}

/// Opens the directory `path` of the mount behind `base`, which it cannot leave (openat2(2)). An empty path is the base itself.
pub fn open_directory_beneath(base: impl AsFd, path: &str, symlinks: Symlinks) -> Result<OwnedFd> {
    let path = if path.is_empty() { "." } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(base, path, flags, Mode::empty(), symlinks.resolve())
        .doing(|| format!("open directory {path}"))
        .map_err(explain_escape)
}

/// Whether a path that is opened below a base may go through symlinks; they can never lead out of the base.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Symlinks {
    Inside,
    Refused,
}

impl Symlinks {
    pub(super) fn resolve(self) -> ResolveFlags {
        match self {
            Symlinks::Inside => ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            Symlinks::Refused => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        }
    }
}

/// A path below a base is the affair of who named it; two errors of openat2(2), by which it refuses to leave a base, need words.
pub(super) fn explain_escape(error: Error) -> Error {
    let error = error.about(Subject::Image);
    match error.errno() {
        Errno::XDEV => error.with_hint("the path leads out of its base (an absolute symlink or '..')"),
        Errno::LOOP => error.with_hint("the path goes through a symlink that may not be followed"),
        Errno::ACCESS => error.with_hint(
            "on an export, the server does not let this node read it: with root_squash, or sec=krb5*, the node is nobody there; may all \
             read the image, and search the directories above it?",
        ),
        _ => error,
    }
}

/// The number by which the mount table names a mount (statx(2), `STATX_MNT_ID`); asks no server.
pub fn id_of(mount: &DetachedMount) -> Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(mount, "", flags, StatxFlags::MNT_ID);
    Ok(statx.doing(|| format!("look at {}", mount.what()))?.stx_mnt_id)
}

/// Whether a mount is attached at `path` (statx(2), `STATX_ATTR_MOUNT_ROOT`). A path that does not exist is not a mount.
pub fn is_mount(path: &Path) -> Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    match rustix::fs::statx(CWD, path, flags, StatxFlags::empty()) {
        Ok(statx) => Ok(statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(errno) => Err(Error::new(format!("look at {}", path.display()), errno)),
    }
}

/// Takes off every mount that is attached at `path`, uppermost first.
///
/// The path is not looked at first: umount2(2) asks no file server, a look might. A mount that is busy in this
/// namespace is detached, so that the name is free at once; the kernel releases it with its last user.
pub fn unmount_all(path: &Path) -> Result<()> {
    loop {
        let answer = match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
            answer => answer,
        };
        match answer {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(Error::new(format!("unmount {}", path.display()), errno)),
        }
    }
}

/// The device number of the superblock that a mount shows, as stat(2) has it of its files. Asks no server.
pub fn device_of(mount: impl AsFd) -> Result<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let seen = rustix::fs::statx(mount, "", flags, StatxFlags::empty()).doing(|| "look at a mount".into())?;
    Ok(makedev(seen.stx_dev_major, seen.stx_dev_minor))
}

/// Ends the calls of the NFS mount at `path` that wait for its server: who made them gets EIO (umount2(2), `MNT_FORCE`). A mount that is
/// open stays, and one that nobody uses goes.
pub fn abort_calls(path: &Path) -> Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::FORCE) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(Error::new(format!("end the calls of {}", path.display()), errno)),
    }
}
