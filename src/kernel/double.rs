//! A kernel for unit tests: it writes down what it is asked to change, and its mounts are directories, reached by symlinks in the
//! place of mount points. It needs no root.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{PipeReader, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::device_mapper::{Message, Multipath, MultipathDevice, PathState, Verified, VerifiedDevice};
use super::image::{Image, ImageIdentity};
use super::loop_device::{Attached, LoopDevice, MAJOR, Purpose, Reads, Tag};
use super::mount::{DetachedMount, MountAttrFlags, NewMount, open_directory};
use super::mountinfo::MountInfo;
use super::mountstats::NfsCounters;
use super::transport::Transport;
use super::verity::{RootHash, Tree, hexadecimal};
use super::{Doing, Error, Kernel, Result, Subject, errno_of};
use crate::lock::lock;

/// See the module. All that it makes goes with it.
pub struct Double {
    directory: tempfile::TempDir,
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    log: Vec<String>,
    refusals: Vec<(String, Errno)>,
    held: Vec<String>,
    /// What is attached where, the uppermost last.
    mounts: Vec<(PathBuf, String)>,
    loop_devices: BTreeMap<u32, Loop>,
    /// The numbers of those that are about to be.
    taken: BTreeSet<u32>,
    file_systems: u32,
    ignores_read_only: bool,
    merged_with: Option<(String, String)>,
    is_corrupted: bool,
    /// Loop devices of which nothing is read, although somebody reads.
    stalled: BTreeSet<u32>,
    multipath: Vec<OverPaths>,
}

/// The major numbers of devices whose minor number is that of their loop device.
const VERIFIED: u32 = 253;
const MULTIPATH: u32 = 254;

/// A multipath device.
struct OverPaths {
    tag: Tag,
    multipath: Multipath,
    sectors: u64,
    /// A user of each loop device below.
    _below: Vec<OwnedFd>,
    users: PipeReader,
}

struct Loop {
    tag: Tag,
    identity: ImageIdentity,
    purpose: Purpose,
    root: RootHash,
    file: File,
    /// At its end when nobody has the device open.
    users: PipeReader,
}

impl Loop {
    /// One more user.
    fn open(&self) -> Result<OwnedFd> {
        one_more_of(&self.users)
    }
}

fn one_more_of(users: &PipeReader) -> Result<OwnedFd> {
    let users = format!("/proc/self/fd/{}", users.as_raw_fd());
    let opened = std::fs::OpenOptions::new().write(true).open(users);
    Ok(opened.doing(|| "open a pipe again".into())?.into())
}

impl Multipath {
    fn new_of(loop_device: u32, paths: &[(u32, u32)], queues: bool) -> Self {
        let path = |(index, &device)| PathState { device, is_failed: false, fails: 0, is_current: index == 0 };
        let paths = paths.iter().enumerate().map(path).collect();
        Multipath { loop_device, device: (MULTIPATH, loop_device), queues, paths }
    }

    fn is_over(&self, paths: &[(u32, u32)]) -> bool {
        self.paths.iter().map(|path| path.device).eq(paths.iter().copied())
    }

    fn path(&mut self, device: (u32, u32)) -> Option<&mut PathState> {
        self.paths.iter_mut().find(|path| path.device == device)
    }

    /// Does what it is told, if it has such a path.
    fn apply(&mut self, message: Message) -> bool {
        match message {
            Message::FailPath(device) => {
                let Some(path) = self.path(device) else { return false };
                path.fails += u32::from(!path.is_failed);
                (path.is_failed, path.is_current) = (true, false);
            }
            Message::ReinstatePath(device) => {
                let Some(path) = self.path(device) else { return false };
                path.is_failed = false;
            }
            Message::SwitchGroup(number) => {
                if number == 0 || self.paths.len() < number as usize {
                    return false;
                }
                for (path, at) in self.paths.iter_mut().zip(1..) {
                    path.is_current = at == number && !path.is_failed;
                }
            }
            Message::QueueIfNoPath => self.queues = true,
            Message::FailIfNoPath => self.queues = false,
        }
        true
    }

