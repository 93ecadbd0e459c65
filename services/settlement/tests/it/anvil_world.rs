//! The schedules of [`crate::schedules`] on a real anvil: its blocks, its pool, its contract, behind a proxy.

use alloy::{primitives::U256, sol_types::SolCall};
use infera_protocol::{bytes::Address, identity::Domain};
use infera_runtime::{config::Secret, db};
use infera_settlement::{
    chain::{Contracts, client::RpcLink, operator::Operator},
    store::Migrator,
};
use infera_testkit::{TempDir, anvil::Anvil, sqlite_url};
use serde_json::{Value, json};

use crate::{
    chain::{DEPLOYER, SETTLER, SETTLER_ADDRESS},
    network::Network,
    proxy::{Mode, Proxy},
    schedules::{self, Event, Outcome, Terms, World},
    wallets::{self, Deed, WALLETS},
};

const CHAIN: u64 = 31_337;
/// What each wallet is given.
const TOKENS: u128 = 1_000_000_000;

mod abi {
    alloy::sol! {
        function approve(address spender, uint256 value);
        function deposit(address consumer, uint256 amount);
        function requestWithdrawal(uint256 amount);
        function cancelWithdrawal();
        function withdraw();
    }
}

/// One call of a method that only a devnet has.
pub async fn rpc(url: &str, method: &str, params: Value) -> Value {
    let answer = try_rpc(url, method, params).await;
    assert!(answer.get("error").is_none(), "{method}: {answer}");
    answer["result"].clone()
}

pub async fn try_rpc(url: &str, method: &str, params: Value) -> Value {
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
    reqwest::Client::new().post(url).json(&call).send().await.unwrap().json().await.unwrap()
}

/// An anvil that makes blocks only when it is told to, and keeps enough of them for a reorganisation.
pub struct Chain {
    pub anvil: Anvil,
    pub proxy: Proxy,
    pub contracts: Contracts,
}

impl Chain {
    pub async fn start() -> Self {
        // The value of `--prune-history`, which is the last argument before these: states that are kept.
        let anvil = Anvil::start_with(&["64"]).await;
        let contracts = crate::chain::contracts(anvil.url()).await;
        rpc(anvil.url(), "evm_setAutomine", json!([false])).await;
        rpc(anvil.url(), "anvil_mine", json!(["0x14"])).await;
        let proxy = Proxy::start(anvil.url()).await;
        Self { anvil, proxy, contracts }
    }

    pub fn url(&self) -> &str {
        self.anvil.url()
    }

    /// A network whose chain this is, seen through the proxy.
    pub fn network(&self) -> Network {
        let contract = Address(self.contracts.settlement.into());
        Network::new(Domain { chain_id: CHAIN, contract }, &self.proxy.url)
    }

    pub async fn mine(&self, blocks: u64) {
        rpc(self.url(), "anvil_mine", json!([format!("{blocks:#x}")])).await;
    }

    /// Gives both wallets tokens, and the contract leave to take them.
    pub async fn give_tokens(&self) {
        rpc(self.url(), "evm_setAutomine", json!([true])).await;
        let treasury = Operator::connect(self.url(), DEPLOYER, self.contracts).await.unwrap();
        for wallet in 0..WALLETS.len() {
            treasury.transfer(wallets::address(wallet).0.into(), TOKENS).await.unwrap();
            let spender = self.contracts.settlement;
            let approve = abi::approveCall { spender, value: U256::from(TOKENS) }.abi_encode();
            self.send(wallet, self.contracts.token, approve).await;
        }
        rpc(self.url(), "evm_setAutomine", json!([false])).await;
    }

    /// Sends a consumer's transaction; it waits for a block, and what fails there changes nothing.
    pub async fn deed(&self, wallet: usize, deed: Deed) {
        let consumer = wallets::address(wallet).0.into();
        let input = match deed {
            Deed::Deposit(amount) => abi::depositCall { consumer, amount: U256::from(amount) }.abi_encode(),
            Deed::Request(amount) => abi::requestWithdrawalCall { amount: U256::from(amount) }.abi_encode(),
            Deed::Cancel => abi::cancelWithdrawalCall {}.abi_encode(),
            Deed::Withdraw => abi::withdrawCall {}.abi_encode(),
        };
        self.send(wallet, self.contracts.settlement, input).await;
    }

