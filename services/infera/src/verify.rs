//! `infera verify`: every field of a receipt recomputed, its root compared with the chain's.

use std::{fs, io::Read, path::Path, process::ExitCode};

use alloy::primitives::{Address, B256};
use infera_protocol::{
    assignment::{beta, draw, eligible_root, of_class, operators},
    document::{Check, MAX_DOCUMENT_BYTES, Outcome, Report, check},
    registry::Manifest,
};
use infera_runtime::network::{self, NetworkError};
use infera_settlement::chain::ChainReader;

use crate::{cli::VerifyArgs, say};

/// Exit status of a document in which nothing is wrong, but which does not show everything: it has no
/// evidence, or its receipt is not on the chain yet.
const PARTLY: u8 = 3;
/// Exit status of a receipt that fails a check.
const FAILED: u8 = 1;
/// Exit status where a check could not be made: no manifest, no chain.
const UNKNOWN: u8 = 2;

/// Exit status 0: every check holds; 1: a check failed; 2: it could not be checked; 3: nothing is wrong, but
/// not everything could be checked.
pub fn verify(args: &VerifyArgs) -> Result<ExitCode, String> {
    Ok(checked(args).unwrap_or_else(|message| {
        eprintln!("infera: {message}");
        ExitCode::from(UNKNOWN)
    }))
}

fn checked(args: &VerifyArgs) -> Result<ExitCode, String> {
    let manifest_path = args.manifest.clone().unwrap_or_else(|| args.data.data.join("network.json"));
    let registry_path = args.registry.clone().unwrap_or_else(|| manifest_path.with_file_name("models.json"));
    let manifest = network::manifest(&manifest_path)
        .map_err(|error| format!("{error}; name it with --manifest, or the data folder with --data"))?;
    let registries = match network::registries(&registry_path) {
        Ok(registries) => registries,
        // It is there, and says what nobody should believe.
        Err(error @ NetworkError::History { .. }) => {
            let outcome = Outcome::Failed(error.to_string());
            print_checks(&[Check { name: "registry", outcome }], args.json)?;
            return Ok(ExitCode::from(FAILED));
        }
        Err(error) => {
            return Err(format!("{error}; name it with --registry, or the data folder with --data"));
        }
    };
    if let Some(range) = args.batches {
        return crate::epoch::verify(args, range, &manifest, &registries);
    }
    let path = args.receipt.as_deref().ok_or("name a receipt document, or batches with --batches")?;
    let bytes = read_document(path)?;
    let mut report = check(&bytes, &manifest, &registries);
    let rpc = args.rpc.as_deref().unwrap_or(&manifest.rpc_url);
    let chain = crate::block_on(on_chain(&report, &manifest, rpc))?;
    let unreachable = match chain {
        Ok(Some(outcome)) => {
            report.checks.push(Check { name: "chain", outcome });
            None
        }
        Ok(None) => None,
        Err(message) => {
            let outcome = Outcome::NotChecked(message.clone());
            report.checks.push(Check { name: "chain", outcome });
            Some(message)
        }
    };
    print(&report, args.json)?;
    if args.allocation {
        allocation(&report);
    }
    if let (Some(message), false) = (unreachable, report.failed()) {
        return Err(message);
    }
    Ok(if report.failed() {
        ExitCode::from(FAILED)
    } else if report.complete() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(PARTLY)
    })
}

fn read_document(path: &Path) -> Result<Vec<u8>, String> {
    let limit = MAX_DOCUMENT_BYTES as u64 + 1;
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|e| format!("cannot read the receipt {}: {e}", path.display()))?;
    Ok(bytes)
}

