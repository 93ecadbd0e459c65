//! What must hold between batches on the chain and the receipts behind them. Pure: no network, no clock.

use std::collections::{BTreeMap, HashMap};

use alloy::primitives::B256;
use infera_protocol::{
    bytes::{Address, Hash32},
    document::{Check, Outcome},
    identity::Domain,
    merkle::MerkleTree,
    receipt::Receipt,
};
use infera_settlement::{chain::PostedBatch, domain::reward_root};
use uuid::Uuid;

/// Goes over consecutive batches.
#[derive(Debug)]
pub struct Auditor {
    domain: Domain,
    /// The batch after which it begins; zero for none.
    previous_hash: B256,
    /// What every operator had earned by then, then by each batch.
    earned: BTreeMap<Address, u64>,
    /// Request ids and the batch that they were seen in.
    seen: HashMap<Uuid, u64>,
}

impl Auditor {
    /// Begins after the batch with `previous_hash`, when operators had `earned` this much in all.
    pub fn new(domain: Domain, previous_hash: B256, earned: BTreeMap<Address, u64>) -> Self {
        Self { domain, previous_hash, earned, seen: HashMap::new() }
    }

    /// The next batch and the receipts that are said to be in it.
    pub fn batch(&mut self, posted: &PostedBatch, receipts: &[Receipt]) -> Vec<Check> {
        let batch = &posted.batch;
        let mut checks = Vec::new();
        let mut push = |name, result: Result<(), String>| {
            checks.push(Check { name, outcome: result.map_or_else(Outcome::Failed, |()| Outcome::Passed) });
        };
        push("hash chain", self.chain(posted));
        push("network", self.network(receipts));
        push("request ids", self.ids(batch.sequence, receipts));
        push(
            "count",
            same(receipts.len() as u64 == batch.count, || {
                format!("{} receipts are given, the chain says {}", receipts.len(), batch.count)
            }),
        );
        push("receipts root", root(receipts, batch.receipts_root));
        push("total", total(receipts, batch.total));
        push("payments", payments(receipts));
        push("reward root", self.rewards(receipts, batch.reward_root));
        checks
    }

    fn chain(&mut self, posted: &PostedBatch) -> Result<(), String> {
        let (batch, before) = (&posted.batch, self.previous_hash);
        let hash = batch.hash();
        self.previous_hash = hash;
        same(batch.previous_hash == before, || {
            format!("it names {} as the batch before, which hashes to {before}", batch.previous_hash)
        })?;
        same(hash == posted.batch_hash, || {
            format!("the chain says its hash is {}, it hashes to {hash}", posted.batch_hash)
        })
    }

    fn network(&self, receipts: &[Receipt]) -> Result<(), String> {
        let stranger = receipts.iter().find(|receipt| {
            receipt.chain_id != self.domain.chain_id || receipt.contract != self.domain.contract
        });
        stranger.map_or(Ok(()), |receipt| Err(format!("receipt {} is of another network", receipt.id)))
    }

    fn ids(&mut self, sequence: u64, receipts: &[Receipt]) -> Result<(), String> {
        let mut twice = None;
        for receipt in receipts {
            if let Some(before) = self.seen.insert(receipt.id, sequence) {
                twice.get_or_insert((receipt.id, before));
            }
        }
        twice.map_or(Ok(()), |(id, before)| Err(format!("request {id} stands in batch {before} already")))
    }

    fn rewards(&mut self, receipts: &[Receipt], wanted: B256) -> Result<(), String> {
        for payment in receipts.iter().flat_map(|receipt| &receipt.payments) {
            let sum = self.earned.entry(payment.operator).or_default();
            *sum = sum
                .checked_add(payment.amount_micro)
                .ok_or_else(|| format!("the rewards of {} overflow", payment.operator))?;
        }
        let leaves: Vec<(Address, u64)> = self.earned.iter().map(|(of, sum)| (*of, *sum)).collect();
        let root = reward_root(&leaves);
        same(root.0 == wanted.0, || {
            format!("the receipts' payments lead to {root}, the chain's batch commits to {wanted}")
        })
    }
}

fn root(receipts: &[Receipt], wanted: B256) -> Result<(), String> {
    let leaves: Vec<Hash32> = receipts.iter().map(Receipt::leaf).collect();
    let root = MerkleTree::new(&leaves).map_or(Hash32::ZERO, |tree| tree.root());
    same(root.0 == wanted.0, || format!("the receipts lead to {root}, the chain has {wanted}"))
}

fn total(receipts: &[Receipt], wanted: u128) -> Result<(), String> {
    let sum: u128 = receipts.iter().map(|receipt| u128::from(receipt.charged_micro)).sum();
    same(sum == wanted, || format!("the receipts charge {sum} micro-INFER together, the chain says {wanted}"))
}

/// What was charged is what was paid: by each receipt.
fn payments(receipts: &[Receipt]) -> Result<(), String> {
    for receipt in receipts {
        let paid: u128 = receipt.payments.iter().map(|payment| u128::from(payment.amount_micro)).sum();
        same(paid == u128::from(receipt.charged_micro), || {
            format!("receipt {} charges {} and pays {paid} micro-INFER", receipt.id, receipt.charged_micro)
        })?;
    }
    Ok(())
}

fn same(holds: bool, reason: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(reason()) }
}

#[cfg(test)]
mod tests {
    use infera_settlement::chain::Batch;
    use infera_testkit::evidence;

    use super::*;

    /// Three batches of two receipts, as an honest settler posts them.
    struct Honest {
        domain: Domain,
        batches: Vec<(PostedBatch, Vec<Receipt>)>,
    }

