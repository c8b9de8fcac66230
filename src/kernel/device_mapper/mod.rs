//! Device mapper: block devices that the kernel makes of others (Documentation/admin-guide/device-mapper/, include/uapi/linux/dm-ioctl.h).
//!
//! A device stands on loop devices of the driver, or on others of these, carries the driver's [`Tag`] in its name, and goes with its last
//! user (deferred removal), and then what it stands on with it. A mounted file system is a user.

pub mod multipath;
pub mod verified;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, major, makedev, minor};
use rustix::io::Errno;

use super::device_node;
use super::error::{Doing, Error, Result, last_errno};
use super::loop_device::Tag;
pub use multipath::{Message, Multipath, MultipathDevice, PathState};
pub use verified::{Verified, VerifiedDevice};

const CONTROL: &str = "/dev/mapper/control";
/// How long a new device may take to appear in /dev, and another process to be done with one of the same name.
const PATIENCE: Duration = Duration::from_secs(5);

// `struct dm_ioctl`, its fields and flags.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEVICE: usize = 40;
const NAME: usize = 48;
const NAME_LENGTH: usize = 128;
const READ_ONLY: u32 = 1;
/// The status is that of the table, in the words in which it was loaded.
const STATUS_TABLE: u32 = 1 << 4;
const ACTIVE: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
const SKIP_LOCKFS: u32 = 1 << 10;
const NOFLUSH: u32 = 1 << 11;
const DEFERRED_REMOVE: u32 = 1 << 17;
/// `struct dm_target_spec`.
const TARGET: usize = 40;
/// What a request and its answer take, but for lists of very many devices; and what they may take at most. The kernel reads all of it.
const ANSWER: usize = 1 << 14;
const LONGEST_ANSWER: usize = 1 << 20;

#[derive(Clone, Copy)]
enum Command {
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    /// Begin with the table that was loaded, or go on with it in the place of another.
    Resume = 6,
    Status = 7,
    LoadTable = 9,
    /// Forget the table that was loaded and not begun with.
    ClearTable = 10,
    TableStatus = 12,
    Message = 14,
    TargetVersion = 17,
}

/// A device that is there, held open.
#[derive(Debug)]
struct Opened {
    path: PathBuf,
    device: (u32, u32),
    _fd: OwnedFd,
}

/// What a device is made of: one target from the first sector to the last. It takes no writes.
struct Table {
    target: &'static str,
    /// Of 512 bytes.
    sectors: u64,
    parameters: String,
    /// What to do where the kernel takes no such table.
    hint: &'static str,
}

impl Table {
    /// A `struct dm_target_spec`, and the parameters behind it.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; TARGET];
        bytes[8..16].copy_from_slice(&self.sectors.to_ne_bytes());
        bytes[24..24 + self.target.len()].copy_from_slice(self.target.as_bytes());
        bytes.extend(self.parameters.as_bytes());
        bytes.push(0);
        bytes
    }
}

/// The version of a target of the kernel, whose module is loaded if need be. Linux 5.4.
fn version(target: &str) -> Result<String> {
    let answer = Control::open()?.call(Command::TargetVersion, target, 0, &[]);
    let answer = answer
        .doing(|| format!("look for dm-{target}"))
        .map_err(|error| error.with_hint(format!("try 'modprobe dm-{target}' on the node")))?;
    let at = number(&answer, DATA_START) as usize + 4;
    Ok([0, 4, 8].map(|part| number(&answer, at + part).to_string()).join("."))
}

/// Whether somebody may have made a device: else nobody is asked, as that would load the module.
fn is_loaded() -> bool {
    Path::new("/sys/module/dm_mod").exists()
}

/// Lets each device with this mark go with its last user: of one that nobody uses, which a killed process left, that is now.
pub fn sweep(tag: &Tag) -> Result<()> {
    if !is_loaded() {
        return Ok(());
    }
    let control = Control::open()?;
    let names = control.names()?;
    let above = names.iter().filter(|name| multipath::read_name(name, tag).is_some());
    // What others stand on has a user until those are gone.
    let below = names.iter().filter(|name| verified::read_name(name, tag).is_some());
    for name in above.chain(below) {
        control.remove_with_last_user(name)?;
    }
    Ok(())
}

/// The loop device below a device-mapper device, if there is one and no other; of a multipath device that which its name says. Loads no
/// module, and opens nothing.
pub fn loop_device_below(device: (u32, u32)) -> Option<u32> {
    let device = PathBuf::from(format!("/sys/dev/block/{}:{}", device.0, device.1));
    let name = std::fs::read_to_string(device.join("dm/name")).ok()?;
    if let Some(number) = multipath::loop_device_in(name.trim_end()) {
        return Some(number);
    }
    let below = std::fs::read_dir(device.join("slaves")).ok()?;
    let names: Vec<_> = below.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let [name] = &names[..] else { return None };
    name.strip_prefix("loop")?.parse().ok()
}

