//! `infera operator slash`: evidence against an operator goes to the chain.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use infera_protocol::{bytes::Address, identity::Domain, slashing::Contradiction};

use crate::{
    cli::OperatorWho,
    operator::{Session, shown},
    say,
};

/// Most bytes of evidence: it has some 2,000.
const MOST_BYTES: u64 = 65_536;

/// Reports the evidence in a file, `-` for standard input.
pub async fn slash(who: &OperatorWho, file: &Path) -> Result<(), String> {
    let failed = |e: io::Error| format!("cannot read {}: {e}", file.display());
    let mut text = Vec::new();
    let source: Box<dyn Read> = match file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(fs::File::open(file).map_err(failed)?),
    };
    source.take(MOST_BYTES).read_to_end(&mut text).map_err(failed)?;
    let evidence: Contradiction = serde_json::from_slice(&text)
        .map_err(|e| format!("{} is no evidence of a contradiction: {e}", file.display()))?;
    let session = Session::open(who).await?;
    let contract = Address(session.place.contracts.settlement.into());
    let domain = Domain { chain_id: session.place.contracts.chain_id, contract };
    evidence.operator(&domain).map_err(|e| format!("{} proves nothing: {e}", file.display()))?;
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
