//! Reading `InferaStaking`: whose stake changed, and what it is.

use std::collections::BTreeSet;

use alloy::{
    eips::BlockNumberOrTag, primitives::Address, providers::Provider, rpc::types::Filter, sol_types::SolEvent,
};

use super::{ChainError, InferaStaking, call, reader::ChainReader};

/// The operators whose active stake may have changed in these blocks, both ends included.
///
/// # Errors
/// [`ChainError`].
pub async fn touched(
    reader: &ChainReader,
    staking: Address,
    from: u64,
    to: u64,
) -> Result<BTreeSet<Address>, ChainError> {
    let events = [
        InferaStaking::Staked::SIGNATURE_HASH,
        InferaStaking::Unstaking::SIGNATURE_HASH,
        InferaStaking::Slashed::SIGNATURE_HASH,
    ];
    let filter =
        Filter::new().address(staking).event_signature(events.to_vec()).from_block(from).to_block(to);
    let logs = call("eth_getLogs", async { reader.provider().get_logs(&filter).await }).await?;
    // The operator is the first that each of them names.
    let operator = |log: &alloy::rpc::types::Log| log.topics().get(1).map(|topic| Address::from_word(*topic));
    Ok(logs.iter().filter(|log| !log.removed).filter_map(operator).collect())
}

/// What `operator` has at stake as of the end of a block, 10^-6 INFER, without what is on its way out.
///
/// # Errors
/// [`ChainError`].
pub async fn active(
    reader: &ChainReader,
    staking: Address,
    operator: Address,
    block: u64,
) -> Result<u64, ChainError> {
    let contract = InferaStaking::new(staking, reader.provider());
    let at = BlockNumberOrTag::Number(block);
    let position =
        call("position", async { contract.position(operator).block(at.into()).call().await }).await?;
    Ok(u64::try_from(position.active).unwrap_or(u64::MAX))
}

/// What an operator needs for work as of the end of a block, 10^-6 INFER.
///
/// # Errors
/// [`ChainError`].
pub async fn minimum(reader: &ChainReader, staking: Address, block: u64) -> Result<u64, ChainError> {
    let contract = InferaStaking::new(staking, reader.provider());
    let at = BlockNumberOrTag::Number(block);
    let minimum =
        call("minimumStake", async { contract.minimumStake().block(at.into()).call().await }).await?;
    Ok(u64::try_from(minimum).unwrap_or(u64::MAX))
}
