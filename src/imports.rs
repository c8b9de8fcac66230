//! The test of the map in `lib.rs`: no import runs the wrong way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What each part may use beside itself. A file belongs to the longest name that fits it.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kernel", &[]),
    ("spec", &[]),
    ("lock", &[]),
    ("metrics", &["lock"]),
    ("enter", &["kernel"]),
    ("error", &["kernel", "spec"]),
    ("step", &["lock"]),
    ("blocking", &["error", "kernel", "lock", "metrics", "step"]),
    ("places", &["blocking", "error", "lock", "step"]),
    ("single_flight", &["error", "lock", "step"]),
    ("socket", &[]),
    ("volume::abnormal", &["error"]),
    ("volume::cache", &["blocking", "error", "kernel", "lock", "metrics", "places", "spec"]),
    (
        "volume::source",
        &[
            "blocking",
            "error",
            "kernel",
            "lock",
            "metrics",
            "places",
            "single_flight",
            "spec",
            "step",
            "volume::abnormal",
            "volume::cache",
        ],
    ),
    ("volume::publication", &["spec"]),
    ("volume::record", &["error", "kernel", "lock", "spec", "volume::publication", "volume::source"]),
    (
        "volume::report",
        &[
            "blocking",
            "error",
            "kernel",
            "lock",
            "places",
            "single_flight",
            "socket",
            "spec",
            "volume::abnormal",
            "volume::cache",
            "volume::record",
            "volume::source",
        ],
    ),
    (
        "volume",
        &[
            "blocking",
            "error",
            "kernel",
            "lock",
            "metrics",
            "places",
            "single_flight",
            "spec",
            "step",
            "volume::abnormal",
            "volume::cache",
            "volume::publication",
            "volume::record",
            "volume::report",
            "volume::source",
        ],
    ),
    ("kubernetes", &["error", "lock", "socket", "spec"]),
    ("csi", &["error", "kubernetes", "lock", "metrics", "socket", "spec", "volume"]),
    ("ops", &["blocking", "error", "kernel", "kubernetes", "metrics", "single_flight", "spec", "volume"]),
];

/// The source files by module path: `kernel::mount` and its text, without tests.
fn files() -> BTreeMap<String, String> {
    fn add(directory: &Path, module: &str, files: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let inside = if module.is_empty() { name.clone() } else { format!("{module}::{name}") };
            if path.is_dir() {
                add(&path, &inside, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap().lines();
                let code: Vec<_> = code.filter(|line| !line.trim_start().starts_with("//")).collect();
                files.insert(if name == "mod" { module.to_owned() } else { inside }, code.join("\n"));
            }
        }
    }
    let mut files = BTreeMap::new();
    add(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut files);
    // The root of the crate, its binary, and what only tests use.
    files.retain(|module, _| {
        !["lib", "main", "cli", "plugin", "imports"].contains(&module.as_str())
            && !["tests", "fixture", "double"].iter().any(|name| module.ends_with(&format!("::{name}")))
    });
    files
}

/// The paths of this crate that a module names: `crate::a::b`, `super::b` as seen from it, and what may be modules below it.
fn named(module: &str, code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (at, import) in code.match_indices("use ") {
        add_paths(module, &code[at + import.len()..], &mut named);
    }
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let mut base: Vec<&str> = module.split("::").collect();
            let mut rest = &code[at..];
            if root == "crate::" {
                base.clear();
                rest = &rest[root.len()..];
            } else if code[..at].ends_with("super::") {
                continue;
            }
            while let Some(inside) = rest.strip_prefix("super::") {
                base.pop();
                rest = inside;
            }
            add_paths(&base.join("::"), rest, &mut named);
        }
    }
    named
}

/// Adds the paths that begin at `base` and go on with `text`: one, or each of a group in braces.
fn add_paths<'a>(base: &str, text: &'a str, paths: &mut BTreeSet<String>) -> &'a str {
    let join = |name: &str| if base.is_empty() { name.to_owned() } else { format!("{base}::{name}") };
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.is_empty() && !rest.starts_with('}') {
            rest = add_paths(base, rest, paths).trim_start_matches([',', ' ', '\n']);
        }
        return rest.strip_prefix('}').unwrap_or(rest);
    }
    let text = text.trim_start();
    let end = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    match rest.strip_prefix("::") {
        Some(inside) => add_paths(&join(name), inside, paths),
        None => {
            paths.insert(join(name));
            // Past what no name begins with, such as a star.
            rest.get(usize::from(name.is_empty())..).unwrap_or_default()
        }
    }
}

