//! Devices that the kernel makes of several paths, without a server: what is read, which path failed, and what becomes of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use csi_driver_squashfs::kernel::Error;
use csi_driver_squashfs::kernel::device_mapper::multipath::{change_paths, list, tell};
use csi_driver_squashfs::kernel::device_mapper::{Message, MultipathDevice, VerifiedDevice, sweep, verified};
use csi_driver_squashfs::kernel::image::Image;
use csi_driver_squashfs::kernel::loop_device::{self, LoopDevice, Purpose, Tag};
use csi_driver_squashfs::kernel::mount::Symlinks;
use csi_driver_squashfs::kernel::mountinfo;
use csi_driver_squashfs::kernel::verity;
use rustix::io::Errno;

use super::harness::image::Tree;
use super::harness::nfs_server::fresh_caches;
use super::harness::{run, wait_for};

/// An image and its copies, one for each server that there is not.
struct Copies {
    directory: tempfile::TempDir,
    tag: Tag,
}

impl Copies {
    /// Of an image with a file of 1 MiB that no compression makes smaller.
    fn new(of: &str) -> Self {
        let (directory, tree) = (tempfile::tempdir().unwrap(), Tree::new(&[]));
        let file = tree.path().join("file");
        run("dd", &["if=/dev/urandom", &format!("of={}", file.display()), "bs=1M", "count=1", "status=none"]);
        tree.squashfs(directory.path().join("image"));
        Copies { directory, tag: Tag::new(of) }
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    fn sectors(&self) -> u64 {
        fs::metadata(self.image()).unwrap().len() / 512
    }

    fn copy(&self, server: u8) -> PathBuf {
        let copy = self.directory.path().join(format!("copy-{server}"));
        fs::copy(self.image(), &copy).unwrap();
        copy
    }

    fn attach(&self, copy: &Path, server: u8, verified: bool) -> LoopDevice {
        let directory = File::open(self.directory.path()).unwrap();
        let name = copy.file_name().unwrap().to_str().unwrap();
        let image = Image::open_on_node(directory, name, Symlinks::Refused).unwrap();
        LoopDevice::of(&image, Purpose::Path { server, verified }, &self.tag).unwrap()
    }

    /// For each path whether it failed and whether it is read, and whether reads wait.
    fn state(&self) -> (Vec<(bool, bool)>, bool) {
        let [device] = &list(&self.tag).unwrap()[..] else { panic!("{:?}", list(&self.tag)) };
        (device.paths.iter().map(|path| (path.is_failed, path.is_current)).collect(), device.queues)
    }

    fn loop_devices(&self) -> Vec<u32> {
        loop_device::list(&self.tag).unwrap().iter().map(|attached| attached.device.number()).collect()
    }

    fn assert_nothing_left(&self) {
        wait_for("the devices to be gone", || {
            list(&self.tag).unwrap().is_empty()
                && verified::list(&self.tag).unwrap().is_empty()
                && self.loop_devices().is_empty()
        });
    }
}

/// The first so many sectors, from the device and not from memory.
fn read(device: &Path, sectors: u64) -> std::io::Result<Vec<u8>> {
    fresh_caches();
    let mut bytes = vec![0; sectors as usize * 512];
    File::open(device)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

const FAILED: (bool, bool) = (true, false);
const READ: (bool, bool) = (false, true);
const SPARE: (bool, bool) = (false, false);

#[test]
#[ignore = "needs the VM: make test-vm"]
fn reads_go_to_the_next_path_where_one_failed_and_wait_where_all_did_until_there_is_one() {
    let copies = Copies::new("multipath.test");
    let (tag, sectors, content) = (&copies.tag, copies.sectors(), fs::read(copies.image()).unwrap());
    let [first, second, third] = [0, 1, 2].map(|server| copies.attach(&copies.copy(server), server, false));
    let paths = [first.device(), second.device()];
    let (name, spare) = (first.number(), second.number());
    let device = MultipathDevice::on(name, &paths, sectors, tag).unwrap();
    let path = device.path().to_owned();
    assert_eq!(read(&path, sectors).unwrap(), content);
    assert_eq!(copies.state(), (vec![READ, SPARE], false));
    let listed = list(tag).unwrap().remove(0);
    assert_eq!((listed.loop_device, listed.device), (name, device.device()));
    // Who asks again gets the same one, and who wants others over this loop device none.
    assert_eq!(MultipathDevice::on(name, &paths, sectors, tag).unwrap().device(), device.device());
    let error = MultipathDevice::on(name, &[paths[1], paths[0]], sectors, tag).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY, "{error}");

    tell(name, Message::FailPath(paths[0]), tag).unwrap();
    assert_eq!(read(&path, sectors).unwrap(), content);
    assert_eq!(copies.state(), (vec![FAILED, READ], false));
    tell(name, Message::ReinstatePath(paths[0]), tag).unwrap();
    assert_eq!(copies.state(), (vec![SPARE, READ], false));
    tell(name, Message::SwitchGroup(1), tag).unwrap();
    assert_eq!(read(&path, sectors).unwrap(), content);
    assert_eq!(copies.state(), (vec![READ, SPARE], false));

    let mounted = copies.directory.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    run("mount", &["-t", "squashfs", "-o", "ro", path.to_str().unwrap(), mounted.to_str().unwrap()]);
    let table = mountinfo::read().unwrap();
    let mount = table.iter().find(|mount| mount.mount_point == mounted.display().to_string()).unwrap();
    assert_eq!((mount.device, mount.loop_device()), (device.device(), Some(name)));

    for path in paths {
        tell(name, Message::FailPath(path), tag).unwrap();
    }
    assert_eq!(copies.state(), (vec![FAILED, FAILED], false));
    assert!(read(&path, sectors).is_err());
    tell(name, Message::QueueIfNoPath, tag).unwrap();
    assert_eq!(copies.state(), (vec![FAILED, FAILED], true));
    let waits_until = |what: &dyn Fn()| {
        let path = path.clone();
        let reader = std::thread::spawn(move || read(&path, sectors).unwrap());
        std::thread::sleep(Duration::from_secs(1));
        assert!(!reader.is_finished());
        what();
        assert_eq!(reader.join().unwrap(), content);
    };
    waits_until(&|| tell(name, Message::ReinstatePath(paths[1]), tag).unwrap());
    assert_eq!(copies.state(), (vec![FAILED, READ], true));
    tell(name, Message::FailPath(paths[1]), tag).unwrap();
    drop(second);
    assert!(copies.loop_devices().contains(&spare));
    waits_until(&|| change_paths(name, &[paths[0], third.device()], true, tag).unwrap());
    assert_eq!(copies.state(), (vec![READ, SPARE], true));
    wait_for("the loop device of the path that went to be gone", || !copies.loop_devices().contains(&spare));
    change_paths(name, &[third.device(), paths[0]], false, tag).unwrap();
    assert_eq!(copies.state(), (vec![READ, SPARE], false));
    assert_eq!(list(tag).unwrap()[0].paths[0].device, third.device());
    assert_eq!(fs::read(mounted.join("file")).unwrap().len(), 1 << 20);

    // The mount alone is a user of all that is below.
    drop((device, first, third));
    sweep(tag).unwrap();
    fresh_caches();
    assert_eq!(fs::read(mounted.join("file")).unwrap().len(), 1 << 20);
    run("umount", &[mounted.to_str().unwrap()]);
    copies.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn a_path_with_other_bytes_than_its_root_hash_says_fails_and_the_next_is_read() {
    let copies = Copies::new("verified-multipath.test");
    let content = fs::read(copies.image()).unwrap();
    let root = verity::seal(&File::options().read(true).write(true).open(copies.image()).unwrap()).unwrap();
    let size = fs::metadata(copies.image()).unwrap().len();
    let (bad, good) = (copies.copy(0), copies.copy(1));
    let file = File::options().read(true).write(true).open(&bad).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 512 << 10).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 512 << 10).unwrap();
    file.sync_all().unwrap();
    let loops = [copies.attach(&bad, 0, true), copies.attach(&good, 1, true)];
    let on = |device: &LoopDevice| VerifiedDevice::on(device, size, &root, &copies.tag).unwrap();
    let devices = [on(&loops[0]), on(&loops[1])];
    let paths = [devices[0].device(), devices[1].device()];
    let sectors = content.len().next_multiple_of(4096) as u64 / 512;
    let device = MultipathDevice::on(loops[0].number(), &paths, sectors, &copies.tag).unwrap();
    assert_eq!(read(device.path(), content.len() as u64 / 512).unwrap(), content);
    assert_eq!(copies.state(), (vec![FAILED, READ], false));
    let corrupted: Vec<_> = verified::list(&copies.tag).unwrap();
    let corrupted: Vec<_> = corrupted.iter().filter(|it| it.is_corrupted).map(|it| it.loop_device).collect();
    assert_eq!(corrupted, [loops[0].number()]);
    assert_eq!(mountinfo::loop_device_below(rustix::fs::makedev(paths[1].0, paths[1].1)), Some(loops[1].number()));
    drop((loops, devices));
    assert_eq!(copies.loop_devices().len(), 2);
    drop(device);
    copies.assert_nothing_left();
}

