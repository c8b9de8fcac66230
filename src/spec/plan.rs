//! What the driver would do for a spec, in words, for people who want to see it before it happens.

use super::{Base, Bind, Device, FsType, Mount, Nfs, Overlay, Upper, UpperRoot, Verity};

/// Of an image that lies on several servers.
const JOIN: &str =
    "join the devices of an image to one (dm-multipath): reads go on from the next server where one does not answer";

/// The steps in order, one line each, without numbers.
pub fn plan(mount: &Mount) -> Vec<String> {
    let mut steps = Vec::new();
    add(&mut steps, mount);
    let flags = mount.flags().words().collect::<Vec<_>>().join(",");
    steps.push(format!("attach at the target{}", if flags.is_empty() { flags } else { format!(" ({flags})") }));
    steps
}

fn add(steps: &mut Vec<String>, mount: &Mount) {
    match mount {
        Mount::Attach(attach) => {
            let fs_type = match attach.fs_type {
                FsType::Sif => FsType::Squashfs,
                other => other,
            };
            match &attach.device {
                Device::Loopback(loopback) => {
                    let file = beneath(steps, &loopback.base, &loopback.path);
                    if loopback.is_index() {
                        steps.push(format!("read {file}, and open the layers that it names"));
                        steps.push("attach each read-only to a loop device".to_owned());
                        steps.extend(loopback.is_replicated().then(|| JOIN.to_owned()));
                        steps.extend(loopback.verity.map(|_| {
                            "verify each block of them by the root hashes of the index, which is signed".to_owned()
                        }));
                        steps.push(format!("mount each: {fs_type} (ro)"));
                        steps.push("stack overlay: the layers, upper: none".to_owned());
                        return;
                    }
                    steps.push(format!("open {file}"));
                    let what = match attach.fs_type {
                        FsType::Sif => "the squashfs in it",
                        _ if loopback.is_replicated() => "each",
                        _ => "it",
                    };
                    steps.push(format!("attach {what} read-only to a loop device"));
                    steps.extend(loopback.is_replicated().then(|| JOIN.to_owned()));
                    steps.extend(loopback.verity.map(|verity| match verity {
                        Verity::Root(_) => format!("verify each block of it by the root hash {verity}"),
                        Verity::Signed => "verify each block of it by the signed root hash beside it".to_owned(),
                    }));
                }
                Device::Local { path } => steps.push(format!("open the block device {path} read-only")),
            }
            steps.push(format!("mount {fs_type} (ro)"));
        }
        Mount::Bind(bind) => {
            let is_image = matches!(mount.shown()[..], [Mount::Attach(_)]);
            let flags = match (mount.is_writable(), is_image) {
                (_, true) => "ro",
                (true, false) => "rw,nosuid,nodev",
                (false, false) => "ro,nosuid,nodev",
            };
            add_bind(steps, bind, flags);
        }
        Mount::Nfs(nfs) => {
            let of_each = |nfs: &Nfs| format!("mount NFS {} out of the host's sight", source(nfs));
            steps.extend(nfs.on_each().iter().map(of_each));
        }
        Mount::Overlay(overlay) => add_overlay(steps, overlay),
    }
}

fn add_bind(steps: &mut Vec<String>, bind: &Bind, flags: &str) {
    let directory = beneath(steps, &bind.base, &bind.path);
    let how = if bind.recursive { "bind recursively" } else { "bind" };
    steps.push(format!("{how} {directory} ({flags})"));
}

fn add_overlay(steps: &mut Vec<String>, overlay: &Overlay) {
    for lower in &overlay.lower {
        add(steps, lower);
    }
    let upper = match overlay.upper {
        Upper::Directory { size: None } => "directory".to_owned(),
        Upper::Directory { size: Some(size) } => format!("file system of {size} bytes on the node's disk"),
        Upper::Tmpfs { size } => format!("tmpfs of {size} bytes"),
        Upper::None => "none".to_owned(),
    };
    let root = if overlay.root == UpperRoot::default() { String::new() } else { format!(" ({})", overlay.root) };
    steps.push(format!("stack overlay: {} lower, upper: {upper}{root}", overlay.lower.len()));
}

