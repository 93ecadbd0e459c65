//! `infera ledger audit`: that every balance is the sum of its entries, over all rows.

use std::process::ExitCode;

use infera_runtime::db;
use infera_settlement::ledger;

use crate::{
    cli::{LedgerArgs, LedgerCommand},
    layout::Layout,
    say,
};

/// Exit status of books that do not balance.
const UNBALANCED: u8 = 1;

pub fn ledger(args: &LedgerArgs) -> Result<ExitCode, String> {
    let LedgerCommand::Audit { data, json } = &args.command;
    let layout = Layout::existing(&data.data)?;
    let config =
        infera_settlement::Config::load(Some(&layout.config("settlement"))).map_err(|e| e.to_string())?;
    let (url, schema) = (config.common.database_url.expose(), config.common.database_schema.as_deref());
    // The rows themselves, not what a service says of them: it need not run.
    let audit = crate::block_on(async {
        let db = db::connect(url, schema).await.map_err(|e| e.to_string())?;
        ledger::audit(&db).await.map_err(|e| format!("the books cannot be read: {e}"))
    })??;
    if *json {
        say(serde_json::to_string_pretty(&audit).map_err(|e| e.to_string())?);
    } else {
        print(&audit);
    }
    Ok(if audit.ok { ExitCode::SUCCESS } else { ExitCode::from(UNBALANCED) })
}

fn print(audit: &ledger::Audit) {
    let check = |name: &str, wrong: i64, what: &str| match wrong {
        0 => say(format_args!("  ok       {name}")),
        _ => say(format_args!("  FAILED   {name}: {wrong} {what}")),
    };
    check("all entries sum to zero", audit.sum_micro, "micro-INFER too many");
    check("the entries of every transfer sum to zero", audit.unbalanced, "transfers do not");
    check("every balance is the sum of its entries", audit.mismatched, "accounts are not");
    check("no consumer's or operator's balance is below zero", audit.negative, "are");
    check("what is held is what open requests hold", audit.holds_difference_micro, "micro-INFER differ");
    check("what is held of escrows is too", audit.escrow_holds_difference_micro, "micro-INFER differ");
    check("every wallet's escrow is what the chain has", audit.escrow_mismatched, "wallets' are not");
    check("every wallet's charges are its requests'", audit.charges_mismatched, "wallets' are not");
    check("nobody is charged more than was used and signed", audit.overcharged, "wallets are");
    let sums = [
        ("consumers", audit.consumers_micro),
        ("held", audit.held_micro),
        ("operators", audit.operators_micro),
        ("reserve", audit.reserve_micro),
        ("issuance", audit.issuance_micro),
        ("escrow", audit.escrow_micro),
        ("escrow held", audit.escrow_held_micro),
        ("escrow debt", audit.escrow_debt_micro),
        ("deposits", audit.deposits_micro),
    ];
    for (name, micro) in sums {
        say(format_args!("  {name:12} {micro:>24} micro-INFER"));
    }
    say(format_args!(
        "{} transfers with {} entries: the books {}",
        audit.transfers,
        audit.entries,
        if audit.ok { "balance" } else { "do NOT balance" }
    ));
}
