//! Random histories of calls, restarts and reboots: after each step the kernel and the disk have what a model of the driver says.
//!
//! A history is told by its seed: `HISTORY_SEED=N make test-host` tells it again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use csi_driver_squashfs::csi::v1::volume_capability::access_mode::Mode;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::harness::{Driver, Volume, kernel, soak};
use crate::{Images, squashfs};

const PODS: usize = 6;

/// What a volume is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upper {
    Plain,
    Directory,
    Tmpfs,
    Nothing,
}

/// A volume as the histories use it. Two of one ID are the same volume with other attributes, which a claim never has but a
/// volume that was deleted and made anew may.
#[derive(Debug)]
struct Definition {
    id: &'static str,
    /// By number, uppermost first.
    images: &'static [usize],
    upper: Upper,
    mode: Mode,
    inline: bool,
}

const fn claim(id: &'static str, images: &'static [usize], upper: Upper) -> Definition {
    let mode = if matches!(upper, Upper::Plain | Upper::Nothing) {
        Mode::MultiNodeReaderOnly
    } else {
        Mode::MultiNodeMultiWriter
    };
    Definition { id, images, upper, mode, inline: false }
}

const VOLUMES: &[Definition] = &[
    claim("a", &[0], Upper::Directory),
    claim("a", &[2], Upper::Directory),
    claim("b", &[0], Upper::Directory),
    claim("c", &[1], Upper::Plain),
    claim("d", &[1], Upper::Tmpfs),
    claim("e", &[2, 0], Upper::Nothing),
    claim("f", &[1, 2], Upper::Directory),
    Definition { mode: Mode::SingleNodeSingleWriter, ..claim("g", &[3], Upper::Directory) },
    Definition { mode: Mode::SingleNodeWriter, inline: true, ..claim("h", &[0], Upper::Directory) },
    Definition { mode: Mode::SingleNodeWriter, inline: true, ..claim("i", &[3], Upper::Plain) },
];

impl Definition {
    fn volume(&self, images: &Images) -> Volume {
        let mut lower: Vec<Value> =
            self.images.iter().map(|image| squashfs(&images.image(&format!("image{image}")))).collect();
        let upper = match self.upper {
            Upper::Plain => return self.with(&lower.remove(0)),
            Upper::Directory => json!({"kind": "directory"}),
            Upper::Tmpfs => json!({"kind": "tmpfs", "size": "1Mi"}),
            Upper::Nothing => json!({"kind": "none"}),
        };
        self.with(&json!({"kind": "overlay", "overlay": {"lower": lower, "upper": upper}}))
    }

    fn with(&self, spec: &Value) -> Volume {
        let volume = Volume::spec(self.id, spec);
        Volume { mode: self.mode, ..if self.inline { volume.inline() } else { volume } }
    }
}

/// One step of a history.
#[derive(Clone, Copy, Debug)]
enum Step {
    Stage {
        volume: usize,
    },
    Publish {
        volume: usize,
        read_only: bool,
        pod: usize,
    },
    Unpublish {
        volume: usize,
        pod: usize,
    },
    Unstage {
        volume: usize,
    },
    Stats {
        volume: usize,
        pod: usize,
    },
    /// The driver is killed and started again.
    Restart,
    /// Somebody unmounts a target by hand.
    Lose {
        pod: usize,
    },
    /// The node starts again: nothing is mounted, and some pods are gone.
    Reboot {
        gone: [bool; PODS],
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Step::Stage { volume } => write!(f, "stage {}", VOLUMES[volume].id),
            Step::Publish { volume, read_only, pod } => {
                let read_only = if read_only { " read-only" } else { "" };
                write!(f, "publish {} {:?} at pod-{pod}{read_only}", VOLUMES[volume].id, VOLUMES[volume].images)
            }
            Step::Unpublish { volume, pod } => write!(f, "unpublish {} at pod-{pod}", VOLUMES[volume].id),
            Step::Unstage { volume } => write!(f, "unstage {}", VOLUMES[volume].id),
            Step::Stats { volume, pod } => write!(f, "stats of {} at pod-{pod}", VOLUMES[volume].id),
            Step::Restart => write!(f, "restart"),
            Step::Lose { pod } => write!(f, "unmount pod-{pod} by hand"),
            Step::Reboot { gone } => write!(f, "reboot, pods gone: {gone:?}"),
        }
    }
}

