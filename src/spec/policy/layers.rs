//! What a policy says of writable layers: the uppers of overlays.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

use super::denied;
use crate::spec::error::SpecError;
use crate::spec::read::words;
use crate::spec::{MOUNT_SPEC, Upper, quantity};

/// See the policy's example.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct WritableLayers {
    #[serde(deserialize_with = "words")]
    kinds: Vec<Kind>,
    #[serde(deserialize_with = "size")]
    #[schemars(with = "String")]
    max_size: Option<u64>,
    pub(super) per_namespace: Share,
}

/// What the pods of one namespace may have on one node.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Share {
    /// How many layers.
    #[schemars(with = "usize")]
    pub count: Option<usize>,
    /// How many bytes, all layers together.
    #[serde(deserialize_with = "size")]
    #[schemars(with = "String")]
    pub size: Option<u64>,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Directory,
    Tmpfs,
}

impl Default for WritableLayers {
    fn default() -> Self {
        WritableLayers { kinds: vec![Kind::Directory, Kind::Tmpfs], max_size: None, per_namespace: Share::default() }
    }
}

impl WritableLayers {
    /// `at` is the place of the overlay.
    pub(super) fn check(&self, at: &str, upper: Upper) -> Result<(), SpecError> {
        let kind = match upper {
            Upper::None => return Ok(()),
            Upper::Directory { .. } => Kind::Directory,
            Upper::Tmpfs { .. } => Kind::Tmpfs,
        };
        if !self.kinds.contains(&kind) {
            let name = |kind: &Kind| match kind {
                Kind::Directory => "directory",
                Kind::Tmpfs => "tmpfs",
            };
            let what = format!("a writable layer of kind \"{}\"", name(&kind));
            return Err(denied(format!("{at}/upper/kind"), &what, self.kinds.iter().map(name)));
        }
        let Some(limit) = self.max_size.into_iter().chain(self.per_namespace.size).min() else { return Ok(()) };
        let message = match upper.size() {
            Some(size) if size <= limit => return Ok(()),
            Some(size) => format!("the policy allows a writable layer {limit} bytes, and this has {size}"),
            None => format!("the policy wants a size of each writable layer, at most {limit} bytes"),
        };
        Err(SpecError::denied(MOUNT_SPEC, &format!("{at}/upper/size"), message))
    }
}

/// A Kubernetes quantity, which may be absent but not empty.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(deserializer)?;
    quantity::bytes(&text).map(Some).map_err(serde::de::Error::custom)
}
