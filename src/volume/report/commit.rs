//! The writable layer of a published volume becomes a layer of a container image.

use std::fmt::Display;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::layer;
use crate::error::{Error, Kind, Result};
use crate::kernel::mount::{CONFINED, MountAttrFlags, Symlinks, bind, open_directory, open_directory_beneath};
use crate::kernel::scratch;
use crate::spec::Upper;
use crate::volume::record::{self, List, Record};

/// Writes the writable layer of the volume that is published at `target` as a tar, in the format of a layer of a container image. Who reads it
/// knows by its end that it is complete. `note` is told what it lies on, and what is not in it.
///
/// What the pod changes meanwhile is an error, as far as it is noticed.
pub fn commit(data_dir: &Path, target: &Path, out: impl Write, mut note: impl FnMut(&str)) -> Result<()> {
    let commit = || {
        let record = find(data_dir, target)?;
        let upper = upper(data_dir, &record)?;
        note(&format!("the layer lies on {}", record.mount.sources().join(", ")));
        layer::write(upper, out, note)
    };
    commit().map_err(|error| error.about(&format!("commit {}", target.display())))
}

/// The upper directory of its overlay, through a mount that no device can be opened on.
fn upper(data_dir: &Path, record: &Record) -> Result<OwnedFd> {
    let with = "publish it with \"overlay: directory\"";
    let size = match record.mount.upper(record.read_only) {
        Upper::Directory { size } => size,
        Upper::Tmpfs { .. } => {
            return Err(unfit(format!(
                "its writable layer is in memory, where the pod alone sees it: {with}, or pack it in the pod by tar(1)"
            )));
        }
        Upper::None if record.read_only => return Err(unfit("it is published read-only: there is nothing to commit")),
        Upper::None => return Err(unfit(format!("it has no writable layer: {with}"))),
    };
    let missing = || unfit("its writable layer is not there: it was never mounted, or is just unpublished");
    let scratch = record::scratch(data_dir, record).ok_or_else(missing)?;
    let Some(_) = size else {
        let directory = open_directory(&scratch.join("upper"))?;
        let mount = bind(directory, false, CONFINED | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        return Ok(open_directory_beneath(&mount, "", Symlinks::Refused)?);
    };
    let file = scratch.join("layer");
    let unmounted =
        || unfit(format!("its writable layer is not mounted any more: it is the ext4 in {}", file.display()));
    let mount = scratch::look_into(&file)?.ok_or_else(unmounted)?;
    Ok(open_directory_beneath(&mount, "upper", Symlinks::Refused)?)
}

fn find(data_dir: &Path, target: &Path) -> Result<Record> {
    let List { records, unreadable } = record::list(data_dir)?;
    if let Some(record) = records.into_iter().find(|record| record.target == target) {
        return Ok(record);
    }
    if let Some(unreadable) = unreadable.into_iter().find(|record| record.target.as_deref() == Some(target)) {
        return Err(unreadable.into());
    }
    let message = format!(
        "no volume is published there, says {}: the paths are those that 'status' prints",
        data_dir.join("published").display()
    );
    Err(Error::new(Kind::NotFound, message))
}

fn unfit(why: impl Display) -> Error {
    Error::new(Kind::FailedPrecondition, why.to_string())
}
