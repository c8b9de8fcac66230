//! The services over a double of the kernel: what a request becomes, and which code an answer has.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Request, Status};

use super::v1::controller_server::Controller as _;
use super::v1::node_server::Node as _;
use super::v1::volume_capability::access_mode::Mode;
use super::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use super::v1::volume_health::VolumeHealthEntry;
use super::v1::{
    CreateVolumeRequest, NodeGetVolumeHealthRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, ValidateVolumeCapabilitiesRequest,
    VolumeCapability, VolumeHealthErrorType,
};
use super::{Controller, Node};
use crate::kubernetes::Cluster;
use crate::spec::policy::Policy;
use crate::volume::{Abnormal, fixture};

/// The Node service, and the node that it serves.
struct Service {
    node: fixture::Node,
    service: Node,
}

impl Service {
    async fn new() -> Self {
        Service::with("{}").await
    }

    async fn with(policy: &str) -> Self {
        let node = fixture::Node::with(policy, Duration::from_secs(60)).await;
        let service = Node { node_id: "node-1".into(), volumes: Arc::clone(&node.volumes) };
        Service { node, service }
    }

    fn attributes(&self) -> HashMap<String, String> {
        let port = format!("port={}", self.node.port);
        attributes(&[("server", "127.0.0.1"), ("share", "/images"), ("image", "image.sqsh"), ("nfsOptions", &port)])
    }

    fn stage_request(&self) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: "v".into(),
            staging_target_path: "/staging".into(),
            volume_capability: Some(mount(Mode::MultiNodeReaderOnly)),
            volume_context: self.attributes(),
        }
    }

    fn publish_request(&self) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: "v".into(),
            staging_target_path: "/staging".into(),
            target_path: self.node.target("pod").display().to_string(),
            volume_capability: Some(mount(Mode::MultiNodeReaderOnly)),
            volume_context: self.attributes(),
            ..Default::default()
        }
    }

    async fn stage(&self, request: NodeStageVolumeRequest) -> Result<(), Status> {
        self.service.node_stage_volume(Request::new(request)).await.map(drop)
    }

    async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.service.node_publish_volume(Request::new(request)).await.map(drop)
    }

    async fn unpublish(&self, id: &str, target: &Path) -> Result<(), Status> {
        let target_path = target.display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: id.into(), target_path };
        self.service.node_unpublish_volume(Request::new(request)).await.map(drop)
    }
}

