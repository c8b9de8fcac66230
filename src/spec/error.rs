//! The one error of this module: what is wrong, where, and what would be right.

use std::fmt::Write;

/// The most characters of a user's value that an error repeats.
const QUOTED: usize = 64;
/// The most characters of a whole message.
const MESSAGE: usize = 1024;

/// Why a text is refused. Displayed as `mountSpec/overlay/lower/0/nfs: unknown field "hots"...`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{parameter}{pointer}: {message}")]
pub struct SpecError {
    pub kind: ErrorKind,
    /// The text that holds the mistake: `mountSpec`, the name of another parameter, `mountOptions` or `policy`.
    pub parameter: String,
    /// The place inside that text, as a JSON pointer (RFC 6901); empty for the whole of it.
    pub pointer: String,
    /// What is wrong and what is allowed. Bounded, and free of control characters.
    pub message: String,
}

/// Whose decision an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The text makes no sense: gRPC `INVALID_ARGUMENT`.
    Invalid,
    /// The text is fine but the admin's policy does not allow it: gRPC `PERMISSION_DENIED`.
    Denied,
}

impl SpecError {
    pub fn invalid(parameter: &str, pointer: &str, message: impl AsRef<str>) -> SpecError {
        SpecError::new(ErrorKind::Invalid, parameter, pointer, message.as_ref())
    }

    pub fn denied(parameter: &str, pointer: &str, message: impl AsRef<str>) -> SpecError {
        SpecError::new(ErrorKind::Denied, parameter, pointer, message.as_ref())
    }

    pub fn is_denied(&self) -> bool {
        self.kind == ErrorKind::Denied
    }

    fn new(kind: ErrorKind, parameter: &str, pointer: &str, message: &str) -> SpecError {
        SpecError {
            kind,
            parameter: printable(parameter, QUOTED),
            pointer: printable(pointer, MESSAGE),
            message: printable(message, MESSAGE),
        }
    }
}

/// A user's value as an error may repeat it: in quotes, escaped, and cut when it is long.
pub(super) fn quote(value: &str) -> String {
    format!("\"{}\"", printable(&value.replace('"', "\\\""), QUOTED))
}

/// A part of another library's message, as an error may repeat it.
pub(super) fn cut(text: &str) -> String {
    printable(text, QUOTED)
}

fn printable(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == limit {
            out.push_str("...");
            break;
        }
        if c.is_control() {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Says that `name` is not a `what`, which known one it resembles, and which ones there are.
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let mut message = format!("unknown {what} {}", quote(name));
    if let Some(near) = nearest(name, known) {
        message += &format!(": did you mean \"{near}\"?");
    } else {
        message += ";";
    }
    message + &format!(" known {what}s: {}", known.join(", "))
}

/// The known name that a typo most likely meant.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    // Long names are no typos, and comparing them costs their product in time.
    if name.len() > QUOTED {
        return None;
    }
    let name = name.to_lowercase();
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(&name, &known.to_lowercase()), *known))
        .filter(|(distance, known)| *distance <= 1.max(known.len() / 3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}
