//! What is true of a node whatever becomes of its servers: calls end, and its own tools work.

use std::time::{Duration, Instant};

use csi_driver_squashfs::csi::v1::ProbeRequest;

use super::{Driver, run};

/// More than any call may take: the deadline of the driver under test is 20 s.
const DEADLINE: Duration = Duration::from_secs(30);

/// Starts a driver that has answered a call.
pub fn start_with(arguments: &[&str], policy: Option<&str>) -> Driver {
    let driver = Driver::start_with(arguments, policy);
    // The first call opens the client's connection, which is none of what may leak.
    node_is_well(&driver);
    driver
}

/// Runs a call that must end within its deadline, whatever the server does.
pub fn in_time<T>(what: &str, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let answer = call();
    assert!(start.elapsed() < DEADLINE, "{what} took {:?}", start.elapsed());
    answer
}

/// What a node's own tools do all the time.
pub fn node_is_well(driver: &Driver) {
    in_time("df", || run("df", &[]));
    // Down to the roots of volumes, and not into them: what is in an image is read from the server.
    let pods = driver.directory.join("pods");
    in_time("find", || run("find", &[pods.to_str().unwrap(), "-maxdepth", "2", "-ls"]));
    let probe = in_time("Probe", || driver.block_on(async { driver.identity().probe(ProbeRequest {}).await }));
    assert_eq!(probe.unwrap().into_inner().ready, Some(true));
}
