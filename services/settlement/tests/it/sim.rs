//! A chain in memory that obeys the rules of a real one: blocks, a pool with nonces and replacements, the settlement
//! contract's checks, reorganisations. Faults are events, so that a schedule of them can be played by its seed.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use infera_protocol::hash::keccak;
use infera_settlement::chain::{
    B256, Batch, Call, ChainError, Fees, Link, Port, PostedBatch, Rewards, SignedTx, TxStatus,
    port::{Finality, MIN_BUMP_PERCENT},
};

use crate::schedules::{Event, World};

/// Seconds between blocks.
const BLOCK_SECS: u64 = 2;
const CHALLENGE_SECS: u64 = 30;
const FUNDED: u128 = 1_000_000_000;

#[derive(Debug, Clone)]
struct Tx {
    hash: B256,
    nonce: u64,
    fees: Fees,
    /// `None`: somebody used the settler's key for something else.
    call: Option<Call>,
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
}

#[derive(Debug, Clone)]
struct Block {
    /// Each with whether it succeeded.
    txs: Vec<(Tx, bool)>,
    after: State,
}

#[derive(Debug)]
struct Sim {
    /// The first one is the genesis.
    blocks: Vec<Block>,
    pool: Vec<Tx>,
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
        let genesis = Block { txs: Vec::new(), after: State::default() };
        let sim = Sim {
            blocks: vec![genesis; 20],
            pool: Vec::new(),
            signed: HashMap::new(),
            base_fee: 10,
            down: false,
            answers_lost: false,
            fresh: 0,
        };
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
        while let Some(at) =
            self.pool.iter().position(|tx| tx.nonce == after.nonce && tx.fees.max >= self.base_fee)
        {
            let tx = self.pool.remove(at);
            after.nonce += 1;
            let mut tried = after.clone();
            let ok = tx.call.is_none_or(|call| tried.apply(&call, number, tx.hash).is_ok());
            if ok {
                after = tried;
            }
            txs.push((tx, ok));
        }
        self.pool.retain(|tx| tx.nonce >= after.nonce);
        self.blocks.push(Block { txs, after });
    }

    /// Takes `depth` blocks away, and puts as many others in their place; their transactions wait again, or are lost.
    fn reorg(&mut self, depth: usize, lose: bool) {
        let keep = self.blocks.len().saturating_sub(depth).max(1);
        let gone: Vec<Block> = self.blocks.split_off(keep);
        for _ in &gone {
            let after = self.state().clone();
            self.blocks.push(Block { txs: Vec::new(), after });
        }
        if !lose {
            for (tx, _) in gone.into_iter().flat_map(|block| block.txs) {
                let _ = self.send(tx);
            }
        }
    }
}

impl State {
    fn apply(&mut self, call: &Call, number: u64, hash: B256) -> Result<(), String> {
        match call {
            Call::Post(batch) => self.post(batch, number, hash),
            Call::Queue { batch, total } => self.queue(batch, *total, number),
            Call::PostAndQueue { batch, total } => {
                self.post(batch, number, hash)?;
                self.queue(batch, *total, number)
            }
        }
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
        if batch.hash() != self.head || batch.sequence <= last || total < last_total || total > FUNDED {
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

    async fn sign(&self, call: &Call, nonce: u64, fees: Fees) -> Result<SignedTx, ChainError> {
        self.call(|sim| {
            // What an estimate would find.
            let number = sim.number() + 1;
            sim.state()
                .clone()
                .apply(call, number, B256::ZERO)
                .map_err(|reason| ChainError::Reverted { what: "estimate", reason })?;
            let text = format!("{call:?} {nonce} {fees:?}");
            let hash = B256::from(keccak(&[text.as_bytes()]).0);
            sim.signed.insert(hash, Tx { hash, nonce, fees, call: Some(*call) });
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
            let queued = &sim.state().queued;
            let (last_sequence, last_total, last_queued_secs) = queued.last().copied().unwrap_or_default();
            Ok(Rewards {
                last_id: queued.len() as u64,
                last_sequence,
                last_total,
                last_queued_secs,
                funded: FUNDED,
                challenge_delay_secs: CHALLENGE_SECS,
                full_until_secs: 0,
                now_secs: sim.number() * BLOCK_SECS,
            })
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
                sim.pool.push(Tx { hash, nonce, fees, call: None });
            }
            Event::Down(down) => sim.down = down,
            Event::LoseAnswers(lost) => sim.answers_lost = lost,
            Event::BaseFee(gwei) => sim.base_fee = u128::from(gwei) * 10,
        }
    }
}
