//! One scrape: what the process counted, and what the kernel has and counted at this moment.

use std::collections::HashSet;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::Watched;
use crate::error::{Error, Kind, Result};
use crate::kernel::mountstats::NfsCounters;
use crate::kubernetes::registration::Registered;
use crate::metrics::{self, Labels};
use crate::volume::{Kept, Observation};

/// The media type of the text format of OpenMetrics 1.0.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Seconds = Counter<f64, std::sync::atomic::AtomicU64>;

/// All metrics as text.
pub async fn scrape(watched: &Watched) -> Result<String> {
    let mut registry = metrics::registry();
    if let Some(registered) = &watched.registered {
        let yes = *registered.borrow() == Registered::Yes;
        register(&mut registry, "registered", "Whether the kubelet has registered the driver", i64::from(yes));
    }
    if let Some(volumes) = &watched.volumes {
        let observation = volumes.observe().await?;
        register_volumes(&mut registry, &observation);
        register_nfs(&mut registry, &observation.nfs);
        if let Some(kept) = &observation.cache {
            register_cache(&mut registry, kept);
        }
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|error| Error::new(Kind::Internal, format!("encode the metrics: {error}")))?;
    Ok(text)
}

fn register_volumes(registry: &mut Registry, observation: &Observation) {
    let Observation { staged, abnormal, unreadable_records, published, loop_devices, .. } = observation;
    let mounted = published.iter().filter(|volume| volume.mounted.is_some()).count();
    let images: HashSet<_> = loop_devices.iter().map(|device| (&device.image, device.size)).collect();
    register(registry, "staged_volumes", "Volumes that are staged", count(*staged));
    register(registry, "published_volumes", "Paths at which a volume is published and mounted", count(mounted));
    let help =
        "Published volumes whose image changed, or whose server did not answer, when the kubelet last asked about them";
    register(registry, "abnormal_volumes", help, count(*abnormal));
    let help = "Records of published paths that this version of the driver cannot read: another one wrote them";
    register(registry, "unreadable_records", help, count(*unreadable_records));
    register(registry, "loop_devices", "Loop devices of this driver", count(loop_devices.len()));
    register(registry, "images", "Images that are attached", count(images.len()));
    let corrupted = loop_devices.iter().filter(|device| device.corrupted).count();
    let help = "Loop devices with an image that was read and has other bytes than its root hash says";
    register(registry, "corrupted_images", help, count(corrupted));
    let failed = loop_devices.iter().filter(|device| device.path.is_some_and(|path| path.failed)).count();
    let help = "Paths to one of several servers of an image, by which it is not read as that server failed";
    register(registry, "failed_paths", help, count(failed));
    let read = Family::<Labels<2>, Counter>::default();
    for device in loop_devices {
        let image = device.image.clone().unwrap_or_default();
        let labels = [("image", image), ("device", format!("loop{}", device.number))];
        read.get_or_create(&labels).inc_by(device.read_bytes);
    }
    registry.register_with_unit(
        "image_read",
        "Bytes of an image that were read through its loop device",
        Unit::Bytes,
        read,
    );
}

fn register_cache(registry: &mut Registry, kept: &Kept) {
    let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let complete = kept.entries.iter().filter(|entry| entry.is_complete()).count();
    register(registry, "cache_bytes", "What the copies of images take of the disk", number(kept.bytes));
    register(registry, "cache_quota_bytes", "What the copies of images may take", number(kept.quota));
    register(registry, "cached_images", "Images of which there is a copy on this node", count(complete));
}

fn register_nfs(registry: &mut Registry, mounts: &[NfsCounters]) {
    let (calls, retransmissions) = (Family::<Labels<2>, Counter>::default(), Family::<Labels<2>, Counter>::default());
    let round_trip = Family::<Labels<2>, Seconds>::default();
    for mount in mounts {
        let (server, export) = mount.source.rsplit_once(":/").unwrap_or((&mount.source, ""));
        let labels = [("server", server.to_owned()), ("export", format!("/{export}"))];
        calls.get_or_create(&labels).inc_by(mount.calls);
        retransmissions.get_or_create(&labels).inc_by(mount.retransmissions);
        round_trip.get_or_create(&labels).inc_by(mount.round_trip.as_secs_f64());
    }
    registry.register("nfs_rpcs", "Calls to an export", calls);
    registry.register(
        "nfs_retransmissions",
        "Calls to an export that were sent again for want of an answer",
        retransmissions,
    );
    let help = "From sending a call to an export to its answer, of all calls together";
    registry.register_with_unit("nfs_round_trip", help, Unit::Seconds, round_trip);
}

fn register(registry: &mut Registry, name: &str, help: &str, value: i64) {
    let gauge = Gauge::<i64>::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