/// Which files use which: by the longest name of a file that each path begins with.
fn uses() -> BTreeMap<String, BTreeSet<String>> {
    let files = files();
    let file_of = |path: &str| {
        let ends = path.match_indices("::").map(|(at, _)| at).chain([path.len()]);
        ends.filter_map(|end| files.get_key_value(&path[..end])).map(|(module, _)| module.clone()).last()
    };
    let uses = |(module, code): (&String, &String)| {
        let used = named(module, code).iter().filter_map(|path| file_of(path)).filter(|used| used != module).collect();
        (module.clone(), used)
    };
    files.iter().map(uses).collect()
}

/// The part of [`MAY_USE`] that a module belongs to.
fn part_of(module: &str) -> &'static (&'static str, &'static [&'static str]) {
    let is_in = |part: &str| module == part || module.starts_with(&format!("{part}::"));
    let parts = MAY_USE.iter().filter(|(part, _)| is_in(part));
    parts.max_by_key(|(part, _)| part.len()).unwrap_or_else(|| panic!("{module} has no place in MAY_USE"))
}

#[test]
fn no_import_runs_the_wrong_way_and_no_permission_is_left_over() {
    let mut wrong = Vec::new();
    let mut unused: BTreeSet<_> =
        MAY_USE.iter().flat_map(|(part, others)| others.iter().map(move |other| (*part, *other))).collect();
    for (module, used) in uses() {
        let (part, may_use) = part_of(&module);
        for other in used {
            let (other_part, _) = part_of(&other);
            unused.remove(&(*part, *other_part));
            if other_part != part && !may_use.contains(other_part) {
                wrong.push(format!("{module} uses {other}"));
            }
        }
    }
    assert_eq!(wrong, [""; 0]);
    assert!(unused.is_empty(), "{unused:?}");
}

#[test]
fn the_kernel_knows_no_json_and_the_spec_does_no_io() {
    for (module, code) in files() {
        let foreign: &[&str] = match part_of(&module).0 {
            "kernel" => &["serde", "tonic", "prost", "tokio", "kube", "k8s_openapi"],
            "spec" => &["rustix", "libc", "tonic", "prost", "tokio", "kube", "k8s_openapi", "std::fs", "std::net::Tcp"],
            _ => &[],
        };
        for name in foreign {
            let named = code.contains(&format!("use {name}")) || code.contains(&format!(" {name}::"));
            assert!(!named, "{module} uses {name}");
        }
    }
}

#[test]
fn no_files_use_each_other() {
    fn visit(
        module: &str,
        uses: &BTreeMap<String, BTreeSet<String>>,
        way: &mut Vec<String>,
        seen: &mut BTreeSet<String>,
    ) {
        if let Some(start) = way.iter().position(|passed| passed == module) {
            panic!("a circle: {} -> {module}", way[start..].join(" -> "));
        }
        if !seen.insert(module.to_owned()) {
            return;
        }
        way.push(module.to_owned());
        for used in &uses[module] {
            // A module and those below it are one thing in several files.
            let related = |a: &str, b: &str| a.starts_with(&format!("{b}::"));
            if !related(module, used) && !related(used, module) {
                visit(used, uses, way, seen);
            }
        }
        way.pop();
    }
    let (uses, mut seen) = (uses(), BTreeSet::new());
    for module in uses.keys() {
        visit(module, &uses, &mut Vec::new(), &mut seen);
    }
}

#[test]
fn imports_are_seen() {
    let code = "use crate::a::{b, c::{D, e::F}};\nuse super::{g, h::I};\npub use o::P;\nlet x = super::super::j::k();";
    let named = named("m::n", code);
    for expected in ["a::b", "a::c::D", "a::c::e::F", "m::g", "m::h::I", "j::k", "m::n::o::P"] {
        assert!(named.contains(expected), "{named:?}");
    }
    let uses = uses();
    assert!(uses["csi::node"].contains("volume") && uses["kernel::nfs"].contains("kernel::mount"), "{uses:?}");
}
