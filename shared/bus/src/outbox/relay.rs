//! Publishes what the outbox holds.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use infera_runtime::{CancellationToken, clock, planned};
use sea_orm::{DatabaseConnection, DbBackend, DbErr};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::schema::outbox;
use super::store::{self, Key};
use crate::bus::{Bus, Envelope};
use crate::delivery::DeadLetter;
use crate::error::BusError;
use crate::memory::Buried;

/// Messages in flight at most. In process a confirm may take as long as a request's processing, so
/// this bounds how many messages a service has waiting at others.
const MAX_IN_FLIGHT: usize = 1024;
/// Bodies in flight at most, bytes, give or take one batch.
const MAX_IN_FLIGHT_BYTES: usize = 256 * 1024 * 1024;
/// Rows fetched at a time.
const BATCH: usize = 64;
/// How often the table is looked at without being woken: finds rows of a replica that died.
const TICK: Duration = Duration::from_secs(1);
/// How long a relay has a row before it must renew, ms: what a crash of one of several replicas
/// delays its messages.
const LEASE_MS: i64 = 5_000;
/// Dead letters put back at the start.
const MAX_RESTORED: u64 = 1_000;
/// How long a shutdown waits for confirms; what is not confirmed then is published again later.
const DRAIN: Duration = Duration::from_secs(2);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(10);

/// The task that publishes a service's outbox: one for each database connection; clones share it.
#[derive(Debug, Clone)]
pub struct Relay {
    wake: Arc<Notify>,
    stopped: CancellationToken,
}

impl Relay {
    /// Starts the task on the current tokio runtime; it ends after `shutdown`. First it publishes what an
    /// earlier process left. The order of messages is kept only roughly: consumers must not rely on it.
    pub fn start(db: DatabaseConnection, bus: Bus, shutdown: CancellationToken) -> Self {
        let relay = Self { wake: Arc::new(Notify::new()), stopped: CancellationToken::new() };
        let worker = Worker {
            shared: db.get_database_backend() == DbBackend::Postgres,
            db,
            bus,
            owner: Uuid::now_v7(),
            wake: relay.wake.clone(),
            publishing: JoinSet::new(),
            in_flight: HashSet::new(),
            in_flight_bytes: 0,
            confirmed: Vec::new(),
            graves: FuturesUnordered::new(),
        };
        let stopped = relay.stopped.clone().drop_guard();
        tokio::spawn(async move {
            worker.run(shutdown).await;
            drop(stopped);
        });
        relay
    }

    /// Says that a transaction with messages was committed.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Resolves once the task has ended.
    pub async fn stopped(&self) {
        self.stopped.cancelled().await;
    }
}

struct Worker {
    db: DatabaseConnection,
    bus: Bus,
    owner: Uuid,
    /// Whether other processes may publish the same table. SQLite belongs to one process, which saves
    /// the leases and their writes.
    shared: bool,
    wake: Arc<Notify>,
    publishing: JoinSet<Option<Published>>,
    /// Rows that are not to be published again: being published, or confirmed and not yet deleted.
    in_flight: HashSet<Key>,
    in_flight_bytes: usize,
    confirmed: Vec<Published>,
    /// Dead letters of this process that nobody has handled.
    graves: FuturesUnordered<BoxFuture<'static, Option<(Uuid, String)>>>,
}

struct Published {
    key: Key,
    envelope: Envelope,
    buried: Vec<Buried>,
}

