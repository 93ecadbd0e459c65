//! Receipts to leaves, leaves to a tree, a proof for each: on the thread that asks.

use infera_protocol::{bytes::Hash32, merkle::MerkleTree, merkle::root_of, receipt::Receipt};
use infera_testkit::evidence::{Case, Network};
use uuid::Uuid;

use crate::{Args, Report, per_second, timed};

/// The goal, receipts per second on one core.
const GOAL: f64 = 20_000.0;

/// `count` receipts as three replicas would bring, each of a request of its own.
pub fn some(count: u32) -> Vec<Receipt> {
    let network = Network::new();
    let first = Case::new(&network).receipt();
    (0..count)
        .map(|n| {
            let id = Uuid::from_u128((0x7000_u128 << 64) | (0x8_u128 << 60) | u128::from(n));
            Receipt { id, epoch: n.into(), ..first.clone() }
        })
        .collect()
}

pub fn run(args: &Args, report: &mut Report) -> Result<(), String> {
    let receipts = some(args.receipts);
    let (mut all, mut hashing, mut checking) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let (leaves, hash_secs) = timed(|| receipts.iter().map(Receipt::leaf).collect::<Vec<_>>());
        let (proved, prove_secs) = timed(|| {
            let tree = MerkleTree::new(&leaves)?;
            let proofs: Option<Vec<Vec<Hash32>>> = (0..leaves.len()).map(|n| tree.proof(n)).collect();
            Some((tree.root(), proofs?))
        });
        let (root, proofs) = proved.ok_or("no receipts")?;
        let (right, check_secs) =
            timed(|| leaves.iter().zip(&proofs).all(|(leaf, proof)| root_of(leaf, proof) == root));
        if !right {
            return Err("a proof does not lead to the root".into());
        }
        all.push(hash_secs + prove_secs);
        hashing.push(hash_secs);
        checking.push(check_secs);
    }
    report.add("receipts_per_s", "receipts/s", per_second(args.receipts, all), Some(GOAL));
    report.add("receipts_hashed_per_s", "receipts/s", per_second(args.receipts, hashing), None);
    report.add("proofs_checked_per_s", "proofs/s", per_second(args.receipts, checking), None);
    Ok(())
}