/// What a target says of itself in the answer to [`Command::TableStatus`].
fn status(answer: &[u8]) -> String {
    let start = number(answer, DATA_START) as usize + TARGET;
    let text = answer.get(start..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// The number of the device that an answer is about.
fn device_in(answer: &[u8]) -> (u32, u32) {
    let device = u64::from(number(answer, DEVICE));
    (major(device), minor(device))
}

/// How many sectors the target has that an answer of [`Command::TableStatus`] is about.
fn sectors(answer: &[u8]) -> u64 {
    let start = number(answer, DATA_START) as usize + 8;
    let bytes = answer.get(start..start + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u64::from_ne_bytes).unwrap_or_default()
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).unwrap_or_default()
}

struct Control(File);

impl Control {
    /// The kernel loads its module where somebody opens the node, which is there before that where systemd made it.
    fn open() -> Result<Self> {
        let open = || File::options().read(true).write(true).open(CONTROL);
        let control = open().or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => make_node().map_err(std::io::Error::from).and_then(|()| open()),
            _ => Err(error),
        });
        let hint = "try 'modprobe dm-mod' on the node, and see that the driver has the host's /dev";
        control.map(Control).doing(|| format!("open {CONTROL}")).map_err(|error| error.with_hint(hint))
    }

    fn call(&self, command: Command, name: &str, flags: u32, data: &[u8]) -> std::result::Result<Vec<u8>, Errno> {
        let mut room = ANSWER.max(data.len());
        loop {
            match self.call_with(room, command, name, flags, data) {
                // Of those that only look: others have no answer.
                Err(Errno::NOBUFS) if room < LONGEST_ANSWER => room *= 8,
                outcome => return outcome,
            }
        }
    }

    fn call_with(
        &self,
        room: usize,
        command: Command,
        name: &str,
        flags: u32,
        data: &[u8],
    ) -> std::result::Result<Vec<u8>, Errno> {
        let mut message = vec![0; HEADER + room];
        let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
        // Version 4 of the interface.
        put(0, &4u32.to_ne_bytes());
        put(DATA_SIZE, &((HEADER + room) as u32).to_ne_bytes());
        put(DATA_START, &(HEADER as u32).to_ne_bytes());
        put(TARGET_COUNT, &u32::from(matches!(command, Command::LoadTable)).to_ne_bytes());
        put(FLAGS, &flags.to_ne_bytes());
        put(NAME, &name.as_bytes()[..name.len().min(NAME_LENGTH - 1)]);
        put(HEADER, data);
        let request = rustix::ioctl::opcode::read_write::<[u8; HEADER]>(0xfd, command as u8);
        // SAFETY: the kernel reads and writes DATA_SIZE bytes of the message, which has as many.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, message.as_mut_ptr()) } {
            0 if number(&message, FLAGS) & BUFFER_FULL != 0 => Err(Errno::NOBUFS),
            0 => Ok(message),
            _ => Err(last_errno()),
        }
    }

    fn names(&self) -> Result<Vec<String>> {
        let answer = self.call(Command::ListDevices, "", 0, &[]).doing(|| "list device-mapper devices".into())?;
        let (mut names, mut at) = (Vec::new(), number(&answer, DATA_START) as usize);
        // `struct dm_name_list`: the device, how far it is to the next, the name.
        while let Some(entry) = answer.get(at..) {
            let name = entry.get(12..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
            if !name.is_empty() {
                names.push(String::from_utf8_lossy(name).into_owned());
            }
            match number(entry, 8) {
                0 => break,
                next => at += next as usize,
            }
        }
        Ok(names)
    }

    /// What the kernel says of the target of a device, by [`Command::TableStatus`]; `None` where that is gone.
    fn ask(&self, name: &str, flags: u32) -> Result<Option<Vec<u8>>> {
        match self.call(Command::TableStatus, name, flags, &[]) {
            Ok(answer) => Ok(Some(answer)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno).doing(|| format!("look at {name}")),
        }
    }

    /// The device of this name, if it is complete.
    fn open_device(&self, name: &str) -> Result<Option<Opened>> {
        match self.call(Command::Status, name, 0, &[]) {
            Ok(answer) if number(&answer, TARGET_COUNT) == 1 && number(&answer, FLAGS) & ACTIVE != 0 => {
                let opened = self.open_by(name, &answer)?;
                // Who made it may have been killed before it said so.
                self.remove_with_last_user(name)?;
                Ok(opened)
            }
            // A process was killed between making it and giving it its table.
            Ok(_) => self.remove_with_last_user(name).map(|()| None),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno).doing(|| format!("look for the device {name}")),
        }
    }

    /// A new device of this name. `doing` is to say what is done to it.
    fn make(&self, name: &str, table: &Table, doing: &dyn Fn(&str) -> String) -> Result<Opened> {
        self.call(Command::Create, name, 0, &[]).doing(|| doing("make"))?;
        let made = self.begin(name, table, doing);
        if made.is_err() {
            // The first error is the one to report.
            let _ = self.remove_with_last_user(name);
        }
        made
    }

    fn begin(&self, name: &str, table: &Table, doing: &dyn Fn(&str) -> String) -> Result<Opened> {
        self.load(name, table, doing)?;
        let answer = self.call(Command::Resume, name, 0, &[]).doing(|| doing("begin with"))?;
        let made = self.open_by(name, &answer)?.ok_or(Errno::NOENT).doing(|| doing("open"))?;
        self.remove_with_last_user(name)?;
        Ok(made)
    }

    fn load(&self, name: &str, table: &Table, doing: &dyn Fn(&str) -> String) -> Result<()> {
        let loaded = self.call(Command::LoadTable, name, READ_ONLY, &table.bytes()).doing(|| doing("describe"));
        loaded.map(drop).map_err(|error| match error.errno() {
            Errno::INVAL => error.with_hint(table.hint),
            _ => error,
        })
    }

    /// The device of this name, that `answer` is about; `None` where it is gone again.
    fn open_by(&self, name: &str, answer: &[u8]) -> Result<Option<Opened>> {
        let Some(opened) = open(answer)? else { return Ok(None) };
        // Its number may have been another's by then; from now on it is not.
        match self.call(Command::Status, name, 0, &[]) {
            Ok(now) if number(&now, DEVICE) == number(answer, DEVICE) && number(&now, FLAGS) & ACTIVE != 0 => {
                Ok(Some(opened))
            }
            Ok(_) | Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno).doing(|| format!("look for the device {name}")),
        }
    }

    fn remove_with_last_user(&self, name: &str) -> Result<()> {
        match self.call(Command::Remove, name, DEFERRED_REMOVE, &[]) {
            Ok(_) | Err(Errno::NXIO) => Ok(()),
            Err(errno) => Err(errno).doing(|| format!("let the device {name} go with its last user")),
        }
    }
}

