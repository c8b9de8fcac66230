//! Host names to addresses, in the process: a static binary has no name service switch.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::net::NetError;

use crate::blocking::waiting_for;
use crate::error::{Error, Kind, Result};
use crate::metrics::Timer;

/// How long a name server may take; its own retries are inside of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The addresses of a host by `/etc/hosts` and the name servers of `/etc/resolv.conf`, in the order in which to try them.
///
/// The files are read at each call: a node's name servers change while the driver runs.
pub async fn addresses(host: &str) -> Result<Vec<IpAddr>> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    waiting_for(format!("resolve {host}"));
    let timer = Timer::start("resolve");
    let (code, why) = match tokio::time::timeout(PATIENCE, look_up(host)).await {
        Ok(Ok(addresses)) => {
            timer.end(None);
            return Ok(addresses);
        }
        Ok(Err(error)) if error.is_nx_domain() => ("EAI_NONAME", "no such name".to_owned()),
        Ok(Err(error)) if error.is_no_records_found() => ("EAI_NONAME", "the name has no address".to_owned()),
        Ok(Err(error)) => ("EAI_AGAIN", error.to_string()),
        Err(_) => ("EAI_AGAIN", format!("no answer in {} s", PATIENCE.as_secs())),
    };
    timer.end(Some(code.into()));
    let hint = "is the name right, and do the driver's name servers (/etc/resolv.conf where it runs) know it?";
    Err(Error::new(Kind::Unavailable, format!("resolve {host}: {why}: {hint}")))
}

async fn look_up(host: &str) -> std::result::Result<Vec<IpAddr>, NetError> {
    let builder = TokioResolver::builder_tokio().unwrap_or_else(|error| {
        tracing::debug!(%error, "/etc/resolv.conf names no name server: the node's own is asked, see resolv.conf(5)");
        let own = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
        TokioResolver::builder_with_config(ResolverConfig::from_parts(None, Vec::new(), vec![own]), Default::default())
    });
    Ok(builder.build()?.lookup_ip(host).await?.iter().collect())
}
