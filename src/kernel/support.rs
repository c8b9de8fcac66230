//! What this kernel must offer for the driver to work.

use std::time::Duration;

use rustix::io::Errno;

use super::device_mapper::{multipath, verified};
use super::device_node;
use super::error::{Error, Result};
use super::loop_device;
use super::mount::find_file_system;
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

/// The file systems, and whether each is needed: images may all be of one kind.
const FILE_SYSTEMS: [(&str, bool); 5] =
    [("nfs4", true), ("nfs", true), ("squashfs", true), ("overlay", true), ("erofs", false)];

/// What is missing on this node, each with what to do about it; empty where nothing is.
///
/// Asking for a file system makes the kernel load its module, as a mount would.
pub fn missing() -> Vec<String> {
    let file_systems = FILE_SYSTEMS.iter().filter(|(_, needed)| *needed).map(|(name, _)| find_file_system(name));
    let loops = loop_device::open_control().map(drop);
    file_systems.chain([loops]).filter_map(|found| Some(found.err()?.to_string())).collect()
}

/// Everything, looked at more closely. May make the kernel add a loop device, as an attach would.
pub fn list() -> Vec<Support> {
    let support = |what: String, needed, outcome| Support { what, needed, outcome };
    let namespace = PrivateNamespace::new().map(|_| "this process can make one".into());
    let mut list = vec![support("kernel".into(), true, release()), support("mount namespaces".into(), true, namespace)];
    for (name, needed) in FILE_SYSTEMS {
        let found = find_file_system(name).map(|()| "the kernel has it".to_owned());
        list.push(support(format!("file system {name}"), needed, found));
    }
    list.push(support("loop devices".into(), true, new_loop_device()));
    let verity = verified::version().map(|version| format!("dm-verity {version}"));
    list.push(support("verified images".into(), false, verity));
    let multipath = multipath::version().map(|version| format!("dm-multipath {version}"));
    list.push(support("images on several servers".into(), false, multipath));
    list
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

/// A new device must appear where the driver looks for it, or let itself be made there.
fn new_loop_device() -> Result<String> {
    let number = loop_device::free_number(&loop_device::open_control()?)?;
    let path = loop_device::device_path(number);
    for _ in 0..20 {
        if path.exists() {
            return Ok(format!("the next one is {}", path.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    device_node::make(&path, (loop_device::MAJOR, number))?;
    Ok(format!(
        "the next one is {}, which had to be made: new devices do not appear in /dev by themselves",
        path.display()
    ))
}
