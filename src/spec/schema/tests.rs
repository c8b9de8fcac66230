use std::path::Path;
use std::{env, fs};

use boon::{Compiler, Schemas};
use serde_json::json;

use super::*;
use crate::spec::yaml_value;

/// Validates with an implementation that knows nothing of ours; it checks the schema itself, too.
pub fn is_accepted(value: &Value) -> bool {
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.add_resource("mount.json", schema()).unwrap();
    let index = compiler.compile("mount.json", &mut schemas).unwrap();
    schemas.validate(value, index).is_ok()
}

#[test]
fn the_published_schemas_are_current() {
    for (name, schema) in [("mount-spec", schema()), ("policy", policy())] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("manifests/{name}.schema.json"));
        let text = format!("{schema:#}\n");
        if env::var_os("UPDATE_SCHEMA").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let published = fs::read_to_string(&path).unwrap_or_default();
        assert!(published == text, "run 'make schema chart' and commit {}", path.display());
    }
}

#[test]
fn the_schema_of_the_policy_accepts_its_example_and_no_typo() {
    let accepts = |text: &str| {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("policy.json", policy()).unwrap();
        let index = compiler.compile("policy.json", &mut schemas).unwrap();
        schemas.validate(&yaml_value(text).unwrap(), index).is_ok()
    };
    assert!(accepts(include_str!("../policy/example.yaml")) && accepts("{}"));
    for wrong in [
        "severs: []",
        "servers: [{exports: [/a]}]",
        "servers: [{host: a, exports: [a]}]",
        "hostPaths: maybe",
        "nfsVersions: [4.1]",
        "nfsLimits: {timeo: {most: 1}}",
        "writableLayers: {kinds: [disk]}",
        "namespaces: [{names: []}]",
        "namespaces: [{names: [a], policy: {severs: []}}]",
        "namespaces: [{names: [a], policy: {namespaces: []}}]",
    ] {
        assert!(!accepts(wrong), "{wrong}");
    }
}

#[test]
fn the_image_api_s_own_example_is_valid() {
    let example = include_str!("../testdata/nfs-loopback.json");
    assert!(is_accepted(&serde_json::from_str(example).unwrap()));
}

#[test]
fn kinds_fields_and_values_are_checked() {
    let nfs = json!({ "kind": "nfs", "nfs": { "host": "a", "path": "/" } });
    let with = |field: &str, value: Value| {
        let mut nfs = nfs.clone();
        nfs["nfs"][field] = value;
        nfs
    };
    let overlay = |upper: Value| json!({ "kind": "overlay", "overlay": { "lower": [nfs], "upper": upper } });
    for good in [
        nfs.clone(),
        with("version", "4".into()),
        with("options", json!(["hard"])),
        overlay(json!({ "kind": "tmpfs", "size": "1Gi" })),
        overlay(Value::Null),
    ] {
        assert!(is_accepted(&good), "{good}");
    }
    for bad in [
        json!({}),
        json!({ "kind": "nfs" }),
        json!({ "kind": "bind", "nfs": nfs["nfs"] }),
        json!({ "kind": "nfs", "nfs": nfs["nfs"], "overlay": { "lower": [nfs] } }),
        json!({ "kind": "nfs", "nfs": nfs["nfs"], "id": 1 }),
        json!({ "kind": "overlay", "overlay": { "lower": [] } }),
        json!({ "kind": "bind", "bind": { "path": "a", "base": "mount" } }),
        json!({ "kind": "bind", "bind": { "path": "a", "base": "root", "mount": nfs } }),
        with("version", "2".into()),
        with("path", "images".into()),
        with("hots", "a".into()),
        overlay(json!({ "kind": "tmpfs" })),
        overlay(json!({ "kind": "none", "size": "1Gi" })),
    ] {
        assert!(!is_accepted(&bad), "{bad}");
    }
}