    async fn send(&self, wallet: usize, to: alloy::primitives::Address, input: Vec<u8>) {
        let tx = json!({
            "from": wallets::address(wallet), "to": to, "input": alloy::hex::encode_prefixed(input),
            "gas": "0x30d40", "maxFeePerGas": "0x2540be40000", "maxPriorityFeePerGas": "0x2540be4000",
        });
        rpc(self.url(), "eth_sendTransaction", json!([tx])).await;
    }

    /// Replaces the newest blocks by empty ones. What was in them is forgotten.
    pub async fn reorg(&self, depth: u64) {
        rpc(self.url(), "anvil_reorg", json!([depth, []])).await;
    }
}

impl World for &Chain {
    type Link = RpcLink;

    fn link(&self) -> RpcLink {
        RpcLink {
            rpc_url: self.proxy.url.clone(),
            settler_key: Secret::new(SETTLER),
            contract: self.contracts.settlement,
            chain_id: CHAIN,
        }
    }

    async fn event(&self, event: Event) {
        match event {
            Event::Mine(blocks) => self.mine(blocks).await,
            // anvil never puts the transactions of replaced blocks back into its pool.
            Event::Reorg { depth, .. } => self.reorg(depth).await,
            Event::DropPool => {
                rpc(self.url(), "anvil_dropAllTransactions", json!([])).await;
            }
            Event::Foreign => {
                let nonce =
                    rpc(self.url(), "eth_getTransactionCount", json!([SETTLER_ADDRESS, "latest"])).await;
                let tx = json!({
                    "from": SETTLER_ADDRESS, "to": SETTLER_ADDRESS, "value": "0x0", "nonce": nonce,
                    "gas": "0x5208", "maxFeePerGas": "0x2540be40000", "maxPriorityFeePerGas": "0x2540be4000",
                });
                // Refused where the same one waits already.
                try_rpc(self.url(), "eth_sendTransaction", json!([tx])).await;
            }
            Event::Deed { wallet, deed } => self.deed(wallet, deed).await,
            Event::Down(true) => self.proxy.set(Mode::Refuse),
            Event::LoseAnswers(true) => self.proxy.set(Mode::LoseAnswers),
            Event::Down(false) | Event::LoseAnswers(false) => self.proxy.set(Mode::Pass),
            Event::BaseFee(gwei) => {
                let wei = format!("{:#x}", u128::from(gwei) * 1_000_000_000);
                rpc(self.url(), "anvil_setNextBlockBaseFeePerGas", json!([wei])).await;
            }
        }
    }
}

/// Plays the schedules with these seeds, each on contracts of its own.
async fn play_on_anvil(seeds: impl Iterator<Item = u64>) -> Outcome {
    let mut sum = Outcome::default();
    for seed in seeds {
        schedules::eprintln_line(&format!("schedule {seed} on anvil"));
        let dir = TempDir::new().unwrap();
        let db = db::connect(&sqlite_url(&dir), None).await.unwrap();
        db::migrate::<Migrator>(&db).await.unwrap();
        let chain = Chain::start().await;
        chain.give_tokens().await;
        let outcome = Box::pin(schedules::play(db, chain.network(), &chain, Terms::of(seed))).await;
        sum.settled += outcome.settled;
        sum.batches += outcome.batches;
        sum.taken_back += outcome.taken_back;
        sum.escrow_micro += outcome.escrow_micro;
        sum.short += outcome.short;
    }
    sum
}

#[tokio::test]
async fn random_faults_lose_nothing_on_anvil() {
    let outcome = play_on_anvil(1..=8).await;
    schedules::eprintln_line(&format!("{outcome:?}"));
    assert!(outcome.settled >= 8 && outcome.batches >= 8 && outcome.escrow_micro > 0, "{outcome:?}");
}

/// `make soak`: INFERA_SOAK_ANVIL schedules from INFERA_SOAK_SEED on.
#[tokio::test]
#[ignore = "long: make soak"]
async fn soak_schedules_on_anvil() {
    let first = schedules::setting("INFERA_SOAK_SEED", 1);
    let count = schedules::setting("INFERA_SOAK_ANVIL", 100);
    let outcome = play_on_anvil(first..first + count).await;
    schedules::eprintln_line(&format!("{count} schedules on anvil from {first}: {outcome:?}"));
}
