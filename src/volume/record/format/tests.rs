//! What is written, and what every version wrote, is read.

use std::collections::BTreeMap;

use super::*;
use crate::spec::json;
use crate::spec::parameters::parse_attributes;

/// The examples of one version, by name.
fn golden(version: u32) -> BTreeMap<String, String> {
    let directory = format!("{}/src/volume/record/golden/version-{version}", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    files.map(|path| (name(&path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The volumes of which a version has a record, made of what users wrote.
fn volumes(version: u32) -> BTreeMap<&'static str, Record> {
    let nfs = r#"{"kind":"nfs","nfs":{"path":"/images","host":"fd00:99::2","ro":true,"version":"3",
        "options":["hard","timeo=600"]}}"#;
    let everything = r#"{"kind":"overlay","overlay":{"upper":{"kind":"tmpfs","size":"64Mi"},"lower":[
        {"kind":"attach","attach":{"fs_type":"erofs","mount_options":["ro","noexec"],"attach":{"kind":"loopback","loopback":
            {"path":"/inner/image.erofs","base":"mount","mount":{"kind":"attach","attach":{"fs_type":"ext4","attach":
                {"kind":"loopback","loopback":{"path":"a.ext4","base":"mount","mount":NFS}}}}}}}},
        {"kind":"bind","bind":{"path":"opt/tools","base":"mount","recursive":true,"ro":true,"mount":{"kind":"attach",
            "attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"images/a.sqsh","base":"root"}}}}}},
        {"kind":"bind","bind":{"path":"/etc","base":"root"}},
        {"kind":"attach","attach":{"fs_type":"xfs","attach":{"kind":"local","local":{"path":"/dev/sda"}}}},
        NFS]}}"#;
    let stacked = r#"{"kind":"overlay","overlay":{"upper":{"kind":"none"},"lower":[
        {"kind":"nfs","nfs":{"path":"/export","host":"nfs.example.org","version":"4.1"}},
        {"kind":"nfs","nfs":{"path":"/export","host":"10.0.0.5","version":"4.0","options":["sec=krb5p"]}}]}}"#;
    let record = |name: &str, spec: &str| {
        let mount = json::parse(&spec.replace("NFS", nfs)).unwrap().mount().clone();
        // The innermost image is attached first.
        let images = mount.images().into_iter().cloned().collect::<Vec<_>>();
        let order: &[usize] = if images.len() == 3 { &[1, 0, 2] } else { &[0, 1, 2] };
        let content = |n: u64| Content { inode: 10 * n, size: 4096 * n, modified: 1_764_109_200_000_000_000 + n };
        let images = order.iter().filter_map(|&at| images.get(at).cloned()).zip((1..).map(content)).collect();
        let target = format!("/var/lib/kubelet/pods/{name}/mount").into();
        let volume_id = format!("pvc-{name}");
        Record { volume_id, target, mount, read_only: false, exclusive: false, namespace: None, images, scratch: None }
    };
    let scratch = Some("scratch-1764109200000000001".into());
    let seed = include_str!("../../../spec/testdata/nfs-loopback.json");
    let flat = [("server", "192.168.3.253"), ("share", "/images"), ("image", "tools.sqsh")];
    let flat = read_flat(&[&flat[..], &[("nfsVersion", "4.1"), ("mountOptions", "noexec,nconnect=4")]].concat());
    let image = flat.images()[0].clone();
    let claim = r#"{"kind":"bind","bind":{"path":"opt","base":"mount","mount":{"kind":"attach","attach":{"fs_type":"squashfs",
        "attach":{"kind":"loopback","loopback":{"path":"a.sqsh","base":"mount","mount":NFS}}}}}}"#;
    let claim = read_flat(&[("mountSpec", &claim.replace("NFS", nfs)), ("symlinks", "refuse")]);
    let claim = Record { mount: claim, namespace: Some("team".into()), ..record("claim", seed) };
    let sized = seed.replace(r#""lower""#, r#""upper": {"kind": "directory", "size": "10Gi"}, "lower""#);
    assert_ne!(sized, seed);
    let owned = r#""upper": {"kind": "tmpfs", "size": "1Gi", "uid": 1000, "gid": 100, "mode": "1770"}, "lower""#;
    let owned = seed.replace(r#""lower""#, owned);
    assert_ne!(owned, seed);
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let tools = |name: &str, more: (&str, &str)| {
        let pairs = [("server", "nfs"), ("share", "/images"), ("image", "tools.sqsh"), more];
        Record { mount: read_flat(&pairs), images: Vec::new(), ..record(name, seed) }
    };
    let copied = tools("copied", ("digest", &digest));
    let verified = tools("verified", ("verity", &digest["sha256:".len()..]));
    let prefetched = tools("prefetched", ("prefetch", "all"));
    let flags = tools("flags", ("mountOptions", "nosuid,nodev"));
    let layered = read_flat(&[("server", "nfs"), ("share", "/images"), ("image", "team/tools.json")]);
    let layers = [("upper.sqsh", Some(spec::Verity::Root([1; 32]))), ("base.sqsh", None)]
        .map(|(name, verity)| layered.images()[0].layer(&index::Layer { name: name.into(), verity }));
    let contents = [4, 5].map(|n| Content { inode: n, size: 4096, modified: n });
    let images = layers.into_iter().zip(contents).collect();
    let layered = Record { mount: layered, images, ..record("layered", seed) };
    let sif = read_flat(&[("hostPath", "/lustre/images"), ("image", "tools.sif"), ("fsType", "sif")]);
    let sif = Record { mount: sif, images: Vec::new(), ..record("sif", seed) };
    let replicated = seed.replace("192.168.3.253", "nfs-1, fd00:99::2, nfs-3");
    assert_ne!(replicated, seed);
    let since = BTreeMap::from([
        ("owned", 10),
        ("flags", 9),
        ("replicated", 8),
        ("sif", 7),
        ("layered", 6),
        ("claim", 2),
        ("sized", 2),
        ("copied", 3),
        ("verified", 4),
        ("prefetched", 5),
    ]);
    let mut volumes = BTreeMap::from([
        ("claim", Record { images: Vec::new(), ..claim }),
        ("copied", copied),
        ("verified", verified),
        ("flags", flags),
        ("layered", layered),
        ("prefetched", prefetched),
        ("sif", sif),
        ("replicated", record("replicated", &replicated)),
        ("sized", Record { scratch: scratch.clone(), ..record("sized", &sized) }),
        ("owned", record("owned", &owned)),
        ("seed", Record { scratch, exclusive: true, ..record("seed", seed) }),
        ("everything", record("everything", everything)),
        ("stacked", Record { read_only: true, ..record("stacked", stacked) }),
        (
            "by-hand",
            Record {
                volume_id: "by hand: /mnt/tools".into(),
                target: "/mnt/tools".into(),
                mount: flat,
                read_only: true,
                exclusive: false,
                namespace: None,
                images: vec![(image, Content { inode: 1, size: 2, modified: 3 })],
                scratch: None,
            },
        ),
    ]);
    volumes.retain(|name, _| since.get(name).is_none_or(|&since| since <= version));
    volumes
}

fn read_flat(pairs: &[(&str, &str)]) -> spec::Mount {
    let pairs: BTreeMap<_, _> = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    parse_attributes(&pairs, &[]).unwrap().mount().clone()
}

#[test]
fn a_record_of_every_version_is_read() {
    for version in 0..=VERSION {
        let golden = golden(version);
        assert_eq!(golden.len(), volumes(version).len());
        for (name, expected) in volumes(version) {
            let sorted = |mut record: Record| {
                record.images.sort_by_key(|(image, _)| image.path.clone());
                record
            };
            let record = read(golden[name].as_bytes()).unwrap();
            assert_eq!(sorted(record), sorted(expected), "{name} of version {version}");
        }
    }
}

#[test]
fn what_is_written_is_the_present_version() {
    // For a new version: what is there is never changed.
    if std::env::var_os("NEW_GOLDEN").is_some() {
        let directory = format!("{}/src/volume/record/golden/version-{VERSION}", env!("CARGO_MANIFEST_DIR"));
        std::fs::create_dir(&directory).unwrap();
        for (name, record) in volumes(VERSION) {
            std::fs::write(format!("{directory}/{name}.json"), write(&record).unwrap()).unwrap();
        }
    }
    for (name, record) in volumes(VERSION) {
        let text = String::from_utf8(write(&record).unwrap()).unwrap();
        assert_eq!(golden(VERSION)[name], text, "{name}: a change of the format is a new version");
    }
}

#[test]
fn of_a_record_that_cannot_be_read_volume_and_target_are_told() {
    let newer = format!(r#"{{"version": {}, "volumeId": "v", "target": "/t", "mount": "?"}}"#, VERSION + 1);
    let failure = read(newer.as_bytes()).unwrap_err();
    assert_eq!((failure.head.volume_id.as_deref(), failure.head.target), (Some("v"), Some("/t".into())));
    assert!(failure.why.contains(&format!("and this driver reads up to {VERSION}")), "{}", failure.why);
    let spoilt = br#"{"version": 1, "volumeId": "v", "target": "/t", "readOnly": false, "mount": {"Ufo": {}}}"#;
    assert_eq!(read(spoilt).unwrap_err().head.volume_id.as_deref(), Some("v"));
    for text in ["", "{", "[]", "null", "{\"version\": -1}"] {
        assert!(read(text.as_bytes()).unwrap_err().head.target.is_none(), "{text}");
    }
}
