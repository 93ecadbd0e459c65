//! Rewards on a real chain: from the books to the operator's own tokens, and what thieves get.

use infera_protocol::bytes::Address;
use infera_settlement::{
    chain::{B256, Contracts, operator::Operator},
    operators::{Earned, Reward, Standing},
};
use infera_testkit::{
    anvil::{Anvil, DEV_KEYS},
    eventually,
};
use serde_json::json;
use uuid::Uuid;

use crate::{
    anvil_world::rpc,
    batches::{anchored, decided, place},
    chain::DEPLOYER,
    network::Network,
    service::{Column, DEADLINE, Place, Service},
};

struct World {
    anvil: Anvil,
    contracts: Contracts,
    place: Place,
    service: Service,
}

impl World {
    async fn new() -> Self {
        let anvil = Anvil::start().await;
        let contracts = crate::chain::contracts(anvil.url()).await;
        let mut place = place(Column::Embedded, anvil.url(), Address(contracts.settlement.into())).await;
        place.config.rewards.interval_secs = 1;
        let service = place.start().await;
        Self { anvil, contracts, place, service }
    }

    async fn operator(&self, key: &str) -> Operator {
        Operator::connect(self.anvil.url(), key, self.contracts).await.unwrap()
    }

    async fn earned(&self, operator: Address) -> Earned {
        let json = self.service.json(&format!("/v1/operators/{operator}"), None).await;
        serde_json::from_value(json).unwrap()
    }

    async fn reward(&self, operator: Address, sequence: u64) -> Reward {
        let path = format!("/v1/operators/{operator}/rewards/{sequence}");
        serde_json::from_value(self.service.json(&path, None).await).unwrap()
    }

    /// Where an operator's money is, by books and chain.
    async fn standing(&self, chain: &Operator, operator: Address) -> Standing {
        let reader = chain.reader();
        let root = reader.reward_root(reader.claimable_id().await.unwrap()).await.unwrap();
        let matured = match root.sequence {
            0 => 0,
            sequence => self.reward(operator, sequence).await.cumulative_micro,
        };
        let claimed = reader.claimed(operator.0.into()).await.unwrap();
        Standing::of(&self.earned(operator).await, matured, u64::try_from(claimed).unwrap())
    }

    async fn pass(&self, secs: u64) {
        rpc(self.anvil.url(), "evm_increaseTime", json!([secs])).await;
        rpc(self.anvil.url(), "anvil_mine", json!(["0x1"])).await;
    }

    /// Waits until all of `earned` stands in a reward root.
    async fn queued(&self, chain: &Operator, earned: u128) {
        eventually(DEADLINE, async || {
            rpc(self.anvil.url(), "anvil_mine", json!(["0x1"])).await;
            // anvil may refuse a call in the very moment in which it makes a block.
            let queued = chain.reader().rewards().await.map_err(|error| error.to_string())?;
            if queued.last_total == earned { Ok(()) } else { Err(format!("{queued:?}")) }
        })
        .await;
    }
}

/// The operators that a receipt pays.
async fn paid(world: &World, id: Uuid) -> Vec<Address> {
    let documents = anchored(&world.service, &world.place, &[id]).await;
    documents[0].receipt.payments.iter().map(|payment| payment.operator).collect()
}

fn words(reward: &Reward) -> Vec<B256> {
    reward.proof.iter().map(|hash| hash.0.into()).collect()
}

