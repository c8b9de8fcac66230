//! What the admin of a cluster allows its users to ask for, in a YAML file. Without one, any NFS server may be used,
//! nothing of the node itself, and only file systems that are read-only by design.
//!
#![doc = concat!("```yaml\n", include_str!("policy/example.yaml"), "```")]

use serde::{Deserialize, Deserializer};

use super::error::{SpecError, quote, unknown};
use super::pattern::{components, covers, matches, names_host};
use super::read::{self, Object, words};
use super::{Attach, Base, Bind, Device, FsType, Loopback, MOUNT_SPEC, Mount, Nfs, options, text};

/// The name of the policy in errors.
const PARAMETER: &str = "policy";
/// The most allowed values that an error lists.
const LISTED: usize = 8;

/// What users may ask for. See the module's example for each field.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    #[serde(deserialize_with = "present_servers")]
    servers: Option<Vec<Server>>,
    host_paths: Paths,
    local_devices: Paths,
    #[serde(deserialize_with = "words")]
    fs_types: Vec<FsType>,
    #[serde(deserialize_with = "present")]
    nfs_options: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Server {
    host: String,
    #[serde(default, deserialize_with = "present")]
    exports: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged, expecting = "must be true, false or a list of paths")]
enum Paths {
    All(bool),
    Below(Vec<String>),
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            servers: None,
            host_paths: Paths::All(false),
            local_devices: Paths::All(false),
            fs_types: vec![FsType::Squashfs, FsType::Erofs],
            nfs_options: None,
        }
    }
}

/// A field that may be absent, but not empty: `servers:` with nothing behind it must not mean "any".
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Vec<T>>, D::Error> {
    Vec::deserialize(deserializer).map(Some)
}

fn present_servers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Server>>, D::Error> {
    let servers: Vec<Object<Server>> = Vec::deserialize(deserializer)?;
    Ok(Some(servers.into_iter().map(|server| server.0).collect()))
}

impl Policy {
    /// Reads a policy of at most 64 KiB. `{}` is the default policy; a text that says nothing at all is refused.
    pub fn parse(text: &str) -> Result<Policy, SpecError> {
        let mut policy: Policy = read::yaml(PARAMETER, text)?;
        policy.validate()?;
        for server in policy.servers.iter_mut().flatten() {
            // In the form that a spec's host has: without brackets, and an IPv6 address in its one spelling.
            if let Ok(host) = text::host(&server.host) {
                server.host = host;
            }
        }
        Ok(policy)
    }

