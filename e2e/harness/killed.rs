//! The driver killed at every point of every operation on a volume, and what Kubernetes does then.

use std::fs;
use std::path::Path;

use super::tracer::{Change, Tracer};
use super::{Driver, Volume, kernel, wait_for};

const POD: &str = "pod";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Stage,
    Publish,
    Unpublish,
    Unstage,
}

use Operation::{Publish, Stage, Unpublish, Unstage};

impl Operation {
    const ALL: [Operation; 4] = [Stage, Publish, Unpublish, Unstage];

    fn call(self, driver: &Driver, volume: &Volume) -> Result<(), tonic::Status> {
        match self {
            Stage => driver.stage(volume),
            Publish => driver.publish(volume, POD).map(drop),
            Unpublish => driver.unpublish(volume, POD),
            Unstage => driver.unstage(volume),
        }
    }

    /// What is true after the operation, whatever came before it.
    fn check(self, driver: &Driver, devices: usize, is_right: &dyn Fn(&Path)) {
        let target = driver.target(POD);
        match self {
            Stage => {
                assert_eq!(driver.mounts(), [""; 0]);
                wait_for("its loop devices", || driver.loop_devices().len() == devices);
            }
            Publish => {
                assert_eq!(driver.mounts().len(), 1, "{:#?}", driver.mounts());
                wait_for("its loop devices, and no other", || driver.loop_devices().len() == devices);
                assert_eq!(driver.published_directories(), 1);
                is_right(&target);
            }
            Unpublish => {
                assert_eq!(driver.mounts(), [""; 0]);
                assert_eq!(driver.published_directories(), 0);
                assert!(!target.exists(), "the target is still there");
            }
            Unstage => driver.assert_nothing_left(),
        }
    }
}

/// What Kubernetes does when the driver is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sequel {
    /// It repeats the call and goes on.
    Retry,
    /// The pod was deleted meanwhile: it takes down what it knows to have asked for.
    TakeDown,
    /// Nothing: the node went down with the driver, and the pod is gone when both are back.
    Reboot,
}

/// Kills the driver before each of the changes that an operation makes outside of the process, for all four operations and all
/// sequels; `is_right` looks at the published volume. Returns how many points there are.
pub fn anywhere(driver: &mut Driver, volume: &Volume, is_right: &dyn Fn(&Path)) -> usize {
    anywhere_with(driver, volume, 1, is_right)
}

/// The same for a volume that has more loop devices than one.
pub fn anywhere_with(driver: &mut Driver, volume: &Volume, devices: usize, is_right: &dyn Fn(&Path)) -> usize {
    let mut points = 0;
    for operation in Operation::ALL {
        let changes = kill_in(driver, volume, operation, Sequel::Retry, devices, is_right);
        kill_in(driver, volume, operation, Sequel::TakeDown, devices, is_right);
        kill_in(driver, volume, operation, Sequel::Reboot, devices, is_right);
        assert!(!changes.is_empty(), "{operation:?} is said to change nothing: the tracer is blind");
        println!("{operation:?} of {}: {} points", volume.id, changes.len());
        for (index, change) in changes.iter().enumerate() {
            println!("  {:3} {change}", index + 1);
        }
        points += changes.len();
    }
    points
}

fn kill_in(
    driver: &mut Driver,
    volume: &Volume,
    operation: Operation,
    sequel: Sequel,
    devices: usize,
    is_right: &dyn Fn(&Path),
) -> Vec<Change> {
    for number in 1.. {
        for earlier in Operation::ALL.into_iter().filter(|earlier| *earlier < operation) {
            earlier.call(driver, volume).unwrap();
        }
        let tracer = Tracer::kill_before(driver.pid(), number);
        let answer = operation.call(driver, volume);
        let report = tracer.finish();
        let last = report.changes.last().map(ToString::to_string).unwrap_or_default();
        let _context = OnPanic(format!("{operation:?} of {}, killed before {number}: {last}; {sequel:?}", volume.id));
        if report.killed {
            driver.kill();
            let mounts = driver.mounts();
            assert!(mounts.len() <= 1, "mounts are stacked or strewn: {mounts:#?}");
            if sequel == Sequel::Reboot {
                kernel::unmount_below(&driver.directory);
                // Before its first publish there is none.
                let _ = fs::remove_dir_all(driver.directory.join("pods").join(POD));
            }
            driver.launch();
        } else {
            answer.unwrap();
        }
        match sequel {
            _ if !report.killed => go_on_after(operation, driver, volume, devices, is_right),
            Sequel::Retry => {
                operation.call(driver, volume).unwrap();
                go_on_after(operation, driver, volume, devices, is_right);
            }
            Sequel::TakeDown => {
                if operation >= Publish {
                    driver.unpublish(volume, POD).unwrap();
                }
                driver.unstage(volume).unwrap();
            }
            // The driver looks for such things in the background when it starts.
            Sequel::Reboot => wait_for("what the pod had to go", || driver.published_directories() == 0),
        }
        driver.assert_nothing_left();
        if !report.killed {
            return report.changes;
        }
    }
    unreachable!("numbers do not end");
}

/// Checks what a successful operation left, and takes all that follow it.
fn go_on_after(operation: Operation, driver: &Driver, volume: &Volume, devices: usize, is_right: &dyn Fn(&Path)) {
    operation.check(driver, devices, is_right);
    for later in Operation::ALL.into_iter().filter(|later| *later > operation) {
        later.call(driver, volume).unwrap();
        later.check(driver, devices, is_right);
    }
}

/// Says where it happened.
struct OnPanic(String);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}", self.0);
        }
    }
}
