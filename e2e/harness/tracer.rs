//! The system calls of a running process, and its death just before one of them (ptrace(2)).
//!
//! A test that kills a process at named points covers the points that somebody thought of. Here the kernel says which there are: every
//! call by which the process changes something that outlives it, in the order in which its threads enter them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

// Not all C libraries have these (linux/ptrace.h).
const GET_SYSCALL_INFO: libc::c_long = 0x420e;
const SEIZE: libc::c_long = 0x4206;
const INTERRUPT: libc::c_long = 0x4207;
const LISTEN: libc::c_long = 0x4208;
const RESUME_TO_SYSCALL: libc::c_long = 24;
const OPTIONS: libc::c_long = 1 | 1 << 3; // PTRACE_O_TRACESYSGOOD, PTRACE_O_TRACECLONE
const EVENT_STOP: i32 = 128;
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;
const SYSCALL_ENTRY: u8 = 1;

/// How long a process makes no call before it counts as done with what it was asked for.
const QUIET: Duration = Duration::from_millis(20);

/// A call that changes something outside of the process.
#[derive(Clone, Debug)]
pub struct Change {
    pub call: &'static str,
    pub object: String,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.call, self.object)
    }
}

/// What a traced process did.
#[derive(Debug, Default)]
pub struct Report {
    pub changes: Vec<Change>,
    /// How many calls it made, without those by which threads wait for each other, and without those for memory.
    pub calls: usize,
    /// It was killed before the last of the changes.
    pub killed: bool,
}

/// All threads of a process under trace, by a thread of this one: ptrace obeys only the thread that attached.
pub struct Tracer {
    pid: i32,
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    thread: JoinHandle<Report>,
}

impl Tracer {
    /// Watches what `pid` does from now on.
    pub fn watch(pid: u32) -> Self {
        Tracer::attach(pid, None)
    }

    /// Kills `pid` before its change number `number`, the first being 1, which is then not made.
    pub fn kill_before(pid: u32, number: usize) -> Self {
        Tracer::attach(pid, Some(number))
    }

    fn attach(pid: u32, kill_before: Option<usize>) -> Self {
        let pid = i32::try_from(pid).unwrap();
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (sender, ready) = mpsc::channel();
        let trace = Trace { pid, kill_before, stop: Arc::clone(&stop), calls: Arc::clone(&calls) };
        let thread = std::thread::spawn(move || trace.run(sender));
        // No answer means that the process is dead already, for a change that was under way; or else finishing says why.
        let _ = ready.recv();
        Tracer { pid, stop, calls, thread }
    }

    /// Waits until the process ends, by itself or killed.
    pub fn wait(self) -> Report {
        self.thread.join().unwrap()
    }

    /// Waits until the process is dead or, after it answered a call, quiet; lets go of it.
    pub fn finish(self) -> Report {
        let mut before = usize::MAX;
        while !self.thread.is_finished() && before != self.calls.load(Ordering::SeqCst) {
            before = self.calls.load(Ordering::SeqCst);
            sleep(QUIET);
        }
        self.stop.store(true, Ordering::SeqCst);
        // The tracer waits for the process; a signal that the process ignores wakes it.
        // SAFETY: kill(2) touches no memory.
        unsafe { libc::kill(self.pid, libc::SIGURG) };
        self.thread.join().unwrap()
    }
}

struct Trace {
    pid: i32,
    kill_before: Option<usize>,
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
}

