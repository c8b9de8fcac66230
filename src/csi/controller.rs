//! The Controller service: volumes are references to images, so that creating one checks and deleting one forgets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tonic::{Request, Response};

use super::capability::{check_access_mode, invalid, required_text, spec_of};
use super::status::{Answer, answer};
use super::v1::{
    CapacityRange, ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume, VolumeCapability, controller_server,
    controller_service_capability, validate_volume_capabilities_response,
};
use crate::error::{Error, Kind, Result};
use crate::kubernetes::claim::Claims;
use crate::lock::lock;
use crate::spec::policy::Policy;
use crate::spec::template;

/// Creates and validates volumes without touching any NFS server.
pub struct Controller {
    policy: Arc<Policy>,
    claims: Claims,
    /// What this process created, by ID: all that tells a repeated request from a conflicting one.
    created: Mutex<HashMap<String, Created>>,
}

/// A volume, and what was asked for.
struct Created {
    parameters: HashMap<String, String>,
    capacity: CapacityRange,
    volume: Volume,
}

impl Controller {
    /// `driver_name` is the domain of the annotation by which a claim names its image.
    pub fn new(policy: Arc<Policy>, driver_name: &str) -> Self {
        Controller { policy, claims: Claims::new(driver_name), created: Mutex::default() }
    }

    /// Reads the claim where the StorageClass takes the image from it, and tells its author what is wrong.
    async fn create(&self, request: CreateVolumeRequest) -> Result<Volume> {
        let class = template::expand(&request.parameters)?;
        let claim = match &class.claim {
            Some(claim) => Some(self.claims.get(&claim.namespace, &claim.name).await?),
            None => None,
        };
        let image = claim.as_ref().and_then(|claim| claim.image.as_deref());
        let context = class.with_image(self.claims.annotation(), image).map_err(Error::from);
        let created = context.and_then(|context| self.create_with(request, context.into_iter().collect()));
        if let (Some(claim), Err(error)) = (&claim, &created) {
            self.claims.warn(claim, &error.message).await;
        }
        created
    }

    fn create_with(&self, request: CreateVolumeRequest, context: HashMap<String, String>) -> Result<Volume> {
        let name = required_text("name", &request.name)?;
        if request.volume_content_source.is_some() {
            return Err(invalid("volume_content_source: a volume is a reference to an image and has no other source"));
        }
        let namespace = template::namespace(&request.parameters);
        self.check(&context, &request.volume_capabilities, namespace)?;
        let range = request.capacity_range.unwrap_or_default();
        if range.required_bytes < 0 || range.limit_bytes < 0 {
            return Err(invalid("capacity_range: a size is not negative"));
        }
        if range.limit_bytes > 0 && range.limit_bytes < range.required_bytes {
            return Err(Error::new(Kind::OutOfRange, "capacity_range: limit_bytes is less than required_bytes"));
        }
        // An image has the size it has: the size of the claim is given back so that claim and volume bind.
        let volume =
            Volume { capacity_bytes: range.required_bytes, volume_id: name.to_owned(), volume_context: context };
        let mut created = lock(&self.created);
        match created.get(name) {
            Some(existing) if existing.parameters != request.parameters || existing.capacity != range => {
                let message = format!("volume {name} exists with another size or other parameters");
                Err(Error::new(Kind::AlreadyExists, message))
            }
            // Where the answer was lost and the claim names another image since, that is the one.
            _ => {
                let new = Created { parameters: request.parameters, capacity: range, volume: volume.clone() };
                created.insert(name.to_owned(), new);
                Ok(volume)
            }
        }
    }

    /// Every capability must be one that a volume with this context has.
    fn check(
        &self,
        context: &HashMap<String, String>,
        capabilities: &[VolumeCapability],
        namespace: Option<&str>,
    ) -> Result<()> {
        if capabilities.is_empty() {
            return Err(invalid("volume_capabilities is required"));
        }
        for capability in capabilities {
            let mount = spec_of(context, capability)?.allowed_by(&self.policy, namespace)?;
            check_access_mode(&mount, capability, false)?;
        }
        Ok(())
    }

    fn validate(&self, request: ValidateVolumeCapabilitiesRequest) -> Result<ValidateVolumeCapabilitiesResponse> {
        let id = required_text("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(invalid("volume_capabilities is required"));
        }
        let known = lock(&self.created).get(id).map(|created| created.volume.clone());
        let context = match known {
            Some(volume) => volume.volume_context,
            None if !request.volume_context.is_empty() => request.volume_context.clone(),
            None => {
                let message = format!("volume {id} is not known here: its volume_context is all there is of it");
                return Err(Error::new(Kind::NotFound, message));
            }
        };
        use validate_volume_capabilities_response::Confirmed;
        Ok(match self.check(&context, &request.volume_capabilities, None) {
            Ok(()) => ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                }),
                message: String::new(),
            },
            Err(error) => ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.message },
        })
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create_volume(&self, request: Request<CreateVolumeRequest>) -> Answer<CreateVolumeResponse> {
        let request = request.into_inner();
        let name = request.name.clone();
        answer("CreateVolume", &name, async { Ok(CreateVolumeResponse { volume: Some(self.create(request).await?) }) })
            .await
    }

    async fn delete_volume(&self, request: Request<DeleteVolumeRequest>) -> Answer<DeleteVolumeResponse> {
        let id = request.into_inner().volume_id;
        answer("DeleteVolume", &id, async {
            let id = required_text("volume_id", &id)?;
            lock(&self.created).remove(id);
            Ok(DeleteVolumeResponse {})
        })
        .await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<ValidateVolumeCapabilitiesResponse> {
        let request = request.into_inner();
        let id = request.volume_id.clone();
        answer("ValidateVolumeCapabilities", &id, async { self.validate(request) }).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Answer<ControllerGetCapabilitiesResponse> {
        use controller_service_capability::{Rpc, Type, rpc};
        let capabilities = [rpc::Type::CreateDeleteVolume, rpc::Type::SingleNodeMultiWriter]
            .map(|rpc| ControllerServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: rpc.into() })) });
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }
}
