//! The directory that images are written to: an export of an NFS server, mounted where they are made.
//!
//! A file has its name when it is complete and on the server's disk, and never changes from then on: who makes the same one meanwhile
//! leaves the first, which nodes may have open. Nobody who reads waits for anybody. Who would make what another is making waits for that, so
//! that no layer is fetched twice: each locks its file, which NFS tells the server, and the lock goes with its process. Where
//! locks are not known, or the other takes too long, both make the file.
//!
//! All who make images share another lock, which `kubectl squashfs gc` wants for itself: it deletes no layer that a new image is to have.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use csi_driver_squashfs::kernel::file_lock::{Lock, try_lock};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tempfile::NamedTempFile;

/// The end of what is not complete. It begins with a dot.
const UNFINISHED: &str = ".new";
/// How long nothing is written to such a file until it is taken for that of a builder that has died.
const LEFT: Duration = Duration::from_secs(24 * 60 * 60);
/// How long one who makes a file is waited for, and how often it is asked whether he is done.
const PATIENCE: Duration = Duration::from_secs(60 * 60);
const ASKED: Duration = Duration::from_millis(500);
/// What all who make images lock.
const LOCK: &str = ".lock";

pub struct Store {
    directory: PathBuf,
    patience: Duration,
    /// Held while images are made; `None` where locks are not known.
    _lock: Option<File>,
}

/// Whether a file was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    Now,
    Before,
}

impl Store {
    /// Throws away what builders left that have died.
    pub fn open(directory: &Path) -> Result<Store> {
        let sweep = || -> io::Result<()> {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let name = entry.file_name();
                let is_unfinished =
                    name.to_str().is_some_and(|name| name.starts_with('.') && name.ends_with(UNFINISHED));
                let is_left = || -> io::Result<bool> {
                    let (metadata, now) = (entry.metadata()?, SystemTime::now());
                    Ok(metadata.is_file() && now.duration_since(metadata.modified()?).is_ok_and(|age| age > LEFT))
                };
                if is_unfinished && is_left().or_else(unless_gone)? {
                    // What is somebody else's is in nobody's way.
                    if let Err(error) = fs::remove_file(entry.path()).or_else(unless_gone::<()>) {
                        eprintln!("remove {}, which a builder left: {error}", entry.path().display());
                    }
                }
            }
            Ok(())
        };
        sweep().with_context(|| format!("look into {}", directory.display()))?;
        let lock = share_lock(&directory.join(LOCK)).unwrap_or_else(|error| {
            eprintln!("share {LOCK} in {}: {error}: do not run 'gc' there meanwhile", directory.display());
            Locked::Never
        });
        let lock = match lock {
            Locked::By(file) => Some(file),
            Locked::Never => None,
            Locked::ByAnother => bail!("{LOCK} in {} is another's: 'gc' is at work there", directory.display()),
        };
        Ok(Store { directory: directory.to_owned(), patience: PATIENCE, _lock: lock })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn has(&self, name: &str) -> Result<bool> {
        let path = self.path(name);
        path.try_exists().with_context(|| format!("look for {}", path.display()))
    }

