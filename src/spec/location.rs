//! Where on its server lies what a volume names: to be compared with the files that are there.

use super::pattern::{components, covers, names_path};
use super::text;
use super::{Attach, Base, Bind, Device, Loopback, Mount, Overlay};

/// A path of a server or of a node. A `*` in a component stands for what nobody knows yet, such as the value of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub path: String,
    /// It is a directory that is shown as it is, with all that is in it.
    pub is_directory: bool,
}

impl Location {
    /// An image file of which no more is known than how its path ends.
    pub fn of_file(path: &str) -> Location {
        Location { path: format!("/{}", path.trim_start_matches('/')), is_directory: false }
    }

    /// The images and the directories of a mount. Not an image that lies in another: that is none of a server's files.
    pub fn of(mount: &Mount) -> Vec<Location> {
        let shown = roots(mount).into_iter().map(|path| Location { path, is_directory: true });
        let mut locations: Vec<_> = shown.collect();
        mount.visit("", &mut |_, mount| {
            if let Mount::Attach(Attach { device: Device::Loopback(Loopback { path, base, .. }), .. }) = mount {
                let below = of_base(base).into_iter();
                locations.extend(below.map(|base| Location { path: join(&base, path), is_directory: false }));
            }
        });
        locations
    }

    /// Whether it may be the file at `path`, an absolute path of a server. Servers have several names, and exports other paths by NFS 4 than
    /// by NFS 3: it may be where the one path ends as the other does, whatever server either is of.
    pub fn may_be(&self, path: &str) -> bool {
        let (mine, its) = (&self.path, path);
        if self.is_directory {
            // With what stands before it, or without.
            return tails(mine).any(|mine| tails(its).any(|its| covers(mine, its)));
        }
        let least = components(mine).min(components(its));
        let end = last(mine, least);
        // One that begins with a star would be any.
        let is_told = end.len() == mine.len() || !end.split('/').nth(1).is_some_and(|first| first.contains('*'));
        is_told && names_path(end, last(its, least))
    }
}

/// A path below a share, as it is read where a volume or a claim names it.
pub fn relative(path: &str) -> Result<String, String> {
    text::relative(path.trim())
}

/// The directories that a mount shows.
fn roots(mount: &Mount) -> Vec<String> {
    match mount {
        Mount::Attach(_) => Vec::new(),
        Mount::Nfs(nfs) => vec![nfs.path.clone()],
        Mount::Bind(Bind { base, path, .. }) => of_base(base).iter().map(|base| join(base, path)).collect(),
        Mount::Overlay(Overlay { lower, .. }) => lower.iter().flat_map(roots).collect(),
    }
}

fn of_base(base: &Base) -> Vec<String> {
    match base {
        Base::Root => vec!["/".into()],
        Base::Mount(mount) => roots(mount),
    }
}

fn join(base: &str, path: &str) -> String {
    match path {
        "" => base.to_owned(),
        _ => format!("{}/{path}", base.trim_end_matches('/')),
    }
}

/// What is left of a path from its last components on, so many of them.
fn last(path: &str, count: usize) -> &str {
    let mut starts = path.rmatch_indices('/').map(|(at, _)| at);
    starts.nth(count.saturating_sub(1)).map_or(path, |at| &path[at..])
}

/// A path, and what is left of it without its first components; not without all.
pub fn tails(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::json;

    fn nfs(path: &str) -> String {
        format!(r#"{{"kind":"nfs","nfs":{{"host":"a","path":"{path}","ro":true}}}}"#)
    }

    fn image(path: &str, base: &str) -> String {
        format!(
            r#"{{"kind":"attach","attach":{{"fs_type":"squashfs","attach":{{"kind":"loopback","loopback":{{"path":"{path}","base":"mount","mount":{base}}}}}}}}}"#
        )
    }

    fn bind(path: &str, base: &str) -> String {
        format!(r#"{{"kind":"bind","bind":{{"path":"{path}","base":"mount","mount":{base},"ro":true}}}}"#)
    }

    fn paths(spec: &str) -> Vec<String> {
        let locations = Location::of(json::parse(spec).unwrap().mount());
        locations.into_iter().map(|it| format!("{}{}", it.path, if it.is_directory { "/" } else { "" })).collect()
    }

    #[test]
    fn a_volume_names_its_images_and_the_directories_that_it_shows() {
        assert_eq!(paths(&image("/a/b.sqsh", &nfs("/images"))), ["/images/a/b.sqsh"]);
        assert_eq!(paths(&image("b.sqsh", &bind("/a", &nfs("/images")))), ["/images/a/b.sqsh"]);
        assert_eq!(paths(&image("inner.sqsh", &image("outer.sqsh", &nfs("/")))), ["/outer.sqsh"]);
        assert_eq!(paths(&bind("/a", &nfs("/images"))), ["/images/a/"]);
        assert_eq!(paths(&bind("/a", &image("b.sqsh", &nfs("/images")))), ["/images/b.sqsh"]);
        let layers = [image("b.sqsh", &nfs("/images")), nfs("/data")].join(",");
        let overlay = format!(r#"{{"kind":"overlay","overlay":{{"lower":[{layers}]}}}}"#);
        assert_eq!(paths(&overlay), ["/data/", "/images/b.sqsh"]);
    }

    #[test]
    fn a_file_is_taken_for_the_one_that_is_named_where_the_one_path_ends_as_the_other() {
        for (named, path, expected) in [
            ("/images/a.sqsh", "/images/a.sqsh", true),
            // The root of NFS 4 is a directory of the server.
            ("/a.sqsh", "/images/a.sqsh", true),
            ("/srv/images/a.sqsh", "/images/a.sqsh", true),
            ("/images/a.sqsh", "/images/b.sqsh", false),
            ("/images/team/a.sqsh", "/images/a.sqsh", false),
            ("/images/a.sqsh", "/images/xa.sqsh", false),
            ("/images/*/*-1.sqsh", "/images/team/tools-1.sqsh", true),
            ("/images/*/*-1.sqsh", "/images/team/tools-2.sqsh", false),
            ("/images/*/*.sqsh", "/srv/images/team/a.sqsh", true),
            ("/images/*/*.sqsh", "/images/a.sqsh", false),
        ] {
            assert_eq!(Location::of_file(named).may_be(path), expected, "{named} {path}");
        }
    }

    #[test]
    fn all_that_is_in_a_directory_that_is_shown_is_in_use() {
        let shown = |path: &str| Location { path: path.into(), is_directory: true };
        for (named, path, expected) in [
            ("/images", "/images/a.sqsh", true),
            ("/", "/images/a.sqsh", true),
            ("/team", "/images/team/x/a.sqsh", true),
            ("/srv/images/team", "/images/team/a.sqsh", true),
            ("/images/other", "/images/team/a.sqsh", false),
            ("/images/te", "/images/team/a.sqsh", false),
        ] {
            assert_eq!(shown(named).may_be(path), expected, "{named} {path}");
        }
    }
}
