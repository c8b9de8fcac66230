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

/// What each volume needs, and what an image may be of: a node has work with one of the latter.
const NEEDED: [&str; 3] = ["nfs4", "nfs", "overlay"];
const OF_IMAGES: [&str; 2] = ["squashfs", "erofs"];

/// What is missing on this node, each with what to do about it; empty where nothing is.
///
/// Asking for a file system makes the kernel load its module, as a mount would.
pub fn missing() -> Vec<String> {
    let others = [release().map(drop), loop_device::open_control().map(drop)].into_iter().filter_map(Result::err);
    missing_file_systems(find_file_system).into_iter().chain(others).map(|error| error.to_string()).collect()
}

fn missing_file_systems(find: impl Fn(&str) -> Result<()>) -> Vec<Error> {
    let needed = NEEDED.iter().filter_map(|name| find(name).err());
    needed.chain(none_of_images(&find).into_iter().flatten()).collect()
}

/// Why no image can be mounted. The first file system that is there is enough: no module is loaded that nobody may want.
fn none_of_images(find: impl Fn(&str) -> Result<()>) -> Option<Vec<Error>> {
    OF_IMAGES.iter().map(|name| find(name).err()).collect()
}

/// Everything, looked at more closely. May make the kernel add a loop device, as an attach would.
pub fn list() -> Vec<Support> {
    let support = |what: &str, needed, outcome| Support { what: what.into(), needed, outcome };
    let namespace = PrivateNamespace::new().map(|_| "this process can make one".into());
    let mut list = vec![support("kernel", true, release()), support("mount namespaces", true, namespace)];
    list.extend(file_systems(find_file_system));
    list.push(support("loop devices", true, new_loop_device()));
    let verity = verified::version().map(|version| format!("dm-verity {version}"));
    list.push(support("verified images", false, verity));
    let multipath = multipath::version().map(|version| format!("dm-multipath {version}"));
    list.push(support("images on several servers", false, multipath));
    list
}

fn file_systems(find: impl Fn(&str) -> Result<()>) -> Vec<Support> {
    let none = none_of_images(&find).is_some();
    let all = NEEDED.map(|name| (name, true)).into_iter().chain(OF_IMAGES.map(|name| (name, none)));
    let look = |(name, needed)| {
        let outcome = find(name).map(|()| "the kernel has it".to_owned());
        Support { what: format!("file system {name}"), needed, outcome }
    };
    all.map(look).collect()
}

fn release() -> Result<String> {
    new_enough(rustix::system::uname().release().to_string_lossy().into_owned())
}

fn new_enough(release: String) -> Result<String> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < OLDEST => {
            let hint = format!("Linux {}.{} or newer is needed", OLDEST.0, OLDEST.1);
            Err(Error::new(format!("use kernel {release}"), Errno::NOSYS).with_hint(hint))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a kernel without these file systems lacks: for the probes, and what `doctor` says of each; `!` is what no volume works without.
    fn without(absent: &[&str]) -> (Vec<String>, Vec<String>) {
        let find = |name: &str| match absent.contains(&name) {
            true => Err(Error::new(name, Errno::NODEV)),
            false => Ok(()),
        };
        let missing = missing_file_systems(find).iter().map(Error::to_string).collect();
        let failed = file_systems(find).into_iter().filter_map(|support| {
            let failed = support.outcome.err()?;
            Some(format!("{}{failed}", if support.needed { "!" } else { "" }))
        });
        (missing, failed.collect())
    }

    #[test]
    fn a_node_is_ready_with_squashfs_or_erofs_and_the_doctor_tells_of_the_other() {
        assert_eq!(without(&[]), (vec![], vec![]));
        assert_eq!(without(&["erofs"]), (vec![], vec!["erofs: no such device".into()]));
        assert_eq!(without(&["squashfs"]), (vec![], vec!["squashfs: no such device".into()]));
        let (missing, failed) = without(&["squashfs", "erofs"]);
        assert_eq!(missing, ["squashfs: no such device", "erofs: no such device"]);
        assert_eq!(failed, ["!squashfs: no such device", "!erofs: no such device"]);
        let (missing, failed) = without(&["nfs"]);
        assert_eq!((missing, failed), (vec!["nfs: no such device".into()], vec!["!nfs: no such device".into()]));
    }

    #[test]
    fn a_kernel_that_is_too_old_is_said() {
        for release in ["5.12.0", "6.1.0-50-cloud-amd64", "7.3.4+deb13-cloud-amd64", "10.0"] {
            assert_eq!(new_enough(release.into()).unwrap(), release);
        }
        let error = new_enough("5.10.0-32-cloud-amd64".into()).unwrap_err().to_string();
        assert_eq!(error, "use kernel 5.10.0-32-cloud-amd64: function not implemented: Linux 5.12 or newer is needed");
    }

    #[test]
    fn where_squashfs_is_there_no_probe_has_the_kernel_load_another_one() {
        let asked = std::cell::RefCell::new(Vec::new());
        missing_file_systems(|name| {
            asked.borrow_mut().push(name.to_owned());
            Ok(())
        });
        assert!(!asked.into_inner().contains(&"erofs".to_owned()));
    }
}
