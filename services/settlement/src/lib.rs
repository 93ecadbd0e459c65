//! Settlement: money that balances, receipts, and the chain that anchors them.
//!
//! ```text
//! request.submitted ──> hold ──> request.funded | request.rejected
//! verdict.*         ──> charge, pay, release the rest ──> receipt ──> journal
//!                                                                      └─> batch, charges ──> chain ──> batch.anchored
//! chain: Deposited, Withdrawn ... ──> escrow, spendable once final
//! GET /v1/receipts/{id}   GET /v1/balance, /v1/usage, /v1/statement   POST /v1/vouchers   GET /v1/ledger/audit
//! ```
//!
//! Promises:
//! - A request is funded once, settled or released once, whatever is delivered twice or in the wrong order.
//! - Only a closing verdict releases a hold, or an operator one that is long overdue ([`holds`]). An account never pays more than its hold and never goes below zero.
//! - The entries of every transfer sum to zero; a balance is the sum of its entries ([`ledger`]).
//! - Money moves by the evidence's signatures, not by the verifier's word.
//! - Every receipt comes into exactly one batch; a batch is posted once; signed bytes are stored before they are sent
//!   ([`batcher`]). While the chain is away, receipts wait and everything else goes on, up to a cap ([`exposure`]).
//! - What operators earned becomes claimable on the chain: the same sums as in the ledger ([`chain::operator`]).
//!
//! - A deposit is spent once it is final, and never more than its owner signed for ([`escrow`]).
//!
//! [`domain`] and [`escrow`] decide, [`consumer`], [`batcher`] and [`escrow::follow`] act, [`store`] keeps.

pub mod accounts;
pub mod batcher;
pub mod batches_http;
pub mod chain;
pub mod config;
pub mod consumer;
pub mod domain;
pub mod error;
pub mod escrow;
pub mod exposure;
pub mod governance_http;
pub mod holds;
pub mod http;
pub mod keeper;
pub mod ledger;
pub mod metrics;
pub mod operators;
pub mod stakes;
pub mod store;

use std::{net::SocketAddr, sync::Arc};

use infera_bus::{Bus, ConsumerSpec, Topology, consume, outbox::Relay, watch::Watch};
use infera_protocol::{ids::message_id, registry::Manifest};
use infera_runtime::{
    CancellationToken, clock, db, health::Health, http::serve, jwt::Verifier, network::Live,
};
use infera_wire::topology::queues;
use sea_orm::{DatabaseConnection, TransactionTrait};
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use chain::client::RpcLink;
pub use config::Config;
pub use error::Error;

/// What the process gives to the service.
pub struct Deps {
    pub bus: Bus,
    /// Gets the HTTP address once it listens.
    pub bound: Option<oneshot::Sender<SocketAddr>>,
}

