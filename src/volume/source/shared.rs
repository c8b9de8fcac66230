//! Kernel objects that several volumes use: made once, gone with the last user.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, Weak};

use crate::error::Result;
use crate::lock::lock;
use crate::single_flight::Flights;

/// The live objects by what makes two of them the same.
pub struct Shared<K, V> {
    live: Arc<Mutex<HashMap<K, Weak<V>>>>,
    making: Flights<K, (), Arc<V>>,
}

impl<K, V> Default for Shared<K, V> {
    fn default() -> Self {
        Shared { live: Arc::default(), making: Flights::default() }
    }
}

impl<K, V> Shared<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Send + Sync + 'static,
{
    /// The object of this key, if anybody uses it.
    pub fn find(&self, key: &K) -> Option<Arc<V>> {
        find(&self.live, key)
    }

    /// All that somebody uses.
    pub fn all(&self) -> Vec<Arc<V>> {
        lock(&self.live).values().filter_map(Weak::upgrade).collect()
    }

    /// From now on each object for which `other` has another key has that one; returns these objects.
    pub fn rename(&self, other: impl Fn(&K) -> Option<K>) -> Vec<Arc<V>> {
        let mut live = lock(&self.live);
        let renamed: Vec<_> = live.keys().filter_map(|old| Some((old.clone(), other(old)?))).collect();
        let rename = |(old, new)| {
            let object = live.remove(&old)?.upgrade()?;
            live.insert(new, Arc::downgrade(&object));
            Some(object)
        };
        renamed.into_iter().filter_map(rename).collect()
    }

    /// Who asks for this key from now on gets another object than this one.
    pub fn forget(&self, key: &K, object: &Arc<V>) {
        let mut live = lock(&self.live);
        if live.get(key).is_some_and(|live| std::ptr::eq(live.as_ptr(), Arc::as_ptr(object))) {
            live.remove(key);
        }
    }

    /// The object of this key: the one in use, or what `make` returns. Who comes while it is made gets the same, or the same error.
    pub async fn get(&self, key: &K, make: impl Future<Output = Result<V>> + Send + 'static) -> Result<Arc<V>> {
        if let Some(object) = self.find(key) {
            return Ok(object);
        }
        let (live, new) = (Arc::clone(&self.live), key.clone());
        let make = move || async move {
            // Made since it was looked for.
            if let Some(object) = find(&live, &new) {
                return Ok(object);
            }
            let object = Arc::new(make.await?);
            let mut live = lock(&live);
            live.retain(|_, object| object.strong_count() > 0);
            live.insert(new, Arc::downgrade(&object));
            Ok(object)
        };
        self.making.run(key, make).await
    }
}

fn find<K: Eq + Hash, V>(live: &Mutex<HashMap<K, Weak<V>>>, key: &K) -> Option<Arc<V>> {
    lock(live).get(key)?.upgrade()
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
    async fn an_object_in_use_has_another_key_and_no_longer_the_old_one_where_somebody_says_so() {
        let shared = Shared::default();
        let one = shared.get(&"a", async { Ok(1) }).await.unwrap();
        let named = shared.rename(|key| (*key == "a").then_some("b"));
        assert!(shared.rename(|key| (*key == "c").then_some("d")).is_empty());
        assert!(Arc::ptr_eq(&one, &shared.find(&"b").unwrap()) && Arc::ptr_eq(&one, &named[0]));
        drop(named);
        assert!(shared.find(&"a").is_none() && shared.find(&"d").is_none());
        drop(one);
        assert!(shared.find(&"b").is_none());
    }

    #[tokio::test]
    async fn an_object_that_is_forgotten_is_made_anew_and_the_new_one_stays() {
        let shared = Shared::default();
        let old = shared.get(&"a", async { Ok(1) }).await.unwrap();
        shared.forget(&"a", &old);
        let new = shared.get(&"a", async { Ok(2) }).await.unwrap();
        shared.forget(&"a", &old);
        assert_eq!((*old, shared.find(&"a").as_deref()), (1, Some(&2)));
        drop(new);
    }

    #[tokio::test]
    async fn keys_without_an_object_are_forgotten() {
        let shared = Shared::default();
        for key in 0..100 {
            shared.get(&key, async { Ok(()) }).await.unwrap();
        }
        assert!(lock(&shared.live).len() <= 2);
    }
}
