//! What this kernel must offer for the driver to work.

use super::mount::FsContext;

/// What is missing on this node, each with what to do about it; empty where nothing is.
///
/// Asking for a file system makes the kernel load its module, as a mount would.
pub fn missing() -> Vec<String> {
    let mut missing: Vec<String> = ["nfs4", "nfs", "squashfs", "overlay"]
        .into_iter()
        .filter_map(|fs_type| FsContext::new(fs_type, fs_type).err())
        .map(|error| error.to_string())
        .collect();
    if let Err(error) = std::fs::metadata("/dev/loop-control") {
        missing.push(format!("/dev/loop-control: {error}: try 'modprobe loop' on the node"));
    }
    missing
}
