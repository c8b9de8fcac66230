//! The options of nfs(5) that a user may set, one by one. What is not in the table below never reaches the kernel.

use std::ops::RangeInclusive;

use super::NfsOption;
use super::error::{quote, unknown};

/// What follows an option's `=`.
enum Value {
    Flag,
    Number(RangeInclusive<u32>),
    OneOf(&'static [&'static str]),
}

/// One option. Two different options of one group contradict each other.
struct Rule {
    key: &'static str,
    group: &'static str,
    value: Value,
}

const fn flag(key: &'static str, group: &'static str) -> Rule {
    Rule { key, group, value: Value::Flag }
}

const fn number(key: &'static str, range: RangeInclusive<u32>) -> Rule {
    Rule { key, group: key, value: Value::Number(range) }
}

const fn one_of(key: &'static str, values: &'static [&'static str]) -> Rule {
    Rule { key, group: key, value: Value::OneOf(values) }
}

const INT_MAX: u32 = i32::MAX as u32;
/// The largest block the client negotiates, and the smallest (nfs(5), rsize).
const BLOCK: RangeInclusive<u32> = 1024..=1_048_576;
const SECONDS: RangeInclusive<u32> = 0..=u32::MAX;
const PORT: RangeInclusive<u32> = 0..=65_535;

/// The names and ranges are those of the kernel, fs/nfs/fs_context.c.
const RULES: &[Rule] = &[
    flag("ac", "ac"),
    number("acdirmax", SECONDS),
    number("acdirmin", SECONDS),
    flag("acl", "acl"),
    number("acregmax", SECONDS),
    number("acregmin", SECONDS),
    number("actimeo", SECONDS),
    flag("cto", "cto"),
    flag("fsc", "fsc"),
    flag("hard", "hard"),
    one_of("local_lock", &["all", "flock", "none", "posix"]),
    flag("lock", "lock"),
    one_of("lookupcache", &["all", "none", "pos", "positive"]),
    number("max_connect", 1..=16),
    flag("migration", "migration"),
    number("mountport", PORT),
    one_of("mountproto", &["tcp", "tcp6", "udp", "udp6"]),
    number("mountvers", 3..=3),
    number("nconnect", 1..=16),
    flag("noac", "ac"),
    flag("noacl", "acl"),
    flag("nocto", "cto"),
    flag("nofsc", "fsc"),
    flag("nolock", "lock"),
    flag("nomigration", "migration"),
    flag("nordirplus", "rdirplus"),
    flag("noresvport", "resvport"),
    flag("nosoftreval", "softreval"),
    flag("notrunkdiscovery", "trunkdiscovery"),
    number("port", PORT),
    one_of("proto", &["rdma", "rdma6", "tcp", "tcp6"]),
    flag("rdirplus", "rdirplus"),
    flag("resvport", "resvport"),
    number("retrans", 0..=INT_MAX),
    number("rsize", BLOCK),
    one_of("sec", &["krb5", "krb5i", "krb5p", "none", "sys"]),
    flag("soft", "hard"),
    flag("softerr", "hard"),
    flag("softreval", "softreval"),
    number("timeo", 1..=INT_MAX),
    flag("trunkdiscovery", "trunkdiscovery"),
    one_of("write", &["eager", "lazy", "wait"]),
    number("wsize", BLOCK),
    one_of("xprtsec", &["mtls", "none", "tls"]),
];

/// Options that exist, with the reason why a user cannot set them.
const REFUSED: &[(&str, &str)] = &[
    ("addr", "the driver resolves the host"),
    ("bg", "a mount that goes on in the background would succeed too early"),
    ("clientaddr", "the driver fills it in"),
    ("fg", "every mount is in the foreground"),
    ("minorversion", "use \"version\" (flat: \"nfsVersion\")"),
    ("mountaddr", "the mount protocol must reach the host of the spec"),
    ("mounthost", "the mount protocol must reach the host of the spec"),
    ("nfsvers", "use \"version\" (flat: \"nfsVersion\")"),
    ("nosharecache", "the driver decides where mounts share what"),
    ("retry", "the driver and the kubelet retry"),
    ("ro", "use the field \"ro\""),
    ("rw", "use the field \"ro\""),
    ("sharecache", "the driver decides where mounts share what"),
    ("source", "the driver builds it from host and path"),
    ("udp", "NFS over UDP corrupts data (nfs(5))"),
    ("vers", "use \"version\" (flat: \"nfsVersion\")"),
];

/// Reads one option, such as `hard` or `timeo=600`. Numbers lose leading zeros and `tcp` becomes `proto=tcp`, as does
/// `rdma`, so that equal options compare equal. The error is a message without a place.
pub fn parse(text: &str) -> Result<NfsOption, String> {
    if text.contains(',') {
        return Err(format!("{} holds a comma: each string is one option", quote(text)));
    }
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None if text == "tcp" || text == "rdma" => ("proto", Some(text)),
        None => (text, None),
    };
    let Some(rule) = RULES.iter().find(|rule| rule.key == key) else {
        if let Some((_, reason)) = REFUSED.iter().find(|(refused, _)| *refused == key) {
            return Err(format!("option {} cannot be set: {reason}", quote(key)));
        }
        return Err(unknown("option", key, &keys()));
    };
    let value = match (&rule.value, value) {
        (Value::Flag, None) => None,
        (Value::Flag, Some(_)) => return Err(format!("option \"{key}\" takes no value")),
        (Value::Number(range), value) => {
            // Not str::parse alone: it takes a leading plus.
            let digits = value.filter(|value| value.chars().all(|c| c.is_ascii_digit()));
            let number = digits.and_then(|digits| digits.parse().ok());
            let Some(number) = number.filter(|number| range.contains(number)) else {
                let (low, high) = (range.start(), range.end());
                return Err(format!("option \"{key}\" takes a number from {low} to {high}"));
            };
            Some(number.to_string())
        }
        (Value::OneOf(known), value) => match value.filter(|value| known.contains(value)) {
            Some(value) => Some(value.to_owned()),
            None => {
                return Err(format!("option \"{key}\" takes one of {}", known.join(", ")));
            }
        },
    };
    Ok(NfsOption { key: key.to_owned(), value })
}

