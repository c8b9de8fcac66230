use super::*;
use crate::spec::error::ErrorKind;

const SPEC: &str = r#"{"kind":"nfs","nfs":{"host":"a","path":"/"}}"#;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn read(pairs: &[(&str, &str)], mount_options: &[&str]) -> Result<Parsed, SpecError> {
    let mount_options: Vec<String> = mount_options.iter().map(|text| (*text).to_owned()).collect();
    parse_attributes(&map(pairs), &mount_options)
}

/// The three required parameters and some more.
fn flat_with(more: &[(&str, &str)], mount_options: &[&str]) -> Result<Parsed, SpecError> {
    let mut pairs = vec![("server", "nfs"), ("share", "/images"), ("image", "a/b.sqsh")];
    pairs.retain(|(key, _)| !more.iter().any(|(other, _)| other == key));
    pairs.extend(more);
    read(&pairs, mount_options)
}

#[test]
fn the_flat_form_is_an_image_on_an_export() {
    let json = r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":
        {"path":"a/b.sqsh","base":"mount","mount":{"kind":"nfs","nfs":{"host":"nfs","path":"/images","ro":true}}}}}}"#;
    assert_eq!(flat_with(&[], &[]).unwrap().mount(), json::parse(json).unwrap().mount());
}

#[test]
fn a_source_is_the_index_that_is_named_by_its_digest() {
    let digits = "0".repeat(64);
    let (source, index) = (format!("oci://a.example/b@sha256:{digits}"), format!("sha256-{digits}.json"));
    let by_source = read(&[("server", "nfs"), ("share", "/images"), ("source", &source)], &[]).unwrap();
    assert_eq!(by_source.mount(), flat_with(&[("image", &index)], &[]).unwrap().mount());
    let error = read(&[("server", "nfs"), ("share", "/images"), ("source", "oci://a.example/b:1")], &[]).unwrap_err();
    assert_eq!(error.parameter, "source");
}

#[test]
fn every_flat_parameter_has_its_effect() {
    let more = [
        ("fsType", "erofs"),
        ("nfsVersion", "4.1"),
        ("nfsOptions", "timeo=600, hard"),
        ("overlay", "tmpfs"),
        ("overlaySize", "1Gi"),
        ("overlayUid", "1000"),
        ("overlayGid", "100"),
        ("overlayMode", "0770"),
    ];
    let json = r#"{"kind":"overlay","overlay":{"upper":{"kind":"tmpfs","size":"1Gi","uid":1000,"gid":100,"mode":"0770"},"lower":[
        {"kind":"attach","attach":{"fs_type":"erofs","attach":{"kind":"loopback","loopback":
        {"path":"a/b.sqsh","base":"mount","mount":{"kind":"nfs","nfs":{"host":"nfs","path":"/images","ro":true,
        "version":"4.1","options":["hard","timeo=600"]}}}}}}]}}"#;
    assert_eq!(flat_with(&more, &[]).unwrap().mount(), json::parse(json).unwrap().mount());
}

#[test]
fn writable_is_what_has_an_upper() {
    for (overlay, writable) in [("none", false), ("directory", true)] {
        let mount = flat_with(&[("overlay", overlay)], &[]).unwrap().mount().clone();
        assert_eq!(mount.is_writable(), writable);
    }
}

#[test]
fn keys_of_kubernetes_and_other_spellings_are_understood() {
    let pairs = [
        ("SERVER", "nfs"),
        ("Share", " /images\n"),
        ("image", "/a/b.sqsh"),
        ("fstype", "squashfs"),
        ("storage.kubernetes.io/csiProvisionerIdentity", "x"),
        ("csi.storage.k8s.io/pod.name", "x"),
    ];
    assert_eq!(read(&pairs, &[]), flat_with(&[], &[]));
}

#[test]
fn a_hash_map_works_as_well() {
    let attributes: std::collections::HashMap<_, _> = map(&[("mountSpec", SPEC)]).into_iter().collect();
    assert_eq!(parse_attributes(&attributes, &[]), json::parse(SPEC));
}

