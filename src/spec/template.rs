//! Templates in the parameters of a StorageClass: one class serves many claims, each with its own image or directory.
//!
//! `${pvc.metadata.name}`, `${pvc.metadata.namespace}` and `${pv.metadata.name}` are replaced in `image`, in `share`, in `hostPath`,
//! and in every string of `mountSpec`. A value is one component of a path wherever it stands, so a claim's name cannot
//! climb.
//!
//! A claim may name its image, or what it is made of, itself, by an annotation: see [`super::naming`].
//!
//! Who may write below an export could lead a path elsewhere by a symlink, so that none is followed for a volume whose path a claim
//! had a say in, unless the class says `symlinks: follow`. The server follows those in the path that is mounted: of a `share`, what
//! comes before the first component with a template is mounted, and the rest becomes part of the image's path.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::error::{SpecError, quote};
use super::location::Location;
use super::naming::{self, Choice, MayName, Named, NamingClaim};
use super::parameters::{BESIDE_IMAGE, KNOWN, REFUSE, SOURCE, SYMLINKS, canonical, parse_attributes};
use super::source::Source;
use super::{HOST_PATH, MOUNT_SPEC, json, text};

/// The parameters in which external-provisioner passes the claim's name and namespace.
const NAME_PARAMETER: &str = "csi.storage.k8s.io/pvc/name";
const NAMESPACE_PARAMETER: &str = "csi.storage.k8s.io/pvc/namespace";

/// The templates, and the parameters in which external-provisioner passes their values.
const TEMPLATES: [(&str, &str); 3] = [
    ("pvc.metadata.name", NAME_PARAMETER),
    ("pvc.metadata.namespace", NAMESPACE_PARAMETER),
    ("pv.metadata.name", "csi.storage.k8s.io/pv/name"),
];

/// How a template begins.
const START: &str = "${";

/// The parameters of a CreateVolume call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// The volume's context: templates replaced, names in their documented spelling, Kubernetes' own parameters dropped.
    pub context: BTreeMap<String, String>,
    /// The claim that may name the image, where the StorageClass says so.
    pub claim: Option<NamingClaim>,
    /// The part of the share that is opened below it: a prefix of the image's path, which is still without it.
    below: String,
}

/// What a volume is to be, and of what its image is to be made beforehand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub context: BTreeMap<String, String>,
    pub build: Option<Build>,
}

/// An image that is to be in a directory of a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    pub source: Source,
    pub server: String,
    pub share: String,
    /// The directory below the share: empty for the share itself, else a path without `..` or a leading slash.
    pub directory: String,
}

impl Class {
    /// The volume with the image, or the source of one, that the claim names, or else with the image of the StorageClass. `named` is
    /// `None` where there is no claim that may name anything.
    pub fn with_what_is_named(mut self, named: Option<&Named>) -> Result<Wanted, SpecError> {
        let chosen = match self.claim.as_ref().zip(named) {
            Some((claim, named)) => claim.choose(named, self.context.contains_key("image"))?,
            None => Choice::OfTheClass,
        };
        let mut build = None;
        match chosen {
            Choice::OfTheClass => {}
            Choice::Image(path) => drop(self.context.insert("image".into(), path)),
            Choice::Source(source) => {
                self.context.insert("image".into(), source.image());
                let of = |name: &str| self.context.get(name).map(|value| value.trim().to_owned()).unwrap_or_default();
                let directory = self.below.trim_start_matches('/').to_owned();
                build = Some(Build { source, server: of("server"), share: of("share"), directory });
            }
        }
        if let (false, Some(image)) = (self.below.is_empty(), self.context.get_mut("image")) {
            *image = format!("{}/{}", self.below, image.trim_start_matches('/'));
        }
        Ok(Wanted { context: self.context, build })
    }
}

/// What of a share stands before the first component with a template, and the rest.
fn split_share(share: &str) -> (&str, &str) {
    let Some(template) = share.find(START) else { return (share, "") };
    let (before, rest) = share.split_at(share[..template].rfind('/').map_or(0, |slash| slash + 1));
    (if before.len() > 1 { before.trim_end_matches('/') } else { before }, rest.trim_end_matches('/'))
}

