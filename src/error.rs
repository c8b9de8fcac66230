//! Why an operation failed, in the classes that CSI tells apart.

use std::fmt;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::kernel::{self, Subject};
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

/// A failed operation: its class, the sentence for the person who repairs it, and the failed call of the kernel if there was one.
#[derive(Clone, Debug)]
pub struct Error {
    pub kind: Kind,
    pub message: String,
    source: Option<kernel::Error>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    /// Of servers none of which could do it: what one answers beats that another is silent. There is at least one error.
    pub fn of_all(mut errors: Vec<Error>) -> Self {
        if errors.len() == 1 {
            return errors.remove(0);
        }
        let kind = errors.iter().map(|error| error.kind).find(|kind| *kind != Kind::Unavailable);
        let all = errors.iter().map(|error| error.message.as_str()).collect::<Vec<_>>().join("; ");
        Error::new(kind.unwrap_or(Kind::Unavailable), all)
    }

    /// Puts the object that the operation was about in front.
    pub fn about(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    pub fn with_kind(self, kind: Kind) -> Self {
        Error { kind, ..self }
    }

    /// An operation on a file of the driver's own.
    pub fn file(action: &str, path: &Path, error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
            _ => Kind::Internal,
        };
        Error::new(kind, format!("{action} {}: {error}", path.display()))
    }

    /// What the kernel answered, where it was the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        self.source.as_ref().map(kernel::Error::errno)
    }
}

/// What the first of several servers gives that can, one after another; where none can, what [`Error::of_all`] says of them.
pub async fn first_that_can<S, T, F>(servers: impl IntoIterator<Item = S>, ask: impl Fn(S) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut errors = Vec::new();
    for server in servers {
        match ask(server).await {
            Ok(given) => return Ok(given),
            Err(error) => errors.push(error),
        }
    }
    Err(Error::of_all(errors))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

impl From<kernel::Error> for Error {
    fn from(error: kernel::Error) -> Self {
        let kind = class(error.subject(), error.errno());
        Error { kind, message: error.to_string(), source: Some(error) }
    }
}

/// The same errno is one thing said of an image, and another of the node: a user can mend the first alone.
fn class(subject: Subject, errno: Errno) -> Kind {
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::AGAIN => {
            Kind::ResourceExhausted
        }
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
        Errno::INVAL
        | Errno::NODEV
        | Errno::PROTONOSUPPORT
        | Errno::OPNOTSUPP
        | Errno::NAMETOOLONG
        | Errno::MEDIUMTYPE
        | Errno::BADMSG
        | Errno::NOTUNIQ
        | Errno::SRCH
        | Errno::NODATA => Kind::FailedPrecondition,
        errno => match (subject, errno) {
            (Subject::Server | Subject::Image, Errno::NOENT) => Kind::NotFound,
            (Subject::Server | Subject::Image, Errno::ACCESS | Errno::PERM | Errno::XDEV | Errno::LOOP) => {
                Kind::PermissionDenied
            }
            (Subject::Server | Subject::Image, Errno::ISDIR | Errno::NOTDIR) => Kind::FailedPrecondition,
            // A mount over TLS whose server has none.
            (Subject::Server, Errno::IO) => Kind::Unavailable,
            // Another mount has it in a way that this one cannot.
            (Subject::Server, Errno::BUSY) => Kind::FailedPrecondition,
            // Layers that lie in each other cannot be stacked.
            (Subject::Node, Errno::LOOP) => Kind::FailedPrecondition,
            (Subject::Node | Subject::Server | Subject::Image, _) => Kind::Internal,
        },
    }
}

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Self {
        let kind = if error.is_denied() { Kind::PermissionDenied } else { Kind::InvalidArgument };
        Error::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_on_the_node_is_not_what_is_missing_on_the_server() {
        let kind = |subject, errno| Error::from(kernel::Error::new("open /dev/loop3", errno).about(subject)).kind;
        assert_eq!(kind(Subject::Image, Errno::NOENT), Kind::NotFound);
        assert_eq!(kind(Subject::Node, Errno::NOENT), Kind::Internal);
        assert_eq!(kind(Subject::Server, Errno::ACCESS), Kind::PermissionDenied);
        assert_eq!(kind(Subject::Node, Errno::ACCESS), Kind::Internal);
        assert_eq!(kind(Subject::Node, Errno::NODEV), Kind::FailedPrecondition);
        assert_eq!(kind(Subject::Node, Errno::STALE), Kind::Unavailable);
    }

    #[test]
    fn the_failed_call_of_the_kernel_is_kept() {
        let error = Error::from(kernel::Error::new("mount a:/b", Errno::CONNREFUSED)).about("image c");
        assert_eq!(error.errno(), Some(Errno::CONNREFUSED));
        assert_eq!(error.message, "image c: mount a:/b: connection refused");
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "mount a:/b: connection refused");
    }
}
