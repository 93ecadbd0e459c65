//! The nodes that are connected to this replica, and what they are busy with.

use std::collections::{BTreeMap, BTreeSet};

use infera_protocol::assignment::{Eligible, MAX_ELIGIBLE, MIXED_CLASS, of_class, operators};
use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::request::MIN_REPLICAS;
use infera_protocol::slashing::SignedBinding;
use uuid::Uuid;

use super::trust::Ledger;

/// Slots that count for a node before it has shown that it keeps up with more.
pub const FIRST_SLOTS: u32 = 4;

/// A node whose hello was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    pub node: NodeId,
    pub operator: Address,
    pub session: Uuid,
    pub model_root: Hash32,
    /// Numerics class.
    pub class: String,
    /// Sequences at once, at least 1.
    pub slots: u32,
    pub release_hash: Hash32,
    /// By what the node's signer is the operator's.
    pub bound: SignedBinding,
    pub version: String,
    pub connected_at_ms: i64,
}

/// What anybody may know of a connected node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    pub info: Connected,
    /// Of its slots, those that count; see [`Nodes::kept_up`].
    pub shown: u32,
    pub busy: u32,
    pub draining: bool,
    /// See [`super::trials`].
    pub on_trial: bool,
}

/// Slots for one model, in the class that the next request would be drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelSlots {
    /// Distinct operators connected.
    pub operators: u32,
    /// Slots without a lease that requests can use, which take each of theirs from another operator: the
    /// smallest number of replicas times the requests of so many that fit.
    pub free: u32,
    pub total: u32,
}

#[derive(Debug)]
struct Entry {
    info: Connected,
    draining: bool,
    /// Takes no work of requests before its entry trial is over; at that time it is tried again.
    on_trial: Option<i64>,
    /// Let in because nobody could judge it; tried once somebody can.
    is_untried: bool,
    leases: BTreeSet<Uuid>,
    /// Leases with which it is thought to keep up at once, whatever it says.
    shown: u32,
}

impl Entry {
    fn slots(&self) -> u32 {
        self.info.slots.min(self.shown)
    }

    fn busy(&self) -> u32 {
        u32::try_from(self.leases.len()).unwrap_or(u32::MAX)
    }

    fn free(&self) -> u32 {
        if self.draining || self.on_trial.is_some() { 0 } else { self.slots().saturating_sub(self.busy()) }
    }

    /// Trusted, eligible, and not on trial itself.
    fn may_judge(&self, trust: &Ledger) -> bool {
        let operator = &self.info.operator;
        let trusted = trust.is_trusted(operator) && trust.weight(operator, self.slots()) > 0;
        trusted && !self.draining && self.on_trial.is_none()
    }
}

/// All connected nodes, by key.
#[derive(Debug, Default)]
pub struct Nodes {
    by_id: BTreeMap<NodeId, Entry>,
    /// Counts who comes, goes or drains.
    changes: u64,
}

impl Nodes {
    /// Adds a node, or gives a known one its new session; then its leases stay.
    pub fn join(&mut self, info: Connected) {
        self.changes += 1;
        match self.by_id.get_mut(&info.node) {
            Some(entry) => {
                entry.info = info;
                entry.draining = false;
            }
            None => {
                let node = info.node;
                let leases = BTreeSet::new();
                let (draining, on_trial, is_untried, shown) = (false, None, false, FIRST_SLOTS);
                let entry = Entry { info, draining, on_trial, is_untried, leases, shown };
                self.by_id.insert(node, entry);
            }
        }
    }

    pub fn leave(&mut self, node: &NodeId) {
        self.changes += 1;
        self.by_id.remove(node);
    }

