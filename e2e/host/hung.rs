//! A file system of the node that answers no more, as a parallel one whose servers are gone: what does not lie on it goes on.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tonic::Code;

use crate::Images;
use crate::harness::image::Tree;
use crate::harness::node::in_time;
use crate::harness::{Driver, Volume};

/// A file system (FUSE) with one file, `image.sqsh`, of which the kernel keeps no attributes: it asks each time.
struct Remote {
    path: PathBuf,
    hangs: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Remote {
    fn mount(path: PathBuf, content: File) -> Self {
        std::fs::create_dir(&path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        mount("remote", &path, "fuse.remote", MountFlags::empty(), Some(options.as_c_str())).unwrap();
        let hangs = Arc::new(AtomicBool::new(false));
        let hang = Arc::clone(&hangs);
        let server = std::thread::spawn(move || serve(device, &content, &hang));
        Remote { path, hangs, server: Some(server) }
    }

    fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }

    fn answer(&self) {
        self.hangs.store(false, Ordering::Relaxed);
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.answer();
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        if let Some(server) = self.server.take().filter(|_| !std::thread::panicking()) {
            server.join().unwrap();
        }
    }
}

/// Answers until nobody uses the file system any more (include/uapi/linux/fuse.h).
fn serve(mut device: File, content: &File, hangs: &AtomicBool) {
    let size = content.metadata().unwrap().len();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_ne_bytes()).collect::<Vec<_>>();
    let attributes = |inode: u64| {
        let (size, mode) = if inode == 1 { (0, 0o40755) } else { (size, 0o100_644) };
        [longs(&[inode, size, 8, 1, 1, 1]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
    };
    let mut request = vec![0; 1 << 20];
    while let Ok(length) = device.read(&mut request) {
        while hangs.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let number = |at: usize, bytes: usize| {
            request[at..at + bytes].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        };
        let (inode, body) = (number(16, 8), &request[40..length]);
        let answer = match number(4, 4) {
            // INIT: protocol 7.31.
            26 => Ok([words(&[7, 31, 131_072, 0, 12 | 10 << 16, 131_072, 1]), vec![0; 36]].concat()),
            // LOOKUP
            1 if inode == 1 && body.starts_with(b"image.sqsh\0") => {
                Ok([longs(&[2, 0, 0, 0]), words(&[0, 0]), attributes(2)].concat())
            }
            1 => Err(libc::ENOENT),
            // GETATTR
            3 => Ok([longs(&[0, 0]), attributes(inode)].concat()),
            // OPEN, OPENDIR
            14 | 27 => Ok(longs(&[0, 0])),
            // READ
            15 => {
                let mut bytes = vec![0; number(56, 4) as usize];
                let length = content.read_at(&mut bytes, number(48, 8)).unwrap();
                bytes.truncate(length);
                Ok(bytes)
            }
            // RELEASE, RELEASEDIR, FLUSH
            18 | 29 | 25 => Ok(Vec::new()),
            // FORGET, BATCH_FORGET: not answered.
            2 | 42 => continue,
            _ => Err(libc::ENOSYS),
        };
        let (error, data) = answer.map_or_else(|errno| (-errno, Vec::new()), |data| (0, data));
        let head = [words(&[16 + data.len() as u32, error as u32]), longs(&[number(8, 8)])].concat();
        // Who asked may have been killed.
        let _ = device.write_all(&[head, data].concat());
    }
}

fn volume(id: &str, directory: &Path, image: &str) -> Volume {
    Volume::flat(id, &[("hostPath", directory.to_str().unwrap()), ("image", image)])
}

#[test]
#[ignore = "needs root: make test-host"]
fn while_a_file_system_of_the_node_hangs_with_an_image_all_other_volumes_go_on() {
    let images = Images::new();
    for name in ["local", "later"] {
        images.image(name);
    }
    let directory = images.path("");
    let driver = Driver::start_with(&["--timeout=8"], Some(&format!("hostPaths: [{}]", directory.display())));
    let content = Tree::new(&[("file", "remote")]).squashfs(images.path("content"));
    let remote = Remote::mount(images.path("remote"), File::open(content).unwrap());
    let (local, later) = (volume("local", &directory, "local"), volume("later", &directory, "later"));
    let hung = |id: &str| volume(id, &remote.path, "image.sqsh");
    let target = driver.mount(&hung("hung"), "hung").unwrap();
    assert_eq!(std::fs::read_to_string(target.join("file")).unwrap(), "remote");
    driver.mount(&local, "local").unwrap();
    assert_eq!(driver.loop_devices().len(), 2);

    remote.hang();
    in_time("another image", || driver.mount(&later, "later")).unwrap();
    in_time("a pod", || driver.publish(&local, "second")).unwrap();
    in_time("a pod of the image", || driver.publish(&hung("hung"), "third")).unwrap();
    assert!(!in_time("statistics", || driver.stats(&local, "local")).unwrap().volume_condition.unwrap().abnormal);
    let condition = in_time("statistics", || driver.stats(&hung("hung"), "hung")).unwrap().volume_condition.unwrap();
    assert!(condition.abnormal && condition.message.contains("cannot be looked at"), "{condition:?}");
    let error = in_time("a volume of it", || driver.stage(&hung("new"))).unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    for (volume, pod) in [(&local, "second"), (&hung("hung"), "third"), (&later, "later")] {
        in_time("unpublish", || driver.unpublish(volume, pod)).unwrap();
    }

    remote.answer();
    driver.stage(&hung("new")).unwrap();
    for (volume, pod) in [(&local, "local"), (&hung("hung"), "hung")] {
        driver.unmount(volume, pod);
    }
    for volume in [&hung("new"), &later] {
        driver.unstage(volume).unwrap();
    }
    driver.assert_nothing_left();
}
