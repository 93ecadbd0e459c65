//! One queue of the in-process bus.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use uuid::Uuid;

use super::Buried;
use crate::bus::Envelope;
use crate::delivery::DeadLetter;
use crate::error::BusError;

#[derive(Debug)]
pub(super) struct Queue {
    pub name: String,
    pub delivery_limit: u32,
    capacity: usize,
    /// Places for published entries; an entry keeps its place until it is settled.
    places: Arc<Semaphore>,
    ready: Mutex<VecDeque<Entry>>,
    pushed: Notify,
}

/// A message in one queue.
#[derive(Debug)]
pub(super) struct Entry {
    pub envelope: Envelope,
    /// Deliveries so far that did not end in an ack.
    pub count: u32,
    pub dead: Option<DeadLetter>,
    pub waiting: Waiting,
    _place: Option<OwnedSemaphorePermit>,
}

/// Who is told when the entry is settled.
#[derive(Debug)]
pub(super) enum Waiting {
    Nobody,
    Publisher(oneshot::Sender<Outcome>),
    /// Of a dead letter: whoever keeps its content.
    Handler(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(super) enum Outcome {
    Acked,
    Dead(Buried),
}

impl Entry {
    pub fn published(
        envelope: Envelope,
        outcome: oneshot::Sender<Outcome>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self { envelope, count: 0, dead: None, waiting: Waiting::Publisher(outcome), _place: Some(place) }
    }

    pub fn transient(envelope: Envelope) -> Self {
        Self { envelope, count: 0, dead: None, waiting: Waiting::Nobody, _place: None }
    }

    pub fn dead(envelope: Envelope, dead: DeadLetter, handled: oneshot::Sender<()>) -> Self {
        Self { envelope, count: 0, dead: Some(dead), waiting: Waiting::Handler(handled), _place: None }
    }

    /// Whoever waits may have gone away, which changes nothing.
    pub fn acked(self) {
        match self.waiting {
            Waiting::Nobody => {}
            Waiting::Publisher(outcome) => drop(outcome.send(Outcome::Acked)),
            Waiting::Handler(handled) => drop(handled.send(())),
        }
    }
}

impl Queue {
    pub fn new(name: &str, delivery_limit: u32, capacity: usize) -> Self {
        let capacity = capacity.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            name: name.to_owned(),
            delivery_limit,
            capacity,
            places: Arc::new(Semaphore::new(capacity)),
            ready: Mutex::default(),
            pushed: Notify::new(),
        }
    }

    /// Waits for a place.
    pub async fn room(&self) -> Result<OwnedSemaphorePermit, BusError> {
        let places = self.places.clone();
        places.acquire_owned().await.map_err(|_| BusError::Closed)
    }

    pub fn push(&self, entry: Entry) {
        self.ready.lock().push_back(entry);
        self.pushed.notify_one();
    }

    pub fn push_front(&self, entry: Entry) {
        self.ready.lock().push_front(entry);
        self.pushed.notify_one();
    }

    /// Pushes unless the queue is full; says whether it did.
    pub fn offer(&self, entry: Entry) -> bool {
        let mut ready = self.ready.lock();
        if ready.len() >= self.capacity {
            return false;
        }
        ready.push_back(entry);
        drop(ready);
        self.pushed.notify_one();
        true
    }

    /// Pushes, and returns the oldest entry if that made one too many.
    pub fn push_out(&self, entry: Entry) -> Option<Entry> {
        let mut ready = self.ready.lock();
        ready.push_back(entry);
        let oldest = (ready.len() > self.capacity).then(|| ready.pop_front());
        drop(ready);
        self.pushed.notify_one();
        oldest.flatten()
    }

    /// Takes out a dead letter that is tried again in the queue it failed in.
    pub fn take_dead(&self, id: Uuid, origin_queue: &str) {
        self.ready.lock().retain(|entry| {
            let origin = entry.dead.as_ref().map(|dead| dead.origin_queue.as_str());
            entry.envelope.id != id || origin != Some(origin_queue)
        });
    }

    /// Entries that wait for a subscriber.
    pub fn ready(&self) -> u64 {
        self.ready.lock().len() as u64
    }

    /// The next entry; waits for one. Cancelling the wait passes a wake-up on.
    pub async fn pop(&self) -> Entry {
        loop {
            let pushed = self.pushed.notified();
            tokio::pin!(pushed);
            // Registered before the look, so that a push in between is not missed.
            pushed.as_mut().enable();
            if let Some(entry) = self.ready.lock().pop_front() {
                return entry;
            }
            pushed.await;
        }
    }
}