    /// Differs whenever another set might be frozen.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    pub fn get(&self, node: &NodeId) -> Option<&Connected> {
        self.by_id.get(node).map(|entry| &entry.info)
    }

    /// Whether `session` is the node's session in force.
    pub fn is_session(&self, node: &NodeId, session: Uuid) -> bool {
        self.get(node).is_some_and(|info| info.session == session)
    }

    /// The node takes no further leases.
    pub fn drain(&mut self, node: &NodeId) {
        self.changes += 1;
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.draining = true;
        }
    }

    pub fn lease(&mut self, node: &NodeId, request: Uuid) {
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.leases.insert(request);
        }
    }

    pub fn release(&mut self, node: &NodeId, request: Uuid) {
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.leases.remove(&request);
        }
    }

    /// A commitment came in time. While all slots that count were taken, one more counts from now on.
    pub fn kept_up(&mut self, node: &NodeId, request: Uuid) {
        if let Some(entry) = self.by_id.get_mut(node) {
            let (busy, slots) = (entry.busy(), entry.slots());
            if entry.leases.remove(&request) && busy >= slots {
                entry.shown = slots.saturating_add(1);
            }
        }
    }

    /// A lease ran out, or the node had no room for it: half of its slots count from now on.
    pub fn fell_behind(&mut self, node: &NodeId, request: Uuid) {
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.leases.remove(&request);
            entry.shown = (entry.slots() / 2).max(1);
        }
    }

    /// Whether the node waits for the end of its entry trial, and when it is tried again (ms).
    pub fn set_on_trial(&mut self, node: &NodeId, on_trial: Option<i64>) {
        self.changes += 1;
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.on_trial = on_trial;
            entry.is_untried = false;
        }
    }

    /// The node works without having been tried, because nobody can judge it now.
    pub fn let_in_untried(&mut self, node: &NodeId) {
        self.set_on_trial(node, None);
        if let Some(entry) = self.by_id.get_mut(node) {
            entry.is_untried = true;
        }
    }

    /// Whether the node is connected and takes no work of requests before its entry trial is over.
    pub fn is_on_trial(&self, node: &NodeId) -> bool {
        self.by_id.get(node).is_some_and(|entry| entry.on_trial.is_some())
    }

    /// One of those that were let in untried and could be judged now, with a free place if there is one: a full one would
    /// decline.
    pub fn untried(&self, trust: &Ledger, excluded: impl Fn(&Connected) -> bool) -> Option<Connected> {
        let untried = |entry: &&Entry| entry.is_untried && !entry.draining && !excluded(&entry.info);
        if !self.by_id.values().any(|entry| untried(&entry)) {
            return None;
        }
        let mut judges: BTreeMap<(&Hash32, &str), BTreeSet<Address>> = BTreeMap::new();
        for entry in self.by_id.values().filter(|entry| entry.may_judge(trust)) {
            let of = (&entry.info.model_root, entry.info.class.as_str());
            judges.entry(of).or_default().insert(entry.info.operator);
        }
        let judged = |entry: &&Entry| {
            judges
                .get(&(&entry.info.model_root, entry.info.class.as_str()))
                .is_some_and(|operators| operators.iter().any(|judge| *judge != entry.info.operator))
        };
        let mut judged = self.by_id.values().filter(untried).filter(judged).peekable();
        let first = judged.peek().copied();
        judged.find(|entry| entry.free() > 0).or(first).map(|entry| entry.info.clone())
    }

    /// Whose entry trial is due again at `now`.
    pub fn to_be_tried(&self, now: i64) -> Vec<Connected> {
        let due = |entry: &&Entry| entry.on_trial.is_some_and(|at| at <= now);
        self.by_id.values().filter(due).map(|entry| entry.info.clone()).collect()
    }

    /// Whether the node that was frozen is still there as it was, with this model.
    pub fn serves(&self, frozen: &Eligible, model: &Hash32) -> bool {
        self.get(&frozen.node).is_some_and(|info| {
            info.operator == frozen.operator && info.class == frozen.class && info.model_root == *model
        })
    }

    /// Whether the node can take one more lease.
    pub fn is_free(&self, node: &NodeId) -> bool {
        self.by_id.get(node).is_some_and(|entry| entry.free() > 0)
    }

    /// The nodes of a model that may be drawn, as they stand now: those that drain are left out.
    pub fn eligible(&self, model: &Hash32, trust: &Ledger) -> Vec<Eligible> {
        self.of_model(model)
            .filter(|entry| !entry.draining && entry.on_trial.is_none())
            .map(|entry| Eligible {
                node: entry.info.node,
                operator: entry.info.operator,
                class: entry.info.class.clone(),
                weight: trust.weight(&entry.info.operator, entry.slots()),
                audit_ppm: trust.audit_ppm(&entry.info.operator),
                trusted: trust.is_trusted(&entry.info.operator),
            })
            .filter(|eligible| eligible.weight > 0)
            .take(MAX_ELIGIBLE)
            .collect()
    }

    /// The class to draw `k` operators from: of those that `k` operators of the set have, the one with the most that
    /// are free; all where none has so many. `None`: too few are free. Ties go to the first name.
    pub fn class_for(&self, set: &[Eligible], k: usize) -> Option<String> {
        let mut classes: Vec<&str> = set
            .iter()
            .map(|e| e.class.as_str())
            .filter(|class| operators(of_class(set, class)) >= k)
            .collect();
        if classes.is_empty() {
            classes.push(MIXED_CLASS);
        }
        let free = |class: &str| operators(of_class(set, class).filter(|e| self.is_free(&e.node)));
        let mut best: Option<(&str, usize)> = None;
        for class in classes {
            let free = free(class);
            if best.is_none_or(|(name, most)| free > most || free == most && class < name) {
                best = Some((class, free));
            }
        }
        best.filter(|(_, free)| *free >= k).map(|(class, _)| class.to_owned())
    }

    /// Slots for the model in the class that [`Nodes::class_for`] would take for the fewest replicas, or, when all are
    /// busy, in the one with the most operators.
    pub fn model_slots(&self, model: &Hash32) -> ModelSlots {
        let enough = |class: &Option<(String, usize)>| {
            class.as_ref().is_some_and(|(_, operators)| *operators >= MIN_REPLICAS as usize)
        };
        let most = self.best_class(model, |_| true);
        let free = self.best_class(model, |entry| entry.free() > 0);
        // Where no class has enough operators, all are drawn from.
        let class = if enough(&most) { free.or(most).map(|(class, _)| class) } else { None };
        let mut operators: BTreeMap<Address, u32> = BTreeMap::new();
        let mut slots = ModelSlots::default();
        let counts = |entry: &&Entry| class.as_ref().is_none_or(|class| entry.info.class == *class);
        for entry in self.of_model(model).filter(counts) {
            let free = operators.entry(entry.info.operator).or_default();
            *free = free.saturating_add(entry.free());
            slots.total = slots.total.saturating_add(entry.slots());
        }
        let free: Vec<u32> = operators.values().copied().collect();
        slots.free = usable(&free, MIN_REPLICAS);
        slots.operators = u32::try_from(operators.len()).unwrap_or(u32::MAX);
        slots
    }

    /// Every node, by key.
    pub fn views(&self) -> Vec<NodeView> {
        self.by_id
            .values()
            .map(|entry| NodeView {
                info: entry.info.clone(),
                shown: entry.slots(),
                busy: entry.busy(),
                draining: entry.draining,
                on_trial: entry.on_trial.is_some(),
            })
            .collect()
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    fn of_model<'a>(&'a self, model: &'a Hash32) -> impl Iterator<Item = &'a Entry> {
        self.by_id.values().filter(move |entry| entry.info.model_root == *model)
    }

    fn best_class(&self, model: &Hash32, counts: impl Fn(&Entry) -> bool) -> Option<(String, usize)> {
        let mut operators: BTreeMap<&str, BTreeSet<Address>> = BTreeMap::new();
        for entry in self.of_model(model).filter(|entry| counts(entry)) {
            operators.entry(&entry.info.class).or_default().insert(entry.info.operator);
        }
        let mut best: Option<(&str, usize)> = None;
        for (class, members) in &operators {
            if best.is_none_or(|(_, most)| members.len() > most) {
                best = Some((class, members.len()));
            }
        }
        best.map(|(class, operators)| (class.to_owned(), operators))
    }
}

