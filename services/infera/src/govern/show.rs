//! How proposals and the registry are printed.

use infera_protocol::{
    governed::{ListedModel, ModelTerms},
    registry::Model,
};
use infera_settlement::chain::governance::{
    Action, EntryError, Place, Proposal, RegistryCall, RegistryState, State,
};
use serde::Serialize;

use crate::{client::infer, operator::shown, say};

/// Hex digits of an id that are shown where the whole one would not fit.
pub const SHORT: usize = 12;

/// What others wrote, for a terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What `--json` prints of a proposal.
#[derive(Serialize)]
pub struct Whole<'a> {
    #[serde(flatten)]
    proposal: &'a Proposal,
    title: &'a str,
    /// The registry entries of the models that it admits.
    entries: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    id: &'a str,
    /// Whether there is one, and says what the call says.
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<Model>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl<'a> Whole<'a> {
    pub fn of(proposal: &'a Proposal) -> Self {
        let one = |(id, found): (&'a str, Result<Model, EntryError>)| match found {
            Ok(model) => Entry { id, ok: true, entry: Some(model), error: None },
            Err(error) => Entry { id, ok: false, entry: None, error: Some(error.to_string()) },
        };
        Self { proposal, title: proposal.title(), entries: proposal.entries().into_iter().map(one).collect() }
    }
}

pub fn json(value: &impl Serialize) -> Result<(), String> {
    say(serde_json::to_string_pretty(value).map_err(|e| e.to_string())?);
    Ok(())
}

/// One line of the list.
pub fn line(proposal: &Proposal) {
    say(format_args!(
        "{}  {:9}  {}",
        super::short(proposal.id),
        proposal.state.name(),
        clean(proposal.title())
    ));
}

/// Everything of one proposal. `now_secs` is the chain's time.
pub fn proposal(proposal: &Proposal, now_secs: u64) {
    say(format_args!("proposal   {}", proposal.id));
    say(format_args!("title      {}", clean(proposal.title())));
    say(format_args!("state      {}", stands(proposal, now_secs)));
    say(format_args!("proposer   {}", proposal.proposer));
    for action in &proposal.actions {
        say(format_args!("does       {}", does(action)));
    }
    for (id, entry) in proposal.entries() {
        match entry {
            Ok(model) => say(format_args!(
                "entry      of {}: says what the call says; weights of {} bytes, end tokens {:?}",
                clean(id),
                model.weights_bytes,
                model.end_tokens
            )),
            Err(error) => {
                say(format_args!("entry      of {}: NOT USABLE, {}", clean(id), clean(&error.to_string())))
            }
        }
    }
    let votes = proposal.votes;
    let reached = if votes.for_.saturating_add(votes.abstain) >= proposal.quorum_micro {
        "reached"
    } else {
        "not reached"
    };
    for (name, micro, why) in [
        ("for", votes.for_, ""),
        ("against", votes.against, ""),
        ("abstain", votes.abstain, ""),
        ("quorum", proposal.quorum_micro, reached),
    ] {
        say(format_args!("{name:10} {:>26}  {why}", shown(micro)));
    }
    place("proposed", Some(proposal.proposed));
    place("queued", proposal.queued);
    place("executed", proposal.executed);
    place("canceled", proposal.canceled);
}

fn place(name: &str, place: Option<Place>) {
    if let Some(Place { block, tx, .. }) = place {
        say(format_args!("{name:10} block {block}, transaction {tx}"));
    }
}

fn stands(proposal: &Proposal, now_secs: u64) -> String {
    let left = |until: u64| until.saturating_sub(now_secs);
    let more = match proposal.state {
        State::Pending => format!(": voting opens in {} s", left(proposal.snapshot_secs + 1)),
        State::Active => format!(": voting ends in {} s", left(proposal.deadline_secs + 1)),
        State::Succeeded => ": it can be queued".to_owned(),
        State::Queued if left(proposal.eta_secs) == 0 => ": it can be executed".to_owned(),
        State::Queued => format!(": it can be executed in {} s", left(proposal.eta_secs)),
        _ => String::new(),
    };
    format!("{}{more}", proposal.state.name())
}

/// A change in one line.
pub fn does(action: &Action) -> String {
    match action {
        Action::Registry(call) => change(call),
        Action::Other { target, value, selector, bytes } => {
            format!("call {selector} of {target} with {bytes} bytes and {value} wei: not known here")
        }
    }
}

fn change(call: &RegistryCall) -> String {
    match call {
        RegistryCall::AdmitModel { id, terms } => format!("serve {}: {}", clean(id), values(terms)),
        RegistryCall::SetTerms { id, similarity_threshold_millionths, price_cap_micro } => format!(
            "{}: from now on {}",
            clean(id),
            price_and_threshold(*price_cap_micro, *similarity_threshold_millionths)
        ),
        RegistryCall::WithdrawModel { id } => format!("withdraw {}", clean(id)),
        RegistryCall::ApproveRelease { release, name } => {
            format!("approve the release {release}, {}", clean(name))
        }
        RegistryCall::WithdrawRelease { release } => format!("withdraw the release {release}"),
        RegistryCall::SetCalibration { hash } => format!("the calibration {hash}"),
    }
}

fn price_and_threshold(price_cap_micro: u64, threshold_millionths: u32) -> String {
    format!(
        "at most {} a token and replica, answers agree from a cosine of {}.{:06} on",
        infer(price_cap_micro),
        threshold_millionths / 1_000_000,
        threshold_millionths % 1_000_000
    )
}

fn values(terms: &ModelTerms) -> String {
    format!(
        "weights {}, context {}, vocabulary {}, {}",
        terms.weights_root,
        terms.context_length,
        terms.vocab_size,
        price_and_threshold(terms.price_cap_micro, terms.similarity_threshold_millionths)
    )
}

pub fn registry(state: &RegistryState) {
    say(format_args!("revision {} at block {}", state.revision, state.block));
    for ListedModel { id, terms } in &state.models {
        let served = if terms.active { "served   " } else { "withdrawn" };
        say(format_args!("{served}  {}: {}", clean(id), values(terms)));
    }
    for release in &state.releases {
        say(format_args!("release    {release}"));
    }
    if state.releases.is_empty() {
        say("release    any: none is approved by name");
    }
    say(format_args!("calibration {}", state.calibration_hash));
}