impl Trace {
    /// When this returns, the thread ends, and the kernel detaches what it traced.
    fn run(self, ready: mpsc::Sender<()>) -> Report {
        let mut report = Report::default();
        let mut starting = self.seize();
        loop {
            let mut status = 0;
            // Of this thread's tracees alone: the other children are none of its business.
            // SAFETY: waitpid(2) writes into a status that is there until it returns.
            let thread = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
            if thread < 0 {
                let error = std::io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    // A dead process has no thread left to wait for.
                    Some(libc::ECHILD) if starting.is_empty() => return report,
                    _ => panic!("wait for process {}: {error}", self.pid),
                }
            }
            let mut signal = 0;
            if libc::WIFSTOPPED(status) {
                let stopped_by = libc::WSTOPSIG(status);
                match (status >> 16, stopped_by) {
                    (EVENT_STOP, libc::SIGSTOP | libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU) => {
                        ptrace(LISTEN, thread, 0, 0);
                        continue;
                    }
                    (0, by) if by == SYSCALL_STOP => {
                        report.killed = self.entered(thread, &mut report);
                        if report.killed {
                            // SAFETY: as in `finish`.
                            unsafe { libc::kill(self.pid, libc::SIGKILL) };
                            return report;
                        }
                    }
                    (0, libc::SIGURG) if self.stop.load(Ordering::SeqCst) => return report,
                    (0, by) => signal = by,
                    _ => {}
                }
                ptrace(RESUME_TO_SYSCALL, thread, 0, signal.into());
            } else if thread == self.pid {
                assert!(starting.is_empty(), "process {} ended with status {status:#x} by itself", self.pid);
                return report;
            }
            if !starting.is_empty() {
                starting.retain(|&other| other != thread);
                if starting.is_empty() {
                    ready.send(()).unwrap();
                }
            }
        }
    }

    /// Attaches to all threads and stops them, so that they can be resumed to their next call. Returns them.
    fn seize(&self) -> Vec<i32> {
        let mut seized = Vec::new();
        loop {
            let before = seized.len();
            for thread in fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap() {
                let thread = thread.unwrap().file_name().to_str().unwrap().parse().unwrap();
                if !seized.contains(&thread) && ptrace(SEIZE, thread, 0, OPTIONS) == 0 {
                    ptrace(INTERRUPT, thread, 0, 0);
                    seized.push(thread);
                }
            }
            // Threads that started meanwhile, and whose creator was not traced yet.
            if seized.len() == before {
                assert!(!seized.is_empty(), "trace process {}: {}", self.pid, std::io::Error::last_os_error());
                return seized;
            }
        }
    }

    /// Writes down the call that a thread is about to make; true if it is the one to die before.
    fn entered(&self, thread: i32, report: &mut Report) -> bool {
        let mut info = SyscallInfo::default();
        ptrace(GET_SYSCALL_INFO, thread, size_of::<SyscallInfo>() as libc::c_long, (&raw mut info) as libc::c_long);
        if info.op != SYSCALL_ENTRY {
            return false;
        }
        let number = info.number as libc::c_long;
        if !is_internal(number) {
            report.calls += 1;
            self.calls.fetch_add(1, Ordering::SeqCst);
        }
        let Some(change) = (Memory { pid: self.pid }).change(number, &info.arguments) else { return false };
        report.changes.push(change);
        self.kill_before == Some(report.changes.len())
    }
}

/// struct ptrace_syscall_info, as far as it describes the entry of a call.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    op: u8,
    padding: [u8; 3],
    arch: u32,
    instruction_pointer: u64,
    stack_pointer: u64,
    number: u64,
    arguments: [u64; 6],
    rest: [u64; 2],
}

fn ptrace(request: libc::c_long, thread: i32, address: libc::c_long, data: libc::c_long) -> libc::c_long {
    // SAFETY: the only request that writes is GET_SYSCALL_INFO, into a SyscallInfo of the size given.
    unsafe { libc::syscall(libc::SYS_ptrace, request, libc::c_long::from(thread), address, data) }
}

/// Calls by which threads wait for each other or for a socket, and calls for memory: how many is a matter of luck.
fn is_internal(number: libc::c_long) -> bool {
    #[cfg(target_arch = "x86_64")]
    if number == libc::SYS_epoll_wait {
        return true;
    }
    [
        libc::SYS_futex,
        libc::SYS_epoll_pwait,
        libc::SYS_sched_yield,
        libc::SYS_restart_syscall,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_brk,
    ]
    .contains(&number)
}

/// Where a call says what it works on.
enum Object {
    /// A path or another text behind the argument of this number.
    Text(usize),
    Number(usize),
    /// A file descriptor.
    File(usize),
    /// A file to open, its flags in the argument after it: a change only if it may be written, or is a loop device.
    Open(usize),
    /// A file descriptor that is written to: a change if it is a file that has a name.
    Written(usize),
    /// A file descriptor of a loop device, the request after it.
    Loop(usize),
    /// A file descriptor that goes: a change where the kernel keeps something for as long as it is open.
    Closed(usize),
}

use Object::{Closed, File, Loop, Number, Open, Text, Written};

