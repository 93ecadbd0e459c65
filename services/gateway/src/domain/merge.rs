//! Which tokens of a running generation may be emitted (protocol section 9).
//!
//! ```text
//! replica a: Paris is the
//! replica b: Paris is the capital        k = 3: "Paris is the" has 3, "capital" has 1 of 3
//! replica c: Paris is the main           -> "Paris is the" is emitted, the rest waits
//! ```
//!
//! Invariants: what is emitted is never taken back; each emitted token was produced, after the same
//! prefix, by a strict majority of one attempt's replicas (in the fast mode: by one replica). What is
//! lost on the way only delays: a replica with a gap no longer counts, and the verdict carries all.

use std::collections::BTreeMap;

use infera_protocol::bytes::NodeId;

/// Replicas of one attempt that are followed: k after escalation and those that were replaced.
const MAX_FOLLOWED: usize = 64;
/// Attempts that are followed at a time: the newest, and the one before it while that still talks.
const MAX_ATTEMPTS: usize = 2;

/// How a stream is fed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By a strict majority of `k` replicas.
    Majority { k: u32 },
    /// By the first replica that talks; the client was told.
    Fast,
}

/// Tokens that one replica produced, `offset` tokens into its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    pub attempt: u32,
    pub node: NodeId,
    pub offset: u32,
    pub tokens: Vec<u32>,
}

/// The state of one request's stream.
#[derive(Debug)]
pub struct Merge {
    mode: Mode,
    max_tokens: usize,
    emitted: Vec<u32>,
    attempts: BTreeMap<u32, Attempt>,
}

#[derive(Debug, Default)]
struct Attempt {
    /// Replicas in the order in which they were heard first.
    replicas: Vec<Replica>,
}

#[derive(Debug)]
struct Replica {
    node: NodeId,
    tokens: Vec<u32>,
    /// It contradicted itself: nothing of it counts any more.
    broken: bool,
}

impl Merge {
    /// A stream of at most `max_tokens`.
    pub fn new(mode: Mode, max_tokens: u32) -> Self {
        Self { mode, max_tokens: max_tokens as usize, emitted: Vec::new(), attempts: BTreeMap::new() }
    }

    /// All that was emitted so far.
    pub fn emitted(&self) -> &[u32] {
        &self.emitted
    }

    /// Takes in what a replica produced; returns the tokens that may now be emitted.
    pub fn push(&mut self, delta: Delta) -> Vec<u32> {
        let number = delta.attempt;
        if !self.follow(delta) {
            return Vec::new();
        }
        let from = self.emitted.len();
        while let Some(token) = self.next_token(number) {
            self.emitted.push(token);
        }
        self.emitted[from..].to_vec()
    }

    /// Notes a delta; false if it can change nothing.
    fn follow(&mut self, delta: Delta) -> bool {
        self.attempts.entry(delta.attempt).or_default();
        while self.attempts.len() > MAX_ATTEMPTS {
            self.attempts.pop_first();
        }
        let max_tokens = self.max_tokens;
        // The attempt is gone if it is older than those that are followed.
        let Some(attempt) = self.attempts.get_mut(&delta.attempt) else { return false };
        attempt.replica(delta.node).is_some_and(|replica| replica.extend(&delta, max_tokens))
    }

    fn next_token(&self, number: u32) -> Option<u32> {
        let attempt = self.attempts.get(&number)?;
        match self.mode {
            Mode::Fast => attempt.replicas.first()?.after(&self.emitted),
            Mode::Majority { k } => {
                let followed = attempt.replicas.len().max(k as usize);
                let mut votes: BTreeMap<u32, usize> = BTreeMap::new();
                let candidates = attempt.replicas.iter().filter_map(|replica| replica.after(&self.emitted));
                candidates.for_each(|token| *votes.entry(token).or_default() += 1);
                votes.into_iter().find(|(_, votes)| *votes > followed / 2).map(|(token, _)| token)
            }
        }
    }
}

impl Attempt {
    fn replica(&mut self, node: NodeId) -> Option<&mut Replica> {
        let at = match self.replicas.iter().position(|replica| replica.node == node) {
            Some(at) => at,
            None if self.replicas.len() >= MAX_FOLLOWED => return None,
            None => {
                self.replicas.push(Replica { node, tokens: Vec::new(), broken: false });
                self.replicas.len() - 1
            }
        };
        self.replicas.get_mut(at)
    }
}

