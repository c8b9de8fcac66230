//! Which image a copy is of: what tells one content of one file of one server from every other.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::kernel::image::{Content, Image};
use crate::spec::{Base, Digest, Loopback, Mount};

/// Where an image is. Two users of one server who name the same file share a copy of it, and nobody else does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Name {
    /// As the spec names it.
    pub server: String,
    /// The version of NFS and the options of the mount, by which the same path may lead elsewhere: a service at another port may be
    /// anybody's.
    pub mount: String,
    /// Behind a path on the server may be another file system for each export that leads there.
    pub export: String,
    /// Of the image, below the export.
    pub path: String,
}

impl Name {
    /// Of an image on an export; `None` where it lies on the node or in another image.
    pub fn of(image: &Loopback) -> Option<Name> {
        let nfs = image.base.export()?;
        let mut options: Vec<_> = nfs.options.iter().map(ToString::to_string).collect();
        options.sort();
        options.insert(0, format!("vers={}", nfs.version));
        let (server, export) = (nfs.host.clone(), nfs.path.clone());
        Some(Name { server, mount: options.join(","), export, path: below(&image.base, &image.path)? })
    }

    /// What the names of its copies begin with.
    pub(super) fn prefix(&self) -> String {
        hash(&[&self.server, &self.mount, &self.export, &self.path])
    }

    /// The whole path on the server.
    pub fn file(&self) -> String {
        format!("{}/{}", self.export.trim_end_matches('/'), self.path)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.file(), self.server)
    }
}

/// A path below the export that its base lies on.
fn below(base: &Base, path: &str) -> Option<String> {
    match base {
        Base::Root => None,
        Base::Mount(mount) => match &**mount {
            Mount::Nfs(_) => Some(path.to_owned()),
            Mount::Bind(bind) => below(&bind.base, format!("{}/{path}", bind.path).trim_start_matches('/')),
            Mount::Attach(_) | Mount::Overlay(_) => None,
        },
    }
}

/// One content of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Original {
    pub name: Name,
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since 1970, by the server's clock, as the next.
    pub modified: u64,
    pub changed: u64,
}

impl Original {
    pub fn new(name: Name, content: Content, changed: u64) -> Self {
        let Content { inode, size, modified } = content;
        Original { name, inode, size, modified, changed }
    }

    /// What the file that is open now is.
    pub fn of(name: Name, image: &Image) -> Self {
        Original::new(name, image.content, image.identity.changed)
    }

    pub fn content(&self) -> Content {
        Content { inode: self.inode, size: self.size, modified: self.modified }
    }

    /// The name of its copy: the same for every process, and for no other content.
    pub fn id(&self) -> String {
        let content = [self.inode, self.size, self.modified, self.changed].map(|number| number.to_string());
        format!("{}-{}", self.name.prefix(), hash(&content.each_ref().map(String::as_str)))
    }
}

/// Whether it may be that of a copy: see [`Original::id`].
pub fn is_id(text: &str) -> bool {
    let is_hash = |text: &str| text.len() == 16 && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    text.split_once('-').is_some_and(|(name, content)| is_hash(name) && is_hash(content))
}

/// 64 bits in hexadecimal digits: names are compared in full where it matters.
fn hash(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.len().to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What the directory says of one copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    #[serde(flatten)]
    pub original: Original,
    /// How many bytes are on the disk for certain.
    pub synced: u64,
    /// `sha256:...` of all of it: from when the copy is complete on.
    pub digest: Option<String>,
    /// The server has another image by this name: what runs on the copy goes on, and nothing starts from it.
    #[serde(default)]
    pub superseded: bool,
}

/// One line: `/images/a.sqsh of nfs.example.com: 4096 bytes, sha256:...`.
impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Entry { original, synced, digest, superseded } = self;
        write!(f, "{}: {} bytes, ", original.name, original.size)?;
        match digest {
            Some(digest) => f.write_str(digest)?,
            None => write!(f, "of which {synced} are here")?,
        }
        f.write_str(if *superseded { ", replaced on the server" } else { "" })
    }
}

impl Entry {
    pub fn is_complete(&self) -> bool {
        self.digest.is_some()
    }

    /// Whether it is what a volume names; one that names no digest takes any.
    pub fn has(&self, digest: Option<Digest>) -> bool {
        digest.is_none_or(|digest| self.digest.as_deref() == Some(&digest.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::json;

    fn name(spec: &str) -> Option<String> {
        let parsed = json::parse(spec).unwrap();
        let name = Name::of(parsed.mount().images()[0]);
        name.map(|name| name.to_string())
    }

    #[test]
    fn an_image_is_named_by_its_whole_path_on_its_server_and_one_of_the_node_or_of_an_image_has_no_copy() {
        let image = |base: &str| {
            format!(
                r#"{{"kind":"attach","attach":{{"fs_type":"squashfs","attach":{{"kind":"loopback","loopback":{{"path":"a/b.sqsh",{base}}}}}}}}}"#
            )
        };
        let nfs = r#"{"kind":"nfs","nfs":{"host":"h","path":"/x"}}"#;
        assert_eq!(name(&image(&format!(r#""base":"mount","mount":{nfs}"#))).as_deref(), Some("/x/a/b.sqsh of h"));
        let bind = format!(r#"{{"kind":"bind","bind":{{"path":"d/e","base":"mount","mount":{nfs}}}}}"#);
        assert_eq!(name(&image(&format!(r#""base":"mount","mount":{bind}"#))).as_deref(), Some("/x/d/e/a/b.sqsh of h"));
        assert_eq!(name(&image(r#""base":"root""#)), None);
        let inner = image(r#""base":"root""#);
        assert_eq!(name(&image(&format!(r#""base":"mount","mount":{inner}"#))), None);
    }

    #[test]
    fn whatever_differs_makes_another_copy() {
        let name = |server: &str, mount: &str, export: &str, path: &str| Name {
            server: server.into(),
            mount: mount.into(),
            export: export.into(),
            path: path.into(),
        };
        let original = |name, content: [u64; 4]| {
            let [inode, size, modified, changed] = content;
            Original { name, inode, size, modified, changed }.id()
        };
        let names = [
            name("a", "1", "/e", "b/c"),
            name("a", "1", "/e/b", "c"),
            name("a", "2", "/e", "b/c"),
            name("a1", "", "/e", "b/c"),
            name("", "a1", "/e", "b/c"),
        ];
        let mut ids: Vec<_> = names.into_iter().map(|name| original(name, [1, 1, 1, 1])).collect();
        for at in 0..4 {
            let mut content = [1; 4];
            content[at] = 11;
            ids.push(original(name("a", "1", "/e", "b/c"), content));
        }
        assert!(ids.iter().all(|id| is_id(id)));
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all);
    }
}
