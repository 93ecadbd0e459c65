//! Publishes what the outbox holds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use infera_runtime::{CancellationToken, clock, planned};
use infera_wire::topology::keys;
use sea_orm::{DatabaseConnection, DbBackend, DbErr};
use tokio::sync::{Notify, oneshot};
use tokio::task::{Id, JoinError, JoinSet};
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
        let worker = Worker::new(db, bus, relay.wake.clone());
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
    /// What each task of `publishing` has: its row, and the bytes of its body.
    tasks: HashMap<Id, (Key, usize)>,
    /// Rows whose task ended without a confirm; free again at the next tick.
    lost: Vec<(Key, usize)>,
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
    fn new(db: DatabaseConnection, bus: Bus, wake: Arc<Notify>) -> Self {
        Self {
            shared: db.get_database_backend() == DbBackend::Postgres,
            db,
            bus,
            owner: Uuid::now_v7(),
            wake,
            publishing: JoinSet::new(),
            tasks: HashMap::new(),
            lost: Vec::new(),
            in_flight: HashSet::new(),
            in_flight_bytes: 0,
            confirmed: Vec::new(),
            graves: FuturesUnordered::new(),
        }
    }

    async fn run(mut self, shutdown: CancellationToken) {
        self.restore_dead_letters(&shutdown).await;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let wake = self.wake.clone();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = wake.notified() => {}
                _ = tick.tick() => {
                    self.free_lost().await;
                    self.renew().await;
                }
                Some(ended) = self.publishing.join_next_with_id() => self.collect(ended),
                Some(handled) = self.graves.next() => {
                    if let Some((id, queue)) = handled {
                        self.handled(id, &queue).await;
                    }
                    continue;
                }
            }
            // Those that are confirmed by now leave in one transaction.
            while let Some(ended) = self.publishing.try_join_next_with_id() {
                self.collect(ended);
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
        let bytes = envelope.body.len();
        let bus = self.bus.clone();
        self.spawn(key.clone(), bytes, publish(bus, key, envelope));
    }

    fn spawn(
        &mut self,
        key: Key,
        bytes: usize,
        task: impl Future<Output = Option<Published>> + Send + 'static,
    ) {
        self.in_flight_bytes += bytes;
        let id = self.publishing.spawn(task).id();
        self.tasks.insert(id, (key, bytes));
    }

    fn collect(&mut self, ended: Result<(Id, Option<Published>), JoinError>) {
        let (id, published) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "publishing from the outbox ended");
                (error.id(), None)
            }
        };
        let task = self.tasks.remove(&id);
        match published {
            Some(published) => self.confirmed.push(published),
            None => self.lost.extend(task),
        }
    }

    /// Lets rows whose task died be published again. Only now and then, so that one which fails every
    /// time does not keep the relay busy.
    async fn free_lost(&mut self) {
        if self.lost.is_empty() {
            return;
        }
        if self.shared {
            let keys: Vec<Key> = self.lost.iter().map(|(key, _)| key.clone()).collect();
            if let Err(error) = store::release_rows(&self.db, self.owner, &keys).await {
                tracing::warn!(%error, "outbox is not reachable, trying again");
                return;
            }
        }
        for (key, bytes) in std::mem::take(&mut self.lost) {
            self.in_flight.remove(&key);
            self.in_flight_bytes -= bytes;
        }
    }

    async fn settle(&mut self) -> Result<(), DbErr> {
        let (plain, dead): (Vec<_>, Vec<_>) = std::mem::take(&mut self.confirmed)
            .into_iter()
            .partition(|published| published.buried.is_empty());
        self.confirmed = dead;
        let mut chunks = chunks(plain).into_iter();
        while let Some(chunk) = chunks.next() {
            let keys: Vec<Key> = chunk.iter().map(|published| published.key.clone()).collect();
            if let Err(error) = store::delete(&self.db, &keys).await {
                self.confirmed.extend(chunk);
                self.confirmed.extend(chunks.flatten());
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
                next = self.publishing.join_next_with_id() => match next {
                    Some(ended) => self.collect(ended),
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

/// Publishes one message until it is confirmed; `None` when the bus is closed. One that can never be
/// published is a dead letter of its routing key.
async fn publish(bus: Bus, key: Key, envelope: Envelope) -> Option<Published> {
    let kind = envelope.kind.clone();
    planned::pause(&format!("outbox.{kind}.before_publish")).await;
    let mut backoff = FIRST_BACKOFF;
    let buried = loop {
        match bus.publish_confirmed(&key.1, envelope.clone()).await {
            Ok(buried) => break buried,
            Err(BusError::Closed) => return None,
            Err(error @ (BusError::Unroutable { .. } | BusError::TooLarge { .. })) => {
                tracing::error!(%error, id = %key.0, "message can't be published, moved to the dead letters");
                break vec![unpublished(&bus, &key, &envelope, &error)];
            }
            Err(error) => tracing::warn!(%error, id = %key.0, "message not published, trying again"),
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(LAST_BACKOFF);
    };
    planned::pause(&format!("outbox.{kind}.after_publish")).await;
    Some(Published { key, envelope, buried })
}

fn unpublished(bus: &Bus, key: &Key, envelope: &Envelope, error: &BusError) -> Buried {
    // One that was put back names the key that it had at first.
    let origin_queue = keys::direct_queue(&key.1).unwrap_or(&key.1).to_owned();
    let dead = DeadLetter { origin_queue, reason: error.to_string() };
    // A broker gets no message that it can't route: the row in the dead letters is all there is.
    bus.restore_dead_letter(envelope.clone(), dead.clone())
        .unwrap_or_else(|| Buried { dead, handled: oneshot::channel().1 })
}

fn grave(
    id: Uuid,
    queue: String,
    handled: oneshot::Receiver<()>,
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

#[cfg(test)]
mod tests {
    use sea_orm::ConnectionTrait;
    use sea_orm_migration::{MigrationTrait, MigratorTrait};

    use super::*;

    struct Migrator;

    impl MigratorTrait for Migrator {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            vec![super::super::migration()]
        }
    }

    async fn worker(dir: &tempfile::TempDir) -> Worker {
        let url = format!("sqlite://{}/outbox.sqlite?mode=rwc", dir.path().display());
        let db = infera_runtime::db::connect(&url, None).await.unwrap();
        infera_runtime::db::migrate::<Migrator>(&db).await.unwrap();
        Worker::new(db, Bus::in_process(), Arc::new(Notify::new()))
    }

    async fn rows(worker: &Worker, count: usize) -> Vec<outbox::Model> {
        for n in 0..count {
            let message = n.to_string();
            super::super::enqueue(&worker.db, "order.placed", Uuid::now_v7(), &message).await.unwrap();
        }
        store::waiting(&worker.db, &HashSet::new(), count).await.unwrap()
    }

    /// Takes a row as if its message had been confirmed, or as if its task had died.
    async fn end(worker: &mut Worker, row: outbox::Model, dies: bool) {
        let key = (row.id, row.routing_key);
        let envelope = Envelope { id: row.id, kind: row.kind, body: row.body.into(), traceparent: None };
        worker.in_flight.insert(key.clone());
        let bytes = envelope.body.len();
        worker.spawn(key.clone(), bytes, async move {
            assert!(!dies, "planned");
            Some(Published { key, envelope, buried: Vec::new() })
        });
        let ended = worker.publishing.join_next_with_id().await.unwrap();
        worker.collect(ended);
    }

    #[tokio::test]
    async fn confirms_outlive_a_database_that_is_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut worker = worker(&dir).await;
        for row in rows(&worker, 3 * BATCH + 1).await {
            end(&mut worker, row, false).await;
        }
        let refuse = "CREATE TRIGGER refuse BEFORE DELETE ON outbox BEGIN SELECT RAISE(ABORT, 'away'); END";
        worker.db.execute_unprepared(refuse).await.unwrap();
        for _ in 0..3 {
            worker.settle().await.unwrap_err();
            assert_eq!(worker.confirmed.len(), 3 * BATCH + 1, "all are tried again");
        }
        worker.db.execute_unprepared("DROP TRIGGER refuse").await.unwrap();
        worker.settle().await.unwrap();
        assert_eq!(super::super::pending(&worker.db).await.unwrap(), 0);
        assert!(worker.in_flight.is_empty() && worker.tasks.is_empty());
        assert_eq!(worker.in_flight_bytes, 0);
    }

    #[tokio::test]
    async fn a_task_that_dies_frees_its_row() {
        let dir = tempfile::tempdir().unwrap();
        let mut worker = worker(&dir).await;
        let row = rows(&worker, 1).await.remove(0);
        end(&mut worker, row.clone(), true).await;
        worker.settle().await.unwrap();
        assert_eq!(worker.in_flight.len(), 1, "not before the next tick");
        worker.free_lost().await;
        assert!(worker.in_flight.is_empty() && worker.tasks.is_empty());
        assert_eq!(worker.in_flight_bytes, 0);
        assert_eq!(store::waiting(&worker.db, &worker.in_flight, BATCH).await.unwrap(), [row]);
    }
}
