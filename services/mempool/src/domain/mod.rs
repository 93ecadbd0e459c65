//! The set of pending requests, without I/O, clock or randomness of its own. The database has it
//! too; this is what decides.
//!
//! ```text
//!  Admitted ─> Pending ─window─> Offering ─stored─> Offered ─┐
//!                 └──────────┴─────────────┴─────────────────┴─ deadline, cancel ─> Closing
//!  from every stage: closing verdict ─> gone
//! ```

pub mod lane;
pub mod window;

use std::collections::BTreeMap;

use infera_protocol::bytes::Hash32;
use infera_protocol::request::MIN_REPLICAS;
use infera_wire::convert::CloseReason;
use uuid::Uuid;

use lane::{Lane, Place};
use window::{Report, Reports};

/// Offers that one step makes at most: they share a transaction.
pub const MAX_OFFERS: usize = 64;
/// Closes that one step asks for at most, for the same reason.
pub const MAX_CLOSES: usize = 64;

/// A request in the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub request: Uuid,
    pub account: String,
    pub model_root: Hash32,
    /// Registry id of the model.
    pub model: String,
    pub k: u32,
    pub bid_micro: u64,
    pub submitted_at_ms: i64,
    pub deadline_ms: i64,
    pub stage: Stage,
}

impl Entry {
    fn place(&self) -> Place {
        (self.submitted_at_ms, self.request)
    }
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Pending,
    /// Being written as offered.
    Offering,
    /// A dispatcher has it, or will get it from the bus. Never offered a second time.
    Offered {
        at_ms: i64,
    },
    /// Its close was asked for; the verdict decides.
    Closing {
        asked_at_ms: i64,
        reason: CloseReason,
    },
}

/// What happened.
#[derive(Debug)]
pub enum Command {
    /// A funded request is in the database.
    Admitted(Box<Entry>),
    /// The close of a request is in the database.
    CloseAsked {
        request: Uuid,
        reason: CloseReason,
    },
    /// The request had its closing verdict and left the database.
    Closed {
        request: Uuid,
    },
    Report(Report),
    /// These offers are in the database and in its outbox.
    OffersStored {
        requests: Vec<Uuid>,
    },
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Write these as offered, with their messages, in one transaction.
    Offer { requests: Vec<Uuid> },
    /// Write that their close is asked for, with the messages.
    Close { requests: Vec<Uuid>, reason: CloseReason },
}

/// Why a command changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("the request is in the set already")]
    Duplicate,
    #[error("the request is not in the set")]
    Unknown,
}

/// Limits and times.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub max_requests: usize,
    pub unheld_ms: i64,
    pub close_repeat_ms: i64,
}

/// What is pending for one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSummary {
    pub model: String,
    pub model_root: Hash32,
    pub pending: usize,
    pub offered: usize,
    pub closing: usize,
    /// Bids of the pending ones, ascending.
    pub bids_micro: Vec<u64>,
    /// When the oldest pending one was submitted.
    pub oldest_ms: Option<i64>,
    /// Further requests of three replicas that fit now.
    pub window: u32,
}

/// The set.
#[derive(Debug)]
pub struct State {
    rules: Rules,
    entries: BTreeMap<Uuid, Entry>,
    lanes: BTreeMap<Hash32, Lane>,
    /// What is offered and not being closed, with its k.
    under_way: BTreeMap<Hash32, BTreeMap<Uuid, u32>>,
    reports: Reports,
}

