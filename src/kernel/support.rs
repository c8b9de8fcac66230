//! What this kernel must offer for the driver to work.

use std::fs::File;
use std::time::Duration;

use rustix::io::Errno;

use super::error::{Doing, Error, Result};
use super::loop_device;
use super::mount::FsContext;
use super::namespace::PrivateNamespace;

/// The oldest release that has every system call that is used: mount_setattr(2) is the youngest.
const OLDEST: (u32, u32) = (5, 12);

/// One thing that the kernel may offer.
pub struct Support {
    pub what: String,
    /// Without it no volume works.
    pub needed: bool,
    /// What was found, or what to do.
    pub outcome: Result<String>,
}

/// What is missing on this node, each with what to do about it; empty where nothing is.
///
/// Asking for a file system makes the kernel load its module, as a mount would.
pub fn missing() -> Vec<String> {
    let needed = ["nfs4", "nfs", "squashfs", "overlay"].map(file_system);
    let loops = File::open("/dev/loop-control").map(drop).map_err(|error| no_loop(&error));
    needed.into_iter().chain([loops]).filter_map(|found| Some(found.err()?.to_string())).collect()
}

/// Everything, looked at more closely. May make the kernel add a loop device, as an attach would.
pub fn list() -> Vec<Support> {
    let support = |what: &str, needed, outcome| Support { what: what.to_owned(), needed, outcome };
    let file_system = |fs_type: &'static str, needed| {
        let found = file_system(fs_type).map(|()| "the kernel has it".to_owned());
        support(&format!("file system {fs_type}"), needed, found)
    };
    vec![
        support("kernel", true, release()),
        support("mount namespaces", true, PrivateNamespace::new().map(|_| "this process can make one".into())),
        file_system("nfs4", true),
        file_system("nfs", true),
        file_system("squashfs", true),
        file_system("overlay", true),
        file_system("erofs", false),
        support("loop devices", true, new_loop_device()),
    ]
}

fn file_system(fs_type: &str) -> Result<()> {
    FsContext::new(fs_type, fs_type).map(drop)
}

fn release() -> Result<String> {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => {
            let hint = format!("it is {release}, and Linux {}.{} or newer is needed", OLDEST.0, OLDEST.1);
            Err(Error::new("use the kernel", Errno::NOSYS).with_hint(hint))
        }
        _ => Ok(release),
    }
}

/// A new device must appear where the driver looks for it, which takes the node's own /dev.
fn new_loop_device() -> Result<String> {
    let control = File::open("/dev/loop-control").map_err(|error| no_loop(&error))?;
    let path = loop_device::device_path(loop_device::free_number(&control)?);
    for _ in 0..20 {
        if path.exists() {
            return Ok(format!("the next one is {}", path.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let action = || format!("look for the new loop device {}", path.display());
    Err(Errno::NOENT).doing(action).map_err(|error| error.with_hint("does the driver have the host's /dev?"))
}

fn no_loop(error: &std::io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::NODEV);
    let hint = "try 'modprobe loop' on the node, and see that the driver has the host's /dev";
    Error::new("open /dev/loop-control", errno).with_hint(hint)
}
