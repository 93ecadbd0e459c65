//! What is known of the operators, as far as draws depend on it.

use std::collections::BTreeMap;

use infera_protocol::bytes::Address;
use infera_protocol::trust::{Alarm, Record, Rules};

/// Slots for which weights are worked out.
const MANY_SLOTS: u32 = 64;

/// What follows for each operator from its record; whoever has none is new. Worked out once, for many draws.
#[derive(Debug, Clone)]
pub struct Ledger {
    newcomer: Standing,
    standings: BTreeMap<Address, Standing>,
}

#[derive(Debug, Clone, Copy)]
struct Standing {
    /// Weight of a node with [`MANY_SLOTS`]; 0: it may not be drawn.
    weight: u32,
    audit_ppm: u32,
    trusted: bool,
}

impl Ledger {
    pub fn new(rules: &Rules, alarm: &Alarm, records: &BTreeMap<Address, Record>, now: i64) -> Self {
        let standing = |record: &Record| Standing {
            weight: record.weight(rules, MANY_SLOTS, now),
            audit_ppm: record.audit_ppm(rules, alarm, now),
            trusted: record.is_trusted(rules, now),
        };
        Self {
            newcomer: standing(&Record::default()),
            standings: records.iter().map(|(operator, record)| (*operator, standing(record))).collect(),
        }
    }

    /// With the operators of another one, worked out under the same alarm.
    pub fn extend(&mut self, other: Self) {
        self.standings.extend(other.standings);
    }

    fn standing(&self, operator: &Address) -> Standing {
        self.standings.get(operator).copied().unwrap_or(self.newcomer)
    }

    /// Of a node with `slots` in a draw; 0: it may not be drawn.
    pub fn weight(&self, operator: &Address, slots: u32) -> u32 {
        let weight = self.standing(operator).weight;
        if weight == 0 { 0 } else { (weight.saturating_mul(slots) / MANY_SLOTS).max(1) }
    }

    /// How often what the operator helps to verify is refereed, 10^-6.
    pub fn audit_ppm(&self, operator: &Address) -> u32 {
        self.standing(operator).audit_ppm
    }

    /// Whether the operator referees before others.
    pub fn is_trusted(&self, operator: &Address) -> bool {
        self.standing(operator).trusted
    }
}

impl Default for Ledger {
    /// Everybody is new.
    fn default() -> Self {
        Self::new(&Rules::default(), &Alarm::default(), &BTreeMap::new(), 0)
    }
}
