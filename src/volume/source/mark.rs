//! The marks by which the driver knows its own mounts and devices again, also after a restart: what writes each, beside what reads
//! it.

use std::sync::Arc;

use crate::kernel::loop_device::Tag;
use crate::kernel::mountinfo::MountInfo;

/// The mark of one driver name: two drivers on a node differ in it.
#[derive(Clone, Debug)]
pub struct Mark {
    driver_name: Arc<str>,
    tag: Tag,
}

impl Mark {
    pub fn new(driver_name: &str) -> Self {
        Mark { driver_name: driver_name.into(), tag: Tag::new(driver_name) }
    }

    /// The mark of loop devices.
    pub fn tag(&self) -> &Tag {
        &self.tag
    }

    /// The source that the mount table shows of an overlay.
    pub fn overlay_source(&self) -> Arc<str> {
        Arc::clone(&self.driver_name)
    }

    /// Whether the mount table shows a mount that the driver made of an overlay or of one of its `loop_devices`. A directory or an export
    /// carries no mark.
    pub fn is_on(&self, mount: &MountInfo, loop_devices: &[u32]) -> bool {
        match mount.loop_device() {
            Some(number) => loop_devices.contains(&number),
            None => mount.fs_type == "overlay" && *mount.source == *self.driver_name,
        }
    }
}

/// What an overlay's layer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    LoopDevice(u32),
    LocalDevice,
    Nfs,
    Bind,
    Tmpfs,
    Overlay,
}

/// The name of an overlay's layer, which the mount table shows: `0-loop3`. Short, as all of them share 255 bytes.
pub fn layer_name(index: usize, layer: Layer) -> String {
    match layer {
        Layer::LoopDevice(number) => format!("{index}-loop{number}"),
        Layer::LocalDevice => format!("{index}-local"),
        Layer::Nfs => format!("{index}-nfs"),
        Layer::Bind => format!("{index}-bind"),
        Layer::Tmpfs => format!("{index}-tmpfs"),
        Layer::Overlay => format!("{index}-overlay"),
    }
}

/// The loop devices below a mount: the one that is mounted, or those that an overlay's layers name; uppermost first.
pub fn loop_devices_of(mount: &MountInfo) -> Vec<u32> {
    if let Some(number) = mount.loop_device() {
        return vec![number];
    }
    let options = mount.super_options.split(',');
    let layers = options.filter_map(|option| option.strip_prefix("lowerdir=").or(option.strip_prefix("lowerdir+=")));
    layers.flat_map(|layers| layers.split(':')).filter_map(|layer| layer.split_once("-loop")?.1.parse().ok()).collect()
}

/// The mount point of an export in the driver's namespace.
pub fn nfs_directory(number: u64) -> String {
    format!("nfs-{number}")
}

/// The kernel shows a file's path with the mount point in the driver's namespace, while that lives: `/nfs-0/image.sqsh`.
pub fn without_nfs_directory(path: &str) -> &str {
    let rest = path.strip_prefix("/nfs-").map(|rest| rest.trim_start_matches(|letter: char| letter.is_ascii_digit()));
    rest.filter(|rest| rest.starts_with('/')).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: (u32, u32), source: &str, super_options: String) -> MountInfo {
        MountInfo {
            id: 1,
            parent: 0,
            device,
            mount_point: "/t".into(),
            options: "rw".into(),
            shared: true,
            fs_type: "overlay".into(),
            source: source.into(),
            super_options,
        }
    }

    #[test]
    fn the_loop_devices_of_an_overlay_are_read_from_the_names_of_its_layers() {
        let layers = [Layer::LoopDevice(3), Layer::Nfs, Layer::LoopDevice(11), Layer::LocalDevice, Layer::Bind];
        let names: Vec<_> = layers.iter().enumerate().map(|(index, &layer)| layer_name(index, layer)).collect();
        let old = format!("rw,lowerdir={},upperdir=upper/upper,workdir=upper/work", names.join(":"));
        assert_eq!(loop_devices_of(&mount((0, 50), "a", old)), [3, 11]);
        let new = names.iter().map(|name| format!("lowerdir+={name}")).collect::<Vec<_>>();
        assert_eq!(loop_devices_of(&mount((0, 50), "a", format!("ro,{}", new.join(",")))), [3, 11]);
        assert_eq!(loop_devices_of(&mount((7, 12), "/dev/loop12", "ro".into())), [12]);
    }

    #[test]
    fn a_mount_is_known_by_the_driver_s_name_or_by_its_loop_device() {
        let (mine, other) = (Mark::new("a.csi.dev"), Mark::new("b.csi.dev"));
        let overlay = mount((0, 50), &mine.overlay_source(), String::new());
        assert!(mine.is_on(&overlay, &[]) && !other.is_on(&overlay, &[]));
        let image = mount((7, 12), "/dev/loop12", String::new());
        assert!(mine.is_on(&image, &[12]) && !mine.is_on(&image, &[13]));
    }

    #[test]
    fn the_mount_point_of_an_export_is_taken_off_a_path() {
        assert_eq!(without_nfs_directory(&format!("/{}/a/image.sqsh", nfs_directory(12))), "/a/image.sqsh");
        for path in ["/image.sqsh", "/nfs-a/image.sqsh", "/nfs-12"] {
            assert_eq!(without_nfs_directory(path), path);
        }
    }
}