#[test]
fn mount_options_reach_both_forms() {
    let wanted = flat_with(&[("nfsVersion", "4.1"), ("nfsOptions", "hard")], &[]).unwrap();
    assert_eq!(flat_with(&[], &["nfsvers=4.1", "hard", "noatime"]).as_ref(), Ok(&wanted));
    assert_eq!(flat_with(&[("mountOptions", "nfsvers=4.1,hard")], &[]).as_ref(), Ok(&wanted));
    // The same thing said twice is no contradiction.
    assert_eq!(flat_with(&[("nfsVersion", "4.1"), ("nfsOptions", "hard")], &["hard", "v4.1"]), Ok(wanted));
    assert!(flat_with(&[], &["noexec"]).unwrap().mount().flags().no_exec);
    let spec = read(&[("mountSpec", SPEC), ("mountOptions", "ro")], &[]).unwrap();
    assert!(!spec.mount().is_writable());
}

#[test]
fn mistakes_are_told_with_the_parameter() {
    for (pairs, place, message) in [
        (
            &[("serve", "nfs")][..],
            "serve",
            "unknown parameter \"serve\": did you mean \"server\"? known parameters: mountSpec, server",
        ),
        (&[("mountSpec", SPEC), ("server", "nfs")], "server", "beside \"mountSpec\""),
        (&[("Server", "nfs"), ("server", "nfs")], "server", "differ only in case"),
        (&[("server", "nfs"), ("share", "/")], "image", "is required"),
        (&[("server", ""), ("share", "/"), ("image", "a")], "server", "is required"),
        (&[], "server", "is required"),
        (&[("hostPath", "/lustre")], "image", "is required"),
        (&[("hostPath", "/lustre"), ("image", "/")], "image", "names no file"),
        (&[("hostPath", "lustre"), ("image", "a")], "hostPath", "not an absolute path"),
        (&[("hostPath", "/lustre/../etc"), ("image", "a")], "hostPath", "\"..\""),
        (&[("hostPath", "/lustre"), ("image", "../a")], "image", "\"..\""),
        (&[("hostPath", "/lustre"), ("mountSpec", SPEC)], "hostPath", "beside \"mountSpec\""),
        (&[("mountSpec", "")], "mountSpec", "EOF"),
    ] {
        let error = read(pairs, &[]).unwrap_err();
        assert_eq!((error.kind, error.parameter.as_str()), (ErrorKind::Invalid, place), "{error}");
        assert!(error.message.contains(message), "{error}");
    }
}

