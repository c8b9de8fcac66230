//! The threads of this node's processes (proc_pid_task(5), proc_pid_stat(5)).

use std::fs;
use std::path::Path;
use std::time::Duration;

/// One thread, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    pub process: u32,
    pub id: u32,
    pub name: String,
    /// `D` waits in the kernel and cannot be interrupted, `S` can; see proc_pid_stat(5).
    pub state: char,
    /// Since it was started.
    pub age: Duration,
}

/// The threads of these names, of all processes that this one can see. What ends meanwhile is left out.
pub fn list(names: &[&str]) -> Vec<Thread> {
    let uptime = uptime().unwrap_or_default();
    let mut threads: Vec<Thread> = numbers(Path::new("/proc"))
        .flat_map(|process| {
            numbers(Path::new(&format!("/proc/{process}/task"))).filter_map(move |id| {
                let stat = fs::read_to_string(format!("/proc/{process}/task/{id}/stat")).ok()?;
                parse(process, id, &stat, uptime)
            })
        })
        .filter(|thread| names.contains(&thread.name.as_str()))
        .collect();
    threads.sort_by_key(|thread| (thread.process, thread.id));
    threads
}

fn numbers(directory: &Path) -> impl Iterator<Item = u32> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// `ID (NAME) STATE ...`; the name may hold anything, and the start, in ticks since boot, is the 20th field from the state.
fn parse(process: u32, id: u32, stat: &str, uptime: Duration) -> Option<Thread> {
    let (before, after) = stat.rsplit_once(") ")?;
    let (_, name) = before.split_once('(')?;
    let mut fields = after.split(' ');
    let state = fields.next()?.chars().next()?;
    let start: u64 = fields.nth(18)?.parse().ok()?;
    let start = Duration::from_millis(start * 1000 / rustix::param::clock_ticks_per_second());
    Some(Thread { process, id, name: name.to_owned(), state, age: uptime.saturating_sub(start) })
}

fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    Duration::try_from_secs_f64(text.split(' ').next()?.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_found_by_its_name() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("odd) S (name".into());
        let thread = thread.spawn(move || wait.recv()).unwrap();
        // A thread is named a moment after it starts.
        let found = std::iter::repeat_with(|| list(&["odd) S (name"])).find(|found| !found.is_empty()).unwrap();
        assert_eq!(found[0].process, std::process::id());
        assert!(found[0].age < Duration::from_secs(3600));
        drop(end);
        thread.join().unwrap().unwrap_err();
    }
}
