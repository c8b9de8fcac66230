//! The CSI services (the CSI spec, version 1.13): requests in, [`crate::volume`] at work, answers and gRPC codes out.

mod capability;
mod controller;
mod identity;
mod node;
mod server;
mod status;
#[cfg(test)]
mod tests;

pub use controller::Controller;
pub use identity::Identity;
pub use node::Node;
pub use server::{Endpoint, serve};

/// The messages and service traits of `proto/csi/v1/csi.proto`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("csi.v1");
}