/// The namespace of the claim that a CreateVolume call is for, where external-provisioner names it.
pub fn namespace(parameters: &HashMap<String, String>) -> Option<&str> {
    parameters.get(NAMESPACE_PARAMETER).map(String::as_str)
}

/// The namespace and name of that claim.
pub fn claim(parameters: &HashMap<String, String>) -> Option<(String, String)> {
    Some((namespace(parameters)?.to_owned(), parameters.get(NAME_PARAMETER)?.clone()))
}

/// Reads the parameters of a CreateVolume call. What the values of the context say is left to
/// [`super::parameters::parse_attributes`].
pub fn expand<'a>(parameters: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<Class, SpecError> {
    let parameters: Vec<_> = parameters.into_iter().collect();
    let values: Values = parameters
        .iter()
        .filter_map(|(key, value)| {
            let (name, _) = TEMPLATES.iter().find(|(_, parameter)| parameter == key)?;
            Some((*name, value.as_str()))
        })
        .collect();
    let (mut context, mut may_name, mut templated) = (BTreeMap::new(), MayName::default(), false);
    let mut below = String::new();
    let parameters = canonical(parameters, &[KNOWN, &naming::PARAMETERS].concat())?;
    let follow = parameters.contains_key(SYMLINKS) && parameters[SYMLINKS] != REFUSE;
    for (name, mut value) in parameters {
        templated |= value.contains(START);
        let replaced = |text: &str| replace(text, &values).map_err(|message| SpecError::invalid(name, "", message));
        if name == "share" && !follow {
            let (share, rest) = split_share(&value);
            below = replaced(rest)?;
            value = share.to_owned();
        }
        let value = match name {
            _ if naming::PARAMETERS.contains(&name) => {
                check_stars(&value).map_err(|message| SpecError::invalid(name, "", message))?;
                may_name.read(name, &replaced(&value)?)?;
                continue;
            }
            SOURCE => {
                let source = Source::parse(value.trim()).map_err(|message| SpecError::invalid(SOURCE, "", message))?;
                if context.insert("image".to_owned(), source.image()).is_some() {
                    return Err(SpecError::invalid(SOURCE, "", BESIDE_IMAGE));
                }
                continue;
            }
            MOUNT_SPEC => expand_json(&value, &values, follow)?,
            // No symlink is followed below the node's root directory, of which this is a part.
            "image" | "share" | HOST_PATH => replaced(&value)?,
            _ if value.contains(START) => {
                let message = "templates are only allowed in image, share, hostPath and mountSpec";
                return Err(SpecError::invalid(name, "", message));
            }
            _ => value,
        };
        context.insert(name.to_owned(), value);
    }
    let known = values.get("pvc.metadata.namespace").zip(values.get("pvc.metadata.name"));
    let claim = may_name.by(known.map(|(namespace, name)| (*namespace, *name)), &context)?;
    if claim.is_some() || templated {
        context.entry(SYMLINKS.to_owned()).or_insert_with(|| REFUSE.to_owned());
    }
    Ok(Class { context, claim, below })
}

/// Where the images lie that a StorageClass names itself, with a `*` for the value of each template.
pub fn locations<'a>(
    parameters: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<Location>, SpecError> {
    let mut parameters: BTreeMap<_, _> =
        parameters.into_iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    parameters.extend(TEMPLATES.map(|(_, parameter)| (parameter.to_owned(), "*".to_owned())));
    let context = expand(&parameters)?.with_what_is_named(None)?.context;
    if !context.contains_key("image") && !context.contains_key(MOUNT_SPEC) {
        return Ok(Vec::new());
    }
    Ok(Location::of(parse_attributes(&context, &[])?.mount()))
}

/// From a template's name to its value.
type Values<'a> = BTreeMap<&'static str, &'a str>;

fn expand_json(text: &str, values: &Values, follow: bool) -> Result<String, SpecError> {
    // The typed reader sees what a Value hides, such as a field given twice.
    json::wire(text)?;
    let mut value: Value =
        serde_json::from_str(text).map_err(|error| SpecError::invalid(MOUNT_SPEC, "", format!("no JSON: {error}")))?;
    replace_in(&mut value, "", values, follow)?;
    Ok(value.to_string())
}