/// None where the document has nothing to look up. An unreachable chain is an error of the command, not
/// of the receipt.
async fn on_chain(report: &Report, manifest: &Manifest, rpc: &str) -> Result<Option<Outcome>, String> {
    let Some(document) = &report.document else { return Ok(None) };
    let Some(anchor) = &document.anchor else { return Ok(None) };
    let contract = Address::from(manifest.domain.contract.0);
    let reader = ChainReader::connect(rpc, contract)
        .await
        .map_err(|e| format!("{e}; name another endpoint with --rpc"))?;
    if reader.chain_id() != manifest.domain.chain_id {
        return Ok(Some(Outcome::Failed(format!(
            "{rpc} is chain {}, the manifest names chain {}",
            reader.chain_id(),
            manifest.domain.chain_id
        ))));
    }
    let root = reader.batch(anchor.sequence).await.map_err(|e| e.to_string())?;
    let outcome = match root {
        Some(root) if root.0 == anchor.receipts_root.0 => {
            let leaf = B256::from(document.receipt.leaf().0);
            let proof = anchor.proof.iter().map(|hash| B256::from(hash.0)).collect();
            match reader.verify_receipt(anchor.sequence, leaf, proof).await.map_err(|e| e.to_string())? {
                true => Outcome::Passed,
                false => Outcome::Failed("the contract does not accept the proof".into()),
            }
        }
        Some(root) => Outcome::Failed(format!("batch {} has the root {root} on the chain", anchor.sequence)),
        None => Outcome::Failed(format!("batch {} is not on the chain", anchor.sequence)),
    };
    Ok(Some(outcome))
}

/// Why these nodes: everybody who could be drawn, in the order that the proof gives, and what came of it.
fn allocation(report: &Report) {
    let Some(evidence) = report.document.as_ref().and_then(|document| document.evidence.as_ref()) else {
        return say(
            "allocation: the document has no evidence, fetch it with the API key of the account that asked",
        );
    };
    let members: Vec<_> = of_class(&evidence.eligible, &evidence.class).collect();
    say(format_args!(
        "allocation: {} nodes of {} operators in class {} could be drawn in epoch {} (set {})",
        members.len(),
        operators(members.iter().copied()),
        evidence.class,
        evidence.epoch,
        eligible_root(&evidence.eligible)
    ));
    let drawn = draw(&beta(&evidence.assign_proof), members);
    for (place, (eligible, slot)) in drawn.iter().zip(&evidence.slots).enumerate() {
        let stands = if slot.outcome.is_unproven() { "unproven: the dispatcher says so" } else { "signed" };
        say(format_args!(
            "  {:>2}. {} of {}, weight {}: {} ({stands})",
            place + 1,
            eligible.node,
            eligible.operator,
            eligible.weight,
            text(&slot.outcome),
        ));
    }
    for (place, referee) in evidence.referees.iter().enumerate() {
        let (node, outcome) = (referee.node, text(&referee.outcome));
        say(format_args!("  referee {}. {node} of {}: {outcome}", place + 1, referee.operator));
    }
    let unproven = evidence.slots.iter().filter(|slot| slot.outcome.is_unproven()).count();
    say(format_args!("  {} slots, {unproven} of them unproven", evidence.slots.len()));
}

/// A name as the document writes it.
fn text(name: &impl serde::Serialize) -> String {
    serde_json::to_value(name).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

fn print_checks(checks: &[Check], json: bool) -> Result<(), String> {
    if json {
        say(serde_json::to_string_pretty(checks).map_err(|e| e.to_string())?);
        return Ok(());
    }
    for Check { name, outcome } in checks {
        match outcome {
            Outcome::Passed => say(format_args!("  ok       {name}")),
            Outcome::Failed(reason) => say(format_args!("  FAILED   {name}: {reason}")),
            Outcome::NotChecked(reason) => say(format_args!("  skipped  {name}: {reason}")),
        }
    }
    Ok(())
}

fn print(report: &Report, json: bool) -> Result<(), String> {
    print_checks(&report.checks, json)?;
    if json {
        return Ok(());
    }
    let Some(document) = &report.document else {
        say("not a receipt of this network");
        return Ok(());
    };
    let receipt = &document.receipt;
    say(if report.failed() {
        format!("receipt {} is NOT valid", receipt.id)
    } else {
        let place = document.anchor.as_ref().map_or_else(
            || "not anchored yet".to_owned(),
            |anchor| format!("anchored in batch {} on chain {}", anchor.sequence, receipt.chain_id),
        );
        format!(
            "receipt {} {}: {} of {} nodes agreed, {place}",
            receipt.id,
            if report.complete() { "holds" } else { "is only partly checked, and nothing is wrong with it" },
            receipt.verified.len(),
            receipt.k
        )
    });
    Ok(())
}
