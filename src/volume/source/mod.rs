//! From a spec to one mount: what asks servers, attaches images, and makes mounts of them. What looks at mounts is in
//! [`super::report`].
//!
//! A [`Preparer`] turns a spec into a [`Prepared`]: servers asked, exports mounted, images on loop devices, all of it shared and held
//! until dropped. [`build()`] turns that into one detached mount.

mod ahead;
mod build;
mod devices;
mod earlier;
mod exports;
mod give_up;
mod layers;
mod learned;
mod local;
pub mod mark;
mod moving;
mod nfs_mount;
mod open_base;
mod order;
mod paths;
mod prefetch;
mod prepare;
mod prepared;
mod probe;
mod profile;
mod replicas;
mod resolve;
mod shared;
mod signed;
mod tend_paths;

pub use ahead::{PrefetchConfig, Prefetcher, Prefetching};
pub use build::{Storage, UpperLayer, build, overlay_on};
pub use devices::Device;
pub use learned::Learned;
pub use moving::Published;
#[cfg(test)]
pub use paths::ServerPath;
pub use paths::{Paths, Unanswered};
pub use prepare::{Node, Preparer};
pub use prepared::{ImageKey, Known, Prepared};
pub use probe::{ask_host, where_nfs_answers};
pub use profile::Profile;