impl State {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            entries: BTreeMap::new(),
            lanes: BTreeMap::new(),
            under_way: BTreeMap::new(),
            reports: Reports::default(),
        }
    }

    /// Takes in what the database held at the start.
    pub fn load(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.insert(entry);
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn get(&self, request: &Uuid) -> Option<&Entry> {
        self.entries.get(request)
    }

    /// Applies what happened at `now` (ms) and says what is to be done.
    ///
    /// # Errors
    /// [`Rejection`]: nothing changed.
    pub fn apply(&mut self, command: Command, now: i64) -> Result<Vec<Effect>, Rejection> {
        let mut effects = Vec::new();
        match command {
            Command::Admitted(entry) => {
                let request = entry.request;
                if self.entries.contains_key(&request) {
                    return Err(Rejection::Duplicate);
                }
                let full = self.entries.len() >= self.rules.max_requests;
                self.insert(*entry);
                if full {
                    let reason = CloseReason::Overloaded;
                    self.close(request, reason, now);
                    effects.push(Effect::Close { requests: vec![request], reason });
                }
            }
            Command::CloseAsked { request, reason } => {
                if !self.entries.contains_key(&request) {
                    return Err(Rejection::Unknown);
                }
                self.close(request, reason, now);
            }
            Command::Closed { request } => {
                self.leave(&request);
                self.entries.remove(&request).ok_or(Rejection::Unknown)?;
            }
            Command::Report(report) => self.reports.take(report, now),
            Command::OffersStored { requests } => self.offers_stored(&requests, now),
            Command::Tick => {
                self.reports.expire(now);
                effects.extend(self.overdue(now));
            }
        }
        effects.extend(self.offer(now));
        Ok(effects)
    }

    fn insert(&mut self, entry: Entry) {
        match entry.stage {
            Stage::Pending => {
                self.lanes.entry(entry.model_root).or_default().insert(&entry.account, entry.place());
            }
            Stage::Offering | Stage::Offered { .. } => {
                self.under_way.entry(entry.model_root).or_default().insert(entry.request, entry.k);
            }
            Stage::Closing { .. } => {}
        }
        self.entries.insert(entry.request, entry);
    }

    /// Out of its lane, or of what is under way.
    fn leave(&mut self, request: &Uuid) {
        let Some(entry) = self.entries.get(request) else { return };
        if let Some(lane) = self.lanes.get_mut(&entry.model_root) {
            lane.remove(&entry.account, entry.place());
            if lane.is_empty() {
                self.lanes.remove(&entry.model_root);
            }
        }
        if let Some(offers) = self.under_way.get_mut(&entry.model_root) {
            offers.remove(request);
            if offers.is_empty() {
                self.under_way.remove(&entry.model_root);
            }
        }
    }

    /// The first reason stays: repeats say the same.
    fn close(&mut self, request: Uuid, reason: CloseReason, now: i64) {
        self.leave(&request);
        if let Some(entry) = self.entries.get_mut(&request) {
            let reason = match entry.stage {
                Stage::Closing { reason, .. } => reason,
                _ => reason,
            };
            entry.stage = Stage::Closing { asked_at_ms: now, reason };
        }
    }

    fn offers_stored(&mut self, requests: &[Uuid], now: i64) {
        for request in requests {
            if let Some(entry) = self.entries.get_mut(request).filter(|e| e.stage == Stage::Offering) {
                entry.stage = Stage::Offered { at_ms: now };
            }
        }
    }

    /// Asks to close what is past its deadline, and again what was asked for long ago.
    fn overdue(&mut self, now: i64) -> Vec<Effect> {
        let repeat_ms = self.rules.close_repeat_ms;
        let due = |entry: &Entry| match entry.stage {
            Stage::Pending | Stage::Offering | Stage::Offered { .. } => {
                (entry.deadline_ms <= now).then_some((entry.request, CloseReason::Deadline))
            }
            Stage::Closing { asked_at_ms, reason } => {
                (asked_at_ms + repeat_ms <= now).then_some((entry.request, reason))
            }
        };
        let overdue: Vec<(Uuid, CloseReason)> =
            self.entries.values().filter_map(due).take(MAX_CLOSES).collect();
        for (request, reason) in &overdue {
            self.close(*request, *reason, now);
        }
        let of = |reason| {
            let requests: Vec<Uuid> =
                overdue.iter().filter(|(_, why)| *why == reason).map(|(request, _)| *request).collect();
            (!requests.is_empty()).then_some(Effect::Close { requests, reason })
        };
        CloseReason::ALL.into_iter().filter_map(of).collect()
    }

    /// Offers as much as the free slots allow.
    fn offer(&mut self, now: i64) -> Option<Effect> {
        let models: Vec<Hash32> = self.lanes.keys().copied().collect();
        let mut requests = Vec::new();
        for model in models {
            self.offer_model(&model, now, &mut requests);
        }
        (!requests.is_empty()).then_some(Effect::Offer { requests })
    }

    fn offer_model(&mut self, model: &Hash32, now: i64, requests: &mut Vec<Uuid>) {
        // Nothing asks for less: without room for it, nothing that waits needs to be looked at.
        if !self.reports.window(model).fits(MIN_REPLICAS) {
            return;
        }
        let mut window = self.window(model);
        if !window.fits(MIN_REPLICAS) {
            return;
        }
        let Some(lane) = self.lanes.get_mut(model) else { return };
        while requests.len() < MAX_OFFERS {
            let entries = &self.entries;
            let bid = |request: &Uuid| {
                let entry = entries.get(request)?;
                (window.fits(entry.k) && now < entry.deadline_ms).then_some(entry.bid_micro)
            };
            let Some((account, place)) = lane.next(bid) else { break };
            lane.serve(&account, place);
            if let Some(entry) = self.entries.get_mut(&place.1) {
                entry.stage = Stage::Offering;
                window.debit(entry.k);
                self.under_way.entry(*model).or_default().insert(entry.request, entry.k);
                requests.push(entry.request);
            }
        }
        if lane.is_empty() {
            self.lanes.remove(model);
        }
    }

    /// The room for a model: what is reported free, less the offers that no dispatcher reports yet.
    fn window(&self, model: &Hash32) -> window::Window {
        let mut window = self.reports.window(model);
        for (request, k) in self.under_way.get(model).into_iter().flatten() {
            if !self.reports.holds(model, request) {
                window.debit(*k);
            }
        }
        window
    }

    /// Offers that no dispatcher reports although they are old: they wait on the bus, or in its dead
    /// letters.
    pub fn unheld(&self, now: i64) -> Vec<Uuid> {
        let old = |entry: &Entry| {
            matches!(entry.stage, Stage::Offered { at_ms } if at_ms + self.rules.unheld_ms <= now)
                && !self.reports.holds(&entry.model_root, &entry.request)
        };
        let offers = self.under_way.values().flatten().filter_map(|(request, _)| self.entries.get(request));
        offers.filter(|entry| old(entry)).map(|entry| entry.request).collect()
    }

    /// One summary per model, by its id.
    pub fn summaries(&self) -> Vec<ModelSummary> {
        let mut by_model: BTreeMap<&str, ModelSummary> = BTreeMap::new();
        for entry in self.entries.values() {
            let summary = by_model.entry(&entry.model).or_insert_with(|| ModelSummary {
                model: entry.model.clone(),
                model_root: entry.model_root,
                pending: 0,
                offered: 0,
                closing: 0,
                bids_micro: Vec::new(),
                oldest_ms: None,
                window: self.window(&entry.model_root).count(MIN_REPLICAS),
            });
            match entry.stage {
                Stage::Pending => {
                    summary.pending += 1;
                    summary.bids_micro.push(entry.bid_micro);
                    let oldest = summary.oldest_ms.unwrap_or(i64::MAX);
                    summary.oldest_ms = Some(oldest.min(entry.submitted_at_ms));
                }
                Stage::Offering | Stage::Offered { .. } => summary.offered += 1,
                Stage::Closing { .. } => summary.closing += 1,
            }
        }
        let mut summaries: Vec<ModelSummary> = by_model.into_values().collect();
        for summary in &mut summaries {
            summary.bids_micro.sort_unstable();
        }
        summaries
    }
}

#[cfg(test)]
mod tests;
