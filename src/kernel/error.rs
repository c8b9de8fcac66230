//! What was tried, on what, what the kernel answered, and what to do about it.

use std::fmt;

use rustix::io::Errno;

pub type Result<T> = std::result::Result<T, Error>;

/// A system call that failed, in the words of the person who has to repair it.
///
/// Shown as `ACTION: ERRNO TEXT [(KERNEL LOG)][: HINT]`.
#[derive(Clone, Debug)]
pub struct Error {
    action: String,
    subject: Subject,
    errno: Errno,
    log: Vec<String>,
    hint: Option<String>,
}

/// What a call was about. With the errno it says whose affair the failure is: ENOENT is a missing image, or a broken node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subject {
    /// The node itself: its devices, its namespaces, its memory.
    #[default]
    Node,
    /// An NFS server and what it exports.
    Server,
    /// An image, or another file or directory that a spec names.
    Image,
}

impl Error {
    /// `action` names the step and its object: `mount 10.0.0.5:/images (nfs 4.2)`. It is about the node unless [`Self::about`] says
    /// otherwise.
    pub fn new(action: impl Into<String>, errno: Errno) -> Self {
        Error { action: action.into(), subject: Subject::default(), errno, log: Vec::new(), hint: None }
    }

    pub fn about(mut self, subject: Subject) -> Self {
        self.subject = subject;
        self
    }

    /// Adds what the file system itself logged about the failure.
    pub fn with_log(mut self, log: Vec<String>) -> Self {
        self.log = log;
        self
    }

    /// Adds what the reader can do about it.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn errno(&self) -> Errno {
        self.errno
    }

    pub fn subject(&self) -> Subject {
        self.subject
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.action, text(self.errno))?;
        if !self.log.is_empty() {
            write!(f, " ({})", self.log.join("; "))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, ": {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// The words of strerror(3), without Rust's "(os error N)".
fn text(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => format!("errno {}", errno.raw_os_error()),
    }
}

/// The errno behind an error of the standard library; EIO where it has none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// The errno of the C library's call that just failed.
pub(super) fn last_errno() -> Errno {
    errno_of(&std::io::Error::last_os_error())
}

/// Turns the error of one call into an [`Error`] that names the call's purpose.
pub trait Doing<T> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for rustix::io::Result<T> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::new(action(), errno))
    }
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::new(action(), errno_of(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_was_tried_what_the_kernel_said_and_what_to_do() {
        let error = Error::new("mount 10.0.0.5:/images (nfs 4.2)", Errno::CONNREFUSED)
            .with_log(vec!["NFS4: no luck".into()])
            .with_hint("is nfsd running?");
        assert_eq!(
            error.to_string(),
            "mount 10.0.0.5:/images (nfs 4.2): connection refused (NFS4: no luck): is nfsd running?"
        );
    }
}