/// What is at `path` below `base`, once the base is there.
fn beneath(steps: &mut Vec<String>, base: &Base, path: &str) -> String {
    match base {
        Base::Root => format!("/{path} of the node"),
        Base::Mount(mount) => {
            add(steps, mount);
            let it = if base.export().is_some_and(Nfs::is_replicated) { "each" } else { "it" };
            if path.is_empty() { it.to_owned() } else { format!("{path} beneath {it}") }
        }
    }
}

/// `192.168.3.253:/images (nfs 4.2, ro)`
fn source(nfs: &Nfs) -> String {
    let mode = if nfs.read_only { "ro" } else { "rw" };
    let options: String = nfs.options.iter().map(|option| format!(", {option}")).collect();
    format!("{nfs} (nfs {}, {mode}{options})", nfs.version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::json;

    #[test]
    fn an_image_under_an_overlay_takes_six_steps() {
        let parsed = json::parse(include_str!("testdata/nfs-loopback.json")).unwrap();
        assert_eq!(
            plan(parsed.mount()),
            [
                "mount NFS 192.168.3.253:/images (nfs 4.2, ro) out of the host's sight",
                "open image.sqsh beneath it",
                "attach it read-only to a loop device",
                "mount squashfs (ro)",
                "stack overlay: 1 lower, upper: directory",
                "attach at the target",
            ]
        );
    }

    #[test]
    fn an_image_on_several_servers_is_attached_from_each_and_joined() {
        let spec = include_str!("testdata/nfs-loopback.json").replace("192.168.3.253", "a, fd00::1");
        assert_eq!(
            plan(json::parse(&spec).unwrap().mount()),
            [
                "mount NFS a:/images (nfs 4.2, ro) out of the host's sight",
                "mount NFS [fd00::1]:/images (nfs 4.2, ro) out of the host's sight",
                "open image.sqsh beneath each",
                "attach each read-only to a loop device",
                JOIN,
                "mount squashfs (ro)",
                "stack overlay: 1 lower, upper: directory",
                "attach at the target",
            ]
        );
    }

    #[test]
    fn of_a_sif_the_squashfs_in_it_is_mounted() {
        let spec = r#"{"kind":"attach","attach":{"fs_type":"sif","attach":{"kind":"loopback","loopback":
            {"path":"lustre/a.sif","base":"root"}}}}"#;
        assert_eq!(
            plan(json::parse(spec).unwrap().mount()),
            [
                "open /lustre/a.sif of the node",
                "attach the squashfs in it read-only to a loop device",
                "mount squashfs (ro)",
                "attach at the target",
            ]
        );
    }

    #[test]
    fn binds_and_devices_are_told_apart() {
        let spec = r#"{"kind":"overlay","overlay":{"upper":{"kind":"tmpfs","size":"1k","uid":1000,"mode":"0770"},"lower":[
            {"kind":"bind","bind":{"path":"/etc","base":"root"}},
            {"kind":"bind","bind":{"path":"opt","base":"mount","recursive":true,"mount":{"kind":"attach","attach":
                {"fs_type":"xfs","mount_options":["noexec"],"attach":{"kind":"local","local":{"path":"/dev/sda"}}}}}},
            {"kind":"nfs","nfs":{"host":"fd00::1","path":"/a","version":"3","options":["hard"]}}]}}"#;
        assert_eq!(
            plan(json::parse(spec).unwrap().mount()),
            [
                "bind /etc of the node (ro,nosuid,nodev)",
                "open the block device /dev/sda read-only",
                "mount xfs (ro)",
                "bind recursively opt beneath it (ro)",
                "mount NFS [fd00::1]:/a (nfs 3, rw, hard) out of the host's sight",
                "stack overlay: 3 lower, upper: tmpfs of 1000 bytes (uid 1000, mode 0770)",
                "attach at the target (noexec)",
            ]
        );
    }
}
