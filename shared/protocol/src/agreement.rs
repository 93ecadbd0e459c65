//! Agreement (protocol section 7): which results are the same answer, and whether they are enough.
//!
//! Pure, and independent of the order of the results. Equal results agree. Unequal results can at
//! most be [`Relation::Unconfirmed`]: near-tie at the parting and similar in meaning, but the rest
//! of each text is unexamined, so they count as agreeing only once a referee has confirmed both.

use crate::{
    bytes::{Hash32, NodeId},
    calibration::Bounds,
    fingerprint::Fingerprint,
    request::{MAX_REPLICAS, Output, Request},
    sampling::gumbel,
};
use std::collections::{BTreeMap, BTreeSet};

/// Similarity of equal texts, millionths.
pub const FULL_SIMILARITY_MILLIONTHS: u32 = 1_000_000;

/// How two results stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    Equal,
    /// Parted at a near-tie and alike in meaning: a referee has to look at both.
    Unconfirmed {
        parting: usize,
    },
    Disagree(Disagreement),
}

/// Why two results disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disagreement {
    /// Same tokens, another finish reason.
    Finish,
    /// The two classes have no calibration.
    Uncalibrated,
    /// A fingerprint at the parting is missing or not decodable.
    Fingerprint,
    /// Before the parting both saw the same text, but not the same distribution.
    Distribution { parting: usize },
    /// The two tokens were not nearly tied.
    NotATie { parting: usize },
    /// The embeddings are further apart than the model's threshold.
    Similarity,
    /// One of them does not keep to the request's grammar or its stop strings: it agrees with nothing. Found with the
    /// model's vocabulary, not by [`compare`].
    Unfit,
}

/// Compares two results of one request. `bounds` are those of their classes, `similarity_millionths` is the cosine of
/// their embeddings.
pub fn compare(
    request: &Request,
    bounds: Option<&Bounds>,
    threshold_millionths: u32,
    a: &Output,
    b: &Output,
    similarity_millionths: u32,
) -> Relation {
    let parting = a.tokens.iter().zip(&b.tokens).take_while(|(x, y)| x == y).count();
    if parting == a.tokens.len() && parting == b.tokens.len() {
        return if a.finish == b.finish { Relation::Equal } else { Relation::Disagree(Disagreement::Finish) };
    }
    let Some(bounds) = bounds else { return Relation::Disagree(Disagreement::Uncalibrated) };
    let (Some(&token_a), Some(&token_b)) = (a.tokens.get(parting), b.tokens.get(parting)) else {
        // One is a prefix of the other: it ended where the other went on. The seeded choice of an
        // end token is a token, so this is no near-tie but a cut.
        return Relation::Disagree(Disagreement::NotATie { parting });
    };
    let (Some(print_a), Some(print_b)) = (fingerprint_at(a, parting), fingerprint_at(b, parting)) else {
        return Relation::Disagree(Disagreement::Fingerprint);
    };
    if !same_distribution(&print_a, &print_b, bounds) {
        return Relation::Disagree(Disagreement::Distribution { parting });
    }
    let place = Parting { request, prefix: &a.tokens[..parting] };
    let score = |print: &Fingerprint, token: u32| place.score_in(print, token);
    let margin = f64::from(bounds.near_tie_milli) / 1_000.0;
    let tied = |print: &Fingerprint, own: u32, other: u32| {
        let own = score(print, own);
        own.is_some_and(|own| own - score(print, other).unwrap_or_else(|| place.cut(print)) < margin)
    };
    if !(tied(&print_a, token_a, token_b) && tied(&print_b, token_b, token_a)) {
        return Relation::Disagree(Disagreement::NotATie { parting });
    }
    if similarity_millionths < threshold_millionths {
        return Relation::Disagree(Disagreement::Similarity);
    }
    Relation::Unconfirmed { parting }
}

