//! `infera holds`: money that is held for requests whose verdict was lost.

use std::process::ExitCode;

use infera_runtime::db;
use infera_settlement::holds;

use crate::{
    cli::{HoldsArgs, HoldsCommand},
    client::infer,
    layout::Layout,
    say,
};

/// Holds that are listed at most.
const MOST: u64 = 1_000;

pub fn holds(args: &HoldsArgs) -> Result<ExitCode, String> {
    let (HoldsCommand::List { data } | HoldsCommand::Release { data, .. }) = &args.command;
    let layout = Layout::existing(&data.data)?;
    let config =
        infera_settlement::Config::load(Some(&layout.config("settlement"))).map_err(|e| e.to_string())?;
    let (url, schema) = (config.common.database_url.expose(), config.common.database_schema.as_deref());
    let grace_secs = config.holds.grace_secs;
    crate::block_on(async {
        let db = db::connect(url, schema).await.map_err(|e| e.to_string())?;
        match &args.command {
            HoldsCommand::List { .. } => {
                let rows = holds::overdue(&db, grace_secs, MOST).await.map_err(|e| e.to_string())?;
                for row in &rows {
                    let held = infer(u64::try_from(row.held_micro).unwrap_or(0));
                    say(format_args!("{}  {}  {held}  deadline_ms {}", row.id, row.account, row.deadline_ms));
                }
                if rows.is_empty() {
                    say("no overdue holds");
                }
            }
            HoldsCommand::Release { request, .. } => {
                let released = holds::release(&db, *request, grace_secs).await.map_err(|e| e.to_string())?;
                say(format_args!("released {} of {request}", infer(released)));
            }
        }
        Ok(ExitCode::SUCCESS)
    })?
}
