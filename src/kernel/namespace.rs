//! A mount namespace of the driver's own, out of the host's sight (mount_namespaces(7)).
//!
//! NFS mounts are attached here, and overlays are put together here: before Linux 6.15 the kernel clones and stacks only mounts that
//! are attached somewhere. The namespace goes with the process, whatever ends it, and every mount in it with it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::error::{Doing, Error, Result, last_errno};
use super::mount::{self, MountAttrFlags};
use super::mountinfo::{self, MountInfo};
use super::tmpfs::tmpfs;

/// A namespace that holds one empty tmpfs as its root and whatever the driver attaches to it.
pub struct PrivateNamespace {
    fd: OwnedFd,
}

impl PrivateNamespace {
    pub fn new() -> Result<Self> {
        let fd = in_new_thread(create)??;
        Ok(PrivateNamespace { fd })
    }

    /// Runs `work` on a thread of its own inside the namespace; its current directory is the root, an empty tmpfs to make
    /// mount points in.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_new_thread(|| {
            unshare(UnshareFlags::FS).map_err(not_unshared)?;
            rustix::thread::move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Mount))
                .doing(|| "enter the driver's mount namespace".into())?;
            Ok(work())
        })?
    }

    /// A child process inside the namespace, for the files of proc(5) that are about processes and not about threads. It shares the
    /// table of open files: a copy would keep what the driver closes meanwhile.
    pub fn enter_process(&self) -> Result<Process> {
        // SAFETY: as fork(2) would; the child makes system calls, and nothing else, until it is killed.
        let id = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) };
        if id == 0 {
            // SAFETY: no memory is handed over but constants. The C library's own words for these would look at the parent's state.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                if libc::syscall(libc::SYS_setns, self.fd.as_raw_fd(), libc::CLONE_NEWNS) == 0 {
                    libc::syscall(libc::SYS_kill, libc::syscall(libc::SYS_getpid), libc::SIGSTOP);
                }
                libc::syscall(libc::SYS_exit_group, 1);
            }
        }
        let Ok(id @ 1..) = libc::pid_t::try_from(id) else {
            return Err(Error::new("start a process in the driver's mount namespace", last_errno()));
        };
        let mut status = 0;
        // SAFETY: waits for the child that was just started, until it stops itself or ends.
        if unsafe { libc::waitpid(id, &mut status, libc::WUNTRACED) } == id && libc::WIFSTOPPED(status) {
            return Ok(Process(id));
        }
        Err(Error::new("enter the driver's mount namespace with a process", Errno::PERM))
    }
}

/// A child process that is stopped, until this is dropped.
pub struct Process(libc::pid_t);

impl Process {
    pub fn id(&self) -> libc::pid_t {
        self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: nobody else waits for this child, so that its ID is its own until here.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

fn create() -> Result<OwnedFd> {
    unshare(UnshareFlags::FS | UnshareFlags::NEWNS).map_err(not_unshared)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).doing(|| "make the driver's mount namespace private".into())?;
    let fd = rustix::fs::open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .doing(|| "open /proc/thread-self/ns/mnt".into())?;
    drop_mounts()?;

    let root = tmpfs("the root of the driver's mount namespace", None).with(MountAttrFlags::MOUNT_ATTR_NOEXEC);
    let root = mount::create(root)?;
    rustix::mount::move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .doing(|| "attach the root of the driver's mount namespace".into())?;
    Ok(fd)
}

/// Lets go of the copies of the host's mounts, which would keep them busy for as long as the driver lives.
fn drop_mounts() -> Result<()> {
    let mounts = mountinfo::read_thread()?;
    let roots: Vec<u64> = mounts.iter().filter(|mount| mount.mount_point == "/").map(|mount| mount.id).collect();
    let below_a_root = |mount: &&MountInfo| roots.contains(&mount.parent) && mount.mount_point != "/";
    for mount in mounts.iter().rev().filter(below_a_root) {
        match rustix::mount::unmount(&mount.mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Gone with its parent, or hidden below another mount.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => {
                let action = format!("unmount {} in the driver's mount namespace", mount.mount_point);
                return Err(Error::new(action, errno));
            }
        }
    }
    Ok(())
}

/// Not for the table of file descriptors.
pub(super) fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: no flag shares less of the file descriptor table, which is all that is unsafe about unshare(2).
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

fn not_unshared(errno: Errno) -> Error {
    Error::new("unshare a mount namespace", errno).with_hint("this needs root with CAP_SYS_ADMIN")
}

fn in_new_thread<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespace".into()).stack_size(256 * 1024).spawn_scoped(scope, work);
        let thread = thread.doing(|| "start a thread".into())?;
        Ok(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