fn fingerprint_at(output: &Output, position: usize) -> Option<Fingerprint> {
    Fingerprint::decode_all(&output.fingerprints).ok()?.into_iter().nth(position)
}

fn same_distribution(a: &Fingerprint, b: &Fingerprint, bounds: &Bounds) -> bool {
    let tolerance = f64::from(bounds.fingerprint_milli) / 1_000.0;
    let mut shared = 0;
    for x in a.entries() {
        if let Some(y) = b.entries().iter().find(|y| y.token == x.token) {
            shared += 1;
            if f64::from((x.logprob() - y.logprob()).abs()) > tolerance {
                return false;
            }
        }
    }
    shared > 0
}

/// Where two results part: everything before it is common, so that the draw's adjustments are known.
struct Parting<'a> {
    request: &'a Request,
    prefix: &'a [u32],
}

impl Parting<'_> {
    /// z + T g up to a constant of the position: the raw log-probability stands for the model's logit, bias and
    /// penalties are added as the draw did.
    fn score_in(&self, print: &Fingerprint, token: u32) -> Option<f64> {
        let sampling = &self.request.sampling;
        let entry = print.entries().iter().find(|e| e.token == token)?;
        let times = self.prefix.iter().filter(|t| **t == token).count();
        let z = sampling.adjust(token, entry.logprob(), u32::try_from(times).unwrap_or(u32::MAX));
        let position = u32::try_from(self.prefix.len()).unwrap_or(u32::MAX);
        Some(f64::from(z) + f64::from(sampling.temperature) * gumbel(self.request.seed, position, token))
    }

    /// A token just outside the candidates counts by its distance to the cut: the lowest listed score.
    fn cut(&self, print: &Fingerprint) -> f64 {
        let scores = print.entries().iter().filter_map(|e| self.score_in(print, e.token));
        scores.fold(f64::INFINITY, f64::min)
    }
}

/// A revealed result as it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ballot {
    pub node: NodeId,
    /// [`Output::hash`].
    pub answer: Hash32,
    /// Keeps to the request's grammar and its stop strings; one that does not agrees with nothing.
    pub fit: bool,
}

/// What referees said about one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Votes {
    pub good: u32,
    pub bad: u32,
}

/// Where an answer stands by its votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Unscored,
    Confirmed,
    /// Somebody marks it bad, and two of three have not decided yet.
    Contested,
    Refuted,
}

/// Votes that decide about an answer once one of them is against it.
pub const DECIDING_VOTES: u32 = 3;

impl Votes {
    pub fn standing(self) -> Standing {
        let needed = DECIDING_VOTES / 2 + 1;
        match self {
            Self { good: 0, bad: 0 } => Standing::Unscored,
            Self { bad: 0, .. } => Standing::Confirmed,
            Self { good, bad } if bad >= needed && bad > good => Standing::Refuted,
            Self { good, bad } if good >= needed && good > bad => Standing::Confirmed,
            _ => Standing::Contested,
        }
    }

    /// Further votes that this answer needs.
    fn missing(self) -> u32 {
        match self.standing() {
            Standing::Unscored => 1,
            Standing::Contested => DECIDING_VOTES.saturating_sub(self.good + self.bad).max(1),
            Standing::Confirmed | Standing::Refuted => 0,
        }
    }
}

/// What is known when it is to be decided.
pub struct Question<'a> {
    /// Replicas that were asked for; more results than that raise it.
    pub k: u32,
    pub ballots: &'a [Ballot],
    /// Even equal results are to be refereed.
    pub audited: bool,
    /// Whether two different answers are nearly tied where they part, and alike.
    pub alike: &'a dyn Fn(&Hash32, &Hash32) -> bool,
    pub votes: &'a dyn Fn(&Hash32) -> Votes,
    /// No further operator can be drawn.
    pub no_more_nodes: bool,
    /// No further operator can referee.
    pub no_more_referees: bool,
}