    /// A read chooses the first path that has not failed, where none is current.
    fn read(&mut self) {
        if !self.paths.iter().any(|path| path.is_current)
            && let Some(path) = self.paths.iter_mut().find(|path| !path.is_failed)
        {
            path.is_current = true;
        }
    }
}

impl Double {
    pub fn new() -> Arc<Self> {
        let directory = tempfile::tempdir().unwrap();
        for name in ["export", "namespace"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Arc::new(Double { directory, state: Mutex::default(), released: Condvar::new() })
    }

    /// What every export of every server shows.
    pub fn export(&self) -> PathBuf {
        self.directory.path().join("export")
    }

    /// What the exports of one server show from now on: nothing at first.
    pub fn export_of(&self, host: &str) -> PathBuf {
        let own = self.directory.path().join(format!("export-{host}"));
        std::fs::create_dir_all(&own).unwrap();
        own
    }

    /// What was changed since this was last asked, a line for each call. Paths of the double's own are relative to it.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.state).log)
    }

    /// Calls whose line contains this fail until [`Self::allow`].
    pub fn refuse(&self, line: &str, errno: Errno) {
        lock(&self.state).refusals.push((line.to_owned(), errno));
    }

    pub fn allow(&self) {
        lock(&self.state).refusals.clear();
    }

    /// Calls whose line contains this wait until [`Self::release`].
    pub fn hold(&self, line: &str) {
        lock(&self.state).held.push(line.to_owned());
    }

    pub fn release(&self) {
        lock(&self.state).held.clear();
        self.released.notify_all();
    }

    /// From now on a mount that is to be read-only gets the writable superblock of another, as NFS does in Linux 6.13.
    pub fn ignore_read_only(&self) {
        lock(&self.state).ignores_read_only = true;
    }

    /// From now on each server passes for the one at this address, as NFS 4 servers do that say so, with versions that begin so.
    pub fn merge_with(&self, address: &str, version: &str) {
        lock(&self.state).merged_with = Some((address.to_owned(), format!("(nfs {version}")));
    }

    /// From now on reads of this loop device get no answer.
    pub fn stall(&self, number: u32) {
        lock(&self.state).stalled.insert(number);
    }

    /// From now on something was read of each verified device that did not fit.
    pub fn corrupt(&self) {
        lock(&self.state).is_corrupted = true;
    }

    /// What is left in the driver's namespace: mounts, and mount points.
    pub fn left_in_namespace(&self) -> Vec<PathBuf> {
        let namespace = self.directory.path().join("namespace");
        std::fs::read_dir(namespace).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Takes a mount off behind the driver's back.
    pub fn take_off(&self, path: &Path) {
        let mut state = lock(&self.state);
        let before = state.mounts.len();
        state.mounts.retain(|(at, _)| at != path);
        if state.mounts.len() < before {
            std::fs::remove_file(path).unwrap();
            std::fs::create_dir(path).unwrap();
        }
    }

    /// From now on reads of this path of a multipath device fail, and go to the next one that does not, if there is one.
    pub fn fail_path(&self, path: (u32, u32)) {
        for device in &mut lock(&self.state).multipath {
            device.multipath.apply(Message::FailPath(path));
            device.multipath.read();
        }
    }

    /// The numbers of the loop devices that somebody has open.
    pub fn live_loop_devices(&self) -> Vec<u32> {
        let mut state = lock(&self.state);
        state.multipath.retain(|device| is_used(&device.users));
        state.loop_devices.retain(|_, device| is_used(&device.users));
        state.loop_devices.keys().copied().collect()
    }

    fn call(&self, line: String, subject: Subject) -> Result<()> {
        let line = line.replace(&format!("{}/", self.directory.path().display()), "");
        let mut state = lock(&self.state);
        state.log.push(line.clone());
        while state.held.iter().any(|held| line.contains(held)) {
            state = self.released.wait(state).unwrap();
        }
        match state.refusals.iter().find(|(refused, _)| line.contains(refused)) {
            Some((_, errno)) => Err(Error::new(line, *errno).about(subject)),
            None => Ok(()),
        }
    }
}

impl State {
    /// A user of the loop device below each path.
    fn open_below(&self, paths: &[(u32, u32)]) -> Result<Vec<OwnedFd>> {
        let open = |(major, number): &(u32, u32)| {
            let found = self.loop_devices.get(number).filter(|_| [MAJOR, VERIFIED].contains(major));
            found.ok_or(Errno::NODEV).doing(|| format!("find the path {major}:{number}"))?.open()
        };
        paths.iter().map(open).collect()
    }

