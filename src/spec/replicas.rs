//! Several servers that hold the same image: how they are written, what is refused of them, and each of them alone.
//!
//! Of the image there is one for the pod, and reads go on from another server where one does not answer. That is done below a file
//! system that is only read, so that an export that is shown as it is has one server.

use super::error::{SpecError, quote};
use super::{Attach, Base, Bind, Device, FsType, Loopback, MOUNT_SPEC, Mount, Nfs, text};

/// The most servers of one export.
pub const MAX_SERVERS: usize = 8;
/// How each of several servers is mounted unless the volume says otherwise, besides `softerr`: one that does not answer is given up in
/// seconds, for there is another (nfs(5)).
pub const TIMEO: u32 = 30;
pub const RETRANS: u32 = 1;

/// The longest text of several servers.
pub(super) const MAX_TEXT: usize = 2048;

/// Options of nfs(5) by which a server is never given up, or by which that is no error of its own.
const REFUSED: [&str; 2] = ["hard", "soft"];
const REFUSED_WHY: &str =
    "the driver mounts each of several servers \"softerr\", so that reads go on from the next one: leave it out";

const SHOWN: &str =
    "several servers are for the export that an image lies on: one that is shown as it is has one server";

const OF_SIF: &str = "\"sif\" is not for several servers: dump the squashfs of it, and name that image";

/// Reads the host of an export, or several, separated by commas: the first one, and the others in their order.
pub(super) fn hosts(value: &str) -> Result<(String, Vec<String>), String> {
    let Some((first, others)) = value.split_once(',') else { return Ok((text::host(value)?, Vec::new())) };
    if value.len() > MAX_TEXT {
        return Err(format!("{} is longer than {MAX_TEXT} bytes", quote(value)));
    }
    let read = |host: &str| match host.trim() {
        "" => Err(format!("{} has a comma without a server beside it", quote(value))),
        host => text::host(host),
    };
    let first = read(first)?;
    let others = others.split(',').map(read).collect::<Result<Vec<_>, _>>()?;
    let count = 1 + others.len();
    if count > MAX_SERVERS {
        return Err(format!("names {count} servers, and may name {MAX_SERVERS}"));
    }
    // A trailing dot says how a name is looked for, not which server it is.
    let plain = |host: &String| host.strip_suffix('.').unwrap_or(host).to_owned();
    let mut seen = vec![plain(&first)];
    for host in &others {
        if seen.contains(&plain(host)) {
            return Err(format!("names server {} twice", quote(host)));
        }
        seen.push(plain(host));
    }
    Ok((first, others))
}

/// Refuses several servers where a volume cannot have them; the place is that in the JSON form.
pub(super) fn check(mount: &Mount) -> Result<(), SpecError> {
    let shown = mount.exports_shown();
    mount.try_visit(&mut |at, mount| {
        let invalid =
            |below: &str, message: &str| Err(SpecError::invalid(MOUNT_SPEC, &format!("{at}{below}"), message));
        match mount {
            Mount::Nfs(nfs) if nfs.is_replicated() => {
                if shown.iter().any(|(shown, _)| std::ptr::eq(*shown, nfs)) {
                    return invalid("/nfs/host", SHOWN);
                }
                match nfs.options.iter().find(|option| REFUSED.contains(&option.key.as_str())) {
                    Some(option) => {
                        invalid("/nfs/options", &format!("option \"{option}\" cannot be set: {REFUSED_WHY}"))
                    }
                    None => Ok(()),
                }
            }
            Mount::Attach(Attach { fs_type: FsType::Sif, device: Device::Loopback(image), .. })
                if image.is_replicated() =>
            {
                invalid("/attach/fs_type", OF_SIF)
            }
            Mount::Nfs(_) | Mount::Attach(_) | Mount::Bind(_) | Mount::Overlay(_) => Ok(()),
        }
    })
}

impl Nfs {
    /// Its servers, in the order in which they are asked.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        [&self.host].into_iter().chain(&self.replicas).map(String::as_str)
    }

    /// Whether it has several servers.
    pub fn is_replicated(&self) -> bool {
        !self.replicas.is_empty()
    }

    /// The same export on each of its servers alone, in their order.
    pub fn on_each(&self) -> Vec<Nfs> {
        if !self.is_replicated() {
            return vec![self.clone()];
        }
        let one_of: Vec<_> = self.hosts().map(str::to_owned).collect();
        let on =
            |host: &str| Nfs { host: host.to_owned(), replicas: Vec::new(), one_of: one_of.clone(), ..self.clone() };
        self.hosts().map(on).collect()
    }
}

impl Loopback {
    /// Whether the export that it lies on has several servers.
    pub fn is_replicated(&self) -> bool {
        self.base.export().is_some_and(Nfs::is_replicated)
    }

    /// The same image on each of its servers alone, in their order; itself, where it lies on no export.
    pub fn on_each(&self) -> Vec<Loopback> {
        self.base.on_each().into_iter().map(|base| Loopback { base, ..self.clone() }).collect()
    }

    /// The same image on the server with this place in their list alone; itself where there is no such place.
    pub fn on(&self, server: Option<u8>) -> Loopback {
        let there = server.and_then(|server| self.on_each().into_iter().nth(server.into()));
        there.filter(|_| self.is_replicated()).unwrap_or_else(|| self.clone())
    }
}

impl Base {
    fn on_each(&self) -> Vec<Base> {
        let Base::Mount(mount) = self else { return vec![self.clone()] };
        let mounts: Vec<_> = match &**mount {
            Mount::Nfs(nfs) => nfs.on_each().into_iter().map(Mount::Nfs).collect(),
            Mount::Bind(bind) => {
                let on = |base| Mount::Bind(Bind { base, ..bind.clone() });
                bind.base.on_each().into_iter().map(on).collect()
            }
            Mount::Attach(_) | Mount::Overlay(_) => return vec![self.clone()],
        };
        mounts.into_iter().map(|mount| Base::Mount(Box::new(mount))).collect()
    }
}

#[cfg(test)]
mod tests;
