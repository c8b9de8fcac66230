//! How many threads may wait for NFS servers, and for the node's own file systems: a dead one takes some, and never those of another.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use crate::blocking::{self, Work};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::step;

/// For one server, or for one set of servers that are asked together.
const SERVER: usize = 16;
/// For all of them. From half of it on, each server has one.
const ALL: usize = 128;
/// For the pods of one namespace.
const NAMESPACE: usize = 32;

/// No server's address.
const THE_NODE: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// All places of a process.
#[derive(Debug, Default)]
pub struct Table(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    all: usize,
    /// Who has none has no entry.
    servers: HashMap<Servers, usize>,
    namespaces: HashMap<Arc<str>, usize>,
    queue: VecDeque<Turn>,
}

/// Who waits for a place, first come first.
#[derive(Debug)]
struct Turn {
    user: User,
    turn: oneshot::Sender<Place>,
}

/// Whom a place counts for.
#[derive(Clone, Debug)]
struct User {
    servers: Servers,
    namespace: Option<Arc<str>>,
}

type Servers = Arc<BTreeSet<IpAddr>>;

/// The threads that may wait for these servers. What asks several at once has places of its own: where one of them is dead it takes
/// none of the others'.
#[derive(Clone, Debug)]
pub struct Places {
    table: Arc<Table>,
    servers: Servers,
}

impl Places {
    pub fn new(table: &Arc<Table>, server: IpAddr) -> Self {
        Places { table: Arc::clone(table), servers: Arc::new([server].into()) }
    }

    /// For the file systems that the node itself has mounted, any of which may hang as a server does: together they count as one.
    pub fn of_the_node(table: &Arc<Table>) -> Self {
        Places::new(table, THE_NODE)
    }

    /// Those of all servers that something asks; `None` where it asks none.
    pub fn of_all(places: impl IntoIterator<Item = Places>) -> Option<Places> {
        places.into_iter().reduce(|one, other| Places {
            servers: Arc::new(one.servers.union(&other.servers).copied().collect()),
            table: one.table,
        })
    }

    /// Runs `work` on a thread of its own, once there is a place; that is taken until `work` ends, whoever still waits for it.
    pub async fn run<T, E>(&self, step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
    where
        T: Send + 'static,
        E: Into<Error> + Send + 'static,
    {
        let step = step.into();
        let (servers, place) = self.take(&step).await;
        blocking::run_for(&servers, step, move || {
            let _place = place;
            work()
        })
        .await
    }

    /// A place, and whose it is.
    async fn take(&self, step: &str) -> (String, Place) {
        let user = User { servers: Arc::clone(&self.servers), namespace: step::namespace() };
        let place = take(&self.table, user, step).await;
        let name = |server: &IpAddr| match *server {
            THE_NODE => "file systems of this node".to_owned(),
            server => server.to_string(),
        };
        (self.servers.iter().map(name).collect::<Vec<_>>().join(" "), place)
    }
}

/// A namespace's part in work that others join: it is waited for before that begins, so that nobody of another namespace waits for it,
/// and held until that ends. `None` where the namespace is not known.
pub async fn admit(table: &Arc<Table>, step: &str) -> Option<Place> {
    let namespace = Some(step::namespace()?);
    Some(take(table, User { servers: Arc::default(), namespace }, step).await)
}

async fn take(table: &Arc<Table>, user: User, step: &str) -> Place {
    let waits = {
        let mut state = lock(&table.0);
        if state.has_room(&user) {
            return state.take(table, user);
        }
        let (turn, waits) = oneshot::channel();
        state.queue.retain(|turn| !turn.turn.is_closed());
        state.queue.push_back(Turn { user, turn });
        waits
    };
    step::waiting_for(format!("{step} (after others that wait for this server, or for too many servers)"));
    waits.await.expect("a turn is taken from the queue to be given its place")
}

/// [`Places::run`] for `work` that asks a server, else [`blocking::run`].
pub async fn run_at<T, E>(places: Option<Places>, step: impl Into<String>, work: impl Work<T, E>) -> Result<T>
where
    T: Send + 'static,
    E: Into<Error> + Send + 'static,
{
    match places {
        Some(places) => places.run(step, work).await,
        None => blocking::run(step, work).await,
    }
}

impl State {
    fn has_room(&self, user: &User) -> bool {
        let namespace = user.namespace.as_ref().and_then(|namespace| self.namespaces.get(namespace).copied());
        let server = self.servers.get(&user.servers).copied().unwrap_or_default();
        namespace.unwrap_or_default() < NAMESPACE
            && (user.servers.is_empty() || server < SERVER && self.all < ALL && (server == 0 || self.all < ALL / 2))
    }

    fn take(&mut self, table: &Arc<Table>, user: User) -> Place {
        if !user.servers.is_empty() {
            self.all += 1;
            *self.servers.entry(Arc::clone(&user.servers)).or_default() += 1;
        }
        if let Some(namespace) = &user.namespace {
            *self.namespaces.entry(Arc::clone(namespace)).or_default() += 1;
        }
        Place { table: Arc::clone(table), user }
    }