#[tokio::test]
async fn what_was_earned_is_claimed_to_the_last_unit_and_once() {
    let world = World::new().await;
    // Whose key it is does not matter: only the operator is paid.
    let anybody = world.operator(DEV_KEYS[3]).await;
    let ids = decided(&world.place, 4);
    let mut operators = Vec::new();
    for id in &ids {
        operators.extend(paid(&world, *id).await);
    }
    world.queued(&anybody, 4 * 120).await;
    let (all, operator) = (operators.clone(), operators[0]);
    let earned = all.iter().filter(|one| **one == operator).count() as u64 * 60;
    let before = world.standing(&anybody, operator).await;
    let waits = Standing { pending_micro: 0, verified_micro: earned, claimable_micro: 0, paid_micro: 0 };
    assert_eq!(before, waits, "the challenge delay runs");

    let reader = anybody.reader();
    let last = reader.rewards().await.unwrap().last_id;
    let sequence = reader.reward_root(last).await.unwrap().sequence;
    let reward = world.reward(operator, sequence).await;
    assert_eq!(reward.root.0, reader.reward_root(last).await.unwrap().root.0);
    let cumulative = u128::from(reward.cumulative_micro);
    let claim = async |id, of: Address, cumulative, proof| {
        anybody.claim(id, of.0.into(), cumulative, proof).await.map_err(|error| error.to_string())
    };
    let early = claim(last, operator, cumulative, words(&reward)).await.unwrap_err();
    assert!(early.contains("too early"), "{early}");
    world.pass(31).await;
    let standing = world.standing(&anybody, operator).await;
    assert_eq!((standing.claimable_micro, standing.verified_micro), (earned, 0));

    // A thief's paths: more than was earned, another's proof, an inner node of the tree.
    let more = claim(last, operator, cumulative + 1, words(&reward)).await.unwrap_err();
    assert!(more.contains("proof"), "{more}");
    let thief = Address(anybody.address().into());
    let others = claim(last, thief, cumulative, words(&reward)).await.unwrap_err();
    assert!(others.contains("proof"), "{others}");
    let inner = claim(last, operator, cumulative, words(&reward)[1..].to_vec()).await.unwrap_err();
    assert!(inner.contains("proof"), "{inner}");

    claim(last, operator, cumulative, words(&reward)).await.unwrap();
    assert_eq!(anybody.tokens(operator.0.into()).await.unwrap(), u128::from(earned));
    let twice = claim(last, operator, cumulative, words(&reward)).await.unwrap_err();
    assert!(twice.contains("is paid already"), "{twice}");
    let after = world.standing(&anybody, operator).await;
    assert_eq!((after.paid_micro, after.claimable_micro), (earned, 0));

    // The rest of them: in the end the pool has paid what the ledger owes.
    let mut others: Vec<Address> = all.into_iter().filter(|one| *one != operator).collect();
    others.sort_unstable();
    others.dedup();
    for other in others {
        let reward = world.reward(other, sequence).await;
        claim(last, other, reward.cumulative_micro.into(), words(&reward)).await.unwrap();
    }
    let audit = world.service.audit().await;
    let claimed = reader.total_claimed().await.unwrap();
    assert_eq!(claimed, u128::from(audit["operators_micro"].as_u64().unwrap()));
    world.service.stop().await;
}

#[tokio::test]
async fn work_that_was_not_paid_says_why() {
    let world = World::new().await;
    let ids = decided(&world.place, 1);
    let documents = anchored(&world.service, &world.place, &ids).await;
    let unpaid = documents[0].receipt.unpaid[0];
    let earned = world.earned(unpaid.operator).await;
    assert_eq!((earned.earned_micro, earned.unpaid_total), (0, 1));
    assert_eq!((earned.unpaid[0].request, earned.unpaid[0].node), (ids[0], unpaid.node));
    assert_eq!(earned.unpaid[0].reason, "outlier");
    assert!(earned.unpaid[0].sentence().contains("differed"));
    let stranger = Network::operator(40);
    assert_eq!(world.earned(stranger).await.earned_micro, 0);
    let (status, body) = world.service.get(&format!("/v1/operators/{stranger}/rewards/1"), None).await;
    assert_eq!(status, 404, "{}", String::from_utf8_lossy(&body));
    let (status, _) = world.service.get("/v1/operators/0x12", None).await;
    assert_eq!(status, 400);
    world.service.stop().await;
}

