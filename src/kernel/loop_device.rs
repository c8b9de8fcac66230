//! Loop devices (loop(4)): found, attached and recognised by ioctl alone.
//!
//! Every device of an image is read-only and carries this driver's [`Tag`] from the ioctl that attaches it; that of a writable layer carries
//! none. Each is freed by the kernel with its last user (`LO_FLAGS_AUTOCLEAR`): an open [`LoopDevice`] is a user, a mounted file system
//! is one.

mod status;
mod tag;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LOOP_CHANGE_FD, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, loop_config,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::device_node;
use super::error::{Doing, Error, Result, errno_of, last_errno};
use super::image::{Image, ImageIdentity};
use super::sif::Partition;
use status::status;
pub use tag::{Purpose, Tag};

/// The major number of loop devices (Documentation/admin-guide/devices.txt).
pub const MAJOR: u32 = 7;
/// How long an attach is tried again when somebody else took the device, or the device node is not there yet.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a device that is to get another file is watched for a moment without reads, and how long until one will do in which all of
/// a little earlier were answered.
const WATCHED: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_secs(5);
const EARLIER: Duration = Duration::from_millis(100);

/// A loop device of this driver, held open.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    fd: OwnedFd,
}

impl LoopDevice {
    /// The N of `/dev/loopN`.
    pub fn number(&self) -> u32 {
        self.number
    }

    pub fn path(&self) -> PathBuf {
        device_path(self.number)
    }

    /// Its number, major and minor.
    pub fn device(&self) -> (u32, u32) {
        (MAJOR, self.number)
    }

    /// For a double, which holds something else open.
    #[cfg(test)]
    pub(crate) fn of_number(number: u32, fd: OwnedFd) -> Self {
        LoopDevice { number, fd }
    }

    /// The device of this image for this purpose: the one that has it already, or a new one.
    ///
    /// Two threads must not call this for one image at a time, or it gets two devices.
    pub fn of(image: &Image, purpose: Purpose, tag: &Tag) -> Result<Self> {
        for number in candidates()? {
            if let Some((device, of)) = inspect(number, tag)?
                && of == (image.identity, purpose)
            {
                return Ok(device);
            }
        }
        let part = match purpose {
            Purpose::FileSystem | Purpose::Verity | Purpose::Path { .. } => None,
            Purpose::Sif => Some(image.partition()?),
        };
        let flags = LO_FLAGS_READ_ONLY as u32 | LO_FLAGS_AUTOCLEAR as u32;
        Self::configure_free(&image.file, flags, part, &tag.name(&image.identity, purpose))
    }

    /// A new device of a file that is written to through it. It carries no mark: nobody looks for it.
    pub(super) fn writable(file: &File) -> Result<Self> {
        Self::configure_free(file, LO_FLAGS_AUTOCLEAR as u32, None, "csi-squashfs-scratch")
    }

    /// The device through which `file`, whose path ends with `end`, is written to.
    pub(super) fn writing_to(file: &File, end: &str) -> Result<Option<Self>> {
        let metadata = file.metadata().doing(|| format!("look at {end}"))?;
        for number in devices(false)? {
            // A stranger's device is not asked.
            if !backing_file(number).is_some_and(|path| path.ends_with(end)) {
                continue;
            }
            let Ok(fd) = open(number) else { continue };
            if let Ok(info) = status(number, &fd)
                && (info.lo_device, info.lo_inode) == (metadata.dev(), metadata.ino())
            {
                return Ok(Some(LoopDevice { number, fd }));
            }
        }
        Ok(None)
    }

