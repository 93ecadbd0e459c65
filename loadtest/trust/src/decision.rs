//! How results and referees' reports become a decision: `agreement::decide`, on outputs that are only right or wrong.

use std::collections::BTreeMap;

use infera_protocol::{
    agreement::{Ballot, Decision, Question, Standing, Votes, decide, quorum},
    bytes::{Hash32, NodeId},
    request::MIN_REPLICAS,
};

/// An answer: the model's, or one of the others. Equal ones agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Right,
    Wrong(u32),
}

impl Output {
    fn hash(self) -> Hash32 {
        let mut bytes = [0; 32];
        if let Self::Wrong(kind) = self {
            bytes[0] = 1;
            bytes[1..5].copy_from_slice(&kind.to_be_bytes());
        }
        Hash32(bytes)
    }
}

/// What is needed next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Round {
    /// So many more referees, about these outputs.
    Referees(usize, Vec<Output>),
    /// Two more replicas, or the end.
    Nodes(usize),
    Verified(Output),
    NoQuorum,
}

/// What referees said: who, of which output, and whether it is confirmed.
#[derive(Debug, Default)]
pub struct Referees {
    pub reports: Vec<(usize, Output, bool)>,
}

impl Referees {
    fn votes(&self, output: Output) -> Votes {
        let of = |confirms| self.reports.iter().filter(|r| r.1 == output && r.2 == confirms).count() as u32;
        Votes { good: of(true), bad: of(false) }
    }

    pub fn refuted(&self, output: Output) -> bool {
        self.votes(output).standing() == Standing::Refuted
    }

    /// Who said of an output what two others denied.
    pub fn overruled(&self) -> Vec<usize> {
        let wrong = |r: &&(usize, Output, bool)| {
            let votes = self.votes(r.1);
            let (with, against) = if r.2 { (votes.good, votes.bad) } else { (votes.bad, votes.good) };
            against >= 2 && against > with
        };
        let mut found: Vec<usize> = self.reports.iter().filter(wrong).map(|r| r.0).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether they deny what a quorum of the replicas asked for at first says.
    pub fn overturned(&self, results: &[(usize, Output)]) -> bool {
        let size = |output: Output| results.iter().filter(|r| r.1 == output).count();
        results.iter().any(|r| size(r.1) >= quorum(MIN_REPLICAS) as usize && self.refuted(r.1))
    }
}

/// What follows from the results so far. `audited`: referees look although all results are equal.
pub fn settle(
    results: &[(usize, Output)],
    with_referees: bool,
    audited: bool,
    referees: &Referees,
    no_more_nodes: bool,
) -> Round {
    let node = |at: usize| {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&(at as u64).to_be_bytes());
        NodeId(id)
    };
    let ballot = |r: &(usize, Output)| Ballot { node: node(r.0), answer: r.1.hash(), fit: true };
    let ballots: Vec<Ballot> = results.iter().map(ballot).collect();
    let outputs: BTreeMap<Hash32, Output> = results.iter().map(|r| (r.1.hash(), r.1)).collect();
    let decision = decide(&Question {
        k: MIN_REPLICAS,
        ballots: &ballots,
        audited,
        alike: &|a, b| a == b,
        votes: &|answer| outputs.get(answer).map(|o| referees.votes(*o)).unwrap_or_default(),
        no_more_nodes,
        no_more_referees: !with_referees,
    });
    match decision {
        Decision::Verified { members } => {
            let first = results.iter().find(|r| members.contains(&node(r.0)));
            first.map_or(Round::NoQuorum, |r| Round::Verified(r.1))
        }
        Decision::MoreReferees { count, answers } => {
            Round::Referees(count as usize, answers.iter().filter_map(|a| outputs.get(a).copied()).collect())
        }
        Decision::MoreNodes { count } => Round::Nodes(count as usize),
        Decision::NoQuorum => Round::NoQuorum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Output::{Right, Wrong};

    #[test]
    fn equal_results_are_verified_and_unequal_ones_are_looked_at() {
        let equal = [(0, Right), (1, Right), (2, Right)];
        let none = Referees::default();
        assert_eq!(settle(&equal, true, false, &none, false), Round::Verified(Right));
        assert_eq!(settle(&equal, true, true, &none, false), Round::Referees(1, vec![Right]));
        let unequal = [(0, Right), (1, Wrong(0)), (2, Wrong(0))];
        assert_eq!(settle(&unequal, false, true, &none, false), Round::Verified(Wrong(0)));
        assert_eq!(settle(&unequal, true, false, &none, false), Round::Referees(1, vec![Right, Wrong(0)]));
        let doubt = Referees { reports: vec![(7, Right, true), (7, Wrong(0), false)] };
        assert_eq!(settle(&unequal, true, false, &doubt, false), Round::Referees(2, vec![Wrong(0)]));
    }

    #[test]
    fn two_of_three_referees_decide_over_a_majority_too() {
        let unequal = [(0, Right), (1, Wrong(0)), (2, Wrong(0))];
        let said = |words: [bool; 3]| {
            let mut reports = vec![(7, Right, true)];
            reports.extend((7..).zip(words).map(|(at, word)| (at, Wrong(0), word)));
            Referees { reports }
        };
        let two = said([false, true, false]);
        assert_eq!(settle(&unequal, true, false, &two, false), Round::Nodes(2));
        assert_eq!(settle(&unequal, true, false, &two, true), Round::NoQuorum);
        assert_eq!((two.overruled(), two.overturned(&unequal)), (vec![8], true));
        let more = [(0, Right), (1, Wrong(0)), (2, Wrong(0)), (3, Right), (4, Right)];
        assert_eq!(settle(&more, true, false, &two, false), Round::Verified(Right));
        let lost = said([false, true, true]);
        assert_eq!(settle(&unequal, true, false, &lost, false), Round::Verified(Wrong(0)));
        assert_eq!((lost.overruled(), lost.overturned(&unequal)), (vec![7], false));
    }
}
