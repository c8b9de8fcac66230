//! The Controller service: volumes are references to images, so that creating one checks and deleting one forgets.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use tonic::{Request, Response};

use super::capability::{check_access_mode, invalid, reads_only, required_text, spec_of};
use super::status::{Answer, answer};
use super::v1::{
    CapacityRange, ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse, ControllerServiceCapability,
    CreateVolumeRequest, CreateVolumeResponse, DeleteVolumeRequest, DeleteVolumeResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume, VolumeCapability, controller_server,
    controller_service_capability, validate_volume_capabilities_response,
};
use crate::error::{Error, Kind, Result};
use crate::kubernetes::Cluster;
use crate::kubernetes::build::Progress;
use crate::kubernetes::claim::{Claim, Reason};
use crate::lock::lock;
use crate::spec::Upper;
use crate::spec::policy::Policy;
use crate::spec::template::{self, Build, Wanted};

/// Creates and validates volumes without touching any NFS server.
pub struct Controller {
    policy: Arc<Policy>,
    cluster: Cluster,
    /// What this process created, by ID: all that tells a repeated request from a conflicting one.
    created: Mutex<HashMap<String, Created>>,
}

/// A claim for writes reads like one for a disk, which keeps them.
const WRITES_END: &str = "each pod has a writable layer of its own on top of the image, and what it writes ends with it: what is to stay \
                          belongs into another volume";

/// A volume that is asked for.
struct Described {
    volume: Volume,
    /// Pods may write to it, and what they write ends with them.
    writes_end: bool,
}

/// A volume, and what was asked for.
struct Created {
    parameters: HashMap<String, String>,
    capacity: CapacityRange,
    volume: Volume,
}

impl Controller {
    pub fn new(policy: Arc<Policy>, cluster: Cluster) -> Self {
        Controller { policy, cluster, created: Mutex::default() }
    }

    /// Reads the claim where the StorageClass lets it name its image, and tells its author what is wrong.
    async fn create(&self, request: CreateVolumeRequest) -> Result<Volume> {
        let class = template::expand(&request.parameters)?;
        let Some(claim) = &class.claim else {
            let Wanted { context, .. } = class.with_what_is_named(None)?;
            let Described { volume, writes_end } = self.described(&request, context)?;
            let claim =
                template::claim(&request.parameters).filter(|_| writes_end && !self.has_created(&request, &volume));
            // Before the API server is asked: a call that is given up meanwhile does not wait for it again.
            let volume = self.remember(request, volume)?;
            if let Some((namespace, name)) = claim {
                match self.cluster.claims.get(&namespace, &name).await {
                    Ok(claim) => self.cluster.claims.tell(&claim, Reason::WritesEnd, WRITES_END).await,
                    Err(error) => tracing::warn!(%error, "the claim's author is not told that writes end with a pod"),
                }
            }
            return Ok(volume);
        };
        let claim = self.cluster.claims.get(&claim.namespace, &claim.name).await?;
        let wanted = class.with_what_is_named(Some(&claim.named)).map_err(Error::from);
        let described = wanted.and_then(|Wanted { context, build }| Ok((self.described(&request, context)?, build)));
        let (Described { volume, writes_end }, build) = match described {
            Ok(described) => described,
            Err(error) => {
                self.cluster.claims.tell(&claim, Reason::Refused, &error.message).await;
                return Err(error);
            }
        };
        // A call whose answer was lost asks for what is there.
        if !self.has_created(&request, &volume) {
            if let Some(build) = build {
                self.build(&build, &claim).await?;
            }
            if writes_end {
                self.cluster.claims.tell(&claim, Reason::WritesEnd, WRITES_END).await;
            }
        }
        self.remember(request, volume)
    }

    /// Has an image made. Until it is there, the answer is one after which external-provisioner asks again.
    async fn build(&self, build: &Build, claim: &Claim) -> Result<()> {
        let Cluster { claims, builds } = &self.cluster;
        let of = format!("the image of {}", build.source);
        let made = match builds {
            Some(builds) => builds.make(build).await,
            None => {
                let hint = "no images are made in this cluster: set builder.enabled in the chart";
                Err(Error::new(Kind::FailedPrecondition, hint))
            }
        };
        let is_being_built = |by: &str| Error::new(Kind::Aborted, format!("{of} is being built by {by}"));
        match made {
            Ok(Progress::Made) => Ok(()),
            Ok(Progress::UnderWay(by)) => Err(is_being_built(&by)),
            Ok(Progress::Begun(job)) => {
                let begun = is_being_built(&job);
                claims.tell(claim, Reason::BuildBegun, &begun.message).await;
                Err(begun)
            }
            Err(error) => {
                let error = error.about(&of);
                // That the API server is silent says nothing of the Job.
                if error.kind != Kind::Unavailable {
                    claims.tell(claim, Reason::BuildFailed, &error.message).await;
                }
                Err(error)
            }
        }
    }

    /// The volume that is asked for, if there can be one.
    fn described(&self, request: &CreateVolumeRequest, context: BTreeMap<String, String>) -> Result<Described> {
        let context = context.into_iter().collect();
        let name = required_text("name", &request.name)?;
        if request.volume_content_source.is_some() {
            return Err(invalid("volume_content_source: a volume is a reference to an image and has no other source"));
        }
        let namespace = template::namespace(&request.parameters);
        let writes_end = self.check(&context, &request.volume_capabilities, namespace)?;
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
        Ok(Described { volume, writes_end })
    }

    fn has_created(&self, request: &CreateVolumeRequest, volume: &Volume) -> bool {
        let (created, range) = (lock(&self.created), request.capacity_range.unwrap_or_default());
        created.get(&volume.volume_id).is_some_and(|existing| {
            existing.parameters == request.parameters && existing.capacity == range && existing.volume == *volume
        })
    }

    fn remember(&self, request: CreateVolumeRequest, volume: Volume) -> Result<Volume> {
        let (name, range) = (&volume.volume_id, request.capacity_range.unwrap_or_default());
        let mut created = lock(&self.created);
        match created.get(name) {
            Some(existing) if existing.parameters != request.parameters || existing.capacity != range => {
                let message = format!("volume {name} exists with another size or other parameters");
                Err(Error::new(Kind::AlreadyExists, message))
            }
            // Where the answer was lost and the claim names another image since, that is the one.
            _ => {
                let new = Created { parameters: request.parameters, capacity: range, volume: volume.clone() };
                created.insert(name.clone(), new);
                Ok(volume)
            }
        }
    }

    /// Every capability must be one that a volume with this context has. Tells whether one is for writes, and these end with their pod.
    fn check(
        &self,
        context: &HashMap<String, String>,
        capabilities: &[VolumeCapability],
        namespace: Option<&str>,
    ) -> Result<bool> {
        if capabilities.is_empty() {
            return Err(invalid("volume_capabilities is required"));
        }
        let mut writes_end = false;
        for capability in capabilities {
            let mount = spec_of(context, capability)?.allowed_by(&self.policy, namespace)?;
            check_access_mode(&mount, capability, false)?;
            writes_end |= mount.upper(reads_only(capability)) != Upper::None;
        }
        Ok(writes_end)
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
            Ok(_) => ValidateVolumeCapabilitiesResponse {
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
