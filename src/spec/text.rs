//! The strings of a spec: what a host and a path may look like. Each function returns the canonical form of a string,
//! so that equal mounts compare equal, or says what is wrong with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::error::quote;

/// PATH_MAX of Linux, without the final NUL.
const MAX_PATH: usize = 4095;
/// NAME_MAX of Linux.
const MAX_COMPONENT: usize = 255;
/// RFC 1035, section 2.3.4, in its textual form.
const MAX_HOST: usize = 253;

/// A host name, an IPv4 address, or an IPv6 address with or without brackets. Returned without brackets and in lower case; an IPv6
/// address in its RFC 5952 form.
///
/// Underscores are let through, since real file servers have them. Names that end in a number but are no dotted quad
/// (`127.1`, `0x7f000001`) are not: some resolvers read them as addresses, which no policy would recognise.
pub(super) fn host(value: &str) -> Result<String, String> {
    plain(value, MAX_HOST)?;
    let bare = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if bare.is_some() || value.contains(':') {
        return ipv6(bare.unwrap_or(value)).ok_or_else(|| format!("{} is not an IPv6 address", quote(value)));
    }
    if let Ok(address) = value.parse::<Ipv4Addr>() {
        return specified(IpAddr::V4(address)).ok_or("0.0.0.0 is no server's address".to_owned());
    }
    // A trailing dot keeps the resolver from trying search domains.
    let labels: Vec<&str> = value.strip_suffix('.').unwrap_or(value).split('.').collect();
    if labels.iter().all(|label| is_label(label)) && !is_number(labels[labels.len() - 1]) {
        return Ok(value.to_ascii_lowercase());
    }
    Err(format!("{} is not a host name, an IPv4 address or an IPv6 address", quote(value)))
}

/// An absolute path without `..`. Returned without doubled slashes, `.` and a trailing slash.
pub(super) fn absolute(value: &str) -> Result<String, String> {
    if !value.starts_with('/') {
        return Err(format!("{} is not an absolute path", quote(value)));
    }
    Ok(format!("/{}", relative(value)?))
}

/// A path below some base, without `..`; a leading slash means the base, not the host. Returned like [`absolute`], but
/// without the leading slash: empty for the base itself.
pub(super) fn relative(value: &str) -> Result<String, String> {
    plain(value, MAX_PATH)?;
    let components: Vec<&str> = value.split('/').filter(|component| !matches!(*component, "" | ".")).collect();
    for component in &components {
        if *component == ".." {
            return Err(format!("{} contains \"..\"", quote(value)));
        }
        if component.len() > MAX_COMPONENT {
            return Err(format!("{} is longer than {MAX_COMPONENT} bytes, the longest file name", quote(component)));
        }
    }
    Ok(components.join("/"))
}

/// A file below `/dev`, such as `/dev/disk/by-id/x`.
pub(super) fn device(value: &str) -> Result<String, String> {
    let path = absolute(value)?;
    if path.starts_with("/dev/") { Ok(path) } else { Err(format!("{} is not below /dev", quote(value))) }
}

/// One component of a path: what a template's value must be to stay where the template put it.
pub(super) fn component(value: &str) -> Result<(), String> {
    plain(value, MAX_COMPONENT)?;
    if value.is_empty() || value == "." || value == ".." || value.contains('/') {
        return Err(format!("{} is not one component of a path", quote(value)));
    }
    Ok(())
}

/// Refuses what no string of a spec may contain: control characters, and templates that nobody expanded.
pub(super) fn plain(value: &str, max: usize) -> Result<(), String> {
    if value.len() > max {
        return Err(format!("{} is longer than {max} bytes", quote(value)));
    }
    if value.contains(char::is_control) {
        return Err(format!("{} contains a control character", quote(value)));
    }
    if value.contains("${") {
        return Err(format!(
            "{} contains \"${{\": templates are expanded only in the parameters of a StorageClass",
            quote(value)
        ));
    }
    Ok(())
}

/// The canonical form of an IPv6 address. One with a zone (`fe80::1%eth0`) means another server on each node, and is none.
pub(super) fn ipv6(value: &str) -> Option<String> {
    specified(IpAddr::V6(value.parse::<Ipv6Addr>().ok()?))
}

fn specified(address: IpAddr) -> Option<String> {
    (!address.is_unspecified()).then(|| address.to_string())
}

fn is_label(label: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    (1..=63).contains(&label.len()) && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
}

fn is_number(label: &str) -> bool {
    let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
    let hexadecimal = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
    digits(label) || hexadecimal.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses() {
        for (given, stored) in [
            ("nfs.example.com", "nfs.example.com"),
            ("NFS_1.example.com.", "nfs_1.example.com."),
            ("server", "server"),
            ("192.168.3.253", "192.168.3.253"),
            ("fd00:0:0::1", "fd00::1"),
            ("[FD00::1]", "fd00::1"),
        ] {
            assert_eq!(host(given).as_deref(), Ok(stored), "{given}");
        }
    }

    #[test]
    fn hosts_smuggle_nothing() {
        let long = "a.".repeat(127);
        for given in [
            "",
            ".",
            "a..b",
            "-a",
            "a-",
            "a b",
            "a,b",
            "a:b",
            "a:/b",
            "a/b",
            "a=b",
            "a\nb",
            "a\0",
            "é.com",
            "[a]",
            "fe80::1%eth0",
            "[::1",
            "::1]",
            "[192.168.0.1]",
            "::",
            "0.0.0.0",
            "127.1",
            "1",
            "1.2.3.4.5",
            "256.1.1.1",
            "0x7f000001",
            "a.0x1",
            "fe80::1%",
            "fe80::1%a/b",
            "fe80::1%a,b",
            "fe80::1%eth0%eth1",
            "fe80::1%abcdefghijklmnop",
            "${host}",
            &long,
        ] {
            assert!(host(given).is_err(), "{given}");
        }
    }

    #[test]
    fn absolute_paths_are_normalised() {
        for (given, stored) in [
            ("/", "/"),
            ("/images", "/images"),
            ("//images//a/", "/images/a"),
            ("/./images/.", "/images"),
            ("/with space,and=comma", "/with space,and=comma"),
            ("/images/...", "/images/..."),
        ] {
            assert_eq!(absolute(given).as_deref(), Ok(stored), "{given}");
        }
    }

    #[test]
    fn paths_never_climb() {
        for given in ["", "images", "/..", "/a/../b", "/a/..", "/a\nb", "/a\0", "/${x}", "../a"] {
            assert!(absolute(given).is_err(), "{given}");
        }
        assert!(absolute(&format!("/{}", "a/".repeat(2048))).is_err());
        assert!(absolute(&format!("/{}", "a".repeat(256))).is_err());
    }

    #[test]
    fn relative_paths_lose_their_leading_slash() {
        assert_eq!(relative("/image.sqsh").as_deref(), Ok("image.sqsh"));
        assert_eq!(relative("///a/./b/").as_deref(), Ok("a/b"));
        assert_eq!(relative("/").as_deref(), Ok(""));
        assert!(relative("a/../../b").is_err());
    }

    #[test]
    fn devices_live_in_dev() {
        assert_eq!(device("/dev//sda").as_deref(), Ok("/dev/sda"));
        for given in ["/dev", "/dev/", "/dev/../etc/shadow", "/devices/sda", "dev/sda", "sda"] {
            assert!(device(given).is_err(), "{given}");
        }
    }
}
