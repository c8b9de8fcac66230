//! Nodes of block devices in `/dev`. In a devtmpfs the kernel makes them. Where a node of the cluster is itself a container (kind, minikube),
//! its `/dev` is a copy of one, in which new devices never appear.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

use super::error::{Error, Result};

/// How long the kernel is waited for.
pub(super) const A_MOMENT: Duration = Duration::from_millis(200);

/// Makes the node of a device that there is, if nobody has.
pub(super) fn make(path: &Path, (major, minor): (u32, u32)) -> Result<()> {
    match mknodat(CWD, path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, makedev(major, minor)) {
        Ok(()) => {
            tracing::info!(path = %path.display(), "made the node of a new device, which did not appear by itself");
            Ok(())
        }
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => {
            let error = Error::new(format!("make {}, which did not appear by itself", path.display()), errno);
            Err(error.with_hint("does the driver have the host's /dev?"))
        }
    }
}
