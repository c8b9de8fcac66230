//! What a policy says of NFS exports besides their names: protocol versions, options that may or must be there, and writing.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::denied;
use crate::spec::error::{SpecError, quote, unknown};
use crate::spec::pattern::matches;
use crate::spec::{MOUNT_SPEC, Nfs, options, replicas};

/// From and to; a bound that is left out is none.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Limit {
    #[schemars(with = "u32")]
    min: Option<u32>,
    #[schemars(with = "u32")]
    max: Option<u32>,
}

/// Limits by the name of an option that takes a number.
pub(super) type Limits = BTreeMap<String, Limit>;

/// What an option is that is left out: the kernel's default (nfs(5)), or what the driver sets for one of several servers. Others are
/// negotiated with the server.
fn default(nfs: &Nfs, key: &str) -> Option<u32> {
    match (key, nfs.is_replicated()) {
        ("nconnect", _) => Some(1),
        ("retrans", false) => Some(2),
        ("retrans", true) => Some(replicas::RETRANS),
        ("timeo", false) => Some(600),
        ("timeo", true) => Some(replicas::TIMEO),
        _ => None,
    }
}

/// Whether each option of the export is among `allowed`.
pub(super) fn check_allowed(at: &str, nfs: &Nfs, allowed: &[String]) -> Result<(), SpecError> {
    for option in &nfs.options {
        let text = option.to_string();
        if !allowed.iter().any(|pattern| matches(pattern, &text)) {
            let known = allowed.iter().map(String::as_str);
            return Err(denied(format!("{at}/options"), &format!("option {}", quote(&text)), known));
        }
    }
    Ok(())
}

/// Whether the export has an option for each of `required`.
pub(super) fn check_required(at: &str, nfs: &Nfs, required: &[String]) -> Result<(), SpecError> {
    let given: Vec<String> = nfs.options.iter().map(ToString::to_string).collect();
    match required.iter().find(|pattern| !given.iter().any(|option| matches(pattern, option))) {
        Some(missing) => {
            let message = format!("the policy wants an option {} for each export", quote(missing));
            Err(SpecError::denied(MOUNT_SPEC, &format!("{at}/options"), message))
        }
        None => Ok(()),
    }
}

pub(super) fn check_limits(at: &str, nfs: &Nfs, limits: &Limits) -> Result<(), SpecError> {
    for (key, Limit { min, max }) in limits {
        let given = nfs.options.iter().find(|option| option.key == *key);
        let given_value = given.and_then(|option| option.value.as_ref()?.parse().ok());
        let Some(value) = given_value.or(default(nfs, key)) else { continue };
        if min.is_some_and(|min| value < min) || max.is_some_and(|max| value > max) {
            let bound = |bound: &Option<u32>, none: &str| bound.map_or(none.to_owned(), |bound| bound.to_string());
            let (min, max) = (bound(min, "the least"), bound(max, "the most"));
            let given = if given.is_some() { "" } else { ", which it is where the option is left out," };
            let message = format!("the policy wants \"{key}\" from {min} to {max}, and {value}{given} is not");
            return Err(SpecError::denied(MOUNT_SPEC, &format!("{at}/options"), message));
        }
    }
    Ok(())
}

/// Refuses a pattern that no option fits.
pub(super) fn validate_pattern(option: &str) -> Result<(), String> {
    let key = option.split('=').next().unwrap_or_default();
    match options::keys().iter().any(|known| matches(key, known)) {
        true => Ok(()),
        false => Err(unknown("option", key, &options::keys())),
    }
}

pub(super) fn validate_limit(key: &str, limit: &Limit) -> Result<(), String> {
    let known = options::numbers();
    if !known.contains(&key) {
        return Err(unknown("option with a number", key, &known));
    }
    match limit {
        Limit { min: None, max: None } => Err("neither \"min\" nor \"max\": it limits nothing".into()),
        Limit { min: Some(min), max: Some(max) } if min > max => Err(format!("from {min} to {max} there is nothing")),
        Limit { .. } => Ok(()),
    }
}