    /// Puts a copy of the device's image in its place, under whoever reads in it. A device of a part keeps where that is.
    ///
    /// The kernel waits for the reads that are under way, for however long, and whoever asks the device anything waits with it: a moment is
    /// looked for in which there are none, or in which they are being answered. `EBUSY` where there is no such moment.
    pub fn change_backing(&self, copy: &Image) -> Result<()> {
        self.wait_for_answered_reads()?;
        let _moving = Moving::new(self.number);
        // SAFETY: LOOP_CHANGE_FD takes a file descriptor.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), LOOP_CHANGE_FD as _, copy.file.as_raw_fd()) } {
            0 => Ok(()),
            _ => {
                Err(Error::new(format!("move /dev/loop{} to another file (LOOP_CHANGE_FD)", self.number), last_errno()))
            }
        }
    }

    fn wait_for_answered_reads(&self) -> Result<()> {
        let start = Instant::now();
        let (mut since, mut earlier) = (start, reads(self.number));
        while start.elapsed() < WATCHED {
            let now = reads(self.number);
            if now.under_way == 0 {
                return Ok(());
            }
            if since.elapsed() >= EARLIER {
                let were_answered = now.answered.saturating_sub(earlier.answered) >= earlier.under_way;
                if were_answered && start.elapsed() >= QUIET {
                    return Ok(());
                }
                (since, earlier) = (Instant::now(), now);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let error = Error::new(format!("move /dev/loop{} to another file", self.number), Errno::BUSY);
        Err(error.with_hint("reads of it wait for their server"))
    }

    fn configure_free(file: &File, flags: u32, part: Option<Partition>, name: &str) -> Result<Self> {
        let control = open_control()?;
        let mut config = loop_config {
            fd: file.as_raw_fd() as u32,
            block_size: 0,
            // SAFETY: an integer-only C struct, for which all zeroes is a value.
            info: unsafe { std::mem::zeroed() },
            __reserved: [0; 8],
        };
        config.info.lo_flags = flags;
        if let Some(Partition { offset, size }) = part {
            (config.info.lo_offset, config.info.lo_sizelimit) = (offset, size);
        }
        config.info.lo_file_name[..name.len()].copy_from_slice(name.as_bytes());

        let (mut last, start) = (Errno::BUSY, Instant::now());
        while start.elapsed() < PATIENCE {
            let number = free_number(&control)?;
            match configure(number, &config) {
                Ok(fd) => return Ok(LoopDevice { number, fd }),
                // All who ask at once are told the same number, and one of them gets it.
                Err(errno @ Errno::BUSY) => {
                    last = errno;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(Errno::NOENT) if start.elapsed() > device_node::A_MOMENT => {
                    device_node::make(&device_path(number), (MAJOR, number))?;
                }
                // The node appears, and is let go of by those who look at every new device, a moment later.
                Err(errno @ (Errno::AGAIN | Errno::NOENT | Errno::NXIO | Errno::ACCESS)) => {
                    last = errno;
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(errno) => return Err(Error::new(format!("attach a file to /dev/loop{number}"), errno)),
            }
        }
        Err(Error::new("attach a file to a loop device", last))
    }
}

/// The devices to which this process is giving another file: whoever asks one of them anything waits as long as that takes.
static MOVING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// One of [`MOVING`], while this lives.
struct Moving(u32);

impl Moving {
    fn new(number: u32) -> Self {
        Moving::all().insert(number);
        Moving(number)
    }

    fn all() -> MutexGuard<'static, BTreeSet<u32>> {
        MOVING.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        Moving::all().remove(&self.0);
    }
}

/// A device of this driver, as the kernel describes it.
#[derive(Debug)]
pub struct Attached {
    pub device: LoopDevice,
    pub identity: ImageIdentity,
    pub purpose: Purpose,
    /// The path of the image, relative to the root of the mount it was opened on.
    pub backing_file: Option<String>,
    pub reads: Reads,
}

/// What was read from a device since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    pub bytes: u64,
    pub answered: u64,
    /// Reads that have no answer yet.
    pub under_way: u64,
}

/// All devices that carry `tag`, by number, but for those to which this process is giving another file. Each is held open while the answer
/// lives.
pub fn list(tag: &Tag) -> Result<Vec<Attached>> {
    let mut attached = Vec::new();
    for number in candidates()? {
        if let Some((device, (identity, purpose))) = inspect(number, tag)? {
            let (backing_file, reads) = (backing_file(number), reads(number));
            attached.push(Attached { device, identity, purpose, backing_file, reads });
        }
    }
    attached.sort_by_key(|attached| attached.device.number);
    Ok(attached)
}

/// The path of the backing file, as the kernel shows it: relative to the root of the mount it was opened on.
fn backing_file(number: u32) -> Option<String> {
    let path = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    Some(path.trim_end_matches('\n').to_owned())
}

/// See Documentation/block/stat.rst; nothing where the device is gone. Asks no server.
pub fn reads(number: u32) -> Reads {
    let stat = std::fs::read_to_string(format!("/sys/block/loop{number}/stat")).unwrap_or_default();
    let field = |at| stat.split_whitespace().nth(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
    Reads { answered: field(0), bytes: field(2) * 512, under_way: field(8) }
}

/// The device, if it is attached and ours.
fn inspect(number: u32, tag: &Tag) -> Result<Option<(LoopDevice, (ImageIdentity, Purpose))>> {
    // Those that this process began to move since it looked, too.
    if Moving::all().contains(&number) {
        return Ok(None);
    }
    let fd = match open(number) {
        Ok(fd) => fd,
        // Let go of in the meantime.
        Err(Errno::NXIO | Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(Error::new(format!("open /dev/loop{number}"), errno)),
    };
    let info = match status(number, &fd) {
        Ok(info) => info,
        Err(errno) => {
            // Let go of (ENXIO), or of a stranger whose file cannot be looked at (FUSE without its daemon: ENOTCONN).
            tracing::debug!(device = number, errno = errno.raw_os_error(), "a loop device does not tell whose it is");
            return Ok(None);
        }
    };
    let ours = |of| (LoopDevice { number, fd }, of);
    Ok(tag.read(&info).map(ours))
}

/// The devices that may be ours: those that have a file, take no writes and free themselves. A stranger's device is left unopened where
/// possible: to ask for its state may ask its file's server.
fn candidates() -> Result<Vec<u32>> {
    devices(true)
}

/// Those that have a file, free themselves, and take no writes or do.
fn devices(read_only: bool) -> Result<Vec<u32>> {
    let entries = std::fs::read_dir("/sys/block").doing(|| "list /sys/block".into())?;
    let number = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok()?;
        let is_set = |name| std::fs::read_to_string(entry.path().join(name)).is_ok_and(|text| text.trim_end() == "1");
        // One question for each device that has no file, of which there may be many.
        (is_set("loop/autoclear") && is_set("ro") == read_only).then_some(number)
    };
    Ok(entries.filter_map(|entry| number(entry.ok()?)).collect())
}

/// `/dev/loop-control`, by which the kernel tells of free devices.
pub(super) fn open_control() -> Result<File> {
    File::open("/dev/loop-control").map_err(|error| {
        let errno = match errno_of(&error) {
            Errno::NOENT => Errno::NODEV,
            errno => errno,
        };
        Error::new("open /dev/loop-control", errno)
            .with_hint("try 'modprobe loop' on the node, and see that the driver has the host's /dev")
    })
}

pub(super) fn free_number(control: &File) -> Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns the number of a device.
    let answer = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    u32::try_from(answer).map_err(|_| Error::new("find a free loop device (LOOP_CTL_GET_FREE)", last_errno()))
}

fn configure(number: u32, config: &loop_config) -> std::result::Result<OwnedFd, Errno> {
    let read_only = config.info.lo_flags & LO_FLAGS_READ_ONLY as u32 != 0;
    let fd = open_for(number, if read_only { OFlags::RDONLY } else { OFlags::RDWR })?;
    // SAFETY: LOOP_CONFIGURE reads one loop_config.
    unsafe { rustix::ioctl::ioctl(fd.as_fd(), rustix::ioctl::Setter::<{ LOOP_CONFIGURE as _ }, _>::new(*config)) }?;
    // The first one is let go of last, or the device would free itself.
    if read_only { Ok(fd) } else { open(number) }
}

/// Read-only: a writer would keep the kernel from mounting the device.
fn open(number: u32) -> std::result::Result<OwnedFd, Errno> {
    open_for(number, OFlags::RDONLY)
}

fn open_for(number: u32, mode: OFlags) -> std::result::Result<OwnedFd, Errno> {
    rustix::fs::open(device_path(number), mode | OFlags::CLOEXEC, Mode::empty())
}

pub(super) fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}