    fn multipath_on(&mut self, loop_device: u32, tag: &Tag) -> Result<&mut OverPaths> {
        let found = self.multipath.iter_mut().find(|it| it.multipath.loop_device == loop_device && it.tag == *tag);
        found.ok_or(Errno::NXIO).doing(|| format!("find the multipath device of loop{loop_device}"))
    }
}

impl Kernel for Double {
    fn mount(&self, new: NewMount) -> Result<DetachedMount> {
        let options = new.options.iter().map(|(key, value)| match value {
            Some(value) => format!("{key}={value}"),
            None => key.clone(),
        });
        let options = options.collect::<Vec<_>>().join(",");
        self.call(format!("mount {} {options} [{}]", new.fs_type, names(new.attributes)), new.subject)?;
        let directory = match new.fs_type {
            "nfs" | "nfs4" => {
                let source =
                    new.options.iter().find(|(key, _)| key == "source").and_then(|(_, value)| value.as_deref());
                let host = source.and_then(|source| source.rsplit_once(":/")).map_or("", |(host, _)| host);
                let own = self.directory.path().join(format!("export-{host}"));
                if own.is_dir() { own } else { self.export() }
            }
            _ => {
                let mut state = lock(&self.state);
                state.file_systems += 1;
                let directory = self.directory.path().join(format!("file-system-{}", state.file_systems));
                std::fs::create_dir(&directory).unwrap();
                directory
            }
        };
        Ok(DetachedMount::new(open_directory(&directory)?, new.what))
    }

    fn bind(&self, directory: BorrowedFd<'_>, recursive: bool, attributes: MountAttrFlags) -> Result<DetachedMount> {
        let path = path_of(directory);
        let how = if recursive { "bind recursively" } else { "bind" };
        self.call(format!("{how} {} [{}]", path.display(), names(attributes)), Subject::Node)?;
        Ok(DetachedMount::new(open_directory(&path)?, "directory".into()))
    }

    fn super_options(&self, mount: &DetachedMount) -> Result<String> {
        let state = lock(&self.state);
        let mode = if state.ignores_read_only { "rw" } else { "ro" };
        // `host:/path (nfs 4.2, sec=krb5, ADDRESS)`
        let (_, inside) = mount.what().rsplit_once('(').unwrap_or_default();
        let words: Vec<_> = inside.trim_end_matches(')').split(", ").collect();
        let [_version, protection @ .., address] = &words[..] else { return Ok(mode.to_owned()) };
        Ok(match state.merged_with.as_ref().filter(|(_, merged)| mount.what().contains(merged)) {
            Some((other, _)) => format!("{mode},sec=sys,addr={other}"),
            None => format!("{mode},{},addr={address}", protection.join(",")),
        })
    }

    fn restrict(&self, mount: &DetachedMount, attributes: MountAttrFlags) -> Result<()> {
        self.call(format!("restrict {} [{}]", mount.what(), names(attributes)), Subject::Node)
    }

    fn attach(&self, mount: &DetachedMount, directory: BorrowedFd<'_>) -> Result<()> {
        let path = path_of(directory);
        self.call(format!("attach {} at {}", mount.what(), path.display()), Subject::Node)?;
        std::fs::remove_dir(&path).doing(|| "put a symlink in the place of a mount point".into())?;
        std::os::unix::fs::symlink(path_of(mount.as_fd()), &path).unwrap();
        lock(&self.state).mounts.push((path, mount.what().to_owned()));
        Ok(())
    }

    fn unmount_all(&self, path: &Path) -> Result<()> {
        let path = std::path::absolute(path).unwrap();
        self.call(format!("unmount {}", path.display()), Subject::Node)?;
        self.take_off(&path);
        Ok(())
    }

    fn abort_calls(&self, path: &Path) -> Result<()> {
        self.call(format!("end the calls of {}", path.display()), Subject::Server)
    }

    fn is_mount(&self, path: &Path) -> Result<bool> {
        Ok(lock(&self.state).mounts.iter().any(|(at, _)| at == path))
    }

