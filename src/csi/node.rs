//! The Node service.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::{Request, Response};

use super::capability::{
    check_access_mode, group_of, is_ephemeral, is_single_writer, pod_of, required, required_path, required_text,
    spec_of, with_source,
};
use super::status::{Answer, answer};
use super::v1::volume_health::VolumeHealthEntry;
use super::v1::volume_usage::Unit;
use super::v1::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeHealthRequest, NodeGetVolumeHealthResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
    NodeUnstageVolumeResponse, VolumeCondition, VolumeHealth, VolumeHealthErrorType, VolumeUsage, node_server,
    node_service_capability,
};
use crate::error::{Error, Kind};
use crate::volume::{Abnormal, Harm, Publication, Stats, Usage, Volumes};

/// Serves the volumes of this node.
pub struct Node {
    pub node_id: String,
    pub volumes: Arc<Volumes>,
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_stage_volume(&self, request: Request<NodeStageVolumeRequest>) -> Answer<NodeStageVolumeResponse> {
        let request = request.into_inner();
        let id = request.volume_id.clone();
        answer("NodeStageVolume", &id, async {
            let id = required_text("volume_id", &id)?;
            required_path("staging_target_path", &request.staging_target_path)?;
            let capability = required(request.volume_capability)?;
            let mount = self.volumes.allow(spec_of(&request.volume_context, &capability)?, None)?;
            check_access_mode(&mount, &capability, is_ephemeral(&request.volume_context))?;
            let staged = self.volumes.stage(id, &mount).await;
            staged.map_err(|error| with_source(error, &request.volume_context))?;
            Ok(NodeStageVolumeResponse {})
        })
        .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Answer<NodeUnstageVolumeResponse> {
        let request = request.into_inner();
        answer("NodeUnstageVolume", &request.volume_id, async {
            let id = required_text("volume_id", &request.volume_id)?;
            required_path("staging_target_path", &request.staging_target_path)?;
            self.volumes.unstage(id).await?;
            Ok(NodeUnstageVolumeResponse {})
        })
        .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Answer<NodePublishVolumeResponse> {
        let request = request.into_inner();
        let id = request.volume_id.clone();
        answer("NodePublishVolume", &id, async {
            let pod = pod_of(&request.volume_context);
            if let Some((namespace, name)) = &pod {
                tracing::Span::current().record("pod", format!("{namespace}/{name}"));
            }
            let namespace = pod.map(|(namespace, _)| namespace);
            if namespace.is_none() && self.volumes.needs_namespace() {
                let message = "the policy is about namespaces, and the pod's is not known: set podInfoOnMount in the CSIDriver object";
                return Err(Error::new(Kind::FailedPrecondition, message));
            }
            let volume_id = required_text("volume_id", &id)?.to_owned();
            let target = required_path("target_path", &request.target_path)?;
            let ephemeral = is_ephemeral(&request.volume_context);
            let capability = required(request.volume_capability)?;
            let spec = spec_of(&request.volume_context, &capability)?;
            let mount = self.volumes.allow(spec, namespace.as_deref())?;
            if !ephemeral && request.staging_target_path.is_empty() {
                return Err(Error::new(
                    Kind::FailedPrecondition,
                    "staging_target_path is required: stage the volume first",
                ));
            }
            check_access_mode(&mount, &capability, ephemeral || request.readonly)?;
            let exclusive = !ephemeral && is_single_writer(&capability);
            let (read_only, group) = (request.readonly, group_of(&capability)?);
            let publication = Publication { volume_id, target, mount, read_only, namespace, group, exclusive };
            let published = self.volumes.publish(publication, !ephemeral).await;
            published.map_err(|error| with_source(error, &request.volume_context))?;
            Ok(NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Answer<NodeUnpublishVolumeResponse> {
        let request = request.into_inner();
        answer("NodeUnpublishVolume", &request.volume_id, async {
            let id = required_text("volume_id", &request.volume_id)?;
            let target = required_path("target_path", &request.target_path)?;
            self.volumes.unpublish(id, &target).await?;
            Ok(NodeUnpublishVolumeResponse {})
        })
        .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Answer<NodeGetVolumeStatsResponse> {
        let request = request.into_inner();
        answer("NodeGetVolumeStats", &request.volume_id, async {
            let id = required_text("volume_id", &request.volume_id)?;
            // Any other form of a path is one where nothing is published, which is NOT_FOUND.
            let path = Path::new(required_text("volume_path", &request.volume_path)?).components().collect::<PathBuf>();
            Ok(stats_answer(self.volumes.stats(id, &path).await?))
        })
        .await
    }

    async fn node_get_volume_health(
        &self,
        request: Request<NodeGetVolumeHealthRequest>,
    ) -> Answer<NodeGetVolumeHealthResponse> {
        let request = request.into_inner();
        answer("NodeGetVolumeHealth", &request.volume_id, async {
            let id = required_text("volume_id", &request.volume_id)?;
            let path = Path::new(&request.volume_publish_path).components().collect::<PathBuf>();
            let path = Some(path.as_path()).filter(|path| !path.as_os_str().is_empty());
            Ok(health_answer(id, self.volumes.health(id, path).await?))
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Answer<NodeGetCapabilitiesResponse> {
        use node_service_capability::{Rpc, Type, rpc};
        let capabilities = [
            rpc::Type::StageUnstageVolume,
            rpc::Type::GetVolumeStats,
            rpc::Type::VolumeCondition,
            rpc::Type::SingleNodeMultiWriter,
            rpc::Type::VolumeMountGroup,
            rpc::Type::GetVolumeHealth,
        ]
        .map(|rpc| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: rpc.into() })) });
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.into() }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Answer<NodeGetInfoResponse> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.node_id.clone(), max_volumes_per_node: 0 }))
    }
}

fn stats_answer(stats: Stats) -> NodeGetVolumeStatsResponse {
    let usage = |usage: Usage, unit: Unit| {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        VolumeUsage {
            available: number(usage.available),
            total: number(usage.total),
            used: number(usage.used),
            unit: unit.into(),
        }
    };
    let usage = stats.usage.map(|(bytes, inodes)| vec![usage(bytes, Unit::Bytes), usage(inodes, Unit::Inodes)]);
    NodeGetVolumeStatsResponse {
        usage: usage.unwrap_or_default(),
        volume_condition: Some(VolumeCondition {
            abnormal: stats.abnormal.is_some(),
            message: match stats.abnormal {
                Some(abnormal) => abnormal.message,
                None => "mounted, and its images are unchanged".into(),
            },
        }),
    }
}

/// The most bytes of a message of which Kubernetes takes the pod's status (`VolumeHealthCondition`).
const LONGEST_MESSAGE: usize = 1024;

pub(super) fn health_answer(id: &str, abnormal: Option<Abnormal>) -> NodeGetVolumeHealthResponse {
    let entry = abnormal.map(|Abnormal { harm, reason, message }| {
        let fits = |(at, letter): &(usize, char)| at + letter.len_utf8() <= LONGEST_MESSAGE;
        let message = message.char_indices().take_while(fits).map(|(_, letter)| letter).collect();
        let status = match harm {
            Harm::Degraded => VolumeHealthErrorType::Degraded,
            Harm::Inaccessible => VolumeHealthErrorType::Inaccessible,
            Harm::DataLoss => VolumeHealthErrorType::DataLoss,
        };
        VolumeHealthEntry { status: status.into(), reason: reason.into(), message }
    });
    let health_statuses = entry.into_iter().collect();
    NodeGetVolumeHealthResponse { volume_health: Some(VolumeHealth { volume_id: id.into(), health_statuses }) }
}
