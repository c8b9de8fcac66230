//! The patterns of the admin's policy and of storage classes. A `*` stands for any characters, but never for a dot between two labels of a
//! host name or a slash between two components of a path.

use std::net::Ipv4Addr;

/// Whether `path` is what the pattern names, or below it: `/images` covers `/images/a` but not `/images2`,
/// `/home/*/images` covers one home. Both are absolute and normalised.
pub(super) fn covers(pattern: &str, path: &str) -> bool {
    let mut components = path.split('/').filter(|component| !component.is_empty());
    pattern
        .split('/')
        .filter(|component| !component.is_empty())
        .all(|wanted| components.next().is_some_and(|given| matches(wanted, given)))
}

/// Whether `path` is what the pattern names: `torch-*.sqsh` names neither `torch-2/a.sqsh` nor `a/torch-2.sqsh`.
pub(super) fn names_path(pattern: &str, path: &str) -> bool {
    components(pattern) == components(path) && covers(pattern, path)
}

/// How many components a path or a pattern of one has.
pub(super) fn components(path: &str) -> usize {
    path.split('/').filter(|component| !component.is_empty()).count()
}

/// Whether the pattern names `host`, whatever the case and with or without a trailing dot. A pattern that is only `*`
/// names every host; `*.example.com` names `a.example.com` but neither `a.b.example.com` nor `example.com`. One of numbers,
/// such as `10.0.0.*`, names addresses alone: who owns the name `10.0.0.xyz` decides which server that is.
pub(super) fn names_host(pattern: &str, host: &str) -> bool {
    let plain = |text: &str| text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    let (pattern, host) = (plain(pattern), plain(host));
    let is_digit = |letter: char| letter.is_ascii_digit();
    let of_numbers = pattern.split('.').count() == 4
        && pattern.contains(is_digit)
        && pattern.chars().all(|letter| is_digit(letter) || "*.".contains(letter));
    if of_numbers && host.parse::<Ipv4Addr>().is_err() {
        return false;
    }
    let (mut wanted, mut given) = (pattern.split('.'), host.split('.'));
    pattern == "*"
        || pattern.split('.').count() == host.split('.').count()
            && wanted.all(|wanted| given.next().is_some_and(|given| matches(wanted, given)))
}

/// Whether the whole of `text` is what the pattern says.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(text) = text.strip_prefix(start) else {
        return false;
    };
    let Some(mut text) = text.strip_suffix(end) else {
        return false;
    };
    middle.split('*').all(|part| match text.split_once(part) {
        Some((_, after)) => {
            text = after;
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_text() {
        for (pattern, text, expected) in [
            ("hard", "hard", true),
            ("hard", "harder", false),
            ("timeo=*", "timeo=600", true),
            ("sec=krb5*", "sec=sys", false),
            ("*", "", true),
            ("a*a", "a", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("**", "x", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn paths_are_compared_by_components() {
        for (pattern, path, expected) in [
            ("/images", "/images", true),
            ("/images/", "/images/a/b", true),
            ("/images", "/images2", false),
            ("/images", "/", false),
            ("/", "/anything", true),
            ("/home/*/images", "/home/alice/images/x", true),
            ("/home/*/images", "/home/a/b/images", false),
            ("/images*", "/images2/a", true),
        ] {
            assert_eq!(covers(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn hosts_are_compared_by_labels() {
        for (pattern, host, expected) in [
            ("NFS.example.com", "nfs.EXAMPLE.com.", true),
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "a.b.example.com", false),
            ("*.example.com", "example.com", false),
            ("10.0.0.*", "10.0.0.7", true),
            ("10.0.0.*", "10.0.0.evil.example", false),
            ("10.0.0.*", "10.0.0.xyz", false),
            ("10.*.*.*", "10.0.0.1", true),
            ("10.*.*.*", "10.example.com.xyz", false),
            ("nfs.*.10", "nfs.a.10", true),
            ("*1", "nas1", true),
            ("*", "a.b.c", true),
            ("fd00::*", "fd00::1", true),
        ] {
            assert_eq!(names_host(pattern, host), expected, "{pattern} {host}");
        }
    }
}
