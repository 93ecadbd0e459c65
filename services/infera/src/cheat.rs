//! `infera operator slash`: evidence against an operator goes to the chain. And, for demonstrations on a devnet only, an
//! operator that signs two answers for one slot, so that there is something to report.

use std::{fs, path::Path};

use infera_protocol::{
    bytes::{Address, Hash32, NodeId},
    commitment::Slot,
    identity::{Domain, NodeBinding, evm_address},
    typed,
};
use infera_runtime::clock;
use infera_settlement::chain::{
    parse_key,
    slash::{AccusedCommitment, AccusedSlot, Contradiction, SignedBinding},
};

use crate::{
    cli::OperatorWho,
    operator::{DEVNET, Session, shown},
    say,
};

/// How long the binding of a demonstration counts, ms.
const BINDING_MS: i64 = 24 * 3_600_000;

/// Reports the evidence in a file.
pub async fn slash(who: &OperatorWho, file: &Path) -> Result<(), String> {
    let text = fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    let evidence: Contradiction = serde_json::from_slice(&text)
        .map_err(|e| format!("{} is no evidence of a contradiction: {e}", file.display()))?;
    let session = Session::open(who).await?;
    session.gas().await?;
    let slashed = session.chain.slash(&evidence).await.map_err(|e| e.to_string())?;
    say(format_args!(
        "{} lost {}; {} of it for the report, the rest was burned, transaction {}",
        slashed.operator,
        shown(slashed.amount_micro),
        shown(slashed.reward_micro),
        slashed.tx
    ));
    Ok(())
}

/// Signs two different commitments for one slot with the operator's key and prints them as evidence.
pub async fn cheat(who: &OperatorWho) -> Result<(), String> {
    let session = Session::open(who).await?;
    if session.contracts.chain_id != DEVNET {
        return Err("this costs half of the stake: it is for demonstrations on a devnet".to_owned());
    }
    let operator = parse_key("operator key", &session.key).map_err(|e| e.to_string())?;
    let domain = Domain {
        chain_id: session.contracts.chain_id,
        contract: Address(session.contracts.settlement.into()),
    };
    let word = rand::random::<[u8; 32]>;
    // A node's signer; zero or a number beyond the curve's order does not come up.
    let signer = parse_key("signer", &Hash32(word()).to_string()).map_err(|e| e.to_string())?;
    let slot = AccusedSlot { request_hash: Hash32(word()), attempt: 1, node: NodeId(word()) };
    let binding = NodeBinding {
        node: slot.node,
        signer: evm_address(signer.credential()),
        expiry_ms: clock::now_ms() + BINDING_MS,
    };
    let signature = binding.sign(&domain, operator.credential()).map_err(|e| e.to_string())?;
    let bound = SignedBinding { binding, signature };
    let commit = |commitment: Hash32| -> Result<AccusedCommitment, String> {
        let digest = typed::slot_commitment_digest(&domain, &Slot::from(slot), &commitment);
        let signature = typed::sign(&digest, signer.credential()).map_err(|e| e.to_string())?;
        Ok(AccusedCommitment { commitment, signature, bound })
    };
    let evidence = Contradiction::TwoCommitments {
        slot,
        first: commit(Hash32(word()))?,
        second: commit(Hash32(word()))?,
    };
    say(serde_json::to_string_pretty(&evidence).map_err(|e| e.to_string())?);
    Ok(())
}
