//! Another directory becomes the root of this process, with mounts of the old root below it (pivot_root(2)).
//!
//! What lies in the directory is somebody else's, and may be a symlink to anywhere: places in it are walked to by one component at a
//! time, by file descriptors that nothing leads out of.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::error::{Doing, Error, Result};
use super::mount::{self, DetachedMount};
use super::namespace::unshare;

/// As many as the kernel follows in one path (path_resolution(7)).
const MOST_SYMLINKS: usize = 40;

/// Gives this process a mount namespace of its own. What is mounted in the old one still appears in it, and never the other way round.
pub fn leave_mount_namespace() -> Result<()> {
    unshare(UnshareFlags::NEWNS)
        .doing(|| "make a mount namespace".into())
        .map_err(|error| error.with_hint("the container needs the capability SYS_ADMIN, and the user root"))?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave)
        .doing(|| "keep mounts from appearing in the old mount namespace".into())
        .map_err(|error| match error.errno() {
            Errno::ACCESS => error.with_hint("AppArmor refuses mounts: the container needs the profile Unconfined"),
            _ => error,
        })
}

/// A mount of what is visible at `path`, with all that is mounted below.
pub fn clone_tree(path: &Path) -> Result<DetachedMount> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::open(path, flags, Mode::empty()).doing(|| format!("open {}", path.display()))?;
    tree(&found, path)
}

fn tree(found: &OwnedFd, path: &Path) -> Result<DetachedMount> {
    let tree = mount::clone_of(found, true).doing(|| format!("clone {} (open_tree)", path.display()))?;
    Ok(DetachedMount::new(tree, path.display().to_string()))
}

/// The directory that becomes the root.
pub struct NewRoot(DetachedMount);

impl NewRoot {
    /// A mount of the directory on top of it: a root has to be one. For a process that has left its mount namespace.
    pub fn of(directory: &Path) -> Result<Self> {
        let found = mount::open_directory(directory)?;
        let root = tree(&found, directory)?;
        mount::attach(&root, &found)?;
        Ok(NewRoot(root))
    }

    /// Puts a mount at an absolute path as whoever has the new root will see it: symlinks lead where they will lead then. What is
    /// missing is made.
    pub fn place(&self, mount: &DetachedMount, path: &Path) -> Result<()> {
        let action = || format!("mount {} in the new root", path.display());
        let kind = rustix::fs::statx(mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        let kind = FileType::from_raw_mode(kind.doing(action)?.stx_mode.into());
        let target = walk(self.0.as_fd(), path, kind).doing(action)?;
        mount::attach(mount, target)
    }

    /// Makes it the root and the current directory of this process.
    pub fn enter(self) -> Result<()> {
        let action = || format!("make {} the root", self.0.what());
        rustix::process::fchdir(&self.0).doing(action)?;
        match rustix::process::pivot_root(".", ".") {
            // The old root now lies on top of the new one.
            Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH).doing(|| "detach the old root".into())?,
            // By the container runtimes' seccomp profile, whoever has which capability. Where it lets mount, it lets do what an initramfs
            // does: the old root goes on lying below the new one, and no path leads there.
            Err(Errno::PERM) => {
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                rustix::mount::move_mount(&self.0, "", CWD, "/", flags).doing(action)?;
                rustix::process::chroot(".").doing(action).map_err(|error| match error.errno() {
                    Errno::PERM => error.with_hint("the container needs the capability SYS_CHROOT"),
                    _ => error,
                })?;
            }
            Err(errno) => return Err(Error::new(action(), errno)),
        }
        rustix::process::chdir("/").doing(action)
    }
}

