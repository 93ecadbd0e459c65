//! Journal -> batch -> chain -> anchored.
//!
//! ```text
//! form: {batch row, leaves} commit -> sign: {signed bytes} commit -> send -> confirm: {anchored, outbox} commit
//! ```
//!
//! Each step is found again after a crash: [`plan`] decides from the chain's head and the database alone. What is sent
//! was stored before, and the contract takes a sequence once, so a batch is never posted twice. While the chain is away
//! receipts wait in the journal and consuming goes on.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use infera_bus::outbox::{self, Relay};
use infera_protocol::{
    bytes::{Address, Hash32},
    identity::Domain,
    ids::message_id,
    merkle::MerkleTree,
    receipt::Receipt,
};
use infera_runtime::{CancellationToken, clock, health::CheckHandle, planned};
use infera_wire::{topology::keys, v1};
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    chain::{Batch, Chain, ChainError, Head, TxStatus},
    config::Config,
    domain::{BatchState, Limits, Plan, plan, reward_root},
    metrics::Metrics,
    store::{
        batches::{self, BatchRow, Place},
        corrupt, hash,
    },
};

/// Between looks at the chain when there is nothing to do: finds out that it is away, or lost a batch.
const PROBE: Duration = Duration::from_secs(5);
/// After a failure: doubles from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LAST_BACKOFF: Duration = Duration::from_secs(10);

/// The batcher's parts.
pub struct Batcher {
    pub db: DatabaseConnection,
    pub relay: Relay,
    pub config: Config,
    /// The manifest's endpoint, where the configuration has none.
    pub rpc_url: String,
    pub domain: Domain,
    pub check: CheckHandle,
    pub metrics: Metrics,
    /// A receipt was written.
    pub written: Arc<Notify>,
}

/// Why a step did not work.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("the database failed: {0}")]
    Db(#[from] DbErr),
    #[error("{0}")]
    Conflict(String),
}

/// What to wait for.
enum Next {
    /// There may be more to do at once.
    Now,
    /// Something is on its way.
    Poll,
    /// Nothing until a receipt is written or old enough.
    Idle,
}

impl Batcher {
    /// Works until `shutdown`. Failures are logged, shown by the check `chain`, and tried again.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut work = Work { chain: None, sent: HashMap::new(), looked: None };
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
                    // Whatever was wrong with the connection, the next one is new.
                    work = Work { chain: None, sent: work.sent, looked: None };
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

    async fn step(&self, work: &mut Work) -> Result<Next, StepError> {
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
        let chain = self.connected(work).await?;
        let head = chain.head().await?;
        work.looked = Some(Instant::now());
        let local = batches::local(&self.db, head.sequence).await?;
        match plan(head.sequence, &Hash32(head.hash.0), &local, &limits, clock::now_ms()) {
            Plan::Conflict(reason) => Err(StepError::Conflict(reason)),
            Plan::Adopt => self.adopt(&chain, &head).await,
            Plan::Work { confirm, post, form } => {
                self.check.up();
                let mut next = Next::Idle;
                for sequence in confirm {
                    if !self.confirm(&chain, sequence).await? {
                        next = Next::Poll;
                        break;
                    }
                }
                if let Some(sequence) = post {
                    self.post(&chain, work, sequence).await?;
                    next = Next::Poll;
                } else if form && self.form().await? {
                    next = Next::Now;
                }
                Ok(next)
            }
        }
    }

    async fn connected(&self, work: &mut Work) -> Result<Chain, StepError> {
        if let Some(chain) = &work.chain {
            return Ok(chain.clone());
        }
        let settings = &self.config.chain;
        let url = if settings.rpc_url.is_empty() { &self.rpc_url } else { &settings.rpc_url };
        let contract = self.domain.contract.0.into();
        let chain = Chain::connect(url, settings.settler_key.expose(), contract).await?;
        let actual = chain.reader().chain_id();
        if actual != self.domain.chain_id {
            return Err(StepError::Conflict(format!(
                "the endpoint serves chain {actual}, the manifest names {}",
                self.domain.chain_id
            )));
        }
        work.chain = Some(chain.clone());
        Ok(chain)
    }