/// The calls that change something outside of the process, by their names.
macro_rules! changes {
    ($number:expr, { $($name:ident $object:expr,)* } { $($old:ident $old_object:expr,)* }) => {
        match $number {
            $(libc::$name => Some((stringify!($name), $object)),)*
            // Calls that not all machines have; where they are missing, others above do the same.
            $(#[cfg(target_arch = "x86_64")] libc::$old => Some((stringify!($old), $old_object)),)*
            _ => None,
        }
    };
}

fn change(number: libc::c_long) -> Option<(&'static str, Object)> {
    changes!(number, {
        SYS_mkdirat Text(1),
        SYS_mknodat Text(1),
        SYS_unlinkat Text(1),
        SYS_renameat2 Text(1),
        SYS_linkat Text(1),
        SYS_symlinkat Text(2),
        SYS_openat Open(1),
        SYS_openat2 Text(1),
        SYS_truncate Text(0),
        SYS_ftruncate File(0),
        SYS_fallocate File(0),
        SYS_write Written(0),
        SYS_writev Written(0),
        SYS_pwrite64 Written(0),
        SYS_pwritev Written(0),
        SYS_pwritev2 Written(0),
        SYS_copy_file_range Written(2),
        SYS_sendfile Written(0),
        SYS_splice Written(2),
        SYS_fchmod File(0),
        SYS_fchmodat Text(1),
        SYS_fchown File(0),
        SYS_fchownat Text(1),
        SYS_utimensat Text(1),
        SYS_setxattr Text(0),
        SYS_lsetxattr Text(0),
        SYS_fsetxattr File(0),
        SYS_removexattr Text(0),
        SYS_mount Text(1),
        SYS_umount2 Text(0),
        SYS_pivot_root Text(0),
        SYS_fsopen Text(0),
        SYS_fsconfig Text(2),
        SYS_fsmount File(0),
        SYS_fspick Text(1),
        SYS_open_tree Text(1),
        SYS_move_mount File(2),
        SYS_mount_setattr File(0),
        SYS_setns File(0),
        SYS_unshare Number(0),
        SYS_ioctl Loop(0),
        SYS_close Closed(0),
        SYS_kill Number(0),
        SYS_init_module Number(0),
        SYS_finit_module File(0),
    } {
        SYS_mkdir Text(0),
        SYS_mknod Text(0),
        SYS_rmdir Text(0),
        SYS_unlink Text(0),
        SYS_rename Text(0),
        SYS_renameat Text(1),
        SYS_link Text(1),
        SYS_symlink Text(1),
        SYS_open Open(0),
        SYS_creat Text(0),
        SYS_chmod Text(0),
        SYS_fchmodat2 Text(1),
        SYS_chown Text(0),
        SYS_lchown Text(0),
    })
}

/// What the arguments of a call of this process mean.
struct Memory {
    pid: i32,
}

impl Memory {
    fn change(&self, number: libc::c_long, arguments: &[u64; 6]) -> Option<Change> {
        let (call, object) = change(number)?;
        let object = match object {
            Text(at) => self.text(arguments[at]),
            Number(at) => arguments[at].to_string(),
            File(at) => self.file(arguments[at]),
            Open(at) => {
                let path = self.text(arguments[at]);
                let writes = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
                if arguments[at + 1] as libc::c_int & writes == 0 && !path.starts_with("/dev/loop") {
                    return None;
                }
                path
            }
            Written(at) => {
                let file = self.file(arguments[at]);
                // 1 and 2 are the log.
                if arguments[at] <= 2 || !file.starts_with('/') {
                    return None;
                }
                file
            }
            Loop(at) => {
                let file = self.file(arguments[at]);
                if !file.starts_with("/dev/loop") && file != "/dev/mapper/control" {
                    return None;
                }
                format!("{file} {:#x}", arguments[at + 1])
            }
            Closed(at) => {
                let file = self.file(arguments[at]);
                let is_kept = file.starts_with("/dev/loop")
                    || file.starts_with("/dev/dm-")
                    || file == "anon_inode:[fscontext]"
                    || file == "/";
                if !is_kept {
                    return None;
                }
                file
            }
        };
        Some(Change { call: call.trim_start_matches("SYS_"), object })
    }

    fn text(&self, address: u64) -> String {
        let mut bytes = vec![0; 4096];
        let read = fs::File::open(format!("/proc/{}/mem", self.pid)).and_then(|memory| {
            // The text may end shortly before memory that is not there.
            let page = 4096 - (address as usize & 4095);
            let first = memory.read_at(&mut bytes[..page], address)?;
            if bytes[..first].contains(&0) || first < page {
                return Ok(first);
            }
            Ok(first + memory.read_at(&mut bytes[first..], address + first as u64).unwrap_or(0))
        });
        let length = read.unwrap_or(0);
        let text = bytes[..length].split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    fn file(&self, descriptor: u64) -> String {
        let link = fs::read_link(format!("/proc/{}/fd/{}", self.pid, descriptor as i32));
        link.unwrap_or_else(|_| PathBuf::from("?")).display().to_string()
    }
}
