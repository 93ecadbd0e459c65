//! Following the settlement contract: which accounts changed, then what the final block has of them.
//!
//! ```text
//! final blocks: logs -> unread accounts, cursor (commit) -> each account as of the cursor's block -> ledger (commit)
//! blocks after: logs -> each account as of the newest block (commit): only lowers what may be spent
//! ```
//!
//! What was read is found again after a crash: an account stays unread until what its final block has is committed. The
//! cursor holds a block's hash; if the chain has another one there, it was reorganised beyond finality, and everything is
//! read again. While the endpoint is away the last state stays.
//!
//! Several followers may share a database, as while one process takes another's place: whoever writes holds the cursor,
//! and what was read as of another cursor is not written.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, stream};
use infera_protocol::bytes::{Address, Hash32};
use infera_runtime::{CancellationToken, clock, health::CheckHandle, planned};
use sea_orm::{DatabaseConnection, DbErr, TransactionTrait};
use tokio::sync::Notify;

use super::{Freshness, post};
use crate::{
    chain::{B256, BlockRef, ChainError, Escrow, Link, Port},
    config::Config,
    ledger::LedgerError,
    metrics::Metrics,
    store::escrows::{self, Cursor},
};

/// After a failure: doubles from the first to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// Unread accounts taken out of the database at a time.
const PAGE: u64 = 100;
/// Accounts that the endpoint is asked about at a time.
pub(crate) const AT_A_TIME: usize = 16;
/// Between counts of what is owed while nothing happens.
const COUNT: Duration = Duration::from_secs(5);

/// The follower's parts.
pub struct Follower<L> {
    pub db: DatabaseConnection,
    pub config: Config,
    pub link: L,
    pub check: CheckHandle,
    pub metrics: Metrics,
    pub freshness: Freshness,
    /// Told that an account can be charged, perhaps.
    pub changed: Arc<Notify>,
}

/// Why a look did not work.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("the database failed: {0}")]
    Db(#[from] DbErr),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What a look found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Looked {
    /// There are more blocks to look at.
    Behind,
    /// Everything up to the newest block is known.
    Current,
}

/// What the follower remembers between looks; nothing that matters after a crash.
pub struct Follow<P> {
    port: Option<P>,
    /// The newest block that was looked at.
    seen: Option<B256>,
    counted: Option<Instant>,
}

impl<P> Default for Follow<P> {
    fn default() -> Self {
        Self { port: None, seen: None, counted: None }
    }
}

impl<P> Follow<P> {
    /// Whatever was wrong with the connection, the next one is new.
    pub fn reconnect(&mut self) {
        *self = Self::default();
    }
}

