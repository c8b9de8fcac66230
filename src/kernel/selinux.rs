//! Labels of SELinux (Documentation/admin-guide/LSM/SELinux.rst; mount(8), `context`).

use super::error::{Doing, Result};
use super::file_system::FileSystem;
use super::mount::{NewMount, check_option};

/// The labels of what is mounted on a node with SELinux. Where one is empty, files have the labels that they have.
///
/// The kubelet takes a mount with such a label for one that has nothing to be relabelled: an image cannot be, and a writable layer
/// would get a copy of all that is below it.
#[derive(Clone, Debug, Default)]
pub struct Contexts {
    pub images: String,
    pub overlays: String,
}

impl Contexts {
    /// None where SELinux is off; fails where the node's policy does not know one.
    pub(super) fn in_force(self) -> Result<Self> {
        if !is_on() {
            return Ok(Contexts::default());
        }
        for context in [&self.images, &self.overlays].into_iter().filter(|context| !context.is_empty()) {
            check_option("tmpfs", "context", context).doing(|| format!("use the SELinux context {context}")).map_err(
                |error| error.with_hint("does the node's policy know its type? The package is container-selinux"),
            )?;
        }
        Ok(self)
    }

    pub(super) fn of(&self, new: &NewMount) -> Option<&str> {
        let is_image = FileSystem::ALL.iter().any(|file_system| file_system.kernel_name() == new.fs_type);
        let context = match new.fs_type {
            "overlay" => &self.overlays,
            _ if is_image => &self.images,
            _ => "",
        };
        (!context.is_empty()).then_some(context)
    }
}

/// Whether SELinux is enabled, with a policy: before it has one, this process has a label without a type (proc_pid_attr(5)).
pub fn is_on() -> bool {
    let is_enabled = std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\tselinuxfs\n"));
    is_enabled && std::fs::read_to_string("/proc/self/attr/current").is_ok_and(|label| label.contains(':'))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kernel::overlay::overlay;
    use crate::kernel::tmpfs::tmpfs;

    #[test]
    fn images_and_overlays_have_each_their_label_and_nothing_else_has_one() {
        let contexts = Contexts { images: "image".into(), overlays: "overlay".into() };
        for file_system in FileSystem::ALL {
            assert_eq!(contexts.of(&file_system.on(Path::new("/dev/loop3"))), Some("image"));
        }
        assert_eq!(contexts.of(&overlay("pod", &["0".into()], None)), Some("overlay"));
        assert_eq!(contexts.of(&tmpfs("upper", Some(4096))), None);
        assert_eq!(contexts.of(&NewMount::new("nfs4", "an export")), None);
        assert_eq!(Contexts::default().of(&overlay("pod", &["0".into()], None)), None);
    }
}
