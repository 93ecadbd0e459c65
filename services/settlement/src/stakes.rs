//! Follows what operators have at stake, at finality, and writes who has enough where dispatchers read it.
//!
//! ```text
//! InferaStaking ─events, positions─> Follower ─> stakes.json beside the manifest ─> runtime::network::Live
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use infera_protocol::bytes::Address;
use infera_protocol::stakes::Stakes;
use infera_runtime::CancellationToken;
use infera_runtime::network::{self, NetworkError};

use crate::chain::port::Finality;
use crate::chain::progress::Progress;
use crate::chain::{self, ChainError, ChainReader, Contracts, stakes};
use crate::escrow::follow::AT_A_TIME;

/// What it works with.
pub struct Follower {
    pub rpc_url: String,
    pub contracts: Contracts,
    pub manifest_path: PathBuf,
    /// Where the search for stakes begins.
    pub from_block: u64,
    pub finality: Finality,
    pub confirmations: u64,
    pub poll: Duration,
}

/// What the follower remembers between looks, also of one that failed in the middle.
struct Seen {
    reader: Option<ChainReader>,
    progress: Progress,
    /// Whose stake changed and was not read since.
    unread: BTreeSet<chain::Address>,
    /// Of everybody who has any: the minimum may be lowered.
    active_micro: BTreeMap<Address, u64>,
    written: Option<Stakes>,
}

/// Why a look was in vain.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Network(#[from] NetworkError),
}

impl Follower {
    /// Follows the chain until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut seen = Seen {
            reader: None,
            progress: Progress::new(self.from_block),
            unread: BTreeSet::new(),
            active_micro: BTreeMap::new(),
            written: None,
        };
        loop {
            if let Err(error) = self.look(&mut seen).await {
                seen.reader = None;
                tracing::warn!(%error, "the stakes are not read, trying again");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(self.poll) => {}
            }
        }
    }

    /// Takes over what is final since the last look.
    async fn look(&self, seen: &mut Seen) -> Result<(), FollowError> {
        let staking = self.contracts.staking;
        let reader = match seen.reader.take() {
            Some(reader) => reader,
            None => ChainReader::connect(&self.rpc_url, staking).await?,
        };
        let reader = seen.reader.insert(reader).clone();
        let until = reader.final_block(self.finality, self.confirmations).await?;
        if seen.progress.begins_anew(&reader).await? {
            seen.unread.clear();
            seen.active_micro.clear();
        }
        while let Some(range) = seen.progress.next(&reader, until).await? {
            seen.unread.extend(stakes::touched(&reader, staking, range.from, range.to).await?);
            seen.progress.read(&range);
        }
        let Some(last) = seen.progress.last() else { return Ok(()) };
        seen.read(&reader, staking, last).await?;
        let minimum_micro = stakes::minimum(&reader, staking, last).await?;
        let stakes = Stakes::enough(minimum_micro, &seen.active_micro);
        if seen.written.as_ref() != Some(&stakes) {
            network::write_json(&network::stakes_path(&self.manifest_path), &stakes)?;
            tracing::info!(operators = stakes.active_micro.len(), minimum_micro, "stakes written");
            seen.written = Some(stakes);
        }
        Ok(())
    }
}

impl Seen {
    /// Reads what changed, as of the end of a block.
    async fn read(
        &mut self,
        reader: &ChainReader,
        staking: chain::Address,
        block: u64,
    ) -> Result<(), ChainError> {
        let reading = self.unread.clone().into_iter().map(async |operator| {
            stakes::active(reader, staking, operator, block).await.map(|active| (operator, active))
        });
        let mut read = std::pin::pin!(stream::iter(reading).buffered(AT_A_TIME));
        while let Some((operator, active)) = read.try_next().await? {
            self.unread.remove(&operator);
            let account = Address(operator.into());
            match active {
                0 => self.active_micro.remove(&account),
                _ => self.active_micro.insert(account, active),
            };
        }
        Ok(())
    }
}
