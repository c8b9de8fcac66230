//! What is asked of a whole cluster: the subcommands of `kubectl squashfs`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use csi_driver_squashfs::kubernetes::inventory::{ClusterNode, Volume, look};
use csi_driver_squashfs::ops::cluster;
use csi_driver_squashfs::ops::doctor::Verdict;
use csi_driver_squashfs::ops::store::gc::{Outcome as Fate, Verdict as Judged};
use csi_driver_squashfs::ops::store::{File, Store};
use serde::Serialize;

use super::Outcome;
use super::cli::{ClusterCommand, Output, Share};

/// How kubectl calls a plugin: kubectl-NAME (https://kubernetes.io/docs/tasks/extend-kubectl/kubectl-plugins/).
const PLUGIN: &str = "kubectl-";
const DAY: u64 = 24 * 60 * 60;
/// How many of those who name an image are named.
const MOST: usize = 3;

/// The arguments of this program; by the name of a plugin, those of its subcommand `cluster`.
pub fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<_> = given.collect();
    let name = arguments.first().and_then(|path| Path::new(path).file_name()?.to_str());
    if name.is_some_and(|name| name.starts_with(PLUGIN)) {
        arguments.insert(1, "cluster".into());
    }
    arguments
}

pub async fn run(driver_name: &str, command: ClusterCommand) -> Outcome {
    match command {
        ClusterCommand::Images { directory: Some(directory), share, output } => {
            let store = Store::open(&directory, share.share.clone())?;
            let (files, unreadable) = store.files(&look(driver_name, &share.contexts).await?)?;
            super::warn(&unreadable);
            show(output, store.listed(files).as_slice(), images_there)
        }
        ClusterCommand::Images { directory: None, share, output } => {
            show(output, &by_image(look(driver_name, &share.contexts).await?.volumes), images)
        }
        ClusterCommand::Volumes { output, context } => {
            show(output, look(driver_name, context.context.as_slice()).await?.volumes.as_slice(), volumes)
        }
        ClusterCommand::Nodes { output, context } => {
            show(output, look(driver_name, context.context.as_slice()).await?.nodes.as_slice(), nodes)
        }
        ClusterCommand::Gc { directory, delete, grace, share } => {
            let store = Store::open(&directory, share.share.clone())?;
            gc(driver_name, &store, delete, Duration::from_secs(DAY * u64::from(grace)), &share).await
        }
        ClusterCommand::Doctor { context } => {
            let findings = cluster::examine(driver_name, &look(driver_name, context.context.as_slice()).await?);
            say(&findings.iter().map(|finding| format!("{finding}\n")).collect::<String>())?;
            match findings.iter().any(|finding| matches!(finding.verdict, Verdict::Bad(_))) {
                true => Err("the cluster lacks what volumes need".into()),
                false => Ok(()),
            }
        }
    }
}