fn attributes(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn mount(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

fn code(answer: Result<(), Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

/// What NodeGetVolumeHealth says of volume "v" at a path.
async fn health(service: &Service, path: &str) -> Result<Vec<VolumeHealthEntry>, Status> {
    let request = NodeGetVolumeHealthRequest {
        volume_id: "v".into(),
        volume_publish_path: path.into(),
        staging_target_path: "/staging".into(),
    };
    let answer = service.service.node_get_volume_health(Request::new(request)).await?.into_inner();
    Ok(answer.volume_health.unwrap().health_statuses)
}

#[tokio::test]
async fn the_health_of_a_volume_says_what_is_wrong_for_programs_and_for_people() {
    let service = Service::new().await;
    assert_eq!(health(&service, "").await.unwrap_err().code(), Code::NotFound);
    service.stage(service.stage_request()).await.unwrap();
    assert_eq!(health(&service, "").await.unwrap(), []);
    service.publish(service.publish_request()).await.unwrap();
    let target = service.node.target("pod");
    let path = target.to_str().unwrap();
    std::fs::write(service.node.kernel.export().join("next"), fixture::squashfs(4096)).unwrap();
    let image = service.node.kernel.export().join("image.sqsh");
    std::fs::rename(service.node.kernel.export().join("next"), image).unwrap();
    let [replaced] = &health(&service, path).await.unwrap()[..] else { panic!("not one") };
    assert_eq!((replaced.status(), replaced.reason.as_str()), (VolumeHealthErrorType::Degraded, "ImageReplaced"));
    assert!(replaced.message.contains("was replaced on the server"), "{}", replaced.message);
    service.node.kernel.take_off(&target);
    // Where none is named, of each path.
    let [unmounted] = &health(&service, "").await.unwrap()[..] else { panic!("not one") };
    assert_eq!((unmounted.status(), unmounted.reason.as_str()), (VolumeHealthErrorType::Inaccessible, "NotMounted"));
    service.unpublish("v", &target).await.unwrap();
    assert_eq!(health(&service, path).await.unwrap_err().code(), Code::NotFound);
}

#[test]
fn what_is_said_of_a_volume_fits_into_the_status_of_a_pod() {
    let message = format!("a{}", "ä".repeat(1000));
    let answer = super::node::health_answer("v", Some(Abnormal::degraded("ImageReplaced", message)));
    assert_eq!(answer.volume_health.unwrap().health_statuses[0].message.len(), 1023);
}

#[tokio::test]
async fn a_volume_is_staged_published_looked_at_unpublished_and_unstaged() {
    let service = Service::new().await;
    service.stage(service.stage_request()).await.unwrap();
    service.publish(service.publish_request()).await.unwrap();
    assert_eq!(service.node.log().last().unwrap(), "attach squashfs on /dev/loop0 at pods/pod/mount");
    let target = service.node.target("pod");
    let request = NodeGetVolumeStatsRequest {
        volume_id: "v".into(),
        volume_path: target.display().to_string(),
        staging_target_path: String::new(),
    };
    let stats = service.service.node_get_volume_stats(Request::new(request)).await.unwrap().into_inner();
    assert_eq!((stats.usage.len(), stats.volume_condition.unwrap().abnormal), (2, false));
    assert_eq!(health(&service, target.to_str().unwrap()).await.unwrap(), []);
    service.unpublish("v", &target).await.unwrap();
    let request = NodeUnstageVolumeRequest { volume_id: "v".into(), staging_target_path: "/staging".into() };
    service.service.node_unstage_volume(Request::new(request)).await.unwrap();
    service.node.assert_nothing_held().await;
}

#[tokio::test]
async fn requests_that_lack_something_are_refused_before_anything_is_done() {
    let service = Service::new().await;
    let block =
        VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mount(Mode::SingleNodeWriter) };
    let writer = Some(mount(Mode::MultiNodeMultiWriter));
    let ext4 = MountVolume { fs_type: "ext4".into(), ..Default::default() };
    let ext4 = VolumeCapability { access_type: Some(AccessType::Mount(ext4)), ..mount(Mode::MultiNodeReaderOnly) };
    let stage = service.stage_request();
    for request in [
        NodeStageVolumeRequest { volume_capability: Some(ext4), ..stage.clone() },
        NodeStageVolumeRequest { volume_id: String::new(), ..stage.clone() },
        NodeStageVolumeRequest { staging_target_path: "staging".into(), ..stage.clone() },
        NodeStageVolumeRequest { volume_capability: None, ..stage.clone() },
        NodeStageVolumeRequest { volume_capability: Some(block), ..stage.clone() },
        NodeStageVolumeRequest { volume_capability: writer.clone(), ..stage.clone() },
        NodeStageVolumeRequest { volume_context: attributes(&[("sever", "a")]), ..stage.clone() },
    ] {
        assert_eq!(code(service.stage(request.clone()).await), Code::InvalidArgument, "{request:?}");
    }
    let publish = service.publish_request();
    let unstaged = NodePublishVolumeRequest { staging_target_path: String::new(), ..publish.clone() };
    assert_eq!(code(service.publish(unstaged).await), Code::FailedPrecondition);
    let climbing = NodePublishVolumeRequest { target_path: "/a/../b".into(), ..publish };
    assert_eq!(code(service.publish(climbing).await), Code::InvalidArgument);
    assert_eq!(service.node.log(), [""; 0]);
}

#[tokio::test]
async fn what_the_policy_does_not_allow_is_permission_denied_also_inline() {
    let service = Service::with("servers: [{host: nfs.example.com}]").await;
    assert_eq!(code(service.stage(service.stage_request()).await), Code::PermissionDenied);
    let mut inline = service.publish_request();
    inline.staging_target_path = String::new();
    inline.volume_context.insert("csi.storage.k8s.io/ephemeral".into(), "true".into());
    let error = service.publish(inline).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    assert!(error.message().starts_with("server: server \"127.0.0.1\" is not allowed"), "{error}");
    assert_eq!(service.node.log(), [""; 0]);
}

#[tokio::test]
async fn an_inline_volume_is_published_without_a_stage_whatever_its_mode() {
    let service = Service::new().await;
    let mut inline = service.publish_request();
    inline.staging_target_path = String::new();
    inline.volume_capability = Some(mount(Mode::SingleNodeWriter));
    inline.volume_context.insert("csi.storage.k8s.io/ephemeral".into(), "true".into());
    service.publish(inline).await.unwrap();
    service.unpublish("v", &service.node.target("pod")).await.unwrap();
    service.node.assert_nothing_held().await;
}

#[tokio::test]
async fn the_group_of_a_pod_is_a_number() {
    let service = Service::new().await;
    for group in ["staff", "-1", "4294967295", "4294967296", "1000 "] {
        let mut request = service.publish_request();
        let mount = MountVolume { volume_mount_group: group.into(), ..Default::default() };
        request.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Mount(mount));
        let error = service.publish(request).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(&format!("volume_mount_group {group:?}")), "{error}");
    }
    assert_eq!(service.node.log(), [""; 0]);
}