#[test]
fn bad_flat_values_are_told_with_the_parameter() {
    for (more, message) in [
        (&[("server", "a b")][..], "not a host name"),
        (&[("server", "a,,b")], "a comma without a server beside it"),
        (&[("share", "images")], "not an absolute path"),
        (&[("image", "/")], "names no file"),
        (&[("image", "../a")], "\"..\""),
        (&[("image", "${pvc.metadata.name}")], "StorageClass"),
        (&[("fsType", "ext3")], "did you mean \"ext4\"?"),
        (&[("nfsVersion", "2")], "one of 3, 4.0, 4.1, 4.2"),
        (&[("nfsOptions", "nfsvers=4.1")], "\"nfsVersion\""),
        (&[("nfsOptions", "hard,,timeo=1")], "unknown option \"\""),
        (&[("nfsOptions", "hard,soft")], "contradict"),
        (&[("overlay", "dir")], "known values: none, directory, tmpfs"),
        (&[("overlaySize", "1Gi")], "is for"),
        (&[("overlayUid", "1000")], "is for"),
        (&[("overlayMode", "0770"), ("overlay", "none")], "is for"),
        (&[("overlayUid", "root"), ("overlay", "directory")], "not the number of a user"),
        (&[("overlayGid", "4294967295"), ("overlay", "directory")], "no group"),
        (&[("overlayMode", "u=rwx"), ("overlay", "directory")], "octal"),
        (&[("overlaySize", "1Mi"), ("overlay", "directory")], "at least 16Mi"),
        (&[("overlaySize", "0"), ("overlay", "tmpfs")], "not a size"),
        (&[("mountOptions", "rw")], "cannot be set"),
        (&[("source", "oci://a.example/b")], "beside \"image\""),
    ] {
        let error = flat_with(more, &[]).unwrap_err();
        assert_eq!(error.parameter, more[0].0, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
    let error = flat_with(&[("overlay", "tmpfs")], &[]).unwrap_err();
    assert_eq!(error.parameter, "overlaySize");
    let error = flat_with(&[("nfsVersion", "4.2")], &["vers=4.1"]).unwrap_err();
    assert_eq!(error.parameter, "nfsVersion");
}

#[test]
fn a_host_path_is_an_image_of_the_node_s_root_directory_and_has_nothing_of_nfs() {
    let json = |verity: &str| {
        let text = r#"{"kind":"attach","attach":{"fs_type":"squashfs","attach":{"kind":"loopback","loopback":
            {"path":"lustre/images/a/b.sqsh","base":"root"}}}}"#;
        json::parse(&text.replace(r#""base""#, &format!("{verity}\"base\""))).unwrap().mount().clone()
    };
    let of = |more: &[(&str, &str)], mount_options: &[&str]| {
        read(&[&[("hostPath", "/lustre//images/"), ("image", "a/b.sqsh")], more].concat(), mount_options)
    };
    assert_eq!(*of(&[], &["ro"]).unwrap().mount(), json(""));
    let root = "ab".repeat(32);
    let verified = of(&[("verity", &root), ("cache", "none"), ("prefetch", "none")], &[]).unwrap();
    assert_eq!(*verified.mount(), json(&format!(r#""verity":"{root}","#)));
    assert!(of(&[], &["noexec"]).unwrap().mount().flags().no_exec);
    assert_eq!(of(&[("symlinks", "refuse")], &[]).unwrap().mount().images()[0].symlinks, Symlinks::Refuse);
    let source = format!("oci://a.example/b@sha256:{}", "0".repeat(64));
    let by_source = read(&[("hostPath", "/lustre"), ("source", &source)], &[]).unwrap();
    assert_eq!(by_source.mount().images()[0].path, format!("lustre/sha256-{}.json", "0".repeat(64)));

    let digest = format!("sha256:{}", "0".repeat(64));
    for (more, place, message) in [
        (("server", "nfs"), "hostPath", "beside \"server\""),
        (("share", "/images"), "hostPath", "beside \"share\""),
        (("nfsVersion", "4.1"), "hostPath", "beside \"nfsVersion\""),
        (("nfsOptions", "hard"), "hostPath", "beside \"nfsOptions\""),
        (("mountOptions", "hard"), "mountOptions", "nothing in the spec is NFS"),
        (("symlinks", "follow"), "symlinks", "none is followed below"),
        (("cache", "node"), "cache", "neither copied nor read ahead"),
        (("prefetch", "all"), "prefetch", "neither copied nor read ahead"),
        (("digest", &digest), "digest", "neither copied nor read ahead"),
    ] {
        let error = of(&[more], &[]).unwrap_err();
        assert_eq!(error.parameter, place, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
    assert_eq!(of(&[], &["nfsvers=4.1"]).unwrap_err().parameter, "mountOptions");
}

#[test]
fn a_sif_is_named_as_a_file_system_and_not_verified() {
    let sif = flat_with(&[("fsType", "sif"), ("cache", "node"), ("prefetch", "all")], &[]).unwrap();
    assert_eq!(sif.mount().sources(), ["a/b.sqsh (sif) of nfs:/images (nfs 4.2)"]);
    let error = flat_with(&[("fsType", "sif"), ("verity", "signed")], &[]).unwrap_err();
    assert!(error.parameter == "verity" && error.message.contains("not for \"sif\""), "{error}");
}

#[test]
fn a_host_path_is_denied_unless_the_policy_allows_it_and_its_root_hash_may_be_required() {
    let of = |policy: &str, more: &[(&str, &str)]| {
        let policy = crate::spec::policy::Policy::parse(policy).unwrap();
        read(&[&[("hostPath", "/lustre/images"), ("image", "a.sqsh")], more].concat(), &[])
            .unwrap()
            .allowed_by(&policy, None)
    };
    let error = of("{}", &[]).unwrap_err();
    assert!(error.is_denied() && error.to_string().starts_with("hostPath: path \"/lustre/images/a.sqsh\""), "{error}");
    of("hostPaths: [/lustre]", &[]).unwrap();
    of("hostPaths: [/lustre/images2]", &[]).unwrap_err();
    let verified = "hostPaths: [/lustre]\nrequireVerity: true";
    assert_eq!(of(verified, &[]).unwrap_err().parameter, "verity");
    of(verified, &[("verity", "signed")]).unwrap();
}

#[test]
fn a_denial_names_the_flat_parameter() {
    let policy = "servers: [{host: nfs, exports: [/images]}]\nnfsOptions: [hard]\nfsTypes: [erofs]";
    let policy = crate::spec::policy::Policy::parse(policy).unwrap();
    for (more, place) in [
        (&[("server", "other"), ("fsType", "erofs")][..], "server"),
        (&[("share", "/home"), ("fsType", "erofs")], "share"),
        (&[("nfsOptions", "soft"), ("fsType", "erofs"), ("overlay", "directory")], "nfsOptions"),
        (&[], "fsType"),
    ] {
        let error = flat_with(more, &[]).unwrap().allowed_by(&policy, None).unwrap_err();
        assert!(error.is_denied());
        assert_eq!((error.parameter.as_str(), error.pointer.as_str()), (place, ""), "{error}");
    }
    flat_with(&[("fsType", "erofs")], &[]).unwrap().allowed_by(&policy, None).unwrap();
}

#[test]
fn the_root_hash_is_that_of_one_image_or_stands_in_the_spec_and_no_two_contradict() {
    let root = |letter: &str| letter.repeat(64);
    let of = |parsed: Parsed| {
        parsed.mount().images().iter().map(|image| image.verity.map(|it| it.to_string())).collect::<Vec<_>>()
    };
    let parse = |attributes: &[(&str, &str)]| read(attributes, &[]);
    let flat = |verity: &str| flat_with(&[("verity", verity)], &[]);
    assert_eq!(of(flat(&root("a")).unwrap()), [Some(root("a"))]);
    for wrong in ["", "a", &root("g"), &root("+"), &"ä".repeat(32), &format!("sha256:{}", root("a"))] {
        let error = flat(wrong).unwrap_err();
        assert!(error.parameter == "verity" && error.to_string().contains("as 'seal' prints them"), "{error}");
    }
    let layer = |verity: &str| {
        format!(
            r#"{{"kind":"attach","attach":{{"fs_type":"squashfs","attach":{{"kind":"loopback","loopback":{{"path":"i"{verity},
            "base":"mount","mount":{{"kind":"nfs","nfs":{{"host":"h","path":"/s"}}}}}}}}}}}}"#
        )
    };
    let with = |letter| layer(&format!(r#","verity":"{}""#, root(letter)));
    let spec = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{},{},{}]}}}}"#, with("a"), with("b"), layer(""));
    assert_eq!(of(parse(&[("mountSpec", &spec)]).unwrap()), [Some(root("a")), Some(root("b")), None]);
    assert!(parse(&[("mountSpec", &spec), ("verity", &root("a"))]).unwrap_err().to_string().contains("contradicts"));
    assert_eq!(of(parse(&[("mountSpec", &with("a")), ("verity", &root("a"))]).unwrap()), [Some(root("a"))]);
    let error = parse(&[("mountSpec", &layer(r#","verity":"0""#))]).unwrap_err();
    assert_eq!(error.pointer, "/attach/attach/loopback/verity");
}
