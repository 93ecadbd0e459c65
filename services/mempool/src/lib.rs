//! The mempool: the durable set of requests that are paid for and have no verdict yet. It decides who
//! is next, and offers no more than the network has slots for.
//!
//! ```text
//!  request.funded ──┐                       ┌──> request.offered ──> dispatcher
//!  cancel.requested ┼─> set (database) ─> [ Admission ]
//!  verdict.* ───────┘                       └──> close.requested ──> verifier
//!                     slots (transient) ──────^
//! ```
//!
//! Promises:
//! - A funded request stays in the set until its closing verdict, whatever dies meanwhile.
//! - Accounts take turns; within an account, first come, first served; bids order the accounts within
//!   a round ([`domain::lane`] has the rule).
//! - A request is offered once. From then on the bus keeps the offer until a dispatcher has seen the closing
//!   verdict; offering it again would only compute it twice.
//! - At its deadline, or when its own account cancels it, the verifier is asked to close it. Only the
//!   verifier's answer takes it out of the set.
//! - What is offered is bounded by free slots: each request needs k of them, on k operators of one
//!   dispatcher. The bound is recomputed from the latest reports every time ([`domain::window`]).
//!
//! Turns and reports live in memory: after a restart a new round begins.

pub mod actor;
pub mod config;
mod consumer;
pub mod domain;
pub mod error;
mod http;
mod metrics;
pub mod store;

use std::net::SocketAddr;
use std::time::Duration;

use actix::Actor;
use infera_bus::outbox::Relay;
use infera_bus::watch::Watch;
use infera_bus::{Bus, ConsumerSpec, Topology};
use infera_runtime::health::{self, Health};
use infera_runtime::shutdown::ends_all;
use infera_runtime::{CancellationToken, clock, db};
use infera_wire::topology::queues;
use sea_orm::DatabaseConnection;
use tokio::sync::oneshot;
use uuid::Uuid;

pub use config::Config;
pub use error::Error;

use actor::{Admission, Tools};
use consumer::Consumers;
use domain::{Rules, State};
use metrics::Metrics;

const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// What the service is given.
pub struct Deps {
    pub bus: Bus,
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
    let db = db::connect(common.database_url.expose(), common.database_schema.as_deref()).await?;
    db::migrate::<store::Migrator>(&db).await?;
    deps.bus.declare(&Topology::network()).await?;

    // Whatever ends first ends the others; the relay goes last, so that it publishes what they wrote.
    let stop = shutdown.child_token();
    let relay_stop = CancellationToken::new();
    let _relay_ends_with_us = relay_stop.clone().drop_guard();
    let relay = Relay::start(db.clone(), deps.bus.clone(), relay_stop.clone());
    let health = Health::new("mempool");
    let metrics = Metrics::register(&health)?;
    let mut state = State::new(rules(&config));
    state.load(store::load(&db).await?);
    tracing::info!(requests = state.len(), "pending requests loaded");
    let tools = Tools { db: db.clone(), relay: relay.clone(), metrics, shutdown: stop.clone() };
    let admission = Admission::new(state, tools).start();
    let consumers = Consumers {
        spec: ConsumerSpec {
            bus: deps.bus.clone(),
            db: db.clone(),
            queue: queues::MEMPOOL_FUNDED,
            prefetch: config.prefetch,
            relay: Some(relay.clone()),
        },
        db: db.clone(),
        admission: admission.clone(),
        shutdown: stop.clone(),
    };
    let watch = Watch::new(&health, deps.bus.clone(), db.clone(), true)?;
    actix_rt::spawn(prune(db, stop.clone()));
    let routed = admission.clone();
    let serve = infera_runtime::http::serve(
        move |config| {
            health::routes(health.clone())(config);
            http::routes(routed.clone())(config);
        },
        &common.http_bind,
        stop.clone(),
        deps.bound,
    );
    let reports = consumer::reports(deps.bus, replica(&config), admission, stop.clone());
    let (a, b, c, d, e, ()) = tokio::join!(
        ends_all(&stop, async { serve.await.map_err(Error::from) }),
        ends_all(&stop, consumers.clone().funded()),
        ends_all(&stop, consumers.clone().cancel()),
        ends_all(&stop, consumers.clone().verdicts()),
        ends_all(&stop, reports),
        watch.run(stop.clone()),
    );
    relay_stop.cancel();
    relay.stopped().await;
    a.and(b).and(c).and(d).and(e)
}

fn replica(config: &Config) -> String {
    if config.replica.is_empty() { format!("m-{}", Uuid::now_v7().simple()) } else { config.replica.clone() }
}

fn rules(config: &Config) -> Rules {
    Rules {
        max_requests: config.max_requests,
        unheld_ms: i64::from(config.unheld_secs) * 1000,
        close_repeat_ms: i64::from(config.close_repeat_secs) * 1000,
    }
}

/// Keeps old cancels out of the database.
async fn prune(db: DatabaseConnection, stop: CancellationToken) {
    let mut every = tokio::time::interval(PRUNE_EVERY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        if let Err(error) = store::prune(&db, clock::now_ms() - store::KEEP_CANCELS_MS).await {
            tracing::warn!(%error, "old cancels are not pruned");
        }
    }
}
