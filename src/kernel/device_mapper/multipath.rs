//! Devices over several others that have the same bytes, each of which is read where those before it fail
//! (Documentation/admin-guide/device-mapper/dm-queue-length.rst has the table's grammar, drivers/md/dm-mpath.c all of it).
//!
//! Each path is a priority group of its own: one is read, and the next of them from the moment when a read of that fails. A path that
//! failed stays so until somebody says otherwise: the kernel does not try it. A daemon that looks after such devices, multipathd(8), leaves
//! them alone, as they have no UUID of its own kind.

use std::path::Path;
use std::time::Instant;

use rustix::io::Errno;

use super::{
    Command, Control, NOFLUSH, Opened, PATIENCE, SKIP_LOCKFS, STATUS_TABLE, Table, device_in, find_or_make, is_loaded,
    sectors, status,
};
use crate::kernel::error::{Doing, Error, Result};
use crate::kernel::loop_device::Tag;

/// What one reads in that lets each of its devices wait where every path failed.
const QUEUES: &str = "queue_if_no_path";
/// Between the mark and the number in a name.
const INFIX: &str = "-multipath-loop";

/// A device that reads as each of its paths does. Held open.
#[derive(Debug)]
pub struct MultipathDevice(Opened);

impl MultipathDevice {
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Its number, major and minor.
    pub fn device(&self) -> (u32, u32) {
        self.0.device
    }

    #[cfg(test)]
    pub(in crate::kernel) fn of_path(path: std::path::PathBuf, device: (u32, u32), fd: std::os::fd::OwnedFd) -> Self {
        MultipathDevice(Opened { path, device, _fd: fd })
    }

    /// The device over these paths in this order, of so many sectors of 512 bytes, which each path has at least; the loop device `first`
    /// gives it its name. The one that is there already, which goes on as it was told, or a new one: a read of that fails where every path
    /// fails, until it is told to wait ([`Message::QueueIfNoPath`]). No path is read.
    ///
    /// `EBUSY` where the one of this name has other paths and a user, `ENOENT` where a path is not there, `EINVAL` where one is too short, or the
    /// kernel has no such target.
    pub fn on(first: u32, paths: &[(u32, u32)], sectors: u64, tag: &Tag) -> Result<Self> {
        let control = Control::open()?;
        let name = name(first, tag);
        check_sizes(paths, sectors)?;
        let doing = |what: &str| format!("{what} the multipath device over {} ({name})", shown(paths));
        let find = || {
            let Some(opened) = control.open_device(&name)? else { return Ok(None) };
            // Of another, which is let go of here, and of which then nothing may be left.
            let is_it = control.ask(&name, 0)?.is_some_and(|told| {
                let found = read_status(&status(&told)).unwrap_or_default();
                found.iter().map(|path| path.device).eq(paths.iter().copied()) && super::sectors(&told) == sectors
            });
            Ok(is_it.then_some(opened))
        };
        let make = || {
            control.make(&name, &table(paths, sectors, false), &doing).map_err(|error| match error.errno() {
                Errno::BUSY => error.with_hint("a device of this name, over other paths, has a user"),
                _ => error,
            })
        };
        find_or_make(find, make).map(MultipathDevice)
    }
}

/// The device with this loop device in its name, if there is one.
pub fn find(loop_device: u32, tag: &Tag) -> Result<Option<MultipathDevice>> {
    Ok(Control::open()?.open_device(&name(loop_device, tag))?.map(MultipathDevice))
}

/// A device of the driver, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multipath {
    /// The one in its name: that of its first path when it was made.
    pub loop_device: u32,
    /// Its number, major and minor.
    pub device: (u32, u32),
    /// A read waits where every path failed.
    pub queues: bool,
    /// In the order in which they are tried.
    pub paths: Vec<PathState>,
}

/// A path, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathState {
    /// Major and minor.
    pub device: (u32, u32),
    /// A read of it failed, or somebody said so, and nobody said otherwise since.
    pub is_failed: bool,
    /// How often it did since the table was loaded.
    pub fails: u32,
    /// Reads go to it. Where the one that they went to failed, none is until the next read.
    pub is_current: bool,
}

/// What a device can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Not to read this path.
    FailPath((u32, u32)),
    /// To read this path again; what waits for one goes on.
    ReinstatePath((u32, u32)),
    /// To read this path from now on, counted from 1.
    SwitchGroup(u32),
    /// To let reads wait where every path failed.
    QueueIfNoPath,
    /// To fail reads where every path failed, those too that wait.
    FailIfNoPath,
}