impl<L: Link<Port: Clone>> Follower<L> {
    /// Follows until `shutdown`. Failures are logged, shown by the check `escrow`, and tried again.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut work = Follow::default();
        let mut backoff = FIRST_BACKOFF;
        loop {
            let looked = tokio::select! {
                // A look that is dropped is found again by the next start.
                () = shutdown.cancelled() => return,
                looked = self.look(&mut work) => looked,
            };
            let wait = match looked {
                Ok(Looked::Behind) => Duration::ZERO,
                Ok(Looked::Current) => Duration::from_millis(self.config.chain.poll_ms),
                Err(error) => {
                    self.check.down(error.to_string());
                    tracing::warn!(%error, retry_ms = backoff.as_millis(), "escrows are not followed for now");
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
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// One look at the chain: one range of final blocks, or everything up to the newest one. May be dropped at any await.
    ///
    /// # Errors
    /// [`FollowError`]; try again later, after [`Follow::reconnect`].
    pub async fn look(&self, work: &mut Follow<L::Port>) -> Result<Looked, FollowError> {
        let port = self.connected(work).await?;
        // What happens from here on is not seen.
        let looked_at_ms = clock::now_ms();
        let newest = port.newest().await?;
        if work.seen == Some(newest.hash) {
            return self.nothing_new(work, looked_at_ms).await;
        }
        let chain = &self.config.chain;
        let last_final = port.final_block(chain.finality, chain.confirmations).await?.min(newest.number);
        let Some(cursor) = self.checked(&port).await? else { return Ok(Looked::Behind) };
        let mut next = cursor.map_or(chain.from_block, |cursor| cursor.next_block);
        if next <= last_final {
            next = self.scan(&port, cursor, next, last_final).await?;
        }
        if next <= last_final {
            self.check.down(format!("reading block {next} of {last_final}"));
            return Ok(Looked::Behind);
        }
        if !self.read_unread(&port).await? {
            return Ok(Looked::Behind);
        }
        if !self.read_heads(&port, &newest).await? {
            return Ok(Looked::Behind);
        }
        work.seen = Some(newest.hash);
        self.freshness.looked(looked_at_ms);
        self.count().await?;
        work.counted = Some(Instant::now());
        Ok(Looked::Current)
    }

    async fn connected(&self, work: &mut Follow<L::Port>) -> Result<L::Port, FollowError> {
        if let Some(port) = &work.port {
            return Ok(port.clone());
        }
        let port = self.link.connect().await?;
        self.freshness.delayed(port.withdrawal_delay().await?);
        work.port = Some(port.clone());
        Ok(port)
    }

    /// The newest block is known already.
    async fn nothing_new(
        &self,
        work: &mut Follow<L::Port>,
        looked_at_ms: i64,
    ) -> Result<Looked, FollowError> {
        self.freshness.looked(looked_at_ms);
        if work.counted.is_none_or(|counted| counted.elapsed() >= COUNT) {
            self.count().await?;
            work.counted = Some(Instant::now());
        }
        Ok(Looked::Current)
    }

    /// How far the chain was followed, `Some(None)` if from the beginning: it still has what was looked at. `None` if
    /// another follower was there meanwhile.
    async fn checked(&self, port: &L::Port) -> Result<Option<Option<Cursor>>, FollowError> {
        let Some(cursor) = escrows::cursor(&self.db).await? else { return Ok(Some(None)) };
        let last = cursor.next_block.saturating_sub(1);
        if existing_hash(port, last).await? == B256::from(cursor.hash.0) {
            return Ok(Some(Some(cursor)));
        }
        tracing::warn!(
            block = last,
            "the chain was reorganised beyond finality: every escrow is read again; `chain.confirmations` is too small \
             for it"
        );
        let tx = self.db.begin().await?;
        if escrows::lock_cursor(&tx).await? != Some(cursor) {
            tx.rollback().await?;
            return Ok(None);
        }
        escrows::rewind(&tx).await?;
        tx.commit().await?;
        Ok(Some(None))
    }

    /// Notes the accounts that a range of final blocks changed, from the block `from` on, which is the cursor's. Returns the
    /// next block to look at.
    async fn scan(
        &self,
        port: &L::Port,
        cursor: Option<Cursor>,
        from: u64,
        last_final: u64,
    ) -> Result<u64, FollowError> {
        let to = last_final.min(from.saturating_add(self.config.escrow.log_blocks - 1));
        let hash = existing_hash(port, to).await?;
        let touched = accounts(port.touched(from, to).await?);
        planned::pause("settlement.escrow.before_mark").await;
        let tx = self.db.begin().await?;
        if escrows::lock_cursor(&tx).await? != cursor {
            tx.rollback().await?;
            return Ok(from);
        }
        escrows::mark(&tx, &touched).await?;
        escrows::set_cursor(&tx, &Cursor { next_block: to + 1, hash: Hash32(hash.0) }).await?;
        planned::pause("settlement.escrow.in_mark").await;
        tx.commit().await?;
        planned::pause("settlement.escrow.after_mark").await;
        Ok(to + 1)
    }

    /// Reads every account that a final block changed, as of the cursor's block, into the ledger. `false` if another
    /// follower moved the cursor meanwhile.
    async fn read_unread(&self, port: &L::Port) -> Result<bool, FollowError> {
        let Some(cursor) = escrows::cursor(&self.db).await? else { return Ok(true) };
        let block = cursor.next_block.saturating_sub(1);
        loop {
            let unread = escrows::unread(&self.db, PAGE).await?;
            if unread.is_empty() {
                return Ok(true);
            }
            let reading = unread.into_iter().map(async |account| {
                port.escrow(account.0.into(), block).await.map(|state| (account, state))
            });
            let mut states = std::pin::pin!(stream::iter(reading).buffered(AT_A_TIME));
            while let Some((account, state)) = states.try_next().await? {
                if !self.take_over(&cursor, &account, &state).await? {
                    return Ok(false);
                }
            }
        }
    }

    /// Takes over what the cursor's block has of an account. `false` if it is not the cursor any more: what was read may be
    /// older than what another follower has taken over.
    async fn take_over(
        &self,
        cursor: &Cursor,
        account: &Address,
        state: &Escrow,
    ) -> Result<bool, FollowError> {
        let block = cursor.next_block.saturating_sub(1);
        planned::pause("settlement.escrow.before_post").await;
        let tx = self.db.begin().await?;
        // Nobody moves it until this is done.
        if escrows::lock_cursor(&tx).await? != Some(*cursor) {
            tx.rollback().await?;
            return Ok(false);
        }
        let moved = post::settle(&tx, account, state, block, clock::now_ms()).await?;
        planned::pause("settlement.escrow.in_post").await;
        tx.commit().await?;
        planned::pause("settlement.escrow.after_post").await;
        if moved.micro != 0 {
            tracing::info!(account = %account, micro = moved.micro, block, "escrow moved");
        }
        if moved.short_micro > 0 {
            tracing::error!(
                account = %account,
                short_micro = moved.short_micro,
                "an escrow does not cover what was spent of it any more"
            );
        }
        Ok(true)
    }

    /// Reads the accounts that blocks after the final one changed, as of the newest. `false` if another follower moved the
    /// cursor meanwhile.
    async fn read_heads(&self, port: &L::Port, newest: &BlockRef) -> Result<bool, FollowError> {
        let cursor = escrows::cursor(&self.db).await?;
        let mut from = cursor.map_or(self.config.chain.from_block, |cursor| cursor.next_block);
        let mut touched = BTreeSet::new();
        while from <= newest.number {
            let to = newest.number.min(from.saturating_add(self.config.escrow.log_blocks - 1));
            touched.extend(accounts(port.touched(from, to).await?));
            from = to + 1;
        }
        let reading = touched.into_iter().map(async |account| {
            port.escrow(account.0.into(), newest.number).await.map(|state| (account, state))
        });
        let heads: Vec<(Address, Escrow)> = stream::iter(reading).buffered(AT_A_TIME).try_collect().await?;
        let tx = self.db.begin().await?;
        if escrows::lock_cursor(&tx).await? != cursor {
            tx.rollback().await?;
            return Ok(false);
        }
        escrows::set_heads(&tx, &heads).await?;
        tx.commit().await?;
        if !heads.is_empty() {
            self.changed.notify_one();
        }
        Ok(true)
    }

    /// Says on the check and in the metrics what is owed.
    async fn count(&self) -> Result<(), FollowError> {
        let owing = escrows::owing(&self.db).await?;
        self.metrics.owing(&owing);
        let cap = i64::try_from(self.config.escrow.short_cap_micro).unwrap_or(i64::MAX);
        if let Some(reason) = self.freshness.too_slow() {
            self.check.down(reason);
        } else if owing.short_micro > cap {
            self.check.down(format!(
                "{} accounts owe {} micro-INFER beyond their escrow; they spend nothing until they deposit it \
                 (`escrow.short_cap_micro` accepts it)",
                owing.short_accounts, owing.short_micro
            ));
        } else {
            self.check.up();
        }
        Ok(())
    }
}

/// A block that the endpoint does not have is no other block: it lags behind what was seen before.
async fn existing_hash(port: &impl Port, block: u64) -> Result<B256, ChainError> {
    port.block_hash(block).await?.ok_or_else(|| ChainError::no_block(block))
}

fn accounts(touched: BTreeSet<crate::chain::Address>) -> BTreeSet<Address> {
    touched.into_iter().map(|account| Address(account.into())).collect()
}