/// Opens a path as a process with this root would, and makes what is missing: directories, and in the end what a mount of this kind can
/// lie on. openat2(2) could not make what a symlink leads to.
fn walk(root: BorrowedFd<'_>, path: &Path, kind: FileType) -> rustix::io::Result<OwnedFd> {
    let mut passed: Vec<OwnedFd> = Vec::new();
    let mut rest = components(path.as_os_str());
    let mut symlinks = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            passed.pop();
            continue;
        }
        let here = passed.last().map_or(root, AsFd::as_fd);
        let found = match open(here, &name) {
            Err(Errno::NOENT) => {
                make(here, &name, if rest.is_empty() { kind } else { FileType::Directory })?;
                open(here, &name)?
            }
            found => found?,
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) != FileType::Symlink {
            passed.push(found);
            continue;
        }
        symlinks += 1;
        if symlinks > MOST_SYMLINKS {
            return Err(Errno::LOOP);
        }
        let text = OsString::from_vec(rustix::fs::readlinkat(&found, "", Vec::new())?.into_bytes());
        if text.as_bytes().starts_with(b"/") {
            passed.clear();
        }
        rest.extend(components(&text));
    }
    // A mount on the root itself would hide all that was placed.
    passed.pop().ok_or(Errno::BUSY)
}

/// The names in a path, the last one first.
fn components(path: &OsStr) -> Vec<OsString> {
    let names = path.as_bytes().split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    names.rev().map(|name| OsStr::from_bytes(name).to_owned()).collect()
}

fn open(directory: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn make(directory: BorrowedFd<'_>, name: &OsStr, kind: FileType) -> rustix::io::Result<()> {
    let made = match kind {
        FileType::Directory => rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755)),
        _ => rustix::fs::mknodat(directory, name, FileType::RegularFile, Mode::from_raw_mode(0o644), 0),
    };
    match made {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn walked(root: &Path, path: &str, kind: FileType) -> rustix::io::Result<std::path::PathBuf> {
        let opened = mount::open_directory(root).unwrap();
        let found = walk(opened.as_fd(), Path::new(path), kind)?;
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
        Ok(fs::read_link(link).unwrap().strip_prefix(root.canonicalize().unwrap()).expect("it is inside").to_owned())
    }

    #[test]
    fn no_symlink_and_no_dots_lead_out_of_the_new_root() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        let made_outside = outside.path().join("resolv.conf");
        symlink(&made_outside, root.join("etc/absolute")).unwrap();
        symlink("../../../../resolv.conf", root.join("etc/relative")).unwrap();
        symlink("/proc/self/root/etc/passwd", root.join("etc/magic")).unwrap();
        let inside = |path: &Path| path.strip_prefix("/").unwrap().to_owned();
        for (link, leads_to) in [
            ("/etc/absolute", inside(&made_outside)),
            ("/etc/relative", "resolv.conf".into()),
            ("/etc/../../../etc/relative", "resolv.conf".into()),
            ("/etc/magic", "proc/self/root/etc/passwd".into()),
        ] {
            assert_eq!(walked(&root, link, FileType::RegularFile).unwrap(), leads_to, "{link}");
            assert!(root.join(&leads_to).is_file(), "{link}");
        }
        assert!(!made_outside.exists());
    }

    #[test]
    fn what_is_missing_is_made_as_it_is_needed_where_symlinks_lead() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("var")).unwrap();
        symlink("/run", root.path().join("var/run")).unwrap();
        let made = walked(root.path(), "/var/run/secrets/token", FileType::Directory).unwrap();
        assert_eq!(made, Path::new("run/secrets/token"));
        assert!(root.path().join(made).is_dir());
        assert!(root.path().join(walked(root.path(), "/etc/hosts", FileType::RegularFile).unwrap()).is_file());
    }

    #[test]
    fn what_no_mount_can_lie_on_is_refused() {
        let root = tempfile::tempdir().unwrap();
        symlink("loop", root.path().join("loop")).unwrap();
        symlink("/", root.path().join("tmp")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let refused = |path| walked(root.path(), path, FileType::Directory).unwrap_err();
        assert_eq!(refused("/loop"), Errno::LOOP);
        assert_eq!(refused("/tmp"), Errno::BUSY);
        assert_eq!(refused("/file/below"), Errno::NOTDIR);
    }
}