/// xorshift64*: the same steps for the same seed, whatever becomes of other generators.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit as u64) as usize
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    fn step(&mut self, model: &Model) -> Step {
        let (volume, pod) = (self.below(VOLUMES.len()), self.below(PODS));
        // Mostly what is there, so that calls succeed and not only fail.
        let there = model.records.get(&pod).map_or(volume, |record| record.volume);
        match self.below(1000) {
            0..120 => Step::Stage { volume },
            120..420 => Step::Publish { volume, read_only: self.percent(20), pod },
            // A repeated call.
            420..500 => {
                let read_only = model.records.get(&pod).is_some_and(|record| record.read_only);
                Step::Publish { volume: there, read_only, pod }
            }
            500..760 => Step::Unpublish { volume: there, pod },
            760..800 => Step::Unpublish { volume, pod },
            800..920 => Step::Unstage { volume },
            920..950 => Step::Stats { volume: if self.percent(80) { there } else { volume }, pod },
            950..975 => Step::Lose { pod },
            975..997 => Step::Restart,
            _ => Step::Reboot { gone: [(); PODS].map(|()| self.percent(30)) },
        }
    }
}

/// What is published at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Publication {
    volume: usize,
    read_only: bool,
}

/// What the driver and the kernel have, by the rules of `src/volume`.
#[derive(Default)]
struct Model {
    /// What staged volumes hold, by ID; gone with the process.
    staged: BTreeMap<&'static str, usize>,
    /// What is written down of them; outlives the process.
    staged_before: BTreeMap<&'static str, usize>,
    /// What published paths hold, by pod; gone with the process.
    held: BTreeMap<usize, usize>,
    /// What is mounted, by pod; outlives the process.
    mounts: BTreeMap<usize, Publication>,
    /// What is written down, by pod; outlives the node. The target exists just as long.
    records: BTreeMap<usize, Publication>,
}

impl Model {
    /// Takes the step, and returns the answer to it.
    fn take(&mut self, step: Step) -> Result<(), Code> {
        match step {
            Step::Stage { volume } => {
                self.check_staged(volume)?;
                self.staged.insert(VOLUMES[volume].id, volume);
                self.staged_before.insert(VOLUMES[volume].id, volume);
                Ok(())
            }
            Step::Publish { volume, read_only, pod } => self.publish(Publication { volume, read_only }, pod),
            Step::Unpublish { volume, pod } => {
                if self.records.get(&pod).is_some_and(|record| VOLUMES[record.volume].id != VOLUMES[volume].id) {
                    return Err(Code::NotFound);
                }
                self.mounts.remove(&pod);
                self.records.remove(&pod);
                self.held.remove(&pod);
                Ok(())
            }
            Step::Unstage { volume } => {
                self.staged.remove(VOLUMES[volume].id);
                self.staged_before.remove(VOLUMES[volume].id);
                Ok(())
            }
            Step::Stats { volume, pod } => match self.records.get(&pod) {
                Some(record) if VOLUMES[record.volume].id == VOLUMES[volume].id => Ok(()),
                _ => Err(Code::NotFound),
            },
            Step::Restart => {
                self.staged.clear();
                self.held.clear();
                Ok(())
            }
            Step::Lose { pod } => {
                self.mounts.remove(&pod);
                Ok(())
            }
            Step::Reboot { gone } => {
                let (records, staged_before) =
                    (std::mem::take(&mut self.records), std::mem::take(&mut self.staged_before));
                // It is still the same boot.
                *self = Model { records, staged_before, ..Model::default() };
                self.records.retain(|pod, _| !gone[*pod]);
                Ok(())
            }
        }
    }

    /// A volume that is staged has one spec until it is unstaged.
    fn check_staged(&self, volume: usize) -> Result<(), Code> {
        let staged = self.staged.get(VOLUMES[volume].id);
        if staged.is_none_or(|staged| *staged == volume) { Ok(()) } else { Err(Code::AlreadyExists) }
    }

    fn publish(&mut self, publication: Publication, pod: usize) -> Result<(), Code> {
        match self.mounts.get(&pod) {
            Some(mounted) if *mounted == publication => return Ok(()),
            Some(_) => return Err(Code::AlreadyExists),
            None => {}
        }
        let Definition { id, mode, inline, .. } = VOLUMES[publication.volume];
        if !inline {
            self.check_staged(publication.volume)?;
            if self.staged_before.get(id) == Some(&publication.volume) {
                self.staged.insert(id, publication.volume);
            }
        }
        let mut elsewhere = self.mounts.iter().filter(|(other, _)| **other != pod);
        if mode == Mode::SingleNodeSingleWriter && elsewhere.any(|(_, mounted)| VOLUMES[mounted.volume].id == id) {
            return Err(Code::FailedPrecondition);
        }
        self.mounts.insert(pod, publication);
        self.records.insert(pod, publication);
        self.held.insert(pod, publication.volume);
        Ok(())
    }

