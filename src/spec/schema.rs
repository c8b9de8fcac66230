//! The JSON schema of the `mount` object, generated from the types that read it.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::wire;

/// The schema (draft 2020-12) of what the parameter `mountSpec` holds. It accepts all that [`super::json::parse`]
/// accepts; the parser is stricter where a schema cannot say it, such as about the nesting of overlays.
pub fn schema() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<wire::Mount>();
    schema.insert("title".to_owned(), "mount spec of csi-driver-squashfs".into());
    schema.to_value()
}

#[cfg(test)]
pub(super) mod tests;
