//! From the fields that were read to a [`Mount`]: everything that their types do not say.

use crate::spec::error::SpecError;
use crate::spec::image_parameters::NOT_OF_SIF;
use crate::spec::mount_options::MountOptions;
use crate::spec::read::Object;
use crate::spec::wire::{self, AttachOption, DeviceKind, MountKind, UpperKind};
use crate::spec::{
    Attach, Base, Bind, Device, FsType, Loopback, MAX_DEPTH, MAX_LOWER, MOUNT_SPEC, Mount, MountFlags, Nfs, NfsVersion,
    Overlay, Symlinks, Upper, UpperRoot, Verity, options, quantity, replicas, text,
};

pub(super) struct Reader<'a> {
    options: &'a MountOptions,
    pub warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub fn new(options: &'a MountOptions) -> Reader<'a> {
        Reader { options, warnings: Vec::new() }
    }

    /// `at` is the mount's JSON pointer, `depth` counts mounts from 1.
    pub fn mount(&mut self, at: &str, Object(wire): Object<wire::Mount>, depth: usize) -> Result<Mount, SpecError> {
        if depth > MAX_DEPTH {
            let message = format!("nested too deeply: at most {MAX_DEPTH} mounts inside each other");
            return Err(invalid(at, "", message));
        }
        let returned = [("mountpoint", wire.mountpoint.is_some()), ("refs", wire.refs.is_some())];
        self.ignore(at, &returned);
        let kind = match wire.kind {
            MountKind::Attach => "attach",
            MountKind::Bind => "bind",
            MountKind::Nfs => "nfs",
            MountKind::Overlay => "overlay",
        };
        let objects = [
            ("attach", wire.attach.is_some()),
            ("bind", wire.bind.is_some()),
            ("nfs", wire.nfs.is_some()),
            ("overlay", wire.overlay.is_some()),
        ];
        one_object(at, kind, &objects)?;
        let inside = format!("{at}/{kind}");
        match (wire.attach, wire.bind, wire.nfs, wire.overlay) {
            (Some(attach), ..) => self.attach(&inside, attach, depth).map(Mount::Attach),
            (_, Some(bind), ..) => self.bind(&inside, bind, depth).map(Mount::Bind),
            (_, _, Some(nfs), _) => self.nfs(&inside, nfs).map(Mount::Nfs),
            (.., Some(overlay)) => self.overlay(&inside, overlay, depth).map(Mount::Overlay),
            _ => Err(missing_object(at, kind)),
        }
    }

    fn nfs(&mut self, at: &str, Object(wire): Object<wire::MountNfs>) -> Result<Nfs, SpecError> {
        let version = wire.version.as_deref().map(NfsVersion::parse).transpose();
        let mut own = Vec::new();
        for (index, option) in wire.options.iter().enumerate() {
            let below = format!("/options/{index}");
            own.push(options::parse(option).map_err(wrong(at, &below))?);
        }
        let (host, replicas) = replicas::hosts(&wire.host).map_err(wrong(at, "/host"))?;
        Ok(Nfs {
            host,
            replicas,
            one_of: Vec::new(),
            path: text::absolute(&wire.path).map_err(wrong(at, "/path"))?,
            read_only: wire.ro || self.options.read_only,
            version: version.and_then(|version| self.options.version_for(version)).map_err(wrong(at, "/version"))?,
            options: self.options.merge_into(own).map_err(wrong(at, "/options"))?,
        })
    }

    fn attach(&mut self, at: &str, Object(wire): Object<wire::MountAttach>, depth: usize) -> Result<Attach, SpecError> {
        let device = self.device(&format!("{at}/attach"), wire.attach, depth)?;
        match &device {
            Device::Local { .. } if wire.fs_type == FsType::Sif => {
                return Err(invalid(at, "/fs_type", "\"sif\" is for image files: the device must be a \"loopback\""));
            }
            Device::Loopback(image) if wire.fs_type == FsType::Sif && image.verity.is_some() => {
                return Err(invalid(at, "/attach/loopback/verity", NOT_OF_SIF));
            }
            Device::Local { .. } | Device::Loopback(_) => {}
        }
        Ok(Attach {
            fs_type: wire.fs_type,
            flags: self.options.flags.or(MountFlags {
                no_exec: wire.mount_options.contains(&AttachOption::NoExec),
                no_suid: wire.mount_options.contains(&AttachOption::NoSuid),
                no_dev: wire.mount_options.contains(&AttachOption::NoDev),
            }),
            device,
        })
    }

    fn device(&mut self, at: &str, Object(wire): Object<wire::Device>, depth: usize) -> Result<Device, SpecError> {
        let returned = [("device_file", wire.device_file.is_some()), ("refs", wire.refs.is_some())];
        self.ignore(at, &returned);
        let kind = match wire.kind {
            DeviceKind::Loopback => "loopback",
            DeviceKind::Local => "local",
        };
        one_object(at, kind, &[("loopback", wire.loopback.is_some()), ("local", wire.local.is_some())])?;
        let inside = format!("{at}/{kind}");
        match (wire.loopback, wire.local) {
            (Some(loopback), _) => self.loopback(&inside, loopback, depth).map(Device::Loopback),
            (_, Some(Object(local))) => {
                let path = text::device(&local.path);
                Ok(Device::Local { path: path.map_err(wrong(&inside, "/path"))? })
            }
            _ => Err(missing_object(at, kind)),
        }
    }

    fn loopback(
        &mut self,
        at: &str,
        Object(wire): Object<wire::Loopback>,
        depth: usize,
    ) -> Result<Loopback, SpecError> {
        if wire.read_partitions {
            return Err(invalid(at, "/readPartitions", "partition tables are not read: only false is allowed"));
        }
        let path = text::relative(&wire.path).map_err(wrong(at, "/path"))?;
        if path.is_empty() {
            return Err(invalid(at, "/path", "names no file: the path of the image below the base"));
        }
        let verity = wire.verity.map(|root| Verity::parse(&root)).transpose().map_err(wrong(at, "/verity"))?;
        Ok(Loopback { verity, ..Loopback::new(path, self.base(at, wire.base, wire.mount, depth)?) })
    }

    fn bind(&mut self, at: &str, Object(wire): Object<wire::MountBind>, depth: usize) -> Result<Bind, SpecError> {
        Ok(Bind {
            path: text::relative(&wire.path).map_err(wrong(at, "/path"))?,
            symlinks: Symlinks::Follow,
            base: self.base(at, wire.base, wire.mount, depth)?,
            recursive: wire.recursive,
            read_only: wire.ro,
        })
    }

    fn base(
        &mut self,
        at: &str,
        base: wire::Base,
        mount: Option<Box<Object<wire::Mount>>>,
        depth: usize,
    ) -> Result<Base, SpecError> {
        match (base, mount) {
            (wire::Base::Root, None) => Ok(Base::Root),
            (wire::Base::Root, Some(_)) => {
                Err(invalid(at, "/mount", "the base is \"root\": a mount does not belong here"))
            }
            (wire::Base::Mount, None) => Err(invalid(at, "", "the base is \"mount\": missing field \"mount\"")),
            (wire::Base::Mount, Some(mount)) => {
                let mount = self.mount(&format!("{at}/mount"), *mount, depth + 1)?;
                Ok(Base::Mount(Box::new(mount)))
            }
        }
    }

    fn overlay(
        &mut self,
        at: &str,
        Object(wire): Object<wire::MountOverlay>,
        depth: usize,
    ) -> Result<Overlay, SpecError> {
        if depth > 1 {
            let message = "an overlay can only be the outermost mount: list all its layers in one \"lower\"";
            return Err(invalid(at, "", message));
        }
        let returned = [("upperdir", wire.upperdir.is_some()), ("workdir", wire.workdir.is_some())];
        self.ignore(at, &returned);
        if wire.lower.is_empty() || wire.lower.len() > MAX_LOWER {
            let message = format!("{} layers: from 1 to {MAX_LOWER} are allowed", wire.lower.len());
            return Err(invalid(at, "/lower", message));
        }
        let mut lower: Vec<Mount> = Vec::new();
        for (index, layer) in wire.lower.into_iter().enumerate() {
            let here = format!("{at}/lower/{index}");
            let layer = self.mount(&here, layer, depth + 1)?;
            if let Some(same) = lower.iter().position(|other| *other == layer) {
                // The kernel answers ELOOP.
                return Err(invalid(&here, "", format!("the same layer as /overlay/lower/{same}")));
            }
            lower.push(layer);
        }
        let (upper, root) = match wire.upper {
            Some(Object(wire)) => (upper(at, &wire)?, root(at, &wire)?),
            None => Default::default(),
        };
        Ok(Overlay { lower, upper, root })
    }

    /// Warns of fields that only the ImageAPI writes.
    fn ignore(&mut self, at: &str, returned: &[(&str, bool)]) {
        for (field, _) in returned.iter().filter(|(_, present)| *present) {
            self.warnings.push(format!("{MOUNT_SPEC}{at}/{field}: ignored: only the ImageAPI sets it"));
        }
    }
}

