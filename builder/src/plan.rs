//! What becomes of the entries of some layers that lie on each other: which of them are there in the end, and what of the layers below
//! these is not.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use anyhow::{Result, bail};

use super::entries::{Attributes, Entry, Kind, Path, parents, shown};

/// What one layer has.
#[derive(Debug, Default)]
pub struct Survey {
    /// With the number of the entry: of those with one path, the last one counts.
    entries: HashMap<Path, (usize, Found)>,
    whiteouts: HashSet<Path>,
    opaque: HashSet<Path>,
    count: usize,
}

#[derive(Debug)]
enum Found {
    Directory(Attributes),
    File,
    /// Another name of the entry with this number, which stands before it.
    Link(Option<usize>),
    Other,
}

impl Survey {
    pub fn add(&mut self, entry: Entry) {
        let Entry { path, kind, attributes } = entry;
        let number = self.count;
        self.count += 1;
        let found = match kind {
            Kind::Whiteout => {
                self.whiteouts.insert(path);
                return;
            }
            Kind::Opaque => {
                self.entries.entry(path.clone()).or_insert((number, Found::Directory(MADE)));
                self.opaque.insert(path);
                return;
            }
            Kind::Directory => Found::Directory(attributes),
            Kind::File(_) => Found::File,
            Kind::Link(to) => Found::Link(match self.entries.get(&to) {
                Some((file, Found::File | Found::Other)) => Some(*file),
                Some((_, Found::Link(file))) => *file,
                Some((_, Found::Directory(_))) | None => None,
            }),
            Kind::Symlink(_) | Kind::Device { .. } | Kind::Fifo => Found::Other,
        };
        self.entries.insert(path, (number, found));
    }

    /// Nothing lies below what is no directory, and links lead to files.
    fn check(&self) -> Result<()> {
        for path in &self.opaque {
            if !matches!(self.entries[path].1, Found::Directory(_)) {
                bail!("{} is no directory", shown(path));
            }
        }
        for (path, (_, found)) in &self.entries {
            if matches!(found, Found::Link(None)) {
                bail!("{}: a link to no file that this layer has before it", shown(path));
            }
            for above in parents(path) {
                match self.entries.get(above) {
                    None | Some((_, Found::Directory(_))) => {}
                    Some(_) => bail!("{}: {} is no directory", shown(path), shown(above)),
                }
            }
        }
        Ok(())
    }
}

/// One layer of several.
#[derive(Debug, Default)]
pub struct Plan {
    pub directories: BTreeMap<Path, Directory>,
    /// For each layer, the lowest first, the entries that are there in the end, by their number, and where.
    pub kept: Vec<HashMap<usize, Path>>,
    /// Further names of what is kept, and of what.
    pub links: BTreeMap<Path, Path>,
    /// What lower layers have and is not there any more.
    pub whiteouts: BTreeSet<Path>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Directory {
    pub attributes: Attributes,
    /// Nothing is seen of what lower layers have in it.
    pub is_opaque: bool,
}

/// Where nobody says: as root makes one.
const MADE: Attributes = Attributes { mode: 0o755, user: 0, group: 0, modified: 0, extended: Vec::new() };

/// What of the layers above a lower one is there already, and what of it is not.
#[derive(Default)]
struct Above {
    taken: HashMap<Path, Taken>,
    gone: HashSet<Path>,
    opaque: HashSet<Path>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Directory,
    /// A directory of which nothing is known but that something lies in it.
    Parent,
    Other,
}

impl Above {
    fn hides(&self, path: &[u8]) -> bool {
        self.gone.contains(path) || self.hides_below(path)
    }

    fn hides_below(&self, path: &[u8]) -> bool {
        let hides = |above| {
            self.opaque.contains(above) || self.gone.contains(above) || self.taken.get(above) == Some(&Taken::Other)
        };
        parents(path).any(hides)
    }

    /// Whether this of the next lower layer is there in the end.
    fn shows(&self, path: &Path, found: &Found) -> bool {
        let is_free = match self.taken.get(path) {
            None => true,
            Some(Taken::Parent) => matches!(found, Found::Directory(_)),
            Some(Taken::Directory | Taken::Other) => false,
        };
        is_free && !self.hides(path)
    }

    /// Adds a layer below.
    fn add(&mut self, layer: Survey) {
        for (path, (_, found)) in layer.entries {
            let is_directory = matches!(found, Found::Directory(_));
            if self.shows(&path, &found) {
                for parent in parents(&path) {
                    self.taken.entry(parent.to_vec()).or_insert(Taken::Parent);
                }
                self.taken.insert(path, if is_directory { Taken::Directory } else { Taken::Other });
            } else if !is_directory && self.taken.get(&path).is_some_and(|taken| *taken != Taken::Other) {
                // Nothing of what lies below what was no directory in between.
                self.opaque.insert(path);
            }
        }
        // What a layer takes away is that of the layers below it.
        self.gone.extend(layer.whiteouts);
        self.opaque.extend(layer.opaque);
    }
}

impl Plan {
    /// `layers` are in their order, the lowest first. Where there `is_more` below them, whiteouts are kept.
    pub fn new(layers: Vec<Survey>, is_more: bool) -> Result<Plan> {
        let (mut plan, mut above) = (Plan::default(), Above::default());
        for layer in layers.into_iter().rev() {
            layer.check()?;
            if is_more && layer.opaque.contains(&Path::new()) {
                bail!("it hides all of the layers below it, which no directory of an overlay can: see --flat");
            }
            let kept = plan.add(&layer, &above);
            plan.kept.push(kept);
            above.add(layer);
        }
        plan.kept.reverse();
        plan.complete(above, is_more);
        Ok(plan)
    }

