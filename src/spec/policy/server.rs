//! What a policy says of servers: their names, the exports in use, and where they are reached.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use super::{invalid, present, validate_paths};
use crate::spec::error::{SpecError, quote};
use crate::spec::read::Object;
use crate::spec::text;

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Server {
    #[schemars(regex(pattern = r"^\S+$"))]
    pub(super) host: String,
    #[serde(default, deserialize_with = "present")]
    #[schemars(with = "Vec<String>", inner(regex(pattern = "^/")))]
    pub(super) exports: Option<Vec<String>>,
    // Of the outermost policy alone: a name means one server on a node.
    #[serde(default, deserialize_with = "present")]
    #[schemars(with = "Vec<String>", inner(regex(pattern = r"^\S+$")), length(min = 1))]
    pub(super) addresses: Option<Vec<String>>,
    // Of the outermost policy alone: an image on several servers is everybody's.
    #[serde(default, deserialize_with = "zone")]
    #[schemars(with = "String", length(min = 1))]
    pub(super) zone: Option<String>,
}

/// It may be absent, but not empty.
fn zone<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    match String::deserialize(deserializer)? {
        zone if zone.is_empty() => Err(serde::de::Error::custom("is empty")),
        zone => Ok(Some(zone)),
    }
}

pub(super) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Server>>, D::Error> {
    let servers: Vec<Object<Server>> = Vec::deserialize(deserializer)?;
    Ok(Some(servers.into_iter().map(|server| server.0).collect()))
}

impl Server {
    /// In the form that a spec's host has: without brackets, and an IPv6 address in its one spelling.
    pub(super) fn canonicalise(&mut self) {
        for host in [&mut self.host].into_iter().chain(self.addresses.iter_mut().flatten()) {
            if let Ok(canonical) = text::host(host) {
                *host = canonical;
            }
        }
    }

    pub(super) fn validate(&self, at: &str) -> Result<(), SpecError> {
        text::host(&self.host.replace('*', "a")).map_err(invalid(&format!("{at}/host")))?;
        validate_paths(&format!("{at}/exports"), self.exports.as_deref().unwrap_or_default())?;
        self.validate_addresses().map_err(invalid(&format!("{at}/addresses")))
    }

    fn validate_addresses(&self) -> Result<(), String> {
        let Some(addresses) = &self.addresses else { return Ok(()) };
        if addresses.is_empty() {
            return Err("names no address".into());
        }
        if self.host.contains('*') {
            return Err(format!("belongs to one server, and {} is a pattern", quote(&self.host)));
        }
        addresses.iter().try_for_each(|address| text::host(address).map(drop))
    }
}