    fn give_back(&mut self, user: &User) {
        if !user.servers.is_empty() {
            self.all -= 1;
            release(&mut self.servers, &user.servers);
        }
        if let Some(namespace) = &user.namespace {
            release(&mut self.namespaces, namespace);
        }
    }
}

fn release<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// One thread's, or a namespace's part in what is shared; given back when dropped.
#[derive(Debug)]
pub struct Place {
    table: Arc<Table>,
    user: User,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut given = Vec::new();
        let mut state = lock(&self.table.0);
        state.give_back(&self.user);
        state.queue.retain(|turn| !turn.turn.is_closed());
        while let Some(next) = state.queue.iter().position(|turn| state.has_room(&turn.user)) {
            let Some(Turn { user, turn }) = state.queue.remove(next) else { break };
            given.push((turn, state.take(&self.table, user)));
        }
        drop(state);
        for (turn, place) in given {
            // Who went away in this moment gives it back here, where the lock is free again.
            drop(turn.send(place));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::Step;
    use std::sync::mpsc;

    fn server(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    /// A table, and servers that answer when this goes.
    struct Pits {
        table: Arc<Table>,
        gate: Arc<Mutex<mpsc::Receiver<()>>>,
        _open: mpsc::Sender<()>,
    }

    impl Pits {
        fn new() -> Self {
            let (open, gate) = mpsc::channel();
            Pits { table: Arc::default(), gate: Arc::new(Mutex::new(gate)), _open: open }
        }

        /// One whose namespace has all that it may.
        async fn full(namespace: &str) -> Self {
            let pits = Pits::new();
            for number in 1..=200 {
                pits.ask(&pits.places(number), Some(namespace)).await;
            }
            pits
        }

        fn places(&self, number: u8) -> Places {
            Places::new(&self.table, server(number))
        }

        /// Begins what waits.
        async fn ask(&self, places: &Places, namespace: Option<&str>) {
            let (places, gate) = (places.clone(), Arc::clone(&self.gate));
            let wait = move || {
                let _ = lock(&gate).recv();
                Ok::<_, Error>(())
            };
            tokio::spawn(Step::for_namespace(namespace).observe(async move { places.run("wait", wait).await }));
            tokio::task::yield_now().await;
        }

        fn taken(&self) -> usize {
            lock(&self.table.0).all
        }
    }

    async fn ask_a_good_one(places: &Places) {
        places.run("ask", || Ok::<_, Error>(())).await.unwrap();
    }

    #[tokio::test]
    async fn forty_dead_servers_leave_a_place_for_a_good_one() {
        let pits = Pits::new();
        for number in 1..=40 {
            for _ in 0..SERVER + 1 {
                pits.ask(&pits.places(number), None).await;
            }
        }
        // The first four have theirs, and the others one.
        assert_eq!(pits.taken(), 4 * SERVER + 36);
        ask_a_good_one(&pits.places(99)).await;
        let table = Arc::clone(&pits.table);
        drop(pits);
        while lock(&table.0).all > 0 {
            tokio::task::yield_now().await;
        }
        assert!(lock(&table.0).servers.is_empty());
    }

    #[tokio::test]
    async fn a_dead_server_takes_no_place_of_one_that_is_asked_beside_it() {
        let pits = Pits::new();
        let good = pits.places(2);
        let both = Places::of_all([pits.places(1), good.clone()]).unwrap();
        for _ in 0..2 * SERVER {
            pits.ask(&both, None).await;
        }
        assert_eq!(pits.taken(), SERVER);
        ask_a_good_one(&good).await;
    }

    #[tokio::test]
    async fn file_systems_of_the_node_that_hang_take_no_place_of_a_server() {
        let pits = Pits::new();
        let node = Places::of_the_node(&pits.table);
        for _ in 0..2 * SERVER {
            pits.ask(&node, None).await;
        }
        assert_eq!(pits.taken(), SERVER);
        ask_a_good_one(&pits.places(1)).await;
    }

    #[tokio::test]
    async fn a_namespace_has_a_share() {
        let pits = Pits::full("tar-pits").await;
        assert_eq!(pits.taken(), NAMESPACE);
        Step::for_namespace(Some("other")).observe(ask_a_good_one(&pits.places(1))).await;
    }

    #[tokio::test]
    async fn a_namespace_waits_for_its_share_before_it_begins_what_others_join() {
        let pits = Pits::full("tar-pits").await;
        let admit = |namespace| {
            let step = Step::for_namespace(namespace);
            tokio::time::timeout(std::time::Duration::ZERO, step.observe(admit(&pits.table, "mount")))
        };
        admit(Some("tar-pits")).await.unwrap_err();
        assert!(admit(Some("other")).await.unwrap().is_some());
        assert!(admit(None).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn who_goes_away_while_waiting_takes_no_place_and_no_memory() {
        let pits = Pits::new();
        let (table, places) = (Arc::clone(&pits.table), pits.places(1));
        for _ in 0..SERVER {
            pits.ask(&places, None).await;
        }
        for _ in 0..500 {
            let waits = tokio::time::timeout(std::time::Duration::ZERO, ask_a_good_one(&places));
            waits.await.unwrap_err();
        }
        assert_eq!(lock(&table.0).queue.len(), 1);
        drop(pits);
        ask_a_good_one(&places).await;
        assert!(lock(&table.0).queue.is_empty());
    }
}
