//! What the admin of a cluster allows its users to ask for, in a YAML file. Without one, any NFS server may be used,
//! nothing of the node itself, and only file systems that are read-only by design.
//!
#![doc = concat!("```yaml\n", include_str!("policy/example.yaml"), "```")]

mod export;
mod layers;
mod server;

use std::collections::BTreeMap;

use minisign_verify::PublicKey;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use export::Limits;
pub use layers::{Share, WritableLayers};
use server::Server;

use super::error::{SpecError, quote};
use super::image_parameters::CACHE;
use super::pattern::{components, covers, matches, names_host};
use super::read::{self, words};
use super::{Attach, Base, Bind, Cache, Device, FsType, Loopback, MOUNT_SPEC, Mount, Nfs, NfsVersion, Overlay, text};

/// The name of the policy in errors.
const PARAMETER: &str = "policy";
/// The most allowed values that an error lists.
const LISTED: usize = 8;

/// What users may ask for. See the module's example for each field.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    #[serde(deserialize_with = "server::list")]
    #[schemars(with = "Vec<Server>")]
    servers: Option<Vec<Server>>,
    host_paths: Paths,
    local_devices: Paths,
    #[serde(deserialize_with = "words")]
    fs_types: Vec<FsType>,
    #[serde(deserialize_with = "words")]
    nfs_versions: Vec<NfsVersion>,
    #[serde(deserialize_with = "present")]
    #[schemars(with = "Vec<String>")]
    nfs_options: Option<Vec<String>>,
    required_nfs_options: Vec<String>,
    nfs_limits: Limits,
    writable_exports: bool,
    node_cache: bool,
    require_verity: bool,
    // Of the outermost policy alone: what is verified by a signature may be staged before its namespace is known.
    trusted_keys: Vec<String>,
    writable_layers: WritableLayers,
    namespaces: Vec<Namespaces>,
}

/// The policy of the namespaces that one of the patterns names, in the place of the one that it stands in.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Namespaces {
    #[schemars(length(min = 1))]
    names: Vec<String>,
    // All but its own namespaces: see `super::schema`.
    #[schemars(with = "BTreeMap<String, Value>")]
    policy: Policy,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(untagged, expecting = "must be true, false or a list of paths")]
enum Paths {
    All(bool),
    Below(#[schemars(inner(regex(pattern = "^/")))] Vec<String>),
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            servers: None,
            host_paths: Paths::All(false),
            local_devices: Paths::All(false),
            fs_types: vec![FsType::Squashfs, FsType::Erofs, FsType::Sif],
            nfs_versions: NfsVersion::ALL.into(),
            nfs_options: None,
            required_nfs_options: Vec::new(),
            nfs_limits: Limits::new(),
            writable_exports: true,
            node_cache: true,
            require_verity: false,
            trusted_keys: Vec::new(),
            writable_layers: WritableLayers::default(),
            namespaces: Vec::new(),
        }
    }
}

/// A field that may be absent, but not empty: `servers:` with nothing behind it must not mean "any".
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<Vec<T>>, D::Error> {
    Vec::deserialize(deserializer).map(Some)
}

impl Policy {
    /// Reads a policy of at most 64 KiB. `{}` is the default policy; a text that says nothing at all is refused.
    pub fn parse(text: &str) -> Result<Policy, SpecError> {
        let mut policy: Policy = read::yaml(PARAMETER, text)?;
        policy.validate("")?;
        policy.canonicalise();
        Ok(policy)
    }

    fn canonicalise(&mut self) {
        self.servers.iter_mut().flatten().for_each(Server::canonicalise);
        self.namespaces.iter_mut().for_each(|namespaces| namespaces.policy.canonicalise());
    }

    /// It, and those of namespaces.
    fn all(&self) -> impl Iterator<Item = &Policy> {
        [self].into_iter().chain(self.namespaces.iter().map(|namespaces| &namespaces.policy))
    }

    /// What holds for the pods of a namespace.
    fn of(&self, namespace: &str) -> &Policy {
        let names = |namespaces: &&Namespaces| namespaces.names.iter().any(|pattern| matches(pattern, namespace));
        self.namespaces.iter().find(names).map_or(self, |namespaces| &namespaces.policy)
    }

    /// Whether it says different things of different namespaces.
    pub fn needs_namespace(&self) -> bool {
        !self.namespaces.is_empty() || self.writable_layers.per_namespace != Share::default()
    }

    /// Whether images may be copied to the node's disk where a volume of the namespace does not say so. Where the namespace is not known, as
    /// when a volume is staged, each must be one that may.
    pub fn node_cache(&self, namespace: Option<&str>) -> bool {
        namespace.map_or_else(|| self.all().all(|policy| policy.node_cache), |namespace| self.of(namespace).node_cache)
    }