impl Message {
    /// In the words of dm-mpath.c.
    pub fn text(self) -> String {
        match self {
            Message::FailPath((major, minor)) => format!("fail_path {major}:{minor}"),
            Message::ReinstatePath((major, minor)) => format!("reinstate_path {major}:{minor}"),
            Message::SwitchGroup(number) => format!("switch_group {number}"),
            Message::QueueIfNoPath => QUEUES.to_owned(),
            Message::FailIfNoPath => "fail_if_no_path".to_owned(),
        }
    }

    /// A `struct dm_target_msg`.
    fn bytes(self) -> Vec<u8> {
        let sector = 0u64.to_ne_bytes();
        [&sector[..], self.text().as_bytes(), &[0]].concat()
    }
}

/// The version of the kernel's dm-multipath, whose module is loaded if need be. The selector of paths, dm-round-robin, is built with it
/// (drivers/md/Makefile). Linux 5.4.
pub fn version() -> Result<String> {
    super::version("multipath")
}

/// All devices with this mark. Loads no module, and asks no server.
pub fn list(tag: &Tag) -> Result<Vec<Multipath>> {
    if !is_loaded() {
        return Ok(Vec::new());
    }
    let control = Control::open()?;
    let mut devices = Vec::new();
    for name in control.names()? {
        let Some(loop_device) = read_name(&name, tag) else { continue };
        // Gone meanwhile, or not complete.
        let (Some(told), Some(table)) = (control.ask(&name, 0)?, control.ask(&name, STATUS_TABLE)?) else { continue };
        let Some(paths) = read_status(&status(&told)) else { continue };
        devices.push(Multipath { loop_device, device: device_in(&told), queues: queues(&status(&table)), paths });
    }
    Ok(devices)
}

/// Tells the device with this loop device in its name something.
///
/// `ENXIO` where there is none, `EINVAL` where it has no such path.
pub fn tell(loop_device: u32, message: Message, tag: &Tag) -> Result<()> {
    let control = Control::open()?;
    let name = name(loop_device, tag);
    let start = Instant::now();
    loop {
        match control.call(Command::Message, &name, 0, &message.bytes()) {
            // Its table is being changed.
            Err(Errno::BUSY) if start.elapsed() < PATIENCE => super::wait_a_little(),
            told => return told.map(drop).doing(|| format!("tell {name} '{}'", message.text())),
        }
    }
}

/// Gives the device with this loop device in its name other paths, under whoever reads in it, and says whether reads wait where every one
/// failed. None of them counts as failed then, and the first is read. Waits for the reads that are under way on the old ones; the others
/// go to the new ones. Where it fails, all is as it was.
///
/// `ENXIO` where there is no such device, `ENOENT` where a path is not there, `EINVAL` where one is too short.
pub fn change_paths(loop_device: u32, paths: &[(u32, u32)], queue: bool, tag: &Tag) -> Result<()> {
    let control = Control::open()?;
    let name = name(loop_device, tag);
    let doing = |what: &str| format!("{what} {name} over {}", shown(paths));
    let told = control.ask(&name, 0)?.ok_or(Errno::NXIO).doing(|| format!("look at {name}"))?;
    let sectors = sectors(&told);
    check_sizes(paths, sectors)?;
    control.load(&name, &table(paths, sectors, queue), &doing)?;
    // Neither are reads that wait for a path failed, nor is the file system asked to write, which cannot.
    let resumed = control.call(Command::Resume, &name, NOFLUSH | SKIP_LOCKFS, &[]);
    if resumed.is_err() {
        // Else the table that nobody reads would keep the new paths from going, and the device might stay suspended (do_resume() in
        // dm-ioctl.c). The first error is the one to report.
        let _ = control.call(Command::ClearTable, &name, 0, &[]);
        let _ = control.call(Command::Resume, &name, 0, &[]);
    }
    resumed.map(drop).doing(|| doing("go on with"))
}

/// `csi-squashfs-0123abcd-multipath-loop3`: that of what verifies a loop device goes on with that, and has no such word.
fn name(loop_device: u32, tag: &Tag) -> String {
    format!("{}{INFIX}{loop_device}", tag.as_str().replace(':', "-"))
}

pub(super) fn read_name(read: &str, tag: &Tag) -> Option<u32> {
    loop_device_in(read).filter(|&loop_device| name(loop_device, tag) == read)
}

