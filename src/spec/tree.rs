//! What can be asked of a mount and those inside it.

use std::collections::BTreeSet;

use super::{
    Attach, Base, Bind, Device, FsType, Loopback, Mount, MountFlags, Nfs, Overlay, Symlinks, Upper, UpperRoot,
};

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

    /// The flags of the published path: those that one of its images has.
    pub fn flags(&self) -> MountFlags {
        self.shown().iter().fold(MountFlags::default(), |flags, mount| match mount {
            Mount::Attach(attach) => flags.or(attach.flags),
            Mount::Bind(_) | Mount::Nfs(_) | Mount::Overlay(_) => flags,
        })
    }

    /// The mounts whose files the published path shows: not those that only hold an image.
    pub fn shown(&self) -> Vec<&Mount> {
        match self {
            Mount::Attach(_) | Mount::Nfs(_) | Mount::Bind(Bind { base: Base::Root, .. }) => vec![self],
            Mount::Bind(Bind { base: Base::Mount(mount), .. }) => mount.shown(),
            Mount::Overlay(overlay) => overlay.lower.iter().flat_map(Mount::shown).collect(),
        }
    }

    /// The exports whose files the published path shows, each with whether it shows them read-only.
    pub fn exports_shown(&self) -> Vec<(&Nfs, bool)> {
        self.exports_shown_by(false)
    }

    fn exports_shown_by(&self, read_only: bool) -> Vec<(&Nfs, bool)> {
        match self {
            Mount::Attach(_) | Mount::Bind(Bind { base: Base::Root, .. }) => Vec::new(),
            Mount::Nfs(nfs) => vec![(nfs, read_only || nfs.read_only)],
            Mount::Bind(Bind { base: Base::Mount(mount), read_only: own, .. }) => {
                mount.exports_shown_by(read_only || *own)
            }
            Mount::Overlay(overlay) => overlay.lower.iter().flat_map(|layer| layer.exports_shown_by(true)).collect(),
        }
    }

    /// Whether the published path is a directory of the node itself, which flags of its mount alone keep from being written to: a container
    /// runtime may clear them (runc does since 1.2, for a container that mounts the volume read-write).
    pub fn is_of_the_node(&self) -> bool {
        match self {
            Mount::Bind(Bind { base: Base::Root, .. }) => true,
            Mount::Bind(Bind { base: Base::Mount(mount), .. }) => mount.is_of_the_node(),
            // One layer is mounted as it is.
            Mount::Overlay(Overlay { lower, upper: Upper::None, .. }) => lower.len() == 1 && lower[0].is_of_the_node(),
            Mount::Attach(_) | Mount::Nfs(_) | Mount::Overlay(_) => false,
        }
    }

    /// The image files, each before the image that it lies in.
    pub fn images(&self) -> Vec<&Loopback> {
        let mut images = Vec::new();
        self.visit("", &mut |_, mount| {
            if let Mount::Attach(Attach { device: Device::Loopback(loopback), .. }) = mount {
                images.push(loopback);
            }
        });
        images
    }

    /// The file systems of all images, each once.
    pub fn fs_types(&self) -> BTreeSet<FsType> {
        let mut fs_types = BTreeSet::new();
        self.visit("", &mut |_, mount| {
            if let Mount::Attach(attach) = mount {
                fs_types.insert(attach.fs_type);
            }
        });
        fs_types
    }

    /// What takes the writes where it is published; nothing where that is read-only, or the mount is not an overlay.
    pub fn upper(&self, read_only: bool) -> Upper {
        match self {
            Mount::Overlay(overlay) if !read_only => overlay.upper,
            Mount::Overlay(_) | Mount::Attach(_) | Mount::Bind(_) | Mount::Nfs(_) => Upper::None,
        }
    }

    /// What the root of the writable layer is made with.
    pub fn upper_root(&self) -> UpperRoot {
        match self {
            Mount::Overlay(overlay) => overlay.root,
            Mount::Attach(_) | Mount::Bind(_) | Mount::Nfs(_) => UpperRoot::default(),
        }
    }

    /// Visits this mount and then those inside it, until a visit fails, each with its place in the JSON form (a JSON pointer).
    pub fn try_visit<'a, E>(&'a self, visit: &mut impl FnMut(&str, &'a Mount) -> Result<(), E>) -> Result<(), E> {
        let mut outcome = Ok(());
        self.visit("", &mut |at, mount| {
            if outcome.is_ok() {
                outcome = visit(at, mount);
            }
        });
        outcome
    }

    pub(super) fn visit<'a>(&'a self, at: &str, visit: &mut impl FnMut(&str, &'a Mount)) {
        visit(at, self);
        match self {
            Mount::Attach(Attach { device: Device::Loopback(loopback), .. }) => {
                loopback.base.visit(&format!("{at}/attach/attach/loopback"), visit);
            }
            Mount::Bind(bind) => bind.base.visit(&format!("{at}/bind"), visit),
            Mount::Overlay(overlay) => {
                for (index, layer) in overlay.lower.iter().enumerate() {
                    layer.visit(&format!("{at}/overlay/lower/{index}"), visit);
                }
            }
            Mount::Attach(Attach { device: Device::Local { .. }, .. }) | Mount::Nfs(_) => {}
        }
    }

    /// Changes this mount and those inside it.
    pub(super) fn visit_mut(&mut self, change: &mut impl FnMut(&mut Mount)) {
        change(self);
        let base = match self {
            Mount::Attach(Attach { device: Device::Loopback(image), .. }) => &mut image.base,
            Mount::Bind(bind) => &mut bind.base,
            Mount::Overlay(overlay) => return overlay.lower.iter_mut().for_each(|layer| layer.visit_mut(change)),
            Mount::Attach(Attach { device: Device::Local { .. }, .. }) | Mount::Nfs(_) => return,
        };
        if let Base::Mount(mount) = base {
            mount.visit_mut(change);
        }
    }

    /// Sets what holds for the path of every image and directory in it.
    pub(super) fn set_symlinks(&mut self, symlinks: Symlinks) {
        self.visit_mut(&mut |mount| match mount {
            Mount::Attach(Attach { device: Device::Loopback(image), .. }) => image.symlinks = symlinks,
            Mount::Bind(bind) => bind.symlinks = symlinks,
            Mount::Attach(Attach { device: Device::Local { .. }, .. }) | Mount::Nfs(_) | Mount::Overlay(_) => {}
        });
    }

    /// One line for each image, export and directory that is shown: `image.sqsh (squashfs) of 10.0.0.5:/images (nfs 4.2)`.
    pub fn sources(&self) -> Vec<String> {
        let of = |what: String, base: &Base| match base {
            Base::Root => vec![format!("{what} of this node")],
            Base::Mount(mount) => vec![format!("{what} of {}", mount.sources().join(" and "))],
        };
        match self {
            Mount::Nfs(nfs) => vec![format!("{nfs} (nfs {})", nfs.version)],
            Mount::Attach(Attach { fs_type, device: Device::Loopback(loopback), .. }) => {
                of(format!("{} ({fs_type})", loopback.path), &loopback.base)
            }
            Mount::Attach(Attach { fs_type, device: Device::Local { path }, .. }) => {
                vec![format!("{path} ({fs_type})")]
            }
            Mount::Bind(bind) => of(format!("directory {}", bind.path), &bind.base),
            Mount::Overlay(overlay) => overlay.lower.iter().flat_map(Mount::sources).collect(),
        }
    }
}

