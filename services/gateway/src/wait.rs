//! A client that waits for one request: woken by the actor, and by its own look into the database.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use infera_runtime::CancellationToken;
use sea_orm::DatabaseConnection;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use crate::actor::Event;
use crate::domain::outcome::Outcome;
use crate::store;

/// Looks into the database become rarer, down to this.
const SLOWEST_POLL: Duration = Duration::from_secs(15);

/// What a client waited for.
#[derive(Debug)]
pub(crate) enum Waited {
    /// Tokens that may be emitted.
    Tokens(Vec<u32>),
    /// The request is closed.
    Closed(Arc<Outcome>),
    /// Neither, until beyond the deadline.
    Late,
    /// The service is stopping.
    Draining,
}

/// One client's wait.
pub(crate) struct Waiter {
    id: Uuid,
    /// `None` once the actor has nothing more to say; the database still has.
    events: Option<mpsc::Receiver<Event>>,
    db: DatabaseConnection,
    next_poll: Instant,
    poll: Duration,
    until: Instant,
    drained: CancellationToken,
}

impl Waiter {
    /// Waits for `id` until `until`. `look_first`: the request may be closed already.
    pub(crate) fn new(
        id: Uuid,
        events: mpsc::Receiver<Event>,
        db: DatabaseConnection,
        poll: Duration,
        until: Instant,
        drained: CancellationToken,
        look_first: bool,
    ) -> Self {
        let next_poll = if look_first { Instant::now() } else { Instant::now() + poll };
        Self { id, events: Some(events), db, next_poll, poll, until, drained }
    }

    /// What happens next. Cancelling it loses nothing.
    pub(crate) async fn next(&mut self) -> Waited {
        loop {
            tokio::select! {
                biased;
                event = receive(&mut self.events) => match event {
                    Some(Event::Tokens(tokens)) => return Waited::Tokens(tokens),
                    Some(Event::Closed(outcome)) => return Waited::Closed(outcome),
                    None => self.events = None,
                },
                () = sleep_until(self.next_poll) => {
                    if let Some(outcome) = self.look().await {
                        return Waited::Closed(Arc::new(outcome));
                    }
                }
                () = sleep_until(self.until) => return Waited::Late,
                () = self.drained.cancelled() => return Waited::Draining,
            }
        }
    }

    async fn look(&mut self) -> Option<Outcome> {
        self.next_poll = Instant::now() + self.poll;
        self.poll = (self.poll * 2).min(SLOWEST_POLL.max(self.poll));
        match store::outcome(&self.db, self.id).await {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::warn!(%error, id = %self.id, "cannot look for the outcome");
                None
            }
        }
    }
}

async fn receive(events: &mut Option<mpsc::Receiver<Event>>) -> Option<Event> {
    match events {
        Some(events) => events.recv().await,
        None => pending().await,
    }
}
