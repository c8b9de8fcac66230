//! Host names to addresses, in the process: a static binary has no name service switch.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use hickory_resolver::{Hosts, TokioResolver};

use crate::error::{Error, Kind, Result};
use crate::metrics::Timer;
use crate::step::waiting_for;

/// How long a name server may take; its own retries are inside of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// The addresses of several names of one server, each once, in the order in which to try them. An error where no name has any.
pub async fn all_addresses(hosts: &[&str]) -> Result<Vec<IpAddr>> {
    let (mut all, mut first_error) = (Vec::new(), None);
    for host in hosts {
        match addresses(host).await {
            Ok(addresses) => all.extend(addresses),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    let mut seen = HashSet::new();
    all.retain(|address| seen.insert(*address));
    match first_error {
        Some(error) if all.is_empty() => Err(error),
        _ => Ok(all),
    }
}

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
    let listed = listed(&Hosts::from_system().unwrap_or_default(), host);
    if !listed.is_empty() {
        return Ok(listed);
    }
    let (config, mut options) = read_system_conf().unwrap_or_else(|error| {
        tracing::debug!(%error, "/etc/resolv.conf names no name server: the node's own is asked, see resolv.conf(5)");
        let own = NameServerConfig::udp_and_tcp(Ipv4Addr::LOCALHOST.into());
        (ResolverConfig::from_parts(None, Vec::new(), vec![own]), ResolverOpts::default())
    });
    options.use_hosts_file = ResolveHosts::Never;
    let builder = TokioResolver::builder_with_config(config_for(host, config), Default::default());
    Ok(builder.with_options(options).build()?.lookup_ip(host).await?.iter().collect())
}

/// What `/etc/hosts` says of a name, of which no name server is asked then: one that is silent would be waited for only to hear that the name
/// has no address of the other family.
fn listed(hosts: &Hosts, host: &str) -> Vec<IpAddr> {
    let Ok(name) = Name::from_ascii(host.to_ascii_lowercase()) else { return Vec::new() };
    let of = |family| hosts.lookup_static_host(&Query::query(name.clone(), family));
    let records = [RecordType::A, RecordType::AAAA].into_iter().filter_map(of);
    records
        .flat_map(|found| found.answers().iter().filter_map(|record| record.data.ip_addr()).collect::<Vec<_>>())
        .collect()
}

/// A name with a dot is looked for as it is. A search domain of the cluster would let a Service of any tenant answer for it: `nas.corp`
/// is in `svc.cluster.local` the Service `nas` of the namespace `corp`.
fn config_for(host: &str, config: ResolverConfig) -> ResolverConfig {
    match host.contains('.') {
        true => ResolverConfig::from_parts(None, Vec::new(), config.name_servers().to_vec()),
        false => config,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_resolver::system_conf::parse_resolv_conf;

    #[tokio::test]
    async fn a_server_with_several_names_has_each_address_once_and_in_their_order() {
        let addresses = all_addresses(&["10.0.0.2", "no such name", "10.0.0.1", "10.0.0.2"]).await.unwrap();
        assert_eq!(addresses, ["10.0.0.2", "10.0.0.1"].map(|address| address.parse::<IpAddr>().unwrap()));
    }

    #[test]
    fn a_name_in_the_hosts_file_has_the_addresses_that_it_has_there() {
        let mut hosts = Hosts::default();
        hosts.read_hosts_conf(&b"10.0.0.1 nas nas.corp\nfd00::1 nas # 10.0.0.2 nas\n10.0.0.3 nas\n"[..]).unwrap();
        let listed = |host| listed(&hosts, host).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(listed("nas"), ["10.0.0.1", "10.0.0.3", "fd00::1"]);
        assert_eq!(listed("NAS.corp"), ["10.0.0.1"]);
        assert_eq!([listed("na"), listed("nas.corp.example")].concat(), [""; 0]);
    }

    #[test]
    fn a_name_with_a_dot_is_looked_for_in_no_search_domain() {
        let text = "nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n";
        let searched = |host| {
            let (config, _) = parse_resolv_conf(text).unwrap();
            let config = config_for(host, config);
            assert_eq!(config.name_servers().len(), 1);
            config.search().len()
        };
        assert_eq!((searched("nas.corp"), searched("nas")), (0, 2));
    }
}
