//! Device mapper: block devices that the kernel verifies (Documentation/admin-guide/device-mapper/, include/uapi/linux/dm-ioctl.h).
//!
//! A device stands on a loop device of the driver, carries the driver's [`Tag`] in its name, and goes with its last user (deferred
//! removal), and then the loop device with it. A mounted file system is a user.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, major, makedev, minor};
use rustix::io::Errno;

use super::error::{Doing, Error, Result, Subject, last_errno};
use super::loop_device::{self, LoopDevice, Tag};
use super::verity::{self, RootHash, Tree, hexadecimal};

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
const ACTIVE: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
const DEFERRED_REMOVE: u32 = 1 << 17;
/// What a target that verifies begins its status with, once a block did not fit.
const CORRUPTED: char = 'C';
/// `struct dm_target_spec`.
const TARGET: usize = 40;
/// What a status or a list of devices may take.
const ANSWER: usize = 1 << 20;

#[derive(Clone, Copy)]
enum Command {
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    /// Of a new device: begin with the table that was loaded.
    Resume = 6,
    Status = 7,
    LoadTable = 9,
    TableStatus = 12,
    TargetVersion = 17,
}

/// A device that reads as its loop device does, or not at all where that has other bytes than its root hash says. Held open.
#[derive(Debug)]
pub struct VerifiedDevice {
    path: PathBuf,
    _fd: OwnedFd,
}

impl VerifiedDevice {
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[cfg(test)]
    pub(super) fn of_path(path: PathBuf, fd: OwnedFd) -> Self {
        VerifiedDevice { path, _fd: fd }
    }

    /// The device of this root hash on a loop device, whose image has `size` bytes: the one that is there already, for which nothing is read, or a new one.
    ///
    /// `EBADMSG` where the image has another root hash, `EMEDIUMTYPE` where it has no tree.
    pub fn on(device: &LoopDevice, size: u64, root: &RootHash, tag: &Tag) -> Result<Self> {
        let control = Control::open()?;
        let name = name(device.number(), root, tag);
        let start = Instant::now();
        loop {
            if let Some(found) = control.open_device(&name)? {
                return Ok(found);
            }
            match control.create(&name, device, size, root) {
                // Another process is at it, or the device was just let go of.
                Err(error)
                    if matches!(error.errno(), Errno::BUSY | Errno::NXIO | Errno::NOENT)
                        && start.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                made => return made,
            }
        }
    }
}

/// The version of the kernel's dm-verity, whose module is loaded if need be. Linux 5.4.
pub fn version() -> Result<String> {
    let answer = Control::open()?.call(Command::TargetVersion, "verity", 0, &[]);
    let answer = answer
        .doing(|| "look for dm-verity".into())
        .map_err(|error| error.with_hint("try 'modprobe dm-verity' on the node"))?;
    let at = number(&answer, DATA_START) as usize + 4;
    Ok([0, 4, 8].map(|part| number(&answer, at + part).to_string()).join("."))
}

/// A device of the driver, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The loop device that it stands on.
    pub loop_device: u32,
    pub root: RootHash,
    /// A block was read that did not fit.
    pub is_corrupted: bool,
}

/// All devices with this mark. Loads no module.
pub fn list(tag: &Tag) -> Result<Vec<Verified>> {
    if !Path::new("/sys/module/dm_mod").exists() {
        return Ok(Vec::new());
    }
    let control = Control::open()?;
    let mut devices = Vec::new();
    for name in control.names()? {
        let Some((loop_device, root)) = read_name(&name, tag) else { continue };
        match control.call(Command::TableStatus, &name, 0, &[]) {
            Ok(answer) => {
                devices.push(Verified { loop_device, root, is_corrupted: status(&answer).starts_with(CORRUPTED) })
            }
            // Gone meanwhile.
            Err(Errno::NXIO) => {}
            Err(errno) => return Err(errno).doing(|| format!("look at {name}")),
        }
    }
    Ok(devices)
}

/// Lets each device with this mark go with its last user: of one that nobody uses, which a killed process left, that is now.
pub fn sweep(tag: &Tag) -> Result<()> {
    if !Path::new("/sys/module/dm_mod").exists() {
        return Ok(());
    }
    let control = Control::open()?;
    for name in control.names()?.iter().filter(|name| read_name(name, tag).is_some()) {
        control.remove_with_last_user(name)?;
    }
    Ok(())
}

/// The loop device below a device-mapper device, if there is one and no other. Loads no module, and opens nothing.
pub fn loop_device_below(device: (u32, u32)) -> Option<u32> {
    let below = std::fs::read_dir(format!("/sys/dev/block/{}:{}/slaves", device.0, device.1)).ok()?;
    let names: Vec<_> = below.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let [name] = &names[..] else { return None };
    name.strip_prefix("loop")?.parse().ok()
}

/// `csi-squashfs-0123abcd-loop3-ROOT`, at most 103 bytes: all of the root hash, so that no device passes for that of another.
fn name(loop_device: u32, root: &RootHash, tag: &Tag) -> String {
    format!("{}{loop_device}-{}", prefix(tag), hexadecimal(root))
}

fn prefix(tag: &Tag) -> String {
    format!("{}-loop", tag.as_str().replace(':', "-"))
}

fn read_name(name: &str, tag: &Tag) -> Option<(u32, RootHash)> {
    let (loop_device, root) = name.strip_prefix(&prefix(tag))?.split_once('-')?;
    Some((loop_device.parse().ok()?, verity::read_hexadecimal(root)?))
}

