//! The explorer: what the network verified, for everybody to read.
//!
//! ```text
//! receipt        -> receipts, participants     \
//!                                               +-> /v1/history, /v1/export, /v1/search, pages
//! batch.anchored -> batches, anchors           /              |
//!                                       index of answers <----+  (the verifier writes it)
//! ```
//!
//! Promises:
//! - A read model: every row follows from a message, and a message that comes twice changes nothing.
//!   Receipt and anchor may come in either order.
//! - What is shown is the receipt as it was issued, byte by byte. Texts are nowhere: receipts hold
//!   hashes, and the index holds vectors.
//! - Everything here is public and nothing is trusted: each receipt's page says how to check it.
//!
//! Semantic search embeds the question with the verifier's model and searches the index that the
//! verifier writes. Both name the same place in `[vectors]`: a collection of Qdrant, or a
//! database of its own with the exact index, which both processes open. `infera up` gives both
//! services the same handle. It is a database of its own and not a table of the verifier's, so that
//! no service reads another's tables.

mod config;
mod consumer;
mod error;
mod format;
mod http;
mod metrics;
mod params;
mod query;
mod store;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use infera_bus::watch::Watch;
use infera_bus::{Bus, ConsumerSpec, Topology, consume};
use infera_embed::{Embedder, Index};
use infera_runtime::health::{CheckHandle, Health};
use infera_runtime::shutdown::ends_all;
use infera_runtime::{CancellationToken, db, http as server, network};
use infera_wire::topology::queues;
use tokio::sync::{Mutex, Semaphore, oneshot};

use consumer::Reader;
use http::Explorer;
use metrics::Metrics;

pub use config::{Config, DEFAULTS};
pub use error::Error;

/// How often the index is looked at for `/readyz`.
const INDEX_EVERY: Duration = Duration::from_secs(2);

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

/// Serves until `shutdown`, and finishes what it holds. Must run inside an actix System.
///
/// # Errors
/// [`Error`], one sentence; nothing is half done then.
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let manifest = network::manifest(&config.common.manifest_path)?;
    let embedder = match deps.embedder {
        Some(embedder) => embedder,
        None => {
            let path = config.embedder_path.clone();
            let loading = tokio::task::spawn_blocking(move || Embedder::load(&path));
            loading.await.map_err(|error| Error::Thread(error.to_string()))??
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

    let health = Health::new("explorer");
    let metrics = Metrics::new(&health)?;
    let explorer = Arc::new(Explorer {
        db,
        embedder,
        index,
        metrics: metrics.clone(),
        searches: Semaphore::new(config.max_searches),
        exports: Arc::new(Semaphore::new(config.max_exports)),
        min_score: config.min_score,
        receipts_url: config.receipts_url.clone(),
        rpc_url: manifest.rpc_url,
        network: manifest.network,
        client: reqwest::Client::builder().no_proxy().build().map_err(Error::Client)?,
        governance: Mutex::default(),
    });
    let reader = Arc::new(Reader { domain: manifest.domain, metrics });
    let parts = Parts { config, bus: deps.bus, health, explorer, reader };
    // Ends everything when one part ends, so that no half of a service stays behind.
    parts.run(deps.bound, &shutdown.child_token()).await
}

/// What is ready to run.
struct Parts {
    config: Config,
    bus: Bus,
    health: Health,
    explorer: Arc<Explorer>,
    reader: Arc<Reader>,
}

impl Parts {
    async fn run(
        self,
        bound: Option<oneshot::Sender<SocketAddr>>,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let Self { config, bus, health, explorer, reader } = self;
        let db = explorer.db.clone();
        let watch = Watch::new(&health, bus.clone(), db.clone(), false)?;
        let watching = [
            actix_rt::spawn(watch.run(stop.clone())),
            actix_rt::spawn(watch_index(explorer.index.clone(), health.check("index"), stop.clone())),
        ];
        let spec = |queue| ConsumerSpec {
            bus: bus.clone(),
            db: db.clone(),
            queue,
            prefetch: config.prefetch,
            relay: None,
        };
        let (receipts, anchored) = (reader.clone(), reader);
        let receipts = consume(spec(queues::EXPLORER_RECEIPT), stop.clone(), async move |tx, envelope| {
            receipts.receipt(tx, envelope).await
        });
        let anchored = consume(spec(queues::EXPLORER_ANCHORED), stop.clone(), async move |tx, envelope| {
            anchored.anchored(tx, envelope).await
        });
        let routes = move |config: &mut actix_web::web::ServiceConfig| {
            config
                .configure(infera_runtime::health::routes(health.clone()))
                .configure(http::routes(explorer.clone()));
        };
        let web = server::serve(routes, &config.common.http_bind, stop.clone(), bound);
        let results = futures::join!(
            ends_all(stop, async { Ok(receipts.await?) }),
            ends_all(stop, async { Ok(anchored.await?) }),
            ends_all(stop, async { Ok(web.await?) }),
        );
        for task in watching {
            let _ = task.await;
        }
        results.0.and(results.1).and(results.2)
    }
}

async fn watch_index(index: Arc<dyn Index>, check: CheckHandle, stop: CancellationToken) {
    loop {
        match index.ping().await {
            Ok(()) => check.up(),
            Err(error) => check.down(error.to_string()),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INDEX_EVERY) => {}
        }
    }
}
