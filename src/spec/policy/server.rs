//! What a policy says of servers: their names, the exports in use, and where they are reached.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use super::{invalid, present, validate_keys, validate_paths};
use crate::spec::error::{SpecError, quote};
use crate::spec::pattern::covers;
use crate::spec::read::Object;
use crate::spec::text;

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Server {
    #[schemars(regex(pattern = r"^\S+$"))]
    pub(super) host: String,
    #[serde(default, deserialize_with = "present")]
    #[schemars(with = "Vec<String>", inner(regex(pattern = "^/")))]
    pub(super) exports: Option<Vec<String>>,
    // From here on of the outermost policy alone: a name means one server on a node.
    #[serde(default, deserialize_with = "present")]
    #[schemars(with = "Vec<String>", inner(regex(pattern = r"^\S+$")), length(min = 1))]
    pub(super) addresses: Option<Vec<String>>,
    #[serde(default, deserialize_with = "zone")]
    #[schemars(with = "String", length(min = 1))]
    pub(super) zone: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schemars(with = "Vec<String>")]
    trusted_keys: Option<Vec<String>>,
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
        validate_keys(at, self.trusted_keys.as_deref().unwrap_or_default())?;
        self.validate_addresses().map_err(invalid(&format!("{at}/addresses")))
    }

    /// A field that it has, and that is none of a policy of namespaces.
    pub(super) fn outermost_alone(&self) -> Option<&'static str> {
        let fields = [
            ("addresses", self.addresses.is_some()),
            ("zone", self.zone.is_some()),
            ("trustedKeys", self.trusted_keys.is_some()),
        ];
        fields.into_iter().find_map(|(field, is_there)| is_there.then_some(field))
    }

    /// Whether it is about the export with this path.
    pub(super) fn allows(&self, path: &str) -> bool {
        self.exports.as_ref().is_none_or(|exports| exports.iter().any(|export| covers(export, path)))
    }

    /// Whose signature an image on this export of it needs, where that is said.
    pub(super) fn keys_of(&self, path: &str) -> Option<&[String]> {
        self.trusted_keys.as_deref().filter(|_| self.allows(path))
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
