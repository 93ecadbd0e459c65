//! Follows what operators have at stake, at finality, and writes who has enough where dispatchers read it.
//!
//! ```text
//! InferaStaking ─events, positions─> Follower ─> stakes.json beside the manifest ─> runtime::network::Live
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use infera_protocol::bytes::Address;
use infera_protocol::stakes::Stakes;
use infera_runtime::CancellationToken;
use infera_runtime::network::{self, NetworkError};

use crate::chain::governance::LOG_RANGE;
use crate::chain::port::Finality;
use crate::chain::reader::ChainReader;
use crate::chain::{ChainError, Contracts, stakes};

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

/// What is known, up to a block.
#[derive(Default)]
struct Seen {
    next_block: Option<u64>,
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
        let mut seen = Seen::default();
        loop {
            if let Err(error) = self.look(&mut seen).await {
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
        let reader = ChainReader::connect(&self.rpc_url, self.contracts.staking).await?;
        let last = reader.final_block(self.finality, self.confirmations).await?;
        let first = seen.next_block.unwrap_or(self.from_block);
        if first > last {
            return Ok(());
        }
        let mut touched = BTreeSet::new();
        let mut from = first;
        while from <= last {
            let to = last.min(from.saturating_add(LOG_RANGE - 1));
            touched.extend(stakes::touched(&reader, self.contracts.staking, from, to).await?);
            from = to + 1;
        }
        let minimum_micro = stakes::minimum(&reader, self.contracts.staking, last).await?;
        for operator in touched {
            let active = stakes::active(&reader, self.contracts.staking, operator, last).await?;
            seen.active_micro.insert(Address(operator.into()), active);
        }
        seen.active_micro.retain(|_, active| *active > 0);
        seen.next_block = Some(last + 1);
        let stakes = Stakes::enough(minimum_micro, &seen.active_micro);
        if seen.written.as_ref() != Some(&stakes) {
            network::write_json(&network::stakes_path(&self.manifest_path), &stakes)?;
            tracing::info!(operators = stakes.active_micro.len(), minimum_micro, "stakes written");
            seen.written = Some(stakes);
        }
        Ok(())
    }
}