/// Serves until `shutdown` and everything in work is finished. Must run inside an actix System.
///
/// # Errors
/// [`Error`], one sentence; nothing is half done then.
pub async fn run(config: Config, deps: Deps, shutdown: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let live = Live::load(&config.common.manifest_path, &config.common.registry_path)?;
    let manifest = live.now().manifest.clone();
    let keys = Verifier::from_jwks_file(&config.common.jwks_path)?;
    let db =
        db::connect(config.common.database_url.expose(), config.common.database_schema.as_deref()).await?;
    db::migrate::<store::Migrator>(&db).await?;
    give_credits(&config, &db).await?;
    deps.bus.declare(&Topology::network()).await?;

    let health = Health::new(config::SERVICE);
    let metrics = metrics::Metrics::register(&health)?;
    // Ends everything when one part fails.
    let stop = shutdown.child_token();
    let _stops_all = stop.clone().drop_guard();
    let relay = Relay::start(db.clone(), deps.bus.clone(), stop.clone());
    let written = Arc::new(Notify::new());
    // Without a settler nothing is ever final.
    let cap_micro = if config.chain.settler_key.is_empty() { 0 } else { config.exposure.cap_micro };
    let exposure = exposure::Exposure::new(ledger::amount(cap_micro)?);
    let batcher = batcher::Batcher {
        db: db.clone(),
        relay: Some(relay.clone()),
        link: link(&config, &manifest),
        check: health.check("chain"),
        metrics: metrics.clone(),
        written: written.clone(),
        exposure: exposure.clone(),
        config: config.clone(),
    };
    let contracts = contracts(&config)?;
    let rpc_url = rpc_url(&config, &manifest);
    let keeper =
        contracts.map(|known| keeper(&config, rpc_url.clone(), known, &live, &health)).transpose()?;
    let stakes = contracts.map(|contracts| stakes::Follower {
        rpc_url: rpc_url.clone(),
        contracts,
        manifest_path: config.common.manifest_path.clone(),
        from_block: config.chain.from_block,
        finality: config.chain.finality,
        confirmations: config.chain.confirmations,
        poll: std::time::Duration::from_millis(config.governance.poll_ms),
    });
    let decisions = contracts.map(|known| decisions(&config, rpc_url, known));
    let freshness = escrow::Freshness::new(config.escrow.stale_secs, config.escrow.margin_secs);
    let follower = escrow::follow::Follower {
        db: db.clone(),
        config: config.clone(),
        link: link(&config, &manifest),
        check: health.check("escrow"),
        metrics: metrics.clone(),
        freshness: freshness.clone(),
        changed: written.clone(),
    };
    let domain = manifest.domain;
    let handlers = consumer::Consumer {
        manifest,
        live: live.clone(),
        metrics,
        exposure: exposure.clone(),
        freshness,
        written,
    };
    let spec = |queue| ConsumerSpec {
        bus: deps.bus.clone(),
        db: db.clone(),
        queue,
        prefetch: config.prefetch,
        relay: Some(relay.clone()),
    };
    let consuming = consume_both(spec, &handlers, &stop);
    let batching = anchor(batcher, &stop);
    let following = follow(follower, &stop);
    let state = http::State {
        db: db.clone(),
        keys,
        domain,
        audit: Arc::default(),
        trees: http::Trees::default(),
        decisions,
    };
    let routes = {
        let health = health.clone();
        move |config: &mut actix_web::web::ServiceConfig| {
            config.configure(http::routes(state.clone(), health.clone()));
        }
    };
    let serving = async {
        serve(routes, &config.common.http_bind, stop.clone(), deps.bound).await.map_err(Error::from)
    };
    let watch = Watch::new(&health, deps.bus.clone(), db.clone(), true)?;
    let overdue = holds::watch(db.clone(), config.holds, handlers.metrics.clone(), stop.clone());
    let exposed = exposure.watch(
        db.clone(),
        health.check("exposure"),
        handlers.metrics.clone(),
        config.exposure.check_ms,
        stop.clone(),
    );
    let watching = async {
        let kept = async {
            if let (Some(keeper), Some(stakes)) = (keeper, stakes) {
                tokio::join!(keeper.run(stop.clone()), stakes.run(stop.clone()));
            }
        };
        tokio::join!(watch.run(stop.clone()), overdue, exposed, live.follow(stop.clone()), kept);
        Ok(())
    };
    let result = tokio::try_join!(
        Box::pin(consuming),
        Box::pin(batching),
        Box::pin(following),
        Box::pin(serving),
        Box::pin(watching)
    );
    stop.cancel();
    relay.stopped().await;
    result.map(drop)
}

/// The configured endpoint, or the manifest's.
fn rpc_url(config: &Config, manifest: &Manifest) -> String {
    let configured = &config.chain.rpc_url;
    if configured.is_empty() { manifest.rpc_url.clone() } else { configured.clone() }
}

