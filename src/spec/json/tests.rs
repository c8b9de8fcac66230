use super::*;
use crate::spec::UpperRoot;
use crate::spec::error::ErrorKind;
use crate::spec::{
    Attach, Base, Device, FsType, Loopback, MAX_DEPTH, MAX_LOWER, MOUNT_SPEC, Mount, MountFlags, Nfs, NfsVersion,
    Overlay, Upper, mount_options,
};

const SEED: &str = include_str!("../testdata/nfs-loopback.json");

/// Replaces each `NFS` by an export and each `IMAGE` by an image on it, to keep the specs below readable.
fn spec(text: &str) -> String {
    let nfs = r#"{"kind":"nfs","nfs":{"host":"a","path":"/"}}"#;
    let image = r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback",
        "loopback":{"path":"i","base":"mount","mount":NFS}}}}"#;
    text.replace("IMAGE", image).replace("NFS", nfs)
}

fn nfs(fields: &str) -> String {
    format!(r#"{{"kind":"nfs","nfs":{{"host":"a","path":"/"{fields}}}}}"#)
}

#[test]
fn the_image_api_s_own_example_is_read() {
    let nfs = Nfs {
        host: "192.168.3.253".to_owned(),
        replicas: vec![],
        one_of: vec![],
        path: "/images".to_owned(),
        read_only: true,
        version: NfsVersion::V4_2,
        options: vec![],
    };
    let base = Base::Mount(Box::new(Mount::Nfs(nfs)));
    let image = Mount::Attach(Attach {
        fs_type: FsType::Squashfs,
        flags: MountFlags::default(),
        device: Device::Loopback(Loopback::new("image.sqsh".to_owned(), base)),
    });
    let mount = Mount::Overlay(Overlay { lower: vec![image], upper: Upper::default(), root: UpperRoot::default() });
    assert_eq!(parse(SEED), Ok(Parsed::new(mount, vec![], Form::Json)));
}

#[test]
fn every_sensible_nesting_is_read() {
    for text in [
        "NFS",
        "IMAGE",
        // Several layers, among them a plain export.
        r#"{"kind":"overlay","overlay":{"lower":[IMAGE,NFS],"upper":{"kind":"none"}}}"#,
        // A directory of an image.
        r#"{"kind":"bind","bind":{"path":"/opt","base":"mount","mount":IMAGE}}"#,
        // An image inside an image.
        r#"{"kind":"attach","attach":{"fs_type":"erofs","attach":{"kind":"loopback",
            "loopback":{"path":"inner","base":"mount","mount":IMAGE,"readPartitions":false}}}}"#,
        r#"{"kind":"attach","attach":{"fs_type":"xfs","mount_options":["ro","loop","relatime"],
            "attach":{"kind":"local","local":{"path":"/dev/sda"}}}}"#,
        r#"{"kind":"bind","bind":{"path":"","base":"root","recursive":true,"ro":true}}"#,
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/"},"overlay":null}"#,
    ] {
        parse(&spec(text)).unwrap();
    }
}