    async fn adopt(&self, chain: &Chain, head: &Head) -> Result<Next, StepError> {
        tracing::warn!(
            head = head.sequence,
            "this database is new and the chain is not: going on after its head"
        );
        let root = chain.reader().batch(head.sequence).await?.unwrap_or_default();
        batches::adopt(&self.db, head.sequence, Hash32(head.hash.0), Hash32(root.0), clock::now_ms()).await?;
        Ok(Next::Now)
    }

    /// Makes a batch of the waiting receipts; `false` if somebody else did.
    async fn form(&self) -> Result<bool, StepError> {
        let tx = self.db.begin().await?;
        let Some(batch) = fill(&tx, self.config.batch.limit).await? else {
            tx.rollback().await?;
            return Ok(false);
        };
        tx.commit().await?;
        self.metrics.batch("formed");
        tracing::info!(sequence = batch.sequence, receipts = batch.count, "batch formed");
        planned::pause("settlement.batch.after_form").await;
        Ok(true)
    }

    /// Brings the transaction of the chain's next batch on its way.
    async fn post(&self, chain: &Chain, work: &mut Work, sequence: u64) -> Result<(), StepError> {
        let Some(row) = batches::find(&self.db, sequence).await? else { return Ok(()) };
        if batches::unanchor(&self.db, sequence).await? {
            self.metrics.batch("lost");
            tracing::warn!(sequence, "the chain lost an anchored batch, it is posted again");
        }
        // The nonce first: a transaction that is mined in between is then seen as included.
        let nonce = chain.next_nonce().await?;
        if let Some(stored) = Stored::of(&row)? {
            let status = chain.status(stored.hash.0.into()).await?;
            if matches!(status, TxStatus::Included { .. }) {
                return Ok(());
            }
            if status == TxStatus::Unknown && stored.nonce == nonce {
                return self.send(chain, work, sequence, &stored.raw).await;
            }
            tracing::warn!(
                sequence,
                nonce,
                old = stored.nonce,
                ?status,
                "the batch's transaction is void, signing anew"
            );
        }
        let signed = chain.sign_batch(&batches::batch(&row)?, nonce).await?;
        batches::set_signed(&self.db, sequence, &signed).await?;
        planned::pause("settlement.batch.after_sign").await;
        work.sent.remove(&sequence);
        self.send(chain, work, sequence, &signed.raw).await
    }

    async fn send(&self, chain: &Chain, work: &mut Work, sequence: u64, raw: &[u8]) -> Result<(), StepError> {
        let pause = Duration::from_millis(u64::try_from(self.config.chain.resend_ms).unwrap_or(0));
        if work.sent.get(&sequence).is_some_and(|sent| sent.elapsed() < pause) {
            return Ok(());
        }
        chain.send_raw(raw).await?;
        work.sent.insert(sequence, Instant::now());
        self.metrics.batch("sent");
        tracing::info!(sequence, "batch sent");
        planned::pause("settlement.batch.after_send").await;
        Ok(())
    }

    /// Marks a batch that is on the chain as anchored once it is deep enough.
    async fn confirm(&self, chain: &Chain, sequence: u64) -> Result<bool, StepError> {
        let Some(row) = batches::find(&self.db, sequence).await? else { return Ok(true) };
        let Some((place, depth)) = self.place(chain, &row, sequence).await? else { return Ok(false) };
        if depth < self.config.chain.confirmations {
            return Ok(false);
        }
        planned::pause("settlement.batch.before_mark").await;
        let tx = self.db.begin().await?;
        let now_ms = clock::now_ms();
        if batches::set_anchored(&tx, sequence, &place, now_ms).await? {
            say_anchored(&tx, &row, sequence, &place, now_ms).await?;
        }
        tx.commit().await?;
        self.relay.wake();
        self.metrics.batch("anchored");
        tracing::info!(sequence, block = place.block, tx = %place.tx, "batch anchored");
        planned::pause("settlement.batch.after_mark").await;
        Ok(true)
    }