/// The network's contracts, where this service is told them.
fn contracts(config: &Config) -> Result<Option<chain::Contracts>, Error> {
    let path = &config.governance.contracts_path;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let unusable = |reason: String| Error::Contracts { path: path.clone(), reason };
    let bytes = std::fs::read(path).map_err(|error| unusable(error.to_string()))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| unusable(error.to_string()))
}

/// Who follows the holders' decisions.
fn keeper(
    config: &Config,
    rpc_url: String,
    contracts: chain::Contracts,
    live: &Live,
    health: &Health,
) -> Result<keeper::Keeper, Error> {
    Ok(keeper::Keeper {
        rpc_url,
        contracts,
        live: live.clone(),
        manifest_path: config.common.manifest_path.clone(),
        registry_path: config.common.registry_path.clone(),
        from_block: config.chain.from_block,
        finality: config.chain.finality,
        confirmations: config.chain.confirmations,
        poll: std::time::Duration::from_millis(config.governance.poll_ms),
        unmet: health.gauge(
            "infera_settlement_registry_unmet",
            "Decisions of the holders that can't be followed here.",
        )?,
    })
}

/// What everybody may read of the holders' decisions.
fn decisions(config: &Config, rpc_url: String, contracts: chain::Contracts) -> governance_http::Decisions {
    let chain = &config.chain;
    let log = chain::governance::ProposalLog::new(chain.from_block, chain.finality, chain.confirmations);
    governance_http::Decisions::new(rpc_url, contracts, log, governance_http::LIFE)
}

/// The network's contract.
fn link(config: &Config, manifest: &Manifest) -> RpcLink {
    let chain = &config.chain;
    RpcLink {
        rpc_url: rpc_url(config, manifest),
        settler_key: chain.settler_key.clone(),
        contract: manifest.domain.contract.0.into(),
        chain_id: manifest.domain.chain_id,
    }
}

/// The two queues of this service, until `stop`.
async fn consume_both(
    spec: impl Fn(&'static str) -> ConsumerSpec,
    handlers: &consumer::Consumer,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let submitted = consume(spec(queues::SETTLEMENT_SUBMITTED), stop.clone(), async |tx, envelope| {
        handlers.submitted(tx, envelope).await
    });
    let verdicts = consume(spec(queues::SETTLEMENT_VERDICT), stop.clone(), async |tx, envelope| {
        handlers.verdict(tx, envelope).await
    });
    tokio::try_join!(submitted, verdicts)?;
    Ok(())
}

/// The batcher, until `stop`; without a settler's key receipts only wait.
async fn anchor(batcher: batcher::Batcher<RpcLink>, stop: &CancellationToken) -> Result<(), Error> {
    if batcher.config.chain.settler_key.is_empty() {
        batcher.check.up();
        tracing::warn!("chain.settler_key is empty: receipts are not anchored");
        stop.cancelled().await;
    } else {
        batcher.run(stop.clone()).await;
    }
    Ok(())
}

/// The follower, until `stop`. Without a settler's key nobody is charged on the chain, so no deposit is spent either.
async fn follow(follower: escrow::follow::Follower<RpcLink>, stop: &CancellationToken) -> Result<(), Error> {
    if follower.config.chain.settler_key.is_empty() {
        follower.check.up();
        tracing::warn!(
            "chain.settler_key is empty: escrows are not followed, accounts have prepaid credit only"
        );
        stop.cancelled().await;
    } else {
        follower.run(stop.clone()).await;
    }
    Ok(())
}

/// Gives the configured credits, each once.
async fn give_credits(config: &Config, db: &DatabaseConnection) -> Result<(), Error> {
    for credit in &config.prepaid_credits {
        let tx = db.begin().await?;
        let id = message_id(&format!("credit.{}", credit.id), Uuid::nil(), 0);
        let posted = ledger::credit(&tx, id, &credit.account, credit.amount_micro, clock::now_ms()).await?;
        tx.commit().await?;
        tracing::info!(credit = credit.id, account = credit.account, ?posted, "prepaid credit");
    }
    Ok(())
}