    impl Honest {
        fn new() -> Self {
            let network = evidence::Network::new();
            let base = evidence::Case::new(&network).receipt();
            let mut earned = BTreeMap::<Address, u64>::new();
            let mut batches = Vec::new();
            let mut previous_hash = B256::ZERO;
            for sequence in 1..=3_u64 {
                let receipts: Vec<Receipt> = (0..2)
                    .map(|n| Receipt { id: Uuid::from_u128(u128::from(sequence) << 8 | n), ..base.clone() })
                    .collect();
                for payment in receipts.iter().flat_map(|receipt| &receipt.payments) {
                    *earned.entry(payment.operator).or_default() += payment.amount_micro;
                }
                let leaves: Vec<_> = receipts.iter().map(Receipt::leaf).collect();
                let sums: Vec<_> = earned.iter().map(|(of, sum)| (*of, *sum)).collect();
                let batch = Batch {
                    sequence,
                    previous_hash,
                    receipts_root: MerkleTree::new(&leaves).unwrap().root().0.into(),
                    count: 2,
                    reward_root: reward_root(&sums).0.into(),
                    total: receipts.iter().map(|receipt| u128::from(receipt.charged_micro)).sum(),
                };
                previous_hash = batch.hash();
                let posted =
                    PostedBatch { batch, batch_hash: previous_hash, block: sequence, tx: B256::ZERO };
                batches.push((posted, receipts));
            }
            Self { domain: network.manifest.domain, batches }
        }

        /// The names of the checks that fail, with the batch.
        fn failures(&self) -> Vec<(u64, &'static str)> {
            let mut auditor = Auditor::new(self.domain, B256::ZERO, BTreeMap::new());
            let mut failures = Vec::new();
            for (posted, receipts) in &self.batches {
                let checks = auditor.batch(posted, receipts);
                let failed = checks.into_iter().filter(|check| matches!(check.outcome, Outcome::Failed(_)));
                failures.extend(failed.map(|check| (posted.batch.sequence, check.name)));
            }
            failures
        }

        /// Writes a batch anew, and those after it, as a settler that posts what is wrong.
        fn repost(&mut self) {
            let mut before = B256::ZERO;
            for (posted, _) in &mut self.batches {
                posted.batch.previous_hash = before;
                before = posted.batch.hash();
                posted.batch_hash = before;
            }
        }
    }

    #[test]
    fn an_honest_history_holds_from_any_batch_on() {
        let honest = Honest::new();
        assert_eq!(honest.failures(), []);
        let (first, receipts) = &honest.batches[0];
        let mut earned = BTreeMap::new();
        for payment in receipts.iter().flat_map(|receipt| &receipt.payments) {
            *earned.entry(payment.operator).or_default() += payment.amount_micro;
        }
        let mut auditor = Auditor::new(honest.domain, first.batch_hash, earned);
        let (second, receipts) = &honest.batches[1];
        assert!(auditor.batch(second, receipts).iter().all(|check| check.outcome == Outcome::Passed));
    }

    #[test]
    fn a_tampered_receipt_is_found() {
        type Change = fn(&mut Receipt);
        let changes: [(Change, &[&str]); 4] = [
            (|r| r.output_tokens += 1, &["receipts root"]),
            (|r| r.charged_micro += 1, &["receipts root", "total", "payments"]),
            (|r| r.contract.0[0] ^= 1, &["network", "receipts root"]),
            (|r| r.payments[0].amount_micro += 1, &["receipts root", "payments", "reward root"]),
        ];
        for (change, names) in changes {
            let mut forged = Honest::new();
            change(&mut forged.batches[1].1[0]);
            let of_second: Vec<_> = forged
                .failures()
                .into_iter()
                .filter(|(batch, _)| *batch == 2)
                .map(|(_, name)| name)
                .collect();
            assert_eq!(of_second, names);
        }
    }

    #[test]
    fn a_repeated_request_is_found_even_if_all_roots_hold() {
        let mut forged = Honest::new();
        let before = forged.batches[0].1[1].id;
        forged.batches[2].1[0].id = before;
        let leaves: Vec<_> = forged.batches[2].1.iter().map(Receipt::leaf).collect();
        forged.batches[2].0.batch.receipts_root = MerkleTree::new(&leaves).unwrap().root().0.into();
        forged.repost();
        assert_eq!(forged.failures(), [(3, "request ids")]);
    }

    #[test]
    fn a_missing_receipt_is_found() {
        let mut forged = Honest::new();
        forged.batches[0].1.pop();
        let names: Vec<_> = forged.failures().into_iter().filter(|(batch, _)| *batch == 1).collect();
        assert_eq!(names, [(1, "count"), (1, "receipts root"), (1, "total"), (1, "reward root")]);
        let mut empty = Honest::new();
        empty.batches[2].1.clear();
        assert!(empty.failures().contains(&(3, "count")));
    }

    #[test]
    fn a_wrong_reward_is_found() {
        let mut forged = Honest::new();
        let sums = [(Address([9; 20]), 1_000_000)];
        forged.batches[1].0.batch.reward_root = reward_root(&sums).0.into();
        forged.repost();
        assert_eq!(forged.failures(), [(2, "reward root")]);
    }

    #[test]
    fn a_broken_chain_is_found() {
        let mut forged = Honest::new();
        forged.batches.remove(1);
        assert!(forged.failures().contains(&(3, "hash chain")));
        let mut forged = Honest::new();
        forged.batches[2].0.batch_hash = B256::repeat_byte(1);
        assert_eq!(forged.failures(), [(3, "hash chain")]);
    }
}
