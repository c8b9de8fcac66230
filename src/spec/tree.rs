//! What can be asked of a mount and those inside it.

use super::{Attach, Base, Bind, Device, Mount, Upper};

impl Mount {
    /// Whether the published path takes writes; everything below the outermost mount is only ever read.
    pub fn is_writable(&self) -> bool {
        match self {
            Mount::Attach(_) | Mount::Bind(Bind { base: Base::Root, .. }) => false,
            Mount::Bind(Bind { base: Base::Mount(mount), read_only, .. }) => !read_only && mount.is_writable(),
            Mount::Nfs(nfs) => !nfs.read_only,
            Mount::Overlay(overlay) => overlay.upper != Upper::None,
        }
    }

    /// Visits this mount and then those inside it, each with its place in the JSON form (a JSON pointer below `at`).
    pub fn walk<E>(&self, at: &str, visit: &mut impl FnMut(&str, &Mount) -> Result<(), E>) -> Result<(), E> {
        visit(at, self)?;
        match self {
            Mount::Attach(Attach { device: Device::Loopback(loopback), .. }) => match &loopback.base {
                Base::Mount(mount) => mount.walk(&format!("{at}/attach/attach/loopback/mount"), visit),
                Base::Root => Ok(()),
            },
            Mount::Bind(Bind { base: Base::Mount(mount), .. }) => mount.walk(&format!("{at}/bind/mount"), visit),
            Mount::Overlay(overlay) => {
                for (index, layer) in overlay.lower.iter().enumerate() {
                    layer.walk(&format!("{at}/overlay/lower/{index}"), visit)?;
                }
                Ok(())
            }
            Mount::Attach(_) | Mount::Bind(_) | Mount::Nfs(_) => Ok(()),
        }
    }

    /// Whether the published path must refuse to execute files: one image with `noexec` is enough.
    pub fn is_no_exec(&self) -> bool {
        match self {
            Mount::Attach(attach) => attach.no_exec,
            Mount::Bind(Bind { base: Base::Mount(mount), .. }) => mount.is_no_exec(),
            Mount::Bind(_) | Mount::Nfs(_) => false,
            Mount::Overlay(overlay) => overlay.lower.iter().any(Mount::is_no_exec),
        }
    }
}
