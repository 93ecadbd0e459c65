//! Gas on a real anvil: a batch, a batch with its rewards, with charges, a claim.

use infera_protocol::{bytes::Address, merkle::MerkleTree};
use infera_settlement::{
    chain::{
        B256, Batch, Call, Chain, Charge, Contracts, Deployment, Port, SignedTx, TxStatus,
        consumer::Consumer, deploy, operator::Operator, parse_key,
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
/// Accounts that one transaction charges.
const ACCOUNTS: u8 = 50;

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
    let queued = next(&mut batch);
    let both = send(&chain, &[Call::Post(queued), Call::Queue { batch: queued, total }]).await?;
    let receipts = f64::from(args.receipts);
    report.add("gas_per_receipt_10k", "gas", alone / receipts, Some(GAS_PER_RECEIPT));
    report.add("gas_per_receipt_with_rewards", "gas", both / receipts, None);

    report.add("charge_gas", "gas/account", charges(&anvil, contracts, &chain, &mut batch).await?, None);

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

/// What each of [`ACCOUNTS`] costs that a batch's transaction charges, with a new voucher.
async fn charges(
    anvil: &Anvil,
    contracts: Contracts,
    chain: &Chain,
    batch: &mut Batch,
) -> Result<f64, String> {
    let treasury = Consumer::connect(anvil.url(), DEV_KEYS[0], contracts).await.map_err(said)?;
    let mut wallets = Vec::new();
    for n in 1..=ACCOUNTS {
        let key = B256::repeat_byte(n).to_string();
        let wallet = Consumer::connect(anvil.url(), &key, contracts).await.map_err(said)?;
        treasury.deposit_for(wallet.address(), 1_000).await.map_err(said)?;
        wallets.push(wallet);
    }
    // The first charge writes slots that later ones only change.
    let mut gas = 0.0;
    for cumulative in [100, 200] {
        (batch.previous_hash, batch.sequence) = (batch.hash(), batch.sequence + 1);
        let charges = wallets.iter().map(|wallet| {
            let signature = wallet.voucher(cumulative).map_err(said)?;
            let voucher = Some((cumulative.into(), signature));
            Ok(Charge { account: wallet.address(), cumulative: cumulative.into(), voucher })
        });
        let charges = charges.collect::<Result<Vec<_>, String>>()?;
        let charge = Call::Charge { sequence: batch.sequence, charges };
        gas = send(chain, &[Call::Post(*batch), charge]).await?;
    }
    (batch.previous_hash, batch.sequence) = (batch.hash(), batch.sequence + 1);
    let alone = send(chain, &[Call::Post(*batch)]).await?;
    Ok((gas - alone) / f64::from(ACCOUNTS))
}
