//! Memory as a file system (tmpfs(5)).

use super::mount::NewMount;

/// A file system that holds at most `size` bytes, if any are named, and that only root enters.
pub fn tmpfs(what: impl Into<String>, size: Option<u64>) -> NewMount {
    let new = NewMount::new("tmpfs", what).set("mode", "0700");
    match size {
        Some(size) => new.set("size", size),
        None => new,
    }
}
