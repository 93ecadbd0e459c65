//! One message in the hands of a consumer, and the stream they come from.

use std::time::Duration;

use crate::bus::Envelope;
use crate::error::BusError;
use crate::{memory, rabbit};

/// Longest wait that [`Delivery::retry`] accepts: well below the broker's own limit on how long a
/// delivery may stay unacknowledged (30 minutes).
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// A message that was delivered and is not yet settled. Dropping it redelivers it.
#[derive(Debug)]
pub struct Delivery {
    pub envelope: Envelope,
    /// Earlier deliveries of this message from this queue that did not end in an ack: 0 at first.
    pub delivery_count: u32,
    /// Where the message failed; only on deliveries from the queue of dead letters.
    pub dead_letter: Option<DeadLetter>,
    /// Deliveries beyond the first before the message is a dead letter.
    pub(crate) delivery_limit: u32,
    pub(crate) ticket: Ticket,
}

/// Where and why a message failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The durable queue it failed in, without prefix.
    pub origin_queue: String,
    /// The consumer's reason, or `delivery_limit`.
    pub reason: String,
}

#[derive(Debug)]
pub(crate) enum Ticket {
    /// At most once: settled by being delivered.
    Transient,
    Memory(memory::Ticket),
    Rabbit(Box<rabbit::Ticket>),
}

impl Delivery {
    /// Whether it can still be settled. False once its connection or subscription is gone: then the message is
    /// delivered again, whatever becomes of this delivery.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        match &self.ticket {
            Ticket::Transient => true,
            Ticket::Memory(ticket) => ticket.usable(),
            Ticket::Rabbit(ticket) => ticket.usable(),
        }
    }

    /// The message is processed.
    ///
    /// # Errors
    /// [`BusError::Stale`]: it will be, or was, delivered again.
    pub async fn ack(self) -> Result<(), BusError> {
        match self.ticket {
            Ticket::Transient => Ok(()),
            Ticket::Memory(ticket) => ticket.ack(),
            Ticket::Rabbit(ticket) => ticket.ack().await,
        }
    }

    /// Redelivers the message after `after` (at most [`MAX_RETRY_AFTER`]) with its delivery count one
    /// higher, or moves it to the dead letters if that exceeds the limit. Returns at once; until then
    /// the message takes a place in its subscription's prefetch. If this process ends first, the
    /// message is redelivered then.
    pub fn retry(self, after: Duration) {
        let after = after.min(MAX_RETRY_AFTER);
        match self.ticket {
            Ticket::Transient => {}
            Ticket::Memory(ticket) => ticket.retry(after),
            Ticket::Rabbit(ticket) => ticket.retry(after),
        }
    }

    /// Moves the message to the queue of dead letters with its content, its queue and `reason`.
    ///
    /// # Errors
    /// [`BusError::Stale`] and [`BusError::Closed`]: it will be delivered again.
    pub async fn dead_letter(self, reason: &str) -> Result<(), BusError> {
        match self.ticket {
            Ticket::Transient => Ok(()),
            Ticket::Memory(ticket) => ticket.dead_letter(reason),
            Ticket::Rabbit(ticket) => ticket.dead_letter(&self.envelope, reason).await,
        }
    }
}

/// A stream of deliveries. Dropping it requeues what it delivered and was not settled.
#[derive(Debug)]
pub struct Subscription {
    pub(crate) source: Source,
}

#[derive(Debug)]
pub(crate) enum Source {
    Memory(memory::Subscription),
    Rabbit(rabbit::Subscription),
}

impl Subscription {
    /// The next message; waits while there is none, or while as many are unsettled as the prefetch
    /// allows. `None` once the bus is closed. Cancelling the wait loses nothing.
    pub async fn next(&mut self) -> Option<Delivery> {
        match &mut self.source {
            Source::Memory(source) => source.next().await,
            Source::Rabbit(source) => source.next().await,
        }
    }
}
