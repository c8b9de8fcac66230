//! The directory of copies: what it takes in, what it gives out, and what it keeps whatever happens.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::copy::{Progress, copy};
use super::*;
use crate::kernel::loop_device::{LoopDevice, Purpose, Reads};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

const QUOTA: Bounds = Bounds { quota: 1 << 30, min_free: 1 };

/// A directory with a store in it, and files to copy beside it.
struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(&directory.path().join("cache"), "a.csi.dev").unwrap();
        Fixture { directory, store }
    }

    /// A file of this size, and what it is to the server.
    fn source(&self, name: &str, size: usize) -> (File, Original) {
        let path = self.directory.path().join(name);
        let bytes: Vec<u8> = (0..size).map(|at| (at / 7 + name.len()) as u8).collect();
        std::fs::write(&path, bytes).unwrap();
        let file = File::open(path).unwrap();
        let (content, changed) = Image::look_again(&file).unwrap();
        let (server, mount, export) = ("nfs".into(), "vers=4.2".into(), "/images".into());
        let name = Name { server, mount, export, path: name.into() };
        (file, Original::new(name, content, changed))
    }

    fn copy(&self, source: &(File, Original), bounds: Bounds) -> Result<()> {
        let mut part = self.store.begin(&source.1, bounds)?.unwrap();
        let digest = copied(&source.0, &mut part)?;
        part.complete(&digest)
    }

    fn bytes(&self, original: &Original) -> Option<Vec<u8>> {
        let (_, mut file) = self.store.get(original).unwrap()?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        Some(bytes)
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join("cache")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn copied(source: &File, part: &mut store::Part) -> Result<Digest> {
    copy(source, part, None, &Arc::default()).map_err(|failure| failure.error)
}

#[test]
fn a_copy_is_found_when_it_is_complete_and_only_as_that_content() {
    let fixture = Fixture::new();
    let source = fixture.source("a", 3_000_001);
    assert!(fixture.bytes(&source.1).is_none());
    fixture.copy(&source, QUOTA).unwrap();
    assert_eq!(fixture.bytes(&source.1).unwrap(), std::fs::read(fixture.directory.path().join("a")).unwrap());
    assert!(fixture.store.begin(&source.1, QUOTA).unwrap().is_none(), "what was done is not done again");
    let other = Original { changed: source.1.changed + 1, ..source.1.clone() };
    assert!(fixture.bytes(&other).is_none());
    let entry = &fixture.store.entries().unwrap()[0];
    let digest = Digest(
        sha2::Digest::finalize(sha2::Digest::chain_update(
            <sha2::Sha256 as sha2::Digest>::new(),
            fixture.bytes(&source.1).unwrap(),
        ))
        .into(),
    );
    assert!(entry.has(Some(digest)) && !entry.has(Some(Digest([0; 32]))));
}

#[test]
fn a_copy_that_was_cut_short_is_not_used_and_goes_on_where_it_was() {
    let fixture = Fixture::new();
    let (file, original) = fixture.source("a", 5 << 20);
    let mut part = fixture.store.begin(&original, QUOTA).unwrap().unwrap();
    let bytes = std::fs::read(fixture.directory.path().join("a")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(part.file(), &bytes[..3 << 20], 0).unwrap();
    part.sync(3 << 20).unwrap();
    // Written, and not known to be on the disk.
    std::os::unix::fs::FileExt::write_all_at(part.file(), &[0xff; 1 << 20], 3 << 20).unwrap();
    assert!(fixture.store.begin(&original, QUOTA).unwrap().is_none(), "one at a time");
    drop(part);
    assert!(fixture.bytes(&original).is_none());
    let store = Store::new(&fixture.directory.path().join("cache"), "a.csi.dev").unwrap();
    store.sweep().unwrap();
    let before = metrics::cache().copied_bytes.get();
    let mut part = store.begin(&original, QUOTA).unwrap().unwrap();
    assert_eq!(part.entry.synced, 3 << 20);
    let digest = copied(&file, &mut part).unwrap();
    assert!(metrics::cache().copied_bytes.get() >= before + (2 << 20));
    part.complete(&digest).unwrap();
    assert_eq!(fixture.bytes(&original).unwrap(), bytes);
}

#[test]
fn a_copy_that_had_its_name_and_no_description_yet_is_completed() {
    let fixture = Fixture::new();
    let (file, original) = fixture.source("a", 2 << 20);
    let mut part = fixture.store.begin(&original, QUOTA).unwrap().unwrap();
    copied(&file, &mut part).unwrap();
    drop(part);
    let path = |kind| fixture.directory.path().join("cache").join(format!("{}.{kind}", original.id()));
    std::fs::rename(path("part"), path("image")).unwrap();
    assert!(fixture.bytes(&original).is_none(), "it is not described as complete");
    let mut part = fixture.store.begin(&original, QUOTA).unwrap().unwrap();
    let digest = copied(&file, &mut part).unwrap();
    part.complete(&digest).unwrap();
    assert!(fixture.bytes(&original).is_some());
}

#[test]
fn a_copy_whose_bytes_somebody_removed_is_made_again() {
    let fixture = Fixture::new();
    let source = fixture.source("a", 2 << 20);
    fixture.copy(&source, QUOTA).unwrap();
    std::fs::remove_file(fixture.directory.path().join("cache").join(format!("{}.image", source.1.id()))).unwrap();
    assert!(fixture.bytes(&source.1).is_none());
    fixture.copy(&source, QUOTA).unwrap();
    assert!(fixture.bytes(&source.1).is_some());
}

#[test]
fn a_copy_that_cannot_be_marked_as_of_the_past_is_forgotten_and_who_uses_it_keeps_it() {
    let fixture = Fixture::new();
    for is_used in [false, true] {
        let source = fixture.source("a", 1 << 20);
        fixture.copy(&source, QUOTA).unwrap();
        let used = fixture.store.get(&source.1).unwrap().filter(|_| is_used);
        let new = fixture.directory.path().join("cache").join(format!("{}.new", source.1.id()));
        // In its place nothing can be written.
        std::fs::create_dir(&new).unwrap();
        fixture.store.confirm(&source.1.name, None).unwrap_or_default();
        std::fs::remove_dir(&new).unwrap();
        assert!(fixture.store.entries().unwrap().is_empty());
        fixture.store.sweep().unwrap();
        assert_eq!(fixture.files().len(), if is_used { 2 } else { 1 }, "{:?}", fixture.files());
        drop(used);
        fixture.store.sweep().unwrap();
        assert_eq!(fixture.files(), ["driver"]);
    }
}

#[test]
fn an_image_that_changes_while_it_is_copied_has_no_copy() {
    let fixture = Fixture::new();
    for change in [1_u64, 4 << 20] {
        let (file, original) = fixture.source("a", 3 << 20);
        let mut part = fixture.store.begin(&original, QUOTA).unwrap().unwrap();
        // It grows, or shrinks.
        let writable = File::options().write(true).open(fixture.directory.path().join("a")).unwrap();
        writable.set_len(change).unwrap();
        let error = copied(&file, &mut part).unwrap_err();
        assert_eq!(error.kind, Kind::Aborted, "{error}");
        part.discard().unwrap();
        assert_eq!(fixture.files(), ["driver"]);
    }
}

#[test]
fn what_was_used_longest_ago_makes_way_and_never_what_is_in_use() {
    let fixture = Fixture::new();
    let bounds = Bounds { quota: 3 * ((1 << 20) + (64 << 10)), min_free: 1 };
    let sources: Vec<_> = ["a", "b", "c", "d"].map(|name| fixture.source(name, 1 << 20)).into();
    for source in &sources[..3] {
        fixture.copy(source, bounds).unwrap();
    }
    let used = fixture.store.get(&sources[0].1).unwrap().unwrap();
    fixture.store.get(&sources[1].1).unwrap().unwrap();
    fixture.copy(&sources[3], bounds).unwrap();
    let there = |fixture: &Fixture| {
        let there = sources.iter().map(|(_, original)| fixture.store.peek(original).unwrap().is_some());
        there.collect::<Vec<_>>()
    };
    assert_eq!(there(&fixture), [true, true, false, true]);
    let held: Vec<_> = [1, 3].map(|at: usize| fixture.store.get(&sources[at].1).unwrap().unwrap()).into();
    let error = fixture.copy(&sources[2], bounds).unwrap_err();
    assert_eq!(error.kind, Kind::ResourceExhausted, "{error}");
    assert!(error.message.contains("in use"), "{error}");
    assert_eq!(there(&fixture), [true, true, false, true], "nothing is lost for what does not fit");
    drop((used, held));
    // What the server has no more goes before what was used longer ago.
    let new = Original { changed: 1, ..sources[3].1.clone() };
    fixture.store.confirm(&new.name, Some(&new)).unwrap();
    fixture.copy(&sources[2], bounds).unwrap();
    assert_eq!(there(&fixture), [true, true, true, false]);
}

#[test]
fn an_image_larger_than_the_quota_and_a_disk_with_no_room_are_refused_and_leave_nothing() {
    let fixture = Fixture::new();
    let source = fixture.source("a", 1 << 20);
    for bounds in [Bounds { quota: 1 << 20, min_free: 1 }, Bounds { quota: 1 << 30, min_free: u64::MAX / 2 }] {
        let error = fixture.copy(&source, bounds).unwrap_err();
        assert_eq!(error.kind, Kind::ResourceExhausted, "{error}");
        assert_eq!(fixture.files(), ["driver"]);
    }
}

#[test]
fn a_directory_that_others_could_write_to_is_not_trusted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cache");
    let refused = |path: &Path, name: &str, why: &str| {
        let error = Store::new(path, name).unwrap_err();
        assert!(error.message.contains(why), "{error}");
    };
    Store::new(&path, "a.csi.dev").unwrap();
    Store::new(&path, "a.csi.dev").unwrap();
    refused(&path, "b.csi.dev", "that of the driver a.csi.dev");
    symlink(&path, directory.path().join("link")).unwrap();
    refused(&directory.path().join("link"), "a.csi.dev", "a symlink or no directory");
    std::fs::write(directory.path().join("file"), "").unwrap();
    Store::new(&directory.path().join("file"), "a.csi.dev").unwrap_err();
    refused(directory.path(), "a.csi.dev", "is in it: give the driver one of its own");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o770)).unwrap();
    refused(&path, "a.csi.dev", "others may write to it");
    let cache = Cache::new(
        CacheConfig { directory: path, bounds: QUOTA, rate: None, copies: 1, by_default: true },
        "a.csi.dev",
    );
    assert!(cache.on.is_err(), "and the driver goes on without it");
}

