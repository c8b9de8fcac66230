//! What a claim may say of its image, where its StorageClass lets it: the name of an image on the share, by `imagesFromClaim`, a path
//! pattern, or a container image that one is made of, by `imagesFromSource`, patterns that are separated by commas.

use std::collections::BTreeMap;

use super::error::{SpecError, quote};
use super::source::{Source, check_pattern};
use super::{HOST_PATH, MOUNT_SPEC, pattern, text};

const IMAGES_FROM_CLAIM: &str = "imagesFromClaim";
const IMAGES_FROM_SOURCE: &str = "imagesFromSource";
/// The parameters of a StorageClass that say what its claims may name.
pub(super) const PARAMETERS: [&str; 2] = [IMAGES_FROM_CLAIM, IMAGES_FROM_SOURCE];

/// What a claim names, in annotations of the driver's domain.
#[derive(Clone, Debug)]
pub struct Named {
    domain: String,
    image: Option<String>,
    source: Option<String>,
}

impl Named {
    /// By its annotations of these names; `domain` is the driver's name.
    pub fn read(domain: &str, annotation: impl Fn(&str) -> Option<String>) -> Named {
        let of = |name: &str| annotation(&format!("{domain}/{name}"));
        Named { domain: domain.to_owned(), image: of("image"), source: of("source") }
    }

    fn invalid(&self, name: &str, message: impl AsRef<str>) -> SpecError {
        SpecError::invalid(&format!("{}/{name}", self.domain), "", message)
    }

    fn denied(&self, name: &str, message: impl AsRef<str>) -> SpecError {
        SpecError::denied(&format!("{}/{name}", self.domain), "", message)
    }
}

/// The patterns of a StorageClass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MayName {
    image: Option<String>,
    sources: Option<Vec<String>>,
}

/// A claim that may name its image or its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamingClaim {
    pub namespace: String,
    pub name: String,
    may_name: MayName,
}

/// What a claim has named.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    OfTheClass,
    /// A path below the share.
    Image(String),
    Source(Source),
}

impl MayName {
    /// Reads one of [`PARAMETERS`], without templates.
    pub(super) fn read(&mut self, parameter: &str, value: &str) -> Result<(), SpecError> {
        let invalid = |message: String| SpecError::invalid(parameter, "", message);
        if parameter == IMAGES_FROM_CLAIM {
            text::relative(value).map_err(invalid)?;
            self.image = Some(value.to_owned());
            return Ok(());
        }
        let patterns: Vec<_> = value.split(',').map(|pattern| pattern.trim().to_owned()).collect();
        patterns.iter().try_for_each(|pattern| check_pattern(pattern)).map_err(invalid)?;
        self.sources = Some(patterns);
        Ok(())
    }

    /// By this claim, of a namespace and a name; `None` where claims may name nothing. `beside` are the parameters that the StorageClass has
    /// besides.
    pub(super) fn by(
        self,
        claim: Option<(&str, &str)>,
        beside: &BTreeMap<String, String>,
    ) -> Result<Option<NamingClaim>, SpecError> {
        let is_beside = |name: &str| beside.contains_key(name);
        let has_several = beside.get("server").is_some_and(|server| server.contains(','));
        let parameter = match &self {
            MayName { sources: Some(_), .. } if is_beside(HOST_PATH) || has_several => IMAGES_FROM_SOURCE,
            MayName { image: Some(_), .. } => IMAGES_FROM_CLAIM,
            MayName { sources: Some(_), .. } => IMAGES_FROM_SOURCE,
            _ => return Ok(None),
        };
        let invalid = |message: String| SpecError::invalid(parameter, "", message);
        if is_beside(MOUNT_SPEC) {
            let form = "it is for the flat form, with server and share, or hostPath";
            return Err(invalid(format!("stands beside {}: {form}", quote(MOUNT_SPEC))));
        }
        if parameter == IMAGES_FROM_SOURCE && is_beside(HOST_PATH) {
            let why = "the Job that makes an image mounts the NFS share that it writes to: name server and share";
            return Err(invalid(format!("stands beside {}: {why}", quote(HOST_PATH))));
        }
        if parameter == IMAGES_FROM_SOURCE && has_several {
            let why = "the Job that makes an image writes it to one server, and nobody copies it to the others";
            return Err(invalid(format!("stands beside several servers: {why}: name one")));
        }
        let Some((namespace, name)) = claim else {
            let message = "external-provisioner names the claim only with --extra-create-metadata";
            return Err(invalid(message.into()));
        };
        Ok(Some(NamingClaim { namespace: namespace.to_owned(), name: name.to_owned(), may_name: self }))
    }
}

