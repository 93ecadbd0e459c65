use super::*;
use crate::{
    calibration::tests::BOUNDS,
    fingerprint::Entry,
    request::{Finish, tests::sample},
};
use proptest::prelude::*;

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

/// Ballots as (node, answer), votes as (answer, good, bad); answers of the same ten are alike.
#[derive(Debug, Clone, Default)]
struct Given {
    ballots: Vec<(u8, u8)>,
    votes: Vec<(u8, u32, u32)>,
    audited: bool,
    no_more_nodes: bool,
    no_more_referees: bool,
}

fn h(answer: u8) -> Hash32 {
    Hash32([answer; 32])
}

fn n(node: u8) -> NodeId {
    NodeId([node; 32])
}

impl Given {
    fn new(ballots: &[(u8, u8)], votes: &[(u8, u32, u32)]) -> Self {
        Self { ballots: ballots.to_vec(), votes: votes.to_vec(), ..Self::default() }
    }

    fn exhausted(self) -> Self {
        Self { no_more_nodes: true, no_more_referees: true, ..self }
    }

    fn decide(&self) -> Decision {
        let ballots: Vec<Ballot> = self
            .ballots
            .iter()
            .map(|(node, answer)| Ballot { node: n(*node), answer: h(*answer), fit: *answer != UNFIT })
            .collect();
        decide(&Question {
            k: 3,
            ballots: &ballots,
            audited: self.audited,
            alike: &|a, b| a.0[0] / 10 == b.0[0] / 10,
            votes: &|answer| {
                let found = self.votes.iter().find(|(a, ..)| h(*a) == *answer);
                found.map_or(Votes::default(), |(_, good, bad)| Votes { good: *good, bad: *bad })
            },
            no_more_nodes: self.no_more_nodes,
            no_more_referees: self.no_more_referees,
        })
    }
}

const UNFIT: u8 = 255;

fn verified(nodes: &[u8]) -> Decision {
    Decision::Verified { members: nodes.iter().map(|i| n(*i)).collect() }
}

fn referees(count: u32, answers: &[u8]) -> Decision {
    Decision::MoreReferees { count, answers: answers.iter().map(|a| h(*a)).collect() }
}

#[test]
fn what_follows_from_ballots_and_votes() {
    let more = |count| Decision::MoreNodes { count };
    let audited = |given: Given| Given { audited: true, ..given };
    let alone = |given: Given| Given { no_more_referees: true, ..given };
    let new = Given::new;
    let all = &[(1, 1), (2, 1), (3, 1)];
    let outlier = &[(1, 1), (2, 90), (3, 1)];
    let near = &[(1, 1), (2, 2), (3, 3)];
    let table = [
        (new(all, &[]), verified(&[1, 2, 3])),
        (new(&[], &[]), more(2)),
        (new(&[(1, 1), (2, 1)], &[]).exhausted(), verified(&[1, 2])),
        // An audit: one referee, and two more if it objects.
        (audited(new(all, &[])), referees(1, &[1])),
        (audited(new(all, &[(1, 1, 0)])), verified(&[1, 2, 3])),
        (audited(new(all, &[(1, 0, 1)])), referees(2, &[1])),
        (audited(new(all, &[(1, 1, 1)])), referees(1, &[1])),
        (audited(new(all, &[(1, 2, 1)])), verified(&[1, 2, 3])),
        // Two of three decide over all replicas.
        (audited(new(all, &[(1, 1, 2)])), more(2)),
        (audited(new(all, &[(1, 1, 2)])).exhausted(), Decision::NoQuorum),
        // Nobody is left who could decide: the replicas' word stands, unless two referees deny it.
        (audited(new(all, &[(1, 0, 1)])).exhausted(), verified(&[1, 2, 3])),
        (audited(new(all, &[(1, 0, 2)])).exhausted(), Decision::NoQuorum),
        // Inequality is always refereed.
        (new(outlier, &[]), referees(1, &[1, 90])),
        (new(outlier, &[(1, 1, 0), (90, 0, 1)]), referees(2, &[90])),
        (new(outlier, &[(1, 3, 0), (90, 0, 3)]), verified(&[1, 3])),
        (new(outlier, &[(1, 0, 3), (90, 3, 0)]), more(2)),
        (alone(new(outlier, &[])), verified(&[1, 3])),
        (new(&[(1, 1), (2, UNFIT), (3, 1)], &[]), referees(1, &[1])),
        (new(&[(1, 1), (2, UNFIT), (3, 1)], &[(1, 1, 0)]), verified(&[1, 3])),
        // Near ties agree once each is confirmed, and never without.
        (new(near, &[(1, 1, 0), (2, 1, 0), (3, 1, 0)]), verified(&[1, 2, 3])),
        (new(near, &[(1, 1, 0), (2, 1, 0), (3, 0, 3)]), verified(&[1, 2])),
        (alone(new(near, &[])), more(2)),
        (new(near, &[(1, 1, 0), (2, 1, 0), (3, 0, 1)]).exhausted(), verified(&[1, 2])),
        (new(&[(1, 1), (2, 20), (3, 90)], &[(1, 1, 0), (20, 1, 0), (90, 1, 0)]), more(2)),
        // One node has one ballot.
        (new(&[(1, 1), (1, 1), (1, 1)], &[]).exhausted(), Decision::NoQuorum),
        (alone(new(&[(1, 1), (2, 1), (3, 20), (4, 20), (5, 90), (6, 90)], &[])), more(1)),
        (alone(new(&[(1, 1), (2, 1), (3, 1), (4, 20), (5, 20), (6, 20), (7, 90)], &[])), Decision::NoQuorum),
    ];
    for (given, expected) in table {
        assert_eq!(given.decide(), expected, "{given:?}");
    }
}

