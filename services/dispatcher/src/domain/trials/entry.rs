//! How the trial of a newcomer begins.

use infera_protocol::admission;
use infera_protocol::assignment::{Eligible, draw_referees, freeze};
use infera_protocol::bytes::{Address, Hash32};
use infera_protocol::hash::keccak;
use infera_protocol::ids::id_at;
use infera_protocol::registry::Model;
use infera_protocol::vrf;

use super::trial::{Stage, Trial};
use super::{Court, Kind, MAX_ENTRIES, MAX_REFEREES, MAX_TRIALS, Trials, traceparent_like};
use crate::domain::nodes::Connected;
use crate::domain::trust::Ledger;

/// Whether a newcomer is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// It has its lease.
    Tried,
    /// Not now: too many are tried, or another node of its operator is.
    Wait,
    /// No trusted operator but its own serves its class.
    NoJudge,
}

impl Trials {
    /// Tries a node before it is drawn.
    pub fn entry(&mut self, info: &Connected, trust: &Ledger, court: &mut Court) -> Entry {
        let Some(model) = court.rules.registry.by_root(&info.model_root) else { return Entry::NoJudge };
        // Within a class the bounds hold whatever the prompt; between classes they were measured on texts.
        let judges = court.nodes.eligible(&info.model_root, trust).into_iter();
        let judges = judges.filter(|e| e.trusted && e.class == info.class && e.operator != info.operator);
        let judges = freeze(judges.collect());
        if judges.is_empty() {
            return Entry::NoJudge;
        }
        if !self.has_room_for_entry() || self.enters(&info.operator) {
            return Entry::Wait;
        }
        let (nonce, now) = (info.session.as_bytes(), court.now.to_be_bytes());
        let beta =
            vrf::beta(&court.rules.key.prove(&keccak(&[b"infera.entry.v1", &info.node.0, nonce, &now])));
        let order = draw_referees(&beta, &judges, |_| false);
        let referees = order.into_iter().take(MAX_REFEREES).rev().cloned().collect();
        let trial = Trial::entry(info, &beta, model, referees, &self.traceparent, court);
        self.lease(trial, court);
        Entry::Tried
    }

    pub fn has_room_for_entry(&self) -> bool {
        let entries = self.live.iter().filter(|trial| trial.kind == Kind::Entry).count();
        entries < MAX_ENTRIES && self.live.len() < MAX_TRIALS
    }

    /// Whether a node of this operator is in its entry trial.
    pub fn enters(&self, operator: &Address) -> bool {
        self.live.iter().any(|trial| trial.kind == Kind::Entry && trial.who.operator == *operator)
    }
}

impl Trial {
    fn entry(
        info: &Connected,
        beta: &Hash32,
        model: &Model,
        referees: Vec<Eligible>,
        traceparent: &str,
        court: &Court,
    ) -> Self {
        let random = |what: &[u8]| keccak(&[b"infera.entry.job.v1", what, &beta.0]);
        let now_ms = u64::try_from(court.now).unwrap_or(0);
        let id = id_at(now_ms, &random(b"id"));
        let secret = random(b"secret");
        let request = admission::trial(beta, id, model);
        Self {
            kind: Kind::Entry,
            who: Eligible {
                node: info.node,
                operator: info.operator,
                class: info.class.clone(),
                weight: 1,
                audit_ppm: 0,
                trusted: false,
            },
            hash: request.hash(&court.rules.domain),
            job: id_at(now_ms, &secret),
            job_traceparent: traceparent_like(traceparent, &secret),
            secret,
            checked: Vec::new(),
            request,
            attempt: 1,
            referees,
            peers: Vec::new(),
            is_void: false,
            stream: false,
            traceparent: traceparent_like(traceparent, &random(b"lease")),
            stage: Stage::Leased { until_ms: court.now + court.rules.lease_ms },
        }
    }
}