    /// The servers that it names without a pattern.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        let hosts = self.servers.iter().flatten().map(|server| server.host.as_str());
        hosts.filter(|host| !host.contains('*'))
    }

    /// Splits the path of an export that the policy allows into what the admin named and the rest, which a user named, and below which a
    /// user may have made symlinks. The rest is empty where the policy limits no paths of this server.
    pub fn split<'a>(&self, host: &str, path: &'a str) -> (&'a str, &'a str) {
        let servers = self.servers.iter().flatten().filter(|server| names_host(&server.host, host));
        let exports = servers.flat_map(|server| server.exports.iter().flatten());
        let named = exports.filter(|export| covers(export, path)).map(|export| components(export)).max();
        match named {
            Some(named) => {
                let end = path.match_indices('/').map(|(at, _)| at).nth(named).unwrap_or(path.len());
                (if end == 0 { "/" } else { &path[..end] }, path[end..].trim_start_matches('/'))
            }
            None => (path, ""),
        }
    }

    /// Refuses what the policy does not allow, as [`super::error::ErrorKind::Denied`].
    pub(super) fn check(&self, mount: &Mount) -> Result<(), SpecError> {
        mount.try_visit(&mut |at, mount| match mount {
            Mount::Attach(attach) => self.check_attach(&format!("{at}/attach"), attach),
            Mount::Bind(Bind { base: Base::Root, path, .. }) => {
                self.host_paths.check(&format!("{at}/bind/path"), &format!("/{path}"))
            }
            Mount::Nfs(nfs) => self.check_nfs(&format!("{at}/nfs"), nfs),
            Mount::Bind(Bind { base: Base::Mount(_), .. }) | Mount::Overlay(_) => Ok(()),
        })
    }

    fn check_attach(&self, at: &str, attach: &Attach) -> Result<(), SpecError> {
        if !self.fs_types.contains(&attach.fs_type) {
            let known = self.fs_types.iter().map(|fs_type| fs_type.as_str());
            let what = format!("file system \"{}\"", attach.fs_type);
            return Err(denied(format!("{at}/fs_type"), &what, known));
        }
        match &attach.device {
            Device::Local { path } => self.local_devices.check(&format!("{at}/attach/local/path"), path),
            Device::Loopback(Loopback { base: Base::Root, path }) => {
                self.host_paths.check(&format!("{at}/attach/loopback/path"), &format!("/{path}"))
            }
            Device::Loopback(Loopback { base: Base::Mount(_), .. }) => Ok(()),
        }
    }

    fn check_nfs(&self, at: &str, nfs: &Nfs) -> Result<(), SpecError> {
        if let Some(servers) = &self.servers {
            let found: Vec<_> = servers.iter().filter(|server| names_host(&server.host, &nfs.host)).collect();
            if found.is_empty() {
                let known = servers.iter().map(|server| server.host.as_str());
                return Err(denied(format!("{at}/host"), &format!("server {}", quote(&nfs.host)), known));
            }
            let allows = |server: &&Server| match &server.exports {
                Some(exports) => exports.iter().any(|export| covers(export, &nfs.path)),
                None => true,
            };
            if !found.iter().any(allows) {
                let known = found.iter().flat_map(|server| server.exports.iter().flatten());
                let what = format!("export {} of {}", quote(&nfs.path), quote(&nfs.host));
                return Err(denied(format!("{at}/path"), &what, known.map(String::as_str)));
            }
        }
        let Some(allowed) = &self.nfs_options else {
            return Ok(());
        };
        for option in &nfs.options {
            let text = option.to_string();
            if !allowed.iter().any(|pattern| matches(pattern, &text)) {
                let known = allowed.iter().map(String::as_str);
                return Err(denied(format!("{at}/options"), &format!("option {}", quote(&text)), known));
            }
        }
        Ok(())
    }

    /// A pattern that can never match is a mistake of the admin: better said now than denied later.
    fn validate(&self) -> Result<(), SpecError> {
        for (index, server) in self.servers.iter().flatten().enumerate() {
            let at = format!("/servers/{index}");
            text::host(&server.host.replace('*', "a"))
                .map_err(|message| SpecError::invalid(PARAMETER, &format!("{at}/host"), message))?;
            let exports = server.exports.as_deref().unwrap_or_default();
            validate_paths(&format!("{at}/exports"), exports)?;
        }
        self.host_paths.validate("/hostPaths")?;
        self.local_devices.validate("/localDevices")?;
        for (index, option) in self.nfs_options.iter().flatten().enumerate() {
            let key = option.split('=').next().unwrap_or_default();
            if !options::keys().iter().any(|known| matches(key, known)) {
                let message = unknown("option", key, &options::keys());
                return Err(SpecError::invalid(PARAMETER, &format!("/nfsOptions/{index}"), message));
            }
        }
        Ok(())
    }
}

impl Paths {
    fn check(&self, pointer: &str, path: &str) -> Result<(), SpecError> {
        let what = format!("path {} of the node", quote(path));
        match self {
            Paths::All(true) => Ok(()),
            Paths::All(false) => Err(denied(pointer.to_owned(), &what, [])),
            Paths::Below(allowed) if allowed.iter().any(|allowed| covers(allowed, path)) => Ok(()),
            Paths::Below(allowed) => Err(denied(pointer.to_owned(), &what, allowed.iter().map(String::as_str))),
        }
    }

    fn validate(&self, at: &str) -> Result<(), SpecError> {
        match self {
            Paths::All(_) => Ok(()),
            Paths::Below(paths) => validate_paths(at, paths),
        }
    }
}

fn validate_paths(at: &str, paths: &[String]) -> Result<(), SpecError> {
    for (index, path) in paths.iter().enumerate() {
        text::absolute(path).map_err(|message| SpecError::invalid(PARAMETER, &format!("{at}/{index}"), message))?;
    }
    Ok(())
}

fn denied<'a>(pointer: String, what: &str, known: impl IntoIterator<Item = &'a str>) -> SpecError {
    let mut known: Vec<&str> = known.into_iter().collect();
    if known.len() > LISTED {
        known.truncate(LISTED);
        known.push("...");
    }
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    let message = format!("{what} is not allowed by the policy; allowed: {known}");
    SpecError::denied(MOUNT_SPEC, &pointer, message)
}

#[cfg(test)]
mod tests;
