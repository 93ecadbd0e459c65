//! The bus inside one process.
//!
//! A publish puts one entry into every durable queue bound to its key and resolves when each of them
//! is settled. Nothing is written anywhere: durability is the publisher's outbox, which keeps the
//! row until then. Everything here is `Mutex`, `Notify`, `Semaphore` and `oneshot`, which belong to no
//! runtime, so services on different threads and runtimes share one bus; only `retry` takes a timer,
//! of the runtime that calls it.

mod queue;
mod subscription;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use infera_wire::topology::{self, DEAD_LETTERS, Topology, keys};
use parking_lot::RwLock;
use tokio::sync::oneshot;

use crate::bus::{Envelope, Limits};
use crate::delivery::DeadLetter;
use crate::error::BusError;
use queue::{Entry, Outcome, Queue, Waiting};
pub(crate) use subscription::{Subscription, Ticket};

/// A message that was moved to the dead letters of this process.
#[derive(Debug)]
pub(crate) struct Buried {
    pub dead: DeadLetter,
    /// Resolves when somebody acks it there; fails when it was pushed out by others.
    pub handled: oneshot::Receiver<()>,
}

#[derive(Debug, Clone)]
pub(crate) struct Memory {
    core: Arc<Core>,
}

#[derive(Debug)]
struct Core {
    limits: Limits,
    registry: RwLock<Registry>,
    dead: Arc<Queue>,
    dropped: AtomicU64,
    next_transient: AtomicU64,
}

#[derive(Debug, Default)]
struct Registry {
    /// Durable queues by name, the dead letters included.
    queues: HashMap<String, Arc<Queue>>,
    bindings: Vec<(String, Arc<Queue>)>,
    transient: Vec<Listener>,
}

#[derive(Debug)]
struct Listener {
    number: u64,
    patterns: Vec<String>,
    queue: Arc<Queue>,
}

impl Memory {
    pub fn new(limits: Limits) -> Self {
        let dead = Arc::new(Queue::new(DEAD_LETTERS, u32::MAX, limits.dead_letters));
        let core = Core {
            limits,
            registry: RwLock::default(),
            dead,
            dropped: AtomicU64::new(0),
            next_transient: AtomicU64::new(0),
        };
        Self { core: Arc::new(core) }
    }

    pub fn declare(&self, topology: &Topology) {
        let mut registry = self.core.registry.write();
        registry.queues.insert(topology.dead_letters.to_owned(), self.core.dead.clone());
        for binding in &topology.queues {
            let limit = topology.delivery_limit;
            let capacity = self.core.limits.queue_messages;
            let queue = registry
                .queues
                .entry(binding.queue.to_owned())
                .or_insert_with(|| Arc::new(Queue::new(binding.queue, limit, capacity)))
                .clone();
            let known = registry
                .bindings
                .iter()
                .any(|(pattern, bound)| pattern == binding.pattern && bound.name == queue.name);
            if !known {
                registry.bindings.push((binding.pattern.to_owned(), queue));
            }
        }
    }

    pub async fn publish(&self, routing_key: &str, envelope: Envelope) -> Result<Vec<Buried>, BusError> {
        let (queues, heard) = self.route(routing_key, &envelope);
        if queues.is_empty() && !heard {
            return Err(BusError::Unroutable { routing_key: routing_key.to_owned() });
        }
        // Room in all queues first, taken in the order of their names: two publishers never hold
        // what the other waits for.
        let mut rooms = Vec::with_capacity(queues.len());
        for queue in &queues {
            rooms.push(queue.room().await?);
        }
        let mut settled = Vec::with_capacity(queues.len());
        for (queue, room) in queues.iter().zip(rooms) {
            let (outcome, receiver) = oneshot::channel();
            queue.push(Entry::published(envelope.clone(), outcome, room));
            settled.push(receiver);
        }
        drop(envelope);
        let mut buried = Vec::new();
        for receiver in settled {
            match receiver.await.map_err(|_| BusError::Closed)? {
                Outcome::Acked => {}
                Outcome::Dead(dead) => buried.push(dead),
            }
        }
        Ok(buried)
    }

