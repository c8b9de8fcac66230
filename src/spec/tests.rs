//! Properties that hold for every text and every mount.

use std::collections::BTreeMap;

use proptest::collection::{hash_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use super::parameters::parse_attributes;
use super::policy::Policy;
use super::replicas::MAX_SERVERS;
use super::{
    Attach, Base, Bind, Device, FsType, Loopback, MAX_DEPTH, Mount, MountFlags, Nfs, NfsVersion, Overlay, Symlinks,
    Upper, UpperRoot, json, options, schema, template, text,
};

/// The JSON form of a mount, which the driver itself never writes.
fn to_json(mount: &Mount) -> Value {
    let based = |path: &str, base: &Base| match base {
        Base::Root => json!({ "path": path, "base": "root" }),
        Base::Mount(mount) => json!({ "path": path, "base": "mount", "mount": to_json(mount) }),
    };
    match mount {
        Mount::Attach(attach) => {
            let device = match &attach.device {
                Device::Local { path } => json!({ "kind": "local", "local": { "path": path } }),
                Device::Loopback(file) => {
                    json!({ "kind": "loopback", "loopback": based(&file.path, &file.base) })
                }
            };
            let options: Vec<_> = attach.flags.words().collect();
            json!({ "kind": "attach", "attach": {
                "fs_type": attach.fs_type.as_str(), "mount_options": options, "attach": device,
            } })
        }
        Mount::Bind(bind) => {
            let mut object = based(&bind.path, &bind.base);
            object["recursive"] = bind.recursive.into();
            object["ro"] = bind.read_only.into();
            json!({ "kind": "bind", "bind": object })
        }
        Mount::Nfs(nfs) => json!({ "kind": "nfs", "nfs": {
            "host": nfs.hosts().collect::<Vec<_>>().join(","), "path": nfs.path, "ro": nfs.read_only, "version": nfs.version.as_str(),
            "options": nfs.options.iter().map(ToString::to_string).collect::<Vec<_>>(),
        } }),
        Mount::Overlay(overlay) => {
            let mut upper = match overlay.upper {
                Upper::Directory { size: None } => json!({ "kind": "directory" }),
                Upper::Directory { size: Some(size) } => json!({ "kind": "directory", "size": size.to_string() }),
                Upper::Tmpfs { size } => json!({ "kind": "tmpfs", "size": size.to_string() }),
                Upper::None => json!({ "kind": "none" }),
            };
            let UpperRoot { uid, gid, mode } = overlay.root;
            for (name, value) in [("uid", uid.map(Value::from)), ("gid", gid.map(Value::from))] {
                upper.as_object_mut().unwrap().extend(value.map(|value| (name.to_owned(), value)));
            }
            if let Some(mode) = mode {
                upper["mode"] = format!("{mode:o}").into();
            }
            let lower: Vec<Value> = overlay.lower.iter().map(to_json).collect();
            json!({ "kind": "overlay", "overlay": { "lower": lower, "upper": upper } })
        }
    }
}

const VERSIONS: &[NfsVersion] = &[NfsVersion::V3, NfsVersion::V4_0, NfsVersion::V4_1, NfsVersion::V4_2];

fn nfs() -> impl Strategy<Value = Mount> {
    let options = select(vec![&["hard", "timeo=600"][..], &["soft"], &[]]);
    ("[a-z][a-z0-9]{0,8}", "(/[a-z, ]{1,5}){1,3}", any::<bool>(), select(VERSIONS), options).prop_map(
        |(host, path, read_only, version, options)| {
            let options = options.iter().map(|text| options::parse(text).unwrap()).collect();
            Mount::Nfs(Nfs { host, replicas: Vec::new(), one_of: Vec::new(), path, read_only, version, options })
        },
    )
}

/// An image on several servers, itself or in a directory.
fn replicated() -> impl Strategy<Value = Mount> {
    let host = prop_oneof!["[a-z][a-z0-9]{0,8}", "10\\.0\\.[1-9]\\.[1-9]", "fd00::[1-9a-f]{1,4}"];
    let options = select(vec![&["softerr", "timeo=600"][..], &[]]);
    let of_nfs = (hash_set(host, 2..=MAX_SERVERS), select(VERSIONS), options);
    (of_nfs, any::<bool>(), select(vec![FsType::Squashfs, FsType::Erofs])).prop_map(
        |((hosts, version, options), in_directory, fs_type)| {
            let mut hosts = hosts.into_iter().map(|host| text::host(&host).unwrap());
            let (host, replicas) = (hosts.next().unwrap(), hosts.collect());
            let options = options.iter().map(|text| options::parse(text).unwrap()).collect();
            let (one_of, path) = (Vec::new(), "/images".into());
            let nfs = Mount::Nfs(Nfs { host, replicas, one_of, path, read_only: true, version, options });
            let (path, base) = ("a".to_owned(), Base::Mount(Box::new(nfs)));
            let symlinks = Symlinks::Follow;
            let base = match in_directory {
                true => {
                    Base::Mount(Box::new(Mount::Bind(Bind { path, symlinks, base, recursive: false, read_only: true })))
                }
                false => base,
            };
            let device = Device::Loopback(Loopback::new("i".to_owned(), base));
            Mount::Attach(Attach { fs_type, flags: MountFlags::default(), device })
        },
    )
}

/// Any mount without an overlay.
fn layer() -> impl Strategy<Value = Mount> {
    // Up to three of these lie in `replicated`, and all of them in an overlay.
    let depth = MAX_DEPTH as u32 - 4;
    prop_oneof![3 => nfs().boxed(), 1 => replicated().boxed()].prop_recursive(depth, 8, 1, |inner| {
        let base = prop_oneof![inner.prop_map(|mount| Base::Mount(Box::new(mount))), Just(Base::Root),];
        let path = "[a-z]{1,5}(/[a-z]{1,5}){0,2}";
        prop_oneof![
            (path, base.clone(), any::<bool>(), any::<bool>()).prop_map(|(path, base, recursive, read_only)| {
                Mount::Bind(Bind { path, symlinks: Symlinks::Follow, base, recursive, read_only })
            }),
            (path, base, select(&FsType::ALL[..]), any::<[bool; 3]>()).prop_map(|(path, base, fs_type, flags)| {
                let [no_exec, no_suid, no_dev] = flags;
                let flags = MountFlags { no_exec, no_suid, no_dev };
                let device = Device::Loopback(Loopback::new(path, base));
                Mount::Attach(Attach { fs_type, flags, device })
            }),
        ]
    })
}

fn mount() -> impl Strategy<Value = Mount> {
    let upper = prop_oneof![
        Just(Upper::default()),
        (Upper::SMALLEST_DIRECTORY..=i64::MAX as u64).prop_map(|size| Upper::Directory { size: Some(size) }),
        Just(Upper::None),
        (1..=i64::MAX as u64).prop_map(|size| Upper::Tmpfs { size }),
    ];
    let root = (option::of(0..u32::MAX), option::of(0..u32::MAX), option::of(0..=0o7777u32));
    prop_oneof![
        layer(),
        (vec(layer(), 1..5), upper, root).prop_map(|(mut lower, upper, (uid, gid, mode))| {
            lower.dedup();
            let root = if upper == Upper::None { UpperRoot::default() } else { UpperRoot { uid, gid, mode } };
            Mount::Overlay(Overlay { lower, upper, root })
        }),
    ]
}

const WORDS: &[&str] = &[
    "kind", "attach", "bind", "nfs", "overlay", "lower", "upper", "loopback", "local", "path", "base", "mount", "root",
    "host", "options", "fs_type", "squashfs", "id", "size", "tmpfs", "/", "..", "hard",
];

/// JSON made of the words of specs: it gets further than random text.
fn almost_a_spec() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        select(WORDS).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(Value::Null),
    ];
    leaf.prop_recursive(8, 64, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((select(WORDS).prop_map(ToOwned::to_owned), inner), 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn is_known(option: &super::NfsOption) -> bool {
    options::parse(&option.to_string()).as_ref() == Ok(option)
}

proptest! {
    #[test]
    fn a_mount_survives_its_json_form(mount in mount()) {
        let mut unique = true;
        if let Mount::Overlay(Overlay { lower, .. }) = &mount {
            unique = lower.iter().enumerate().all(|(at, layer)| !lower[..at].contains(layer));
        }
        prop_assume!(unique);
        let value = to_json(&mount);
        prop_assert!(schema::tests::is_accepted(&value));
        let parsed = json::parse(&value.to_string()).map(|parsed| parsed.mount().clone());
        prop_assert_eq!(parsed, Ok(mount));
    }

    #[test]
    fn on_each_of_its_servers_an_image_is_the_same(mount in replicated()) {
        let image = mount.images()[0];
        let export = image.base.export().unwrap();
        let each = image.on_each();
        let hosts: Vec<_> = each.iter().map(|image| image.base.export().unwrap().host.as_str()).collect();
        prop_assert_eq!(hosts, export.hosts().collect::<Vec<_>>());
        for (alone, nfs) in each.iter().zip(export.on_each()) {
            prop_assert!(!alone.is_replicated());
            prop_assert_eq!(alone.base.export(), Some(&nfs));
            let all = Nfs { host: export.host.clone(), replicas: export.replicas.clone(), one_of: Vec::new(), ..nfs };
            prop_assert_eq!(&all, export);
        }
    }

    #[test]
    fn no_text_makes_a_reader_panic(text in any::<String>()) {
        let _ = json::parse(&text);
        let _ = Policy::parse(&text);
        let _ = options::parse(&text);
        for key in ["mountSpec", "server", "mountOptions", text.as_str()] {
            let map = BTreeMap::from([(key.to_owned(), text.clone())]);
            let _ = parse_attributes(&map, std::slice::from_ref(&text));
            let _ = template::expand(&map);
        }
    }

    #[test]
    fn no_json_makes_a_reader_panic(value in almost_a_spec()) {
        let text = value.to_string();
        let _ = Policy::parse(&text);
        if let Err(error) = json::parse(&text) {
            // The place exists, as far as serde's data model has places.
            prop_assert!(error.pointer.is_empty() || value.pointer(&error.pointer).is_some());
        }
    }

    #[test]
    fn flat_values_stay_what_they_are(
        server in prop_oneof![any::<String>(), "[a-b, /\\[:=]{0,9}"], share in any::<String>(), image in any::<String>(), option in any::<String>(),
    ) {
        let map = [("server", server), ("share", share), ("image", image), ("nfsOptions", option)];
        let map: BTreeMap<_, _> = map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        if let Ok(parsed) = parse_attributes(&map, &[]) {
            parsed.mount().try_visit::<()>(&mut |_, mount| {
                if let Mount::Nfs(nfs) = mount {
                    assert!(nfs.options.iter().all(is_known));
                    assert!(nfs.hosts().all(|host| !host.contains(['/', ',', '=', ' ', '['])));
                    assert!(nfs.hosts().count() <= MAX_SERVERS);
                    assert!(nfs.path.starts_with('/') && nfs.path.split('/').all(|part| part != ".."));
                }
                Ok(())
            }).unwrap();
        }
    }

    #[test]
    fn an_option_is_from_the_table_or_refused(text in "[a-z]{0,8}=?[a-z0-9,:=/ ]{0,8}") {
        if let Ok(option) = options::parse(&text) {
            prop_assert!(options::keys().contains(&option.key.as_str()));
            prop_assert!(is_known(&option) && !option.to_string().contains([',', ' ', ':', '/']));
        }
    }
}
