//! A Kubernetes CSI driver for images on NFS: a squashfs file on an NFS export becomes a directory in a pod, and the
//! kernel alone serves it.
//!
//! A request comes in at a [`socket`] to [`csi`], which reads what the user wants by [`spec`] and gives it to [`volume`]; that
//! decides when [`kernel`] does what. Arrows point one way: `csi -> volume -> {spec, kernel}`; `spec` and `kernel` know nobody,
//! and everybody may count in [`metrics`].
//!
//! | a line about | goes to |
//! | --- | --- |
//! | what a parameter means, what is refused, what the admin allows | [`spec`] |
//! | one system call, one file system, one device | [`kernel`] |
//! | who waits for whom, what is shared, what is cleaned up | [`volume`] |
//! | a field of a CSI message, a gRPC code | [`csi`] |
//! | the API server, the kubelet's plugin registry, a Kubernetes object | [`kubernetes`] |
//! | what an operator sees: health, metrics, the doctor | [`ops`] |
//! | a flag or a subcommand | `cli.rs`, `main.rs` |

pub mod csi;
pub mod kernel;
pub mod kubernetes;
pub mod metrics;
pub mod ops;
pub mod socket;
pub mod spec;
pub mod volume;
