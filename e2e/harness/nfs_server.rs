//! The NFS servers of scenarios: the two of the virtual machine, and one that is stuck.

use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::run;

/// A server of the virtual machine. See `e2e/guest/nfs-server`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NfsServer {
    number: &'static str,
    /// The variable with its address.
    address: &'static str,
    images: &'static str,
    link: &'static str,
}

impl NfsServer {
    /// The one that is there from the beginning.
    pub const FIRST: NfsServer = NfsServer { number: "1", address: "NFS_SERVER", images: "/images", link: "nfs0" };

    /// The other one, which is started by the first scenario that wants it.
    pub fn second() -> Self {
        let second = NfsServer { number: "2", address: "NFS_SERVER2", images: "/images2", link: "nfs1" };
        second.control("start");
        second
    }

    /// Both.
    pub fn two() -> [Self; 2] {
        [NfsServer::FIRST, NfsServer::second()]
    }

    pub fn address(self) -> String {
        std::env::var(self.address).expect("this runs in the VM: e2e/vm run")
    }

    /// Where the node finds what the server exports as `/images`, without any NFS in between.
    pub fn images(self) -> &'static Path {
        Path::new(self.images)
    }

    /// Gives it what another one has.
    pub fn copy_from(self, other: Self, image: &str) -> PathBuf {
        let copy = self.images.to_owned() + "/" + image;
        run("cp", &[other.images().join(image).to_str().unwrap(), &copy]);
        copy.into()
    }

    /// The link is cut: silence.
    pub fn cut(self) -> Link {
        self.control("cut");
        Link { server: self, end: "restore" }
    }

    /// The machine is gone: silence, and a server without memory when it is back.
    pub fn kill(self) -> Link {
        self.control("kill");
        Link { server: self, end: "start" }
    }

    /// The server ends in good order: connections are refused.
    pub fn stop(self) -> Link {
        self.control("stop");
        Link { server: self, end: "start" }
    }

    /// The bytes that the node has received from it; the server's own counters are those of both before Linux 6.9.
    pub fn received(self) -> u64 {
        let counter = fs::read_to_string(format!("/sys/class/net/{}/statistics/rx_bytes", self.link)).unwrap();
        counter.trim().parse().unwrap()
    }

    fn control(self, verb: &str) {
        run("nfs-server", &[self.number, verb]);
    }
}

/// The way to a server that is out of reach, until the scenario ends, however it ends.
#[must_use = "the server is back when this goes"]
pub struct Link {
    server: NfsServer,
    end: &'static str,
}

impl Link {
    /// That to the first server.
    pub fn cut() -> Self {
        NfsServer::FIRST.cut()
    }

    pub fn restore(self) {}
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = Command::new("nfs-server").args([self.server.number, self.end]).status();
    }
}

/// The server at another address, until this goes.
pub struct OtherAddress;

impl OtherAddress {
    pub const NEW: &str = "10.99.0.3";

    /// The server has this one too.
    pub fn added() -> Self {
        // Where the link is cut nobody tells who has it: see `e2e/guest/nfs-server`.
        run(
            "ip",
            &["neighbour", "replace", Self::NEW, "lladdr", "02:00:00:00:00:02", "dev", "nfs0", "nud", "permanent"],
        );
        run("nfs-server", &["exec", "ip", "address", "replace", &format!("{}/32", Self::NEW), "dev", "eth0"]);
        OtherAddress
    }

    /// The server has this one alone: what is sent to the old one is lost.
    pub fn instead(old: &str) -> Self {
        let other = Self::added();
        run("nfs-server", &["exec", "ip", "address", "delete", &format!("{old}/24"), "dev", "eth0"]);
        run("nfs-server", &["exec", "ip", "route", "replace", "10.99.0.0/24", "dev", "eth0"]);
        other
    }
}

impl Drop for OtherAddress {
    fn drop(&mut self) {
        let old = format!("{}/24", std::env::var("NFS_SERVER").unwrap());
        let new = format!("{}/32", Self::NEW);
        for arguments in [["replace", &old], ["delete", &new]] {
            let address = ["exec", "ip", "address", arguments[0], arguments[1], "dev", "eth0"];
            let _ = Command::new("nfs-server").args(address).status();
        }
    }
}

/// Something that takes connections on this node, answers the NULL call, and says no more until it is dropped.
pub struct StuckServer {
    port: u16,
    process: Child,
}

impl StuckServer {
    pub fn start() -> Self {
        let program = "
import socketserver
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        call = self.request.recv(44, 0x100)
        self.request.sendall(bytes([128, 0, 0, 24]) + call[4:8] + bytes([0, 0, 0, 1]) + bytes(16))
        while self.request.recv(4096):
            pass
socketserver.ThreadingTCPServer.request_queue_size = 1024
server = socketserver.ThreadingTCPServer(('', 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
";
        let mut process = Command::new("python3").args(["-c", program]).stdout(Stdio::piped()).spawn().unwrap();
        let mut port = String::new();
        std::io::BufReader::new(process.stdout.take().unwrap()).read_line(&mut port).unwrap();
        StuckServer { port: port.trim().parse().unwrap(), process }
    }

    /// The spec of one of its exports.
    pub fn export(&self, path: &str) -> Value {
        self.export_at("127.0.0.1", path)
    }

    /// The same at another of its addresses, which are all of 127.0.0.0/8.
    pub fn export_at(&self, host: &str, path: &str) -> Value {
        json!({"kind": "nfs", "nfs": {"host": host, "path": path, "ro": true, "options": [format!("port={}", self.port)]}})
    }
}

impl Drop for StuckServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What is read after this is read from the server.
pub fn fresh_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}