impl NamingClaim {
    /// What the volume of this claim is made of, as far as its StorageClass allows that.
    pub(super) fn choose(&self, named: &Named, has_default: bool) -> Result<Choice, SpecError> {
        match (&named.image, &named.source) {
            (Some(_), Some(_)) => {
                Err(named
                    .invalid("source", "stands beside the annotation \"image\": a claim names the one or the other"))
            }
            (Some(image), None) => self.image(named, image),
            (None, Some(source)) => self.source(named, source),
            (None, None) if has_default => Ok(Choice::OfTheClass),
            (None, None) => {
                let annotation = if self.may_name.image.is_some() { "image" } else { "source" };
                let allowed = self.allowed();
                let message = format!(
                    "the claim names no image: its StorageClass wants it in this annotation; allowed: {allowed}"
                );
                Err(named.invalid(annotation, message))
            }
        }
    }

    fn image(&self, named: &Named, image: &str) -> Result<Choice, SpecError> {
        let path = text::relative(image).map_err(|message| named.invalid("image", message))?;
        if !self.may_name.image.as_ref().is_some_and(|pattern| pattern::names_path(pattern, &path)) {
            let (image, allowed) = (quote(image), self.allowed());
            let message = format!("image {image} is not allowed by the StorageClass; allowed: {allowed}");
            return Err(named.denied("image", message));
        }
        Ok(Choice::Image(path))
    }

    fn source(&self, named: &Named, text: &str) -> Result<Choice, SpecError> {
        let source = Source::parse(text).map_err(|message| named.invalid("source", message))?;
        if !self.may_name.sources.as_ref().is_some_and(|patterns| source.is_named_by(patterns)) {
            let (source, allowed) = (quote(text), self.allowed());
            let message = format!("source {source} is not allowed by the StorageClass; allowed: {allowed}");
            return Err(named.denied("source", message));
        }
        Ok(Choice::Source(source))
    }

