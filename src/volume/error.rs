//! Why an operation failed, in the classes that CSI tells apart.

use std::fmt;

use rustix::io::Errno;

use crate::kernel;
use crate::spec::SpecError;

pub type Result<T> = std::result::Result<T, Error>;

/// The class of an error: each is one gRPC code of the CSI spec, section "Error Scheme".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    InvalidArgument,
    PermissionDenied,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    DeadlineExceeded,
    Aborted,
    Internal,
}

/// A failed operation: its class, and the sentence for the person who repairs it.
#[derive(Clone, Debug)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// Puts the object that the operation was about in front.
    pub fn about(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<kernel::Error> for Error {
    fn from(error: kernel::Error) -> Self {
        let kind = match error.errno() {
            Errno::NOENT => Kind::NotFound,
            Errno::ACCESS | Errno::PERM | Errno::XDEV | Errno::LOOP => Kind::PermissionDenied,
            Errno::MEDIUMTYPE | Errno::NODATA | Errno::ISDIR | Errno::NOTDIR | Errno::NAMETOOLONG => {
                Kind::FailedPrecondition
            }
            Errno::INVAL | Errno::NODEV | Errno::PROTONOSUPPORT | Errno::OPNOTSUPP => Kind::FailedPrecondition,
            Errno::NOSPC | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::AGAIN => Kind::ResourceExhausted,
            Errno::CONNREFUSED
            | Errno::CONNRESET
            | Errno::CONNABORTED
            | Errno::PIPE
            | Errno::PROTO
            | Errno::HOSTUNREACH
            | Errno::HOSTDOWN
            | Errno::NETUNREACH
            | Errno::NETDOWN
            | Errno::TIMEDOUT
            | Errno::STALE => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Error::new(kind, error.to_string())
    }
}

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Self {
        let kind = if error.is_denied() { Kind::PermissionDenied } else { Kind::InvalidArgument };
        Error::new(kind, error.to_string())
    }
}
