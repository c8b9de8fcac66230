//! What is about Kubernetes beyond CSI: the kubelet's plugin registration, claims that name their image, Jobs that make one, what a cluster
//! has of the driver, and what becomes of a container of the ImageAPI.

mod api;
pub mod build;
pub mod claim;
pub mod convert;
pub mod inventory;
pub mod registration;

use std::sync::Arc;

use api::ApiServer;
use build::{Builds, JobTemplate};
use claim::Claims;

/// What the controller asks the API server for. Nothing is asked before somebody needs it.
pub struct Cluster {
    pub claims: Claims,
    /// `None` where no images are made in this cluster.
    pub builds: Option<Builds>,
}

impl Cluster {
    pub fn new(driver_name: &str, builds: Option<JobTemplate>) -> Self {
        let server = Arc::new(ApiServer::new(None));
        let builds = builds.map(|template| Builds::new(template, Arc::clone(&server)));
        Cluster { claims: Claims::new(driver_name, server), builds }
    }
}