    fn state(&self) -> State {
        let used = self.staged.values().chain(self.held.values());
        let used = used.copied().chain(self.mounts.values().map(|publication| publication.volume));
        let images: BTreeSet<usize> = used.flat_map(|volume| VOLUMES[volume].images).copied().collect();
        let name = |image: &usize| format!("image{image}");
        let mount = |publication: &Publication| {
            let Definition { images, upper, .. } = &VOLUMES[publication.volume];
            let writable = matches!(upper, Upper::Directory | Upper::Tmpfs) && !publication.read_only;
            // What has one layer is no overlay.
            let fs_type = if writable || images.len() > 1 { "overlay" } else { "squashfs" };
            Mounted { fs_type: fs_type.into(), writable, images: images.iter().map(name).collect() }
        };
        State {
            mounts: self.mounts.iter().map(|(pod, publication)| (pod_name(*pod), mount(publication))).collect(),
            loop_devices: images.iter().map(name).collect(),
            records: self
                .records
                .iter()
                .map(|(pod, record)| (pod_name(*pod), (VOLUMES[record.volume].id.into(), record.read_only)))
                .collect(),
            targets: self.records.keys().map(|pod| pod_name(*pod)).collect(),
        }
    }
}

fn pod_name(pod: usize) -> String {
    format!("pod-{pod}")
}

/// What can be seen from outside of the driver.
#[derive(Debug, PartialEq, Eq)]
struct State {
    mounts: Vec<(String, Mounted)>,
    /// The images that are attached, one entry for each device.
    loop_devices: Vec<String>,
    /// Volume ID and whether it is read-only, by pod.
    records: BTreeMap<String, (String, bool)>,
    targets: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    fs_type: String,
    writable: bool,
    images: Vec<String>,
}

impl State {
    fn of(driver: &Driver) -> Self {
        let mut mounts: Vec<_> = driver.mounts().iter().map(|line| mounted(line)).collect();
        mounts.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut loop_devices: Vec<_> = driver.loop_devices().iter().map(|device| image_of(device)).collect();
        loop_devices.sort();
        let pods = entries(&driver.directory.join("pods"));
        let targets = pods.into_iter().filter(|pod| driver.directory.join("pods").join(pod).join("mount").exists());
        let published = driver.data_dir().join("published");
        let records = entries(&published).into_iter().map(|name| {
            let record = fs::read(published.join(&name).join("volume.json")).unwrap_or_default();
            // A directory without a record is one that nobody expects.
            let Ok(record) = serde_json::from_slice::<Value>(&record) else { return (name, Default::default()) };
            let pod = pod_of(Path::new(record["target"].as_str().unwrap()));
            (pod, (record["volumeId"].as_str().unwrap().into(), record["readOnly"].as_bool().unwrap()))
        });
        State { mounts, loop_devices, records: records.collect(), targets: targets.collect() }
    }
}

