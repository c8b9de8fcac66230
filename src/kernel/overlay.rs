//! Overlay mounts (Documentation/filesystems/overlayfs.rst).

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
