//! How Linux does it: one file per kernel facility, each a few functions over file descriptors.
//!
//! Nothing here knows CSI, JSON or the volume that a call serves, and nothing forks: every step is a system call.

mod error;
pub mod image;
pub mod loop_device;
pub mod mount;
pub mod mountinfo;
pub mod mountstats;
pub mod namespace;
pub mod nfs;
pub mod overlay;
pub mod support;
pub mod thread;

pub use error::{Error, Result};