    fn allowed(&self) -> String {
        let MayName { image, sources } = &self.may_name;
        let patterns = image.iter().chain(sources.iter().flatten());
        patterns.map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::template::{Wanted, expand};
    use std::collections::BTreeMap;

    const DIGEST: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    /// The volume of the claim team/data.
    fn wanted(class: &[(&str, &str)], image: Option<&str>, source: Option<&str>) -> Result<Wanted, SpecError> {
        let claim = [("csi.storage.k8s.io/pvc/name", "data"), ("csi.storage.k8s.io/pvc/namespace", "team")];
        let class: BTreeMap<_, _> =
            class.iter().chain(&claim).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let annotation = |name: &str| if name == "driver/image" { image } else { source }.map(str::to_owned);
        expand(&class)?.with_what_is_named(Some(&Named::read("driver", annotation)))
    }

    #[test]
    fn a_claim_names_an_image_that_its_class_allows() {
        let named = |pattern: &str, image: Option<&str>, default: &[(&str, &str)]| {
            let wanted = wanted(&[&[("imagesfromclaim", pattern)], default].concat(), image, None)?;
            assert_eq!(wanted.build, None);
            Ok::<_, SpecError>(wanted.context["image"].clone())
        };
        let default = [("image", "default.sqsh")];
        assert_eq!(named("torch-*.sqsh", Some("torch-2.sqsh"), &[]).unwrap(), "torch-2.sqsh");
        assert_eq!(named("*.sqsh", Some("/a.sqsh"), &default).unwrap(), "a.sqsh");
        assert_eq!(named("${pvc.metadata.namespace}/*", Some("team/a"), &[]).unwrap(), "team/a");
        assert_eq!(named("*", None, &default).unwrap(), "default.sqsh");
        for (pattern, image, message) in [
            ("*.sqsh", Some("a/b.sqsh"), "driver/image: image \"a/b.sqsh\" is not allowed"),
            ("${pvc.metadata.namespace}/*", Some("other/a"), "allowed: team/*"),
            ("*/*", Some("a/.."), "driver/image: "),
            ("*", Some("${pvc.metadata.name}"), "templates are expanded only in the parameters"),
            ("*", None, "the claim names no image"),
            ("../*", None, "imagesFromClaim: "),
            ("${pvc.metadata.namespace}-*", Some("team-a"), "\"*\" in one component"),
            ("*${pvc.metadata.namespace}.sqsh", Some("a-team.sqsh"), "\"*\" in one component"),
            ("${pvc.metadata.namespace}-${pvc.metadata.name}", Some("team-data"), "two templates in one component"),
        ] {
            let error = named(pattern, image, &[]).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let spec = r#"{"kind":"nfs","nfs":{"host":"a","path":"/b"}}"#;
        wanted(&[("imagesFromClaim", "*"), ("mountSpec", spec)], Some("a"), None).unwrap_err();
        expand(&BTreeMap::from([("imagesFromClaim".to_owned(), "*".to_owned())])).unwrap_err();
    }

    #[test]
    fn a_claim_names_a_source_that_its_class_allows_and_its_image_has_the_name_of_the_digest() {
        let class = [
            ("server", " nfs "),
            ("share", "/images/${pvc.metadata.namespace}"),
            ("imagesFromSource", "oci://a.example/b, oci://a.example:5000/${pvc.metadata.namespace}/*"),
        ];
        let source = format!("oci://a.example:5000/team/tools@sha256:{DIGEST}");
        let Wanted { context, build } = wanted(&class, None, Some(&source)).unwrap();
        assert_eq!((context["share"].as_str(), context["symlinks"].as_str()), ("/images", "refuse"));
        assert_eq!(context["image"], format!("team/sha256-{DIGEST}.json"));
        let build = build.unwrap();
        assert_eq!(build.source.to_string(), source);
        assert_eq!((&*build.server, &*build.share, &*build.directory), ("nfs", "/images", "team"));

        let other = format!("oci://a.example:5000/other/tools@sha256:{DIGEST}");
        let both = [&class[..], &[("imagesFromClaim", "*.sqsh")]].concat();
        for (class, image, source, message) in [
            (&class[..], None, Some(other.as_str()), "driver/source: source \"oci://a.example:5000/other/tools"),
            (&class, None, Some(&*other), "allowed: oci://a.example/b, oci://a.example:5000/team/*"),
            (&class, None, Some("oci://a.example/b:1"), "driver/source: \"oci://a.example/b:1\" is no source"),
            (&class, Some("a.sqsh"), None, "driver/image: image \"a.sqsh\" is not allowed"),
            (&class, None, None, "driver/source: the claim names no image"),
            (&both, None, None, "driver/image: the claim names no image"),
            (&both, Some("a.sqsh"), Some(&source), "the one or the other"),
            (&[("imagesFromClaim", "*")], None, Some(&source), "is not allowed by the StorageClass; allowed: *"),
            (&[("imagesFromSource", "*")], None, Some(&source), "imagesFromSource: \"*\" is no pattern"),
            (&[("imagesFromSource", "oci://a.b/${pvc.metadata.name}*")], None, None, "in one component"),
            (&[("imagesFromSource", "oci://a.b/*"), ("mountSpec", "{}")], None, None, "mountSpec"),
            (&[("imagesFromSource", "oci://a.b/*"), ("server", "a, b")], None, None, "writes it to one server"),
            (
                &[("imagesFromSource", "oci://a.b/*"), ("imagesFromClaim", "*"), ("server", "a,b")],
                None,
                None,
                "name one",
            ),
        ] {
            let error = wanted(class, image, source).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert_eq!(wanted(&both, Some("a.sqsh"), None).unwrap().build, None);
    }
}
