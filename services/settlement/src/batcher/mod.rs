//! Journal -> batch -> chain, with charges -> anchored -> rewards queued.
//!
//! ```text
//! form: {batch row, leaves} commit -> sign: {signed bytes} commit -> send -> confirm: {anchored, outbox} commit
//! ```
//!
//! Each step is found again after a crash: [`plan`] decides from the chain's head and the database alone. What is sent
//! was stored before, and the contract takes a sequence once, so a batch is never posted twice. While the chain is away
//! receipts wait in the journal and consuming goes on.
//!
//! A transaction that waits too long is replaced by one with the same nonce that pays more ([`send`]). Every variant is
//! kept until one is final, because any of them may be the one that a block takes. A batch that a reorganisation
//! removes is taken back and brought on its way again, however deep it was.
//!
//! Points for planned failures ([`infera_runtime::planned`]), in the order in which they are passed:
//! `settlement.batch.before_form`, `in_form`, `after_form`; `before_sign`, `in_sign`, `after_sign`, `before_send`,
//! `after_send`; `before_mark`, `in_mark`, `after_mark`. The queueing of rewards by itself passes `settlement.rewards.`
//! `before_sign`, `in_sign`, `after_sign`, `before_send`, `after_send`; so do charges by themselves,
//! `settlement.charges.`

mod charges;
mod form;
mod rewards;
mod send;

pub use form::fill;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use infera_bus::outbox::{self, Relay};
use infera_protocol::{bytes::Hash32, ids::message_id};
use infera_runtime::{CancellationToken, clock, health::CheckHandle, planned};
use infera_wire::{topology::keys, v1};
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    chain::{ChainError, Head, Link, Port, TxStatus},
    config::Config,
    domain::{BatchState, Limits, Plan, plan},
    exposure::Exposure,
    metrics::Metrics,
    store::{
        batches::{self, BatchRow, Place},
        txs::{self, Job, Purpose},
    },
};

/// Between looks at the chain when there is nothing to do: finds out that it is away, or lost a batch.
const PROBE: Duration = Duration::from_secs(5);
/// After a failure: doubles from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LAST_BACKOFF: Duration = Duration::from_secs(10);

/// The batcher's parts.
pub struct Batcher<L> {
    pub db: DatabaseConnection,
    /// Woken when a batch is anchored; without one the outbox waits for the next look.
    pub relay: Option<Relay>,
    pub config: Config,
    pub link: L,
    pub check: CheckHandle,
    pub metrics: Metrics,
    /// A receipt was written.
    pub written: Arc<Notify>,
    pub exposure: Exposure,
}

/// Why a step did not work.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("the database failed: {0}")]
    Db(#[from] DbErr),
    /// The chain and the database contradict each other; a person must look.
    #[error("{0}")]
    Conflict(String),
}

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// There may be more to do at once.
    Now,
    /// Something is on its way.
    Poll,
    /// Nothing until a receipt is written or old enough.
    Idle,
}

/// What the batcher remembers between steps; nothing that matters after a crash.
pub struct Work<P> {
    port: Option<P>,
    /// When each transaction was last sent.
    sent: HashMap<Hash32, Instant>,
    /// Whose transaction the endpoint calls underpriced.
    underpriced: HashSet<Job>,
    /// When the chain was last looked at.
    looked: Option<Instant>,
}

impl<P> Default for Work<P> {
    fn default() -> Self {
        Self { port: None, sent: HashMap::new(), underpriced: HashSet::new(), looked: None }
    }
}

impl<P> Work<P> {
    /// Whatever was wrong with the connection, the next one is new.
    pub fn reconnect(&mut self) {
        self.port = None;
        self.looked = None;
    }
}