fn wait_a_little() {
    std::thread::sleep(Duration::from_millis(10));
}

/// What `find` finds, or what `make` makes where that is nothing; both again where another is at it.
fn find_or_make(find: impl Fn() -> Result<Option<Opened>>, make: impl Fn() -> Result<Opened>) -> Result<Opened> {
    let start = Instant::now();
    loop {
        if let Some(found) = find()? {
            return Ok(found);
        }
        match make() {
            // Another process is at it, or the device was just let go of.
            Err(error)
                if matches!(error.errno(), Errno::BUSY | Errno::NXIO | Errno::NOENT) && start.elapsed() < PATIENCE =>
            {
                wait_a_little();
            }
            made => return made,
        }
    }
}

/// As `kmod static-nodes` names it: MAPPER_CTRL_MINOR of the miscellaneous devices.
fn make_node() -> std::result::Result<(), Errno> {
    match rustix::fs::mkdir("/dev/mapper", Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    match rustix::fs::mknodat(CWD, CONTROL, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(10, 236)) {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

/// The node of a device in /dev; `None` where it is gone again.
fn open(answer: &[u8]) -> Result<Option<Opened>> {
    let device = device_in(answer);
    let path = PathBuf::from(format!("/dev/dm-{}", device.1));
    let known = format!("/sys/dev/block/{}:{}", device.0, device.1);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let start = Instant::now();
    loop {
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                let opened = file.metadata().doing(|| format!("look at {}", path.display()))?.rdev();
                let is_it = (major(opened), minor(opened)) == device;
                return Ok(is_it.then(|| Opened { path, device, _fd: file.into() }));
            }
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::NOENT) if !Path::new(&known).exists() => return Ok(None),
            Err(Errno::NOENT) if start.elapsed() < device_node::A_MOMENT => wait_a_little(),
            Err(Errno::NOENT) => device_node::make(&path, device)?,
            Err(errno) => return Err(Error::new(format!("open {}", path.display()), errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_a_target_is_its_text() {
        let mut answer = vec![0; HEADER + TARGET];
        answer[DATA_START..DATA_START + 4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        answer.extend(b"C\0rest");
        assert_eq!(status(&answer), "C");
        assert_eq!(status(&[]), "");
    }
}
