//! The API server of the cluster that this process belongs to.

use std::time::Duration;

use kube::Client;
use kube::config::{Config, KubeConfigOptions};
use tokio::sync::OnceCell;

use crate::error::{Error, Kind, Result};

/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection that is made when somebody needs it first.
pub(super) struct ApiServer {
    /// Of a KUBECONFIG.
    context: Option<String>,
    client: OnceCell<Client>,
}

impl ApiServer {
    /// The API server of this context of a KUBECONFIG; the one that is configured, where there is none.
    pub fn new(context: Option<String>) -> Self {
        ApiServer { context, client: OnceCell::new() }
    }

    /// Asks for something. `what` says in an error what that is.
    pub async fn ask<T, F: Future<Output = std::result::Result<T, kube::Error>>>(
        &self,
        what: &str,
        request: impl FnOnce(Client) -> F,
    ) -> Result<T> {
        let asked = async {
            let client = self.client.get_or_try_init(|| self.connect(what)).await?;
            request(client.clone()).await.map_err(|error| failed(what, &error))
        };
        let silent = || {
            let message = format!("{what}: the API server did not answer in {} s", PATIENCE.as_secs());
            Err(Error::new(Kind::Unavailable, message))
        };
        tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| silent())
    }

    async fn connect(&self, what: &str) -> Result<Client> {
        let client = match &self.context {
            None => Client::try_default().await,
            Some(context) => {
                let options = KubeConfigOptions { context: Some(context.clone()), ..KubeConfigOptions::default() };
                // As that of another error below, its words may be a token's.
                let config = Config::from_kubeconfig(&options).await.map_err(|_| {
                    let message =
                        format!("{what}: no context {context} is configured: see 'kubectl config get-contexts'");
                    Error::new(Kind::Unavailable, message)
                });
                Client::try_from(config?)
            }
        };
        client.map_err(|error| failed(what, &error))
    }
}

fn failed(what: &str, error: &kube::Error) -> Error {
    let (kind, why, hint) = match error {
        kube::Error::Api(status) if status.code == 404 => (Kind::NotFound, status.message.clone(), ""),
        // A ResourceQuota (k8s.io/apiserver/pkg/admission/plugin/resourcequota).
        kube::Error::Api(status) if status.code == 403 && status.message.contains("exceeded quota") => {
            (Kind::ResourceExhausted, status.message.clone(), "")
        }
        // The words of RBAC (k8s.io/apiserver/pkg/endpoints/handlers/responsewriters); admission has others.
        kube::Error::Api(status) if status.code == 403 && status.message.contains(" cannot ") => {
            (Kind::FailedPrecondition, status.message.clone(), ": does a role allow it?")
        }
        kube::Error::Api(status) if (400..500).contains(&status.code) && ![408, 409, 429].contains(&status.code) => {
            (Kind::FailedPrecondition, status.message.clone(), "")
        }
        kube::Error::Api(status) => (Kind::Unavailable, status.message.clone(), ""),
        // Its words repeat parts of the file, and a token may be one of them.
        kube::Error::InferConfig(_) => {
            let hint = ": is there a KUBECONFIG, with that context, or the service account token of a pod?";
            (Kind::Unavailable, "no API server is configured".to_owned(), hint)
        }
        error => (Kind::Unavailable, error.to_string(), ": is the API server up?"),
    };
    Error::new(kind, format!("{what}: {why}{hint}"))
}
