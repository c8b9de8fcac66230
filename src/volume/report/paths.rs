//! In words: by which of its servers an image is read.

use crate::spec::Loopback;
use crate::volume::abnormal::{Abnormal, IMAGE_CORRUPTED, SERVER_SILENT};
use crate::volume::source::Paths;

/// What is wrong with the paths of an image; `None` where it has one to each of its servers.
pub fn trouble(paths: &Paths, image: &Loopback) -> Option<Abnormal> {
    let corrupted = paths.corrupted();
    let (mut read, mut lying, mut silent) = (Vec::new(), Vec::new(), Vec::new());
    for (server, there) in (0..).zip(image.on_each()) {
        let host = there.base.export().map(|nfs| nfs.host.clone()).unwrap_or_default();
        if corrupted.contains(&server) {
            lying.push(host);
        } else if paths.each.iter().any(|path| path.server == server && !path.state.is_failed) {
            read.push(host);
        } else {
            silent.push(host);
        }
    }
    let mut why = Vec::new();
    if !silent.is_empty() {
        why.push(format!("{} does not answer, or has this file no more", silent.join(" and ")));
    }
    if !lying.is_empty() {
        why.push(format!(
            "{} has other bytes than the root hash says, and is not asked again: put the image back there",
            lying.join(" and ")
        ));
    }
    let place = match (read.is_empty(), paths.queues) {
        _ if why.is_empty() => return None,
        (false, _) => format!("is read from {} alone", read.join(" and ")),
        (true, true) => "is read from none of its servers: who reads waits".to_owned(),
        (true, false) => "is read from none of its servers: who reads gets errors".to_owned(),
    };
    // Of those that are silent one may have the image.
    let is_silent = lying.is_empty() || (read.is_empty() && !silent.is_empty());
    let reason = if is_silent { SERVER_SILENT } else { IMAGE_CORRUPTED };
    let message = format!("{place}: {}", why.join("; "));
    Some(match read.is_empty() {
        true => Abnormal::inaccessible(reason, message),
        false => Abnormal::degraded(reason, message),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::device_mapper::PathState;
    use crate::kernel::image::ImageIdentity;
    use crate::kernel::loop_device::Reads;
    use crate::spec::json;
    use crate::volume::source::ServerPath;

    fn path(server: u8, is_failed: bool, is_corrupted: bool) -> ServerPath {
        let loop_device = u32::from(server);
        let state = PathState { device: (7, loop_device), is_failed, fails: 0, is_current: false };
        let identity = ImageIdentity { device: 1, inode: 2, size: 3, changed: 4 };
        let reads = Reads::default();
        ServerPath { server, loop_device, identity, root: None, is_corrupted, is_local: false, reads, state }
    }

    #[test]
    fn a_server_that_is_silent_and_one_that_has_other_bytes_are_told_with_those_that_are_left() {
        let nfs = r#"{"kind":"nfs","nfs":{"host":"a,b,c","path":"/images"}}"#;
        let spec = format!(
            r#"{{"kind":"attach","attach":{{"fs_type":"squashfs","attach":{{"kind":"loopback","loopback":
            {{"path":"image","base":"mount","mount":{nfs}}}}}}}}}"#
        );
        let parsed = json::parse(&spec).unwrap();
        let image = parsed.mount().images()[0];
        let told = |each: Vec<ServerPath>, queues| {
            let wrong = trouble(&Paths { first: 0, queues, each }, image);
            wrong.map_or_else(String::new, |wrong| format!("{:?} {}: {}", wrong.harm, wrong.reason, wrong.message))
        };
        assert_eq!(told(vec![path(0, false, false), path(1, false, false), path(2, false, false)], true), "");
        let some = told(vec![path(0, true, false), path(1, false, false), path(2, true, true)], true);
        assert!(some.starts_with("Degraded ImageCorrupted: is read from b alone: a does not answer"), "{some}");
        assert!(some.contains("; c has other bytes than the root hash says"), "{some}");
        // One that had no path from the beginning.
        assert!(told(vec![path(1, false, false), path(2, false, false)], true).contains("b and c alone: a does not"));
        let none = |queues| told(vec![path(0, true, false), path(1, true, false), path(2, true, false)], queues);
        assert!(
            none(true)
                .starts_with("Inaccessible ServerSilent: is read from none of its servers: who reads waits: a and b")
                && none(false).contains("gets errors")
        );
    }
}
