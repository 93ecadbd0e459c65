//! Gas on a real anvil: a batch, a batch with its rewards, a claim.

use infera_protocol::{bytes::Address, merkle::MerkleTree};
use infera_settlement::{
    chain::{
        B256, Batch, Call, Chain, Deployment, Port, SignedTx, TxStatus, deploy, operator::Operator, parse_key,
    },
    domain::{reward_leaf, reward_root},
};
use infera_testkit::{
    anvil::{Anvil, DEV_KEYS},
    evidence::Network,
};

use crate::{Args, Report, said};

/// The goals.
const GAS_PER_RECEIPT: f64 = 7.0;
const CLAIM_GAS: f64 = 140_000.0;
/// Operators in the reward tree.
const OPERATORS: u8 = 100;

async fn gas_of(chain: &Chain, tx: B256) -> Result<f64, String> {
    loop {
        match chain.status(tx).await.map_err(said)? {
            #[allow(clippy::cast_precision_loss)] // some ten thousand
            TxStatus::Included { gas_used, .. } => return Ok(gas_used as f64),
            TxStatus::Failed { .. } => return Err(format!("transaction {tx} failed")),
            TxStatus::Unknown => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn send(chain: &Chain, calls: &[Call]) -> Result<f64, String> {
    let nonce = chain.next_nonce().await.map_err(said)?;
    let fees = chain.fees().await.map_err(said)?;
    let SignedTx { hash, raw, .. } = chain.sign(calls, nonce, fees).await.map_err(said)?;
    chain.send_raw(&raw).await.map_err(said)?;
    gas_of(chain, hash).await
}

pub async fn run(args: &Args, report: &mut Report) -> Result<(), String> {
    let anvil = Anvil::start().await;
    let address = |key: &str| Ok::<_, String>(parse_key("key", key).map_err(said)?.address());
    let wanted = Deployment::devnet(address(DEV_KEYS[1])?, address(DEV_KEYS[2])?);
    let (contracts, deploy_secs) = {
        let began = std::time::Instant::now();
        let registry = Network::new().registry;
        let contracts = deploy::deploy(anvil.url(), DEV_KEYS[0], &registry, &wanted).await.map_err(said)?;
        (contracts, began.elapsed().as_secs_f64())
    };
    report.add("deploy_all_contracts_ms", "ms", deploy_secs * 1_000.0, None);
    let chain = Chain::connect(anvil.url(), DEV_KEYS[1], contracts.settlement).await.map_err(said)?;

    let rewards: Vec<(Address, u64)> = (1..=OPERATORS).map(|n| (Address([n; 20]), 1_000)).collect();
    let mut batch = Batch {
        sequence: 1,
        previous_hash: B256::ZERO,
        receipts_root: B256::repeat_byte(1),
        count: args.receipts.into(),
        reward_root: reward_root(&rewards).0.into(),
        total: 1_000,
    };
    // The first writes slots that later ones only change.
    send(&chain, &[Call::Post(batch)]).await?;
    let next = |batch: &mut Batch| {
        (batch.previous_hash, batch.sequence) = (batch.hash(), batch.sequence + 1);
        *batch
    };
    let alone = send(&chain, &[Call::Post(next(&mut batch))]).await?;
    let total = u128::from(OPERATORS) * 1_000;
    let batch = next(&mut batch);
    let both = send(&chain, &[Call::Post(batch), Call::Queue { batch, total }]).await?;
    let receipts = f64::from(args.receipts);
    report.add("gas_per_receipt", "gas", alone / receipts, Some(GAS_PER_RECEIPT));
    report.add("gas_per_receipt_with_rewards", "gas", both / receipts, None);

    let anybody = Operator::connect(anvil.url(), DEV_KEYS[3], contracts).await.map_err(said)?;
    anybody.devnet_pass(wanted.challenge_delay_secs + 1).await.map_err(said)?;
    let leaves: Vec<_> = rewards.iter().map(|(of, sum)| reward_leaf(of, *sum)).collect();
    let proof = MerkleTree::new(&leaves).and_then(|tree| tree.proof(0)).ok_or("no proof")?;
    let proof = proof.iter().map(|hash| hash.0.into()).collect();
    let of = rewards[0].0.0.into();
    let tx = anybody.claim(1, of, 1_000, proof).await.map_err(said)?;
    report.add("claim_gas", "gas", gas_of(&chain, tx).await?, Some(CLAIM_GAS));
    Ok(())
}
