//! `infera operator`: what a node's operator earned, from the books and the chain together, and its stake.

use std::{path::PathBuf, process::ExitCode};

use infera_protocol::bytes::Address;
use infera_settlement::{
    chain::{operator::Operator, port::Rewards, reader::RewardRoot},
    operators::{Earned, Reward, Standing},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    cli::{OperatorCommand, OperatorWho},
    client::{UpFile, get, infer},
    contracts::{Place, secret},
    layout::Layout,
    say,
};

/// 10^-6 INFER in an INFER.
const MICRO: u128 = 1_000_000;

pub fn operator(command: &OperatorCommand) -> Result<ExitCode, String> {
    crate::block_on(async {
        match command {
            OperatorCommand::Earnings { who, json } => earnings(who, *json).await,
            OperatorCommand::Claim { who } => claim(who).await,
            OperatorCommand::Stake { who, amount, faucet } => stake(who, amount, *faucet).await,
            OperatorCommand::Slash { who, evidence } => crate::slash::slash(who, evidence).await,
            OperatorCommand::Unstake { who, amount } => unstake(who, amount.as_deref()).await,
        }
        .map(|()| ExitCode::SUCCESS)
    })?
}

/// An operator at its network.
pub(crate) struct Session {
    pub(crate) chain: Operator,
    pub(crate) place: Place,
    settlement: Option<String>,
    /// The data folder.
    folder: PathBuf,
}

impl Session {
    pub(crate) async fn open(who: &OperatorWho) -> Result<Self, String> {
        let folder = &who.data.data;
        let place = Place::find(folder, who.contracts.as_deref(), who.rpc.as_deref())?;
        let layout = Layout::existing(folder).ok();
        let settlement =
            who.settlement.as_ref().map(|url| url.trim_end_matches('/').to_owned()).or_else(|| {
                layout.as_ref().and_then(|layout| UpFile::read(layout).ok()).map(|up| up.settlement_url)
            });
        let key = secret("the operator's key", &key_path(who), "name it with --key or --node")?;
        let chain = place.connect(&key).await?;
        Ok(Self { chain, place, settlement, folder: folder.clone() })
    }

    fn address(&self) -> Address {
        Address(self.chain.address().into())
    }

    async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        let base = self
            .settlement
            .as_ref()
            .ok_or("no network runs on the data folder: name a gateway with --settlement http://HOST:PORT")?;
        let json = get(&format!("{base}/v1/operators/{}{path}", self.address()), &[]).await?;
        serde_json::from_value(json)
            .map_err(|e| format!("the settlement service answers something else: {e}"))
    }

    /// The operator's leaf in the newest root that pays; `None` if none does or the operator is not in it.
    async fn matured(&self) -> Result<Option<(RewardRoot, Reward)>, String> {
        let reader = self.chain.reader();
        let id = reader.claimable_id().await.map_err(|e| e.to_string())?;
        let root = reader.reward_root(id).await.map_err(|e| e.to_string())?;
        if id == 0 {
            return Ok(None);
        }
        let earned: Earned = self.ask("").await?;
        if earned.earned_micro == 0 {
            return Ok(None);
        }
        let Ok(reward) = self.ask::<Reward>(&format!("/rewards/{}", root.sequence)).await else {
            return Ok(None);
        };
        if reward.root.0 != root.root.0 {
            return Err(format!(
                "the settlement service proves root {}, the chain has {} in batch {}: do not trust it",
                reward.root, root.root, root.sequence
            ));
        }
        Ok(Some((root, reward)))
    }

    /// On a devnet: money for gas, where there is none.
    pub(crate) async fn gas(&self) -> Result<(), String> {
        if self.place.gas(&self.chain).await? {
            say("the devnet gave money for gas");
        }
        Ok(())
    }
}

fn key_path(who: &OperatorWho) -> PathBuf {
    match (&who.key, who.node) {
        (Some(key), _) => key.clone(),
        (None, Some(node)) => who.data.data.join("nodes").join(node.to_string()).join("operator.key"),
        (None, None) => PathBuf::from(".infera-node/operator.key"),
    }
}

/// INFER with up to six decimals, as 10^-6 INFER.
pub(crate) fn amount(text: &str) -> Result<u128, String> {
    let wrong =
        || format!("the amount `{text}` is none: write INFER with up to six decimals, as 1000 or 0.25");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || part.len() > 6 || !digits(whole) || !digits(part) || text.ends_with('.') {
        return Err(wrong());
    }
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let part: u128 = format!("{part:0<6}").parse().map_err(|_| wrong())?;
    whole
        .checked_mul(MICRO)
        .and_then(|micro| micro.checked_add(part))
        .filter(|micro| *micro > 0 && *micro <= u128::from(u64::MAX))
        .ok_or_else(wrong)
}

pub(crate) fn shown(micro: u128) -> String {
    infer(u64::try_from(micro).unwrap_or(u64::MAX))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    operator: Address,
    #[serde(flatten)]
    standing: Standing,
    #[serde(flatten)]
    books: Books,
}

#[derive(Serialize)]
struct Books {
    earned_micro: u64,
    unpaid_total: u64,
    unpaid: Vec<infera_settlement::operators::NotPaid>,
}