impl Replica {
    /// Appends what is new; false if nothing is, if something before it is missing, or if it differs
    /// from what the same replica said before.
    fn extend(&mut self, delta: &Delta, max_tokens: usize) -> bool {
        let offset = delta.offset as usize;
        let Some(known) = self.tokens.get(offset..) else { return false };
        if known.iter().zip(&delta.tokens).any(|(a, b)| a != b) {
            self.broken = true;
            return false;
        }
        let fresh = delta.tokens.get(known.len()..).unwrap_or_default();
        let room = max_tokens.saturating_sub(self.tokens.len());
        self.tokens.extend(fresh.iter().take(room));
        !fresh.is_empty()
    }

    /// The token that follows `prefix`, if this replica produced exactly that prefix.
    fn after(&self, prefix: &[u32]) -> Option<u32> {
        if self.broken || !self.tokens.starts_with(prefix) {
            return None;
        }
        self.tokens.get(prefix.len()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn delta(attempt: u32, node: u8, offset: u32, tokens: &[u32]) -> Delta {
        Delta { attempt, node: NodeId([node; 32]), offset, tokens: tokens.to_vec() }
    }

    fn run(mode: Mode, deltas: &[Delta]) -> (Vec<Vec<u32>>, Vec<u32>) {
        let mut merge = Merge::new(mode, 100);
        let steps = deltas.iter().map(|delta| merge.push(delta.clone())).collect();
        (steps, merge.emitted().to_vec())
    }

    const THREE: Mode = Mode::Majority { k: 3 };

    #[test]
    fn two_of_three_are_a_majority() {
        let (steps, _) =
            run(THREE, &[delta(1, 1, 0, &[5, 6]), delta(1, 2, 0, &[5]), delta(1, 3, 0, &[5, 6, 7])]);
        assert_eq!(steps, [vec![], vec![5], vec![6]]);
    }

    #[test]
    fn one_replica_is_none_and_a_parting_waits() {
        let (_, emitted) = run(THREE, &[delta(1, 1, 0, &[1, 2, 3])]);
        assert!(emitted.is_empty());
        let parted = [delta(1, 1, 0, &[1, 2, 9]), delta(1, 2, 0, &[1, 3, 9]), delta(1, 3, 0, &[1, 4, 9])];
        // 9 is everybody's third token, but after different prefixes.
        assert_eq!(run(THREE, &parted).1, [1]);
    }

    #[test]
    fn those_that_parted_no_longer_vote() {
        let deltas =
            [delta(1, 1, 0, &[1, 2]), delta(1, 2, 0, &[1, 2]), delta(1, 3, 0, &[8, 9]), delta(1, 3, 2, &[3])];
        assert_eq!(run(THREE, &deltas).1, [1, 2]);
        let deltas = [delta(1, 1, 0, &[1, 2, 3]), delta(1, 2, 0, &[1, 2]), delta(1, 3, 0, &[8, 9, 3])];
        assert_eq!(run(THREE, &deltas).1, [1, 2]);
    }

    #[test]
    fn a_gap_stops_only_its_replica() {
        let (steps, _) = run(
            THREE,
            &[
                delta(1, 1, 0, &[1]),
                delta(1, 1, 2, &[3]),
                delta(1, 2, 0, &[1, 2, 3]),
                delta(1, 3, 0, &[1, 2]),
            ],
        );
        assert_eq!(steps, [vec![], vec![], vec![1], vec![2]]);
    }

    #[test]
    fn repeats_and_overlaps_change_nothing() {
        let deltas = [
            delta(1, 1, 0, &[1, 2]),
            delta(1, 1, 0, &[1, 2]),
            delta(1, 1, 1, &[2, 3]),
            delta(1, 2, 0, &[1, 2, 3]),
            delta(1, 2, 0, &[1]),
        ];
        assert_eq!(run(THREE, &deltas).1, [1, 2, 3]);
    }

    #[test]
    fn who_contradicts_itself_counts_no_more() {
        let deltas = [delta(1, 1, 0, &[1]), delta(1, 1, 0, &[2, 3]), delta(1, 2, 0, &[1, 3])];
        assert!(run(THREE, &deltas).1.is_empty());
    }

    #[test]
    fn a_later_attempt_must_extend_what_was_emitted() {
        let first = [delta(1, 1, 0, &[1, 2]), delta(1, 2, 0, &[1, 2])];
        let other = [delta(2, 3, 0, &[1, 9, 9]), delta(2, 4, 0, &[1, 9, 9])];
        assert_eq!(run(THREE, &[&first[..], &other[..]].concat()).1, [1, 2]);
        let same = [delta(2, 3, 0, &[1, 2, 3]), delta(2, 4, 0, &[1, 2, 3])];
        assert_eq!(run(THREE, &[&first[..], &same[..]].concat()).1, [1, 2, 3]);
    }

    #[test]
    fn majorities_do_not_add_up_over_attempts() {
        assert!(run(THREE, &[delta(1, 1, 0, &[1]), delta(2, 2, 0, &[1])]).1.is_empty());
    }

    #[test]
    fn an_attempt_older_than_two_is_forgotten() {
        let mut merge = Merge::new(THREE, 100);
        for attempt in 1..=3 {
            merge.push(delta(attempt, 1, 0, &[1]));
        }
        assert!(merge.push(delta(1, 2, 0, &[1])).is_empty());
        assert_eq!(merge.push(delta(3, 2, 0, &[1])), [1]);
    }

    #[test]
    fn more_replicas_raise_the_majority() {
        // After an escalation to five, three are needed.
        let deltas = [
            delta(1, 1, 0, &[7]),
            delta(1, 2, 0, &[8]),
            delta(1, 3, 0, &[9]),
            delta(1, 4, 0, &[7]),
            delta(1, 5, 0, &[7]),
        ];
        let (steps, _) = run(THREE, &deltas);
        assert_eq!(steps[3], [0_u32; 0]);
        assert_eq!(steps[4], [7]);
    }

    #[test]
    fn fast_relays_the_first_that_talks() {
        let (steps, emitted) = run(
            Mode::Fast,
            &[
                delta(1, 1, 0, &[1]),
                delta(1, 2, 0, &[1, 2]),
                delta(1, 2, 2, &[5]),
                delta(1, 1, 1, &[2, 3]),
                delta(2, 3, 0, &[1, 2, 3, 6]),
            ],
        );
        assert_eq!(steps, [vec![1], vec![], vec![], vec![2, 3], vec![6]]);
        assert_eq!(emitted, [1, 2, 3, 6]);
    }

    #[test]
    fn nothing_beyond_the_limit_is_kept() {
        let mut merge = Merge::new(Mode::Fast, 2);
        assert_eq!(merge.push(delta(1, 1, 0, &[1, 2, 3, 4])), [1, 2]);
    }

    proptest! {
        /// Whatever arrives in whatever order: with k replicas that all say the truth or fall silent, and one
        /// that lies, only the truth is emitted.
        #[test]
        fn one_liar_of_three_is_never_heard(
            truth in proptest::collection::vec(0_u32..4, 1..12),
            cuts in proptest::collection::vec((0_u8..3, 0_usize..12, 0_usize..6), 0..40),
            lie in proptest::collection::vec(0_u32..4, 0..12),
        ) {
            let mut merge = Merge::new(THREE, 100);
            for (node, from, len) in cuts {
                let source = if node == 0 { &lie } else { &truth };
                let from = from.min(source.len());
                let to = (from + len).min(source.len());
                merge.push(delta(1, node, from as u32, &source[from..to]));
                prop_assert!(truth.starts_with(merge.emitted()));
            }
        }

        #[test]
        fn what_is_emitted_only_grows(
            deltas in proptest::collection::vec((1_u32..4, 0_u8..5, 0_u32..5, proptest::collection::vec(0_u32..3, 0..5)), 0..60),
            fast in any::<bool>(),
        ) {
            let mut merge = Merge::new(if fast { Mode::Fast } else { THREE }, 8);
            for (attempt, node, offset, tokens) in deltas {
                let before = merge.emitted().to_vec();
                let fresh = merge.push(delta(attempt, node, offset, &tokens));
                prop_assert_eq!(merge.emitted(), [before, fresh].concat());
                prop_assert!(merge.emitted().len() <= 8);
            }
        }
    }
}
