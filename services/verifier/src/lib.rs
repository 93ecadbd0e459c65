//! The verifier: the one arbiter. It compares what the drawn nodes revealed and decides.
//!
//! ```text
//! results.collected -> admit -> compare every pair -> judge -> one transaction:
//!                                  verdicts (request, round), closings (request), findings, outbox
//!                                                                    |
//! close.requested  -> closes as failed unless closed                 +-> verdict.<replica>
//!                                                                    +-> indexer -> index of answers
//! ```
//!
//! Promises:
//! - One verdict per (request, round) and one closing verdict per request, by primary key. What is
//!   asked again gets the stored bytes again, whoever asks and however often.
//! - A verdict follows from the evidence and the registry's tokenizers alone; the evidence is kept, in the verdict or beside it.
//! - What no honest dispatcher sends goes to the dead letters and closes nothing.
//! - The vector of every delivered answer reaches the index in the end, with public facts only.
//!
//! Unequal results agree only if referees confirm each over its whole length; equal ones are refereed at random, and
//! always while an operator is new. In the exact class inequality is an alarm besides.

mod config;
mod consumer;
pub mod domain;
mod error;
mod fit;
mod http;
mod indexer;
mod metrics;
mod store;
mod texts;

use std::net::SocketAddr;
use std::sync::Arc;

use infera_bus::outbox::Relay;
use infera_bus::watch::Watch;
use infera_bus::{Bus, ConsumerSpec, Topology, consume};
use infera_embed::{Embedder, Index};
use infera_runtime::health::Health;
use infera_runtime::network::Live;
use infera_runtime::shutdown::ends_all;
use infera_runtime::{CancellationToken, db, http as server};
use infera_wire::topology::queues;
use sea_orm::DatabaseConnection;
use tokio::sync::{Notify, oneshot};

use consumer::Arbiter;
use indexer::Indexer;
use metrics::Metrics;
use texts::Texts;

pub use config::{Config, DEFAULTS};
pub use error::Error;

/// What the process gives to the service.
pub struct Deps {
    pub bus: Bus,
    /// Shared with other services of the process; `None` loads `embedder_path`.
    pub embedder: Option<Embedder>,
    /// Shared with other services of the process; `None` opens what `[vectors]` names.
    pub index: Option<Arc<dyn Index>>,
    /// Gets the HTTP address once it listens.
    pub bound: Option<oneshot::Sender<SocketAddr>>,
}

impl Deps {
    /// A bus, and everything else by the configuration.
    pub fn new(bus: Bus) -> Self {
        Self { bus, embedder: None, index: None, bound: None }
    }
}

/// Decides until `shutdown`, and finishes what it holds. Must run inside an actix System.
///
/// # Errors
/// [`Error`], one sentence; nothing is half done then.
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let live = Live::load(&config.common.manifest_path, &config.common.registry_path)?;
    // From before the models are loaded, so that no change is missed.
    let changes = live.watch();
    let texts = Texts::load(&config, live.now().registries.current()).await?;
    let embedder = match deps.embedder {
        Some(embedder) => embedder,
        None => {
            let path = config.embedder_path.clone();
            on_a_thread(move || Embedder::load(&path)).await??
        }
    };
    let index = match deps.index {
        Some(index) => index,
        None => infera_embed::open(&config.vectors).await?,
    };
    let common = &config.common;
    let db = db::connect(common.database_url.expose(), common.database_schema.as_deref()).await?;
    db::migrate::<store::Migrator>(&db).await?;
    deps.bus.declare(&Topology::network()).await?;

    let health = Health::new("verifier");
    let metrics = Metrics::new(&health)?;
    let indexable = Arc::new(Notify::new());
    let indexer = Indexer {
        db: db.clone(),
        texts: texts.clone(),
        live: live.clone(),
        embedder: embedder.clone(),
        index,
        metrics: metrics.clone(),
        wake: indexable.clone(),
        health: health.check("index"),
    };
    let arbiter =
        Arc::new(Arbiter { live: live.clone(), texts: texts.clone(), embedder, metrics, indexable });
    let parts = Parts { config, bus: deps.bus, db, health, arbiter };
    // Ends everything when one part ends, so that no half of a service stays behind.
    let stop = shutdown.child_token();
    let indexing = actix_rt::spawn(indexer.run(stop.clone()));
    let loading = actix_rt::spawn(texts.follow(changes, stop.clone()));
    let (result, ()) = futures::join!(parts.run(deps.bound, &stop), live.follow(stop.clone()));
    let _ = futures::join!(indexing, loading);
    result
}

/// What is ready to run.
struct Parts {
    config: Config,
    bus: Bus,
    db: DatabaseConnection,
    health: Health,
    arbiter: Arc<Arbiter>,
}

impl Parts {
    async fn run(
        self,
        bound: Option<oneshot::Sender<SocketAddr>>,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let Self { config, bus, db, health, arbiter } = self;
        let relay = Relay::start(db.clone(), bus.clone(), stop.clone());
        let watch = Watch::new(&health, bus.clone(), db.clone(), true)?;
        let watching = actix_rt::spawn(watch.run(stop.clone()));
        let spec = |queue| ConsumerSpec {
            bus: bus.clone(),
            db: db.clone(),
            queue,
            prefetch: config.prefetch,
            relay: Some(relay.clone()),
        };
        let (collected, close) = (arbiter.clone(), arbiter);
        let collected = consume(spec(queues::VERIFIER_COLLECTED), stop.clone(), async move |tx, envelope| {
            collected.collected(tx, envelope).await
        });
        let close = consume(spec(queues::VERIFIER_CLOSE), stop.clone(), async move |tx, envelope| {
            close.close(tx, envelope).await
        });
        let routes = {
            let (health, db) = (health.clone(), db.clone());
            move |config: &mut actix_web::web::ServiceConfig| {
                config
                    .configure(infera_runtime::health::routes(health.clone()))
                    .configure(http::routes(db.clone()));
            }
        };
        let web = server::serve(routes, &config.common.http_bind, stop.clone(), bound);
        let results = futures::join!(
            ends_all(stop, async { Ok(collected.await?) }),
            ends_all(stop, async { Ok(close.await?) }),
            ends_all(stop, async { Ok(web.await?) }),
        );
        relay.stopped().await;
        let _ = watching.await;
        results.0.and(results.1).and(results.2)
    }
}

async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::Thread(error.to_string()))
}
