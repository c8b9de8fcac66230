//! Whether a cluster has what the driver needs, and what of its objects the driver cannot use.

use super::doctor::{Finding, Verdict};
use crate::kubernetes::inventory::Inventory;

/// Asks nobody: all of it is in the inventory.
pub fn examine(driver_name: &str, inventory: &Inventory) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: &str, verdict| findings.push(Finding { what: what.to_owned(), verdict });
    let installed = match inventory.is_installed {
        true => Verdict::Good(format!("{driver_name} is installed")),
        false => Verdict::Bad(format!("no CSIDriver {driver_name}: install the chart, or say --driver-name")),
    };
    find("driver", installed);
    let without: Vec<_> =
        inventory.nodes.iter().filter(|node| !node.registered).map(|node| node.name.as_str()).collect();
    let nodes = match (without.as_slice(), inventory.nodes.len()) {
        ([], all) => Verdict::Good(format!("{all}, and all have the driver")),
        (without, all) => {
            let these = without.join(", ");
            let hint = "look at the driver's pods there, and at node.nodeSelector and node.tolerations of the chart";
            let text = format!("{} of {all} do not have the driver: {these}: {hint}", without.len());
            if without.len() == all { Verdict::Bad(text) } else { Verdict::Weak(text) }
        }
    };
    find("nodes", nodes);
    let unreadable = inventory.references.iter().filter_map(|it| Some((&it.object, it.locations.as_ref().err()?)));
    for (object, why) in unreadable {
        find(object, Verdict::Weak(format!("no volume comes of it: {why}")));
    }
    for claim in &inventory.pending {
        let hint = format!("see 'kubectl describe persistentvolumeclaim --namespace {}'", claim.replace('/', " "));
        find(&format!("PersistentVolumeClaim {claim}"), Verdict::Weak(format!("it is Pending: {hint}")));
    }
    find("volumes", Verdict::Good(inventory.volumes.len().to_string()));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::inventory::{ClusterNode, Reference};

    #[test]
    fn a_cluster_is_well_where_all_nodes_have_the_driver_and_its_objects_can_be_read() {
        let node = |name: &str, registered| ClusterNode { name: name.into(), registered, pods: 0, volumes: 0 };
        let words = |inventory: &Inventory| {
            let findings = examine("squashfs.csi.dev", inventory);
            findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        let mut inventory = Inventory { nodes: vec![node("a", true)], is_installed: true, ..Inventory::default() };
        assert_eq!(
            words(&inventory),
            "ok   driver: squashfs.csi.dev is installed\nok   nodes: 1, and all have the driver\nok   volumes: 0"
        );
        inventory.nodes.push(node("b", false));
        inventory.references.push(Reference { object: "Pod a/b".into(), locations: Err("no such parameter".into()) });
        inventory.pending.push("team/tools".into());
        let told = words(&inventory);
        for expected in [
            "warn nodes: 1 of 2 do not have the driver: b: ",
            "warn Pod a/b: no volume comes of it: no such parameter",
            "describe persistentvolumeclaim --namespace team tools",
        ] {
            assert!(told.contains(expected), "{told}");
        }
        assert!(words(&Inventory::default()).contains("FAIL driver: no CSIDriver squashfs.csi.dev"));
    }
}