    fn mounts(&self) -> Result<Vec<MountInfo>> {
        let describe = |(path, what): &(PathBuf, String)| {
            let device = what.rsplit_once("/dev/loop").map_or((0, 50), |(_, number)| (MAJOR, number.parse().unwrap()));
            MountInfo {
                id: 1,
                parent: 0,
                device,
                mount_point: path.display().to_string(),
                options: "rw".into(),
                shared: true,
                fs_type: what.split(' ').next().unwrap().to_owned(),
                source: "test.csi.dev".into(),
                super_options: String::new(),
            }
        };
        Ok(lock(&self.state).mounts.iter().map(describe).collect())
    }

    fn scratch(&self, path: &Path, size: u64) -> Result<DetachedMount> {
        let name = path.file_name().unwrap().display();
        self.call(format!("mount {name} of {size} bytes"), Subject::Node)?;
        let directory = path.with_extension("mounted");
        std::fs::create_dir_all(&directory).unwrap();
        Ok(DetachedMount::new(open_directory(&directory)?, "a scratch file system".into()))
    }

    fn set_read_ahead(&self, mount: &DetachedMount, kib: u32) -> Result<()> {
        self.call(format!("set the read-ahead of {} to {kib}", mount.what()), Subject::Node)
    }

    fn loop_device(&self, image: &Image, purpose: Purpose, tag: &Tag) -> Result<LoopDevice> {
        let live = self.live_loop_devices();
        let of = (image.identity, purpose);
        let is_it = |device: &&Loop| device.tag == *tag && (device.identity, device.purpose) == of;
        if let Some((number, device)) = lock(&self.state).loop_devices.iter().find(|(_, device)| is_it(device)) {
            return Ok(LoopDevice::of_number(*number, device.open()?));
        }
        let (reader, writer) = pipe().doing(|| "make a pipe".into())?;
        let number = {
            let mut state = lock(&self.state);
            let last = live.last().into_iter().chain(state.taken.last()).chain(state.loop_devices.keys().last());
            let number = last.max().map_or(0, |last| last + 1);
            state.taken.insert(number);
            number
        };
        let part = match purpose {
            Purpose::FileSystem | Purpose::Verity | Purpose::Path { .. } => String::new(),
            Purpose::Sif => image.partition().map(|part| format!("{} bytes at {} of ", part.size, part.offset))?,
        };
        let called = self.call(format!("loop{number}: {part}an image of {} bytes", image.identity.size), Subject::Node);
        let mut state = lock(&self.state);
        state.taken.remove(&number);
        called?;
        let file = image.file.try_clone().unwrap();
        let device = Loop { tag: tag.clone(), identity: image.identity, purpose, root: [0; 32], file, users: reader };
        state.loop_devices.insert(number, device);
        Ok(LoopDevice::of_number(number, writer.into()))
    }

    /// A device whose path ends with that of its loop device: see [`Kernel::mounts`].
    fn verified_device(&self, device: &LoopDevice, size: u64, root: &RootHash, _: &Tag) -> Result<VerifiedDevice> {
        let number = device.number();
        self.call(format!("loop{number}: verified by {}", hexadecimal(&root[..4])), Subject::Image)?;
        let file = {
            let mut state = lock(&self.state);
            let device = state.loop_devices.get_mut(&number).unwrap();
            device.root = *root;
            device.file.try_clone().unwrap()
        };
        Tree::find(&file, size)?;
        let users = lock(&self.state).loop_devices[&number].open()?;
        Ok(VerifiedDevice::of_path(format!("/dev/verified/dev/loop{number}").into(), (VERIFIED, number), users))
    }

    fn verified_devices(&self, _: &Tag) -> Result<Vec<Verified>> {
        let live = self.live_loop_devices();
        let state = lock(&self.state);
        let devices =
            state.loop_devices.iter().filter(|(number, device)| live.contains(number) && device.purpose.is_verified());
        let describe = |(&loop_device, device): (&u32, &Loop)| Verified {
            device: (VERIFIED, loop_device),
            loop_device,
            root: device.root,
            is_corrupted: state.is_corrupted,
        };
        Ok(devices.map(describe).collect())
    }