fn given() -> impl Strategy<Value = Given> {
    let answers = prop::sample::select(vec![1_u8, 2, 3, 20, 90, UNFIT]);
    let ballots = prop::collection::vec(answers, 0..7);
    let votes = prop::collection::vec((0_u32..4, 0_u32..4), 5);
    (ballots, votes, any::<(bool, bool, bool)>()).prop_map(|(answers, votes, flags)| Given {
        ballots: (0..).zip(answers).collect(),
        votes: [1, 2, 3, 20, 90].into_iter().zip(votes).map(|(a, (good, bad))| (a, good, bad)).collect(),
        audited: flags.0,
        no_more_nodes: flags.1,
        no_more_referees: flags.2,
    })
}

proptest! {
    #[test]
    fn the_order_of_results_never_matters(given in given(), rotation in 0_usize..7) {
        let mut rotated = given.clone();
        let by = rotation % rotated.ballots.len().max(1);
        rotated.ballots.rotate_left(by);
        prop_assert_eq!(rotated.decide(), given.decide());
    }

    #[test]
    fn a_dissenter_never_verifies(given in given(), votes in (0_u32..4, 0_u32..4), fit in any::<bool>()) {
        let mut more = given.clone();
        more.ballots.push((99, if fit { 200 } else { UNFIT }));
        more.votes.push((200, votes.0, votes.1));
        // Below k something is missing, not in dispute.
        if given.ballots.len() >= 3 && !matches!(given.decide(), Decision::Verified { .. }) {
            prop_assert!(!matches!(more.decide(), Decision::Verified { .. }), "{:?}", given);
        }
    }

    #[test]
    fn a_verified_set_is_a_majority_of_mutually_agreeing_results(given in given()) {
        let Decision::Verified { members } = given.decide() else { return Ok(()) };
        prop_assert!(members.len() >= 2 && 2 * members.len() > given.ballots.len().max(3));
        let answer = |node: &NodeId| given.ballots.iter().find(|(i, _)| n(*i) == *node).unwrap().1;
        let standing = |answer: u8| {
            let (_, good, bad) = given.votes.iter().find(|(a, ..)| *a == answer).unwrap();
            Votes { good: *good, bad: *bad }.standing()
        };
        for a in members.iter().map(answer) {
            prop_assert!(a != UNFIT && standing(a) != Standing::Refuted);
            for b in members.iter().map(answer) {
                let confirmed = standing(a) == Standing::Confirmed && standing(b) == Standing::Confirmed;
                prop_assert!(a == b || (a / 10 == b / 10 && confirmed));
            }
        }
    }

    #[test]
    fn a_strict_majority_of_honest_nodes_and_referees_wins(
        dishonest in prop::collection::vec(prop::sample::select(vec![2_u8, 20, 90, UNFIT]), 0..4),
        extra in 0_usize..2,
        lies in 0_u32..2,
        audited in any::<bool>(),
    ) {
        let honest = dishonest.len() + 1 + extra;
        prop_assume!(honest + dishonest.len() >= 3 && honest + dishonest.len() <= 7);
        let mut given = Given { audited, ..Given::default() };
        given.ballots = (0..honest).map(|i| (u8::try_from(i).unwrap(), 1)).collect();
        given.ballots.extend((100..).zip(dishonest));
        // Of three referees at most one lies.
        given.votes = vec![(1, 3 - lies, lies)];
        given.votes.extend([2, 20, 90].map(|answer| (answer, lies, 3 - lies)));
        let Decision::Verified { members } = given.decide() else { panic!("{given:?}: {:?}", given.decide()) };
        prop_assert_eq!(members, (0..honest).map(|i| n(u8::try_from(i).unwrap())).collect::<Vec<_>>());
    }
}
