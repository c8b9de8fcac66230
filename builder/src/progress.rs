//! How far a long step is, on a terminal; nothing elsewhere.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

/// Of a step that has so many bytes; of how many is not known of each. It is taken off the terminal with the value.
pub fn bar(what: &str, bytes: Option<u64>) -> ProgressBar {
    let (bar, shown) = match bytes {
        Some(bytes) => (ProgressBar::new(bytes), "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"),
        None => (ProgressBar::new_spinner(), "{msg} {bytes} {bytes_per_sec}"),
    };
    bar.with_style(ProgressStyle::with_template(shown).expect("a template"))
        .with_message(what.to_owned())
        .with_finish(ProgressFinish::AndClear)
}
