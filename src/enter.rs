//! A command in a directory as its root, with what the pod's container has around it: what an image is to a container runtime.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;

use crate::kernel::mount::{self, DetachedMount, MountAttrFlags, NewMount};
use crate::kernel::mountinfo::{self, MountInfo};
use crate::kernel::new_root::{self, NewRoot};
use crate::kernel::{Doing, Error, capabilities, errno_of};

/// What every container runtime and the kubelet put into a container. An image can do without; what else is mounted, the pod asks for.
const OF_EACH_CONTAINER: [&str; 12] = [
    "/dev",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/proc",
    "/run",
    "/run/.containerenv",
    "/run/lock",
    "/run/secrets",
    "/sys",
    "/tmp",
    "/var/run/secrets/kubernetes.io/serviceaccount",
];

/// What is in memory unless the pod mounts something there, with its mode.
const IN_MEMORY: [(&str, &str); 2] = [("/run", "0755"), ("/tmp", "1777")];

/// Which directory, and what runs in it.
pub struct Entered {
    pub directory: PathBuf,
    pub command: Vec<OsString>,
    /// Gives systemd what it expects of a container: its own control groups to write to, and to be told.
    pub systemd: bool,
    /// Leaves the command the capability by which all this was mounted.
    pub keep_sys_admin: bool,
}

/// Why the command does not run, and the exit status that says so: as those of chroot(1).
#[derive(Debug)]
pub struct Failure {
    error: Error,
    pub status: u8,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, status: 125 }
    }
}

/// Replaces this process by the command, with the directory as its root and `/` as the current one; environment, signals and standard
/// streams are the command's. For a process of one thread. What the image has no place for is an error where the pod asked for it, and a warning
/// where each container has it.
pub fn enter(entered: &Entered, mut warn: impl FnMut(String)) -> Result<Infallible, Failure> {
    let Entered { directory, command, .. } = entered;
    let directory = directory.canonicalize().doing(|| format!("open directory {}", directory.display()))?;
    if directory == Path::new("/") {
        return Err(Error::new("enter /", Errno::INVAL).with_hint("it is the root already").into());
    }
    let root = prepare(entered, &directory, &mut warn)?;
    root.enter()?;
    if !entered.keep_sys_admin {
        capabilities::give_up_sys_admin()?;
    }
    let Some((program, arguments)) = command.split_first() else {
        return Err(Error::new("enter", Errno::INVAL).with_hint("name a command").into());
    };
    let mut run = Command::new(program);
    if entered.systemd {
        // https://systemd.io/CONTAINER_INTERFACE
        run.env("container", "kubernetes");
    }
    Err(not_run(program, &directory, errno_of(&run.args(arguments).exec())))
}

/// In a mount namespace of its own: by hand, on a node, it would be the node's root that changes.
fn prepare(entered: &Entered, directory: &Path, warn: &mut impl FnMut(String)) -> Result<NewRoot, Failure> {
    if entered.systemd {
        look_at_cgroups()?;
    }
    new_root::leave_mount_namespace()?;
    let carried = carried(&mountinfo::read()?, directory);
    // All of them before the first is placed: none shows another's place.
    let mut trees = Vec::new();
    for path in &carried {
        match new_root::clone_tree(path) {
            Ok(tree) => trees.push((path.clone(), tree)),
            // Hidden below another mount.
            Err(error) if error.errno() == Errno::NOENT => {}
            Err(error) => return Err(error.into()),
        }
    }
    // Symlinks at the places of files often lead into /run.
    trees.sort_by_key(|(path, _)| !path.is_dir());
    let root = NewRoot::of(directory)?;
    let mut place = |path: &Path, mount: &DetachedMount| match root.place(mount, path) {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = explain(path, directory, error.errno());
            if !OF_EACH_CONTAINER.iter().any(|known| path == Path::new(known)) {
                return Err(error);
            }
            warn(error.to_string());
            Ok(())
        }
    };
    for (path, mode) in IN_MEMORY {
        if !carried.contains(Path::new(path)) {
            place(Path::new(path), &mount::create(in_memory(path, mode))?)?;
        }
    }
    let directories = trees.iter().take_while(|(path, _)| path.is_dir()).count();
    for (path, tree) in &trees[..directories] {
        place(path, tree)?;
    }
    if entered.systemd {
        let cgroups = NewMount::new("cgroup2", "cgroup2").with(MountAttrFlags::MOUNT_ATTR_NOEXEC);
        place(Path::new("/sys/fs/cgroup"), &mount::create(cgroups)?)?;
        place(Path::new("/run/lock"), &mount::create(in_memory("/run/lock", "0755"))?)?;
    }
    for (path, tree) in &trees[directories..] {
        place(path, tree)?;
    }
    Ok(root)
}

fn in_memory(path: &str, mode: &str) -> NewMount {
    NewMount::new("tmpfs", format!("tmpfs at {path}")).set("source", "tmpfs").set("mode", mode)
}

