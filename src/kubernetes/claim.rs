//! PersistentVolumeClaims that name their image by an annotation, and the Events that tell their authors what becomes of it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolumeClaim};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Resource};
use tokio::sync::OnceCell;

use super::api::ApiServer;
use crate::error::Result;
use crate::spec::naming::Named;

/// The API server takes notes of less than 1024 bytes (k8s.io/api/events/v1).
const NOTE: usize = 1000;

/// The claims of the cluster that this process belongs to. The API server is not asked before the first claim is.
pub struct Claims {
    driver_name: String,
    server: Arc<ApiServer>,
    /// One for all events: it counts those that are told again.
    recorder: OnceCell<Recorder>,
}

/// What a claim says about its image.
pub struct Claim {
    pub named: Named,
    reference: ObjectReference,
}

/// Why the author of a claim is told something.
#[derive(Clone, Copy, Debug)]
pub enum Reason {
    /// What is asked for is not allowed, or makes no sense.
    Refused,
    BuildBegun,
    BuildFailed,
}

impl Claims {
    /// `driver_name` is the domain of the annotations, and the reporter of the events.
    pub(super) fn new(driver_name: &str, server: Arc<ApiServer>) -> Self {
        Claims { driver_name: driver_name.to_owned(), server, recorder: OnceCell::new() }
    }

    /// Reads the claim; needs the verb `get` of `persistentvolumeclaims`.
    pub async fn get(&self, namespace: &str, name: &str) -> Result<Claim> {
        let read = |client| async { Api::<PersistentVolumeClaim>::namespaced(client, namespace).get(name).await };
        let claim = self.server.ask(&format!("read claim {namespace}/{name}"), read).await?;
        let annotation = |name: &str| claim.metadata.annotations.as_ref()?.get(name).cloned();
        Ok(Claim { named: Named::read(&self.driver_name, annotation), reference: claim.object_ref(&()) })
    }

    /// Tells the claim's author, by an Event; needs the verbs `create` and `patch` of `events` in `events.k8s.io`. An Event that
    /// cannot be written is logged: what it says is the answer of the call too.
    pub async fn tell(&self, claim: &Claim, reason: Reason, note: &str) {
        let (type_, reason) = match reason {
            Reason::Refused => (EventType::Warning, "ImageRefused"),
            Reason::BuildBegun => (EventType::Normal, "ImageBuilding"),
            Reason::BuildFailed => (EventType::Warning, "ImageBuildFailed"),
        };
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note.char_indices().take_while(|(at, _)| *at < NOTE).map(|(_, letter)| letter).collect()),
            action: "Provisioning".into(),
            secondary: None,
        };
        let publish = |client| async {
            let reporter = || Reporter { controller: self.driver_name.clone(), instance: None };
            let recorder = self.recorder.get_or_init(|| async { Recorder::new(client, reporter()) }).await;
            recorder.publish(&event, &claim.reference).await
        };
        if let Err(error) = self.server.ask("write an event", publish).await {
            tracing::warn!(%error, "the claim's author is not told");
        }
    }
}