fn entries(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn pod_of(target: &Path) -> String {
    target.parent().unwrap().file_name().unwrap().to_str().unwrap().into()
}

/// A line of the mount table: the pod, and what is mounted there.
fn mounted(line: &str) -> (String, Mounted) {
    let fields: Vec<_> = line.split(' ').collect();
    let separator = fields.iter().position(|field| *field == "-").unwrap();
    let [fs_type, source, super_options] = fields[separator + 1..] else { panic!("{line}") };
    let is_set = |options: &str, option| options.split(',').any(|other| other == option);
    let devices: Vec<String> = match source.strip_prefix("/dev/") {
        Some(device) => vec![device.into()],
        None => {
            let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>();
            super_options.split("-loop").skip(1).map(|part| format!("loop{}", number(part))).collect()
        }
    };
    let mounted = Mounted {
        fs_type: fs_type.into(),
        writable: !is_set(fields[5], "ro") && !is_set(super_options, "ro"),
        images: devices.iter().map(|device| image_of(device)).collect(),
    };
    (pod_of(Path::new(fields[4])), mounted)
}

/// The image that a loop device has; a device that is just going has none.
fn image_of(device: &str) -> String {
    let file = kernel::backing_file(device).unwrap_or_default();
    Path::new(&file).file_name().unwrap_or_default().to_str().unwrap().into()
}

/// A driver, the volumes, and what was done so far.
struct History {
    images: Images,
    driver: Driver,
    volumes: Vec<Volume>,
    model: Model,
    seed: u64,
    steps: Vec<String>,
}

impl History {
    fn new(seed: u64) -> Self {
        let images = Images::new();
        let volumes = VOLUMES.iter().map(|definition| definition.volume(&images)).collect();
        History { driver: images.driver(), images, volumes, model: Model::default(), seed, steps: Vec::new() }
    }

    fn volume(&self, volume: usize, read_only: bool) -> Volume {
        Volume { read_only, ..self.volumes[volume].clone() }
    }

    fn take(&mut self, step: Step) {
        self.steps.push(step.to_string());
        let expected = self.model.take(step);
        let answer = self.call(step).map_err(|status| (status.code(), status.message().to_owned()));
        assert_eq!(answer.clone().map_err(|(code, _)| code), expected, "the answer to: {step}: {answer:?}");
        self.steps.last_mut().unwrap().push_str(&format!(": {answer:?}"));
        self.compare();
    }

    fn call(&mut self, step: Step) -> Result<(), Status> {
        match step {
            Step::Stage { volume } => self.driver.stage(&self.volumes[volume])?,
            Step::Publish { volume, read_only, pod } => {
                let target = self.driver.publish(&self.volume(volume, read_only), &pod_name(pod))?;
                let file = fs::read_to_string(target.join("file")).unwrap();
                assert_eq!(file, format!("image{}", VOLUMES[volume].images[0]), "the content of {}", target.display());
            }
            Step::Unpublish { volume, pod } => self.driver.unpublish(&self.volumes[volume], &pod_name(pod))?,
            Step::Unstage { volume } => self.driver.unstage(&self.volumes[volume])?,
            Step::Stats { volume, pod } => {
                let stats = self.driver.stats(&self.volumes[volume], &pod_name(pod))?;
                let condition = stats.volume_condition.unwrap();
                assert_eq!(condition.abnormal, !self.model.mounts.contains_key(&pod), "{}", condition.message);
            }
            Step::Restart => {
                self.driver.kill();
                self.driver.launch();
            }
            Step::Lose { pod } => unmount(&self.driver.target(&pod_name(pod))),
            Step::Reboot { gone } => {
                self.driver.kill();
                kernel::unmount_below(&self.driver.directory);
                for pod in (0..PODS).filter(|pod| gone[*pod]) {
                    fs::remove_dir_all(self.driver.target(&pod_name(pod)).parent().unwrap()).unwrap();
                }
                self.driver.launch();
            }
        }
        Ok(())
    }

    /// The kernel lets go of some things a moment after the last user went; so it gets that moment, and no more than that is forgiven.
    fn compare(&self) {
        let expected = self.model.state();
        let start = Instant::now();
        while State::of(&self.driver) != expected {
            if start.elapsed() > Duration::from_secs(10) {
                assert_eq!(State::of(&self.driver), expected, "the node (left) is not as the model (right)");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(mut self) {
        for (pod, publication) in self.model.records.clone() {
            self.take(Step::Unpublish { volume: publication.volume, pod });
        }
        for volume in 0..VOLUMES.len() {
            self.take(Step::Unstage { volume });
        }
        self.driver.assert_nothing_left();
    }
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- HISTORY_SEED={}, step {}; the last of them:", self.seed, self.steps.len());
            for step in &self.steps[self.steps.len().saturating_sub(30)..] {
                eprintln!("  {step}");
            }
            eprintln!("--- images in {}", self.images.path("").display());
        }
    }
}

/// As `umount -l` does; what is not mounted stays so.
fn unmount(target: &Path) {
    let _ = Command::new("umount").arg("-l").arg(target).output();
}

#[test]
#[ignore = "needs root: make test-host"]
fn whatever_is_called_in_whatever_order_the_node_is_as_the_model_says() {
    let seed = match std::env::var("HISTORY_SEED") {
        Ok(seed) => seed.parse().expect("HISTORY_SEED is a number"),
        Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
    };
    // Zero is the one state that xorshift does not leave.
    let mut random = Random(seed | 1 << 63);
    let mut history = History::new(seed);
    let steps = soak(10_000, 100_000);
    let mut counts = BTreeMap::new();
    for _ in 0..steps {
        let step = random.step(&history.model);
        history.take(step);
        let last = history.steps.last().unwrap();
        let kind = last.split(' ').next().unwrap().trim_end_matches([':', ',']).to_owned();
        let outcome = if last.ends_with("Ok(())") { "done" } else { "refused" };
        *counts.entry((kind, outcome)).or_insert(0) += 1;
    }
    println!("HISTORY_SEED={seed}, {steps} steps: {counts:?}");
    history.end();
}
