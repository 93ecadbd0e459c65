//! Dead letters in the hands of an operator: looked at without their content, put back to where they failed.
//!
//! With RabbitMQ they are in one queue of the broker. In process they are in the database of the service that
//! published them: [`crate::outbox::buried`].

use std::time::Duration;

use infera_wire::topology::keys;

use crate::bus::Bus;
use crate::delivery::{Delivery, Subscription};
use crate::error::BusError;

/// How long the next dead letter may take that the broker said it has: another operator may have taken it.
const WAIT: Duration = Duration::from_secs(5);

/// Dead letters that are held while this lives. What is not acked goes back to where it was.
#[derive(Debug)]
pub struct Held {
    pub letters: Vec<Delivery>,
    _subscription: Subscription,
}

/// Holds up to `most` of the dead letters that are there now, oldest first.
///
/// # Errors
/// [`BusError::Closed`].
pub async fn hold(bus: &Bus, most: u16) -> Result<Held, BusError> {
    let there = bus.dead_letters().await?.min(u64::from(most));
    let most = u16::try_from(there).unwrap_or(most);
    let mut subscription = bus.subscribe_dead(most.max(1)).await?;
    let mut letters = Vec::new();
    while letters.len() < usize::from(most) {
        match tokio::time::timeout(WAIT, subscription.next()).await {
            Ok(Some(letter)) => letters.push(letter),
            Ok(None) => return Err(BusError::Closed),
            Err(_) => break,
        }
    }
    Ok(Held { letters, _subscription: subscription })
}

/// Publishes a dead letter to the queue that it failed in, and to no other, and takes it out of the dead letters. It
/// counts as delivered for the first time there. A crash in between leaves both: the inbox knows the second.
///
/// # Errors
/// [`BusError`]: it is still a dead letter.
pub async fn replay(bus: &Bus, letter: Delivery) -> Result<(), BusError> {
    let queue = letter.dead_letter.as_ref().map(|dead| dead.origin_queue.clone()).unwrap_or_default();
    bus.publish(&keys::direct(&queue), letter.envelope.clone()).await?;
    letter.ack().await
}