/// Only strings, never keys: after parsing, a value cannot break out of its quotes.
fn replace_in(value: &mut Value, at: &str, values: &Values, follow: bool) -> Result<(), SpecError> {
    match value {
        Value::String(text) if text.contains(START) && at.ends_with("/nfs/path") && !follow => {
            let message = "a server follows symlinks in the path of an export: put the template into the path of an image or of a \
                           bind, or set \"symlinks: follow\"";
            return Err(SpecError::invalid(MOUNT_SPEC, at, message));
        }
        Value::String(text) if at.ends_with("/nfs/host") => {
            *text = replace_in_hosts(text, values).map_err(|message| SpecError::invalid(MOUNT_SPEC, at, message))?;
        }
        Value::String(text) => {
            *text = replace(text, values).map_err(|message| SpecError::invalid(MOUNT_SPEC, at, message))?;
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                replace_in(item, &format!("{at}/{index}"), values, follow)?;
            }
        }
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                replace_in(field, &format!("{at}/{key}"), values, follow)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

/// Each of several servers has templates of its own; their values add none.
fn replace_in_hosts(text: &str, values: &Values) -> Result<String, String> {
    let of_one = |host: &str| match replace(host, values)? {
        host if host.contains(',') => Err(format!("{} is not one server", quote(&host))),
        host => Ok(host),
    };
    Ok(text.split(',').map(of_one).collect::<Result<Vec<_>, _>>()?.join(","))
}

/// With a star beside it, what a namespace's claims may name is also what those of another may: `${...namespace}-*` lets `team` have the
/// images of `team-a`.
fn check_stars(pattern: &str) -> Result<(), String> {
    match pattern.split('/').find(|component| component.contains(START) && component.contains('*')) {
        Some(component) => Err(format!(
            "{} has a template and a \"*\" in one component of the path: put a \"/\" between them",
            quote(component)
        )),
        None => Ok(()),
    }
}

fn replace(text: &str, values: &Values) -> Result<String, String> {
    // The claim "c" of "a-b" and the claim "b-c" of "a" would be one.
    if let Some(component) = text.split('/').find(|component| component.matches(START).count() > 1) {
        let component = quote(component);
        return Err(format!("{component} has two templates in one component of a path: put a \"/\" between them"));
    }
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(START) {
        let Some((name, after)) = after.split_once('}') else {
            return Err(format!("{} has a \"${{\" without its \"}}\"", quote(text)));
        };
        let Some((name, parameter)) = TEMPLATES.iter().find(|(known, _)| *known == name) else {
            let known = TEMPLATES.map(|(name, _)| format!("${{{name}}}")).join(", ");
            let given = quote(&format!("${{{name}}}"));
            return Err(format!("unknown template {given}; known templates: {known}"));
        };
        let Some(value) = values.get(name) else {
            return Err(format!(
                "${{{name}}} has no value: external-provisioner passes {parameter} only with --extra-create-metadata"
            ));
        };
        text::component(value).map_err(|message| format!("${{{name}}}: {message}"))?;
        out += before;
        out += value;
        rest = after;
    }
    Ok(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn class(pairs: &[(&str, &str)]) -> Result<Class, SpecError> {
        let owned: BTreeMap<String, String> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        expand(&owned)
    }

    fn expanded(pairs: &[(&str, &str)]) -> Result<BTreeMap<String, String>, SpecError> {
        Ok(class(pairs)?.with_what_is_named(None)?.context)
    }

    const NAME: (&str, &str) = ("csi.storage.k8s.io/pvc/name", "data");
    const NAMESPACE: (&str, &str) = ("csi.storage.k8s.io/pvc/namespace", "team");
    const PV: (&str, &str) = ("csi.storage.k8s.io/pv/name", "pvc-1");

    #[test]
    fn templates_become_path_components() {
        let context = expanded(&[
            ("Server", "nfs"),
            ("share", "/images/${pvc.metadata.namespace}"),
            ("IMAGE", "${pv.metadata.name}/${pvc.metadata.name}.sqsh"),
            ("csi.storage.k8s.io/fstype", "ext4"),
            NAME,
            NAMESPACE,
            PV,
        ])
        .unwrap();
        let expected =
            [("image", "team/pvc-1/data.sqsh"), ("server", "nfs"), ("share", "/images"), ("symlinks", "refuse")];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(context, BTreeMap::from(expected));
    }

    #[test]
    fn no_symlink_is_followed_where_a_claim_had_a_say_unless_the_class_says_so() {
        let symlinks = |pairs: &[(&str, &str)]| {
            let context = class(&[pairs, &[NAME, NAMESPACE]].concat()).unwrap().context;
            context.get("symlinks").cloned().unwrap_or_default()
        };
        assert_eq!(symlinks(&[("image", "a.sqsh")]), "");
        assert_eq!(symlinks(&[("image", "${pvc.metadata.namespace}/a.sqsh")]), "refuse");
        assert_eq!(symlinks(&[("imagesFromClaim", "*")]), "refuse");
        assert_eq!(symlinks(&[("imagesFromClaim", "*"), ("symlinks", "follow")]), "follow");
        let spec = r#"{"kind":"bind","bind":{"path":"${pvc.metadata.name}","base":"mount","mount":
            {"kind":"nfs","nfs":{"host":"a","path":"/"}}}}"#;
        assert_eq!(symlinks(&[("mountSpec", spec)]), "refuse");
    }

    #[test]
    fn of_a_share_the_part_that_a_claim_has_a_say_in_is_opened_below_the_rest() {
        let paths = |share: &str, more: &[(&str, &str)]| {
            let pairs = [&[("share", share), ("image", "/i.sqsh"), NAME, NAMESPACE], more].concat();
            let context = expanded(&pairs).unwrap();
            format!("{} {}", context["share"], context["image"])
        };
        let (namespace, name) = ("${pvc.metadata.namespace}", "${pvc.metadata.name}");
        assert_eq!(paths("/a/b", &[]), "/a/b /i.sqsh");
        assert_eq!(paths(&format!("/a/x-{namespace}/{name}/"), &[]), "/a x-team/data/i.sqsh");
        assert_eq!(paths(&format!("/{namespace}"), &[]), "/ team/i.sqsh");
        assert_eq!(paths(&format!("/a/{namespace}"), &[("symlinks", "follow")]), "/a/team /i.sqsh");
        let claim = [("imagesFromClaim", "*"), ("share", &format!("/a/{namespace}")), NAME, NAMESPACE];
        let mine = Named::read("driver", |name| (name == "driver/image").then(|| "mine.sqsh".to_owned()));
        let context = class(&claim).unwrap().with_what_is_named(Some(&mine)).unwrap().context;
        assert_eq!((context["share"].as_str(), context["image"].as_str()), ("/a", "team/mine.sqsh"));
    }

    #[test]
    fn a_class_may_have_its_images_below_a_directory_of_the_node() {
        let templated = [
            ("HostPath", "/lustre/${pvc.metadata.namespace}"),
            ("image", "${pvc.metadata.name}.sqsh"),
            NAME,
            NAMESPACE,
        ];
        let context = expanded(&templated).unwrap();
        assert_eq!((&*context["hostPath"], &*context["image"]), ("/lustre/team", "data.sqsh"));
        let parsed = crate::spec::parameters::parse_attributes(&context, &[]).unwrap();
        assert_eq!(parsed.mount().images()[0].path, "lustre/team/data.sqsh");
        let of_the_claim = [("hostPath", "/lustre"), ("imagesFromClaim", "*.sqsh"), NAME, NAMESPACE];
        let mine = Named::read("driver", |name| (name == "driver/image").then(|| "mine.sqsh".to_owned()));
        let context = class(&of_the_claim).unwrap().with_what_is_named(Some(&mine)).unwrap().context;
        assert_eq!((&*context["image"], &*context["symlinks"]), ("mine.sqsh", "refuse"));
        for further in [&[][..], &[("imagesFromClaim", "*")]] {
            let of_a_source = [("hostPath", "/lustre"), ("imagesFromSource", "oci://a.b/*"), NAME, NAMESPACE];
            let error = class(&[&of_a_source, further].concat()).unwrap_err();
            assert_eq!(error.parameter, "imagesFromSource");
            assert!(error.message.contains("beside \"hostPath\": the Job"), "{error}");
        }
    }

    #[test]
    fn a_class_may_name_a_source_in_place_of_an_image() {
        let source = format!("oci://a.example/b@sha256:{}", "0".repeat(64));
        let of = [("share", "/a/${pvc.metadata.namespace}"), ("source", &*source), NAMESPACE];
        let wanted = class(&of).unwrap().with_what_is_named(None).unwrap();
        assert_eq!(wanted.context["image"], format!("team/sha256-{}.json", "0".repeat(64)));
        assert_eq!((wanted.context.get("source"), wanted.build), (None, None));
        let error = class(&[&of[..], &[("image", "a")]].concat()).unwrap_err();
        assert_eq!((error.parameter.as_str(), error.message.as_str()), ("source", BESIDE_IMAGE));
    }

    #[test]
    fn a_mount_spec_is_expanded_as_json() {
        let spec = r#"{"kind":"nfs","nfs":{"host":"a","path":"/$\u007bpvc.metadata.name}"}}"#;
        let name = ("csi.storage.k8s.io/pvc/name", r#"a"b"#);
        let error = expanded(&[("mountSpec", spec), name]).unwrap_err();
        assert_eq!((error.pointer.as_str(), error.parameter.as_str()), ("/nfs/path", MOUNT_SPEC), "{error}");
        let context = expanded(&[("mountSpec", spec), ("symlinks", "follow"), name]).unwrap();
        let value: Value = serde_json::from_str(&context["mountSpec"]).unwrap();
        assert_eq!(value["nfs"]["path"], "/a\"b");
    }

    #[test]
    fn each_of_several_servers_has_templates_of_its_own_and_their_values_add_none() {
        let host = |name: &str, namespace: &str| {
            let spec =
                r#"{"kind":"nfs","nfs":{"host":"${pvc.metadata.name}.a, b-${pvc.metadata.namespace}","path":"/"}}"#;
            let of = [("csi.storage.k8s.io/pvc/name", name), ("csi.storage.k8s.io/pvc/namespace", namespace)];
            let context = expanded(&[&[("mountSpec", spec)][..], &of].concat())?;
            let value: Value = serde_json::from_str(&context["mountSpec"]).unwrap();
            Ok::<_, SpecError>(value["nfs"]["host"].as_str().unwrap().to_owned())
        };
        assert_eq!(host("data", "team").unwrap(), "data.a, b-team");
        let error = host("c,d", "team").unwrap_err();
        assert_eq!((error.pointer.as_str(), error.message.as_str()), ("/nfs/host", "\"c,d.a\" is not one server"));
    }

    #[test]
    fn mistakes_are_told() {
        let spec = r#"{"kind":"bind","bind":{"path":"${x}","base":"mount","mount":{"kind":"nfs","nfs":{"host":"a","path":"/"}}}}"#;
        for (pairs, place, message) in [
            (&[("image", "${pvc.name}")][..], "image", "known templates: ${pvc.metadata.name}, "),
            (&[("image", "${pvc.metadata.name")], "image", "without its"),
            (&[("image", "${pvc.metadata.name}")], "image", "--extra-create-metadata"),
            (&[("server", "${pvc.metadata.name}"), NAME], "server", "only allowed in"),
            (&[("mountSpec", spec)], "mountSpec/bind/path", "unknown template"),
            (&[("mountSpec", "{")], "mountSpec", "EOF"),
            (&[("serve", "a")], "serve", "did you mean \"server\"?"),
        ] {
            let error = expanded(pairs).unwrap_err();
            assert_eq!(format!("{}{}", error.parameter, error.pointer), place, "{error}");
            assert!(error.message.contains(message), "{error}");
        }
    }

    #[test]
    fn values_that_are_no_component_are_refused() {
        for value in ["", ".", "..", "a/b", "a\nb", "${x}", &"a".repeat(256)] {
            let pairs = [("image", "x/${pvc.metadata.name}"), ("csi.storage.k8s.io/pvc/name", value)];
            assert!(expanded(&pairs).is_err(), "{value}");
        }
    }

    proptest! {
        #[test]
        fn a_value_never_adds_a_path_component(value in any::<String>(), prefix in "[a.]{0,2}") {
            let image = format!("x/{prefix}${{pvc.metadata.name}}/y");
            let pairs = [("image", image.as_str()), ("csi.storage.k8s.io/pvc/name", value.as_str())];
            if let Ok(context) = expanded(&pairs) {
                prop_assert_eq!(context["image"].split('/').count(), 3);
            }
        }
    }
}
