//! Overlay mounts (Documentation/filesystems/overlayfs.rst).

use std::os::fd::AsFd;

use rustix::fs::{FileType, Stat, fgetxattr};
use rustix::io::Errno;

use super::mount::NewMount;

/// Stacks `lower` directories, uppermost first, below the writable `upper`, which needs an empty `work` directory beside it.
///
/// Names are relative to the calling thread's directory, contain no `:`, `,` or `\`, and together fit into 255 bytes:
/// more a mount option cannot hold. The overlay keeps its own clones of the mounts it stacks. `source` is what the mount
/// table shows. Two or more lowers are needed where there is no upper.
///
/// What an image says about other files (`trusted.overlay.redirect`, `.metacopy`) is not believed, whatever the node's defaults.
pub fn overlay(source: &str, lower: &[String], upper: Option<(&str, &str)>) -> NewMount {
    let new = NewMount::new("overlay", format!("overlay of {} layers", lower.len()));
    let new = new.set("source", source).set("lowerdir", lower.join(":"));
    let new = new.set("redirect_dir", "nofollow").set("metacopy", "off").set("index", "off");
    match upper {
        Some((upper, work)) => new.set("upperdir", upper).set("workdir", work),
        None => new.read_only(),
    }
}

/// Whether a file of an upper stands for the removal of what lower layers have by its name.
pub fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// The other form of a whiteout, an empty file with an attribute: the kernel reads it, and tools write it that may make no devices.
pub fn is_whiteout_file(file: impl AsFd, stat: &Stat) -> Result<bool, Errno> {
    Ok(stat.st_size == 0 && attribute(file, "trusted.overlay.whiteout")?.is_some())
}

/// Whether a directory of an upper shows nothing of what lower layers have in it. By an `x` it says that it has whiteouts of the other form.
pub fn is_opaque(directory: impl AsFd) -> Result<bool, Errno> {
    Ok(attribute(directory, "trusted.overlay.opaque")? == Some(b'y'))
}

/// Its first byte.
fn attribute(file: impl AsFd, name: &str) -> Result<Option<u8>, Errno> {
    let mut value = [0; 16];
    match fgetxattr(file, name, &mut value[..]) {
        Ok(_) => Ok(Some(value[0])),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}
