//! What operators have at stake on a real chain, and what dispatchers read of it.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use alloy::{
    primitives::{U256, hex},
    sol_types::SolCall,
};
use infera_protocol::{bytes::Address, stakes::Stakes};
use infera_runtime::{
    CancellationToken,
    network::{self, Live},
};
use infera_settlement::{
    chain::{Contracts, operator::Operator, port::Finality},
    stakes::Follower,
};
use infera_testkit::{
    TempDir,
    anvil::{Anvil, DEV_KEYS},
    eventually,
};
use serde_json::json;

use crate::{anvil_world::rpc, chain::DEPLOYER, network::Network, proxy::Proxy, service::DEADLINE};

mod abi {
    alloy::sol! {
        function setMinimumStake(uint256 amount);
    }
}

/// What the network asks for at first.
const MINIMUM: u64 = 1_000_000_000;

struct World {
    anvil: Anvil,
    proxy: Proxy,
    contracts: Contracts,
    dir: TempDir,
    operator: Operator,
}

impl World {
    /// With an operator that has twice the minimum.
    async fn new() -> Self {
        let anvil = Anvil::start_with(&["64"]).await;
        let contracts = crate::chain::contracts(anvil.url()).await;
        let proxy = Proxy::start(anvil.url()).await;
        let (dir, network) = (TempDir::new().unwrap(), Network::offline());
        network::write_json(&dir.path().join("network.json"), &network.manifest).unwrap();
        network::write_json(&dir.path().join("models.json"), &network.registry).unwrap();
        let operator = Operator::connect(anvil.url(), DEV_KEYS[3], contracts).await.unwrap();
        let treasury = Operator::connect(anvil.url(), DEPLOYER, contracts).await.unwrap();
        treasury.transfer(operator.address(), u128::from(2 * MINIMUM)).await.unwrap();
        Self { anvil, proxy, contracts, dir, operator }
    }

    fn stakes_path(&self) -> PathBuf {
        network::stakes_path(&self.dir.path().join("network.json"))
    }

    fn live(&self) -> Live {
        Live::load(&self.dir.path().join("network.json"), &self.dir.path().join("models.json")).unwrap()
    }

    /// A follower, and a process that reads what it writes, until the token is cancelled.
    fn start(&self) -> (Live, CancellationToken) {
        let (live, stop) = (self.live(), CancellationToken::new());
        let follower = Follower {
            rpc_url: self.proxy.url.clone(),
            contracts: self.contracts,
            manifest_path: self.dir.path().join("network.json"),
            from_block: 0,
            finality: Finality::Depth,
            confirmations: 1,
            poll: Duration::from_millis(50),
        };
        tokio::spawn(follower.run(stop.clone()));
        let (following, token) = (live.clone(), stop.clone());
        tokio::spawn(async move { following.follow(token).await });
        (live, stop)
    }

    /// The holders decide what the network asks for.
    async fn ask_for(&self, minimum_micro: u64) {
        let timelock = self.contracts.timelock;
        rpc(self.anvil.url(), "anvil_setBalance", json!([timelock, "0xde0b6b3a7640000"])).await;
        rpc(self.anvil.url(), "anvil_impersonateAccount", json!([timelock])).await;
        let input = abi::setMinimumStakeCall { amount: U256::from(minimum_micro) }.abi_encode();
        let tx = json!({
            "from": timelock, "to": self.contracts.staking, "input": hex::encode_prefixed(input),
        });
        rpc(self.anvil.url(), "eth_sendTransaction", json!([tx])).await;
    }

    /// Waits until dispatchers read that the operator has so much, or nothing of it.
    async fn reach(&self, live: &Live, minimum_micro: u64, active: Option<u64>) {
        let me = Address(self.operator.address().into());
        let active_micro: BTreeMap<_, _> = active.map(|active| (me, active)).into_iter().collect();
        let expected = Stakes { minimum_micro, active_micro };
        eventually(DEADLINE, async || {
            let stakes = live.now().stakes.clone();
            if stakes == expected { Ok(()) } else { Err(stakes) }
        })
        .await;
        let is_enough = minimum_micro == 0 || active.is_some();
        assert_eq!(live.now().stakes.is_enough(&me), is_enough);
    }
}

#[tokio::test]
async fn who_has_the_minimum_is_written_where_dispatchers_read_it() {
    let world = World::new().await;
    assert_eq!(world.live().now().stakes, Stakes::default());
    let (live, stop) = world.start();
    world.reach(&live, MINIMUM, None).await;
    world.operator.stake(u128::from(MINIMUM)).await.unwrap();
    world.reach(&live, MINIMUM, Some(MINIMUM)).await;
    world.operator.unstake(1).await.unwrap();
    // Less than the minimum is not written, however many have it.
    world.reach(&live, MINIMUM, None).await;
    world.ask_for(MINIMUM - 1).await;
    world.reach(&live, MINIMUM - 1, Some(MINIMUM - 1)).await;
    stop.cancel();

    // Who starts later comes to the same.
    std::fs::remove_file(world.stakes_path()).unwrap();
    let (live, stop) = world.start();
    world.reach(&live, MINIMUM - 1, Some(MINIMUM - 1)).await;
    world.ask_for(0).await;
    world.reach(&live, 0, None).await;
    stop.cancel();
}

#[tokio::test]
async fn what_a_reorganisation_took_is_not_at_stake() {
    let world = World::new().await;
    world.operator.stake(u128::from(MINIMUM)).await.unwrap();
    // What fails in the middle is tried again.
    for method in ["eth_getLogs", "eth_call"] {
        world.proxy.lose_answer_to(method);
        let (live, stop) = world.start();
        eventually(DEADLINE, async || world.proxy.has_lost()).await;
        world.reach(&live, MINIMUM, Some(MINIMUM)).await;
        stop.cancel();
        std::fs::remove_file(world.stakes_path()).unwrap();
    }
    let (live, stop) = world.start();
    world.operator.stake(5).await.unwrap();
    world.reach(&live, MINIMUM, Some(MINIMUM + 5)).await;
    // As long a chain, and the last stake is not in it.
    rpc(world.anvil.url(), "anvil_reorg", json!([1, []])).await;
    world.reach(&live, MINIMUM, Some(MINIMUM)).await;
    stop.cancel();
}