/// What a target says of itself in the answer to [`Command::TableStatus`].
fn status(answer: &[u8]) -> String {
    let start = number(answer, DATA_START) as usize + TARGET;
    let text = answer.get(start..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
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
        let hint = "try 'modprobe dm-verity' on the node, and see that the driver has the host's /dev";
        control.map(Control).doing(|| format!("open {CONTROL}")).map_err(|error| error.with_hint(hint))
    }

    fn call(&self, command: Command, name: &str, flags: u32, data: &[u8]) -> std::result::Result<Vec<u8>, Errno> {
        let mut message = vec![0; HEADER + ANSWER];
        let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
        // Version 4 of the interface.
        put(0, &4u32.to_ne_bytes());
        put(DATA_SIZE, &((HEADER + ANSWER) as u32).to_ne_bytes());
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

    /// The device of this name, if it is complete.
    fn open_device(&self, name: &str) -> Result<Option<VerifiedDevice>> {
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

    fn create(&self, name: &str, device: &LoopDevice, size: u64, root: &RootHash) -> Result<VerifiedDevice> {
        let doing = |what: &str| format!("{what} the verified device on {} ({name})", device.path().display());
        let image = File::open(device.path()).doing(|| format!("open {}", device.path().display()))?;
        let tree = Tree::find(&image, size)?;
        self.call(Command::Create, name, 0, &[]).doing(|| doing("make"))?;
        let made = self.begin(name, device, &tree, root, &doing);
        if made.is_err() {
            // The first error is the one to report.
            let _ = self.remove_with_last_user(name);
        }
        made
    }

    fn begin(
        &self,
        name: &str,
        device: &LoopDevice,
        tree: &Tree,
        root: &RootHash,
        doing: &dyn Fn(&str) -> String,
    ) -> Result<VerifiedDevice> {
        let parameters = tree.parameters(&format!("{}:{}", loop_device::MAJOR, device.number()), root);
        let mut target = vec![0; TARGET];
        target[8..16].copy_from_slice(&tree.data_sectors().to_ne_bytes());
        target[24..30].copy_from_slice(b"verity");
        target.extend(parameters.as_bytes());
        target.push(0);
        self.call(Command::LoadTable, name, READ_ONLY, &target).doing(|| doing("describe")).map_err(
            |error| match error.errno() {
                Errno::INVAL => error
                    .with_hint("does this kernel have dm-verity with SHA-256? Try 'modprobe dm-verity' on the node"),
                _ => error,
            },
        )?;
        let answer = self.call(Command::Resume, name, 0, &[]).doing(|| doing("begin with"))?;
        let made = self.open_by(name, &answer)?.ok_or(Errno::NOENT).doing(|| doing("open"))?;
        self.remove_with_last_user(name)?;
        let mut block = [0; 4096];
        let Err(error) = File::open(&made.path).and_then(|file| file.read_exact_at(&mut block, 0)) else {
            return Ok(made);
        };
        let doing = || format!("read {}", made.path.display());
        let told = self.call(Command::TableStatus, name, 0, &[]).doing(doing)?;
        // Else it is the server, or the disk, that gave nothing.
        if status(&told).starts_with(CORRUPTED) {
            let hint = format!("the image does not have the root hash {}", hexadecimal(root));
            return Err(Error::new(doing(), Errno::BADMSG).about(Subject::Image).with_hint(hint));
        }
        Err(error).doing(doing)
    }

    /// The device of this name, that `answer` is about; `None` where it is gone again.
    fn open_by(&self, name: &str, answer: &[u8]) -> Result<Option<VerifiedDevice>> {
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

/// The node of a device in /dev, which the kernel makes; `None` where it is gone again.
fn open(answer: &[u8]) -> Result<Option<VerifiedDevice>> {
    let device = u64::from(number(answer, DEVICE));
    let path = PathBuf::from(format!("/dev/dm-{}", minor(device)));
    let known = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let start = Instant::now();
    loop {
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                let opened = file.metadata().doing(|| format!("look at {}", path.display()))?.rdev();
                let is_it = (major(opened), minor(opened)) == (major(device), minor(device));
                return Ok(is_it.then(|| VerifiedDevice { path, _fd: file.into() }));
            }
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::NOENT) if !Path::new(&known).exists() => return Ok(None),
            Err(Errno::NOENT) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(10)),
            Err(errno) => {
                let error = Error::new(format!("open {}", path.display()), errno);
                return Err(error.with_hint("does the driver have the host's /dev?"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_known_by_the_mark_in_its_name() {
        let (mine, other) = (Tag::new("a.csi.dev"), Tag::new("b.csi.dev"));
        let name = name(12, &[0xab; 32], &mine);
        assert!(name.ends_with(&format!("-loop12-{}", "ab".repeat(32))) && name.len() < NAME_LENGTH);
        assert_eq!((read_name(&name, &mine), read_name(&name, &other)), (Some((12, [0xab; 32])), None));
    }

    #[test]
    fn an_answer_of_a_target_is_its_text() {
        let mut answer = vec![0; HEADER + TARGET];
        answer[DATA_START..DATA_START + 4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        answer.extend(b"C\0rest");
        assert_eq!(status(&answer), "C");
        assert_eq!(status(&[]), "");
    }
}