#[test]
fn what_is_torn_or_left_over_is_swept_and_what_is_in_use_is_not() {
    let fixture = Fixture::new();
    let source = fixture.source("a", 1 << 20);
    fixture.copy(&source, QUOTA).unwrap();
    let cache = fixture.directory.path().join("cache");
    let (torn, left) = (["0123456789abcdef"; 2].join("-"), ["fedcba9876543210"; 2].join("-"));
    std::fs::write(cache.join(format!("{torn}.json")), "{").unwrap();
    std::fs::write(cache.join(format!("{torn}.part")), "x").unwrap();
    std::fs::write(cache.join(format!("{left}.image")), "x").unwrap();
    std::fs::write(cache.join("of-somebody.else"), "x").unwrap();
    let used = File::open(cache.join(format!("{left}.image"))).unwrap();
    rustix::fs::flock(&used, rustix::fs::FlockOperation::LockShared).unwrap();
    fixture.store.sweep().unwrap();
    let id = source.1.id();
    assert_eq!(fixture.files().len(), 5, "{:?}", fixture.files());
    drop(used);
    fixture.store.sweep().unwrap();
    let mut expected = ["driver", "of-somebody.else"].map(str::to_owned).to_vec();
    expected.extend(["image", "json"].map(|kind| format!("{id}.{kind}")));
    expected.sort();
    assert_eq!(fixture.files(), expected);
}