    /// Gives the file that `make` makes this name, unless there is one by now.
    pub fn make(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Made> {
        let (directory, path) = (&self.directory, self.path(name));
        let Some(begun) = self.begin(name)? else { return Ok(Made::Before) };
        let new = begun.path();
        make(new)?;
        let on_disk = || -> io::Result<()> {
            fs::set_permissions(new, Permissions::from_mode(0o644))?;
            File::open(new)?.sync_all()
        };
        on_disk().with_context(|| format!("write {}", new.display()))?;
        let made = name_it(new, &path).with_context(|| format!("make {}", path.display()))?;
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .with_context(|| format!("write {}", directory.display()))?;
        Ok(made)
    }

    /// A file that will have this name, which goes with the value; `None` where there is one by now.
    fn begin(&self, name: &str) -> Result<Option<NamedTempFile>> {
        let (prefix, start) = (format!(".{name}."), Instant::now());
        let (write, look) = (
            || format!("write into {}", self.directory.display()),
            || format!("look whether another makes {name} in {}", self.directory.display()),
        );
        let mut is_told = false;
        loop {
            if self.has(name)? {
                return Ok(None);
            }
            let has_patience = start.elapsed() < self.patience;
            if !has_patience || self.makers(&prefix).with_context(look)?.is_empty() {
                // A name that nobody else has, on whichever machine he is.
                let new = tempfile::Builder::new().prefix(&prefix).suffix(UNFINISHED).tempfile_in(&self.directory);
                let new = new.with_context(write)?;
                lock_mine(new.as_file());
                let mine = new.path().file_name();
                // Of those who begin at once, the first by its name goes on.
                if !has_patience || self.makers(&prefix).with_context(look)?.iter().all(|other| mine <= Some(other)) {
                    // It may be there since: NFS believes for a while that it is not, but not after this directory has changed.
                    return Ok((!self.has(name)?).then_some(new));
                }
            }
            if !std::mem::replace(&mut is_told, true) {
                eprintln!("{name}: another makes it");
            }
            sleep(ASKED);
        }
    }

    /// The unfinished files that begin like this and that a living process makes.
    fn makers(&self, prefix: &str) -> io::Result<Vec<OsString>> {
        let mut makers = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_of = |name: &str| name.starts_with(prefix) && name.ends_with(UNFINISHED);
            if !name.to_str().is_some_and(is_of) {
                continue;
            }
            // One that is gone, or another's, is waited for by nobody.
            let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
            if matches!(try_lock(&file, Lock::Alone), Ok(false)) {
                makers.push(name);
            }
        }
        Ok(makers)
    }
}

/// Nobody waits for one that cannot be locked; who looks whether it is has it locked for a moment.
fn lock_mine(file: &File) {
    for _ in 0..20 {
        if !matches!(try_lock(file, Lock::Alone), Ok(false)) {
            return;
        }
        sleep(ASKED / 10);
    }
}

/// How it went to lock what all share.
enum Locked {
    By(File),
    /// For an hour.
    ByAnother,
    Never,
}

/// Waits for one who has it alone.
fn share_lock(path: &Path) -> io::Result<Locked> {
    // Anybody who may write there may have laid something else there.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let all = Mode::from_raw_mode(0o666);
    let file = match rustix::fs::open(path, flags | OFlags::RDWR | OFlags::CREATE, all) {
        // Another user's.
        Err(Errno::ACCESS) => rustix::fs::open(path, flags | OFlags::RDONLY, Mode::empty()),
        made => made,
    };
    let file = File::from(file?);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() != 1 {
        return Err(io::Error::other("it is no file of its own"));
    }
    // Whoever makes images here, whatever the umask of this process. One of another user has its mode.
    if metadata.mode() & 0o666 != 0o666 && metadata.uid() == rustix::process::geteuid().as_raw() {
        file.set_permissions(Permissions::from_mode(0o666))?;
    }
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        match try_lock(&file, Lock::Shared) {
            Ok(true) => return Ok(Locked::By(file)),
            Ok(false) => sleep(ASKED),
            Err(error) => return Err(io::Error::other(error.to_string())),
        }
    }
    Ok(Locked::ByAnother)
}

/// A file cannot replace another by link(2), and can by rename(2), which is for file systems without links.
fn name_it(new: &Path, path: &Path) -> io::Result<Made> {
    match fs::hard_link(new, path) {
        Ok(()) => Ok(Made::Now),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Made::Before),
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
            if path.try_exists()? {
                return Ok(Made::Before);
            }
            fs::rename(new, path).map(|()| Made::Now)
        }
        Err(error) => Err(error),
    }
}

/// For names that become those of files.
pub fn check_name(name: &str) -> Result<()> {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
    if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.bytes().all(is_known) {
        bail!("{name:?} is no name of an image: up to 100 letters, digits and ._-+, and no dot at its beginning");
    }
    Ok(())
}

