//! What this process may do (capabilities(7)).

use rustix::thread::CapabilitySet;

use super::error::{Doing, Result};

/// Takes the capability SYS_ADMIN from this process and from all that it will run.
pub fn give_up_sys_admin() -> Result<()> {
    let action = || "give up the capability SYS_ADMIN".to_owned();
    rustix::thread::remove_capability_from_bounding_set(CapabilitySet::SYS_ADMIN)
        .doing(action)
        .map_err(|error| error.with_hint("the container needs the capability SETPCAP for that"))?;
    let mut sets = rustix::thread::capabilities(None).doing(action)?;
    for set in [&mut sets.effective, &mut sets.permitted, &mut sets.inheritable] {
        set.remove(CapabilitySet::SYS_ADMIN);
    }
    rustix::thread::set_capabilities(None, sets).doing(action)
}
