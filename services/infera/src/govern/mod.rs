//! `infera govern`: what the token's holders decide: models, releases, calibration.

pub mod args;
mod show;

use std::{fs, path::Path, process::ExitCode};

use alloy::primitives::Address;
use infera_protocol::{bytes::Hash32, governed::ModelTerms, registry::Model};
use infera_runtime::clock;
use infera_settlement::chain::{
    governance::{Governance, GovernanceError, Proposal, ProposalId, RegistryCall, Support, Voter},
    parse_address,
};
use serde::Serialize;

use crate::{
    contracts::{Place, secret},
    operator::shown,
    say,
};
use args::{Chain, Change, GovernArgs, GovernCommand, Holder, Proposer, Vote};
use show::clean;

/// Cosine similarity is counted in millionths.
const FULL_SIMILARITY: u32 = 1_000_000;

pub fn govern(args: &GovernArgs) -> Result<ExitCode, String> {
    crate::block_on(async {
        match &args.command {
            GovernCommand::List { at } => list(at).await,
            GovernCommand::Show { at, id } => show(at, id).await,
            GovernCommand::Registry { at } => registry(at).await,
            GovernCommand::Delegate { who, to } => delegate(who, to.as_deref()).await,
            GovernCommand::Propose { change } => propose(change).await,
            GovernCommand::Vote { who, id, support } => vote(who, id, *support).await,
            GovernCommand::Queue { who, id } => queue(who, id).await,
            GovernCommand::Execute { who, id } => execute(who, id).await,
        }
        .map(|()| ExitCode::SUCCESS)
    })?
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The endpoint and the contracts that `at` names.
fn place(at: &Chain) -> Result<Place, String> {
    Place::find(&at.data.data, at.contracts.as_deref(), at.rpc.as_deref())
}

async fn reading(at: &Chain) -> Result<Governance, String> {
    let place = place(at)?;
    let governance = Governance::connect(&place.rpc, place.contracts).await.map_err(said)?;
    // A devnet's time stands still between transactions: its clock is set before it is looked at.
    if place.is_devnet() {
        governance.devnet_pass(0).await.map_err(said)?;
    }
    Ok(governance)
}

async fn list(at: &Chain) -> Result<(), String> {
    let proposals = reading(at).await?.proposals(at.from_block).await.map_err(said)?;
    if at.json {
        return show::json(&proposals.iter().map(show::Whole::of).collect::<Vec<_>>());
    }
    if proposals.is_empty() {
        say("nothing was proposed yet: `infera govern propose --help`");
    }
    proposals.iter().for_each(show::line);
    Ok(())
}

async fn show(at: &Chain, id: &str) -> Result<(), String> {
    let governance = reading(at).await?;
    let proposal = governance.proposal(id, at.from_block).await.map_err(said)?;
    if at.json {
        return show::json(&show::Whole::of(&proposal));
    }
    show::proposal(&proposal, governance.time().await.map_err(said)?);
    Ok(())
}

async fn registry(at: &Chain) -> Result<(), String> {
    let state = reading(at).await?.registry_state(None).await.map_err(said)?;
    if at.json {
        return show::json(&state);
    }
    show::registry(&state);
    Ok(())
}

/// A holder at the governor.
struct Session {
    voter: Voter,
    place: Place,
    at: Chain,
    /// The key is the devnet's treasury's, or one that was named.
    treasury: bool,
}

/// What an action prints with `--json`.
#[derive(Default, Serialize)]
struct Done {
    #[serde(skip_serializing_if = "Option::is_none")]
    proposal: Option<String>,
    transaction: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    votes_micro: Option<u128>,
}

impl Session {
    async fn open(who: &Holder) -> Result<Self, String> {
        let place = place(&who.at)?;
        let folder = &who.at.data.data;
        let treasury_key = folder.join("keys/treasury.key");
        let treasury = who.key.is_none() && who.node.is_none() && place.is_devnet() && treasury_key.exists();
        let path = match (&who.key, who.node) {
            (Some(key), _) => key.clone(),
            (None, Some(node)) => folder.join("nodes").join(node.to_string()).join("operator.key"),
            (None, None) if treasury => treasury_key,
            (None, None) => Path::new(".infera-node/operator.key").to_path_buf(),
        };
        let key = secret("the key", &path, "name it with --key or --node")?;
        place.gas(&place.connect(&key).await?).await?;
        let voter = Voter::connect(&place.rpc, &key, place.contracts).await.map_err(said)?;
        Ok(Self { voter, at: who.at.clone(), treasury, place })
    }

    fn devnet(&self) -> bool {
        self.place.is_devnet()
    }

    async fn find(&self, id: &str) -> Result<Proposal, String> {
        self.voter.governance().proposal(id, self.at.from_block).await.map_err(said)
    }

    /// On a devnet time can be made to pass. `left_secs` until `what`; elsewhere there is nothing but to come again.
    async fn wait(&self, left_secs: u64, what: &str) -> Result<bool, String> {
        if !self.devnet() || left_secs == 0 {
            return Ok(false);
        }
        self.say(format_args!("the devnet's time moves {left_secs} s on: {what}"));
        self.voter.governance().devnet_pass(left_secs).await.map_err(said)?;
        Ok(true)
    }

    /// For people only.
    fn say(&self, line: impl std::fmt::Display) {
        if !self.at.json {
            say(line);
        }
    }

    fn done(&self, line: impl std::fmt::Display, done: &Done) -> Result<(), String> {
        if self.at.json {
            return show::json(done);
        }
        say(format_args!("{line}, transaction {}", done.transaction));
        Ok(())
    }

    /// An error, with what helps on a devnet.
    fn refused(&self, error: &GovernanceError) -> String {
        match error {
            GovernanceError::NotDelegated { .. } => format!("{error}: `infera govern delegate`"),
            GovernanceError::BelowThreshold { .. } | GovernanceError::NoVotes { .. }
                if self.devnet() && !self.treasury =>
            {
                format!("{error}; on a devnet the treasury has the supply: leave out --key and --node")
            }
            _ => error.to_string(),
        }
    }
}

async fn delegate(who: &Holder, to: Option<&str>) -> Result<(), String> {
    let session = Session::open(who).await?;
    let me = session.voter.address();
    let to: Address = to.map(|to| parse_address("to", to)).transpose().map_err(said)?.unwrap_or(me);
    let tokens = session.voter.key().tokens(me).await.map_err(said)?;
    let transaction = session.voter.delegate(to).await.map_err(said)?.to_string();
    if session.devnet() {
        // Votes count from the second after.
        session.voter.governance().devnet_pass(1).await.map_err(said)?;
    }
    let line = format!("{} of {me} vote by {to} from now on", shown(tokens));
    session.done(line, &Done { transaction, votes_micro: Some(tokens), ..Done::default() })
}

async fn propose(change: &Change) -> Result<(), String> {
    let Proposer { who, title } = change.by();
    let (call, entry, said_by_itself) = {
        let governance = reading(&who.at).await?;
        planned(&governance, change).await?
    };
    let session = Session::open(who).await?;
    let title = title.clone().unwrap_or(said_by_itself);
    let proposed = session.voter.propose(&title, &call, entry.as_ref()).await;
    let (id, transaction) = proposed.map_err(|error| session.refused(&error))?;
    let done =
        Done { proposal: Some(id.to_string()), transaction: transaction.to_string(), votes_micro: None };
    session.done(format_args!("proposed \"{}\" as {id}", clean(&title)), &done)?;
    session.say(format_args!("next: infera govern vote {} for", short(id)));
    Ok(())
}

/// The call, a model's entry, and a title.
async fn planned(
    governance: &Governance,
    change: &Change,
) -> Result<(RegistryCall, Option<Model>, String), String> {
    let plain = |call, title: String| Ok((call, None, title));
    match change {
        Change::AdmitModel { file, id, price, price_cap, threshold, .. } => {
            let mut model = read_entry(file)?;
            if let Some(id) = id {
                model.id.clone_from(id);
            }
            model.price_micro = price.unwrap_or(model.price_micro);
            if let Some(text) = threshold {
                model.similarity_threshold_millionths = millionths(text)?;
            }
            if model.created_secs == 0 {
                model.created_secs = clock::now_ms() / 1_000;
            }
            let mut terms = ModelTerms::of(&model);
            terms.price_cap_micro = price_cap.unwrap_or(model.price_micro);
            let call = RegistryCall::AdmitModel { id: model.id.clone(), terms };
            let title = format!("Serve {}", model.id);
            Ok((call, Some(model), title))
        }
        Change::WithdrawModel { id, .. } => {
            plain(RegistryCall::WithdrawModel { id: id.clone() }, format!("Withdraw {id}"))
        }
        Change::SetTerms { id, price_cap, threshold, .. } => {
            let state = governance.registry_state(None).await.map_err(said)?;
            let served = state.models.iter().find(|model| model.id == *id && model.terms.active);
            let terms = served.ok_or_else(|| format!("the registry serves no model {id:?}"))?.terms;
            let similarity_threshold_millionths =
                threshold.as_deref().map_or(Ok(terms.similarity_threshold_millionths), millionths)?;
            let price_cap_micro = price_cap.unwrap_or(terms.price_cap_micro);
            let call =
                RegistryCall::SetTerms { id: id.clone(), similarity_threshold_millionths, price_cap_micro };
            plain(call, format!("Other terms for {id}"))
        }
        Change::ApproveRelease { hash, name, .. } => {
            let call = RegistryCall::ApproveRelease { release: parse_hash(hash)?, name: name.clone() };
            plain(call, format!("Approve release {name}"))
        }
        Change::WithdrawRelease { hash, .. } => {
            let release = parse_hash(hash)?;
            plain(RegistryCall::WithdrawRelease { release }, format!("Withdraw release {release}"))
        }
        Change::SetCalibration { hash, .. } => {
            let hash = parse_hash(hash)?;
            plain(RegistryCall::SetCalibration { hash }, format!("Calibration {hash}"))
        }
    }
}

fn parse_hash(text: &str) -> Result<Hash32, String> {
    text.to_ascii_lowercase()
        .parse()
        .map_err(|_| format!("the hash `{text}` is none: write 0x and 64 hex digits"))
}

fn read_entry(file: &Path) -> Result<Model, String> {
    if file.extension().is_none_or(|extension| extension != "json") {
        return crate::models::inspect(file);
    }
    let text = fs::read(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    serde_json::from_slice(&text).map_err(|e| {
        format!("{} is no registry entry as `infera models --inspect` prints it: {e}", file.display())
    })
}

/// A cosine of at most 1 with up to six decimals, in millionths.
fn millionths(text: &str) -> Result<u32, String> {
    let wrong = || {
        format!("the threshold `{text}` is none: write a cosine from 0 to 1 with up to six decimals, as 0.6")
    };
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.len() <= 6 && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(part) {
        return Err(wrong());
    }
    let whole: u32 = whole.parse().map_err(|_| wrong())?;
    let part: u32 = format!("{part:0<6}").parse().map_err(|_| wrong())?;
    let all = whole.checked_mul(FULL_SIMILARITY).and_then(|all| all.checked_add(part));
    all.filter(|all| *all <= FULL_SIMILARITY).ok_or_else(wrong)
}

async fn vote(who: &Holder, id: &str, support: Vote) -> Result<(), String> {
    let session = Session::open(who).await?;
    let mut proposal = session.find(id).await?;
    let support = match support {
        Vote::For => Support::For,
        Vote::Against => Support::Against,
        Vote::Abstain => Support::Abstain,
    };
    let mut cast = session.voter.vote(&proposal, support).await;
    if let Err(GovernanceError::NotOpen { left_secs }) = &cast
        && session.wait(*left_secs, "voting opens then").await?
    {
        proposal = session.find(id).await?;
        cast = session.voter.vote(&proposal, support).await;
    }
    let (transaction, votes) = cast.map_err(|error| session.refused(&error))?;
    let done = Done {
        proposal: Some(proposal.id.to_string()),
        transaction: transaction.to_string(),
        votes_micro: Some(votes),
    };
    session.done(format_args!("voted with {} on \"{}\"", shown(votes), clean(proposal.title())), &done)?;
    session.say(format_args!("next, when voting is over: infera govern queue {}", short(proposal.id)));
    Ok(())
}

/// So much of an id as the list shows.
fn short(id: ProposalId) -> String {
    id.to_string().chars().take(show::SHORT).collect()
}

async fn queue(who: &Holder, id: &str) -> Result<(), String> {
    let session = Session::open(who).await?;
    let mut proposal = session.find(id).await?;
    let mut queued = session.voter.queue(&proposal).await;
    if let Err(GovernanceError::Voting { left_secs }) = &queued
        && session.wait(*left_secs, "voting ends then").await?
    {
        proposal = session.find(id).await?;
        queued = session.voter.queue(&proposal).await;
    }
    let transaction = queued.map_err(|error| session.refused(&error))?.to_string();
    let done = Done { proposal: Some(proposal.id.to_string()), transaction, votes_micro: None };
    session.done(format_args!("queued \"{}\" in the timelock", clean(proposal.title())), &done)?;
    session
        .say(format_args!("next, when the timelock lets it: infera govern execute {}", short(proposal.id)));
    Ok(())
}

async fn execute(who: &Holder, id: &str) -> Result<(), String> {
    let session = Session::open(who).await?;
    let proposal = session.find(id).await?;
    let mut executed = session.voter.execute(&proposal).await;
    if let Err(GovernanceError::Timelock { left_secs }) = &executed
        && session.wait(*left_secs, "the timelock lets it then").await?
    {
        executed = session.voter.execute(&proposal).await;
    }
    let transaction = executed.map_err(|error| session.refused(&error))?.to_string();
    let done = Done { proposal: Some(proposal.id.to_string()), transaction, votes_micro: None };
    session.done(format_args!("executed \"{}\"", clean(proposal.title())), &done)?;
    for action in &proposal.actions {
        session.say(format_args!("in force: {}", show::does(action)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_cosines_with_six_decimals() {
        for (text, all) in [("0.6", 600_000), ("1", 1_000_000), ("1.0", 1_000_000), ("0", 0), ("0.000001", 1)]
        {
            assert_eq!(millionths(text), Ok(all), "{text}");
        }
        for text in ["", ".6", "0.", "1.000001", "2", "-0.5", "0.0000001", "6e-1", "4295"] {
            let error = millionths(text).unwrap_err();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }
}