#[test]
fn bytes_that_the_disk_did_not_keep_are_found_and_thrown_away() {
    let fixture = Fixture::new();
    let (good, bad) = (fixture.source("good", 1 << 20), fixture.source("bad", 1 << 20));
    let cache = fixture.directory.path().join("cache");
    for source in [&good, &bad] {
        fixture.copy(source, QUOTA).unwrap();
    }
    let path = cache.join(format!("{}.image", bad.1.id()));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 2], 700_000).unwrap();
    let mut seen = Vec::new();
    by_hand::verify(&cache, |entry, verified| seen.push((entry.original.name.file(), verified))).unwrap();
    seen.sort_by(|one, other| one.0.cmp(&other.0));
    let expected =
        [("/images/bad".to_owned(), by_hand::Verified::Wrong), ("/images/good".to_owned(), by_hand::Verified::Right)];
    assert_eq!(seen, expected);
    assert!(fixture.bytes(&bad.1).is_none() && fixture.bytes(&good.1).is_some());
}

#[test]
fn copies_are_evicted_by_name_unless_they_are_in_use() {
    let fixture = Fixture::new();
    let cache = fixture.directory.path().join("cache");
    let sources = ["one", "two"].map(|name| fixture.source(name, 1 << 20));
    for source in &sources {
        fixture.copy(source, QUOTA).unwrap();
    }
    let used = fixture.store.get(&sources[0].1).unwrap();
    let mut told = Vec::new();
    let mut evict = |images: &[&str]| {
        let images: Vec<_> = images.iter().map(|image| (*image).to_owned()).collect();
        by_hand::evict(&cache, &images, |entry, evicted| told.push((entry.original.name.file(), evicted)))
    };
    evict(&["/images/"]).unwrap();
    assert_eq!(evict(&["three"]).unwrap_err().kind, Kind::NotFound);
    drop(used);
    evict(&["one"]).unwrap();
    told.sort();
    let expected = [("/images/one", false), ("/images/one", true), ("/images/two", true)];
    assert_eq!(told, expected.map(|(path, evicted)| (path.to_owned(), evicted)));
    assert_eq!(fixture.files(), ["driver"]);
    assert!(by_hand::list(&fixture.directory.path().join("absent")).unwrap().is_empty());
}

