//! The gateway: the only door for consumers, and the owner of their keys.
//!
//! ```text
//! client --POST /v1/chat/completions--> check key, quota, body
//!                                         render prompt, fix seed
//!                                         tx { requests row, outbox } --request.submitted--> settlement
//!    ^                                    wait
//!    |   <-- tokens -- Replies (actor) <-- deltas.<replica>               (transient)
//!    '-- answer ------ Replies (actor) <-- verdict.<replica>, request.rejected.<replica> (transient)
//!                      requests row   <-- gateway.verdict, gateway.rejected  (durable, all replicas)
//! ```
//!
//! Promises:
//! - A request is submitted if and only if its row is stored. The same `Idempotency-Key` and body lead to
//!   the same request, one charge and the same answer, also after a crash and at another replica.
//! - Nothing is ignored that would change an answer: it is refused, and the refusal names the field.
//! - What a stream emitted is never taken back. It is a prefix of the delivered answer, or the stream
//!   ends with an error event.
//! - Prompts and answers are in no log and in no span.
//! - An API key is made for a signature (ERC-4361) or by `infera keys`; what is kept of it never is the key. A revoked
//!   key gets 401 on every route, those that settlement answers included.
//!
//! Invariants:
//! - The first closing message of a request counts; it is stored once ([`store::close`]).
//! - A lost wake-up costs latency only: who waits also looks into the database.
//! - No service is called for an answer: one that is down delays requests until their deadline. Only what people ask
//!   about money and receipts is passed on to settlement while they wait ([`settlement`]).

mod actor;
mod app;
mod catalog;
pub mod config;
mod consumer;
pub mod domain;
pub mod error;
mod http;
pub mod keys;
mod metrics;
mod places;
mod settlement;
mod sign_in;
pub mod store;
mod wait;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use actix_web::web::Data;
use infera_bus::outbox::Relay;
use infera_bus::watch::Watch;
use infera_bus::{Bus, BusError, ConsumerSpec, Topology};
use infera_runtime::health::{CheckHandle, Health};
use infera_runtime::jwt::Verifier;
use infera_runtime::kv::Kv;
use infera_runtime::{CancellationToken, clock, db};
use infera_wire::topology::queues;
use sea_orm::DatabaseConnection;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use uuid::Uuid;

pub use config::{Config, DEFAULTS};
pub use error::Error;
pub use http::MAX_BODY;
pub use store::Migrator;

use actor::Replies;
use app::App;
use catalog::Catalog;
use metrics::Metrics;
use places::Places;
use settlement::Settlement;
use sign_in::SignIn;

/// How often the key-value store is looked at for `/readyz`.
const CHECK_EVERY: Duration = Duration::from_secs(2);
const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// What differs between an embedded and a deployed gateway.
pub struct Deps {
    pub bus: Bus,
    /// Counts requests per key.
    pub kv: Kv,
    /// Gets the HTTP address once the gateway listens.
    pub bound: Option<oneshot::Sender<SocketAddr>>,
}

/// Serves until `shutdown` is cancelled and everything is drained. Must run inside an actix System.
///
/// # Errors
/// [`Error`], one sentence: it could not start, or a part of it ended.
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let Deps { bus, kv, bound } = deps;
    let health = Health::new("gateway");
    let metrics = Metrics::register(&health)?;
    let verifier = Verifier::from_jwks_file(&config.common.jwks_path)?;
    let sign_in = SignIn::load(&config, &verifier)?;
    let settlement = Settlement::new(&config)?;
    let catalog = load_catalog(&config).await?;
    let db =
        db::connect(config.common.database_url.expose(), config.common.database_schema.as_deref()).await?;
    db::migrate::<Migrator>(&db).await?;
    bus.declare(&Topology::network()).await?;

    // Phases of the end: `stop` refuses new requests, `drained` sends waiting clients away, `work` ends the rest.
    let stop = shutdown.child_token();
    let drained = CancellationToken::new();
    let work = CancellationToken::new();
    let relay = Relay::start(db.clone(), bus.clone(), work.clone());
    let replies = Replies::new(config.max_waiting, stop.clone()).start();
    let replica = config.replica.clone().unwrap_or_else(|| format!("gw-{}", Uuid::now_v7().simple()));
    let parts = Parts { bus: &bus, db: &db, relay: &relay, replies: &replies, stop: &stop, work: &work };
    let tasks = parts.start(&config, &replica).await?;
    actix_rt::spawn(Watch::new(&health, bus.clone(), db.clone(), true)?.run(work.clone()));
    {
        let (catalog, work) = (catalog.clone(), work.clone());
        actix_rt::spawn(async move { catalog.follow(work).await });
    }
    actix_rt::spawn(watch_kv(health.check("kv"), kv.clone(), work.clone()));
    actix_rt::spawn(prune(db.clone(), config.keep_hours, work.clone()));
    actix_rt::spawn(drain(
        health.clone(),
        stop.clone(),
        drained.clone(),
        Duration::from_secs(config.drain_secs),
    ));

    tracing::info!(replica, models = config.models.len(), "gateway starts");
    let (bind, max_prompts) = (config.common.http_bind.clone(), config.max_prompts);
    let app = App {
        config,
        replica,
        db,
        kv,
        verifier,
        catalog,
        replies,
        relay: relay.clone(),
        metrics,
        sign_in,
        settlement,
        renders: Arc::new(Semaphore::new(
            std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2),
        )),
        places: Places::new(max_prompts),
        drained: drained.clone(),
    };
    let routes = http::routes(Data::new(app), health);
    let served = infera_runtime::http::serve(routes, &bind, stop.clone(), bound).await;
    stop.cancel();
    drained.cancel();
    work.cancel();
    let ended = join(tasks).await;
    relay.stopped().await;
    served?;
    ended?;
    if shutdown.is_cancelled() { Ok(()) } else { Err(Error::Stopped("a part of the gateway")) }
}