impl Base {
    fn visit<'a>(&'a self, at: &str, visit: &mut impl FnMut(&str, &'a Mount)) {
        match self {
            Base::Root => {}
            Base::Mount(mount) => mount.visit(&format!("{at}/mount"), visit),
        }
    }

    /// Whether a file below this base lies on a file system of the node's own, itself or in a directory of it.
    pub fn is_of_the_node(&self) -> bool {
        match self {
            Base::Root => true,
            Base::Mount(mount) => matches!(&**mount, Mount::Bind(bind) if bind.base.is_of_the_node()),
        }
    }

    /// The export that a file below this base lies on, itself or in a directory of it.
    pub fn export(&self) -> Option<&Nfs> {
        match self {
            Base::Root => None,
            Base::Mount(mount) => match &**mount {
                Mount::Nfs(nfs) => Some(nfs),
                Mount::Bind(bind) => bind.base.export(),
                Mount::Attach(_) | Mount::Overlay(_) => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::spec::json;

    const SPEC: &str = r#"{"kind":"overlay","overlay":{"lower":[
        {"kind":"attach","attach":{"fs_type":"erofs","attach":{"kind":"loopback","loopback":{"path":"inner","base":"mount","mount":
            {"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"outer","base":"mount",
                "mount":{"kind":"nfs","nfs":{"host":"fd00::2","path":"/a"}}}}}}}}}},
        {"kind":"bind","bind":{"path":"opt","base":"mount","mount":{"kind":"nfs","nfs":{"host":"b","path":"/b","version":"3"}}}},
        {"kind":"bind","bind":{"path":"etc","base":"root"}}]}}"#;

    #[test]
    fn each_mount_has_a_place_and_each_image_an_export() {
        let parsed = json::parse(SPEC).unwrap();
        let mut places = Vec::new();
        let visit = &mut |at: &str, _: &_| {
            places.push(at.to_owned());
            Ok::<_, ()>(())
        };
        parsed.mount().try_visit(visit).unwrap();
        let (layer, inside) = ("/overlay/lower", "attach/attach/loopback/mount");
        let expected = [
            String::new(),
            format!("{layer}/0"),
            format!("{layer}/0/{inside}"),
            format!("{layer}/0/{inside}/{inside}"),
            format!("{layer}/1"),
            format!("{layer}/1/bind/mount"),
            format!("{layer}/2"),
        ];
        assert_eq!(places, expected);
        let images = parsed.mount().images();
        assert_eq!(images.iter().map(|image| image.path.as_str()).collect::<Vec<_>>(), ["inner", "outer"]);
        assert_eq!(images[1].base.export().unwrap().to_string(), "[fd00::2]:/a");
        assert!(images[0].base.export().is_none() && !images[0].base.is_of_the_node());
    }

    #[test]
    fn what_only_holds_an_image_is_not_shown() {
        let parsed = json::parse(SPEC).unwrap();
        assert_eq!(parsed.mount().shown().len(), 3);
        assert_eq!(
            parsed.mount().sources(),
            [
                "inner (erofs) of outer (squashfs) of [fd00::2]:/a (nfs 4.2)",
                "directory opt of b:/b (nfs 3)",
                "directory etc of this node",
            ]
        );
    }
}