impl Worker {
    async fn run(mut self, shutdown: CancellationToken) {
        self.restore_dead_letters(&shutdown).await;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let wake = self.wake.clone();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = wake.notified() => {}
                _ = tick.tick() => self.renew().await,
                Some(published) = self.publishing.join_next() => self.collect(published),
                Some(handled) = self.graves.next() => {
                    if let Some((id, queue)) = handled {
                        self.handled(id, &queue).await;
                    }
                    continue;
                }
            }
            // Those that are confirmed by now leave in one transaction.
            while let Some(published) = self.publishing.try_join_next() {
                self.collect(published);
            }
            self.step().await;
        }
        self.drain().await;
    }

    /// Deletes what is confirmed and publishes what is there. The database's errors are logged and
    /// tried again at the next tick.
    async fn step(&mut self) {
        let result = match self.settle().await {
            Ok(()) => self.publish_waiting().await,
            error => error,
        };
        if let Err(error) = result {
            tracing::warn!(%error, "outbox is not reachable, trying again");
        }
    }

    async fn publish_waiting(&mut self) -> Result<(), DbErr> {
        while self.in_flight.len() < MAX_IN_FLIGHT && self.in_flight_bytes < MAX_IN_FLIGHT_BYTES {
            let limit = BATCH.min(MAX_IN_FLIGHT - self.in_flight.len());
            let rows = if self.shared {
                let now = clock::now_ms();
                store::claim(&self.db, self.owner, now, now + LEASE_MS, limit).await?
            } else {
                store::waiting(&self.db, &self.in_flight, limit).await?
            };
            let last = rows.len() < limit;
            for row in rows {
                self.publish(row);
            }
            if last {
                break;
            }
        }
        Ok(())
    }

    fn publish(&mut self, row: outbox::Model) {
        let key = (row.id, row.routing_key);
        // A lease that ended while this relay was stalled comes back to it.
        if !self.in_flight.insert(key.clone()) {
            return;
        }
        let envelope =
            Envelope { id: row.id, kind: row.kind, body: row.body.into(), traceparent: row.traceparent };
        self.in_flight_bytes += envelope.body.len();
        let bus = self.bus.clone();
        self.publishing.spawn(publish(bus, key, envelope));
    }

    fn collect(&mut self, published: Result<Option<Published>, tokio::task::JoinError>) {
        match published {
            Ok(Some(published)) => self.confirmed.push(published),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, "publishing from the outbox ended"),
        }
    }

    async fn settle(&mut self) -> Result<(), DbErr> {
        let (plain, dead): (Vec<_>, Vec<_>) = std::mem::take(&mut self.confirmed)
            .into_iter()
            .partition(|published| published.buried.is_empty());
        self.confirmed = dead;
        for chunk in chunks(plain) {
            let keys: Vec<Key> = chunk.iter().map(|published| published.key.clone()).collect();
            if let Err(error) = store::delete(&self.db, &keys).await {
                self.confirmed.extend(chunk);
                return Err(error);
            }
            for published in &chunk {
                self.forget(published);
            }
        }
        while let Some(published) = self.confirmed.pop() {
            if let Err(error) = self.bury(&published).await {
                self.confirmed.push(published);
                return Err(error);
            }
            self.forget(&published);
            let id = published.envelope.id;
            for Buried { dead, handled } in published.buried {
                self.graves.push(grave(id, dead.origin_queue, handled));
            }
        }
        Ok(())
    }

    async fn bury(&mut self, published: &Published) -> Result<(), DbErr> {
        let dead: Vec<DeadLetter> = published.buried.iter().map(|b| b.dead.clone()).collect();
        let now = clock::now_ms();
        store::bury(&self.db, &published.key, &published.envelope, &dead, now).await
    }

    fn forget(&mut self, published: &Published) {
        self.in_flight.remove(&published.key);
        self.in_flight_bytes -= published.envelope.body.len();
    }

    async fn handled(&mut self, id: Uuid, queue: &str) {
        if let Err(error) = store::unbury(&self.db, id, queue).await {
            tracing::warn!(%error, %id, "a handled dead letter comes back at the next start");
        }
    }

    async fn restore_dead_letters(&mut self, shutdown: &CancellationToken) {
        loop {
            match store::buried(&self.db, MAX_RESTORED).await {
                Ok(letters) => {
                    for (envelope, dead) in letters {
                        let (id, queue) = (envelope.id, dead.origin_queue.clone());
                        if let Some(buried) = self.bus.restore_dead_letter(envelope, dead) {
                            self.graves.push(grave(id, queue, buried.handled));
                        }
                    }
                    return;
                }
                Err(error) => tracing::warn!(%error, "outbox is not reachable, trying again"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    async fn renew(&mut self) {
        if self.shared && !self.in_flight.is_empty() {
            let until = clock::now_ms() + LEASE_MS;
            if let Err(error) = store::renew(&self.db, self.owner, until).await {
                tracing::warn!(%error, "outbox leases are not renewed");
            }
        }
    }

    async fn drain(mut self) {
        let deadline = tokio::time::sleep(DRAIN);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                () = &mut deadline => break,
                next = self.publishing.join_next() => match next {
                    Some(published) => self.collect(published),
                    None => break,
                },
            }
        }
        self.publishing.abort_all();
        let mut result = self.settle().await;
        if result.is_ok() && self.shared {
            result = store::release(&self.db, self.owner).await;
        }
        if let Err(error) = result {
            tracing::warn!(%error, "messages already confirmed are published again at the next start");
        }
    }
}

/// Publishes one message until it is confirmed; `None` when the bus is closed.
async fn publish(bus: Bus, key: Key, envelope: Envelope) -> Option<Published> {
    let kind = envelope.kind.clone();
    planned::pause(&format!("outbox.{kind}.before_publish")).await;
    let mut backoff = FIRST_BACKOFF;
    let buried = loop {
        match bus.publish_confirmed(&key.1, envelope.clone()).await {
            Ok(buried) => break buried,
            Err(BusError::Closed) => return None,
            Err(error) => tracing::warn!(%error, id = %key.0, "message not published, trying again"),
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(LAST_BACKOFF);
    };
    planned::pause(&format!("outbox.{kind}.after_publish")).await;
    Some(Published { key, envelope, buried })
}

fn grave(
    id: Uuid,
    queue: String,
    handled: tokio::sync::oneshot::Receiver<()>,
) -> BoxFuture<'static, Option<(Uuid, String)>> {
    // Pushed out of the bus by others: the row stays.
    Box::pin(async move { handled.await.ok().map(|()| (id, queue)) })
}

fn chunks(mut all: Vec<Published>) -> Vec<Vec<Published>> {
    let mut chunks = Vec::new();
    while all.len() > BATCH {
        let rest = all.split_off(BATCH);
        chunks.push(std::mem::replace(&mut all, rest));
    }
    if !all.is_empty() {
        chunks.push(all);
    }
    chunks
}
