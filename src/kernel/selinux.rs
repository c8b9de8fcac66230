//! Labels of SELinux (Documentation/admin-guide/LSM/SELinux.rst; mount(8), `context`).

use super::error::Error;
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
    /// `None` where SELinux is off. What the node's policy does not know is left out, and logged: such a node's volumes can be
    /// unpublished, at least.
    pub(super) fn in_force(mut self) -> Option<Self> {
        if !is_on() {
            return None;
        }
        for context in [&mut self.images, &mut self.overlays].into_iter().filter(|context| !context.is_empty()) {
            if let Err(error) = check_option("tmpfs", "context", context) {
                let error = Error::new(format!("use the SELinux context {context}"), error);
                let hint = "does the node's policy know its type? The package is container-selinux. Files have their own labels";
                tracing::error!("{}", error.with_hint(hint));
                context.clear();
            }
        }
        Some(self)
    }

    /// The label for a mount, if it gets one.
    pub(super) fn of(&self, new: &NewMount) -> Option<&str> {
        let context = match new.fs_type {
            "overlay" => &self.overlays,
            _ if is_of_images(new) => &self.images,
            _ => "",
        };
        (!context.is_empty()).then_some(context)
    }
}

/// Whether an image is mounted, whose superblock may be mounted already. That keeps the label that it has, or that it has none, and the
/// kernel answers EINVAL to who asks for another.
pub(super) fn is_of_images(new: &NewMount) -> bool {
    FileSystem::ALL.iter().any(|file_system| file_system.kernel_name() == new.fs_type)
}

/// The label that these options of a superblock have (mount(8), `context`): in quotes, as it may have commas.
pub(super) fn label_in(super_options: &str) -> Option<&str> {
    let at = super_options
        .match_indices("context=")
        .map(|(at, _)| at)
        .find(|&at| at == 0 || super_options[..at].ends_with(','))?;
    let rest = &super_options[at + "context=".len()..];
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => rest.split(',').next(),
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
        assert_eq!(label_in("ro,context=system_u:object_r:a_t:s0,errors=continue"), Some("system_u:object_r:a_t:s0"));
        assert_eq!(
            label_in("ro,context=\"system_u:object_r:a_t:s0:c1,c2\",errors=continue"),
            Some("system_u:object_r:a_t:s0:c1,c2")
        );
        assert_eq!(label_in("ro,seclabel,rootcontext=a:b:c"), None);
        assert_eq!(Contexts::default().of(&overlay("pod", &["0".into()], None)), None);
    }
}
