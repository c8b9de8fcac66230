use std::collections::BTreeMap;

use super::*;
use crate::spec::json;
use crate::spec::location::Location;
use crate::spec::parameters::parse_attributes;
use crate::spec::policy::Policy;

fn nfs(host: &str, more: &str) -> String {
    format!(r#"{{"kind":"nfs","nfs":{{"host":"{host}","path":"/images"{more}}}}}"#)
}

fn image(fs_type: &str, base: &str) -> String {
    format!(
        r#"{{"kind":"attach","attach":{{"fs_type":"{fs_type}","attach":{{"kind":"loopback","loopback":
        {{"path":"i","base":"mount","mount":{base}}}}}}}}}"#
    )
}

fn bind(base: &str) -> String {
    format!(r#"{{"kind":"bind","bind":{{"path":"team","base":"mount","mount":{base}}}}}"#)
}

fn overlay(layers: &[String]) -> String {
    format!(r#"{{"kind":"overlay","overlay":{{"lower":[{}]}}}}"#, layers.join(","))
}

fn mount(spec: &str) -> Mount {
    json::parse(spec).unwrap_or_else(|error| panic!("{spec}: {error}")).mount().clone()
}

fn flat(more: &[(&str, &str)]) -> Result<Mount, SpecError> {
    let three = [("server", "a,b"), ("share", "/images"), ("image", "i")];
    let all = three.iter().chain(more).map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    parse_attributes(&all.collect::<BTreeMap<_, _>>(), &[]).map(|parsed| parsed.mount().clone())
}

#[test]
fn servers_are_separated_by_commas_and_stand_in_the_order_in_which_they_are_asked() {
    for (given, first, others) in [
        ("a", "a", &[][..]),
        ("b,a", "b", &["a"]),
        (" A.example.com ,\n[FD00::1], 10.0.0.5", "a.example.com", &["fd00::1", "10.0.0.5"]),
        ("a,b,c,d,e,f,g,h", "a", &["b", "c", "d", "e", "f", "g", "h"]),
    ] {
        let others = others.iter().map(|host| (*host).to_owned()).collect();
        assert_eq!(hosts(given.trim()), Ok((first.to_owned(), others)), "{given}");
    }
}

#[test]
fn each_server_is_one_and_another() {
    let long = vec!["a".repeat(60); 40].join(",");
    for (given, why) in [
        (",", "a comma without a server"),
        ("a,", "a comma without a server"),
        (", a", "a comma without a server"),
        ("a, ,b", "a comma without a server"),
        ("a,b,a", "names server \"a\" twice"),
        ("a,A.", "names server \"a.\" twice"),
        ("fd00::1,[fd00:0::1]", "twice"),
        ("a,b,c,d,e,f,g,h,i", "names 9 servers, and may name 8"),
        ("a,b c", "\"b c\" is not a host name"),
        ("a,b:/x", "not an IPv6 address"),
        ("a,0.0.0.0", "no server's address"),
        ("a,127.1", "not a host name"),
        ("a,b\0", "control character"),
        ("a,${pvc.metadata.name}", "only in the parameters of a StorageClass"),
        (&long, "longer than 2048 bytes"),
    ] {
        let error = hosts(given).unwrap_err();
        assert!(error.contains(why), "{given}: {error}");
    }
}

#[test]
fn both_forms_say_the_same_and_each_layer_has_its_own_servers() {
    let by_json = mount(&image("squashfs", &nfs("a, b", r#","ro":true,"options":["softerr","timeo=50","retrans=3"]"#)));
    assert_eq!(flat(&[("nfsOptions", "softerr,timeo=50,retrans=3")]), Ok(by_json));
    let layers = overlay(&[image("squashfs", &nfs("a,b", "")), image("erofs", &nfs("c", "")), nfs("d", "")]);
    assert_eq!(
        mount(&layers).sources(),
        ["i (squashfs) of a,b:/images (nfs 4.2)", "i (erofs) of c:/images (nfs 4.2)", "d:/images (nfs 4.2)"]
    );
}

#[test]
fn an_image_lies_on_each_of_its_servers_alone() {
    let inner = image("erofs", &image("squashfs", &nfs("b,fd00::1", "")));
    for (spec, servers) in [
        (image("squashfs", &nfs("b,fd00::1", "")), &["b:/images", "[fd00::1]:/images"][..]),
        (image("squashfs", &bind(&bind(&nfs("b,fd00::1", "")))), &["b:/images", "[fd00::1]:/images"]),
        (image("squashfs", &nfs("b", "")), &["b:/images"]),
    ] {
        let mount = mount(&spec);
        let image = mount.images()[0];
        let each = image.on_each();
        let exports = each.iter().map(|image| image.base.export().unwrap());
        assert_eq!(exports.map(ToString::to_string).collect::<Vec<_>>(), servers);
        assert_eq!(image.is_replicated(), servers.len() > 1);
        assert!(each.iter().all(|image| !image.is_replicated() && image.on_each() == [image.clone()]));
    }
    let mount = mount(&inner);
    let [inner, outer] = mount.images()[..] else { panic!("{mount:?}") };
    assert!(!inner.is_replicated() && inner.on_each() == [inner.clone()] && outer.on_each().len() == 2);
}

#[test]
fn several_servers_are_refused_where_files_of_the_export_are_shown_as_they_are() {
    let several = nfs("a,b", "");
    for (spec, place) in [
        (several.clone(), "/nfs/host"),
        (bind(&several), "/bind/mount/nfs/host"),
        (overlay(&[image("squashfs", &several), several.clone()]), "/overlay/lower/1/nfs/host"),
        (overlay(&[bind(&several)]), "/overlay/lower/0/bind/mount/nfs/host"),
    ] {
        let error = json::parse(&spec).unwrap_err();
        assert_eq!((error.pointer.as_str(), error.message.as_str()), (place, SHOWN));
    }
}

#[test]
fn a_server_is_given_up_for_the_next_one_whatever_a_volume_says() {
    for option in ["hard", "soft"] {
        let spec = image("squashfs", &nfs("a,b", &format!(r#","options":["{option}"]"#)));
        let error = json::parse(&spec).unwrap_err();
        assert_eq!(error.pointer, "/attach/attach/loopback/mount/nfs/options");
        assert!(error.message.starts_with(&format!("option \"{option}\" cannot be set: ")), "{error}");
        for parameter in ["nfsOptions", "mountOptions"] {
            assert_eq!(flat(&[(parameter, option)]).unwrap_err().parameter, "nfsOptions");
        }
    }
}

#[test]
fn a_sif_has_one_server() {
    let error = json::parse(&image("sif", &bind(&nfs("a,b", "")))).unwrap_err();
    assert_eq!((error.pointer.as_str(), error.message.as_str()), ("/attach/fs_type", OF_SIF));
    assert_eq!(flat(&[("fsType", "sif")]).unwrap_err().parameter, "fsType");
    mount(&image("sif", &image("squashfs", &nfs("a,b", ""))));
}

#[test]
fn the_policy_must_allow_each_server_as_if_it_was_alone() {
    let check = |policy: &str, host: &str| {
        let spec = image("squashfs", &nfs(host, ""));
        json::parse(&spec).unwrap().allowed_by(&Policy::parse(policy).unwrap(), None).map(drop)
    };
    let policy = "servers: [{host: a}, {host: b, exports: [/images]}, {host: c, exports: [/other]}]";
    check(policy, "a,b").unwrap();
    for (hosts, place, why) in [
        ("a,d", "/host", "server \"d\" is not allowed"),
        ("d,a", "/host", "server \"d\" is not allowed"),
        ("a,b,c", "/path", "export \"/images\" of \"c\" is not allowed"),
    ] {
        let error = check(policy, hosts).unwrap_err();
        assert!(error.is_denied() && error.pointer.ends_with(place) && error.message.starts_with(why), "{error}");
    }
    // No namespace may have both.
    let policy = "servers: [{host: a}]\nnamespaces: [{names: [x], policy: {servers: [{host: b}]}}]";
    check(policy, "a,b").unwrap_err();
    check("requireVerity: true", "a,b").unwrap_err();
    check("requiredNfsOptions: [hard]", "a,b").unwrap_err();
    // What the driver sets is what limits are about.
    check("nfsLimits: {timeo: {min: 50}}", "a").unwrap();
    assert!(check("nfsLimits: {timeo: {min: 50}}", "a,b").unwrap_err().message.contains("and 30, which it is"));
}

#[test]
fn a_volume_names_its_image_on_each_of_its_servers() {
    let mount = mount(&image("squashfs", &bind(&nfs("a,b", ""))));
    assert_eq!(mount.images()[0].on_each().len(), 2);
    for image in mount.images()[0].on_each() {
        let alone = Attach {
            fs_type: FsType::Squashfs,
            flags: crate::spec::MountFlags::default(),
            device: Device::Loopback(image),
        };
        assert_eq!(Location::of(&Mount::Attach(alone)), Location::of(&mount));
    }
    assert_eq!(Location::of(&mount)[0].path, "/images/team/i");
}
