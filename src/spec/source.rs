//! What images are made of: container images, by their digest.

use std::fmt;

use super::error::quote;
use super::pattern;

/// How a source begins.
const SCHEME: &str = "oci://";
/// The longest name of a container image: that of its registry and of its repository.
const LONGEST: usize = 255;

/// A container image in a registry, such as `oci://registry.example.com/team/tools@sha256:9f86...`. By its digest alone: a tag may be another
/// image tomorrow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Registry and repository.
    name: String,
    /// 64 hexadecimal digits.
    digest: String,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}@sha256:{}", self.name, self.digest)
    }
}

impl Source {
    pub fn parse(text: &str) -> Result<Source, String> {
        let invalid = |why: &str| {
            format!("{} is no source: {why}, such as oci://registry.example.com/team/tools@sha256:...", quote(text))
        };
        let name = text.strip_prefix(SCHEME).ok_or_else(|| invalid("a container image in a registry"))?;
        let (name, digest) = name.split_once("@sha256:").ok_or_else(|| invalid("it is named by its digest"))?;
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if digest.len() != 64 || !digest.bytes().all(is_digit) {
            return Err(invalid("a digest has 64 hexadecimal digits"));
        }
        if name.len() > LONGEST {
            return Err(invalid("its name is too long"));
        }
        let (registry, repository) =
            name.split_once('/').ok_or_else(|| invalid("the name of a registry and of a repository"))?;
        if !is_registry(registry) || !repository.split('/').all(is_component) {
            return Err(invalid("a registry by its host and port, and a repository in small letters without a tag"));
        }
        Ok(Source { name: name.to_owned(), digest: digest.to_owned() })
    }

    /// The name of the index of its layers, which is the same wherever it is made.
    pub fn image(&self) -> String {
        format!("{}.json", self.image_name())
    }

    /// The same without its ending.
    pub fn image_name(&self) -> String {
        format!("sha256-{}", self.digest)
    }

    /// Whether one of these patterns names it, such as `oci://registry.example.com/team/*`.
    pub(super) fn is_named_by(&self, patterns: &[String]) -> bool {
        let mut names = patterns.iter().filter_map(|pattern| pattern.strip_prefix(SCHEME));
        names.any(|pattern| pattern::names_path(pattern, &self.name))
    }
}

/// A pattern of sources must say which registry it is about.
pub(super) fn check_pattern(pattern: &str) -> Result<(), String> {
    let registry = pattern.strip_prefix(SCHEME).and_then(|name| name.split_once('/')).map(|(registry, _)| registry);
    match registry {
        Some(registry) if is_registry(registry) => Ok(()),
        _ => Err(format!(
            "{} is no pattern of container images: a registry and what of it, such as oci://registry.example.com/team/*",
            quote(pattern)
        )),
    }
}

/// A host with or without a port: by its dot or its port it differs from a name on Docker Hub, as which other tools would read it. No IPv6
/// address, whose colons some of them read otherwise.
fn is_registry(text: &str) -> bool {
    let (host, port) = text.split_once(':').unwrap_or((text, "443"));
    if host == text && !text.contains('.') {
        return false;
    }
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
    let is_host =
        !host.is_empty() && !host.starts_with(['.', '-']) && !host.contains("..") && host.bytes().all(is_known);
    is_host && port.parse::<u16>().is_ok()
}

/// A part of a repository's name (distribution-spec, "Pulling manifests").
fn is_component(text: &str) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = [text.as_bytes().first(), text.as_bytes().last()];
    ends.iter().all(|end| end.is_some_and(is_plain))
        && !text.contains("..")
        && text.bytes().all(|byte| is_plain(&byte) || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn a_source_is_a_container_image_by_its_digest() {
        let text = format!("oci://registry.example.com:5000/team/tools_1@sha256:{DIGEST}");
        let source = Source::parse(&text).unwrap();
        assert_eq!(source.to_string(), text);
        assert_eq!(source.image(), format!("sha256-{DIGEST}.json"));
        for (text, why) in [
            ("tools.sqsh".to_owned(), "a container image in a registry"),
            ("docker://a/b".to_owned(), "a container image in a registry"),
            ("oci://a.example/b:1".to_owned(), "named by its digest"),
            (format!("oci://a/b@sha256:{}", &DIGEST[1..]), "64 hexadecimal digits"),
            (format!("oci://a/b@sha256:{}", DIGEST.to_uppercase()), "64 hexadecimal digits"),
            (format!("oci://b@sha256:{DIGEST}"), "of a registry and of a repository"),
            (format!("oci://{}/b@sha256:{DIGEST}", "a".repeat(254)), "too long"),
        ] {
            let error = Source::parse(&text).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        for name in [
            "a.b/c:1", "a.b/C", "a.b//c", "a.b/c/", "/c", "a.b/..", "a.b/.c", "a b/c", "-a.b/c", "a:x/b", "[::1]/b",
            "a.b@c/d", "a.b/c\n", "a/b", "a..b/c",
        ] {
            Source::parse(&format!("oci://{name}@sha256:{DIGEST}")).unwrap_err();
        }
    }

    #[test]
    fn a_pattern_names_the_images_of_a_registry() {
        let source = Source::parse(&format!("oci://registry.example.com:5000/team/tools@sha256:{DIGEST}")).unwrap();
        for (pattern, expected) in [
            ("oci://registry.example.com:5000/team/*", true),
            ("oci://registry.example.com:5000/*/tools", true),
            ("oci://registry.example.com:5000/*", false),
            ("oci://registry.example.com:5000/team/tools/*", false),
            ("oci://registry.example.com/team/*", false),
            ("registry.example.com:5000/team/*", false),
        ] {
            assert_eq!(source.is_named_by(&[pattern.to_owned()]), expected, "{pattern}");
        }
        assert!(source.is_named_by(&["oci://a/b".to_owned(), "oci://registry.example.com:5000/team/t*".to_owned()]));
        check_pattern("oci://a:5000/*").unwrap();
        for pattern in ["", "*", "oci://*/a", "oci://a", "oci://*.example.com/a", "https://a.b/c", "oci://a/b"] {
            check_pattern(pattern).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn whatever_is_taken_for_a_source_is_one_word_without_a_way_up(name in "([a-z.]{3}/)?[a-zA-Z0-9./:@_ -]{0,20}") {
            if let Ok(source) = Source::parse(&format!("oci://{name}@sha256:{DIGEST}")) {
                let text = source.to_string();
                prop_assert!(!text.contains("..") && !text.contains(' ') && text.matches('@').count() == 1, "{text}");
            }
        }
    }
}
