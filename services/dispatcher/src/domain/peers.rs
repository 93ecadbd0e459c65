//! The other replicas, as they report themselves: who has room for what waits here.

use std::collections::BTreeMap;

use infera_protocol::bytes::Hash32;

/// Most replicas that are listened to.
const MAX_PEERS: usize = 1_024;
/// A report counts at most so long, ms, whatever it says.
const MAX_TTL_MS: i64 = 60_000;

/// Distinct operators and free slots of one replica, by model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerReport {
    pub ttl_ms: i64,
    pub models: BTreeMap<Hash32, (u32, u32)>,
}

/// The latest report of every other replica.
#[derive(Debug, Default)]
pub struct Peers {
    by_replica: BTreeMap<String, (i64, PeerReport)>,
}

impl Peers {
    pub fn take(&mut self, replica: String, report: PeerReport, now: i64) {
        self.expire(now);
        if self.by_replica.len() < MAX_PEERS || self.by_replica.contains_key(&replica) {
            let until = now.saturating_add(report.ttl_ms.clamp(0, MAX_TTL_MS));
            self.by_replica.insert(replica, (until, report));
        }
    }

    pub fn expire(&mut self, now: i64) {
        self.by_replica.retain(|_, (until, _)| *until > now);
    }

    /// Takes the room of a request at one of them, until its next report.
    pub fn take_room(&mut self, model: &Hash32, k: u32) -> bool {
        let mut slots = self.by_replica.values_mut().filter_map(|(_, report)| report.models.get_mut(model));
        let Some((_, free)) = slots.find(|(operators, free)| *operators >= k && *free >= k) else {
            return false;
        };
        *free -= k;
        true
    }
}