/// The number in the name of a multipath device, whichever driver's it is.
pub(super) fn loop_device_in(name: &str) -> Option<u32> {
    name.strip_prefix("csi-squashfs-")?.split_once(INFIX)?.1.parse().ok()
}

/// The kernel looks at the size of a path of a live device's new table when that is suspended already, and then leaves it so
/// (dm_swap_table() in dm.c): a process that were killed there would leave it to its readers.
fn check_sizes(paths: &[(u32, u32)], sectors: u64) -> Result<()> {
    for (major, minor) in paths {
        let doing = || format!("look for the path {major}:{minor}");
        let size = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")).doing(doing)?;
        let size: u64 = size.trim_end().parse().unwrap_or_default();
        if size < sectors {
            let error = Error::new(format!("read the path {major}:{minor} to its end"), Errno::INVAL);
            return Err(error.with_hint(format!("it has {size} sectors of 512 bytes, and {sectors} are wanted")));
        }
    }
    Ok(())
}

fn shown(paths: &[(u32, u32)]) -> String {
    paths.iter().map(|(major, minor)| format!("{major}:{minor}")).collect::<Vec<_>>().join(" ")
}

/// One group for each path, each with a selector that has no choice; the first is tried first.
fn table(paths: &[(u32, u32)], sectors: u64, queue: bool) -> Table {
    let features = if queue { format!("3 {QUEUES}") } else { "2".to_owned() };
    let groups = paths.iter().map(|(major, minor)| format!(" round-robin 0 1 0 {major}:{minor}")).collect::<String>();
    Table {
        target: "multipath",
        sectors,
        parameters: format!("{features} queue_mode bio 0 {} 1{groups}", paths.len()),
        hint: "does this kernel have dm-multipath? Try 'modprobe -a dm-multipath dm-round-robin' on the node",
    }
}

/// Whether the features that a table begins with have it that reads wait.
fn queues(table: &str) -> bool {
    let mut words = table.split(' ');
    let count = words.next().and_then(|count| count.parse().ok()).unwrap_or_default();
    words.take(count).any(|word| word == QUEUES)
}

/// The paths in a status (multipath_status() in dm-mpath.c); `None` where it is none.
fn read_status(status: &str) -> Option<Vec<PathState>> {
    let mut words = status.split_whitespace();
    // Features, then what a handler of hardware says.
    skip_group(&mut words)?;
    skip_group(&mut words)?;
    let (groups, current) = (count(&mut words)?, count(&mut words)?);
    let mut paths = Vec::new();
    for group in 1..=groups {
        let _state = words.next()?;
        skip_group(&mut words)?;
        let (members, arguments) = (count(&mut words)?, count(&mut words)?);
        for _ in 0..members {
            let (major, minor) = words.next()?.split_once(':')?;
            let device = (major.parse().ok()?, minor.parse().ok()?);
            let is_failed = words.next()? == "F";
            let fails = words.next()?.parse().ok()?;
            skip(&mut words, arguments)?;
            paths.push(PathState { device, is_failed, fails, is_current: group == current && !is_failed });
        }
    }
    Some(paths)
}

fn count<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<usize> {
    words.next()?.parse().ok()
}

fn skip<'a>(words: &mut impl Iterator<Item = &'a str>, count: usize) -> Option<()> {
    (0..count).try_for_each(|_| words.next().map(drop))
}

/// Words behind their number.
fn skip_group<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<()> {
    let words_in_it = count(words)?;
    skip(words, words_in_it)
}

#[cfg(test)]
mod tests {
    use super::super::{NAME_LENGTH, verified};
    use super::*;

    #[test]
    fn a_device_is_known_by_the_mark_in_its_name_and_none_that_verifies_is_one() {
        let (mine, other) = (Tag::new("a.csi.dev"), Tag::new("b.csi.dev"));
        let multipath = name(12, &mine);
        assert!(multipath.ends_with("-multipath-loop12") && multipath.len() < NAME_LENGTH);
        assert_eq!((read_name(&multipath, &mine), read_name(&multipath, &other)), (Some(12), None));
        assert_eq!(loop_device_in(&multipath), Some(12));
        assert_eq!(verified::read_name(&multipath, &mine), None);
        let verified = multipath.replace(INFIX, "-loop") + "-" + &"ab".repeat(32);
        assert!(verified::read_name(&verified, &mine).is_some());
        assert_eq!((read_name(&verified, &mine), loop_device_in(&verified)), (None, None));
        for strange in
            ["mpatha", "other-multipath-loop3", "csi-squashfs-multipath-loop3", "csi-squashfs-0123abcd-multipath-loop"]
        {
            assert_eq!((read_name(strange, &mine), loop_device_in(strange).is_some_and(|n| n != 3)), (None, false));
        }
    }

