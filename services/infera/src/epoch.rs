//! `infera verify --batches`: whole batches recomputed from public data and an RPC alone.
//!
//! The chain says what was posted; settlement's public routes give the receipts behind it, and nothing of them is
//! believed: leaves, roots, sums and rewards are recomputed and compared with the chain ([`audit`]).

mod audit;

use std::{collections::BTreeMap, process::ExitCode};

use alloy::primitives::{Address, B256};
use infera_protocol::{
    document::{Check, Document, Outcome, Status, check},
    receipt::Receipt,
    registry::{History, Manifest},
};
use infera_settlement::{
    batches_http::{ReceiptPage, RewardLeaves},
    chain::{ChainReader, PostedBatch},
    domain::reward_root,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{
    cli::VerifyArgs,
    client::{UpFile, get, infer},
    layout::Layout,
    say,
};
use audit::Auditor;

/// Exit status of a batch that fails a check.
const FAILED: u8 = 1;

/// Batches to check, both ends included; no end: to the chain's newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    first: u64,
    last: Option<u64>,
}

impl std::str::FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no range of batches: write 1..20, 5.. or 7");
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| *n > 0).ok_or_else(wrong);
        let range = match text.split_once("..") {
            None => Self { first: number(text)?, last: Some(number(text)?) },
            Some((first, "")) => Self { first: number(first)?, last: None },
            Some((first, last)) => Self { first: number(first)?, last: Some(number(last)?) },
        };
        if range.last.is_some_and(|last| last < range.first) {
            return Err(wrong());
        }
        Ok(range)
    }
}

/// What was found about a batch.
#[derive(Serialize)]
struct Found {
    batch: u64,
    receipts: u64,
    total_micro: u128,
    checks: Vec<Check>,
}

impl Found {
    fn failed(&self) -> bool {
        self.checks.iter().any(|check| matches!(check.outcome, Outcome::Failed(_)))
    }
}

/// Where everything comes from.
struct Sources<'a> {
    reader: ChainReader,
    settlement: String,
    manifest: &'a Manifest,
    registries: &'a History,
}

/// Exit status 0: every batch holds; 1: one does not.
///
/// # Errors
/// What cannot be reached, or batches that are not there.
pub fn verify(
    args: &VerifyArgs,
    range: Range,
    manifest: &Manifest,
    registries: &History,
) -> Result<ExitCode, String> {
    crate::block_on(async {
        let sources = Sources::open(args, manifest, registries).await?;
        let head = sources.reader.head().await.map_err(|e| e.to_string())?.sequence;
        let last = range.last.unwrap_or(head);
        if last > head || range.first > head {
            return Err(format!("the chain's newest batch is {head}: name batches from 1 to {head}"));
        }
        let mut from_block = args.from_block;
        let mut auditor = sources.auditor(range.first, &mut from_block).await?;
        let mut all = Vec::new();
        for sequence in range.first..=last {
            let found = sources.batch(&mut auditor, sequence, &mut from_block).await?;
            if !args.json {
                print(&found);
            }
            all.push(found);
        }
        summary(&all, args.json)
    })?
}

