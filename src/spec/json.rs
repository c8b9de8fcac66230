//! The JSON `mount` object of the Kraken ImageAPI, with what that API leaves open decided:
//!
//! - An overlay is the outermost mount or none: its layers are listed in one `lower`, and a directory of it is reached
//!   through the volume's path.
//! - File systems on devices are read-only whether `ro` is said or not.
//! - `overlay.upper` is ours: `{"kind":"directory"}` (the default), `{"kind":"tmpfs","size":"256Mi"}` or
//!   `{"kind":"none"}`.
//! - References to objects by `id` are refused; fields that the ImageAPI only returns are ignored with a warning.

mod reader;

use super::error::SpecError;
use super::mount_options::MountOptions;
use super::parsed::{Form, Parsed};
use super::read::{self, Object};
use super::{MOUNT_SPEC, replicas, wire};
use reader::Reader;

/// Reads one `mount` object of at most 64 KiB.
pub fn parse(text: &str) -> Result<Parsed, SpecError> {
    parse_with(text, &MountOptions::default())
}

/// Reads one `mount` object and applies a volume's mount options to every export and image in it.
pub(super) fn parse_with(text: &str, options: &MountOptions) -> Result<Parsed, SpecError> {
    let mut reader = Reader::new(options);
    let mount = reader.mount("", Object(wire(text)?), 1)?;
    options.check_use(&mount)?;
    replicas::check(&mount)?;
    Ok(Parsed::new(mount, reader.warnings, Form::Json))
}

/// Reads the shape of a `mount` object: its fields and their types, not what their strings say.
pub(super) fn wire(text: &str) -> Result<wire::Mount, SpecError> {
    read::json(MOUNT_SPEC, text).map_err(|error| match is_container(text) {
        true => {
            let hint = "this is a container definition: pass the object in its field \"mount\"";
            SpecError::invalid(MOUNT_SPEC, "", hint)
        }
        false => error,
    })
}

/// Whether someone passed an ImageAPI container, or anything else around a `mount` object, in place of that object.
fn is_container(text: &str) -> bool {
    let value: Option<serde_json::Value> = read::json(MOUNT_SPEC, text).ok();
    value.is_some_and(|value| value.get("mount").is_some() && value.get("kind").is_none())
}

#[cfg(test)]
mod tests;
