//! How many requests the network can take now: recomputed from the dispatchers' latest reports and
//! from the offers that none of them holds yet, never counted up and down.

use std::collections::{BTreeMap, BTreeSet};

use infera_protocol::bytes::Hash32;
use uuid::Uuid;

/// Most dispatcher replicas that are listened to.
pub const MAX_REPLICAS: usize = 1_024;
/// A report counts at most so long, ms, whatever it says.
const MAX_TTL_MS: i64 = 60_000;

/// What one dispatcher replica reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub replica: String,
    /// By the dispatcher's clock: orders its own reports, and says how long this one counts.
    pub reported_at_ms: i64,
    pub ttl_ms: i64,
    pub models: BTreeMap<Hash32, Slots>,
}

/// Slots of one replica for one model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Slots {
    /// Distinct operators connected.
    pub operators: u32,
    pub free: u32,
    pub held: BTreeSet<Uuid>,
}

/// The latest report of every replica.
#[derive(Debug, Default)]
pub struct Reports {
    by_replica: BTreeMap<String, (i64, Report)>,
}

impl Reports {
    /// Takes a report unless a later one of its replica is there.
    pub fn take(&mut self, report: Report, now: i64) {
        self.expire(now);
        let stale = self
            .by_replica
            .get(&report.replica)
            .is_some_and(|(_, there)| there.reported_at_ms > report.reported_at_ms);
        if stale || (self.by_replica.len() >= MAX_REPLICAS && !self.by_replica.contains_key(&report.replica))
        {
            return;
        }
        let until = now.saturating_add(report.ttl_ms.clamp(0, MAX_TTL_MS));
        self.by_replica.insert(report.replica.clone(), (until, report));
    }

    pub fn expire(&mut self, now: i64) {
        self.by_replica.retain(|_, (until, _)| *until > now);
    }

    /// Whether a replica works on the request.
    pub fn holds(&self, model: &Hash32, request: &Uuid) -> bool {
        self.of(model).any(|slots| slots.held.contains(request))
    }

    /// The room for a model, before anything is taken from it.
    pub fn window(&self, model: &Hash32) -> Window {
        Window { replicas: self.of(model).map(|slots| (slots.operators, slots.free)).collect() }
    }

    fn of<'a>(&'a self, model: &'a Hash32) -> impl Iterator<Item = &'a Slots> {
        self.by_replica.values().filter_map(move |(_, report)| report.models.get(model))
    }
}

/// Free slots for one model. A request takes k of one replica's, on as many operators.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// (operators, free slots)
    replicas: Vec<(u32, u32)>,
}

impl Window {
    /// Whether a request of `k` fits.
    pub fn fits(&self, k: u32) -> bool {
        self.replicas.iter().any(|(operators, free)| *operators >= k && *free >= k)
    }

    /// Takes the room of a request; what does not fit any replica leaves none anywhere near it.
    pub fn debit(&mut self, k: u32) {
        let fitting = self.replicas.iter_mut().filter(|(operators, free)| *operators >= k && *free >= k);
        if let Some((_, free)) = fitting.max_by_key(|(_, free)| *free) {
            *free -= k;
        } else if let Some((_, free)) = self.replicas.iter_mut().max_by_key(|(_, free)| *free) {
            *free = free.saturating_sub(k);
        }
    }

    /// Requests of `k` that fit.
    pub fn count(&self, k: u32) -> u32 {
        let fitting = self.replicas.iter().filter(|(operators, _)| *operators >= k);
        fitting.map(|(_, free)| free / k.max(1)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Hash32 = Hash32([1; 32]);

    fn report(replica: &str, at: i64, operators: u32, free: u32) -> Report {
        let slots = Slots { operators, free, held: BTreeSet::new() };
        Report {
            replica: replica.into(),
            reported_at_ms: at,
            ttl_ms: 5_000,
            models: BTreeMap::from([(MODEL, slots)]),
        }
    }

    #[test]
    fn table_of_windows() {
        for (operators, free, k, expected) in
            [(3, 9, 3, 3), (3, 8, 3, 2), (2, 64, 3, 0), (7, 2, 3, 0), (5, 10, 5, 2), (4, 0, 3, 0)]
        {
            let mut reports = Reports::default();
            reports.take(report("a", 0, operators, free), 0);
            let window = reports.window(&MODEL);
            assert_eq!(window.count(k), expected, "{operators} operators, {free} free, k {k}");
            assert_eq!(window.fits(k), expected > 0);
        }
    }

    #[test]
    fn slots_of_different_replicas_do_not_add_up_to_one_request() {
        let mut reports = Reports::default();
        reports.take(report("a", 0, 3, 2), 0);
        reports.take(report("b", 0, 3, 2), 0);
        assert!(!reports.window(&MODEL).fits(3));
    }

    #[test]
    fn reports_replace_each_other_in_their_own_order_and_expire() {
        let mut reports = Reports::default();
        reports.take(report("a", 10, 3, 9), 1_000_000);
        reports.take(report("a", 9, 3, 30), 1_000_001);
        assert_eq!(reports.window(&MODEL).count(3), 3, "the older one came late");
        reports.take(report("a", 11, 3, 3), 1_000_002);
        assert_eq!(reports.window(&MODEL).count(3), 1);
        reports.expire(1_005_002);
        assert_eq!(reports.window(&MODEL).count(3), 0);
        let for_ever = Report { ttl_ms: i64::MAX, ..report("b", 0, 3, 3) };
        reports.take(for_ever, 0);
        reports.expire(60_000);
        assert_eq!(reports.window(&MODEL).count(3), 0);
    }

    #[test]
    fn a_debit_takes_from_where_it_fits() {
        let mut window = Window { replicas: vec![(2, 100), (3, 6)] };
        window.debit(3);
        assert_eq!(window.count(3), 1);
        window.debit(3);
        assert_eq!(window.count(3), 0);
        window.debit(3);
        assert_eq!(window.count(2), 48, "an offer that fits nowhere counts against the most room");
    }
}
