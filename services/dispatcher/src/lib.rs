//! The dispatcher: holds the nodes' sessions, draws k of them for every request, and collects what
//! they commit to and reveal.
//!
//! ```text
//!  request.offered ──> [ Assignments ] ──> results.collected ──> verifier
//!                        ^  |     ^ ^──────── verdict.* ────────────┘
//!              commands  |  v     └── 100 ms tick
//!                      [ NodeSession ] x n <══ WebSocket ══> nodes
//! ```
//!
//! Promises:
//! - An offer stays unacked until a closing verdict was seen and noted; if this process dies, the bus delivers it
//!   again and it becomes a new attempt.
//! - Before anything of an attempt is leased, its number is on disk. What a node says about another
//!   attempt is refused, so two different signatures for one slot prove equivocation.
//! - An offer that finds too few operators here goes back to the bus while another replica reports them.
//! - No operator has two nodes in one attempt. The slots sent to the verifier are the first of the draw, in its order,
//!   with whatever came of each: anybody can recompute them.
//! - Reveals are asked for only while nobody who is drawn still computes, and go to the verifier alone.
//! - Referees are drawn from outside the attempt's replicas once results are committed, and get answers without what
//!   their nodes saw. What a verdict says about an operator is in its record before the next draw but one ([`standing`]).
//! - No frame of a node stops anything but its own session; a node that does not read is cut off.
//!
//! [`domain`] decides, [`actor`] executes, [`session`] speaks with one node.

pub mod actor;
pub mod config;
mod consumer;
mod contradictions;
mod deltas;
pub mod domain;
pub mod error;
mod http;
mod metrics;
mod operators;
pub mod roots;
pub mod session;
pub mod standing;
pub mod store;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use infera_bus::watch::Watch;
use infera_bus::{Bus, Topology};
use infera_runtime::health::{self, Health};
use infera_runtime::kv::Kv;
use infera_runtime::shutdown::ends_all;
use infera_runtime::{CancellationToken, clock, db, network};
use sea_orm::DatabaseConnection;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use uuid::Uuid;

pub use config::Config;
pub use error::Error;
pub use roots::load_or_create_key;

use actor::{Assignments, Decided, Tools};
use domain::{Command, Rules, State};
use metrics::Metrics;
use roots::Roots;
use session::Shared;

const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// What the service is given.
pub struct Deps {
    pub bus: Bus,
    pub kv: Kv,
    /// Gets the HTTP address once it listens.
    pub bound: Option<oneshot::Sender<SocketAddr>>,
}

/// Runs until `shutdown`. Must be awaited inside an actix System.
///
/// # Errors
/// What keeps it from starting, and [`Error::ActorEnded`].
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let common = &config.common;
    let roots = Roots::load(&config.key_path, &common.manifest_path, &common.registry_path)?;
    let db = db::connect(common.database_url.expose(), common.database_schema.as_deref()).await?;
    db::migrate::<store::Migrator>(&db).await?;
    deps.bus.declare(&Topology::network()).await?;

    // Whatever ends first ends the others.
    let stop = shutdown.child_token();
    let health = Health::new("dispatcher");
    let metrics = Metrics::register(&health)?;
    let replica = replica(&config);
    let domain = roots.live.now().manifest.domain;
    let live = roots.live.clone();
    let tools = Tools {
        bus: deps.bus.clone(),
        db: db.clone(),
        metrics: metrics.clone(),
        replica: replica.clone(),
        slots_ttl_ms: i64::from(config.slots_ttl_secs) * 1000,
        shutdown: stop.clone(),
        live: live.clone(),
    };
    let assignments = Assignments::new(State::new(rules(&config, &roots)), tools).start();
    let shared = Arc::new(Shared {
        assignments: assignments.clone(),
        domain,
        live: live.clone(),
        db: db.clone(),
        kv: deps.kv,
        metrics,
        replica: replica.clone(),
        heartbeat_secs: config.heartbeat_secs,
        hello_secs: config.hello_secs,
        proof_secs: config.proof_secs,
        recheck_secs: config.recheck_secs,
        session_queue: config.session_queue,
        shutdown: stop.clone(),
    });
    let changed = Arc::new(Notify::new());
    let conduct =
        standing::follow_verdicts(deps.bus.clone(), db.clone(), live.clone(), changed.clone(), stop.clone());
    let ledger = standing::keep_ledger(db.clone(), assignments.clone(), changed, stop.clone());
    actix_rt::spawn(follow_registry(live.watch(), assignments.clone()));
    let following = live.follow(stop.clone());
    let places = Arc::new(Semaphore::new(config.max_sessions));
    let watch = Watch::new(&health, deps.bus.clone(), db.clone(), false)?;
    actix_rt::spawn(prune(db, stop.clone()));
    let serve = infera_runtime::http::serve(
        move |config| {
            health::routes(health.clone())(config);
            http::routes(shared.clone(), places.clone())(config);
        },
        &common.http_bind,
        stop.clone(),
        deps.bound,
    );
    let offers =
        consumer::offers(deps.bus.clone(), config.max_requests, domain, assignments.clone(), stop.clone());
    let verdicts = consumer::verdicts(deps.bus.clone(), replica.clone(), assignments.clone(), stop.clone());
    let peers = consumer::peers(deps.bus, replica, assignments, stop.clone());
    let (a, b, c, d, e, f, (), ()) = tokio::join!(
        ends_all(&stop, Box::pin(async { serve.await.map_err(Error::from) })),
        ends_all(&stop, Box::pin(offers)),
        ends_all(&stop, Box::pin(verdicts)),
        ends_all(&stop, Box::pin(peers)),
        ends_all(&stop, Box::pin(conduct)),
        ends_all(&stop, Box::pin(ledger)),
        watch.run(stop.clone()),
        following,
    );
    a.and(b).and(c).and(d).and(e).and(f)
}

fn replica(config: &Config) -> String {
    if config.replica.is_empty() { format!("d-{}", Uuid::now_v7().simple()) } else { config.replica.clone() }
}

fn rules(config: &Config, roots: &Roots) -> Rules {
    let ms = |secs: u32| i64::from(secs) * 1000;
    let now = roots.live.now();
    Rules {
        domain: now.manifest.domain,
        key: roots.key.clone(),
        registry: now.registries.current().clone().into(),
        lease_ms: ms(config.lease_secs),
        reveal_ms: ms(config.reveal_secs),
        referee_ms: ms(config.referee_secs),
        verdict_ms: ms(config.verdict_secs),
        max_tries: config.max_tries,
        close_grace_ms: ms(config.close_grace_secs),
        hand_back_ms: ms(config.hand_back_secs),
        max_requests: usize::from(config.max_requests),
        canary_ppm: config.canary_ppm,
        entry_trials: config.entry_trials,
    }
}

/// Tells the draws of every registry that comes into force, until the service ends.
async fn follow_registry(mut changes: watch::Receiver<Arc<network::Roots>>, assignments: Addr<Assignments>) {
    while changes.changed().await.is_ok() {
        let registry = changes.borrow_and_update().registries.current().clone();
        if assignments.send(Decided(Command::Registry(Box::new(registry)))).await.is_err() {
            return;
        }
    }
}

/// Keeps what is old out of the database.
async fn prune(db: DatabaseConnection, stop: CancellationToken) {
    let mut every = tokio::time::interval(PRUNE_EVERY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        if let Err(error) = store::prune(&db, clock::now_ms()).await {
            tracing::warn!(%error, "what is old is not pruned");
        }
    }
}
