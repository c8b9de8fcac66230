use super::*;
use crate::spec::error::ErrorKind;
use crate::spec::json;

fn check(policy: &str, spec: &str) -> Result<(), SpecError> {
    Policy::parse(policy).unwrap().check(json::parse(spec).unwrap().mount(), None)
}

fn nfs(host: &str, path: &str, option: &str) -> String {
    format!(r#"{{"kind":"nfs","nfs":{{"host":"{host}","path":"{path}","options":["{option}"]}}}}"#)
}

fn image(fs_type: &str, device: &str) -> String {
    format!(r#"{{"kind":"attach","attach":{{"fs_type":"{fs_type}","attach":{device}}}}}"#)
}

fn loopback_root(path: &str) -> String {
    image("squashfs", &format!(r#"{{"kind":"loopback","loopback":{{"path":"{path}","base":"root"}}}}"#))
}

fn local(path: &str) -> String {
    image("squashfs", &format!(r#"{{"kind":"local","local":{{"path":"{path}"}}}}"#))
}

#[track_caller]
fn assert_denied(policy: &str, spec: &str, pointer: &str) {
    let error = check(policy, spec).unwrap_err();
    assert_eq!((error.kind, error.pointer.as_str()), (ErrorKind::Denied, pointer), "{error}");
}

#[track_caller]
fn assert_allowed(policy: &str, spec: &str) {
    assert_eq!(check(policy, spec), Ok(()));
}

#[test]
fn the_example_means_what_it_says() {
    let policy = include_str!("example.yaml");
    let read_only = |spec: String| spec.replace("\"host\"", "\"ro\":true,\"host\"");
    assert_allowed(policy, &read_only(nfs("10.0.0.1", "/anything", "timeo=600")));
    assert_denied(policy, &nfs("10.0.0.1", "/anything", "timeo=600"), "/nfs/ro");
    let error = check(policy, &read_only(nfs("10.0.1.1", "/", "hard"))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "mountSpec/nfs/host: server \"10.0.1.1\" is not allowed by the policy; allowed: nfs.example.com, 10.0.0.*, images",
    );
    assert_eq!(Policy::parse(policy).unwrap().addresses("images"), ["10.0.0.9", "nfs-2.example.com"]);
}

#[test]
fn the_default_allows_any_server_and_nothing_of_the_node() {
    assert_eq!(Policy::parse("{}"), Ok(Policy::default()));
    assert_allowed("{}", &nfs("any.example.com", "/", "hard"));
    assert_denied("{}", &loopback_root("/srv/a.sqsh"), "/attach/attach/loopback/path");
    assert_denied("{}", &local("/dev/sda"), "/attach/attach/local/path");
    assert_denied("{}", r#"{"kind":"bind","bind":{"path":"/etc","base":"root"}}"#, "/bind/path");
}

#[test]
fn a_policy_may_require_the_root_hash_of_each_image_that_lies_in_no_other() {
    let root = "ab".repeat(32);
    let on_export = |further: &str| {
        let base = format!(r#""base":"mount","mount":{}"#, nfs("h", "/x", "hard"));
        image("squashfs", &format!(r#"{{"kind":"loopback","loopback":{{"path":"a"{further},{base}}}}}"#))
    };
    let policy = "requireVerity: true\nhostPaths: true";
    assert_denied(policy, &on_export(""), "/attach/attach/loopback/verity");
    assert_allowed(policy, &on_export(&format!(r#","verity":"{root}""#)));
    let verified = format!(r#""verity":"{root}","base":"root""#);
    assert_denied(policy, &loopback_root("/srv/a.sqsh"), "/attach/attach/loopback/verity");
    assert_allowed(policy, &loopback_root("/srv/a.sqsh").replace(r#""base":"root""#, &verified));
    let bound = r#""base":"mount","mount":{"kind":"bind","bind":{"path":"srv","base":"root"}}"#;
    let loopback =
        |base: &str| image("squashfs", &format!(r#"{{"kind":"loopback","loopback":{{"path":"a",{base}}}}}"#));
    assert_denied(policy, &loopback(bound), "/attach/attach/loopback/verity");
    let outer = loopback(&verified);
    assert_allowed(policy, &loopback(&format!(r#""base":"mount","mount":{outer}"#)));
    assert_allowed("namespaces: [{names: [a], policy: {requireVerity: true}}]", &on_export(""));
}

#[test]
fn a_server_is_reached_at_its_addresses_however_a_volume_spells_its_name() {
    let policy = "servers: [{host: Images.example.com, addresses: [\"[FD00::9]\", b]}, {host: \"*.example.com\"}]";
    let policy = Policy::parse(policy).unwrap();
    for host in ["images.example.com", "images.example.com."] {
        assert_eq!(policy.addresses(host), ["fd00::9", "b"]);
    }
    assert_eq!(policy.addresses("other.example.com"), ["other.example.com"]);
}

#[test]
fn a_policy_that_says_nothing_does_not_allow_everything() {
    for policy in ["", "\n", "# nothing\n", "---\n", "~"] {
        let error = Policy::parse(policy).unwrap_err().to_string();
        assert_eq!(error, "policy: says nothing: write {} if every default is meant", "{policy:?}");
    }
}

#[test]
fn file_systems_for_trusted_images_only_are_denied_by_default() {
    let device = r#"{"kind":"loopback","loopback":{"path":"a","base":"mount","mount":
        {"kind":"nfs","nfs":{"host":"a","path":"/"}}}}"#;
    assert_allowed("{}", &image("erofs", device));
    assert_allowed("{}", &image("sif", device));
    assert_denied("fsTypes: [squashfs]", &image("sif", device), "/attach/fs_type");
    assert_denied("{}", &image("ext4", device), "/attach/fs_type");
    assert_allowed("fsTypes: [ext4]", &image("ext4", device));
    assert_denied("fsTypes: [ext4]", &image("squashfs", device), "/attach/fs_type");
}

#[test]
fn an_export_is_what_the_admin_named_and_the_rest_is_below_it() {
    let policy = Policy::parse(
        "servers: [{host: a, exports: [/images, /images/team, /home/*/images]}, {host: b}, {host: c, exports: [/]}]",
    )
    .unwrap();
    for (host, path, expected) in [
        ("a", "/images", ("/images", "")),
        ("a", "/images/x/y", ("/images", "x/y")),
        ("a", "/images/team/x", ("/images/team", "x")),
        ("a", "/home/me/images/x", ("/home/me/images", "x")),
        ("b", "/images/x", ("/images/x", "")),
        ("c", "/images/x", ("/", "images/x")),
        ("c", "/", ("/", "")),
    ] {
        assert_eq!(policy.split(host, path), expected, "{host}:{path}");
    }
    assert_eq!(Policy::default().split("a", "/images/x"), ("/images/x", ""));
}

#[test]
fn servers_and_exports_are_lists() {
    assert_allowed("servers: [{host: '[FD00:0::1]'}]", &nfs("fd00::1", "/", "hard"));
    let policy = "servers: [{host: nfs.example.com, exports: [/images]}, {host: '10.0.0.*'}]";
    assert_allowed(policy, &nfs("NFS.example.com.", "/images/a", "hard"));
    assert_allowed(policy, &nfs("10.0.0.3", "/", "hard"));
    assert_denied(policy, &nfs("nfs.example.com", "/images2", "hard"), "/nfs/path");
    assert_denied(policy, &nfs("nfs.example.com", "/", "hard"), "/nfs/path");
    assert_denied(policy, &nfs("10.0.1.3", "/", "hard"), "/nfs/host");
}

#[test]
fn an_empty_list_allows_nothing() {
    assert_denied("servers: []", &nfs("a", "/", "hard"), "/nfs/host");
    assert_denied("servers: [{host: a, exports: []}]", &nfs("a", "/", "hard"), "/nfs/path");
    assert_denied("nfsOptions: []", &nfs("a", "/", "hard"), "/nfs/options");
}

#[test]
fn options_are_patterns() {
    let policy = "nfsOptions: [hard, 'timeo=*', 'sec=krb5*']";
    assert_allowed(policy, &nfs("a", "/", "sec=krb5p"));
    assert_allowed(policy, &nfs("a", "/", "timeo=600"));
    assert_denied(policy, &nfs("a", "/", "sec=sys"), "/nfs/options");
    assert_denied(policy, &nfs("a", "/", "soft"), "/nfs/options");
}

#[test]
fn paths_of_the_node_are_compared_by_components() {
    assert_allowed("hostPaths: true", &loopback_root("/srv/a.sqsh"));
    assert_allowed("hostPaths: [/srv/images]", &loopback_root("srv/images/a.sqsh"));
    assert_denied("hostPaths: [/srv/images]", &loopback_root("/srv/images2/a"), "/attach/attach/loopback/path");
    assert_allowed("localDevices: [/dev/disk/by-id]", &local("/dev/disk/by-id/x"));
    assert_denied("localDevices: [/dev/sda]", &local("/dev/sda1"), "/attach/attach/local/path");
}

#[test]
fn layers_are_checked_too() {
    let spec =
        format!(r#"{{"kind":"overlay","overlay":{{"lower":[{},{}]}}}}"#, nfs("a", "/", "hard"), loopback_root("x"),);
    assert_denied("{}", &spec, "/overlay/lower/1/attach/attach/loopback/path");
}

#[test]
fn mistakes_of_the_admin_are_told_at_once() {
    for (policy, pointer, message) in [
        ("severs: []", "", "did you mean \"servers\"?"),
        ("servers: [{hots: a}]", "/servers/0", "did you mean \"host\"?"),
        ("servers: [{exports: [/a]}]", "/servers/0", "missing field \"host\""),
        ("servers: a", "/servers", "expected a sequence"),
        ("servers: [{host: 'a/b'}]", "/servers/0/host", "not a host name"),
        ("servers: [{host: a, exports: [images]}]", "/servers/0/exports/0", "not an absolute path"),
        ("servers: [{host: a, exports: [/a/../b]}]", "/servers/0/exports/0", "\"..\""),
        ("hostPaths: maybe", "/hostPaths", "true, false or a list of paths"),
        ("hostPaths: [srv]", "/hostPaths/0", "not an absolute path"),
        ("fsTypes: [btrfs]", "/fsTypes/0", "known values: squashfs, erofs, ext4, xfs, sif"),
        ("nfsOptions: ['tmeo=*']", "/nfsOptions/0", "did you mean \"timeo\"?"),
        ("nfsVersions: ['4']", "/nfsVersions/0", "known values: 3, 4.0, 4.1, 4.2"),
        ("nfsVersions: [4.1]", "/nfsVersions/0", "expected a string"),
        ("requiredNfsOptions: ['scc=*']", "/requiredNfsOptions/0", "did you mean \"sec\"?"),
        ("nfsLimits: {hard: {max: 1}}", "/nfsLimits/hard", "option with a number"),
        ("nfsLimits: {timeo: {min: 2, max: 1}}", "/nfsLimits/timeo", "there is nothing"),
        ("nfsLimits: {timeo: {}}", "/nfsLimits/timeo", "limits nothing"),
        ("writableLayers: {maxSize: lots}", "/writableLayers/maxSize", "is not a size"),
        ("writableLayers: {kinds: [disk]}", "/writableLayers/kinds/0", "known values: directory, tmpfs"),
        ("servers: [{host: a, addresses: []}]", "/servers/0/addresses", "names no address"),
        ("servers: [{host: a, addresses: [\"b c\"]}]", "/servers/0/addresses", "b c"),
        ("servers: [{host: \"*.a\", addresses: [b]}]", "/servers/0/addresses", "is a pattern"),
        (
            "namespaces: [{names: [a], policy: {servers: [{host: b}, {host: a, addresses: [b]}]}}]",
            "/namespaces/0/policy/servers/1/addresses",
            "only for the outermost",
        ),
        ("trustedKeys: [RWQ]", "/trustedKeys/0", "is no public key of minisign(1)"),
        ("namespaces: [{names: [a], policy: {trustedKeys: [RWQ]}}]", "/namespaces/0/policy/trustedKeys", "outermost"),
        ("namespaces: [{names: [], policy: {}}]", "/namespaces/0/names", "names no namespace"),
        ("namespaces: [{names: [a]}]", "/namespaces/0", "missing field \"policy\""),
        (
            "namespaces: [{names: [a], policy: {hostPaths: [srv]}}]",
            "/namespaces/0/policy/hostPaths/0",
            "not an absolute",
        ),
        (
            "namespaces: [{names: [a], policy: {namespaces: [{names: [b], policy: {}}]}}]",
            "/namespaces/0/policy/namespaces",
            "only for the outermost",
        ),
        ("servers: [", "", "no YAML"),
        ("servers:", "/servers", "expected a sequence, got null"),
        ("servers: &all [a]\nnfsOptions: *none", "", "no YAML"),
        ("all: &all {servers: []}\n<<: *all", "", "merge"),
        ("servers: !any []", "", "tag"),
        ("servers: [a]\n---\nservers: [b]", "", "multiple"),
        ("nodeCache: yes", "/nodeCache", "a boolean"),
        ("servers: []\nservers: []", "", "duplicate"),
        ("text", "", "expected an object"),
        ("[]", "", "expected an object"),
        ("servers: [[a]]", "/servers/0", "expected an object"),
    ] {
        let error = Policy::parse(policy).unwrap_err();
        assert_eq!((error.kind, error.pointer.as_str()), (ErrorKind::Invalid, pointer), "{policy}: {error}");
        assert!(error.message.contains(message), "{policy}: {error}");
        assert_eq!(error.parameter, PARAMETER);
    }
}

#[test]
fn long_lists_are_cut_in_errors() {
    let hosts: Vec<String> = (0..100).map(|n| format!("{{host: h{n}}}")).collect();
    let error = check(&format!("servers: [{}]", hosts.join(",")), &nfs("a", "/", "hard")).unwrap_err();
    assert!(error.message.ends_with("h7, ..."), "{error}");
}

#[test]
fn nesting_is_limited() {
    for text in ["[".repeat(10_000), "{a: ".repeat(10_000), "- ".repeat(10_000)] {
        assert!(Policy::parse(&text).is_err());
    }
}

#[test]
fn what_an_export_must_have_is_wanted_of_each() {
    let policy = "requiredNfsOptions: ['sec=krb5*', hard]";
    let with = |options: &str| format!(r#"{{"kind":"nfs","nfs":{{"host":"a","path":"/","options":[{options}]}}}}"#);
    assert_allowed(policy, &with(r#""sec=krb5p","hard""#));
    let tls = "requiredNfsOptions: ['xprtsec=*tls']";
    assert_allowed(tls, &with(r#""xprtsec=tls""#));
    assert_allowed(tls, &with(r#""xprtsec=mtls""#));
    assert!(check(tls, &with(r#""xprtsec=none""#)).is_err() && check(tls, &with("")).is_err());
    for options in [r#""sec=sys","hard""#, r#""sec=krb5""#, ""] {
        assert_denied(policy, &with(options), "/nfs/options");
    }
    assert_denied(
        "nfsVersions: ['4.1', '4.2']",
        &nfs("a", "/", "hard").replace("\"host\"", "\"version\":\"3\",\"host\""),
        "/nfs/version",
    );
    assert_allowed("nfsVersions: ['4.2']", &nfs("a", "/", "hard"));
}

#[test]
fn numbers_have_a_floor_and_a_ceiling_also_where_they_are_left_out() {
    let policy = "nfsLimits: {timeo: {min: 50, max: 600}, retrans: {max: 5}, nconnect: {max: 4}}";
    for option in ["timeo=50", "timeo=600", "retrans=0", "nconnect=4", "hard"] {
        assert_allowed(policy, &nfs("a", "/", option));
    }
    for option in ["timeo=1", "timeo=2147483647", "retrans=6", "nconnect=5"] {
        assert_denied(policy, &nfs("a", "/", option), "/nfs/options");
    }
    assert_denied("nfsLimits: {timeo: {max: 100}}", &nfs("a", "/", "hard"), "/nfs/options");
}

#[test]
fn exports_may_be_for_reading_alone() {
    let policy = "writableExports: false";
    let export = nfs("a", "/", "hard");
    let read_only = export.replace("\"host\"", "\"ro\":true,\"host\"");
    let bind = |nfs: &str, ro: bool| {
        format!(r#"{{"kind":"bind","bind":{{"path":"","base":"mount","ro":{ro},"mount":{nfs}}}}}"#)
    };
    assert_denied(policy, &export, "/nfs/ro");
    assert_denied(policy, &bind(&export, false), "/bind/mount/nfs/ro");
    for spec in [read_only, bind(&export, true), format!(r#"{{"kind":"overlay","overlay":{{"lower":[{export}]}}}}"#)] {
        assert_allowed(policy, &spec);
    }
}

#[test]
fn writable_layers_are_of_a_kind_and_a_size() {
    let with = |upper: &str| {
        format!(r#"{{"kind":"overlay","overlay":{{"upper":{upper},"lower":[{}]}}}}"#, nfs("a", "/", "hard"))
    };
    let (directory, small, large) = (
        with(r#"{"kind":"directory"}"#),
        with(r#"{"kind":"tmpfs","size":"1Gi"}"#),
        with(r#"{"kind":"tmpfs","size":"2Gi"}"#),
    );
    assert_denied("writableLayers: {kinds: [tmpfs]}", &directory, "/overlay/upper/kind");
    assert_denied("writableLayers: {kinds: []}", &small, "/overlay/upper/kind");
    assert_allowed("writableLayers: {kinds: []}", &with(r#"{"kind":"none"}"#));
    for policy in ["writableLayers: {maxSize: 1Gi}", "writableLayers: {perNamespace: {size: 1Gi}}"] {
        assert_allowed(policy, &small);
        assert_denied(policy, &large, "/overlay/upper/size");
        assert_denied(policy, &directory, "/overlay/upper/size");
    }
}

#[test]
fn images_are_copied_by_default_where_the_namespace_may_and_where_it_is_not_known_if_all_may() {
    let policy = Policy::parse("namespaces: [{names: [a], policy: {nodeCache: false}}]").unwrap();
    assert_eq!([Some("a"), Some("b"), None].map(|namespace| policy.node_cache(namespace)), [false, true, false]);
    assert!(Policy::parse("{}").unwrap().node_cache(None));
}

#[test]
fn a_namespace_has_the_first_policy_that_names_it() {
    let policy = Policy::parse(
        "servers: [{host: a}]\nnamespaces: [{names: [team-a], policy: {servers: [{host: b}]}}, {names: ['team-*', \
         other], policy: {servers: [{host: c}], writableLayers: {perNamespace: {count: 3}}}}]",
    )
    .unwrap();
    let allowed = |namespace: Option<&str>| {
        let allows =
            |host: &&str| policy.check(json::parse(&nfs(host, "/", "hard")).unwrap().mount(), namespace).is_ok();
        ["a", "b", "c", "d"].into_iter().filter(allows).collect::<String>()
    };
    assert_eq!(allowed(Some("team-a")), "b");
    assert_eq!(allowed(Some("team-b")), "c");
    assert_eq!(allowed(Some("other")), "c");
    assert_eq!(allowed(Some("default")), "a");
    assert_eq!(allowed(None), "abc", "a volume that is staged may be for any of them");
    assert_eq!(policy.hosts().collect::<String>(), "abc");
    assert_eq!((policy.share("other").count, policy.share("team-a").count), (Some(3), None));
}

#[test]
fn whose_signature_an_image_needs_is_said_of_its_server_and_export() {
    let [all, team, other] = ["RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"; 3];
    let policy = format!(
        "trustedKeys: [{all}]\nservers:\n  - {{host: a, exports: [/team], trustedKeys: [{team}, {team}]}}\n  \
         - {{host: a, exports: [/none], trustedKeys: []}}\n  - {{host: '*', trustedKeys: [{other}, {other}, {other}]}}"
    );
    let policy = Policy::parse(&policy).unwrap();
    let keys = |host: &str, path: &str| {
        let parsed = json::parse(&nfs(host, path, "hard")).unwrap();
        let Mount::Nfs(export) = parsed.mount() else { panic!() };
        policy.trusted_keys(Some(export)).len()
    };
    assert_eq!((keys("a", "/team"), keys("a", "/team/x"), keys("a", "/none"), keys("a", "/other")), (2, 2, 0, 3));
    assert_eq!((keys("b", "/team"), policy.trusted_keys(None).len()), (3, 1));
    assert!(Policy::parse("servers: [{host: a, trustedKeys: [RWQ]}]").is_err());
    for field in ["zone: b", "addresses: [b]", "trustedKeys: []"] {
        let policy = format!("namespaces: [{{names: [x], policy: {{servers: [{{host: a, {field}}}]}}}}]");
        assert!(Policy::parse(&policy).unwrap_err().to_string().contains("outermost"), "{field}");
    }
}
