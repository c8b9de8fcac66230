//! Kerberos and TLS between the node and its first NFS server, and what can be read on the wire. See `e2e/guest/wire`.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Once;

use super::nfs_server::fresh_caches;
use super::{run, wait_for};

/// Of bytes that nobody has by chance.
const PIECE: usize = 16;

/// The first call makes the realm, with keys of both sides; their daemons run from then on.
pub fn kerberos() {
    static MADE: Once = Once::new();
    MADE.call_once(|| drop(run("wire", &["kerberos"])));
}

/// The first call makes the authority, with certificates of both sides; their daemons run from then on.
pub fn tls() {
    static MADE: Once = Once::new();
    MADE.call_once(|| drop(run("wire", &["tls"])));
}

/// The server's export `/images` with further options, until this goes.
#[must_use = "the export is as it was when this goes"]
pub struct Exported;

impl Exported {
    pub fn with(options: &str) -> Self {
        let options = format!("rw,no_subtree_check,no_root_squash,insecure,{options}");
        run("nfs-server", &["exec", "exportfs", "-o", &options, "*:/images"]);
        Exported
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        let _ = Command::new("nfs-server").args(["exec", "exportfs", "-ra"]).status();
    }
}

/// A daemon that does not run, until this goes.
#[must_use = "the daemon is back when this goes"]
pub struct Stopped(&'static str);

impl Stopped {
    pub fn daemon(name: &'static str) -> Self {
        run("wire", &["stop", name]);
        Stopped(name)
    }

    pub fn start(self) {}
}

/// It has read its files anew after this.
pub fn restart(daemon: &'static str) {
    Stopped::daemon(daemon).start();
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = Command::new("wire").args(["start", self.0]).status();
    }
}

/// Whether some of the content of a file of `directory` crosses the wire as it is, when it is read from the server.
///
/// The file must be one that no compression makes smaller, so that the image has it as it is.
pub fn is_readable_on_the_wire(directory: &Path, file: &str, original: &Path) -> bool {
    let capture = Capture::start();
    fresh_caches();
    let read = fs::read(directory.join(file)).unwrap();
    let captured = capture.end();
    assert!(captured.len() > read.len(), "the capture has {} bytes of a file of {}", captured.len(), read.len());
    let original = fs::read(original).unwrap();
    assert!(read == original, "{file} has another content");
    // Packets end anywhere, but not in each of these pieces.
    let pieces: HashSet<&[u8]> = original.chunks_exact(4096).map(|part| &part[..PIECE]).collect();
    captured.windows(PIECE).any(|window| pieces.contains(window))
}

struct Capture {
    process: Child,
    file: tempfile::NamedTempFile,
}

impl Capture {
    fn start() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut process = Command::new("tcpdump")
            .args(["-i", "nfs0", "-U", "-B", "65536", "-Z", "root", "-w"])
            .arg(file.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        lines.find(|line| line.as_ref().unwrap().contains("listening on")).expect("tcpdump listens").unwrap();
        // It would end by writing to nobody.
        std::thread::spawn(move || lines.for_each(drop));
        Capture { process, file }
    }

    fn end(mut self) -> Vec<u8> {
        // What the kernel has for it is written by then.
        let mut size = 0;
        wait_for("the capture to be complete", || {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let before = std::mem::replace(&mut size, self.file.as_file().metadata().unwrap().len());
            size == before && size > 0
        });
        run("kill", &["-INT", &self.process.id().to_string()]);
        self.process.wait().unwrap();
        fs::read(self.file.path()).unwrap()
    }
}
