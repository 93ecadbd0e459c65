//! `Replies`: who waits at this replica for which request, and the state of their streams.
//!
//! ```text
//! http --Wait--> Replies <--Deltas, Closed-- consumers of the bus
//!   ^---------- Event: tokens, the end ------'
//! ```
//!
//! Handlers are synchronous and never wait: a subscriber's channel has room for every token that its
//! request may have. Nothing here must survive: a waiting client also looks into the database.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, AsyncContext, Context, Handler, Message};
use infera_runtime::CancellationToken;
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;
use uuid::Uuid;

use crate::domain::merge::{Delta, Merge, Mode};
use crate::domain::outcome::Outcome;

/// How often requests whose clients have left are forgotten.
const SWEEP: Duration = Duration::from_secs(1);

/// What a waiting client is told.
#[derive(Debug, Clone)]
pub enum Event {
    /// Tokens that may be emitted.
    Tokens(Vec<u32>),
    /// The request is closed; nothing follows.
    Closed(Arc<Outcome>),
}

/// A client begins to wait.
#[derive(Debug, Message)]
#[rtype(result = "Result<mpsc::Receiver<Event>, Full>")]
pub struct Wait {
    pub id: Uuid,
    /// For streams: how they are fed.
    pub stream: Option<Mode>,
    pub max_tokens: u32,
}

/// As many clients wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as many clients wait as may")]
pub struct Full;

/// Tokens of replicas, for any requests.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Deltas(pub Vec<(Uuid, Delta)>);

/// A request is closed.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Closed {
    pub id: Uuid,
    pub outcome: Arc<Outcome>,
}

/// The actor. Dropped by a panic as by a stop, it cancels the service, which is then started again.
pub struct Replies {
    waiting: HashMap<Uuid, Waiting>,
    limit: usize,
    _stops_the_service: DropGuard,
}

struct Waiting {
    stream: Option<Merge>,
    clients: Vec<mpsc::Sender<Event>>,
}

impl Replies {
    /// At most `limit` requests are waited for; `stopped` is cancelled when the actor ends.
    pub fn new(limit: usize, stopped: CancellationToken) -> Self {
        Self { waiting: HashMap::new(), limit, _stops_the_service: stopped.drop_guard() }
    }

    fn sweep(&mut self) {
        self.waiting.retain(|_, waiting| {
            waiting.clients.retain(|client| !client.is_closed());
            !waiting.clients.is_empty()
        });
    }
}

impl Actor for Replies {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(1024);
        context.run_interval(SWEEP, |replies, _| replies.sweep());
    }
}

impl Handler<Wait> for Replies {
    type Result = Result<mpsc::Receiver<Event>, Full>;

    fn handle(&mut self, wait: Wait, _: &mut Self::Context) -> Self::Result {
        let full = self.waiting.len() >= self.limit;
        let waiting = match self.waiting.entry(wait.id) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if full => return Err(Full),
            Entry::Vacant(entry) => entry.insert(Waiting { stream: None, clients: Vec::new() }),
        };
        // Each event but the last holds at least one token; one more for what was emitted before.
        let (client, events) = mpsc::channel(wait.max_tokens as usize + 2);
        if let Some(mode) = wait.stream {
            let merge = waiting.stream.get_or_insert_with(|| Merge::new(mode, wait.max_tokens));
            if !merge.emitted().is_empty() {
                send(&client, Event::Tokens(merge.emitted().to_vec()));
            }
        }
        waiting.clients.push(client);
        Ok(events)
    }
}

impl Handler<Deltas> for Replies {
    type Result = ();

    fn handle(&mut self, Deltas(deltas): Deltas, _: &mut Self::Context) {
        for (id, delta) in deltas {
            let Some(waiting) = self.waiting.get_mut(&id) else { continue };
            let Some(merge) = &mut waiting.stream else { continue };
            let fresh = merge.push(delta);
            if !fresh.is_empty() {
                waiting.clients.iter().for_each(|client| send(client, Event::Tokens(fresh.clone())));
            }
        }
    }
}

impl Handler<Closed> for Replies {
    type Result = ();

    fn handle(&mut self, closed: Closed, _: &mut Self::Context) {
        if let Some(waiting) = self.waiting.remove(&closed.id) {
            waiting.clients.iter().for_each(|client| send(client, Event::Closed(closed.outcome.clone())));
        }
    }
}

fn send(client: &mpsc::Sender<Event>, event: Event) {
    // Full cannot be (see `Wait`); closed is a client that left.
    let _ = client.try_send(event);
}