    #[test]
    fn each_path_is_a_group_of_its_own_and_reads_wait_only_where_that_is_said() {
        let paths = [(7, 3), (253, 11)];
        let groups = "round-robin 0 1 0 7:3 round-robin 0 1 0 253:11";
        let made = table(&paths, 2048, false);
        assert_eq!(made.parameters, format!("2 queue_mode bio 0 2 1 {groups}"));
        assert_eq!(table(&paths, 2048, true).parameters, format!("3 queue_if_no_path queue_mode bio 0 2 1 {groups}"));
        let bytes = made.bytes();
        assert_eq!((&bytes[8..16], &bytes[24..34]), (&2048u64.to_ne_bytes()[..], &b"multipath\0"[..]));
        assert!(bytes.ends_with(b" 253:11\0"));
    }

    #[test]
    fn whether_reads_wait_is_read_from_the_features_of_the_table() {
        for queue in [false, true] {
            assert_eq!(queues(&table(&[(7, 3)], 8, queue).parameters), queue);
        }
        assert!(queues("5 queue_if_no_path pg_init_retries 3 queue_mode bio 0 1 1 round-robin 0 1 1 7:3 1 "));
        for other in ["", "0 0 0 0", "2 queue_mode bio 1 queue_if_no_path 0 0"] {
            assert!(!queues(other), "{other}");
        }
    }

    fn states(status: &str) -> Option<Vec<(u32, char, u32)>> {
        let state = |path: PathState| match (path.is_failed, path.is_current) {
            (true, false) => 'F',
            (false, true) => 'C',
            (false, false) => 'A',
            (true, true) => unreachable!(),
        };
        Some(read_status(status)?.into_iter().map(|path| (path.device.1, state(path.clone()), path.fails)).collect())
    }

    #[test]
    fn a_status_says_which_paths_failed_and_which_is_read() {
        // Nothing was read yet; then the first is read; then it failed, and the second is.
        let paths = states("2 0 0 0 2 1 E 0 1 0 7:3 A 0 E 0 1 0 7:4 A 0 ");
        assert_eq!(paths.unwrap(), [(3, 'C', 0), (4, 'A', 0)]);
        let paths = states("2 0 0 0 2 1 A 0 1 0 7:3 A 0 E 0 1 0 7:4 A 0 ");
        assert_eq!(paths.unwrap(), [(3, 'C', 0), (4, 'A', 0)]);
        let paths = states("2 0 0 0 2 2 E 0 1 0 7:3 F 2 A 0 1 0 7:4 A 1 ");
        assert_eq!(paths.unwrap(), [(3, 'F', 2), (4, 'C', 1)]);
        // All failed, and none is read.
        let paths = states("2 1 0 0 2 2 E 0 1 0 7:3 F 1 A 0 1 0 7:4 F 1 ");
        assert_eq!(paths.unwrap(), [(3, 'F', 1), (4, 'F', 1)]);
        // Arguments of a selector, and two paths in a group.
        let paths = states("2 0 0 1 alua 1 1 D 1 x 2 2 8:16 A 0 1 2 8:32 F 1 3 4 ");
        assert_eq!(paths.unwrap(), [(16, 'C', 0), (32, 'F', 1)]);
        assert_eq!(states("0 0 0 0"), Some(Vec::new()));
    }

    #[test]
    fn what_is_no_status_is_none() {
        for broken in ["", "V", "2 0", "2 0 0 0 2 1 A 0 1 0 7:3 A", "2 0 0 0 1 1 A 0 1 0 loop3 A 0", "99999999999 1"] {
            assert_eq!(states(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_message_is_in_the_kernel_s_words() {
        let texts = [
            (Message::FailPath((7, 3)), "fail_path 7:3"),
            (Message::ReinstatePath((253, 0)), "reinstate_path 253:0"),
            (Message::SwitchGroup(2), "switch_group 2"),
            (Message::QueueIfNoPath, "queue_if_no_path"),
            (Message::FailIfNoPath, "fail_if_no_path"),
        ];
        for (message, text) in texts {
            assert_eq!(message.text(), text);
            assert_eq!(message.bytes(), [&[0; 8], text.as_bytes(), &[0]].concat());
        }
    }
}
