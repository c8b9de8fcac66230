//! The Identity service.

use tonic::{Request, Response};

use super::status::{Answer, answer};
use super::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse, identity_server, plugin_capability,
};
use crate::error::{Error, Kind};
use crate::volume;

/// Who the driver is, and whether it can work here.
pub struct Identity {
    pub driver_name: String,
    /// The controller service is part of this installation.
    pub controller: bool,
    /// This process mounts volumes, for which it needs the kernel's help.
    pub node: bool,
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn get_plugin_info(&self, _: Request<GetPluginInfoRequest>) -> Answer<GetPluginInfoResponse> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.driver_name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Answer<GetPluginCapabilitiesResponse> {
        use plugin_capability::{Service, Type, service};
        let service = Service { r#type: service::Type::ControllerService.into() };
        let capability = PluginCapability { r#type: Some(Type::Service(service)) };
        let capabilities = if self.controller { vec![capability] } else { Vec::new() };
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Answer<ProbeResponse> {
        answer("Probe", "", async {
            let missing = if self.node { volume::missing().await? } else { Vec::new() };
            if missing.is_empty() {
                return Ok(ProbeResponse { ready: Some(true) });
            }
            Err(Error::new(Kind::FailedPrecondition, format!("this node lacks: {}", missing.join("; "))))
        })
        .await
    }
}
