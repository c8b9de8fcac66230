use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use super::gc::{Outcome, Verdict};
use super::*;
use crate::kernel::file_lock::{Lock, try_lock};
use crate::kubernetes::inventory::Reference;
use crate::spec::parameters::parse_attributes;

const SQUASHFS: u64 = 2048;
const MONTH: Duration = Duration::from_secs(30 * 24 * 60 * 60);

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
}

impl Fixture {
    /// A directory that its server calls /images, with these images and indexes.
    fn new(images: &[&str], indexes: &[(&str, &[&str])]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut head = vec![0; 2048];
        head[..4].copy_from_slice(b"hsqs");
        head[28] = 4;
        head[40..48].copy_from_slice(&SQUASHFS.to_le_bytes());
        for path in images {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, &head).unwrap();
        }
        for (path, layers) in indexes {
            let layers: Vec<_> = layers.iter().map(|layer| format!("{layer:?}")).collect();
            fs::write(directory.path().join(path), format!(r#"{{"layers":[{}]}}"#, layers.join(","))).unwrap();
        }
        let store = Store::open(directory.path(), Some("/images".into())).unwrap();
        Fixture { directory, store }
    }

    fn there(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".lock")
            .collect();
        names.sort();
        names
    }

    /// What nobody names goes at once; by the time that is done, `then` is named.
    fn collect(&self, named: &Inventory, then: &Inventory) -> Vec<(String, Outcome)> {
        let (files, unreadable) = self.store.files(named).unwrap();
        assert!(unreadable.is_empty());
        let judged = self.store.judge(files, SystemTime::now(), Duration::ZERO).into_iter();
        let unused = judged.filter(|(_, verdict)| *verdict == Verdict::Unused).map(|(file, _)| file).collect();
        let mut told = Vec::new();
        let unnamed = self.store.unname(unused, |file, outcome| told.push((file.path.clone(), outcome)));
        unnamed
            .finish(named, &Ok(then.clone()), Duration::ZERO, |file, outcome| told.push((file.path.clone(), outcome)));
        told
    }
}

fn named(paths: &[&str]) -> Inventory {
    let reference =
        |path: &&str| Reference { object: format!("of {path}"), locations: Ok(vec![Location::of_file(path)]) };
    Inventory { references: paths.iter().map(reference).collect(), ..Inventory::default() }
}

fn used_by(store: &Store, inventory: &Inventory) -> Vec<(String, Vec<String>)> {
    let files = store.listed(store.files(inventory).unwrap().0);
    files.into_iter().map(|file| (file.path, file.used_by.into_iter().collect())).collect()
}

#[test]
fn images_are_known_by_their_names_and_by_who_names_them() {
    let it = Fixture::new(&["a.sqsh", "team/b.sqsh", "c.img", ".d.sqsh"], &[("x.json", &["a.sqsh"])]);
    fs::write(it.directory.path().join("no-index.json"), "{}").unwrap();
    let expected =
        [("a.sqsh", vec!["x.json"]), ("team/b.sqsh", vec!["of /srv/images/team/b.sqsh"]), ("x.json", vec![])];
    let expected = expected.map(|(path, by)| (path.to_owned(), by.into_iter().map(str::to_owned).collect::<Vec<_>>()));
    assert_eq!(used_by(&it.store, &named(&["/srv/images/team/b.sqsh"])), expected);
}

#[test]
fn an_image_on_several_servers_is_in_use_on_each_of_them() {
    let volume = [("server", "a, b, fd00::c"), ("share", "/images"), ("image", "team/a.sqsh")];
    let volume: BTreeMap<_, _> = volume.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let parsed = parse_attributes(&volume, &[]).unwrap();
    let reference = Reference { object: "it".into(), locations: Ok(Location::of(parsed.mount())) };
    let named = Inventory { references: vec![reference], ..Inventory::default() };
    // What a gc sees of each: its own copy, whatever it calls the directory.
    for share in ["/images", "/srv/images", "/"] {
        let mut it = Fixture::new(&["team/a.sqsh", "team/b.sqsh"], &[]);
        it.store = Store::open(it.directory.path(), Some(share.into())).unwrap();
        assert_eq!(it.collect(&named, &named), [("team/b.sqsh".to_owned(), Outcome::Deleted)], "{share}");
    }
}

#[test]
fn an_image_that_is_named_by_a_symlink_is_in_use() {
    let it = Fixture::new(&["a-1.sqsh", "v2/b.sqsh"], &[]);
    symlink("a-1.sqsh", it.directory.path().join("a.sqsh")).unwrap();
    symlink("v2", it.directory.path().join("current")).unwrap();
    let uses = used_by(&it.store, &named(&["/images/a.sqsh", "/images/current/b.sqsh"]));
    assert!(uses.len() == 2 && uses.iter().all(|(_, by)| by.len() == 1), "{uses:?}");
}

