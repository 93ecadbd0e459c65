//! A chain in memory that obeys the rules of a real one: blocks, a pool with nonces and replacements, the settlement
//! contract's checks, reorganisations. Faults are events, so that a schedule of them can be played by its seed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

use infera_protocol::{bytes::Address as Account, hash::keccak, voucher::Voucher};
use infera_settlement::chain::{
    Address, B256, Batch, BlockRef, Call, ChainError, Charge, Escrow, Fees, Link, Port, PostedBatch, Rewards,
    SignedTx, TxStatus,
    port::{Finality, MIN_BUMP_PERCENT},
};

use crate::{
    network::Network,
    schedules::{Event, World},
    wallets::{self, Deed},
};

/// Seconds between blocks.
const BLOCK_SECS: u64 = 2;
const CHALLENGE_SECS: u64 = 30;
const WITHDRAWAL_SECS: u64 = 20;
const FUNDED: u128 = 1_000_000_000;

#[derive(Debug, Clone)]
struct Tx {
    hash: B256,
    nonce: u64,
    fees: Fees,
    /// `None`: somebody used the settler's key for something else.
    calls: Option<Vec<Call>>,
}

/// What the contract and the settler's account hold after a block.
#[derive(Debug, Clone, Default)]
struct State {
    nonce: u64,
    sequence: u64,
    head: B256,
    posted: BTreeMap<u64, PostedBatch>,
    /// (sequence, total, when) of each queued root.
    queued: Vec<(u64, u128, u64)>,
    accounts: BTreeMap<Address, Escrow>,
    /// Charged into the pool.
    charged: u128,
    /// Whose money the block changed.
    touched: BTreeSet<Address>,
}

#[derive(Debug, Clone)]
struct Block {
    /// Each with whether it succeeded.
    txs: Vec<(Tx, bool)>,
    deeds: Vec<(Address, Deed)>,
    hash: B256,
    after: State,
}

#[derive(Debug)]
struct Sim {
    /// The first one is the genesis.
    blocks: Vec<Block>,
    pool: Vec<Tx>,
    /// What consumers sent.
    deeds: Vec<(Address, Deed)>,
    /// Every transaction that was ever signed: its bytes are its hash.
    signed: HashMap<B256, Tx>,
    base_fee: u128,
    down: bool,
    answers_lost: bool,
    fresh: u64,
}

/// Shared by the settler's connections and the test.
#[derive(Debug, Clone)]
pub struct SimWorld(Arc<Mutex<Sim>>);

impl SimWorld {
    pub fn new() -> Self {
        let mut sim = Sim {
            blocks: Vec::new(),
            pool: Vec::new(),
            deeds: Vec::new(),
            signed: HashMap::new(),
            base_fee: 10,
            down: false,
            answers_lost: false,
            fresh: 0,
        };
        (0..20).for_each(|_| sim.push(Vec::new(), Vec::new(), State::default()));
        Self(Arc::new(Mutex::new(sim)))
    }

    /// A call of the settler: other tasks run first, and the chain may be away.
    async fn call<T>(&self, of: impl FnOnce(&mut Sim) -> Result<T, ChainError>) -> Result<T, ChainError> {
        tokio::task::yield_now().await;
        let answer = {
            let mut sim = self.0.lock().unwrap();
            if sim.down {
                return Err(ChainError::Unreachable("planned outage".into()));
            }
            let answer = of(&mut sim);
            if sim.answers_lost {
                Err(ChainError::Unreachable("planned loss of the answer".into()))
            } else {
                answer
            }
        };
        tokio::task::yield_now().await;
        answer
    }
}

impl Sim {
    fn state(&self) -> &State {
        &self.blocks.last().unwrap().after
    }

    /// Every block has a hash of its own, also one in the place of another.
    fn push(&mut self, txs: Vec<(Tx, bool)>, deeds: Vec<(Address, Deed)>, after: State) {
        self.fresh += 1;
        let hash = B256::from(keccak(&[b"block", &self.fresh.to_be_bytes()]).0);
        self.blocks.push(Block { txs, deeds, hash, after });
    }

    fn number(&self) -> u64 {
        self.blocks.len() as u64 - 1
    }

