//! The scenarios of the virtual machine: the driver, a real NFS server and a real kernel. `make test-vm` runs them there.
//!
//! They look at the whole machine, so they run one at a time. Elsewhere all of them are ignored, and counted.

#[path = "../harness/mod.rs"]
mod harness;

mod bad_input;
mod commit;
mod copies;
mod device_mapper;
mod grammar;
mod hostpath;
mod killed;
mod layers;
mod modules;
mod moved;
mod operations;
mod outage;
mod prefetch;
mod replicas;
mod sif;
mod story;
mod strangers;
mod verity;
mod wire;

/// The NFS server's IPv4 address.
fn server() -> String {
    std::env::var("NFS_SERVER").expect("this runs in the VM: e2e/vm run")
}

fn server6() -> String {
    std::env::var("NFS_SERVER6").expect("this runs in the VM: e2e/vm run")
}

/// The mount object of the seed scheme, with another host and path.
fn seed(image: &str) -> serde_json::Value {
    serde_json::json!({"kind": "overlay", "overlay": {"lower": [squashfs(image)]}})
}

/// The lower layer of the seed scheme.
fn squashfs(image: &str) -> serde_json::Value {
    attach("squashfs", image, &nfs("4.2"))
}

fn attach(fs_type: &str, image: &str, base: &serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "kind": "attach",
        "attach": {
            "fs_type": fs_type,
            "mount_options": ["ro"],
            "attach": {"kind": "loopback", "loopback": {"path": image, "base": "mount", "mount": base}}
        }
    })
}

fn nfs(version: &str) -> serde_json::Value {
    serde_json::json!({
        "kind": "nfs", "nfs": {"path": "/images", "host": server(), "ro": true, "version": version}
    })
}