    /// The durable queues bound to the key, by name; transient ones receive their copy at once, and
    /// the flag says whether there were any.
    fn route(&self, routing_key: &str, envelope: &Envelope) -> (Vec<Arc<Queue>>, bool) {
        let registry = self.core.registry.read();
        let direct = keys::direct_queue(routing_key);
        if let Some(queue) = direct.and_then(|name| registry.queues.get(name)) {
            self.core.dead.take_dead(envelope.id, &queue.name);
            return (vec![queue.clone()], false);
        }
        let routing_key = direct.unwrap_or(routing_key);
        let mut queues: Vec<Arc<Queue>> = registry
            .bindings
            .iter()
            .filter(|(pattern, _)| topology::matches(pattern, routing_key))
            .map(|(_, queue)| queue.clone())
            .collect();
        queues.sort_by(|a, b| a.name.cmp(&b.name));
        queues.dedup_by(|a, b| a.name == b.name);
        (queues, self.offer(&registry, routing_key, envelope))
    }

    fn offer(&self, registry: &Registry, routing_key: &str, envelope: &Envelope) -> bool {
        let mut heard = false;
        for listener in &registry.transient {
            let wanted = listener.patterns.iter().any(|pattern| topology::matches(pattern, routing_key));
            if !wanted {
                continue;
            }
            heard = true;
            if !listener.queue.offer(Entry::transient(envelope.clone())) {
                self.core.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        heard
    }

    pub fn publish_transient(&self, routing_key: &str, envelope: &Envelope) {
        self.offer(&self.core.registry.read(), routing_key, envelope);
    }

    pub fn subscribe(&self, queue: &str, prefetch: u16) -> Result<Subscription, BusError> {
        let registry = self.core.registry.read();
        let Some(found) = registry.queues.get(queue) else {
            return Err(BusError::UnknownQueue { queue: queue.to_owned() });
        };
        Ok(Subscription::durable(self.clone(), found.clone(), usize::from(prefetch)))
    }

    pub fn subscribe_dead(&self, prefetch: u16) -> Subscription {
        Subscription::durable(self.clone(), self.core.dead.clone(), usize::from(prefetch))
    }

    /// Dead letters that nobody holds.
    pub fn dead_letters(&self) -> u64 {
        self.core.dead.ready()
    }

    pub fn subscribe_transient(&self, queue: &str, patterns: &[&str], capacity: usize) -> Subscription {
        let number = self.core.next_transient.fetch_add(1, Ordering::Relaxed);
        let queue = Arc::new(Queue::new(queue, u32::MAX, capacity));
        self.core.registry.write().transient.push(Listener {
            number,
            patterns: patterns.iter().map(|&pattern| pattern.to_owned()).collect(),
            queue: queue.clone(),
        });
        Subscription::transient(self.clone(), queue, number)
    }

    pub fn dropped(&self) -> u64 {
        self.core.dropped.load(Ordering::Relaxed)
    }

    /// Puts a message into the dead letters. The oldest leaves when there is no room: its content is
    /// still in the outbox that published it.
    pub fn bury(&self, envelope: Envelope, dead: DeadLetter) -> Buried {
        let (id, kind) = (envelope.id, envelope.kind.clone());
        tracing::warn!(%id, kind, queue = dead.origin_queue, reason = dead.reason, "message moved to the dead letters");
        let (sender, handled) = oneshot::channel();
        let entry = Entry::dead(envelope, dead.clone(), sender);
        if let Some(oldest) = self.core.dead.push_out(entry) {
            tracing::error!(id = %oldest.envelope.id, "dead letters are full: the oldest left");
        }
        Buried { dead, handled }
    }

    fn forget(&self, number: u64) {
        let mut registry = self.core.registry.write();
        registry.transient.retain(|listener| listener.number != number);
    }

    /// Gives an entry back after a delivery that did not end in an ack: redelivered, or dead once
    /// the limit is exceeded.
    fn give_back(&self, queue: &Queue, mut entry: Entry) {
        entry.count = entry.count.saturating_add(1);
        if entry.count > queue.delivery_limit {
            self.kill(queue, entry, "delivery_limit");
        } else {
            queue.push_front(entry);
        }
    }

    fn kill(&self, queue: &Queue, entry: Entry, reason: &str) {
        let dead = DeadLetter { origin_queue: queue.name.clone(), reason: reason.to_owned() };
        match entry.waiting {
            // Already dead: it stays where it is.
            Waiting::Handler(_) => queue.push_front(entry),
            Waiting::Publisher(outcome) => {
                let buried = self.bury(entry.envelope, dead);
                // A publisher that went away does not care.
                let _ = outcome.send(Outcome::Dead(buried));
            }
            Waiting::Nobody => {}
        }
    }
}
