//! Which of the servers of an image this node asks first.

use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::kernel::boot;
use crate::spec::policy::Policy;

/// What tells this node from others.
pub(super) struct Order {
    boot_id: String,
    zone: Option<String>,
}

impl Order {
    /// `zone` is that of the node, as the policy calls it.
    pub(super) fn new(zone: Option<String>) -> Result<Self> {
        Ok(Order { boot_id: boot::id()?, zone })
    }

    /// The least is asked first: the servers of the node's zone before all others. Of those that are left nodes differ in whom they ask first, and a node
    /// asks the same for as long as it is up.
    pub(super) fn rank(&self, policy: &Policy, host: &str) -> (bool, [u8; 32]) {
        let is_near = self.zone.is_some() && policy.zone(host) == self.zone.as_deref();
        (!is_near, Sha256::new().chain_update(&self.boot_id).chain_update(host).finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVERS: [&str; 4] = ["nfs-1.east", "nfs-2.east", "nfs-1.west", "nfs-2.west"];

    fn order(policy: &str, boot_id: usize, zone: Option<&str>) -> Vec<&'static str> {
        let order = Order { boot_id: boot_id.to_string(), zone: zone.map(Into::into) };
        let policy = Policy::parse(policy).unwrap();
        let mut servers = SERVERS.to_vec();
        servers.sort_by_cached_key(|host| order.rank(&policy, host));
        servers
    }

    #[test]
    fn a_node_asks_the_servers_of_its_zone_first_and_nodes_of_a_zone_differ() {
        let policy = "servers: [{host: '*.east', zone: east}, {host: '*'}, {host: '*.west', zone: west}]";
        let mut firsts = std::collections::BTreeSet::new();
        for node in 0..20 {
            let west = order(policy, node, Some("west"));
            assert!(west[..2].iter().all(|host| host.ends_with("west")), "{west:?}");
            firsts.insert(west[0]);
        }
        assert_eq!(firsts.len(), 2);
    }

    #[test]
    fn where_no_zone_is_known_nodes_differ_and_each_stays_with_its_own() {
        for (policy, zone) in [("{}", Some("west")), ("servers: [{host: '*.west', zone: west}]", None)] {
            let firsts: std::collections::BTreeSet<_> = (0..60).map(|node| order(policy, node, zone)[0]).collect();
            assert_eq!(firsts.len(), 4);
            assert_eq!(order(policy, 7, zone), order(policy, 7, zone));
        }
    }
}