/// Of slots that are free at each operator, those that requests of `k` can use: the most requests `m` whose
/// slots are on `k` operators each, which is when the operators have `k * m` with at most `m` of any, times `k`.
fn usable(free: &[u32], k: u32) -> u32 {
    let k = u64::from(k.max(1));
    let of_each = |m: u64| free.iter().map(|free| u64::from(*free).min(m)).sum::<u64>();
    let (mut fits, mut too_many) = (0, of_each(u64::MAX) / k + 1);
    while fits + 1 < too_many {
        let m = fits + (too_many - fits) / 2;
        if of_each(m) >= k * m { fits = m } else { too_many = m }
    }
    u32::try_from(k * fits).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::usable;

    #[test]
    fn slots_of_one_operator_do_not_serve_one_request() {
        for (free, expected) in [
            (&[][..], 0),
            (&[64], 0),
            (&[64, 64], 0),
            (&[1, 1, 1], 3),
            (&[2, 2, 2], 6),
            (&[64, 1, 1], 3),
            (&[64, 64, 2], 6),
            (&[2, 2, 2, 2], 6),
            (&[3, 3, 3, 3], 12),
            (&[64, 2, 2, 2], 9),
            (&[0, 5, 5], 0),
        ] {
            assert_eq!(usable(free, 3), expected, "{free:?}");
        }
        assert_eq!(usable(&[u32::MAX; 9], 3), u32::MAX);
    }
}