#[test]
#[ignore = "needs the VM: make test-vm"]
fn what_cannot_be_is_told_and_leaves_nothing() {
    let copies = Copies::new("wrong-multipath.test");
    let (tag, sectors) = (&copies.tag, copies.sectors());
    let path = copies.attach(&copies.copy(0), 0, false);
    let number = path.number();
    let errno = |result: Result<(), Error>| result.unwrap_err().errno();
    let long = MultipathDevice::on(number, &[path.device()], sectors + 8, tag).map(drop).unwrap_err();
    assert_eq!(long.errno(), Errno::INVAL);
    assert!(
        long.to_string().contains(&format!("it has {sectors} sectors of 512 bytes, and {} are wanted", sectors + 8)),
        "{long}"
    );
    assert!(list(tag).unwrap().is_empty());
    assert_eq!(errno(tell(number, Message::QueueIfNoPath, tag)), Errno::NXIO);
    assert_eq!(errno(change_paths(number, &[path.device()], false, tag)), Errno::NXIO);
    let device = MultipathDevice::on(number, &[path.device()], sectors, tag).unwrap();
    assert_eq!(errno(tell(number, Message::SwitchGroup(2), tag)), Errno::INVAL);
    // One that is no path, and is too short for one.
    let short = copies.copy(1);
    File::options().write(true).open(&short).unwrap().set_len(4096).unwrap();
    let short = copies.attach(&short, 1, false);
    assert_eq!(errno(tell(number, Message::FailPath(short.device()), tag)), Errno::INVAL);
    assert_eq!(errno(change_paths(number, &[short.device()], true, tag)), Errno::INVAL);
    assert_eq!(errno(change_paths(number, &[(7, 4095)], true, tag)), Errno::NOENT);
    drop(short);
    wait_for("the short path to be gone", || copies.loop_devices() == [number]);
    assert_eq!(copies.state().0, [READ]);
    assert_eq!(read(device.path(), sectors).unwrap(), fs::read(copies.image()).unwrap());
    drop((device, path));
    copies.assert_nothing_left();
}