#[test]
fn what_nobody_names_is_unused_when_the_time_of_grace_is_over() {
    let it = Fixture::new(
        &["a.sqsh", "b.sqsh", "of-x.sqsh", "of-y.sqsh"],
        &[("x.json", &["of-x.sqsh"]), ("y.json", &["of-y.sqsh"])],
    );
    let files = || it.store.files(&named(&["/images/a.sqsh", "/images/x.json"])).unwrap().0;
    let of = |now, verdict: fn(&Verdict) -> bool| {
        let judged = it.store.judge(files(), now, MONTH).into_iter().filter(|(_, it)| verdict(it));
        judged.map(|(file, _)| file.path).collect::<Vec<_>>()
    };
    let now = SystemTime::now();
    let is_named = |it: &Verdict| matches!(it, Verdict::Named(_));
    // Of an index that is young, the layers are named, for it may be that of a claim to come.
    assert_eq!(of(now, is_named), ["a.sqsh", "of-x.sqsh", "of-y.sqsh", "x.json"]);
    assert_eq!(of(now, |it| *it == Verdict::Young), ["b.sqsh", "y.json"]);
    let later = now + MONTH + Duration::from_secs(60);
    assert_eq!(of(later, is_named), ["a.sqsh", "of-x.sqsh", "x.json"]);
    assert_eq!(of(later, |it| *it == Verdict::Unused), ["b.sqsh", "of-y.sqsh", "y.json"]);
}

#[test]
fn what_is_deleted_goes_with_what_lies_beside_it() {
    let it = Fixture::new(&["a.sqsh", "b.sqsh", "layer.sqsh"], &[("x.json", &["layer.sqsh"])]);
    for companion in ["b.sqsh.root", "b.sqsh.root.minisig", "b.sqsh.profile", "x.json.minisig", "b.sqsh.txt"] {
        fs::write(it.directory.path().join(companion), "").unwrap();
    }
    let named = named(&["/images/a.sqsh"]);
    let told = it.collect(&named, &named);
    assert_eq!(told.len(), 3);
    assert!(told.iter().all(|(_, outcome)| *outcome == Outcome::Deleted), "{told:?}");
    assert_eq!(it.there(), ["a.sqsh", "b.sqsh.txt"]);
}

#[test]
fn where_somebody_names_an_image_meanwhile_all_have_their_names_back() {
    let it = Fixture::new(&["a.sqsh", "b.sqsh", "layer.sqsh"], &[("x.json", &["layer.sqsh"])]);
    let before = it.there();
    // By a symlink, which leads nowhere while the file has no name.
    symlink("b.sqsh", it.directory.path().join("current")).unwrap();
    let told = it.collect(&named(&["/images/c.sqsh"]), &named(&["/images/c.sqsh", "/images/current"]));
    assert!(
        told.len() == 4
            && told.iter().all(|(_, outcome)| matches!(outcome, Outcome::Kept(why) if why.contains("try again")))
    );
    fs::remove_file(it.directory.path().join("current")).unwrap();
    assert_eq!(it.there(), before);
}

