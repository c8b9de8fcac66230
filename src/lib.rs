//! A Kubernetes CSI driver for images on NFS: a squashfs file on an NFS export becomes a directory in a pod, and the
//! kernel alone serves it.
//!
//! A request comes in at a socket to [`csi`], which reads what the user wants by [`spec`] and gives it to [`volume`]; that
//! decides when [`kernel`] does what. Each part uses only those behind it, which `imports.rs` tests:
//!
//! ```text
//! csi, ops -> volume -> volume::report -> volume::source -> volume::cache -> kernel, spec
//! csi, ops -> kubernetes -> spec
//! enter -> kernel
//! ```
//!
//! `spec` and `kernel` know nobody. `error`, `step`, `blocking`, `places`, `single_flight`, `lock` and `metrics` lie below them all: there an
//! operation fails, waits, has its turn, is done once for several callers, or is counted.
//!
//! | a line about | goes to |
//! | --- | --- |
//! | what a parameter means, what is refused, what the admin allows | [`spec`] |
//! | one system call, one file system, one device | [`kernel`] |
//! | who waits for whom, what is shared and cleaned up | [`volume`] |
//! | what is written down | `volume::record` |
//! | asking servers, attaching images, making a mount of it all | `volume::source` |
//! | copies of images on the node's disk | `volume::cache` |
//! | looking at what is there: usage, condition, status, what a pod wrote | `volume::report` |
//! | a class of errors, a thread that waits, how many may, work that is done once for several | `error.rs`, `blocking.rs`, `places.rs`, `single_flight.rs` |
//! | a field of a CSI message, a gRPC code | [`csi`] |
//! | the API server, the kubelet's plugin registry, a Kubernetes object | [`kubernetes`] |
//! | what an operator sees: health, metrics, the doctor, what lies on a server | [`ops`] |
//! | what a command in an image as its root has around it | `enter.rs` |
//! | a flag or a subcommand; those of `kubectl squashfs` | `cli.rs`, `main.rs`; `plugin.rs` |
//! | making images of container images, tars and directories | the crate in `builder`, a program of its own |

mod blocking;
pub mod csi;
pub mod enter;
mod error;
#[cfg(test)]
mod imports;
pub mod kernel;
pub mod kubernetes;
mod lock;
mod metrics;
pub mod ops;
mod places;
mod single_flight;
mod socket;
pub mod spec;
mod step;
pub mod volume;
