//! The NFS servers of scenarios: the link to the one of the virtual machine, and one that is stuck.

use std::fs;
use std::io::BufRead;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::run;

/// The server behind a link that is whole again when the scenario ends, however it ends.
pub struct Link;

impl Link {
    pub fn cut() -> Self {
        run("nfs-server", &["cut"]);
        Link
    }

    pub fn restore(self) {}
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = Command::new("nfs-server").arg("restore").status();
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