async fn load_catalog(config: &Config) -> Result<Catalog, Error> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || Catalog::load(&config))
        .await
        .map_err(|error| Error::Models(format!("the models cannot be loaded: {error}")))?
}

struct Parts<'a> {
    bus: &'a Bus,
    db: &'a DatabaseConnection,
    relay: &'a Relay,
    replies: &'a Addr<Replies>,
    stop: &'a CancellationToken,
    work: &'a CancellationToken,
}

type Task = (&'static str, JoinHandle<Result<(), BusError>>);

impl Parts<'_> {
    /// Starts the consumers. The end of any of them, by a panic too, stops the service.
    async fn start(&self, config: &Config, replica: &str) -> Result<Vec<Task>, Error> {
        let wakes = consumer::subscribe_replies(self.bus, replica).await?;
        let deltas = consumer::subscribe_deltas(self.bus, replica).await?;
        let (work, replies) = (|| self.work.clone(), || self.replies.clone());
        let verdicts = self.spec(queues::GATEWAY_VERDICT, config.prefetch);
        let rejected = self.spec(queues::GATEWAY_REJECTED, config.prefetch);
        Ok(vec![
            self.task("the consumer of verdicts", consumer::verdicts(verdicts, work(), replies())),
            self.task("the consumer of rejections", consumer::rejections(rejected, work(), replies())),
            self.task("the consumer of wake-ups", consumer::wake(wakes, work(), replies())),
            self.task("the consumer of deltas", consumer::deltas(deltas, work(), replies())),
        ])
    }

    fn spec(&self, queue: &'static str, prefetch: u16) -> ConsumerSpec {
        let relay = Some(self.relay.clone());
        ConsumerSpec { bus: self.bus.clone(), db: self.db.clone(), queue, prefetch, relay }
    }

    fn task(&self, name: &'static str, task: impl Future<Output = Result<(), BusError>> + 'static) -> Task {
        let stops_the_service = self.stop.clone().drop_guard();
        let handle = actix_rt::spawn(async move {
            let _stops_the_service = stops_the_service;
            task.await
        });
        (name, handle)
    }
}

async fn join(tasks: Vec<Task>) -> Result<(), Error> {
    let mut result = Ok(());
    for (name, task) in tasks {
        match task.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, task = name, "stopped");
                result = Err(error.into());
            }
            Err(error) => {
                tracing::error!(%error, task = name, "stopped");
                result = Err(Error::Stopped(name));
            }
        }
    }
    result
}

async fn watch_kv(check: CheckHandle, kv: Kv, work: CancellationToken) {
    let mut every = tokio::time::interval(CHECK_EVERY);
    loop {
        tokio::select! {
            () = work.cancelled() => return,
            _ = every.tick() => {}
        }
        match kv.ping().await {
            Ok(()) => check.up(),
            Err(_) => check.down("does not answer"),
        }
    }
}

async fn prune(db: DatabaseConnection, keep_hours: u64, work: CancellationToken) {
    let keep_ms = i64::try_from(keep_hours).unwrap_or(i64::MAX).saturating_mul(3_600_000);
    let mut every = tokio::time::interval(PRUNE_EVERY);
    loop {
        tokio::select! {
            () = work.cancelled() => return,
            _ = every.tick() => {}
        }
        match store::prune(&db, clock::now_ms().saturating_sub(keep_ms)).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "old requests are forgotten"),
            Err(error) => tracing::warn!(%error, "old requests are not forgotten"),
        }
        match keys::prune(&db, clock::now_ms()).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "expired keys are forgotten"),
            Err(error) => tracing::warn!(%error, "expired keys are not forgotten"),
        }
    }
}

async fn drain(health: Health, stop: CancellationToken, drained: CancellationToken, patience: Duration) {
    stop.cancelled().await;
    health.set_draining();
    tokio::time::sleep(patience).await;
    drained.cancel();
}
