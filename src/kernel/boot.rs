//! Which boot of which node this is.

use super::error::{Doing, Result};

/// `/proc/sys/kernel/random/boot_id` (random(4)): of no other node, and of this one until it is booted again.
pub fn id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(path).doing(|| format!("read {path}"))?;
    Ok(id.trim_end().to_owned())
}
