//! From text to the types that serde reads, with errors that say where, what is allowed there, and what was meant.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_path_to_error::{Path, Segment};
use serde_saphyr::UserMessageFormatter;
use serde_saphyr::options::MergeKeyPolicy;

use super::MAX_DEPTH;
use super::error::{SpecError, cut, quote, unknown};

/// The longest text read, in bytes.
const MAX_TEXT: usize = 64 << 10;

/// Kinds of the ImageAPI that this driver does not have.
const NOT_SUPPORTED: &[&str] = &["iscsi", "rbd", "uri"];
/// Fields that are read but need not be told to anyone: references, and what only the ImageAPI writes.
const NOT_LISTED: &[&str] = &["id", "mountpoint", "refs", "device_file", "upperdir", "workdir"];

/// A struct that is read from an object only; serde's derive would take an array of the fields' values as well.
pub(super) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

impl<T: JsonSchema> JsonSchema for Object<T> {
    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// Reads an enum from its name only; serde's derive would take an object around the name as well.
pub(super) fn word<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Word::deserialize(deserializer).map(|word| word.0)
}

/// Reads a list of enums as [`word`] does.
pub(super) fn words<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let words: Vec<Word<T>> = Vec::deserialize(deserializer)?;
    Ok(words.into_iter().map(|word| word.0).collect())
}

struct Word<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Word<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Word<T>, D::Error> {
        let text = String::deserialize(deserializer)?;
        T::deserialize(text.into_deserializer()).map(Word)
    }
}

/// A reference to an object of the ImageAPI: refused where it stands, before a missing field beside it is.
pub(super) enum Reference {}

const REFERENCE: &str = "references are not supported: embed the object itself";

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Reference, D::Error> {
        Err(D::Error::custom(REFERENCE))
    }
}

/// Reads a JSON object. `parameter` is the text's name in errors.
pub(super) fn json<T: for<'de> Deserialize<'de>>(parameter: &str, text: &str) -> Result<T, SpecError> {
    check_size(parameter, text)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = read(parameter, &mut deserializer)?;
    // What follows the value is a mistake too.
    deserializer.end().map_err(|error| SpecError::invalid(parameter, "", format!("no JSON: {error}")))?;
    Ok(value)
}

/// Reads a YAML mapping. `parameter` is the text's name in errors.
pub(super) fn yaml<T: for<'de> Deserialize<'de>>(parameter: &str, text: &str) -> Result<T, SpecError> {
    check_size(parameter, text)?;
    let value = yaml_value(text).map_err(|error| SpecError::invalid(parameter, "", format!("no YAML: {error}")))?;
    if value.is_null() {
        // Such as of a pipe that nobody wrote to: it must not pass for a decision.
        return Err(SpecError::invalid(parameter, "", "says nothing: write {} if every default is meant"));
    }
    read(parameter, value)
}

/// What one document of YAML 1.2 says, which has no merge keys, and no tags that mean nothing here; or why it is none.
pub fn yaml_value(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { enforce_alias_anchor_ratio: false },
        merge_keys: MergeKeyPolicy::Error,
        reject_unsupported_tags: true,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    };
    let value = serde_saphyr::from_str_with_options(text, options);
    value.map_err(|error| error.render_with_formatter(&UserMessageFormatter))
}

fn check_size(parameter: &str, text: &str) -> Result<(), SpecError> {
    if text.len() <= MAX_TEXT {
        return Ok(());
    }
    let message = format!("{} bytes are too many: at most {MAX_TEXT}", text.len());
    Err(SpecError::invalid(parameter, "", message))
}

fn read<'de, D: Deserializer<'de>, T: Deserialize<'de>>(parameter: &str, deserializer: D) -> Result<T, SpecError> {
    let object: Result<Object<T>, _> = serde_path_to_error::deserialize(deserializer);
    object.map(|object| object.0).map_err(|error| {
        let text = error.inner().to_string();
        let pointer = pointer(error.path());
        match unknown_field(&text) {
            // The field is in the message: the place is the object that has no such field.
            Some((field, message)) => {
                let object = pointer.strip_suffix(&format!("/{}", escape(field)));
                SpecError::invalid(parameter, object.unwrap_or(&pointer), message)
            }
            None => SpecError::invalid(parameter, &pointer, explain(&text)),
        }
    })
}

/// RFC 6901.
fn pointer(path: &Path) -> String {
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer += &format!("/{index}"),
            Segment::Map { key } => pointer += &format!("/{}", escape(key)),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    pointer
}

fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// "unknown field `hots`, expected one of `host`, `path`": the field, and the same in our words.
fn unknown_field(text: &str) -> Option<(&str, String)> {
    let (field, known) = names(text.strip_prefix("unknown field `")?)?;
    let message = if NOT_SUPPORTED.contains(&field) {
        not_supported("field", field, &known)
    } else {
        unknown("field", field, &known)
    };
    Some((field, message))
}

fn explain(text: &str) -> String {
    if let Some((value, known)) = text.strip_prefix("unknown variant `").and_then(names) {
        if NOT_SUPPORTED.contains(&value) {
            return not_supported("value", value, &known);
        }
        let message = unknown("value", value, &known);
        return if value.contains(',') { message + "; each string is one" } else { message };
    }
    if text.starts_with(REFERENCE) {
        return REFERENCE.to_owned();
    }
    if text.starts_with("recursion limit exceeded") {
        return format!("nested too deeply: at most {MAX_DEPTH} mounts inside each other");
    }
    // "invalid type: string "yes", expected a boolean at line 1 column 9"
    if let Some((given, expected)) = text.strip_prefix("invalid type: ").and_then(split_expected) {
        return format!("expected {}, got {}", without_position(expected), cut(given));
    }
    for prefix in ["missing field", "duplicate field"] {
        if let Some(field) = text.strip_prefix(prefix).and_then(|rest| rest.split('`').nth(1)) {
            return format!("{prefix} {}", quote(field));
        }
    }
    // Mistakes in the grammar: here the line and column help.
    text.to_owned()
}

fn not_supported(what: &str, name: &str, known: &[&str]) -> String {
    format!("\"{name}\" is a kind of the ImageAPI that this driver does not have; known {what}s: {}", known.join(", "))
}

/// The name before "`, expected", which may hold anything, and the names after it, which are ours.
fn names(text: &str) -> Option<(&str, Vec<&str>)> {
    let (name, known) = text.rsplit_once("`, expected ")?;
    let known = known.split('`').skip(1).step_by(2);
    Some((name, known.filter(|name| !NOT_LISTED.contains(name)).collect()))
}

fn split_expected(text: &str) -> Option<(&str, &str)> {
    text.rsplit_once(", expected ")
}

fn without_position(text: &str) -> &str {
    text.rsplit_once(" at line ").map_or(text, |(text, _)| text)
}