#[test]
fn layers_are_in_use_also_by_symlinks_and_by_an_index_that_is_one() {
    let it = Fixture::new(&["base-1.sqsh", "top.sqsh"], &[]);
    let path = |name: &str| it.directory.path().join(name);
    fs::create_dir(path("indexes")).unwrap();
    fs::write(path("indexes/x.json"), r#"{"layers":["top.sqsh"]}"#).unwrap();
    fs::write(path("y.json"), r#"{"layers":["base.sqsh"]}"#).unwrap();
    symlink("indexes/x.json", path("x.json")).unwrap();
    symlink("base-1.sqsh", path("base.sqsh")).unwrap();
    let named = named(&["/images/x.json", "/images/y.json"]);
    assert!(it.collect(&named, &named).is_empty());
}

#[test]
fn a_file_that_was_made_again_since_it_was_looked_at_stays() {
    let it = Fixture::new(&["a.sqsh"], &[]);
    let (files, _) = it.store.files(&named(&[])).unwrap();
    let head = fs::read(it.directory.path().join("a.sqsh")).unwrap();
    fs::write(it.directory.path().join("new"), [head, vec![0; 512]].concat()).unwrap();
    fs::rename(it.directory.path().join("new"), it.directory.path().join("a.sqsh")).unwrap();
    let mut told = Vec::new();
    drop(it.store.unname(files, |_, outcome| told.push(outcome)));
    assert_eq!(told, [Outcome::Kept("it is another by now".into())]);
    assert_eq!(it.there(), ["a.sqsh"]);
}

#[test]
fn nothing_goes_where_the_cluster_cannot_be_asked_again_or_says_what_cannot_be_read() {
    let it = Fixture::new(&["a.sqsh"], &[]);
    let unreadable = Reference { object: "Pod a/b".into(), locations: Err("of a newer driver".into()) };
    let inventory = Inventory { references: vec![unreadable], ..Inventory::default() };
    for (again, why) in [
        (Ok(inventory), "of a newer driver"),
        (Err(crate::error::Error::new(crate::error::Kind::Unavailable, "no API server")), "no API server"),
    ] {
        let (files, _) = it.store.files(&Inventory::default()).unwrap();
        let mut told = Vec::new();
        let unnamed = it.store.unname(files, |_, outcome| told.push(outcome));
        assert_eq!(it.there(), [".a.sqsh.deleted"]);
        unnamed.finish(&Inventory::default(), &again, Duration::ZERO, |_, outcome| told.push(outcome));
        let [Outcome::Kept(kept)] = &told[..] else { panic!("{told:?}") };
        assert!(kept.contains(why), "{kept}");
        assert_eq!(it.there(), ["a.sqsh"]);
    }
}

#[test]
fn what_a_killed_process_left_without_a_name_has_it_again() {
    let it = Fixture::new(&["a.sqsh", "b.sqsh"], &[]);
    let (files, _) = it.store.files(&named(&[])).unwrap();
    let of_a = files.into_iter().filter(|file| file.path == "a.sqsh").collect();
    drop(it.store.unname(of_a, |_, _| {}));
    assert_eq!(it.there(), [".a.sqsh.deleted", "b.sqsh"]);
    it.store.recover().unwrap();
    assert_eq!(it.there(), ["a.sqsh", "b.sqsh"]);
}

#[test]
fn nothing_goes_where_images_are_being_made() {
    let it = Fixture::new(&["a.sqsh"], &[]);
    let path = it.directory.path().join(".lock");
    fs::write(&path, "").unwrap();
    let lock = fs::File::open(path).unwrap();
    assert!(try_lock(&lock, Lock::Shared).unwrap());
    let told = it.collect(&named(&[]), &named(&[]));
    assert!(matches!(&told[..], [(_, Outcome::Kept(why))] if why.contains("being made")), "{told:?}");
    drop(lock);
    assert_eq!(it.collect(&named(&[]), &named(&[])), [("a.sqsh".to_owned(), Outcome::Deleted)]);
}

#[test]
fn what_is_no_image_by_its_content_stays_and_no_symlink_is_followed() {
    let it = Fixture::new(&[], &[]);
    let elsewhere = Fixture::new(&["b.sqsh"], &[]);
    fs::write(it.directory.path().join("a.sqsh"), "what somebody wrote").unwrap();
    symlink(elsewhere.directory.path(), it.directory.path().join("other")).unwrap();
    symlink(elsewhere.directory.path().join("b.sqsh"), it.directory.path().join("b.sqsh")).unwrap();
    let told = it.collect(&named(&[]), &named(&[]));
    assert!(
        matches!(&told[..], [(path, Outcome::Kept(why))] if path == "a.sqsh" && why.contains("squashfs")),
        "{told:?}"
    );
    assert_eq!(elsewhere.there(), ["b.sqsh"]);
}

#[test]
fn the_share_of_a_directory_is_what_the_mount_table_says() {
    let mount = |mount_point: &str, fs_type: &str, source: &str| MountInfo {
        id: 1,
        parent: 0,
        device: (0, 50),
        mount_point: mount_point.into(),
        options: "rw".into(),
        shared: true,
        fs_type: fs_type.into(),
        source: source.into(),
        super_options: String::new(),
    };
    let mounts = [
        mount("/", "ext4", "/dev/vda"),
        mount("/mnt/images", "nfs4", "10.0.0.5:/srv/images"),
        mount("/mnt/root", "nfs4", "[fd00::5]:/"),
    ];
    let share = |path: &str| share_of(Path::new(path), &mounts);
    assert_eq!(share("/mnt/images").as_deref(), Some("/srv/images"));
    assert_eq!(share("/mnt/images/team").as_deref(), Some("/srv/images/team"));
    assert_eq!(share("/mnt/root").as_deref(), Some("/"));
    assert_eq!(share("/mnt/root/team").as_deref(), Some("/team"));
    assert_eq!(share("/srv"), None);
}