/// Brings options into the one order and form that [`super::Nfs::options`] has: sorted, each once. Refuses options that
/// contradict each other.
pub fn canonical(mut options: Vec<NfsOption>) -> Result<Vec<NfsOption>, String> {
    options.sort();
    options.dedup();
    for (at, one) in options.iter().enumerate() {
        for other in &options[at + 1..] {
            if contradict(one, other) {
                return Err(format!("options \"{one}\" and \"{other}\" contradict each other"));
            }
        }
    }
    Ok(options)
}

fn contradict(one: &NfsOption, other: &NfsOption) -> bool {
    // The kernel lets the later one win, and the order of options means nothing here.
    let sets_actimeo = |option: &NfsOption| option.key == "actimeo";
    let is_part = |option: &NfsOption| ["acdirmax", "acdirmin", "acregmax", "acregmin"].contains(&option.key.as_str());
    group(one) == group(other) || sets_actimeo(one) && is_part(other) || is_part(one) && sets_actimeo(other)
}

fn group(option: &NfsOption) -> &str {
    RULES.iter().find(|rule| rule.key == option.key).map_or(option.key.as_str(), |rule| rule.group)
}

/// The options a user may set, in alphabetical order.
pub(super) fn keys() -> Vec<&'static str> {
    RULES.iter().map(|rule| rule.key).collect()
}

/// Those that take a number.
pub(super) fn numbers() -> Vec<&'static str> {
    RULES.iter().filter(|rule| matches!(rule.value, Value::Number(_))).map(|rule| rule.key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(texts: &[&str]) -> Vec<NfsOption> {
        texts.iter().map(|text| parse(text).unwrap()).collect()
    }

    #[test]
    fn known_options_are_kept() {
        for text in [
            "hard",
            "soft",
            "timeo=600",
            "retrans=2",
            "rsize=1048576",
            "wsize=1024",
            "nconnect=16",
            "port=20049",
            "sec=krb5p",
            "proto=rdma",
            "lookupcache=positive",
            "nocto",
            "actimeo=0",
            "noresvport",
            "xprtsec=mtls",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn spellings_become_one() {
        assert_eq!(parse("timeo=0600").unwrap().to_string(), "timeo=600");
        assert_eq!(parse("tcp").unwrap().to_string(), "proto=tcp");
    }

    #[test]
    fn values_stay_in_the_kernel_s_ranges() {
        for text in [
            "timeo",
            "timeo=",
            "timeo=0",
            "timeo=-1",
            "timeo=+1",
            "timeo=1s",
            "timeo=2147483648",
            "nconnect=17",
            "port=65536",
            "rsize=1023",
            "hard=1",
            "sec=sys:krb5",
            "sec",
            "proto=udp",
            "mountvers=2",
            "timeo=1 ",
            "timeo=99999999999999999999",
            "timeo=１",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_that_name_other_hosts_are_refused_with_a_reason() {
        for (key, _) in REFUSED {
            let error = parse(&format!("{key}=1")).unwrap_err();
            assert!(error.contains("cannot be set"), "{error}");
        }
    }

    #[test]
    fn a_typo_names_its_neighbour() {
        assert!(parse("tmeo=600").unwrap_err().contains("did you mean \"timeo\"?"));
        assert!(parse("hard,addr=1.2.3.4").unwrap_err().contains("comma"));
    }

    #[test]
    fn order_and_repetition_do_not_matter() {
        let one = canonical(parsed(&["timeo=600", "hard", "hard"])).unwrap();
        let other = canonical(parsed(&["hard", "timeo=0600"])).unwrap();
        assert_eq!(one, other);
    }

    #[test]
    fn contradictions_are_refused() {
        for pair in [
            ["hard", "soft"],
            ["soft", "softerr"],
            ["timeo=1", "timeo=2"],
            ["cto", "nocto"],
            ["actimeo=1", "acregmin=1"],
            ["acdirmax=1", "actimeo=1"],
        ] {
            assert!(canonical(parsed(&pair)).is_err(), "{pair:?}");
        }
    }

    #[test]
    fn the_table_is_sorted() {
        assert!(keys().is_sorted());
    }
}
