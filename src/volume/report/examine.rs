//! Trying, ahead of any volume, whether the node's disk can hold upper layers.

use std::path::Path;

use crate::blocking;
use crate::error::{Error, Result};
use crate::kernel::Linux;
use crate::kernel::selinux::Contexts;
use crate::volume::source::overlay_on;

/// Mounts an overlay, out of sight, whose upper layer is in `data_dir`, or in the nearest directory above that is there.
pub async fn try_overlay(data_dir: &Path) -> Result<()> {
    let there = data_dir.ancestors().find(|directory| directory.is_dir()).unwrap_or(data_dir);
    let directory = there.join(format!(".try-overlay-{}", std::process::id()));
    let mount = move || {
        std::fs::create_dir(&directory).map_err(|error| Error::file("make directory", &directory, &error))?;
        let tried = Linux::new(Contexts::default()).and_then(|kernel| overlay_on(&directory, &kernel));
        std::fs::remove_dir_all(&directory).map_err(|error| Error::file("remove", &directory, &error))?;
        Ok::<_, Error>(tried.map(drop)?)
    };
    blocking::run("try an overlay", mount).await
}