#[test]
fn uppers_are_ours() {
    for (text, upper) in [
        (r#"{"kind":"directory"}"#, Upper::default()),
        (r#"{"kind":"directory","size":"1Gi"}"#, Upper::Directory { size: Some(1 << 30) }),
        (r#"{"kind":"none"}"#, Upper::None),
        (r#"{"kind":"tmpfs","size":"256Mi"}"#, Upper::Tmpfs { size: 256 << 20 }),
        ("null", Upper::default()),
    ] {
        let text = spec(r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":UPPER}}"#).replace("UPPER", text);
        let Mount::Overlay(overlay) = parse(&text).unwrap().mount().clone() else { panic!("no overlay") };
        assert_eq!(overlay.upper, upper);
    }
}

#[test]
fn the_flags_of_images_are_kept() {
    let options = r#""mount_options":["noexec","ro","nodev"],"attach":{"kind""#;
    let text = spec("IMAGE").replace(r#""attach":{"kind""#, options);
    assert!(parse(&text).unwrap().mount().flags().words().eq(["nodev", "noexec"]));
}

#[test]
fn what_the_image_api_returns_is_ignored_with_a_warning() {
    let text = r#"{"kind":"overlay","refs":1,"mountpoint":"/x","overlay":{"workdir":"/w","upperdir":"/u","lower":[
        {"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"local","refs":1,"device_file":"/dev/loop0",
            "local":{"path":"/dev/sda"}}}}]}}"#;
    let mut places = parse(text).unwrap().warnings().to_vec();
    places.sort();
    let expected = [
        "mountSpec/mountpoint",
        "mountSpec/overlay/lower/0/attach/attach/device_file",
        "mountSpec/overlay/lower/0/attach/attach/refs",
        "mountSpec/overlay/upperdir",
        "mountSpec/overlay/workdir",
        "mountSpec/refs",
    ];
    assert_eq!(places, expected.map(|place| format!("{place}: ignored: only the ImageAPI sets it")));
}

#[test]
fn mount_options_reach_every_export_and_image() {
    let options = mount_options::parse(&["vers=4.1", "hard", "ro", "noexec"].map(ToOwned::to_owned));
    let mount = parse_with(&spec("IMAGE"), &options.unwrap()).unwrap().mount().clone();
    assert!(mount.flags().no_exec);
    mount
        .try_visit::<()>(&mut |_, mount| {
            if let Mount::Nfs(nfs) = mount {
                assert_eq!((nfs.version, nfs.options.len(), nfs.read_only), (NfsVersion::V4_1, 1, true));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn mount_options_must_fit_the_spec() {
    let root = r#"{"kind":"bind","bind":{"path":"/x","base":"root"}}"#;
    for (text, option, place, message) in [
        (root, "hard", "mountOptions", "nothing in the spec is NFS"),
        (root, "noexec", "mountOptions", "is for images"),
        (&nfs(r#","version":"4.2""#), "vers=4.1", "mountSpec/nfs/version", "contradicts"),
        (&nfs(r#","options":["soft"]"#), "hard", "mountSpec/nfs/options", "contradict each other"),
    ] {
        let options = mount_options::parse(&[option.to_owned()]).unwrap();
        let error = parse_with(text, &options).unwrap_err();
        assert_eq!(format!("{}{}", error.parameter, error.pointer), place);
        assert!(error.message.contains(message), "{error}");
    }
}

/// A spec with a mistake, the JSON pointer that the error has, and a part of its message.
const MISTAKES: &[(&str, &str, &str)] = &[
    // Grammar.
    ("", "", "EOF while parsing"),
    ("{", "", "line 1 column 1"),
    ("NFS x", "", "trailing characters"),
    ("[]", "", "expected an object, got sequence"),
    ("null", "", "expected an object, got null"),
    // Fields.
    ("{}", "", "missing field \"kind\""),
    (
        r#"{"kind":"nfs","nfs":{"hots":"a"}}"#,
        "/nfs",
        "unknown field \"hots\": did you mean \"host\"? known fields: host, path, ro, version, options",
    ),
    (r#"{"kind":"nfs","nfs":{"host":"a"}}"#, "/nfs", "missing field \"path\""),
    (r#"{"kind":"nfs","nfs":{"host":"a","host":"b","path":"/"}}"#, "/nfs", "duplicate field \"host\""),
    (r#"{"kind":"nfs","nsf":{}}"#, "", "known fields: kind, attach, bind, nfs, overlay"),
    (r#"{"kind":"nfs","a/b":1}"#, "", "unknown field \"a/b\";"),
    (r#"{"kind":"nfs","nfs":{"host":1,"path":"/"}}"#, "/nfs/host", "expected a string, got integer `1`"),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/","ro":"yes"}}"#, "/nfs/ro", "expected a boolean, got string \"yes\""),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/","version":4.2}}"#, "/nfs/version", "expected a string"),
    (r#"{"kind":"nfs","nfs":["a","/"]}"#, "/nfs", "expected an object"),
    // Kinds and objects.
    (
        r#"{"kind":"nsf"}"#,
        "/kind",
        "unknown value \"nsf\": did you mean \"nfs\"? known values: attach, bind, nfs, overlay",
    ),
    (
        r#"{"kind":"uri","uri":{}}"#,
        "/kind",
        "\"uri\" is a kind of the ImageAPI that this driver does not have; known values: attach, bind, nfs, overlay",
    ),
    (r#"{"kind":"nfs"}"#, "", "missing object \"nfs\""),
    (r#"{"kind":"bind","nfs":{"host":"a","path":"/"}}"#, "/nfs", "the kind is \"bind\""),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/"},"overlay":{"lower":[NFS]}}"#, "/overlay", "does not belong here"),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"iscsi"}}}"#,
        "/attach/attach/kind",
        "does not have; known values: loopback, local",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"rbd":{},"kind":"rbd"}}}"#,
        "/attach/attach",
        "does not have; known fields: kind, loopback, local",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"local"}}}"#,
        "/attach/attach",
        "missing object \"local\"",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"sif","attach":{"kind":"local","local":{"path":"/dev/sda"}}}}"#,
        "/attach/fs_type",
        "must be a \"loopback\"",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"sif","attach":{"kind":"loopback","loopback":{"path":"a","base":"root","verity":"signed"}}}}"#,
        "/attach/attach/loopback/verity",
        "not for \"sif\"",
    ),
    (r#"{"kind":"attach","attach":{"fs_type":"squash","attach":{}}}"#, "/attach/fs_type", "did you mean \"squashfs\"?"),
    // References and definitions of containers.
    (r#"{"id":7,"kind":"nfs"}"#, "/id", "references are not supported: embed the object"),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"id":1,"kind":"loopback"}}}"#,
        "/attach/attach/id",
        "references",
    ),
    (
        r#"{"name":"x","command":"/init","systemd":true,"mount":NFS}"#,
        "",
        "container definition: pass the object in its field \"mount\"",
    ),
    (r#"{"mount":NFS}"#, "", "\"mount\""),
    (r#"{"id":7}"#, "/id", "references are not supported: embed the object itself"),
    (r#"{"kind":{"nfs":null}}"#, "/kind", "expected a string, got map"),
    (r#"{"kind":5}"#, "/kind", "expected a string, got integer `5`"),
    // NFS.
    (r#"{"kind":"nfs","nfs":{"host":"a b","path":"/"}}"#, "/nfs/host", "not a host name"),
    (r#"{"kind":"nfs","nfs":{"host":"a,","path":"/"}}"#, "/nfs/host", "a comma without a server beside it"),
    (r#"{"kind":"nfs","nfs":{"host":"a,b","path":"/"}}"#, "/nfs/host", "has one server"),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"images"}}"#, "/nfs/path", "not an absolute path"),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/a/../b"}}"#, "/nfs/path", "\"..\""),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/\u0000"}}"#, "/nfs/path", "control character"),
    (
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/${pvc.metadata.name}"}}"#,
        "/nfs/path",
        "only in the parameters of a StorageClass",
    ),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/","version":"2"}}"#, "/nfs/version", "one of 3, 4.0, 4.1, 4.2"),
    (
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/","options":["hard","vers=3"]}}"#,
        "/nfs/options/1",
        "use \"version\"",
    ),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/","options":["hard,addr=b"]}}"#, "/nfs/options/0", "comma"),
    (r#"{"kind":"nfs","nfs":{"host":"a","path":"/","options":["hard","soft"]}}"#, "/nfs/options", "contradict"),
    // Attach.
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","mount_options":["ro","rw"],"attach":{"kind":"local"}}}"#,
        "/attach/mount_options/1",
        "known values: ro, nosuid, nodev, noexec, noatime, nodiratime, relatime, loop",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","mount_options":["ro,noexec"],"attach":{"kind":"local"}}}"#,
        "/attach/mount_options/0",
        "each string is one",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"local","local":{"path":"/etc/shadow"}}}}"#,
        "/attach/attach/local/path",
        "not below /dev",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"/","base":"root"}}}}"#,
        "/attach/attach/loopback/path",
        "names no file",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"a/../../b","base":"root"}}}}"#,
        "/attach/attach/loopback/path",
        "\"..\"",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"a","base":"root","readPartitions":true}}}}"#,
        "/attach/attach/loopback/readPartitions",
        "only false",
    ),
    (
        r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":{"path":"a","base":"mount"}}}}"#,
        "/attach/attach/loopback",
        "missing field \"mount\"",
    ),
    // Bind.
    (r#"{"kind":"bind","bind":{"path":"a","base":"root","mount":NFS}}"#, "/bind/mount", "does not belong here"),
    (r#"{"kind":"bind","bind":{"path":"a","base":"roto"}}"#, "/bind/base", "did you mean \"root\"?"),
    // Overlay.
    (r#"{"kind":"overlay","overlay":{"lower":[]}}"#, "/overlay/lower", "0 layers: from 1 to 20"),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS,IMAGE,NFS]}}"#,
        "/overlay/lower/2",
        "the same layer as /overlay/lower/0",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[{"kind":"overlay","overlay":{"lower":[NFS]}}]}}"#,
        "/overlay/lower/0/overlay",
        "outermost",
    ),
    (
        r#"{"kind":"bind","bind":{"path":"","base":"mount","mount":{"kind":"overlay","overlay":{"lower":[NFS]}}}}"#,
        "/bind/mount/overlay",
        "outermost",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"tmpfs"}}}"#,
        "/overlay/upper",
        "missing field \"size\"",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"tmpfs","size":"0"}}}"#,
        "/overlay/upper/size",
        "not a size",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"none","size":"1Gi"}}}"#,
        "/overlay/upper/size",
        "has no size",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"none","uid":0}}}"#,
        "/overlay/upper/uid",
        "belongs to nobody",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"directory","uid":-1}}}"#,
        "/overlay/upper/uid",
        "u32",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"directory","gid":4294967295}}}"#,
        "/overlay/upper/gid",
        "no group",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"directory","mode":"0o770"}}}"#,
        "/overlay/upper/mode",
        "octal digits",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"directory","mode":770}}}"#,
        "/overlay/upper/mode",
        "expected a string",
    ),
    (
        r#"{"kind":"overlay","overlay":{"lower":[NFS],"upper":{"kind":"directory","size":"1Mi"}}}"#,
        "/overlay/upper/size",
        "at least 16Mi",
    ),
];