/// Where something is mounted that is not in another one of these: a clone of each brings what is mounted below. The directory has its own mounts
/// below it, and those that it lies in are what it is taken from.
fn carried(mounts: &[MountInfo], directory: &Path) -> BTreeSet<PathBuf> {
    let paths = mounts.iter().map(|mount| PathBuf::from(&mount.mount_point));
    let paths: BTreeSet<_> =
        paths.filter(|path| !directory.starts_with(path) && !path.starts_with(directory)).collect();
    let outermost = |path: &&PathBuf| path.ancestors().skip(1).all(|above| !paths.contains(above));
    paths.iter().filter(outermost).cloned().collect()
}

/// Control groups that this process may be given to write to: none but its own.
fn look_at_cgroups() -> Result<(), Failure> {
    let path = "/proc/self/cgroup";
    let text = std::fs::read_to_string(path).doing(|| format!("read {path}"))?;
    if are_its_own(&text) {
        return Ok(());
    }
    let hint = "systemd needs a cgroup namespace of its own, with control groups of version 2: a container has one there unless it is \
                privileged";
    Err(Error::new("mount the control groups of the container", Errno::INVAL).with_hint(hint).into())
}

/// Whether the process is at the root of all that its cgroup namespace shows it of version 2 (cgroup_namespaces(7)).
fn are_its_own(cgroups: &str) -> bool {
    cgroups.lines().any(|line| line == "0::/")
}

fn explain(path: &Path, directory: &Path, errno: Errno) -> Error {
    let error =
        Error::new(format!("mount the pod's {} at its place in {}", path.display(), directory.display()), errno);
    match errno {
        Errno::ROFS => error.with_hint(
            "the image has nothing there to mount on: add an empty file or directory to it, or let the volume have a writable layer",
        ),
        // move_mount(2) says no more than that.
        Errno::NOTDIR | Errno::ISDIR | Errno::INVAL => error.with_hint("the image has a file where a directory belongs, or the other way round"),
        Errno::LOOP => error.with_hint("the image has symlinks there that lead nowhere"),
        Errno::BUSY => error.with_hint("the image has a symlink there that leads to the root itself"),
        _ => error,
    }
}

fn not_run(program: &OsString, directory: &Path, errno: Errno) -> Failure {
    let error = Error::new(format!("run {} in {}", program.display(), directory.display()), errno);
    match errno {
        Errno::NOENT => {
            let hint =
                "is it in the image, and the interpreter or dynamic linker that it names? PATH is the container's";
            Failure { error: error.with_hint(hint), status: 127 }
        }
        Errno::NOEXEC => {
            Failure { error: error.with_hint("is it for this architecture, or a script without #!?"), status: 126 }
        }
        Errno::ACCESS => {
            Failure { error: error.with_hint("is it executable, and the volume without noexec?"), status: 126 }
        }
        _ => Failure { error, status: 126 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(points: &[&str]) -> Vec<MountInfo> {
        let mount = |point: &&str| MountInfo {
            id: 1,
            parent: 1,
            device: (0, 1),
            mount_point: (*point).to_owned(),
            options: "rw".into(),
            shared: false,
            fs_type: "tmpfs".into(),
            source: "none".into(),
            super_options: "rw".into(),
        };
        points.iter().map(mount).collect()
    }

    fn carried_from(points: &[&str], directory: &str) -> Vec<String> {
        let carried = carried(&mounts(points), Path::new(directory));
        carried.iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn each_mount_of_the_container_is_carried_once_with_what_is_below_it() {
        let points =
            ["/", "/proc", "/dev", "/dev/pts", "/proc/sys", "/image", "/etc/hosts", "/data", "/data", "/device"];
        assert_eq!(carried_from(&points, "/image"), ["/data", "/dev", "/device", "/etc/hosts", "/proc"]);
    }

    #[test]
    fn what_is_mounted_in_the_image_and_what_the_image_lies_in_is_not_carried() {
        let points = ["/", "/volume", "/volume/root/data", "/volume/other", "/volumes"];
        assert_eq!(carried_from(&points, "/volume/root"), ["/volume/other", "/volumes"]);
    }

    #[test]
    fn control_groups_are_a_container_s_own_where_it_is_at_their_root() {
        assert!(are_its_own("0::/\n"));
        assert!(!are_its_own("0::/kubepods/besteffort/pod1/2\n"));
        assert!(!are_its_own("4:memory:/\n1:cpu:/\n"));
    }

    #[test]
    fn an_image_without_a_place_is_told_how_to_get_one() {
        let error = explain(Path::new("/etc/resolv.conf"), Path::new("/image"), Errno::ROFS).to_string();
        assert!(
            error.starts_with("mount the pod's /etc/resolv.conf at its place in /image: read-only file system: "),
            "{error}"
        );
        assert!(error.contains("add an empty file"), "{error}");
    }
}
