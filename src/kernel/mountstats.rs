//! What the NFS client counts for each mount (`/proc/PID/mountstats`, fs/nfs/super.c and net/sunrpc/stats.c).
//!
//! The counters belong to the superblock: they are the same in every namespace, and a process that mounts an export anew finds them as
//! they were, while the kernel still has it.

use std::io::Read;
use std::time::Duration;

use super::error::{Doing, Result};
use super::mountinfo::unescape;
use super::namespace::PrivateNamespace;

/// The calls to one export since its superblock exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NfsCounters {
    /// `host:/path`, as it was mounted.
    pub source: String,
    pub calls: u64,
    /// Calls that were sent once more because no answer came in time.
    pub retransmissions: u64,
    /// From sending to answer, of all calls together.
    pub round_trip: Duration,
}

/// The NFS mounts of a namespace. Asks no server.
pub fn read(namespace: &PrivateNamespace) -> Result<Vec<NfsCounters>> {
    let process = namespace.enter_process()?;
    let path = format!("/proc/{}/mountstats", process.id());
    let mut text = Vec::new();
    std::fs::File::open(&path).and_then(|mut file| file.read_to_end(&mut text)).doing(|| format!("read {path}"))?;
    Ok(parse(&String::from_utf8_lossy(&text)))
}

/// A mount is a line `device SOURCE mounted on ...` and what follows it; a procedure is `NAME: calls transmissions timeouts bytes
/// bytes queued-ms round-trip-ms ...`, below the line `per-op statistics`.
fn parse(text: &str) -> Vec<NfsCounters> {
    let mut mounts: Vec<NfsCounters> = Vec::new();
    let mut procedures = false;
    for line in text.lines() {
        if let Some(device) = line.strip_prefix("device ") {
            procedures = false;
            let source = unescape(device.split(" mounted on ").next().unwrap_or_default());
            if device.contains(" with fstype nfs") {
                mounts.push(NfsCounters { source, ..Default::default() });
            }
        } else if line.trim() == "per-op statistics" {
            procedures = true;
        } else if let (true, Some(mount), Some((_, numbers))) = (procedures, mounts.last_mut(), line.split_once(':')) {
            let numbers: Vec<u64> = numbers.split_whitespace().map_while(|number| number.parse().ok()).collect();
            if let [calls, transmissions, _, _, _, _, milliseconds, ..] = numbers[..] {
                mount.calls += calls;
                mount.retransmissions += transmissions.saturating_sub(calls);
                mount.round_trip += Duration::from_millis(milliseconds);
            }
        }
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_each_nfs_mount_are_added_up() {
        let text = "device tmpfs mounted on / with fstype tmpfs\n\
            device nfs-server:/images mounted on /nfs-0 with fstype nfs4 statvers=1.1\n\
            \topts:\tro,vers=4.2\n\
            \tevents:\t1 2 3\n\
            \txprt:\ttcp 0 0 1 0\n\
            \tper-op statistics\n\
            \t        NULL: 1 1 0 44 24 0 2 2 0\n\
            \t        READ: 10 13 0 1000 2000 5 30 40 0\n\
            device [fd00::2]:/a\\040b mounted on /nfs-1 with fstype nfs statvers=1.1\n\
            \tper-op statistics\n\
            \t     GETATTR: 3 3 0 1 1 1 7 9 0\n";
        let counters = |source: &str, calls, retransmissions, milliseconds| NfsCounters {
            source: source.into(),
            calls,
            retransmissions,
            round_trip: Duration::from_millis(milliseconds),
        };
        assert_eq!(parse(text), [counters("nfs-server:/images", 11, 3, 32), counters("[fd00::2]:/a b", 3, 0, 7)]);
    }
}