    /// Where the batch is on the chain, and how deep: by its transaction, or by the log if another one posted it.
    async fn place(
        &self,
        chain: &Chain,
        row: &BatchRow,
        sequence: u64,
    ) -> Result<Option<(Place, u64)>, StepError> {
        if let Some(stored) = Stored::of(row)?
            && let TxStatus::Included { block, depth, .. } = chain.status(stored.hash.0.into()).await?
        {
            return Ok(Some((Place { tx: stored.hash, block }, depth)));
        }
        let Some(posted) = chain.reader().posted(sequence, self.config.chain.from_block).await? else {
            return Ok(None);
        };
        let newest = chain.reader().block_number().await?;
        let place = Place { tx: Hash32(posted.tx.0), block: posted.block };
        Ok(Some((place, (newest + 1).saturating_sub(posted.block))))
    }
}

/// What the batcher remembers between steps; nothing that matters after a crash.
struct Work {
    chain: Option<Chain>,
    /// When each batch was last sent.
    sent: HashMap<u64, Instant>,
    /// When the chain was last looked at.
    looked: Option<Instant>,
}

/// The stored transaction of a batch.
struct Stored {
    hash: Hash32,
    nonce: u64,
    raw: Vec<u8>,
}

impl Stored {
    fn of(row: &BatchRow) -> Result<Option<Self>, DbErr> {
        let (Some(tx_hash), Some(nonce), Some(raw)) = (&row.tx_hash, row.nonce, &row.raw_tx) else {
            return Ok(None);
        };
        let nonce = u64::try_from(nonce).map_err(|_| corrupt("batches.nonce", "it is negative"))?;
        Ok(Some(Self { hash: hash("batches.tx_hash", tx_hash)?, nonce, raw: raw.clone() }))
    }
}

/// Fills the next batch from the journal; `None` if nothing waits or somebody else was faster: roll back.
async fn fill(tx: &DatabaseTransaction, limit: u64) -> Result<Option<Batch>, DbErr> {
    let last = batches::local(tx, 0).await?.last;
    let (sequence, previous_hash) = last.map_or((1, Hash32::ZERO), |last| (last.sequence + 1, last.hash));
    let rows = batches::take(tx, limit).await?;
    let leaves = rows.iter().map(|row| hash("journal.leaf", &row.leaf)).collect::<Result<Vec<_>, _>>()?;
    let Some(tree) = MerkleTree::new(&leaves) else { return Ok(None) };
    let ids: Vec<Uuid> = rows.iter().map(|row| row.request_id).collect();
    let receipts = batches::receipts_of(tx, &ids).await?;
    let rewards = batches::add_rewards(tx, &earned(&receipts)?).await?;
    let batch = Batch {
        sequence,
        previous_hash: previous_hash.0.into(),
        receipts_root: tree.root().0.into(),
        count: leaves.len() as u64,
        reward_root: reward_root(&rewards).0.into(),
        total: receipts.iter().map(|receipt| u128::from(receipt.charged_micro)).sum(),
    };
    let formed = batches::form(tx, &batch, &rows, clock::now_ms()).await?;
    Ok(formed.then_some(batch))
}

/// What each operator earns by these receipts.
fn earned(receipts: &[Receipt]) -> Result<BTreeMap<Address, i64>, DbErr> {
    let mut earned = BTreeMap::new();
    for payment in receipts.iter().flat_map(|receipt| &receipt.payments) {
        let sum: &mut i64 = earned.entry(payment.operator).or_default();
        *sum = i64::try_from(payment.amount_micro)
            .ok()
            .and_then(|amount| sum.checked_add(amount))
            .ok_or_else(|| corrupt("receipts.receipt", "the payments overflow"))?;
    }
    Ok(earned)
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
