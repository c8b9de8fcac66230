//! Whether a node can do what the driver needs, and what to do where it cannot.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::kernel::mountinfo;
use crate::kernel::support::{self, Support};
use crate::spec::policy::Policy;
use crate::volume;

/// What is examined.
pub struct Examined {
    pub data_dir: PathBuf,
    pub kubelet_dir: PathBuf,
    pub policy: Policy,
    /// NFS servers besides those that the policy names without a pattern.
    pub servers: Vec<String>,
}

/// One thing that was looked at.
pub struct Finding {
    pub what: String,
    pub verdict: Verdict,
}

pub enum Verdict {
    Good(String),
    /// Volumes work, but not all of them.
    Weak(String),
    /// No volume works before this is mended.
    Bad(String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text) = match &self.verdict {
            Verdict::Good(text) => ("ok  ", text),
            Verdict::Weak(text) => ("warn", text),
            Verdict::Bad(text) => ("FAIL", text),
        };
        write!(f, "{word} {}: {text}", self.what)
    }
}

/// Looks at everything, also after something bad. Makes and removes a directory in the data directory; asks each server once.
pub async fn examine(examined: &Examined) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: &str, verdict: Verdict| findings.push(Finding { what: what.to_owned(), verdict });
    for Support { what, needed, outcome } in support::list() {
        find(
            &what,
            match (outcome, needed) {
                (Ok(found), _) => Verdict::Good(found),
                (Err(error), true) => Verdict::Bad(error.to_string()),
                (Err(error), false) => Verdict::Weak(error.to_string()),
            },
        );
    }
    find("kubelet directory", kubelet_directory(&examined.kubelet_dir.join("pods")));
    let data_dir = examined.data_dir.clone();
    find(
        "writable layers",
        match volume::try_overlay(&data_dir).await {
            Ok(()) => Verdict::Good(format!("{} can hold them", data_dir.display())),
            Err(error) => Verdict::Weak(format!("{error}: volumes with \"overlay: directory\" will fail")),
        },
    );
    let policy = &examined.policy;
    let servers = policy.hosts().chain(examined.servers.iter().map(String::as_str));
    let servers: Vec<_> = servers.flat_map(|server| policy.addresses(server)).collect();
    if servers.is_empty() {
        find("servers", Verdict::Good("none to ask: name them as arguments, or in a policy".into()));
    }
    for server in servers {
        find(
            &format!("server {server}"),
            match volume::ask_host(server).await {
                Ok(answer) => Verdict::Good(answer),
                Err(error) => Verdict::Weak(error.to_string()),
            },
        );
    }
    findings
}

/// A mount made in the driver's container, which has the pods' directories of the kubelet's, reaches the node only below a shared mount.
fn kubelet_directory(directory: &Path) -> Verdict {
    let shown = directory.display();
    if !directory.is_dir() {
        return Verdict::Bad(format!("{shown} is no directory: is --kubelet-dir right?"));
    }
    let table = match mountinfo::read() {
        Ok(table) => table,
        Err(error) => return Verdict::Bad(error.to_string()),
    };
    let above = table.iter().filter(|mount| directory.starts_with(&mount.mount_point));
    // Of two mounts at one place the later one is seen.
    match above.max_by_key(|mount| (Path::new(&mount.mount_point).components().count(), mount.id)) {
        Some(mount) if mount.shared => {
            Verdict::Good(format!("{shown} is below the shared mount {}", mount.mount_point))
        }
        Some(mount) => Verdict::Bad(format!(
            "{shown} is below the mount {}, which is not shared: pods would not see what is mounted; try 'mount \
             --make-rshared {}' on the node, or mountPropagation Bidirectional in the DaemonSet",
            mount.mount_point, mount.mount_point
        )),
        None => Verdict::Bad(format!("{shown} is on no mount that this process sees")),
    }
}
