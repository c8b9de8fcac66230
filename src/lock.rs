//! The one way to take a lock that is held for moments.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// No code panics while it holds one of this crate's locks, so a poisoned one is as good as any.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
