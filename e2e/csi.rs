//! A CSI client for the command line: makes one call of the Node service, as the kubelet would, and says how long it took.

use std::collections::HashMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use csi_driver_squashfs::csi::v1::node_client::NodeClient;
use csi_driver_squashfs::csi::v1::volume_capability::access_mode::Mode;
use csi_driver_squashfs::csi::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use csi_driver_squashfs::csi::v1::{
    NodeGetInfoRequest, NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest, VolumeCapability,
};
use tonic::transport::Endpoint;

/// Call a CSI node service by hand
#[derive(Parser)]
struct Cli {
    /// The driver's Unix socket
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    #[command(subcommand)]
    call: Call,
}

#[derive(Subcommand)]
enum Call {
    /// NodeStageVolume
    Stage {
        id: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// NodePublishVolume
    Publish {
        id: String,
        target: String,
        #[command(flatten)]
        volume: Volume,
    },
    /// NodeUnpublishVolume
    Unpublish { id: String, target: String },
    /// NodeUnstageVolume
    Unstage { id: String },
}

#[derive(Args)]
struct Volume {
    /// A volume attribute; with @FILE its value is the content of a file
    #[arg(long = "attribute", value_name = "KEY=VALUE")]
    attributes: Vec<String>,
    /// An access mode as the CSI spec names it
    #[arg(long, default_value = "MULTI_NODE_MULTI_WRITER")]
    mode: String,
    /// Publish read-only
    #[arg(long)]
    read_only: bool,
}

impl Volume {
    fn context(&self) -> Result<HashMap<String, String>, Box<dyn Error>> {
        let read = |attribute: &String| -> Result<(String, String), Box<dyn Error>> {
            let (key, value) = attribute.split_once('=').ok_or_else(|| format!("{attribute}: not KEY=VALUE"))?;
            let value = match value.strip_prefix('@') {
                Some(file) => std::fs::read_to_string(file).map_err(|error| format!("read {file}: {error}"))?,
                None => value.to_owned(),
            };
            Ok((key.to_owned(), value))
        };
        self.attributes.iter().map(read).collect()
    }

    fn capability(&self) -> Result<Option<VolumeCapability>, Box<dyn Error>> {
        let mode = Mode::from_str_name(&self.mode).ok_or_else(|| format!("{}: not an access mode", self.mode))?;
        Ok(Some(VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }))
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run(Cli { endpoint, call }: Cli) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let mut node = NodeClient::new(Endpoint::try_from(endpoint)?.connect().await?);
    // So that the call below does not wait for the connection: it takes a moment, and is not what is measured.
    node.node_get_info(NodeGetInfoRequest {}).await?;
    let connected = start.elapsed().as_secs_f64() * 1000.0;

    // The driver does not use the staging path, but the CSI spec wants one.
    let staging = |id: &str| format!("/var/lib/kubelet/plugins/kubernetes.io/csi/{id}/globalmount");
    let start = Instant::now();
    let (method, answer) = match call {
        Call::Stage { id, volume } => {
            let request = NodeStageVolumeRequest {
                staging_target_path: staging(&id),
                volume_id: id,
                volume_capability: volume.capability()?,
                volume_context: volume.context()?,
            };
            ("NodeStageVolume", node.node_stage_volume(request).await.map(drop))
        }
        Call::Publish { id, target, volume } => {
            let request = NodePublishVolumeRequest {
                staging_target_path: staging(&id),
                volume_id: id,
                target_path: target,
                volume_capability: volume.capability()?,
                readonly: volume.read_only,
                volume_context: volume.context()?,
            };
            ("NodePublishVolume", node.node_publish_volume(request).await.map(drop))
        }
        Call::Unpublish { id, target } => {
            let request = NodeUnpublishVolumeRequest { volume_id: id, target_path: target };
            ("NodeUnpublishVolume", node.node_unpublish_volume(request).await.map(drop))
        }
        Call::Unstage { id } => {
            let request = NodeUnstageVolumeRequest { staging_target_path: staging(&id), volume_id: id };
            ("NodeUnstageVolume", node.node_unstage_volume(request).await.map(drop))
        }
    };
    let milliseconds = start.elapsed().as_secs_f64() * 1000.0;
    answer.map_err(|status| format!("{method}: {:?}: {}", status.code(), status.message()))?;
    println!("{method}: OK in {milliseconds:.3} ms (connected in {connected:.3} ms)");
    Ok(())
}
