//! Kernel objects that several volumes use: made once, gone with the last user.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, Weak};

use super::error::Result;
use super::lock;

/// The live objects by what makes two of them the same.
pub struct Shared<K, V> {
    slots: Mutex<HashMap<K, Arc<Slot<V>>>>,
}

/// Held while the object is made, so that two who want it wait for one.
type Slot<V> = tokio::sync::Mutex<Weak<V>>;

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Shared { slots: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash, V> Shared<K, V> {
    /// The object of this key: the one in use, or what `make` returns.
    pub async fn get(&self, key: &K, make: impl Future<Output = Result<V>>) -> Result<Arc<V>> {
        let slot = {
            let mut slots = lock(&self.slots);
            // Slots that nobody waits at and whose object is gone.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|v| v.strong_count() > 0));
            Arc::clone(slots.entry(key.clone()).or_default())
        };
        let mut object = slot.lock().await;
        if let Some(object) = object.upgrade() {
            return Ok(object);
        }
        let made = Arc::new(make.await?);
        *object = Arc::downgrade(&made);
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_object_is_made_once_while_in_use_and_again_afterwards() {
        let shared = Shared::default();
        let (one, two) = tokio::join!(shared.get(&"a", async { Ok(1) }), shared.get(&"a", async { Ok(2) }));
        assert_eq!((*one.unwrap(), *two.unwrap()), (1, 1));
        assert_eq!(*shared.get(&"a", async { Ok(3) }).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn keys_without_an_object_are_forgotten() {
        let shared = Shared::default();
        for key in 0..100 {
            shared.get(&key, async { Ok(()) }).await.unwrap();
        }
        assert!(shared.slots.lock().unwrap().len() <= 2);
    }
}
