//! The one place where errors become gRPC codes, and where every call is logged.

use std::time::Instant;

use tonic::{Code, Response, Status};
use tracing::Instrument;

use crate::error::{self, Kind};
use crate::metrics;

/// What every method of the services returns.
pub type Answer<T> = Result<Response<T>, Status>;

/// Runs one call in a span of its own and logs how it ended. `about` names the volume or path; no secret is ever part of it.
pub async fn answer<T>(method: &'static str, about: &str, call: impl Future<Output = error::Result<T>>) -> Answer<T> {
    let span = tracing::info_span!("call", method, about, pod = tracing::field::Empty);
    let start = Instant::now();
    async move {
        let outcome = call.await;
        let took = start.elapsed();
        let milliseconds = metrics::milliseconds(took);
        let code = outcome.as_ref().err().map_or(Code::Ok, |error| code(error.kind));
        // As other exporters of gRPC metrics write it.
        let name = if code == Code::Ok { "OK".to_owned() } else { format!("{code:?}") };
        metrics::call(method, &name, took);
        match outcome {
            Ok(answer) => {
                // The kubelet asks how each volume is each minute.
                match method.starts_with("NodeGetVolume") {
                    true => tracing::debug!(milliseconds, "done"),
                    false => tracing::info!(milliseconds, "done"),
                }
                Ok(Response::new(answer))
            }
            Err(error) => {
                let errno = error.errno().map(|errno| metrics::errno_name(errno.raw_os_error()));
                tracing::warn!(milliseconds, ?code, errno, %error, "failed");
                Err(Status::new(code, error.message))
            }
        }
    }
    .instrument(span)
    .await
}

fn code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::OutOfRange => Code::OutOfRange,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Aborted => Code::Aborted,
        Kind::Internal => Code::Internal,
    }
}