    fn add(&mut self, layer: &Survey, above: &Above) -> HashMap<usize, Path> {
        let (mut kept, mut links) = (HashMap::new(), BTreeMap::<usize, Vec<_>>::new());
        for (path, (number, found)) in &layer.entries {
            if !above.shows(path, found) {
                continue;
            }
            match found {
                Found::Directory(attributes) => {
                    let directory = Directory { attributes: attributes.clone(), is_opaque: false };
                    self.directories.insert(path.clone(), directory);
                }
                Found::Link(file) => links.entry(file.expect("it is checked")).or_default().push(path),
                Found::File | Found::Other => drop(kept.insert(*number, path.clone())),
            }
        }
        for (number, mut names) in links {
            names.sort();
            // Where its first name is gone, another one is.
            let first = kept.entry(number).or_insert_with(|| names.remove(0).clone()).clone();
            self.links.extend(names.into_iter().map(|name| (name.clone(), first.clone())));
        }
        kept
    }

    fn complete(&mut self, above: Above, is_more: bool) {
        if is_more {
            let is_seen = |path: &&Path| !above.taken.contains_key(*path) && !above.hides_below(path);
            self.whiteouts = above.gone.iter().filter(is_seen).cloned().collect();
        }
        let names = self.kept.iter().flat_map(HashMap::values).chain(self.links.keys()).chain(&self.whiteouts);
        let mut needed: BTreeSet<_> =
            names.chain(self.directories.keys()).flat_map(|path| parents(path)).map(<[u8]>::to_vec).collect();
        needed.insert(Path::new());
        for path in needed {
            self.directories.entry(path).or_insert(Directory { attributes: MADE, is_opaque: false });
        }
        if is_more {
            for (path, directory) in &mut self.directories {
                directory.is_opaque = above.opaque.contains(path) || above.gone.contains(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::entries::parent;
    use super::*;
    use proptest::prelude::*;

    /// What is where: of a directory nothing, of all else its number.
    type Tree = BTreeMap<Path, Option<usize>>;
    type Entries = Vec<(&'static str, Kind)>;

    fn survey(entries: &Entries) -> Survey {
        let mut survey = Survey::default();
        for (path, kind) in entries {
            survey.add(Entry { path: path.as_bytes().to_vec(), kind: kind.clone(), attributes: Attributes::default() });
        }
        survey
    }

    fn is_below(path: &[u8], above: &[u8]) -> bool {
        parents(path).any(|parent| parent == above)
    }

    /// What image-spec says of one layer on another (layer.md, "Applying Changesets"); files have numbers of all layers.
    fn apply(tree: &mut Tree, entries: &Entries, first: usize) {
        for (path, kind) in entries {
            match kind {
                Kind::Whiteout => tree.retain(|it, _| it != path.as_bytes() && !is_below(it, path.as_bytes())),
                Kind::Opaque => tree.retain(|it, _| !is_below(it, path.as_bytes())),
                _ => {}
            }
        }
        let directory = |tree: &mut Tree, path: &[u8]| {
            if !matches!(tree.get(path), Some(None)) {
                tree.insert(path.to_vec(), None);
            }
        };
        for (number, (path, kind)) in entries.iter().enumerate() {
            let path = path.as_bytes();
            if matches!(kind, Kind::Whiteout) {
                continue;
            }
            let above: Vec<_> = parents(path).map(<[u8]>::to_vec).collect();
            above.iter().for_each(|path| directory(tree, path));
            match kind {
                Kind::Directory | Kind::Opaque => directory(tree, path),
                _ => {
                    tree.retain(|it, _| !is_below(it, path));
                    tree.insert(path.to_vec(), Some(first + number));
                }
            }
        }
    }

    /// What overlayfs shows of what was made of some layers, on what lies below.
    fn mounted(lower: &Tree, plan: &Plan, layers: &[Entries], first: usize) -> Tree {
        let mut upper = Tree::new();
        upper.extend(plan.directories.keys().map(|path| (path.clone(), None)));
        let mut start = first;
        for (kept, entries) in plan.kept.iter().zip(layers) {
            upper.extend(kept.iter().map(|(number, path)| (path.clone(), Some(start + number))));
            start += entries.len();
        }
        let is_hidden = |path: &Path| {
            let hides = |above: &[u8]| {
                plan.whiteouts.contains(above)
                    || matches!(upper.get(above), Some(Some(_)))
                    || plan.directories.get(above).is_some_and(|directory| directory.is_opaque)
            };
            plan.whiteouts.contains(path) || parents(path).any(hides)
        };
        let mut tree: Tree =
            lower.iter().filter(|(path, _)| !is_hidden(path)).map(|(path, it)| (path.clone(), *it)).collect();
        // A directory over what is none hides what lies further below, which a tree does not have.
        tree.extend(upper);
        tree
    }

    fn layers() -> impl Strategy<Value = Vec<Entries>> {
        let path = prop::sample::select(vec!["a", "b", "a/a", "a/b", "b/a", "a/a/a", "a/a/b"]);
        let kind = prop_oneof![
            Just(Kind::Directory),
            Just(Kind::Directory),
            Just(Kind::File(1)),
            Just(Kind::Fifo),
            Just(Kind::Whiteout),
            Just(Kind::Opaque)
        ];
        let layer = prop::collection::vec((path, kind), 0..7).prop_filter("a layer as they are made", |entries| {
            let directories = entries.iter().filter(|(_, kind)| matches!(kind, Kind::Directory | Kind::Opaque));
            let files = entries.iter().filter(|(_, kind)| matches!(kind, Kind::File(_) | Kind::Fifo));
            let mut paths: Vec<_> =
                entries.iter().filter(|it| !matches!(it.1, Kind::Whiteout | Kind::Opaque)).map(|it| it.0).collect();
            paths.sort_unstable();
            let has_no_double = paths.windows(2).all(|two| two[0] != two[1]);
            let opens = |file: &str| directories.clone().all(|(path, _)| path != &file);
            // As all do who make layers; overlayfs has a whiteout in a directory alone.
            let mut whiteouts = entries.iter().filter(|(_, kind)| *kind == Kind::Whiteout);
            has_no_double
                && whiteouts.all(|(path, _)| match parent(path.as_bytes()) {
                    Some(b"") => true,
                    above => directories.clone().any(|(path, _)| Some(path.as_bytes()) == above),
                })
                && files.clone().all(|(file, _)| {
                    opens(file) && entries.iter().all(|(path, _)| !is_below(path.as_bytes(), file.as_bytes()))
                })
        });
        prop::collection::vec(layer, 1..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn layers_show_the_same_however_many_of_them_are_made_one(layers in layers()) {
            let mut expected = Tree::from([(Path::new(), None)]);
            let mut firsts = vec![0];
            for entries in &layers {
                apply(&mut expected, entries, firsts[firsts.len() - 1]);
                firsts.push(firsts[firsts.len() - 1] + entries.len());
            }
            for split in 0..=layers.len() {
                let (lower, upper) = layers.split_at(split);
                let mut tree = Tree::from([(Path::new(), None)]);
                for (entries, first) in lower.iter().zip(&firsts) {
                    apply(&mut tree, entries, *first);
                }
                let plan = Plan::new(upper.iter().map(survey).collect(), split > 0).unwrap();
                prop_assert_eq!(&mounted(&tree, &plan, upper, firsts[split]), &expected, "{} of {:?}", split, layers);
            }
        }
    }

    #[test]
    fn a_file_whose_first_name_is_gone_keeps_the_others() {
        let link = |to: &str| Kind::Link(to.as_bytes().to_vec());
        let base =
            vec![("a", Kind::File(1)), ("b", link("a")), ("c", link("b")), ("d", Kind::File(2)), ("e", link("d"))];
        let upper = vec![("a", Kind::Whiteout), ("e", Kind::File(3))];
        let plan = Plan::new(vec![survey(&base), survey(&upper)], false).unwrap();
        let path = |text: &str| text.as_bytes().to_vec();
        assert_eq!(plan.kept, [[(0, path("b")), (3, path("d"))].into(), [(1, path("e"))].into()]);
        assert_eq!(plan.links, [(path("c"), path("b"))].into());
        assert!(plan.whiteouts.is_empty());
    }

    #[test]
    fn a_link_is_a_name_of_what_stood_there_before_it() {
        let entries = vec![("a", Kind::File(1)), ("b", Kind::Link(b"a".to_vec())), ("a", Kind::File(2))];
        let plan = Plan::new(vec![survey(&entries)], false).unwrap();
        assert_eq!(plan.kept, [[(0, b"b".to_vec()), (2, b"a".to_vec())].into()]);
        assert!(plan.links.is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let link = |to: &str| Kind::Link(to.as_bytes().to_vec());
        for (entries, why) in [
            (vec![("a", Kind::File(1)), ("a/b", Kind::File(1))], "/a is no directory"),
            (vec![("a", Kind::Symlink(b"/etc".to_vec())), ("a/b/c", Kind::File(1))], "/a is no directory"),
            (vec![("a", link("b"))], "a link to no file"),
            (vec![("a", link("b")), ("b", link("a"))], "a link to no file"),
            (vec![("a", link("a"))], "a link to no file"),
            (vec![("a", Kind::Directory), ("b", link("a"))], "a link to no file"),
            (vec![("", Kind::Opaque)], "see --flat"),
        ] {
            let error = Plan::new(vec![survey(&entries)], true).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