#[test]
fn mistakes_are_told_with_their_place() {
    for (text, pointer, message) in MISTAKES {
        let error = parse(&spec(text)).expect_err(text);
        assert_eq!(error.pointer, *pointer, "{text}: {error}");
        assert!(error.message.contains(message), "{text}: {error}");
        assert_eq!((error.kind, error.parameter.as_str()), (ErrorKind::Invalid, MOUNT_SPEC));
    }
}

#[test]
fn an_error_reads_like_this() {
    let text = r#"{"kind":"overlay","overlay":{"lower":[{"kind":"nfs","nfs":{"hots":"a"}}]}}"#;
    assert_eq!(
        parse(text).unwrap_err().to_string(),
        "mountSpec/overlay/lower/0/nfs: unknown field \"hots\": did you mean \"host\"? \
         known fields: host, path, ro, version, options"
    );
}

#[test]
fn depth_is_limited() {
    let nested = |depth: usize| {
        let open = r#"{"kind":"bind","bind":{"path":"a","base":"mount","mount":"#;
        format!("{}{}{}", open.repeat(depth - 1), spec("NFS"), "}}".repeat(depth - 1))
    };
    parse(&nested(MAX_DEPTH)).unwrap();
    for depth in [MAX_DEPTH + 1, 100, 1_000] {
        let error = parse(&nested(depth)).unwrap_err();
        assert!(error.message.contains("at most 8 mounts inside each other"), "{error}");
    }
    for text in
        ["[".repeat(10_000), r#"{"a":"#.repeat(10_000), r#"{"kind":"nfs","refs":"#.to_owned() + &"[".repeat(10_000)]
    {
        assert!(parse(&text).is_err());
    }
    assert!(parse(&nested(10_000)).unwrap_err().message.contains("bytes are too many"));
}

#[test]
fn size_is_limited() {
    let error = parse(&format!("\"{}\"", "a".repeat(2 << 20))).unwrap_err();
    assert_eq!(error.message, "2097154 bytes are too many: at most 65536");
    let layers = vec![spec("NFS"); MAX_LOWER + 1].join(",");
    let error = parse(&format!(r#"{{"kind":"overlay","overlay":{{"lower":[{layers}]}}}}"#)).unwrap_err();
    assert_eq!(error.pointer, "/overlay/lower");
}

#[test]
fn errors_repeat_little_of_the_text_and_nothing_that_controls_a_terminal() {
    let long = "\\u001b".repeat(5_000);
    for text in [
        r#"{"kind":"LONG"}"#,
        r#"{"LONG":1}"#,
        r#"{"kind":"nfs","nfs":"LONG"}"#,
        r#"{"kind":"nfs","nfs":{"host":"LONG","path":"/"}}"#,
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/LONG"}}"#,
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/","options":["LONG"]}}"#,
        r#"{"kind":"nfs","nfs":{"host":"a","path":"/","version":"LONG"}}"#,
    ] {
        let error = parse(&text.replace("LONG", &long)).unwrap_err().to_string();
        assert!(error.len() < 1200, "{} bytes: {error}", error.len());
        assert!(!error.contains(char::is_control), "{error:?}");
    }
}
