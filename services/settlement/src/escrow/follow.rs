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

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use infera_protocol::bytes::{Address, Hash32};
use infera_runtime::{CancellationToken, clock, health::CheckHandle, planned};
use sea_orm::{DatabaseConnection, DbErr, TransactionTrait};
use tokio::sync::Notify;

use super::{Freshness, post};
use crate::{
    chain::{B256, BlockRef, ChainError, Link, Port},
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
        if let Ok(Some(cursor)) = escrows::cursor(&self.db).await {
            self.freshness.looked(cursor.looked_at_ms);
        }
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
        let newest = port.newest().await?;
        if work.seen == Some(newest.hash) {
            return self.nothing_new(work).await;
        }
        let chain = &self.config.chain;
        let last_final = port.final_block(chain.finality, chain.confirmations).await?.min(newest.number);
        let next = match escrows::cursor(&self.db).await? {
            Some(cursor) => self.checked(&port, &cursor).await?,
            None => chain.from_block,
        };
        if next <= last_final {
            let next = self.scan(&port, next, last_final).await?;
            if next <= last_final {
                self.check.down(format!("reading block {next} of {last_final}"));
                return Ok(Looked::Behind);
            }
        }
        self.read_unread(&port).await?;
        self.read_heads(&port, &newest).await?;
        work.seen = Some(newest.hash);
        self.freshness.looked(clock::now_ms());
        self.count().await?;
        work.counted = Some(Instant::now());
        Ok(Looked::Current)
    }

    async fn connected(&self, work: &mut Follow<L::Port>) -> Result<L::Port, FollowError> {
        if let Some(port) = &work.port {
            return Ok(port.clone());
        }
        let port = self.link.connect().await?;
        work.port = Some(port.clone());
        Ok(port)
    }

    /// The newest block is known already.
    async fn nothing_new(&self, work: &mut Follow<L::Port>) -> Result<Looked, FollowError> {
        self.freshness.looked(clock::now_ms());
        if work.counted.is_none_or(|counted| counted.elapsed() >= COUNT) {
            self.count().await?;
            work.counted = Some(Instant::now());
        }
        Ok(Looked::Current)
    }

    /// The next block to look at, if the chain still has what was looked at.
    async fn checked(&self, port: &L::Port, cursor: &Cursor) -> Result<u64, FollowError> {
        let last = cursor.next_block.saturating_sub(1);
        if port.block_hash(last).await? == Some(B256::from(cursor.hash.0)) {
            return Ok(cursor.next_block);
        }
        tracing::warn!(
            block = last,
            "the chain was reorganised beyond finality: every escrow is read again; `chain.confirmations` is too small \
             for it"
        );
        let tx = self.db.begin().await?;
        escrows::rewind(&tx).await?;
        tx.commit().await?;
        Ok(self.config.chain.from_block)
    }

    /// Notes the accounts that a range of final blocks changed. Returns the next block to look at.
    async fn scan(&self, port: &L::Port, from: u64, last_final: u64) -> Result<u64, FollowError> {
        let to = last_final.min(from.saturating_add(self.config.escrow.log_blocks - 1));
        let Some(hash) = port.block_hash(to).await? else { return Ok(from) };
        let touched = accounts(port.touched(from, to).await?);
        planned::pause("settlement.escrow.before_mark").await;
        let tx = self.db.begin().await?;
        escrows::mark(&tx, &touched).await?;
        let looked_at_ms = clock::now_ms();
        escrows::set_cursor(&tx, &Cursor { next_block: to + 1, hash: Hash32(hash.0), looked_at_ms }).await?;
        planned::pause("settlement.escrow.in_mark").await;
        tx.commit().await?;
        planned::pause("settlement.escrow.after_mark").await;
        Ok(to + 1)
    }

    /// Reads every account that a final block changed, as of the cursor's block, into the ledger.
    async fn read_unread(&self, port: &L::Port) -> Result<(), FollowError> {
        let Some(cursor) = escrows::cursor(&self.db).await? else { return Ok(()) };
        let block = cursor.next_block.saturating_sub(1);
        loop {
            let unread = escrows::unread(&self.db, PAGE).await?;
            if unread.is_empty() {
                return Ok(());
            }
            for account in unread {
                let state = port.escrow(account.0.into(), block).await?;
                planned::pause("settlement.escrow.before_post").await;
                let tx = self.db.begin().await?;
                let moved = post::settle(&tx, &account, &state, block, clock::now_ms()).await?;
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
            }
        }
    }

    /// Reads the accounts that blocks after the final one changed, as of the newest.
    async fn read_heads(&self, port: &L::Port, newest: &BlockRef) -> Result<(), FollowError> {
        let cursor = escrows::cursor(&self.db).await?;
        let mut from = cursor.map_or(self.config.chain.from_block, |cursor| cursor.next_block);
        let mut touched = BTreeSet::new();
        while from <= newest.number {
            let to = newest.number.min(from.saturating_add(self.config.escrow.log_blocks - 1));
            touched.extend(accounts(port.touched(from, to).await?));
            from = to + 1;
        }
        let mut heads = Vec::with_capacity(touched.len());
        for account in touched {
            heads.push((account, port.escrow(account.0.into(), newest.number).await?));
        }
        let tx = self.db.begin().await?;
        escrows::set_heads(&tx, &heads).await?;
        tx.commit().await?;
        if !heads.is_empty() {
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Says on the check and in the metrics what is owed.
    async fn count(&self) -> Result<(), FollowError> {
        let owing = escrows::owing(&self.db).await?;
        self.metrics.owing(&owing);
        let cap = i64::try_from(self.config.escrow.short_cap_micro).unwrap_or(i64::MAX);
        if owing.short_micro > cap {
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

fn accounts(touched: BTreeSet<crate::chain::Address>) -> BTreeSet<Address> {
    touched.into_iter().map(|account| Address(account.into())).collect()
}