    /// A device whose path ends with that of its first loop device: see [`Kernel::mounts`].
    fn multipath_device(&self, first: u32, paths: &[(u32, u32)], sectors: u64, tag: &Tag) -> Result<MultipathDevice> {
        self.call(format!("loop{first}: multipath over {} of {sectors} sectors", shown(paths)), Subject::Node)?;
        self.live_loop_devices();
        let mut state = lock(&self.state);
        let opened = |users| {
            let path = format!("/dev/multipath/dev/loop{first}");
            MultipathDevice::of_path(path.into(), (MULTIPATH, first), users)
        };
        if let Some(found) = state.multipath.iter().find(|it| it.multipath.loop_device == first && it.tag == *tag) {
            if !found.multipath.is_over(paths) || found.sectors != sectors {
                return Err(Error::new(format!("make the multipath device over {}", shown(paths)), Errno::BUSY));
            }
            return one_more_of(&found.users).map(opened);
        }
        let below = state.open_below(paths)?;
        let (users, writer) = pipe().doing(|| "make a pipe".into())?;
        let multipath = Multipath::new_of(first, paths, false);
        state.multipath.push(OverPaths { tag: tag.clone(), multipath, sectors, _below: below, users });
        Ok(opened(writer.into()))
    }

    fn find_multipath_device(&self, first: u32, tag: &Tag) -> Result<Option<MultipathDevice>> {
        self.live_loop_devices();
        let state = lock(&self.state);
        let found = state.multipath.iter().find(|it| it.multipath.loop_device == first && it.tag == *tag);
        let open = |it: &OverPaths| {
            let path = format!("/dev/multipath/dev/loop{first}");
            Ok(MultipathDevice::of_path(path.into(), (MULTIPATH, first), one_more_of(&it.users)?))
        };
        found.map(open).transpose()
    }

    fn multipath_devices(&self, tag: &Tag) -> Result<Vec<Multipath>> {
        self.live_loop_devices();
        let state = lock(&self.state);
        Ok(state.multipath.iter().filter(|it| it.tag == *tag).map(|it| it.multipath.clone()).collect())
    }

    fn tell_multipath(&self, loop_device: u32, message: Message, tag: &Tag) -> Result<()> {
        let line = format!("loop{loop_device}: {}", message.text());
        self.call(line.clone(), Subject::Node)?;
        self.live_loop_devices();
        match lock(&self.state).multipath_on(loop_device, tag)?.multipath.apply(message) {
            true => Ok(()),
            false => Err(Error::new(line, Errno::INVAL)),
        }
    }

    fn change_paths(&self, loop_device: u32, paths: &[(u32, u32)], queue: bool, tag: &Tag) -> Result<()> {
        let waits = if queue { "waiting" } else { "failing" };
        self.call(format!("loop{loop_device}: other paths {}, {waits}", shown(paths)), Subject::Node)?;
        self.live_loop_devices();
        let mut state = lock(&self.state);
        let below = state.open_below(paths)?;
        let device = state.multipath_on(loop_device, tag)?;
        device.multipath = Multipath::new_of(loop_device, paths, queue);
        device._below = below;
        Ok(())
    }

    fn sweep_mapped(&self, _: &Tag) -> Result<()> {
        Ok(())
    }

    fn change_backing(&self, device: &LoopDevice, copy: &Image) -> Result<()> {
        let number = device.number();
        self.call(format!("loop{number}: another file of {} bytes", copy.identity.size), Subject::Node)?;
        let mut state = lock(&self.state);
        let device = state.loop_devices.get_mut(&number).unwrap();
        (device.identity, device.file) = (copy.identity, copy.file.try_clone().unwrap());
        Ok(())
    }

    fn loop_devices(&self, tag: &Tag) -> Result<Vec<Attached>> {
        let live = self.live_loop_devices();
        let state = lock(&self.state);
        let devices = state.loop_devices.iter().filter(|(number, device)| live.contains(number) && device.tag == *tag);
        let describe = |(number, device): (&u32, &Loop)| {
            let (identity, purpose) = (device.identity, device.purpose);
            let opened = LoopDevice::of_number(*number, device.open()?);
            let backing_file = Some(path_of(device.file.as_fd()).display().to_string());
            let reads = Reads { under_way: state.stalled.contains(number).into(), ..Reads::default() };
            Ok(Attached { device: opened, identity, purpose, backing_file, reads })
        };
        devices.map(describe).collect()
    }

