//! PersistentVolumeClaims that name their image by an annotation, and the Events that tell their authors what is wrong.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, PersistentVolumeClaim};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use tokio::sync::OnceCell;

use crate::error::{Error, Kind, Result};

/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The API server takes notes of less than 1024 bytes (k8s.io/api/events/v1).
const NOTE: usize = 1000;

/// The claims of the cluster that this process belongs to. The API server is not asked before the first claim is.
pub struct Claims {
    annotation: String,
    reporter: Reporter,
    connection: OnceCell<(Client, Recorder)>,
}

/// What a claim says about its image.
pub struct Claim {
    pub image: Option<String>,
    reference: ObjectReference,
}

impl Claims {
    /// `driver_name` is the domain of the annotation, and the reporter of the events.
    pub fn new(driver_name: &str) -> Self {
        Claims {
            annotation: format!("{driver_name}/image"),
            reporter: Reporter { controller: driver_name.into(), instance: None },
            connection: OnceCell::new(),
        }
    }

    /// The annotation in which a claim names its image.
    pub fn annotation(&self) -> &str {
        &self.annotation
    }

    /// Reads the claim; needs the verb `get` of `persistentvolumeclaims`.
    pub async fn get(&self, namespace: &str, name: &str) -> Result<Claim> {
        let what = format!("read claim {namespace}/{name}");
        let read = async {
            let (client, _) = self.connection().await?;
            let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
            claims.get(name).await
        };
        let claim = in_time(&what, read).await?;
        let annotations = claim.metadata.annotations.as_ref();
        let image = annotations.and_then(|annotations| annotations.get(&self.annotation)).cloned();
        Ok(Claim { image, reference: claim.object_ref(&()) })
    }

    /// Tells the claim's author why there is no volume, by an Event; needs the verbs `create` and `patch` of `events` in
    /// `events.k8s.io`. An Event that cannot be written is logged: what it says is the answer of the call too.
    pub async fn warn(&self, claim: &Claim, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: "ImageRefused".into(),
            note: Some(note.char_indices().take_while(|(at, _)| *at < NOTE).map(|(_, letter)| letter).collect()),
            action: "Provisioning".into(),
            secondary: None,
        };
        let publish = async {
            let (_, recorder) = self.connection().await?;
            recorder.publish(&event, &claim.reference).await
        };
        if let Err(error) = in_time("write an event", publish).await {
            tracing::warn!(%error, "the claim's author is not told");
        }
    }

    async fn connection(&self) -> std::result::Result<&(Client, Recorder), kube::Error> {
        let connect = || async {
            let client = Client::try_default().await?;
            Ok((client.clone(), Recorder::new(client, self.reporter.clone())))
        };
        self.connection.get_or_try_init(connect).await
    }
}

async fn in_time<T>(what: &str, work: impl Future<Output = std::result::Result<T, kube::Error>>) -> Result<T> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(failed(what, &error)),
        Err(_) => {
            let message = format!("{what}: the API server did not answer in {} s", PATIENCE.as_secs());
            Err(Error::new(Kind::Unavailable, message))
        }
    }
}

fn failed(what: &str, error: &kube::Error) -> Error {
    let (kind, why, hint) = match error {
        kube::Error::Api(status) if status.code == 404 => (Kind::NotFound, status.message.clone(), ""),
        kube::Error::Api(status) if status.code == 403 => {
            (Kind::FailedPrecondition, status.message.clone(), ": does the controller's ClusterRole allow it?")
        }
        kube::Error::Api(status) => (Kind::Unavailable, status.message.clone(), ""),
        // Its words repeat parts of the file, and a token may be one of them.
        kube::Error::InferConfig(_) => {
            let hint = ": does the controller run in the cluster, with a service account token, or with a KUBECONFIG?";
            (Kind::Unavailable, "no API server is configured".to_owned(), hint)
        }
        error => (Kind::Unavailable, error.to_string(), ": is the API server up?"),
    };
    Error::new(kind, format!("{what}: {why}{hint}"))
}