fn unless_gone<T: Default>(error: io::Error) -> io::Result<T> {
    match error.kind() {
        ErrorKind::NotFound => Ok(T::default()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != LOCK).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_has_its_name_when_it_is_complete_and_the_first_one_stays() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let write = |text: &'static str| move |new: &Path| Ok(fs::write(new, text)?);
        store.make("a", |_| bail!("no")).unwrap_err();
        store.make("a", |new| write("half")(new).and_then(|()| bail!("no"))).unwrap_err();
        assert_eq!(names(directory.path()), [""; 0]);
        // Another builder is done first.
        let made = store.make("a", |new| {
            assert_eq!(store.make("b", write("b")).unwrap(), Made::Now);
            fs::write(store.path("a"), "the first")?;
            write("the second")(new)
        });
        assert_eq!(made.unwrap(), Made::Before);
        assert_eq!(store.make("a", |_| bail!("it is not made again")).unwrap(), Made::Before);
        assert_eq!(fs::read_to_string(store.path("a")).unwrap(), "the first");
        assert_eq!(names(directory.path()), ["a", "b"]);
    }

    #[test]
    fn what_another_is_making_is_waited_for_as_long_as_he_lives_and_there_is_patience() {
        let directory = tempfile::tempdir().unwrap();
        let store = |patience| Store { directory: directory.path().to_owned(), patience, _lock: None };
        let other = store(PATIENCE).begin("a").unwrap().unwrap();
        assert_eq!(store(ASKED).make("a", |new| Ok(fs::write(new, "impatient")?)).unwrap(), Made::Now);
        fs::remove_file(directory.path().join("a")).unwrap();
        std::thread::scope(|threads| {
            let (store, store_of_b) = (store(PATIENCE), store(PATIENCE));
            let waiting = threads.spawn(move || store.make("a", |_| bail!("it is made twice")).unwrap());
            // Not for that of another name.
            assert_eq!(store_of_b.make("b", |new| Ok(fs::write(new, "b")?)).unwrap(), Made::Now);
            fs::write(other.path(), "a").unwrap();
            name_it(other.path(), &directory.path().join("a")).unwrap();
            drop(other);
            assert_eq!(waiting.join().unwrap(), Made::Before);
        });
        // Of one that has died, the file is there and the lock is not.
        fs::write(directory.path().join(".c.1.new"), "half").unwrap();
        assert_eq!(store(PATIENCE).make("c", |new| Ok(fs::write(new, "c")?)).unwrap(), Made::Now);
    }

    #[test]
    fn who_deletes_and_who_makes_images_wait_for_one_another() {
        let directory = tempfile::tempdir().unwrap();
        let stores = [Store::open(directory.path()).unwrap(), Store::open(directory.path()).unwrap()];
        let gc = File::options().write(true).open(directory.path().join(LOCK)).unwrap();
        assert_eq!(gc.metadata().unwrap().permissions().mode() & 0o777, 0o666);
        assert!(!try_lock(&gc, Lock::Alone).unwrap());
        drop(stores);
        assert!(try_lock(&gc, Lock::Alone).unwrap());
        std::thread::scope(|threads| {
            let opening = threads.spawn(|| Store::open(directory.path()).unwrap());
            sleep(ASKED);
            assert!(!opening.is_finished());
            drop(gc);
            opening.join().unwrap();
        });
    }

    #[test]
    fn the_lock_is_no_file_that_somebody_else_laid_there() {
        let directory = tempfile::tempdir().unwrap();
        let (lock, secret) = (directory.path().join(LOCK), directory.path().join("secret"));
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&secret, &lock).unwrap();
        Store::open(directory.path()).unwrap();
        fs::remove_file(&lock).unwrap();
        fs::hard_link(&secret, &lock).unwrap();
        Store::open(directory.path()).unwrap();
        assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_a_builder_left_that_died_goes_after_a_day() {
        let directory = tempfile::tempdir().unwrap();
        for (name, age) in [(".old.new", 25), (".young.new", 23), ("image", 25), ("image.new", 25), (".hidden", 25)] {
            let file = File::create(directory.path().join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age * 60 * 60)).unwrap();
        }
        fs::create_dir(directory.path().join(".a.new")).unwrap();
        Store::open(directory.path()).unwrap();
        assert_eq!(names(directory.path()), [".a.new", ".hidden", ".young.new", "image", "image.new"]);
    }

    #[test]
    fn a_name_leads_nowhere() {
        for name in ["", ".", "..", "a/b", ".a", "a b", "a\n", &"a".repeat(101)] {
            check_name(name).unwrap_err();
        }
        check_name("tools-1.0_x+y").unwrap();
    }
}