    fn send(&mut self, tx: Tx) -> Result<(), ChainError> {
        if self.pool.iter().any(|known| known.hash == tx.hash) {
            return Ok(());
        }
        if tx.nonce < self.state().nonce {
            return Err(ChainError::Refused { what: "send", message: "nonce too low".into() });
        }
        if let Some(at) = self.pool.iter().position(|known| known.nonce == tx.nonce) {
            let least = self.pool[at].fees.raised(MIN_BUMP_PERCENT);
            if tx.fees.max < least.max || tx.fees.priority < least.priority {
                return Err(ChainError::Underpriced("replacement transaction underpriced".into()));
            }
            self.pool.remove(at);
        }
        self.pool.push(tx);
        Ok(())
    }

    fn mine(&mut self) {
        let (number, mut after) = (self.number() + 1, self.state().clone());
        let mut txs = Vec::new();
        after.touched.clear();
        let deeds = std::mem::take(&mut self.deeds);
        // Some of them come before the settler's transactions, some after.
        let first = if number % 2 == 0 { deeds.len() } else { 0 };
        deeds[..first].iter().for_each(|(of, deed)| after.deed(*of, *deed, number));
        while let Some(at) =
            self.pool.iter().position(|tx| tx.nonce == after.nonce && tx.fees.max >= self.base_fee)
        {
            let tx = self.pool.remove(at);
            after.nonce += 1;
            let mut tried = after.clone();
            let ok = tx.calls.as_ref().is_none_or(|calls| tried.apply(calls, number, tx.hash).is_ok());
            if ok {
                after = tried;
            }
            txs.push((tx, ok));
        }
        self.pool.retain(|tx| tx.nonce >= after.nonce);
        deeds[first..].iter().for_each(|(of, deed)| after.deed(*of, *deed, number));
        self.push(txs, deeds, after);
    }

    /// Takes `depth` blocks away, and puts as many others in their place; their transactions wait again, or are lost.
    fn reorg(&mut self, depth: usize, lose: bool) {
        let keep = self.blocks.len().saturating_sub(depth).max(1);
        let gone: Vec<Block> = self.blocks.split_off(keep);
        for _ in &gone {
            let after = State { touched: BTreeSet::new(), ..self.state().clone() };
            self.push(Vec::new(), Vec::new(), after);
        }
        if !lose {
            for block in gone {
                self.deeds.extend(block.deeds);
                for (tx, _) in block.txs {
                    let _ = self.send(tx);
                }
            }
        }
    }
}

impl State {
    /// All or none: the caller throws away what failed.
    fn apply(&mut self, calls: &[Call], number: u64, hash: B256) -> Result<(), String> {
        calls.iter().try_for_each(|call| match call {
            Call::Post(batch) => self.post(batch, number, hash),
            Call::Charge { sequence, charges } if *sequence == self.sequence && *sequence > 0 => {
                charges.iter().try_for_each(|charge| self.charge(charge))
            }
            Call::Charge { sequence, .. } => Err(format!("charges for batch {sequence}")),
            Call::Queue { batch, total } => self.queue(batch, *total, number),
        })
    }

    fn charge(&mut self, charge: &Charge) -> Result<(), String> {
        let of = self.accounts.entry(charge.account).or_default();
        if charge.cumulative <= of.charged {
            return Ok(());
        }
        if let Some((cumulative, signature)) = charge.voucher.filter(|(voucher, _)| *voucher > of.authorized)
            && charge.cumulative > of.authorized
        {
            let account = Account(charge.account.into());
            let voucher = Voucher { account, cumulative_micro: u64::try_from(cumulative).unwrap() };
            let domain = Network::offline().manifest.domain;
            voucher.check(&domain, &signature).map_err(|error| error.to_string())?;
            of.authorized = cumulative;
        }
        if charge.cumulative > of.authorized {
            return Err(format!("{charge:?} is beyond the voucher {}", of.authorized));
        }
        let amount = (charge.cumulative - of.charged).min(of.escrow);
        (of.escrow, of.charged) = (of.escrow - amount, of.charged + amount);
        self.charged += amount;
        self.touched.insert(charge.account);
        Ok(())
    }

