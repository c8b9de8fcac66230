//! The JSON schemas of the `mount` object and of the policy, generated from the types that read them.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::policy::Policy;
use super::wire;

/// The schema (draft 2020-12) of what the parameter `mountSpec` holds. It accepts all that [`super::json::parse`]
/// accepts; the parser is stricter where a schema cannot say it, such as about the nesting of overlays.
pub fn schema() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<wire::Mount>();
    schema.insert("title".to_owned(), "mount spec of csi-driver-squashfs".into());
    schema.to_value()
}

/// The schema (draft 7, as Helm wants it, and without references) of what [`Policy::parse`] reads.
pub fn policy() -> Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Policy>();
    schema.remove("$schema");
    schema.insert("title".to_owned(), "policy of csi-driver-squashfs".into());
    let mut schema = schema.to_value();
    let mut inside = schema.clone();
    inside["properties"].as_object_mut().map(|fields| fields.remove("namespaces"));
    inside["properties"].as_object_mut().map(|fields| fields.remove("trustedKeys"));
    let server = &mut inside["properties"]["servers"]["items"]["properties"];
    server.as_object_mut().map(|fields| fields.remove("addresses"));
    schema["properties"]["namespaces"]["items"]["properties"]["policy"] = inside;
    schema
}

#[cfg(test)]
pub(super) mod tests;