    /// Public keys of minisign(1), by which the root hashes beside images on this export may be signed; `None` is the node itself.
    pub fn trusted_keys(&self, export: Option<&Nfs>) -> &[String] {
        let own = export.and_then(|nfs| self.named(&nfs.host).find_map(|server| server.keys_of(&nfs.path)));
        own.unwrap_or(&self.trusted_keys)
    }

    /// What it says of a server that volumes name `host`.
    fn named<'a>(&'a self, host: &str) -> impl Iterator<Item = &'a Server> {
        self.servers.iter().flatten().filter(move |server| names_host(&server.host, host))
    }

    /// Whether each namespace may use this version of NFS, such as `4.1`.
    pub fn allows_nfs(&self, version: &str) -> bool {
        let allows = |policy: &Policy| policy.nfs_versions.iter().any(|allowed| allowed.as_str() == version);
        self.all().all(allows)
    }

    /// What the pods of a namespace may have of writable layers on one node, all together.
    pub fn share(&self, namespace: &str) -> Share {
        self.of(namespace).writable_layers.per_namespace
    }

    /// The servers that it names without a pattern, for any namespace.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        let servers = self.all().flat_map(|policy| policy.servers.iter().flatten());
        servers.map(|server| server.host.as_str()).filter(|host| !host.contains('*'))
    }

    /// The names and addresses at which a server is reached that volumes name `host`, in the order in which to try them: `host` itself
    /// where the admin says nothing else.
    pub fn addresses<'a>(&'a self, host: &'a str) -> Vec<&'a str> {
        let addresses = self.named(host).find_map(|server| server.addresses.as_ref());
        addresses.map_or_else(|| vec![host], |addresses| addresses.iter().map(String::as_str).collect())
    }

    /// The zone of a server that volumes name `host`, where the admin says one.
    pub fn zone(&self, host: &str) -> Option<&str> {
        self.named(host).find_map(|server| server.zone.as_deref())
    }

    /// Splits the path of an export that the policy allows into what the admin named and the rest, which a user named, and below which a
    /// user may have made symlinks. The rest is empty where the policy limits no paths of this server.
    pub fn split<'a>(&self, host: &str, path: &'a str) -> (&'a str, &'a str) {
        let servers = self.all().flat_map(|policy| policy.named(host));
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

    /// Refuses what the policy does not allow to the pods of a namespace, as [`super::error::ErrorKind::Denied`]. Where the namespace is not
    /// known, as when a volume is staged, what is allowed in one may pass.
    pub(super) fn check(&self, mount: &Mount, namespace: Option<&str>) -> Result<(), SpecError> {
        match namespace {
            Some(namespace) => self.of(namespace).check_alone(mount),
            None if self.namespaces.iter().any(|other| other.policy.check_alone(mount).is_ok()) => Ok(()),
            None => self.check_alone(mount),
        }
    }

    fn check_alone(&self, mount: &Mount) -> Result<(), SpecError> {
        let written = mount.exports_shown().into_iter().filter(|(_, read_only)| !read_only);
        let written: Vec<&Nfs> = written.map(|(nfs, _)| nfs).collect();
        mount.try_visit(&mut |at, mount| match mount {
            Mount::Attach(attach) => self.check_attach(&format!("{at}/attach"), attach),
            Mount::Bind(Bind { base: Base::Root, path, .. }) => {
                self.host_paths.check(&format!("{at}/bind/path"), &format!("/{path}"))
            }
            Mount::Nfs(nfs) => {
                let at = format!("{at}/nfs");
                if !self.writable_exports && written.iter().any(|written| std::ptr::eq(*written, nfs)) {
                    return Err(denied(format!("{at}/ro"), "writing to an export", ["\"ro\": true"]));
                }
                self.check_nfs(&at, nfs)
            }
            Mount::Overlay(Overlay { upper, .. }) => self.writable_layers.check(&format!("{at}/overlay"), *upper),
            Mount::Bind(Bind { base: Base::Mount(_), .. }) => Ok(()),
        })
    }

    fn check_attach(&self, at: &str, attach: &Attach) -> Result<(), SpecError> {
        if !self.fs_types.contains(&attach.fs_type) {
            let known = self.fs_types.iter().map(|fs_type| fs_type.as_str());
            let what = format!("file system \"{}\"", attach.fs_type);
            return Err(denied(format!("{at}/fs_type"), &what, known));
        }
        match &attach.device {
            Device::Loopback(Loopback { cache: Some(Cache::Node), .. }) if !self.node_cache => {
                Err(SpecError::denied(CACHE, "", "a copy on the node is not allowed by the policy; allowed: none"))
            }
            Device::Local { path } => self.local_devices.check(&format!("{at}/attach/local/path"), path),
            Device::Loopback(Loopback { base, path, verity, .. }) => {
                if matches!(base, Base::Root) {
                    self.host_paths.check(&format!("{at}/attach/loopback/path"), &format!("/{path}"))?;
                }
                // What lies inside of a verified image is verified with it.
                let is_outermost = base.export().is_some() || base.is_of_the_node();
                if self.require_verity && verity.is_none() && is_outermost {
                    let message = "the policy wants the root hash of each image, which 'seal' prints";
                    return Err(SpecError::denied(MOUNT_SPEC, &format!("{at}/attach/loopback/verity"), message));
                }
                Ok(())
            }
        }
    }

    fn check_nfs(&self, at: &str, nfs: &Nfs) -> Result<(), SpecError> {
        nfs.hosts().try_for_each(|host| self.check_server(at, host, &nfs.path))?;
        if !self.nfs_versions.contains(&nfs.version) {
            let known = self.nfs_versions.iter().map(|version| version.as_str());
            return Err(denied(format!("{at}/version"), &format!("NFS {}", nfs.version), known));
        }
        if let Some(allowed) = &self.nfs_options {
            export::check_allowed(at, nfs, allowed)?;
        }
        export::check_required(at, nfs, &self.required_nfs_options)?;
        export::check_limits(at, nfs, &self.nfs_limits)
    }

    fn check_server(&self, at: &str, host: &str, path: &str) -> Result<(), SpecError> {
        let Some(servers) = &self.servers else { return Ok(()) };
        let found: Vec<_> = self.named(host).collect();
        if found.is_empty() {
            let known = servers.iter().map(|server| server.host.as_str());
            return Err(denied(format!("{at}/host"), &format!("server {}", quote(host)), known));
        }
        if !found.iter().any(|server| server.allows(path)) {
            let known = found.iter().flat_map(|server| server.exports.iter().flatten());
            let what = format!("export {} of {}", quote(path), quote(host));
            return Err(denied(format!("{at}/path"), &what, known.map(String::as_str)));
        }
        Ok(())
    }

    /// A pattern that can never match is a mistake of the admin: better said now than denied later.
    fn validate(&self, at: &str) -> Result<(), SpecError> {
        for (index, server) in self.servers.iter().flatten().enumerate() {
            server.validate(&format!("{at}/servers/{index}"))?;
        }
        self.host_paths.validate(&format!("{at}/hostPaths"))?;
        self.local_devices.validate(&format!("{at}/localDevices"))?;
        let (allowed, required) = (self.nfs_options.as_deref().unwrap_or_default(), &self.required_nfs_options);
        for (field, patterns) in [("nfsOptions", allowed), ("requiredNfsOptions", required)] {
            for (index, pattern) in patterns.iter().enumerate() {
                export::validate_pattern(pattern).map_err(invalid(&format!("{at}/{field}/{index}")))?;
            }
        }
        for (key, limit) in &self.nfs_limits {
            export::validate_limit(key, limit).map_err(invalid(&format!("{at}/nfsLimits/{key}")))?;
        }
        validate_keys(at, &self.trusted_keys)?;
        for (index, namespaces) in self.namespaces.iter().enumerate() {
            let at = format!("{at}/namespaces/{index}");
            if !namespaces.policy.trusted_keys.is_empty() {
                return Err(invalid(&format!("{at}/policy/trustedKeys"))("is only for the outermost policy".into()));
            }
            if namespaces.names.is_empty() {
                return Err(invalid(&format!("{at}/names"))("names no namespace".into()));
            }
            if !namespaces.policy.namespaces.is_empty() {
                return Err(invalid(&format!("{at}/policy/namespaces"))("is only for the outermost policy".into()));
            }
            for (index, server) in namespaces.policy.servers.iter().flatten().enumerate() {
                if let Some(field) = server.outermost_alone() {
                    let at = format!("{at}/policy/servers/{index}/{field}");
                    let message = "is only for the outermost policy: a name means one server on a node";
                    return Err(invalid(&at)(message.into()));
                }
            }
            namespaces.policy.validate(&format!("{at}/policy"))?;
        }
        Ok(())
    }
}

fn invalid(pointer: &str) -> impl Fn(String) -> SpecError {
    move |message| SpecError::invalid(PARAMETER, pointer, message)
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

fn validate_keys(at: &str, keys: &[String]) -> Result<(), SpecError> {
    for (index, key) in keys.iter().enumerate() {
        PublicKey::from_base64(key).map_err(|error| {
            let message = format!("{} is no public key of minisign(1): {error}", quote(key));
            invalid(&format!("{at}/trustedKeys/{index}"))(message)
        })?;
    }
    Ok(())
}

fn validate_paths(at: &str, paths: &[String]) -> Result<(), SpecError> {
    for (index, path) in paths.iter().enumerate() {
        text::absolute(path).map_err(invalid(&format!("{at}/{index}")))?;
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
