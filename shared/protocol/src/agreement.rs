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
    /// One of them does not keep to the request's grammar: it agrees with nothing. Found with the
    /// model's vocabulary, not by [`compare`].
    Grammar,
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

/// What follows from the results that were revealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The largest set of equal results is a strict majority of k.
    Verified {
        members: Vec<NodeId>,
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

/// Decides over revealed results, each (node, output hash). `k` is what was asked for; more
/// results than that raise it. `exhausted`: no further operator can be drawn.
pub fn decide(k: u32, results: &[(NodeId, Hash32)], exhausted: bool) -> Decision {
    let revealed = u32::try_from(results.len()).unwrap_or(u32::MAX);
    let k = k.max(revealed);
    let mut groups: Vec<(Hash32, Vec<NodeId>)> = Vec::new();
    for (node, output) in results {
        match groups.iter_mut().find(|(hash, _)| hash == output) {
            Some((_, members)) if !members.contains(node) => members.push(*node),
            Some(_) => {}
            None => groups.push((*output, vec![*node])),
        }
    }
    let largest = groups.into_iter().max_by_key(|(_, members)| members.len());
    match largest {
        Some((_, mut members)) if members.len() >= quorum(k) as usize => {
            members.sort();
            Decision::Verified { members }
        }
        _ if exhausted || k >= MAX_REPLICAS => Decision::NoQuorum,
        _ => Decision::MoreNodes { count: (MAX_REPLICAS - k).min(2) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fingerprint::Entry,
        request::{Finish, tests::sample},
    };
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds {
        near_tie_milli: 300,
        fingerprint_milli: 100,
        margin_milli: 500,
        clip_milli: 200,
        mean_micro: 50_000,
        drift_micro: 10_000,
        drift_limit_micro: 100_000,
    };

    fn output(tokens: &[u32], second: f32) -> Output {
        let mut fingerprints = Vec::new();
        for &token in tokens {
            let other = if token == 8 { 9 } else { 8 };
            let print = Fingerprint::new(vec![
                Entry { token, logprob: half::f16::from_f32(-0.7).to_bits() },
                Entry { token: other, logprob: half::f16::from_f32(second).to_bits() },
            ])
            .unwrap();
            fingerprints.extend(print.encode());
        }
        Output { tokens: tokens.to_vec(), fingerprints, finish: Finish::Eos }
    }

    fn relation(a: &Output, b: &Output, similarity: u32) -> Relation {
        let mut request = sample();
        request.sampling.temperature = 0.0;
        compare(&request, Some(&BOUNDS), 500_000, a, b, similarity)
    }

    #[test]
    fn a_near_tie_is_unconfirmed_and_a_clear_choice_is_not() {
        let (a, b) = (output(&[1, 8, 3], -0.75), output(&[1, 9, 4], -0.75));
        assert_eq!(relation(&a, &a, 1_000_000), Relation::Equal);
        assert_eq!(relation(&a, &b, 900_000), Relation::Unconfirmed { parting: 1 });
        assert_eq!(relation(&b, &a, 900_000), Relation::Unconfirmed { parting: 1 });
        assert_eq!(relation(&a, &b, 400_000), Relation::Disagree(Disagreement::Similarity));
        let far = output(&[1, 9, 4], -3.0);
        assert!(matches!(
            relation(&a, &far, 900_000),
            Relation::Disagree(Disagreement::Distribution { parting: 1 })
        ));
        let clear = (output(&[1, 8, 3], -3.0), output(&[1, 9, 4], -3.0));
        assert!(matches!(relation(&clear.0, &clear.1, 900_000), Relation::Disagree(_)));
    }

    #[test]
    fn bias_and_penalties_count_where_results_part() {
        let (a, b) = (output(&[8, 8, 3], -0.75), output(&[8, 9, 4], -0.75));
        let relation = |change: fn(&mut crate::sampling::SamplingParams)| {
            let mut request = sample();
            request.sampling.temperature = 0.0;
            change(&mut request.sampling);
            compare(&request, Some(&BOUNDS), 500_000, &a, &b, 900_000)
        };
        assert_eq!(relation(|_| {}), Relation::Unconfirmed { parting: 1 });
        let not_tied = Relation::Disagree(Disagreement::NotATie { parting: 1 });
        assert_eq!(relation(|s| _ = s.logit_bias.insert(8, 5.0)), not_tied);
        // 8 was emitted once before the parting, 9 was not.
        assert_eq!(relation(|s| s.presence_penalty = -2.0), not_tied);
        let both = [(8, 5.0), (9, 5.0)];
        assert!(matches!(
            compare(
                &{
                    let mut request = sample();
                    request.sampling.temperature = 0.0;
                    request.sampling.logit_bias = both.into();
                    request
                },
                Some(&BOUNDS),
                500_000,
                &a,
                &b,
                900_000
            ),
            Relation::Unconfirmed { parting: 1 }
        ));
    }

    #[test]
    fn a_cut_answer_disagrees() {
        let (whole, cut) = (output(&[1, 8, 3], -0.75), output(&[1, 8], -0.75));
        assert!(matches!(relation(&whole, &cut, 1_000_000), Relation::Disagree(_)));
        let mut ended = whole.clone();
        ended.finish = Finish::Length;
        assert_eq!(relation(&whole, &ended, 1_000_000), Relation::Disagree(Disagreement::Finish));
    }

    #[test]
    fn quorum_table() {
        let n = |i: u8| NodeId([i; 32]);
        let h = |i: u8| Hash32([i; 32]);
        type Case<'a> = (&'a [(u8, u8)], bool, Decision);
        let cases: &[Case<'_>] = &[
            (&[(1, 1), (2, 1), (3, 1)], false, Decision::Verified { members: vec![n(1), n(2), n(3)] }),
            (&[(1, 1), (2, 9), (3, 1)], false, Decision::Verified { members: vec![n(1), n(3)] }),
            (&[(1, 1), (2, 1)], true, Decision::Verified { members: vec![n(1), n(2)] }),
            (&[(1, 1), (2, 2), (3, 3)], false, Decision::MoreNodes { count: 2 }),
            (&[(1, 1), (2, 2), (3, 3)], true, Decision::NoQuorum),
            (&[(1, 1), (1, 1), (1, 1)], true, Decision::NoQuorum),
            (&[], false, Decision::MoreNodes { count: 2 }),
            (&[(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)], false, Decision::MoreNodes { count: 1 }),
            (&[(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 3)], false, Decision::NoQuorum),
        ];
        for (results, exhausted, expected) in cases {
            let results: Vec<_> = results.iter().map(|(i, o)| (n(*i), h(*o))).collect();
            assert_eq!(decide(3, &results, *exhausted), *expected, "{results:?}");
        }
    }

    proptest! {
        #[test]
        fn order_never_matters_and_a_dissenter_never_verifies(
            outputs in proptest::collection::vec(0_u8..4, 0..7),
            exhausted in any::<bool>(),
            rotation in 0_usize..7,
        ) {
            let results: Vec<_> = outputs
                .iter()
                .enumerate()
                .map(|(i, o)| (NodeId([u8::try_from(i).unwrap(); 32]), Hash32([*o; 32])))
                .collect();
            let decision = decide(3, &results, exhausted);
            let mut rotated = results.clone();
            if !rotated.is_empty() {
                let by = rotation % rotated.len();
                rotated.rotate_left(by);
            }
            prop_assert_eq!(&decide(3, &rotated, exhausted), &decision);
            if !matches!(decision, Decision::Verified { .. }) && results.len() >= 3 {
                let mut more = results;
                more.push((NodeId([99; 32]), Hash32([200; 32])));
                prop_assert!(!matches!(decide(3, &more, exhausted), Decision::Verified { .. }), "unverified became verified");
            }
        }

        #[test]
        fn a_strict_majority_of_honest_nodes_wins(dishonest in proptest::collection::vec(1_u8..4, 0..4), extra in 0_usize..2) {
            let honest = dishonest.len() + 1 + extra;
            let mut results: Vec<_> = (0..honest).map(|i| (NodeId([u8::try_from(i).unwrap(); 32]), Hash32::ZERO)).collect();
            results.extend(dishonest.iter().enumerate().map(|(i, o)| (NodeId([u8::try_from(100 + i).unwrap(); 32]), Hash32([*o; 32]))));
            if results.len() >= 3 {
                let members: Vec<_> = (0..honest).map(|i| NodeId([u8::try_from(i).unwrap(); 32])).collect();
                prop_assert_eq!(decide(3, &results, true), Decision::Verified { members });
            }
        }
    }
}
