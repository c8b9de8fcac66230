//! PersistentVolumeClaims that name their image by an annotation, and the Events that tell their authors what becomes of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolumeClaim};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};

use super::api::ApiServer;
use crate::error::Result;
use crate::lock::lock;
use crate::spec::naming::Named;

/// The API server takes notes of less than 1024 bytes (k8s.io/api/events/v1).
const NOTE: usize = 1000;
/// Of how many claims it is known what their authors were told.
const MOST: usize = 1000;

/// The claims of the cluster that this process belongs to. The API server is not asked before the first claim is.
pub struct Claims {
    driver_name: String,
    server: Arc<ApiServer>,
    /// By the claim's UID and the reason.
    told: Mutex<HashMap<(String, &'static str), Told>>,
}

/// What was told last, and who counts it when it is told again: with other words he would count them as the first.
struct Told {
    note: String,
    recorder: Recorder,
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
    /// A pod writes to a layer of its own.
    WritesEnd,
}

impl Claims {
    /// `driver_name` is the domain of the annotations, and the reporter of the events.
    pub(super) fn new(driver_name: &str, server: Arc<ApiServer>) -> Self {
        Claims { driver_name: driver_name.to_owned(), server, told: Mutex::default() }
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
            Reason::WritesEnd => (EventType::Normal, "WritesEndWithPod"),
        };
        let note: String = note.char_indices().take_while(|(at, _)| *at < NOTE).map(|(_, letter)| letter).collect();
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note.clone()),
            action: "Provisioning".into(),
            secondary: None,
        };
        let publish = |client| async {
            let recorder = self.recorder(client, claim, reason, note);
            recorder.publish(&event, &claim.reference).await
        };
        if let Err(error) = self.server.ask("write an event", publish).await {
            tracing::warn!(%error, "the claim's author is not told");
        }
    }

    /// The one that has told this already, or a new one.
    fn recorder(&self, client: Client, claim: &Claim, reason: &'static str, note: String) -> Recorder {
        let reporter = Reporter { controller: self.driver_name.clone(), instance: None };
        let mut told = lock(&self.told);
        if told.len() >= MOST {
            told.clear();
        }
        let about = (claim.reference.uid.clone().unwrap_or_default(), reason);
        if let Some(Told { recorder, .. }) = told.get(&about).filter(|told| told.note == note) {
            return recorder.clone();
        }
        let recorder = Recorder::new(client, reporter);
        told.insert(about, Told { note, recorder: recorder.clone() });
        recorder
    }
}
