//! The API server of the cluster that this process belongs to.

use std::time::Duration;

use kube::Client;
use tokio::sync::OnceCell;

use crate::error::{Error, Kind, Result};

/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that is made when somebody needs it first.
#[derive(Default)]
pub(super) struct ApiServer(OnceCell<Client>);

impl ApiServer {
    /// Asks for something. `what` says in an error what that is.
    pub async fn ask<T, F: Future<Output = std::result::Result<T, kube::Error>>>(
        &self,
        what: &str,
        request: impl FnOnce(Client) -> F,
    ) -> Result<T> {
        let asked = async {
            let client = self.0.get_or_try_init(Client::try_default).await?;
            request(client.clone()).await
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(failed(what, &error)),
            Err(_) => {
                let message = format!("{what}: the API server did not answer in {} s", PATIENCE.as_secs());
                Err(Error::new(Kind::Unavailable, message))
            }
        }
    }
}

fn failed(what: &str, error: &kube::Error) -> Error {
    let (kind, why, hint) = match error {
        kube::Error::Api(status) if status.code == 404 => (Kind::NotFound, status.message.clone(), ""),
        // A ResourceQuota (k8s.io/apiserver/pkg/admission/plugin/resourcequota).
        kube::Error::Api(status) if status.code == 403 && status.message.contains("exceeded quota") => {
            (Kind::ResourceExhausted, status.message.clone(), "")
        }
        kube::Error::Api(status) if status.code == 403 => {
            (Kind::FailedPrecondition, status.message.clone(), ": do the controller's roles allow it?")
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
