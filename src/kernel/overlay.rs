//! Overlay mounts (Documentation/filesystems/overlayfs.rst).

use super::error::Result;
use super::mount::{CONFINED, DetachedMount, FsContext, MountAttrFlags};

/// Stacks `lower` directories, uppermost first, below the writable `upper`, which needs an empty `work` directory beside it.
///
/// Names are relative to the calling thread's directory, contain no `:`, `,` or `\`, and together fit into 255 bytes:
/// more a mount option cannot hold. The overlay keeps its own clones of the mounts it stacks. `source` is what the mount
/// table shows. Two or more lowers are needed where there is no upper.
pub fn mount(source: &str, lower: &[String], upper: Option<(&str, &str)>) -> Result<DetachedMount> {
    let context = FsContext::new("overlay", format!("overlay of {} layers", lower.len()))?;
    context.set("source", source)?;
    context.set("lowerdir", &lower.join(":"))?;
    let mut attributes = CONFINED;
    match upper {
        Some((upper, work)) => {
            context.set("upperdir", upper)?;
            context.set("workdir", work)?;
        }
        None => {
            context.set_flag("ro")?;
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
    }
    context.mount(attributes)
}