    fn nfs_counters(&self) -> Result<Vec<NfsCounters>> {
        Ok(Vec::new())
    }

    fn transports(&self) -> Result<Vec<Transport>> {
        Ok(Vec::new())
    }

    fn run_in_namespace(&self, work: &mut (dyn FnMut() + Send)) -> Result<()> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // SAFETY: the new thread alone gets a current directory of its own, for which no privilege is needed.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.doing(|| "unshare".into())?;
                let root = self.directory.path().join("namespace");
                std::env::set_current_dir(root).map_err(|error| Error::new("enter", errno_of(&error)))?;
                work();
                Ok(())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn is_used(users: &PipeReader) -> bool {
    let mut fds = [PollFd::new(users, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap();
    !fds[0].revents().contains(PollFlags::HUP)
}

fn path_of(directory: BorrowedFd<'_>) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd())).unwrap()
}

fn shown(paths: &[(u32, u32)]) -> String {
    paths.iter().map(|(major, minor)| format!("{major}:{minor}")).collect::<Vec<_>>().join(" ")
}

/// In the words of mount(8).
fn names(attributes: MountAttrFlags) -> String {
    let known = [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, "ro"),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, "nosuid"),
        (MountAttrFlags::MOUNT_ATTR_NODEV, "nodev"),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, "noexec"),
    ];
    let set = known.into_iter().filter(|(flag, _)| attributes.contains(*flag));
    set.map(|(_, name)| name).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::super::mount::Symlinks;
    use super::*;

    #[test]
    fn its_multipath_devices_do_as_the_kernel_s() {
        let (kernel, tag) = (Double::new(), Tag::new("test.csi.dev"));
        let image = |name: &str| {
            std::fs::write(kernel.export().join(name), name).unwrap();
            Image::open(File::open(kernel.export()).unwrap(), name, Symlinks::Refused).unwrap()
        };
        let purpose = |server| Purpose::Path { server, verified: false };
        let first = kernel.loop_device(&image("a"), purpose(0), &tag).unwrap();
        let second = kernel.loop_device(&image("b"), purpose(1), &tag).unwrap();
        let paths = [first.device(), second.device()];
        let device = kernel.multipath_device(first.number(), &paths, 8, &tag).unwrap();
        let state = || {
            let listed = kernel.multipath_devices(&tag).unwrap().remove(0);
            let path = |path: &PathState| (path.is_failed, path.fails, path.is_current);
            (listed.paths.iter().map(path).collect::<Vec<_>>(), listed.queues)
        };
        assert_eq!(state(), (vec![(false, 0, true), (false, 0, false)], false));
        kernel.fail_path(paths[0]);
        kernel.tell_multipath(first.number(), Message::QueueIfNoPath, &tag).unwrap();
        assert_eq!(state(), (vec![(true, 1, false), (false, 0, true)], true));
        kernel.tell_multipath(first.number(), Message::ReinstatePath(paths[0]), &tag).unwrap();
        kernel.tell_multipath(first.number(), Message::SwitchGroup(1), &tag).unwrap();
        assert_eq!(state(), (vec![(false, 1, true), (false, 0, false)], true));
        let error = kernel.tell_multipath(first.number(), Message::FailPath((7, 99)), &tag).unwrap_err();
        assert_eq!(error.errno(), Errno::INVAL);
        assert_eq!(kernel.multipath_device(first.number(), &paths[1..], 8, &tag).unwrap_err().errno(), Errno::BUSY);
        // What it stands on stays as long as it does.
        drop((first, second));
        assert_eq!(kernel.live_loop_devices(), [0, 1]);
        kernel.change_paths(0, &paths[..1], false, &tag).unwrap();
        assert_eq!((state(), kernel.live_loop_devices()), ((vec![(false, 0, true)], false), vec![0]));
        drop(device);
        assert_eq!(kernel.live_loop_devices(), [0; 0]);
        assert!(kernel.multipath_devices(&tag).unwrap().is_empty());
    }
}
