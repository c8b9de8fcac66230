//! What can be wrong with a published volume, as CSI's `VolumeHealth` puts it.

use crate::error::{Error, Kind};

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abnormal {
    pub harm: Harm,
    /// In one word in `CamelCase`, the same for all volumes with whom it is so: for programs.
    pub reason: &'static str,
    /// In a sentence.
    pub message: String,
}

/// What it means for who uses the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// It is read, and not as it should be.
    Degraded,
    /// It cannot be read now.
    Inaccessible,
    /// It cannot be read any more as it was.
    DataLoss,
}

impl Abnormal {
    pub fn degraded(reason: &'static str, message: impl Into<String>) -> Self {
        Abnormal { harm: Harm::Degraded, reason, message: message.into() }
    }

    pub fn inaccessible(reason: &'static str, message: impl Into<String>) -> Self {
        Abnormal { harm: Harm::Inaccessible, reason, message: message.into() }
    }

    pub fn data_loss(reason: &'static str, message: impl Into<String>) -> Self {
        Abnormal { harm: Harm::DataLoss, reason, message: message.into() }
    }

    /// A server gave `error` in place of an answer.
    pub fn unanswered(error: &Error, message: impl Into<String>) -> Self {
        let reason = if error.kind == Kind::Unavailable { SERVER_SILENT } else { "Unreadable" };
        Abnormal::inaccessible(reason, message)
    }

    /// The same, of `whom` it is said.
    pub fn of(self, whom: impl std::fmt::Display) -> Self {
        Abnormal { message: format!("{whom} {}", self.message), ..self }
    }
}

/// The server does not answer.
pub const SERVER_SILENT: &str = "ServerSilent";
/// Bytes are not those that the volume's root hash or digest says.
pub const IMAGE_CORRUPTED: &str = "ImageCorrupted";
/// Another file has the image's name.
pub const IMAGE_REPLACED: &str = "ImageReplaced";