#[test]
fn a_loop_device_stands_on_a_copy_by_the_file_that_it_has_and_not_by_the_name_of_that() {
    let fixture = Fixture::new();
    let source = fixture.source("a", 1 << 20);
    fixture.copy(&source, QUOTA).unwrap();
    let (id, cache) = (source.1.id(), fixture.directory.path().join("cache"));
    let of = |file: &Path, end: &str| {
        let (device, path) = (LoopDevice::of_number(7, File::open(file).unwrap().into()), file.display());
        let content = Image::look_again(&File::open(file).unwrap()).unwrap().0;
        let identity = Image::copy(File::open(file).unwrap(), content, source.1.changed).unwrap().identity;
        let backing_file = Some(format!("{path}{end}"));
        Attached { device, identity, purpose: Purpose::FileSystem, backing_file, reads: Reads::default() }
    };
    let copy = cache.join(format!("{id}.image"));
    assert_eq!(fixture.store.below(&of(&copy, "")), Some(id.clone()));
    assert_eq!(fixture.store.image_below(&of(&copy, "")).as_deref(), Some("/images/a"));
    let elsewhere = fixture.directory.path().join(format!("{id}.image"));
    std::fs::write(&elsewhere, "of somebody").unwrap();
    assert_eq!(fixture.store.below(&of(&elsewhere, "")), None);
    for other in ["a", "cache/driver"] {
        assert_eq!(fixture.store.below(&of(&fixture.directory.path().join(other), "")), None);
    }
    let device = of(&copy, " (deleted)");
    std::fs::remove_file(copy).unwrap();
    assert_eq!(fixture.store.below(&device), Some(id));
}