impl<'a> Sources<'a> {
    async fn open(
        args: &VerifyArgs,
        manifest: &'a Manifest,
        registries: &'a History,
    ) -> Result<Self, String> {
        let settlement = match &args.settlement {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                let up = Layout::existing(&args.data.data).and_then(|layout| UpFile::read(&layout));
                up.map_err(|e| format!("{e}; or name a gateway with --settlement http://HOST:PORT"))?
                    .settlement_url
            }
        };
        let rpc = args.rpc.as_deref().unwrap_or(&manifest.rpc_url);
        let reader = ChainReader::connect(rpc, Address::from(manifest.domain.contract.0))
            .await
            .map_err(|e| format!("{e}; name another endpoint with --rpc"))?;
        if reader.chain_id() != manifest.domain.chain_id {
            return Err(format!(
                "{rpc} is chain {}, the manifest names chain {}",
                reader.chain_id(),
                manifest.domain.chain_id
            ));
        }
        Ok(Self { reader, settlement, manifest, registries })
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        let json = get(&format!("{}/v1/batches/{path}", self.settlement), &[])
            .await
            .map_err(|e| format!("settlement does not give batch {path}: {e}"))?;
        serde_json::from_value(json).map_err(|e| format!("settlement answers something else for {path}: {e}"))
    }

    async fn posted(&self, sequence: u64, from_block: &mut u64) -> Result<PostedBatch, String> {
        let posted = self.reader.posted(sequence, *from_block).await.map_err(|e| e.to_string())?;
        let posted = posted.ok_or_else(|| {
            format!("the chain's log has no batch {sequence} from block {from_block} on: see --from-block")
        })?;
        *from_block = posted.block;
        Ok(posted)
    }

    /// Begins at `first`: what operators had earned before comes from settlement and must lead to the reward root of the
    /// batch before on the chain.
    async fn auditor(&self, first: u64, from_block: &mut u64) -> Result<Auditor, String> {
        let domain = self.manifest.domain;
        if first == 1 {
            return Ok(Auditor::new(domain, B256::ZERO, BTreeMap::new()));
        }
        let before = self.posted(first - 1, from_block).await?;
        let leaves: RewardLeaves = self.ask(&format!("{}/rewards", first - 1)).await?;
        let earned: BTreeMap<_, _> =
            leaves.rewards.iter().map(|leaf| (leaf.operator, leaf.cumulative_micro)).collect();
        let sums: Vec<_> = earned.iter().map(|(of, sum)| (*of, *sum)).collect();
        if reward_root(&sums).0 != before.batch.reward_root.0 {
            return Err(format!(
                "the rewards that settlement gives for batch {} are not those on the chain: begin with 1..",
                first - 1
            ));
        }
        Ok(Auditor::new(domain, before.batch.hash(), earned))
    }

    async fn batch(
        &self,
        auditor: &mut Auditor,
        sequence: u64,
        from_block: &mut u64,
    ) -> Result<Found, String> {
        let posted = self.posted(sequence, from_block).await?;
        let receipts = self.receipts(sequence, posted.batch.count).await?;
        let mut checks = vec![self.stands(&posted).await?];
        checks.extend(auditor.batch(&posted, &receipts));
        checks.push(self.rules(&receipts)?);
        Ok(Found {
            batch: sequence,
            receipts: receipts.len() as u64,
            total_micro: posted.batch.total,
            checks,
        })
    }

    /// The log's root is the one that the contract keeps and proves receipts by.
    async fn stands(&self, posted: &PostedBatch) -> Result<Check, String> {
        let sequence = posted.batch.sequence;
        let kept = self.reader.batch(sequence).await.map_err(|e| e.to_string())?;
        let outcome = if kept == Some(posted.batch.receipts_root) {
            Outcome::Passed
        } else {
            Outcome::Failed(format!(
                "the log has the root {}, the contract {kept:?}",
                posted.batch.receipts_root
            ))
        };
        Ok(Check { name: "posted", outcome })
    }

    /// All receipts of a batch; stops when there are more than the chain says.
    async fn receipts(&self, sequence: u64, count: u64) -> Result<Vec<Receipt>, String> {
        let mut all = Vec::new();
        let mut from = 0;
        loop {
            let page: ReceiptPage = self.ask(&format!("{sequence}/receipts?from={from}")).await?;
            all.extend(page.receipts);
            match page.next {
                Some(next) if next > from && all.len() as u64 <= count => from = next,
                _ => return Ok(all),
            }
        }
    }

    /// Every receipt by its own rules, as `infera verify` checks one: quorum, payments, price, calibration, draw.
    fn rules(&self, receipts: &[Receipt]) -> Result<Check, String> {
        let mut outcome = Outcome::Passed;
        for receipt in receipts {
            let document =
                Document { receipt: receipt.clone(), status: Status::Pending, anchor: None, evidence: None };
            let bytes = document.canonical().map_err(|e| e.to_string())?;
            let report = check(&bytes, self.manifest, self.registries);
            let failed = report.checks.iter().find_map(|check| match &check.outcome {
                Outcome::Failed(reason) => Some(format!("receipt {}: {}: {reason}", receipt.id, check.name)),
                _ => None,
            });
            if let Some(reason) = failed {
                outcome = Outcome::Failed(reason);
                break;
            }
        }
        Ok(Check { name: "receipts", outcome })
    }
}

fn print(found: &Found) {
    let Found { batch, receipts, total_micro, checks } = found;
    let total = infer(u64::try_from(*total_micro).unwrap_or(u64::MAX));
    if !found.failed() {
        say(format_args!("  ok       batch {batch}: {receipts} receipts, {total}"));
    }
    for check in checks {
        if let Outcome::Failed(reason) = &check.outcome {
            say(format_args!("  FAILED   batch {batch}, {}: {reason}", check.name));
        }
    }
}

fn summary(all: &[Found], json: bool) -> Result<ExitCode, String> {
    let failed = all.iter().filter(|found| found.failed()).count();
    if json {
        say(serde_json::to_string_pretty(all).map_err(|e| e.to_string())?);
    } else {
        let receipts: u64 = all.iter().map(|found| found.receipts).sum();
        let verdict = match failed {
            0 => "every one holds: leaves, roots, hash chain, ids, sums and rewards".to_owned(),
            _ => format!("{failed} do NOT hold"),
        };
        say(format_args!("{} batches with {receipts} receipts recomputed: {verdict}", all.len()));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_strictly() {
        let range = |first, last| Ok(Range { first, last });
        assert_eq!("1..20".parse(), range(1, Some(20)));
        assert_eq!("5..".parse(), range(5, None));
        assert_eq!("7".parse(), range(7, Some(7)));
        for text in ["", "..", "0..3", "3..2", "a..b", "-1", "1..2..3"] {
            let error = text.parse::<Range>().unwrap_err();
            assert!(error.contains("1..20"), "{error}");
        }
    }
}