fn upper(at: &str, wire: &wire::Upper) -> Result<Upper, SpecError> {
    match (wire.kind, &wire.size) {
        (UpperKind::Directory, None) => Ok(Upper::Directory { size: None }),
        (UpperKind::Directory, Some(size)) => {
            quantity::bytes(size).and_then(Upper::directory_of).map_err(wrong(at, "/upper/size"))
        }
        (UpperKind::None, None) => Ok(Upper::None),
        (UpperKind::Tmpfs, Some(size)) => {
            let size = quantity::bytes(size);
            Ok(Upper::Tmpfs { size: size.map_err(wrong(at, "/upper/size"))? })
        }
        (UpperKind::Tmpfs, None) => {
            Err(invalid(at, "/upper", "missing field \"size\": the most the tmpfs may hold, such as 256Mi"))
        }
        (UpperKind::None, Some(_)) => Err(invalid(at, "/upper/size", "what is not there has no size")),
    }
}

fn root(at: &str, wire: &wire::Upper) -> Result<UpperRoot, SpecError> {
    let given =
        [("/upper/uid", wire.uid.is_some()), ("/upper/gid", wire.gid.is_some()), ("/upper/mode", wire.mode.is_some())];
    if wire.kind == UpperKind::None
        && let Some((name, _)) = given.into_iter().find(|(_, is_given)| *is_given)
    {
        return Err(invalid(at, name, "what is not there belongs to nobody"));
    }
    Ok(UpperRoot {
        uid: wire.uid.map(UpperRoot::id).transpose().map_err(wrong(at, "/upper/uid"))?,
        gid: wire.gid.map(UpperRoot::id).transpose().map_err(wrong(at, "/upper/gid"))?,
        mode: wire.mode.as_deref().map(UpperRoot::parse_mode).transpose().map_err(wrong(at, "/upper/mode"))?,
    })
}

fn one_object(at: &str, kind: &str, objects: &[(&str, bool)]) -> Result<(), SpecError> {
    match objects.iter().find(|(name, present)| *present && *name != kind) {
        Some((other, _)) => {
            let message = format!("the kind is \"{kind}\": an object \"{other}\" does not belong here");
            Err(invalid(at, &format!("/{other}"), message))
        }
        None => Ok(()),
    }
}

fn missing_object(at: &str, kind: &str) -> SpecError {
    invalid(at, "", format!("the kind is \"{kind}\": missing object \"{kind}\""))
}

/// Gives a message the place that it is about.
fn wrong(at: &str, below: &str) -> impl Fn(String) -> SpecError {
    move |message| invalid(at, below, message)
}

fn invalid(at: &str, below: &str, message: impl AsRef<str>) -> SpecError {
    SpecError::invalid(MOUNT_SPEC, &format!("{at}{below}"), message)
}