    /// What fails changes nothing, as a transaction of its own.
    fn deed(&mut self, account: Address, deed: Deed, number: u64) {
        let now = number * BLOCK_SECS;
        let of = self.accounts.entry(account).or_default();
        match deed {
            Deed::Deposit(amount) => of.escrow += u128::from(amount),
            Deed::Request(amount) if amount > 0 && u128::from(amount) <= of.escrow => {
                (of.withdrawal, of.withdrawable_secs) = (amount.into(), now + WITHDRAWAL_SECS);
            }
            Deed::Cancel if of.withdrawal > 0 => (of.withdrawal, of.withdrawable_secs) = (0, 0),
            Deed::Withdraw if of.withdrawal > 0 && now >= of.withdrawable_secs => {
                of.escrow -= of.withdrawal.min(of.escrow);
                (of.withdrawal, of.withdrawable_secs) = (0, 0);
            }
            Deed::Request(_) | Deed::Cancel | Deed::Withdraw => return,
        }
        self.touched.insert(account);
    }

    fn post(&mut self, batch: &Batch, block: u64, tx: B256) -> Result<(), String> {
        if batch.sequence != self.sequence + 1 || batch.previous_hash != self.head || batch.count == 0 {
            return Err(format!("sequence {} given, {} expected", batch.sequence, self.sequence + 1));
        }
        (self.sequence, self.head) = (batch.sequence, batch.hash());
        self.posted.insert(batch.sequence, PostedBatch { batch: *batch, batch_hash: self.head, block, tx });
        Ok(())
    }

    fn queue(&mut self, batch: &Batch, total: u128, number: u64) -> Result<(), String> {
        let (last, last_total, _) = self.queued.last().copied().unwrap_or_default();
        if batch.hash() != self.head
            || batch.sequence <= last
            || total < last_total
            || total > FUNDED + self.charged
        {
            return Err("the rewards are not queued".into());
        }
        self.queued.push((batch.sequence, total, number * BLOCK_SECS));
        Ok(())
    }
}

impl Link for SimWorld {
    type Port = Self;

    async fn connect(&self) -> Result<Self, ChainError> {
        self.call(|_| Ok(self.clone())).await
    }
}

impl Port for SimWorld {
    async fn head(&self) -> Result<infera_settlement::chain::Head, ChainError> {
        self.call(|sim| {
            let State { sequence, head, .. } = *sim.state();
            Ok(infera_settlement::chain::Head { sequence, hash: head })
        })
        .await
    }

    async fn batch_root(&self, sequence: u64) -> Result<Option<B256>, ChainError> {
        self.call(|sim| Ok(sim.state().posted.get(&sequence).map(|posted| posted.batch.receipts_root))).await
    }

    async fn next_nonce(&self) -> Result<u64, ChainError> {
        self.call(|sim| Ok(sim.state().nonce)).await
    }

    async fn fees(&self) -> Result<Fees, ChainError> {
        self.call(|sim| Ok(Fees { max: 2 * sim.base_fee, priority: 1 })).await
    }

    async fn sign(&self, calls: &[Call], nonce: u64, fees: Fees) -> Result<SignedTx, ChainError> {
        self.call(|sim| {
            // What an estimate would find.
            let number = sim.number() + 1;
            sim.state()
                .clone()
                .apply(calls, number, B256::ZERO)
                .map_err(|reason| ChainError::Reverted { what: "estimate", reason })?;
            let text = format!("{calls:?} {nonce} {fees:?}");
            let hash = B256::from(keccak(&[text.as_bytes()]).0);
            sim.signed.insert(hash, Tx { hash, nonce, fees, calls: Some(calls.to_vec()) });
            Ok(SignedTx { hash, nonce, fees, raw: hash.to_vec() })
        })
        .await
    }

    async fn send_raw(&self, raw: &[u8]) -> Result<(), ChainError> {
        self.call(|sim| {
            let tx = sim.signed[&B256::from_slice(raw)].clone();
            sim.send(tx)
        })
        .await
    }