async fn earnings(who: &OperatorWho, json: bool) -> Result<(), String> {
    let session = Session::open(who).await?;
    let earned: Earned = session.ask("").await?;
    let matured = session.matured().await?.map_or(0, |(_, reward)| reward.cumulative_micro);
    let reader = session.chain.reader();
    let claimed = reader.claimed(session.chain.address()).await.map_err(|e| e.to_string())?;
    let standing = Standing::of(&earned, matured, u64::try_from(claimed).unwrap_or(u64::MAX));
    if json {
        let Earned { operator, earned_micro, unpaid_total, unpaid, .. } = earned;
        let books = Books { earned_micro, unpaid_total, unpaid };
        say(serde_json::to_string_pretty(&Report { operator, standing, books }).map_err(|e| e.to_string())?);
        return Ok(());
    }
    let queue = reader.rewards().await.map_err(|e| e.to_string())?;
    print(&earned, &standing, &queue);
    Ok(())
}

fn print(earned: &Earned, standing: &Standing, queue: &Rewards) {
    say(format_args!("operator   {}", earned.operator));
    let rows = [
        ("pending", standing.pending_micro, "verified, its batch is not final on the chain yet"),
        ("verified", standing.verified_micro, "final on the chain, its reward root does not pay yet"),
        ("claimable", standing.claimable_micro, "infera operator claim brings it"),
        ("paid", standing.paid_micro, "was claimed"),
    ];
    for (name, micro, why) in rows {
        say(format_args!("{name:10} {:>26}  {why}", infer(micro)));
    }
    say(format_args!("earned     {:>26}  in all", infer(earned.earned_micro)));
    if standing.verified_micro > 0 && queue.last_id > 0 {
        let matures = queue.last_queued_secs.saturating_add(queue.challenge_delay_secs);
        let left = matures.saturating_sub(queue.now_secs);
        say(format_args!("the newest reward root pays in {left} s of the chain's time"));
    }
    for one in &earned.unpaid {
        say(format_args!("not paid   {}  node {}: {}", one.request, one.node, one.sentence()));
    }
    let more = earned.unpaid_total.saturating_sub(earned.unpaid.len() as u64);
    if more > 0 {
        say(format_args!("and {more} more that were not paid"));
    }
}

async fn claim(who: &OperatorWho) -> Result<(), String> {
    let session = Session::open(who).await?;
    let me = session.chain.address();
    let claimed = session.chain.reader().claimed(me).await.map_err(|e| e.to_string())?;
    let Some((root, reward)) = session.matured().await? else {
        say("nothing can be claimed yet: see `infera operator earnings`");
        return Ok(());
    };
    let cumulative = u128::from(reward.cumulative_micro);
    if cumulative <= claimed {
        say(format_args!("nothing new can be claimed: {} was paid already", shown(claimed)));
        return Ok(());
    }
    session.gas().await?;
    let proof = reward.proof.iter().map(|hash| hash.0.into()).collect();
    let tx = session.chain.claim(root.id, me, cumulative, proof).await.map_err(|e| e.to_string())?;
    say(format_args!("claimed {} by reward root {}, transaction {tx}", shown(cumulative - claimed), root.id));
    Ok(())
}

async fn stake(who: &OperatorWho, text: &str, faucet: bool) -> Result<(), String> {
    let amount = amount(text)?;
    let session = Session::open(who).await?;
    let me = session.chain.address();
    session.gas().await?;
    let has = session.chain.tokens(me).await.map_err(|e| e.to_string())?;
    if has < amount {
        if !faucet {
            return Err(format!(
                "{me} has {}, {} are to be staked; on a devnet --faucet takes what is missing from its treasury",
                shown(has),
                shown(amount)
            ));
        }
        treasury_gives(&session, amount - has).await?;
    }
    let tx = session.chain.stake(amount).await.map_err(|e| e.to_string())?;
    say(format_args!("staked {}, transaction {tx}", shown(amount)));
    say_stake(&session).await
}

async fn treasury_gives(session: &Session, missing: u128) -> Result<(), String> {
    session.place.treasury_gives(&session.folder, session.chain.address(), missing).await?;
    say(format_args!("the devnet's treasury gave {}", shown(missing)));
    Ok(())
}

async fn unstake(who: &OperatorWho, text: Option<&str>) -> Result<(), String> {
    let amount = text.map(amount).transpose()?;
    let session = Session::open(who).await?;
    session.gas().await?;
    match amount {
        Some(amount) => {
            let tx = session.chain.unstake(amount).await.map_err(|e| e.to_string())?;
            say(format_args!("{} is on its way out, transaction {tx}", shown(amount)));
        }
        None => {
            let tx = session.chain.withdraw().await.map_err(|e| e.to_string())?;
            say(format_args!("took out what had come out, transaction {tx}"));
        }
    }
    say_stake(&session).await
}

async fn say_stake(session: &Session) -> Result<(), String> {
    let stake = session.chain.staked(session.chain.address()).await.map_err(|e| e.to_string())?;
    let now = session.chain.reader().time().await.map_err(|e| e.to_string())?;
    say(format_args!(
        "staked {}; who works for the network needs {} at least",
        shown(stake.active),
        shown(stake.minimum)
    ));
    if stake.unbonding > 0 {
        let left = stake.withdrawable_secs.saturating_sub(now);
        say(format_args!(
            "on its way out {}: `infera operator unstake` without an amount takes it in {left} s",
            shown(stake.unbonding)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_infer_with_six_decimals() {
        for (text, micro) in
            [("1", 1_000_000), ("0.25", 250_000), ("1000.000001", 1_000_000_001), ("007", 7_000_000)]
        {
            assert_eq!(amount(text).unwrap(), micro, "{text}");
        }
        for text in ["", ".5", "1.", "1.0000001", "-1", "1e3", "0", "0.0", "1 000", "99999999999999999999999"]
        {
            let error = amount(text).unwrap_err();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }
}