impl<L: Link<Port: Clone>> Batcher<L> {
    /// Works until `shutdown`. Failures are logged, shown by the check `chain`, and tried again.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut work = Work::default();
        let mut backoff = FIRST_BACKOFF;
        loop {
            let stepped = tokio::select! {
                // A step that is dropped is found again by the next start.
                () = shutdown.cancelled() => return,
                stepped = self.step(&mut work) => stepped,
            };
            let wait = match stepped {
                Ok(Next::Now) => Duration::ZERO,
                Ok(Next::Poll) => Duration::from_millis(self.config.chain.poll_ms),
                Ok(Next::Idle) => self.idle_time().await,
                Err(error) => {
                    self.check.down(error.to_string());
                    tracing::warn!(%error, retry_ms = backoff.as_millis(), "receipts are not anchored for now");
                    work.reconnect();
                    let wait = backoff;
                    backoff = (backoff * 2).min(LAST_BACKOFF);
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = tokio::time::sleep(wait) => continue,
                    }
                }
            };
            backoff = FIRST_BACKOFF;
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.written.notified(), if !wait.is_zero() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn limits(&self) -> Limits {
        Limits { size: self.config.batch.size, age_ms: self.config.batch.age_ms }
    }

    /// Until the oldest waiting receipt is old enough, at most [`PROBE`].
    async fn idle_time(&self) -> Duration {
        let oldest = batches::waiting(&self.db).await.ok().and_then(|(_, oldest)| oldest);
        let Some(oldest) = oldest else { return PROBE };
        let left = oldest.saturating_add(self.config.batch.age_ms).saturating_sub(clock::now_ms());
        Duration::from_millis(u64::try_from(left).unwrap_or(0)).clamp(Duration::from_millis(10), PROBE)
    }

    /// One look at the database and the chain, and what follows from it. May be dropped at any await: the next one finds
    /// what was left.
    ///
    /// # Errors
    /// [`StepError`]; try again later, after [`Work::reconnect`].
    pub async fn step(&self, work: &mut Work<L::Port>) -> Result<Next, StepError> {
        let (waiting, oldest) = batches::waiting(&self.db).await?;
        self.metrics.waiting(waiting);
        let limits = self.limits();
        let now_ms = clock::now_ms();
        let due = waiting >= limits.size
            || oldest.is_some_and(|oldest| now_ms.saturating_sub(oldest) >= limits.age_ms);
        let open = batches::open_batches(&self.db).await? > 0;
        if !due && !open && work.looked.is_some_and(|looked| looked.elapsed() < PROBE) {
            return Ok(Next::Idle);
        }
        let port = self.connected(work).await?;
        let head = port.head().await?;
        work.looked = Some(Instant::now());
        let local = batches::local(&self.db, head.sequence).await?;
        match plan(head.sequence, &Hash32(head.hash.0), &local, &limits, clock::now_ms()) {
            Plan::Conflict(reason) => Err(StepError::Conflict(reason)),
            Plan::Adopt => self.adopt(&port, &head).await,
            Plan::Work { confirm, post, form } => {
                self.check.up();
                self.take_back(&head).await?;
                let confirmed = self.confirm_all(&port, &confirm).await?;
                if let Some(sequence) = post {
                    self.post(&port, work, sequence).await?;
                    return Ok(Next::Poll);
                }
                if form && self.form().await? {
                    return Ok(Next::Now);
                }
                if self.charge(&port, work, &head).await? {
                    return Ok(Next::Poll);
                }
                let queueing = self.queue(&port, work, &head).await?;
                Ok(if confirmed && !queueing { Next::Idle } else { Next::Poll })
            }
        }
    }

    async fn connected(&self, work: &mut Work<L::Port>) -> Result<L::Port, StepError> {
        if let Some(port) = &work.port {
            return Ok(port.clone());
        }
        let port = self.link.connect().await?;
        work.port = Some(port.clone());
        Ok(port)
    }

    async fn adopt(&self, port: &L::Port, head: &Head) -> Result<Next, StepError> {
        tracing::warn!(
            head = head.sequence,
            "this database is new and the chain is not: going on after its head"
        );
        let root = port.batch_root(head.sequence).await?.unwrap_or_default();
        batches::adopt(&self.db, head.sequence, Hash32(head.hash.0), Hash32(root.0), clock::now_ms()).await?;
        Ok(Next::Now)
    }