#[tokio::test]
async fn stake_goes_in_at_once_and_comes_out_after_its_delay() {
    let world = World::new().await;
    let operator = world.operator(DEV_KEYS[3]).await;
    let me = operator.address();
    let poor = operator.stake(500).await.unwrap_err().to_string();
    assert!(poor.contains("stake reverts"), "{poor}");
    world.operator(DEPLOYER).await.transfer(me, 2_000_000_000).await.unwrap();
    operator.stake(1_500_000_000).await.unwrap();
    let stake = operator.staked(me).await.unwrap();
    assert_eq!((stake.active, stake.unbonding, stake.minimum), (1_500_000_000, 0, 1_000_000_000));
    assert_eq!(operator.tokens(me).await.unwrap(), 500_000_000);

    let beyond = operator.unstake(1_500_000_001).await.unwrap_err().to_string();
    assert!(beyond.contains("1500000000 is staked"), "{beyond}");
    let nothing = operator.withdraw().await.unwrap_err().to_string();
    assert!(nothing.contains("nothing is on its way out"), "{nothing}");
    operator.unstake(600_000_000).await.unwrap();
    let early = operator.withdraw().await.unwrap_err().to_string();
    assert!(early.contains("too early"), "{early}");
    world.pass(61).await;
    operator.withdraw().await.unwrap();
    let stake = operator.staked(me).await.unwrap();
    assert_eq!((stake.active, stake.unbonding), (900_000_000, 0));
    assert_eq!(operator.tokens(me).await.unwrap(), 1_100_000_000);
    world.service.stop().await;
}

/// What a stranger needs to recompute a batch is public, and leads to the roots on the chain.
#[tokio::test]
async fn batches_are_public_with_their_receipts_and_rewards() {
    use infera_protocol::{merkle::MerkleTree, receipt::Receipt};
    use infera_settlement::{
        batches_http::{BatchInfo, ReceiptPage, RewardLeaves},
        chain::ChainReader,
        domain::reward_root,
    };
    let world = World::new().await;
    let ids = decided(&world.place, 5);
    anchored(&world.service, &world.place, &ids).await;
    let reader = ChainReader::connect(world.anvil.url(), world.contracts.settlement).await.unwrap();
    let mut seen = Vec::new();
    let head = reader.head().await.unwrap().sequence;
    for sequence in 1..=head {
        let get = async |path: &str| world.service.json(&format!("/v1/batches/{sequence}{path}"), None).await;
        let info: BatchInfo = serde_json::from_value(get("").await).unwrap();
        let posted = reader.posted(sequence, 0).await.unwrap().unwrap();
        assert_eq!(info.hash.0, posted.batch.hash().0);
        assert_eq!((info.count, u128::from(info.total_micro)), (posted.batch.count, posted.batch.total));
        assert_eq!((info.block, info.transaction.unwrap().0), (Some(posted.block), posted.tx.0));
        let page: ReceiptPage = serde_json::from_value(get("/receipts").await).unwrap();
        assert_eq!((page.receipts.len() as u64, page.next), (info.count, None));
        let leaves: Vec<_> = page.receipts.iter().map(Receipt::leaf).collect();
        assert_eq!(MerkleTree::new(&leaves).unwrap().root().0, posted.batch.receipts_root.0);
        let later: ReceiptPage = serde_json::from_value(get("/receipts?from=1").await).unwrap();
        assert_eq!(later.receipts, page.receipts[1..]);
        let rewards: RewardLeaves = serde_json::from_value(get("/rewards").await).unwrap();
        let sums: Vec<_> =
            rewards.rewards.iter().map(|leaf| (leaf.operator, leaf.cumulative_micro)).collect();
        assert_eq!(reward_root(&sums).0, posted.batch.reward_root.0);
        seen.extend(page.receipts.iter().map(|receipt| receipt.id));
    }
    seen.sort();
    let mut wanted = ids.clone();
    wanted.sort();
    assert_eq!(seen, wanted);
    for (path, status) in [(format!("/v1/batches/{}", head + 1), 404), ("/v1/batches/first".into(), 400)] {
        assert_eq!(world.service.get(&path, None).await.0, status, "{path}");
    }
}
