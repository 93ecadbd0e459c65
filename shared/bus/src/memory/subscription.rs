//! Consuming a queue of the in-process bus.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Memory;
use super::queue::{Entry, Queue};
use crate::delivery::{self, Delivery};
use crate::error::BusError;

#[derive(Debug)]
pub(crate) struct Subscription {
    memory: Memory,
    queue: Arc<Queue>,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    Durable(Arc<Unsettled>),
    Transient { number: u64 },
}

/// What a subscription delivered and nobody settled yet.
#[derive(Debug)]
pub(crate) struct Unsettled {
    memory: Memory,
    queue: Arc<Queue>,
    prefetch: Arc<Semaphore>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    next_tag: u64,
    entries: BTreeMap<u64, (Entry, OwnedSemaphorePermit)>,
}

impl Subscription {
    pub(super) fn durable(memory: Memory, queue: Arc<Queue>, prefetch: usize) -> Self {
        let unsettled = Arc::new(Unsettled {
            memory: memory.clone(),
            queue: queue.clone(),
            prefetch: Arc::new(Semaphore::new(prefetch)),
            held: Mutex::default(),
        });
        Self { memory, queue, mode: Mode::Durable(unsettled) }
    }

    pub(super) fn transient(memory: Memory, queue: Arc<Queue>, number: u64) -> Self {
        Self { memory, queue, mode: Mode::Transient { number } }
    }

    pub async fn next(&mut self) -> Option<Delivery> {
        match &self.mode {
            Mode::Transient { .. } => {
                let entry = self.queue.pop().await;
                Some(Delivery {
                    envelope: entry.envelope,
                    delivery_count: 0,
                    delivery_limit: u32::MAX,
                    dead_letter: None,
                    ticket: delivery::Ticket::Transient,
                })
            }
            Mode::Durable(unsettled) => {
                let permit = unsettled.prefetch.clone().acquire_owned().await.ok()?;
                let entry = self.queue.pop().await;
                Some(unsettled.hand_out(entry, permit))
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        match &self.mode {
            Mode::Transient { number } => self.memory.forget(*number),
            Mode::Durable(unsettled) => unsettled.close(),
        }
    }
}

impl Unsettled {
    fn hand_out(self: &Arc<Self>, entry: Entry, permit: OwnedSemaphorePermit) -> Delivery {
        let mut held = self.held.lock();
        let tag = held.next_tag;
        held.next_tag += 1;
        let delivery = Delivery {
            envelope: entry.envelope.clone(),
            delivery_count: entry.count,
            delivery_limit: self.queue.delivery_limit,
            dead_letter: entry.dead.clone(),
            ticket: delivery::Ticket::Memory(Ticket { unsettled: self.clone(), tag }),
        };
        held.entries.insert(tag, (entry, permit));
        delivery
    }

    fn take(&self, tag: u64) -> Option<Entry> {
        // The permit is released here, so that the next delivery may come.
        self.held.lock().entries.remove(&tag).map(|(entry, _)| entry)
    }

    /// Gives everything back, in the order it was delivered.
    fn close(&self) {
        let entries = std::mem::take(&mut self.held.lock().entries);
        for (entry, _) in entries.into_values().rev() {
            self.memory.give_back(&self.queue, entry);
        }
    }
}

/// The right to settle one delivery; dropped unused, it gives the message back.
#[derive(Debug)]
pub(crate) struct Ticket {
    unsettled: Arc<Unsettled>,
    tag: u64,
}

impl Ticket {
    pub fn usable(&self) -> bool {
        self.unsettled.held.lock().entries.contains_key(&self.tag)
    }

    pub fn ack(self) -> Result<(), BusError> {
        let entry = self.unsettled.take(self.tag).ok_or(BusError::Stale)?;
        entry.acked();
        Ok(())
    }

    pub fn dead_letter(self, reason: &str) -> Result<(), BusError> {
        let entry = self.unsettled.take(self.tag).ok_or(BusError::Stale)?;
        self.unsettled.memory.kill(&self.unsettled.queue, entry, reason);
        Ok(())
    }

    pub fn retry(self, after: Duration) {
        // Without a runtime there is no timer: redelivered at once, by dropping the ticket.
        if let (false, Ok(runtime)) = (after.is_zero(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                tokio::time::sleep(after).await;
                drop(self);
            });
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Absent once it is settled, or given back because the subscription closed.
        if let Some(entry) = self.unsettled.take(self.tag) {
            self.unsettled.memory.give_back(&self.unsettled.queue, entry);
        }
    }
}