/// Of a test; what is only waited for, it waits for as long as it takes.
const PATIENCE: Duration = Duration::from_millis(20);

fn making() -> Arc<Making> {
    Arc::new(Making::new(1).with_patience(PATIENCE))
}

/// A copy that never ends, from a server that owes what was asked for last or none.
fn copying(making: &Arc<Making>, server: &'static str, progress: &Arc<Progress>) {
    let (making, progress) = (Arc::clone(making), Arc::clone(progress));
    tokio::spawn(async move { making.in_turn(server, &progress, std::future::pending::<Result<()>>()).await });
}

async fn until_stalled(making: &Making, server: &str, copies: usize) {
    while making.stalled(server) != copies {
        tokio::time::sleep(PATIENCE).await;
    }
}

/// Whether a copy has its turn; one that is not given in all that time is not given.
async fn is_begun(making: &Making, server: &str) -> bool {
    tokio::time::timeout(PATIENCE * 10, making.in_turn(server, &Progress::default(), async { Ok(()) })).await.is_ok()
}

#[tokio::test]
async fn a_server_that_gives_nothing_holds_up_two_copies_and_no_other_is_begun_from_it() {
    let making = making();
    let progress = [Arc::<Progress>::default(), Arc::default()];
    let owed = progress.each_ref().map(|progress| progress.ask());
    for progress in &progress {
        copying(&making, "slow", progress);
    }
    until_stalled(&making, "slow", 2).await;
    let error = making.in_turn("slow", &Progress::default(), async { Ok(()) }).await.unwrap_err();
    assert!(error.message.contains("2 copies from slow get nothing"), "{error}");
    making.in_turn("other", &Progress::default(), async { Ok(()) }).await.unwrap();
    // What it owes it gives: one has its turn back, and others wait for it again.
    drop(owed);
    until_stalled(&making, "slow", 1).await;
    assert!(!is_begun(&making, "other").await);
}

#[tokio::test]
async fn a_copy_that_is_busy_on_this_node_is_no_word_about_its_server() {
    let making = making();
    copying(&making, "fast", &Arc::default());
    tokio::time::sleep(PATIENCE * 4).await;
    assert!(!is_begun(&making, "other").await, "it keeps its turn");
    assert_eq!(making.stalled("fast"), 0);
}

/// Images come and go, and are used meanwhile: never more than the quota, never a wrong byte.
#[test]
fn the_quota_holds_through_many_rounds() {
    let fixture = Fixture::new();
    let rounds = if std::env::var_os("SOAK").is_some() { 2000 } else { 100 };
    let sources: Vec<_> = (0..9).map(|at| fixture.source(&format!("{at}"), (at + 1) * 10_000)).collect();
    let all: u64 = sources.iter().map(|(_, original)| original.size + (64 << 10)).sum();
    let bounds = Bounds { quota: all / 3, min_free: 1 };
    let (mut held, mut random) = (HashMap::new(), 1_u64);
    for round in 0..rounds {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (random >> 33) as usize % sources.len();
        let (source, (_, original)) = (&sources[at], &sources[at]);
        if fixture.store.peek(original).unwrap().is_none() {
            match fixture.copy(source, bounds) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind, Kind::ResourceExhausted, "round {round}: {error}"),
            }
        }
        if let Some(bytes) = fixture.bytes(original) {
            let path = fixture.directory.path().join(format!("{at}"));
            assert!(bytes == std::fs::read(path).unwrap(), "round {round}");
        }
        match random >> 60 {
            0..3 => drop(held.insert(at, fixture.store.get(original).unwrap())),
            3..9 => drop(held.remove(&at)),
            _ => {}
        }
        assert!(fixture.store.usage().unwrap() <= bounds.quota, "round {round}");
        for (at, copy) in &held {
            assert!(copy.is_none() || fixture.store.peek(&sources[*at].1).unwrap().is_some(), "round {round}");
        }
    }
}