async fn gc(driver_name: &str, store: &Store, delete: bool, grace: Duration, share: &Share) -> Outcome {
    if delete {
        store.recover()?;
    }
    let before = look(driver_name, &share.contexts).await?;
    if !before.is_installed {
        return Err(format!(
            "nothing can go: there is no CSIDriver {driver_name}: is it another cluster, or another --driver-name?"
        )
        .into());
    }
    let (files, unreadable) = store.files(&before)?;
    if !unreadable.is_empty() {
        return Err(format!("nothing can go, as these may name anything: {}", unreadable.join("; ")).into());
    }
    let (mut rows, mut unused) = (Vec::new(), Vec::new());
    for (file, verdict) in store.judge(files, SystemTime::now(), grace) {
        let (word, why) = match verdict {
            Judged::Named(by) => ("keep", short(by.iter())),
            Judged::Young => ("keep", format!("used {} ago", age(&file))),
            Judged::Unused => (if delete { "delete" } else { "would delete" }, format!("unused for {}", age(&file))),
        };
        rows.push(vec![word.to_owned(), file.size.to_string(), file.path.clone(), why]);
        if word != "keep" {
            unused.push(file);
        }
    }
    say(&table(&["", "BYTES", "IMAGE", "WHY"], rows.into_iter()))?;
    let bytes: u64 = unused.iter().map(|file| file.size).sum();
    if !delete {
        return say(&format!("{} files of {bytes} bytes would be deleted by --delete\n", unused.len()));
    }
    let (mut left, mut deleted, mut failed) = (Vec::new(), 0, None);
    let mut each = |file: &File, fate| match fate {
        Fate::Deleted => deleted += file.size,
        Fate::Kept(why) => left.push(format!("{}: {why}", file.path)),
    };
    let unnamed = store.unname(unused, &mut each);
    // Somebody may have named one since.
    let again = look(driver_name, &share.contexts).await;
    if let Err(error) = &again {
        failed = Some(error.to_string());
    }
    unnamed.finish(&before, &again, grace, &mut each);
    super::warn(&left);
    say(&format!("{deleted} bytes deleted\n"))?;
    match failed {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

/// What is to be known of an image that volumes name.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Used {
    volumes: Vec<String>,
    pods: usize,
    nodes: Vec<String>,
}

fn by_image(volumes: Vec<Volume>) -> BTreeMap<String, Used> {
    let mut images = BTreeMap::<String, Used>::new();
    for volume in volumes {
        for image in volume.images {
            let used = images.entry(image).or_default();
            used.volumes.push(volume.name.clone());
            used.pods += volume.pods.len();
            used.nodes.extend(volume.pods.values().flatten().cloned());
            used.nodes.sort();
            used.nodes.dedup();
        }
    }
    images
}

fn images(images: &BTreeMap<String, Used>) -> String {
    let row = |(image, used): (&String, &Used)| {
        let numbers = [used.volumes.len(), used.pods, used.nodes.len()].map(|number| number.to_string());
        [image.clone()].into_iter().chain(numbers).collect()
    };
    table(&["IMAGE", "VOLUMES", "PODS", "NODES"], images.iter().map(row))
}

fn images_there(files: &[File]) -> String {
    let row = |file: &File| vec![file.path.clone(), file.size.to_string(), age(file), short(file.used_by.iter())];
    table(&["IMAGE", "BYTES", "LAST USED", "NAMED BY"], files.iter().map(row))
}

fn volumes(volumes: &[Volume]) -> String {
    let row = |volume: &Volume| {
        let pods = volume.pods.iter().map(|(pod, node)| match node {
            Some(node) => format!("{pod} on {node}"),
            None => pod.clone(),
        });
        let claim = volume.claim.clone().unwrap_or_else(|| "-".into());
        vec![volume.name.clone(), claim, short(volume.images.iter()), short(pods)]
    };
    table(&["VOLUME", "CLAIM", "IMAGES", "PODS"], volumes.iter().map(row))
}

fn nodes(nodes: &[ClusterNode]) -> String {
    let row = |node: &ClusterNode| {
        let driver = if node.registered { "registered" } else { "not there" };
        vec![node.name.clone(), driver.to_owned(), node.pods.to_string(), node.volumes.to_string()]
    };
    table(&["NODE", "DRIVER", "PODS", "VOLUMES"], nodes.iter().map(row))
}

/// The first ones, and how many more there are.
fn short(names: impl ExactSizeIterator<Item: ToString>) -> String {
    let count = names.len();
    let mut names: Vec<_> = names.take(MOST).map(|name| name.to_string()).collect();
    if count > MOST {
        names.push(format!("{} more", count - MOST));
    }
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

fn age(file: &File) -> String {
    let age = SystemTime::now().duration_since(file.last_used).unwrap_or_default();
    format!("{} d", age.as_secs() / DAY)
}

fn show<T: Serialize + ?Sized>(output: Output, what: &T, text: impl Fn(&T) -> String) -> Outcome {
    match output {
        Output::Text => say(&text(what)),
        Output::Json => say(&(serde_json::to_string_pretty(what)? + "\n")),
    }
}

/// Lines in columns, as kubectl prints them.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = [head.iter().map(|&word| word.to_owned()).collect()].into_iter().chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += cells.join("   ").trim_end();
        text.push('\n');
    }
    text
}

/// Where a reader has gone, as `head` does, that is an error like others.
fn say(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}