    /// What was anchored and is behind the chain's head no more is not anchored.
    async fn take_back(&self, head: &Head) -> Result<(), StepError> {
        let lost = batches::unanchor_after(&self.db, head.sequence).await?;
        if lost > 0 {
            self.metrics.batches("lost", lost);
            tracing::warn!(
                head = head.sequence,
                lost,
                "the chain lost anchored batches, they are posted again: `chain.confirmations` is too small for it"
            );
        }
        Ok(())
    }

    /// Whether all of them are anchored now.
    async fn confirm_all(&self, port: &L::Port, confirm: &[u64]) -> Result<bool, StepError> {
        if confirm.is_empty() {
            return Ok(true);
        }
        let chain = &self.config.chain;
        let last_final = port.final_block(chain.finality, chain.confirmations).await?;
        for sequence in confirm {
            if !self.confirm(port, *sequence, last_final).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Marks a batch that is on the chain as anchored once its block is final.
    async fn confirm(&self, port: &L::Port, sequence: u64, last_final: u64) -> Result<bool, StepError> {
        let Some(row) = batches::find(&self.db, sequence).await? else { return Ok(true) };
        let Some(place) = self.place(port, sequence).await? else { return Ok(false) };
        if place.block > last_final {
            return Ok(false);
        }
        planned::pause("settlement.batch.before_mark").await;
        let tx = self.db.begin().await?;
        let now_ms = clock::now_ms();
        if batches::set_anchored(&tx, sequence, &place, now_ms).await? {
            txs::forget(&tx, sequence, &place.tx).await?;
            say_anchored(&tx, &row, sequence, &place, now_ms).await?;
        }
        planned::pause("settlement.batch.in_mark").await;
        tx.commit().await?;
        if let Some(relay) = &self.relay {
            relay.wake();
        }
        self.metrics.batches("anchored", 1);
        tracing::info!(sequence, block = place.block, tx = %place.tx, "batch anchored");
        planned::pause("settlement.batch.after_mark").await;
        Ok(true)
    }

    /// Where the batch is on the chain: by one of its transactions, or by the log if another one posted it.
    async fn place(&self, port: &L::Port, sequence: u64) -> Result<Option<Place>, StepError> {
        for variant in txs::of(&self.db, Job { sequence, purpose: Purpose::Post }).await? {
            if let TxStatus::Included { block, .. } = port.status(variant.hash.0.into()).await? {
                return Ok(Some(Place { tx: variant.hash, block }));
            }
        }
        let posted = port.posted(sequence, self.config.chain.from_block).await?;
        Ok(posted.map(|posted| Place { tx: Hash32(posted.tx.0), block: posted.block }))
    }
}

async fn say_anchored(
    tx: &DatabaseTransaction,
    row: &BatchRow,
    sequence: u64,
    place: &Place,
    now_ms: i64,
) -> Result<(), DbErr> {
    let leaves = batches::leaves(tx, row.sequence).await?;
    let anchored = v1::BatchAnchored {
        sequence,
        receipts_root: row.receipts_root.clone(),
        request_ids: leaves.iter().map(|(id, _)| id.as_bytes().to_vec()).collect(),
        transaction: place.tx.to_vec(),
        block_number: place.block,
        anchored_at_ms: now_ms,
    };
    // A batch that is anchored again in another block is another message.
    let id = message_id("batch.anchored", Uuid::from_u128(u128::from(sequence)), place.block);
    outbox::enqueue(tx, keys::BATCH_ANCHORED, id, &anchored).await
}

/// Whether a stored state counts as anchored for readers.
pub fn is_anchored(row: &BatchRow) -> bool {
    BatchState::parse(&row.state) == Some(BatchState::Anchored)
}
