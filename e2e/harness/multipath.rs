//! The multipath devices of the kernel, as dmsetup(8) shows them.

use super::run;

/// One of the devices below, by which a server is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Major and minor number.
    pub device: String,
    /// The kernel reads from it; it stops where a read has failed.
    pub live: bool,
}

/// The paths of each device there is, in the order of its table.
pub fn devices() -> Vec<Vec<Path>> {
    let text = run("dmsetup", &["status", "--target", "multipath"]);
    text.lines().filter(|line| line.contains(" multipath ")).map(paths).collect()
}

/// How many paths of the one device there is are live; whether those of dead servers are in the table is the driver's affair.
pub fn live() -> usize {
    let devices = devices();
    let [paths] = devices.as_slice() else { panic!("there is not one device: {devices:?}") };
    paths.iter().filter(|path| path.live).count()
}

/// A path is a device number, `A` (active) or `F` (failed), and how often it failed: see the kernel's `dm-mpath.c`,
/// `multipath_status`.
fn paths(line: &str) -> Vec<Path> {
    let words: Vec<_> = line.split_whitespace().collect();
    let is_device = |word: &str| {
        word.split_once(':').is_some_and(|(major, minor)| major.parse::<u32>().is_ok() && minor.parse::<u32>().is_ok())
    };
    let paths = words.windows(2).filter(|words| is_device(words[0]));
    paths.map(|words| Path { device: words[0].to_owned(), live: words[1] == "A" }).collect()
}
