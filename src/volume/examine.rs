//! Trying, ahead of any volume, what volumes will need: an upper layer on the node's disk, and servers that answer.

use std::net::SocketAddr;
use std::path::Path;

use super::blocking;
use super::build::stack_on;
use super::error::{Error, Kind, Result};
use super::record::failed;
use super::{probe, resolve};
use crate::kernel::namespace::PrivateNamespace;
use crate::kernel::nfs::Export;

/// Mounts an overlay, out of sight, whose upper layer is in `data_dir`, or in the nearest directory above that is there.
pub async fn try_overlay(data_dir: &Path) -> Result<()> {
    let there = data_dir.ancestors().find(|directory| directory.is_dir()).unwrap_or(data_dir);
    let directory = there.join(format!(".try-overlay-{}", std::process::id()));
    let mount = move || {
        std::fs::create_dir(&directory).map_err(|error| failed("make directory", &directory, &error))?;
        let tried = PrivateNamespace::new().and_then(|namespace| stack_on(&directory, &namespace));
        std::fs::remove_dir_all(&directory).map_err(|error| failed("remove", &directory, &error))?;
        Ok(tried.map(drop)?)
    };
    blocking::run("try an overlay", mount).await?
}

/// Asks the NFS service of a host at its standard port, at each of its addresses; says which versions answered.
pub async fn ask_server(host: &str) -> Result<String> {
    let mut answers = Vec::new();
    let mut last = Error::new(Kind::Unavailable, format!("ask {host}: the name has no address"));
    for address in resolve::addresses(host).await? {
        for version in ["4.2", "3"] {
            let (host, path) = (host.to_owned(), "/".to_owned());
            let export = Export { host, path, version, read_only: true, options: Vec::new() };
            match probe::ask(&export, SocketAddr::new(address, export.port())).await {
                Ok(()) => answers.push(format!("NFS {} at {address}", &version[..1])),
                Err(error) => last = error.into(),
            }
        }
    }
    if answers.is_empty() { Err(last) } else { Ok(format!("answers {}", answers.join(", "))) }
}