    async fn status(&self, hash: B256) -> Result<TxStatus, ChainError> {
        self.call(|sim| {
            let newest = sim.number();
            for (block, number) in sim.blocks.iter().zip(0_u64..) {
                if let Some((_, ok)) = block.txs.iter().find(|(tx, _)| tx.hash == hash) {
                    return Ok(if *ok {
                        TxStatus::Included { block: number, depth: newest + 1 - number, gas_used: 21_000 }
                    } else {
                        TxStatus::Failed { block: number }
                    });
                }
            }
            Ok(TxStatus::Unknown)
        })
        .await
    }

    async fn posted(&self, sequence: u64, _from_block: u64) -> Result<Option<PostedBatch>, ChainError> {
        self.call(|sim| Ok(sim.state().posted.get(&sequence).copied())).await
    }

    async fn final_block(&self, _finality: Finality, confirmations: u64) -> Result<u64, ChainError> {
        self.call(|sim| Ok((sim.number() + 1).saturating_sub(confirmations))).await
    }

    async fn rewards(&self) -> Result<Rewards, ChainError> {
        self.call(|sim| {
            let (queued, charged) = (&sim.state().queued, sim.state().charged);
            let (last_sequence, last_total, last_queued_secs) = queued.last().copied().unwrap_or_default();
            Ok(Rewards {
                last_id: queued.len() as u64,
                last_sequence,
                last_total,
                last_queued_secs,
                funded: FUNDED + charged,
                challenge_delay_secs: CHALLENGE_SECS,
                full_until_secs: 0,
                now_secs: sim.number() * BLOCK_SECS,
            })
        })
        .await
    }

    async fn withdrawal_delay(&self) -> Result<u64, ChainError> {
        // A schedule takes seconds by the wall's clock, whatever its blocks say.
        self.call(|_| Ok(86_400)).await
    }

    async fn newest(&self) -> Result<BlockRef, ChainError> {
        self.call(|sim| Ok(BlockRef { number: sim.number(), hash: sim.blocks.last().unwrap().hash })).await
    }

    async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError> {
        self.call(|sim| Ok(sim.blocks.get(usize::try_from(number).unwrap()).map(|block| block.hash))).await
    }

    async fn touched(&self, from: u64, to: u64) -> Result<BTreeSet<Address>, ChainError> {
        self.call(|sim| {
            let blocks = sim.blocks.iter().zip(0_u64..).filter(|(_, number)| (from..=to).contains(number));
            Ok(blocks.flat_map(|(block, _)| block.after.touched.iter().copied()).collect())
        })
        .await
    }

    async fn escrow(&self, account: Address, block: u64) -> Result<Escrow, ChainError> {
        self.call(|sim| {
            let block = sim.blocks.get(usize::try_from(block).unwrap());
            let gone = || ChainError::Refused { what: "account", message: "there is no such block".into() };
            Ok(block.ok_or_else(gone)?.after.accounts.get(&account).copied().unwrap_or_default())
        })
        .await
    }
}

impl World for SimWorld {
    type Link = Self;

    fn link(&self) -> Self {
        self.clone()
    }

    async fn event(&self, event: Event) {
        let mut sim = self.0.lock().unwrap();
        match event {
            Event::Mine(blocks) => (0..blocks).for_each(|_| sim.mine()),
            Event::Reorg { depth, lose } => sim.reorg(usize::try_from(depth).unwrap(), lose),
            Event::DropPool => sim.pool.clear(),
            Event::Foreign => {
                sim.fresh += 1;
                let nonce = sim.state().nonce;
                let hash = B256::from(keccak(&[b"foreign", &sim.fresh.to_be_bytes()]).0);
                let fees = Fees { max: 1_000 * sim.base_fee, priority: 1_000 };
                sim.pool.retain(|tx| tx.nonce != nonce);
                sim.pool.push(Tx { hash, nonce, fees, calls: None });
            }
            Event::Deed { wallet, deed } => {
                let of = Address::from(wallets::address(wallet).0);
                sim.deeds.push((of, deed));
            }
            Event::Down(down) => sim.down = down,
            Event::LoseAnswers(lost) => sim.answers_lost = lost,
            Event::BaseFee(gwei) => sim.base_fee = u128::from(gwei) * 10,
        }
    }
}