/// What follows from the results that were revealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The largest set of agreeing results is a strict majority of k. Members by node id.
    Verified {
        members: Vec<NodeId>,
    },
    /// So many referees are to score these answers; in the order of their hashes.
    MoreReferees {
        count: u32,
        answers: Vec<Hash32>,
    },
    MoreNodes {
        count: u32,
    },
    NoQuorum,
}

/// Members that a verified set needs for k replicas: floor(k/2) + 1.
pub fn quorum(k: u32) -> u32 {
    k / 2 + 1
}

/// Decides. The order of the ballots does not matter; of several ballots of a node the first one counts.
///
/// - Unequal results, and audited ones, are scored by referees first. A vote against an answer draws two more, and two
///   of three decide, over the replicas' majority too.
/// - Equal results agree unless they are refuted. Different ones agree only if all are confirmed and each two are alike.
/// - Where nobody is left to decide about a contested answer, its replicas' word counts as it would without referees.
pub fn decide(question: &Question<'_>) -> Decision {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut nodes = BTreeSet::new();
    let mut answers = Answers::new();
    for ballot in question.ballots.iter().filter(|ballot| nodes.insert(ballot.node)) {
        if ballot.fit {
            answers.entry(ballot.answer).or_default().push(ballot.node);
        }
    }
    let k = question.k.max(count(nodes.len()));
    let unequal = answers.len() > 1 || answers.values().map(Vec::len).sum::<usize>() < nodes.len();
    if (question.audited || unequal) && !question.no_more_referees {
        let missing = |answer: &Hash32| (question.votes)(answer).missing();
        let asked: Vec<Hash32> = answers.keys().copied().filter(|answer| missing(answer) > 0).collect();
        if let Some(count) = asked.iter().map(missing).max() {
            return Decision::MoreReferees { count, answers: asked };
        }
    }
    let members = largest(&answers, question);
    if count(members.len()) >= quorum(k) {
        Decision::Verified { members }
    } else if question.no_more_nodes || k >= MAX_REPLICAS {
        Decision::NoQuorum
    } else {
        Decision::MoreNodes { count: (MAX_REPLICAS - k).min(2) }
    }
}

/// Distinct answers that are fit, and who gave them.
type Answers = BTreeMap<Hash32, Vec<NodeId>>;

/// The largest set of nodes whose answers agree, by node id; of several the first in the order of their ids.
fn largest(answers: &Answers, question: &Question<'_>) -> Vec<NodeId> {
    let standing = |answer: &Hash32| (question.votes)(answer).standing();
    let candidates: Vec<(&Hash32, &Vec<NodeId>, Standing)> = answers
        .iter()
        .map(|(answer, nodes)| (answer, nodes, standing(answer)))
        .filter(|(_, _, standing)| *standing != Standing::Refuted)
        // More than may ever be asked for have no majority anyway.
        .take(MAX_REPLICAS as usize)
        .collect();
    let agree = |set: u32| {
        let chosen = || candidates.iter().enumerate().filter(move |(i, _)| set >> i & 1 == 1).map(|(_, c)| c);
        set.count_ones() == 1
            || chosen().all(|(_, _, standing)| *standing == Standing::Confirmed)
                && chosen().all(|(a, ..)| chosen().all(|(b, ..)| a >= b || (question.alike)(a, b)))
    };
    let members = |set: u32| {
        let chosen = candidates.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1);
        let mut nodes: Vec<NodeId> = chosen.flat_map(|(_, (_, nodes, _))| nodes.iter().copied()).collect();
        nodes.sort();
        nodes
    };
    (1..1_u32 << candidates.len())
        .filter(|set| agree(*set))
        .map(members)
        .max_by(|a, b| a.len().cmp(&b.len()).then_with(|| b.cmp(a)))
        .unwrap_or_default()
}

#[cfg(test)]
#[path = "agreement_tests.rs"]
mod tests;