#[tokio::test]
async fn a_missing_image_is_not_found_and_a_silent_server_unavailable() {
    let service = Service::new().await;
    let with = |key: &str, value: &str| {
        let mut request = service.stage_request();
        request.volume_context.insert(key.into(), value.into());
        request
    };
    assert_eq!(code(service.stage(with("image", "absent.sqsh")).await), Code::NotFound);
    let source = format!("oci://registry.example.com/tools@sha256:{}", "0".repeat(64));
    let mut of_source = with("source", &source);
    of_source.volume_context.remove("image");
    let error = service.stage(of_source).await.unwrap_err();
    let make = format!("csi-driver-squashfs-build {source} --name sha256-{} --to DIRECTORY", "0".repeat(64));
    assert!(error.code() == Code::NotFound && error.message().contains(&make), "{error}");
    assert_eq!(code(service.stage(with("nfsOptions", "port=1")).await), Code::Unavailable);
    assert_eq!(code(service.stage(with("fsType", "erofs")).await), Code::FailedPrecondition);
}

#[tokio::test]
async fn the_file_system_of_a_claim_may_repeat_what_the_attributes_say() {
    let service = Service::new().await;
    let mut request = service.stage_request();
    let squashfs = MountVolume { fs_type: "squashfs".into(), ..Default::default() };
    request.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Mount(squashfs));
    service.stage(request).await.unwrap();
}

#[tokio::test]
async fn a_target_that_is_a_file_is_no_publication_of_ours() {
    let service = Service::new().await;
    let target = service.node.target("pod");
    std::fs::write(&target, "").unwrap();
    assert_eq!(code(service.unpublish("v", &target).await), Code::FailedPrecondition);
    assert!(target.exists());
}

#[tokio::test]
async fn a_created_volume_has_the_attributes_of_its_class_and_one_set_of_them() {
    let controller = Controller::new(Arc::new(Policy::default()), Cluster::new("test.csi.dev", None));
    let request = |image: &str| CreateVolumeRequest {
        name: "pvc-1".into(),
        parameters: attributes(&[("server", "nfs"), ("share", "/images"), ("image", image)]),
        volume_capabilities: vec![mount(Mode::MultiNodeReaderOnly)],
        ..Default::default()
    };
    let create = async |image| controller.create_volume(Request::new(request(image))).await;
    let volume = create("a.sqsh").await.unwrap().into_inner().volume.unwrap();
    assert_eq!((volume.volume_id.as_str(), volume.volume_context["image"].as_str()), ("pvc-1", "a.sqsh"));
    create("a.sqsh").await.unwrap();
    assert_eq!(create("b.sqsh").await.unwrap_err().code(), Code::AlreadyExists);

    let validate = |id: &str, mode| {
        controller.validate_volume_capabilities(Request::new(ValidateVolumeCapabilitiesRequest {
            volume_id: id.into(),
            volume_capabilities: vec![mount(mode)],
            ..Default::default()
        }))
    };
    assert!(validate("pvc-1", Mode::MultiNodeReaderOnly).await.unwrap().into_inner().confirmed.is_some());
    assert!(validate("pvc-1", Mode::MultiNodeMultiWriter).await.unwrap().into_inner().confirmed.is_none());
    assert_eq!(validate("pvc-2", Mode::MultiNodeReaderOnly).await.unwrap_err().code(), Code::NotFound);
}
