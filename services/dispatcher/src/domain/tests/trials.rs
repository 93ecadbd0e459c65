//! Canaries, and what entry trials share with them.

use infera_protocol::evidence::RefereeOutcome;
use infera_protocol::hash::keccak;
use infera_protocol::judgement::Finding;
use infera_protocol::referee::{Report, report_digest};
use infera_protocol::trust::Reason;

use super::entries::{entering, on_trial};
use super::referees::{key_of, report};
use super::*;
use crate::domain::trials::{Ended, Kind, Outcome};

/// Request 1 at `nodes` nodes of as many operators, and a canary beside it.
fn with_canary(nodes: u8) -> Bench {
    with_canary_of(nodes, 3)
}

/// As [`with_canary`], by another dispatcher's key.
fn with_canary_of(nodes: u8, seed: u8) -> Bench {
    let mut bench = Bench::new();
    let key = VrfSecret::from_seed(&[seed; 32]).unwrap();
    bench.state = State::new(Rules { canary_ppm: 500_000, key, ..rules() });
    for n in 1..=nodes {
        let operator = Address([20 + n; 20]);
        bench.run(Command::NodeJoined(Connected { operator, ..connected(n, 1) })).unwrap();
    }
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    bench
}

/// The node with the canary, and what it was asked.
fn canary(bench: &Bench) -> (NodeId, Request) {
    let original = offer(1).funded.submitted.request.seed;
    let all: Vec<_> = bench.leases.iter().filter(|(_, request)| request.seed != original).collect();
    assert_eq!(all.len(), 1, "one canary");
    all[0].clone()
}

pub(super) fn number(node: NodeId) -> u8 {
    (1..=9).find(|n| node_id(&key(*n)) == node).unwrap()
}

pub(super) fn newcomer(n: u8) -> Connected {
    Connected { operator: Address([20 + n; 20]), ..connected(n, 1) }
}

/// Commits to this answer in a trial, and reveals it once it is asked for: by its attempt, where it is a canary.
pub(super) fn answer_trial(bench: &mut Bench, node: NodeId, asked: &Request, token: u32) {
    let reveal = commit_trial(bench, node, asked, token);
    if !bench.reveal_requests.contains(&node) {
        answer_all(bench);
    }
    bench.run(reveal).unwrap();
}

/// The nodes of attempt 1 commit to everybody's answer and reveal it.
fn answer_all(bench: &mut Bench) {
    for n in bench.drawn() {
        bench.run(commit(n, 1, 1, 0)).unwrap();
    }
    for n in bench.drawn() {
        bench.run(reveal(n, 1, 1, 0)).unwrap();
    }
}

/// Commits to this answer in a trial; gives its reveal.
fn commit_trial(bench: &mut Bench, node: NodeId, asked: &Request, token: u32) -> Command {
    let output = Output { tokens: vec![token, END_TOKEN], ..answer(1, 0).output };
    let reveal = Reveal { output, salt: Hash32([7; 32]) };
    let slot = Slot { request_hash: asked.hash(&DOMAIN), attempt: 1, node };
    let digest = commitment(&DOMAIN, &slot, &reveal.output, &reveal.salt);
    let commit = SignedCommitment { digest, signature: sign(&key_of(node), &digest) };
    let n = number(node);
    let statement = says(n, &slot, &digest);
    bench.run(Command::Committed { node, request: asked.id, attempt: 1, commit, statement }).unwrap();
    let (statement, reveal) = (says_of(n, &slot, &reveal), Box::new(reveal));
    Command::Revealed { node, request: asked.id, attempt: 1, reveal, statement }
}

/// The last job's report: right, or far off.
pub(super) fn say(bench: &mut Bench, is_good: bool) {
    let job = bench.jobs.last().unwrap().clone();
    let asked = convert::request(job.1.request.as_ref().unwrap()).unwrap();
    let subject = &job.1.subjects[0];
    let said = report(&job, |signed| {
        if is_good {
            return;
        }
        let mut wrong = Report::decode(&signed.scores).unwrap();
        wrong.scores[0].margin_micro = u32::MAX;
        signed.scores = wrong.encode();
        let output = Output {
            tokens: subject.tokens.clone(),
            fingerprints: Vec::new(),
            finish: convert::finish("finish", subject.finish).unwrap(),
        };
        let digest = report_digest(
            &DOMAIN,
            &asked.hash(&DOMAIN),
            job.1.attempt,
            &job.0,
            &output.hash(),
            &signed.scores,
        );
        signed.signature = sign(&key_of(job.0), &digest);
    });
    bench.run(said).unwrap();
}

pub(super) fn ended(bench: &Bench) -> &Ended {
    assert_eq!(bench.tried.len(), 1);
    &bench.tried[0]
}

pub(super) fn findings(ended: &Ended) -> Vec<Finding> {
    ended.conduct.iter().map(|conduct| conduct.finding).collect()
}

#[test]
fn an_honest_canary_passes_and_nobody_waits_for_it() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    assert_eq!(
        Request { seed: 1, ..asked.clone() },
        offer(1).funded.submitted.request,
        "only the seed differs"
    );
    let drawn = bench.drawn();
    assert!(!drawn.contains(&number(node)));
    for n in &drawn {
        bench.run(commit(*n, 1, 1, 0)).unwrap();
    }
    for n in &drawn {
        bench.run(reveal(*n, 1, 1, 0)).unwrap();
    }
    assert_eq!(bench.collected.len(), 1, "the request goes its way");
    bench.run(Command::Closed { request: asked.id }).unwrap();
    answer_trial(&mut bench, node, &asked, 55);
    let (referee, job) = bench.jobs[0].clone();
    let about = convert::request(job.request.as_ref().unwrap()).unwrap();
    assert!(about.id != asked.id && about.seed == asked.seed, "scored under its own seed and another name");
    assert!(about.id.get_version_num() == 7 && about.id.as_bytes()[..6] == asked.id.as_bytes()[..6]);
    assert!(job.traceparent != TRACEPARENT && job.traceparent.len() == TRACEPARENT.len());
    assert!(infera_runtime::trace::trace_id(&job.traceparent).is_some(), "{}", job.traceparent);
    assert!(referee != node && !drawn.contains(&number(referee)), "by somebody from outside");
    say(&mut bench, true);
    let ended = ended(&bench);
    assert_eq!((ended.kind, ended.outcome), (Kind::Canary, Outcome::Passed));
    assert_eq!(findings(ended), [Finding::Completed, Finding::Completed]);
    assert_eq!((ended.conduct[0].node, ended.conduct[1].node), (node, referee));
    assert_eq!(bench.busy(), 0);
}

#[test]
fn a_copy_fails_its_own_seed() {
    for (peers, reason) in [(true, Reason::Copy), (false, Reason::Answer)] {
        let mut bench = with_canary(6);
        let (node, asked) = canary(&bench);
        answer_all(&mut bench);
        let copied = answer(1, 0).output.tokens[0];
        answer_trial(&mut bench, node, &asked, if peers { copied } else { 77 });
        say(&mut bench, false);
        assert!(bench.tried.is_empty(), "one referee alone condemns nobody");
        say(&mut bench, false);
        assert_eq!(ended(&bench).outcome, Outcome::Failed);
        assert_eq!(findings(ended(&bench)), [Finding::Bad(reason), Finding::Completed, Finding::Completed]);
    }
}

#[test]
fn a_lying_referee_is_outvoted() {
    let mut bench = with_canary(7);
    let (node, asked) = canary(&bench);
    answer_trial(&mut bench, node, &asked, 55);
    for is_good in [false, true, true] {
        say(&mut bench, is_good);
    }
    assert_eq!(ended(&bench).outcome, Outcome::Passed);
    let report = Finding::Bad(Reason::Report);
    assert_eq!(findings(ended(&bench)), [Finding::Completed, report, Finding::Completed, Finding::Completed]);
}

#[test]
fn a_referee_that_misses_a_defect_in_a_trial_is_lazy_and_the_next_one_is_asked() {
    let answer = [55, END_TOKEN];
    let (mut planted, mut plain) = (0, 0);
    for seed in 0..240 {
        let mut bench = with_canary_of(7, seed);
        let (node, asked) = canary(&bench);
        answer_trial(&mut bench, node, &asked, answer[0]);
        let (referee, first) = bench.jobs[0].clone();
        if first.subjects[0].tokens == answer {
            plain += 1;
            continue;
        }
        planted += 1;
        assert_eq!(first.subjects[0].tokens.len(), 2, "one token is another");
        let notices = planted % 2 == 0;
        say(&mut bench, !notices);
        assert!(bench.tried.is_empty() && bench.jobs.len() == 2, "it says nothing about the answer");
        while bench.tried.is_empty() {
            say(&mut bench, true);
        }
        let expected = if notices { Finding::Completed } else { Finding::Bad(Reason::Planted) };
        assert_eq!((ended(&bench).outcome, ended(&bench).conduct[0].node), (Outcome::Passed, node));
        let of_first = ended(&bench).conduct.iter().find(|conduct| conduct.node == referee).unwrap();
        assert_eq!(of_first.finding, expected);
    }
    // One in twenty: 12 expected.
    assert!((4..=24).contains(&planted) && planted + plain == 240, "{planted}");
}

#[test]
fn nothing_follows_where_nobody_can_judge() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    answer_trial(&mut bench, node, &asked, 55);
    say(&mut bench, false);
    let second = bench.jobs[1].0;
    bench.run(Command::NodeLeft { node: second, session: Uuid::from_u128(1) }).unwrap();
    assert_eq!((ended(&bench).outcome, findings(ended(&bench))), (Outcome::Void, vec![]));
}

#[test]
fn who_does_not_answer_has_missed_it() {
    let leave: [fn(&mut Bench, NodeId); 3] = [
        |bench, _| bench.tick(1_000),
        |bench, node| {
            bench.run(Command::NodeLeft { node, session: Uuid::from_u128(1) }).unwrap();
            bench.tick(1_000);
        },
        |bench, node| bench.run(decline(number(node), 1, 1)).unwrap(),
    ];
    for leave in leave {
        let mut bench = with_canary(6);
        let (node, _) = canary(&bench);
        leave(&mut bench, node);
        let about: Vec<_> = bench.tried.iter().filter(|ended| ended.node == node).collect();
        assert_eq!(about.len(), 1);
        assert_eq!(findings(about[0]), [Finding::Missed]);
        assert!(bench.jobs.is_empty());
    }
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    answer_trial(&mut bench, node, &asked, 55);
    // Each referee is silent.
    bench.tick(700);
    bench.tick(700);
    assert_eq!(ended(&bench).outcome, Outcome::Void);
}

/// A request for the likeliest tokens.
fn greedy(id: u128, account: &str, prompt: Vec<u32>) -> Command {
    let mut funded = offer(id).funded;
    funded.submitted.account = account.to_owned();
    funded.submitted.request.sampling.temperature = 0.0;
    funded.submitted.request.prompt = prompt;
    let wire = funded_to_wire(&funded);
    Command::Offered(Box::new(Offer::new(funded, wire, &DOMAIN)))
}

/// Runs a greedy request beside a network of six; what the canary is asked.
fn greedy_canary(bench: &mut Bench, id: u128, account: &str, prompt: Vec<u32>) -> Option<(NodeId, Request)> {
    bench.run(greedy(id, account, prompt)).unwrap();
    let id = Uuid::from_u128(id);
    let canary = bench.leases.iter().find(|(_, asked)| asked.id == id && asked.seed != 1).cloned();
    bench.run(Command::Closed { request: id }).unwrap();
    canary
}

#[test]
fn the_canary_of_a_greedy_request_has_an_earlier_prompt() {
    let mut bench = with_canary(6);
    assert_eq!(greedy_canary(&mut bench, 2, "a", vec![7, 7]), None, "nothing differs");
    assert_eq!(greedy_canary(&mut bench, 3, "a", vec![7, 7]), None);
    // Room for 4 more tokens in a context of so many.
    let context = registry().models[0].context_length as usize;
    assert_eq!(greedy_canary(&mut bench, 4, "b", vec![8; context - 3]).unwrap().1.prompt, [7, 7]);
    let (node, asked) = greedy_canary(&mut bench, 5, "a", vec![9]).unwrap();
    assert_eq!((asked.prompt.as_slice(), asked.sampling.temperature), (&[7, 7][..], 0.0), "b's does not fit");
    assert_eq!(greedy_canary(&mut bench, 6, "c", vec![5]).unwrap().1.prompt, [9], "an account's last one");
    // Somebody else's answer is none to this prompt.
    let reveal = commit_trial(&mut bench, node, &asked, 55);
    bench.run(reveal).unwrap();
    say(&mut bench, false);
    say(&mut bench, false);
    let ended = bench.tried.iter().find(|ended| ended.node == node).unwrap();
    assert_eq!((ended.outcome, ended.conduct[0].finding), (Outcome::Failed, Finding::Bad(Reason::Answer)));
}

#[test]
fn one_account_does_not_fill_the_prompts() {
    let mut prompts = crate::domain::prompts::Prompts::default();
    let offered = |account: String, prompt| match greedy(1, &account, prompt) {
        Command::Offered(offer) => *offer,
        other => panic!("{other:?}"),
    };
    prompts.note(&offered("b".into(), vec![1, 2]));
    for n in 0..100 {
        prompts.note(&offered("a".into(), vec![n; 3]));
    }
    let other = |prompts: &crate::domain::prompts::Prompts, account: &str| {
        let offer = offered(account.into(), vec![1]);
        prompts.other(&Hash32([1; 32]), &offer, &rules()).map(<[u32]>::to_vec)
    };
    assert_eq!(other(&prompts, "a"), Some(vec![1, 2]));
    assert_eq!(other(&prompts, "b"), Some(vec![99; 3]));
    // The oldest go.
    for n in 0..32 {
        prompts.note(&offered(format!("c{n}"), vec![n; 4]));
    }
    for n in 0..100 {
        let offer = offered(format!("d{n}"), vec![1]);
        let kept = prompts.other(&keccak(&[&[n]]), &offer, &rules()).unwrap();
        assert_eq!(kept.len(), 4);
    }
    prompts.note(&offered("e".into(), vec![3; (1 << 18) - 9]));
    let kept = other(&prompts, "x");
    assert!(kept.is_some_and(|prompt| prompt.len() == 4), "what is left of the small ones");
}

#[test]
fn a_canary_is_asked_for_its_reveal_when_the_others_are() {
    let was_asked = |bench: &Bench, node| bench.reveal_requests.contains(&node);
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    let reveal = commit_trial(&mut bench, node, &asked, 55);
    assert_eq!(bench.run(reveal), Err(Rejection::NotAsked));
    let drawn = bench.drawn();
    bench.run(commit(drawn[0], 1, 1, 0)).unwrap();
    bench.run(commit(drawn[1], 1, 1, 0)).unwrap();
    bench.tick(900);
    assert!(bench.reveal_requests.is_empty());
    bench.run(commit(drawn[2], 1, 1, 0)).unwrap();
    assert!(was_asked(&bench, node) && bench.reveal_requests.len() == 4);

    // A late one has nobody to wait for, and neither has one whose attempt is gone.
    let mut bench = with_canary(6);
    answer_all(&mut bench);
    assert!(!was_asked(&bench, node));
    commit_trial(&mut bench, node, &asked, 55);
    assert!(was_asked(&bench, node));
    let mut bench = with_canary(6);
    commit_trial(&mut bench, node, &asked, 55);
    bench.run(Command::Closed { request: asked.id }).unwrap();
    assert!(was_asked(&bench, node));
    bench.tick(500);
    assert_eq!(findings(ended(&bench)), [Finding::Missed]);
}

#[test]
fn an_operator_that_referees_with_another_node_sees_both_seeds() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    let operator = Address([20 + number(node); 20]);
    let second = Connected { operator, ..connected(9, 1) };
    bench.run(Command::NodeJoined(second)).unwrap();
    let request = asked.id;
    let lease = v1::RefereeLease {
        request: bench.state.requests[&request].offer.wire.submitted.clone().unwrap().request,
        ..v1::RefereeLease::default()
    };
    let sent = Effect::Send { node: node_id(&key(9)), frame: frames::referee_lease(lease) };
    let State { trials, nodes, .. } = &mut bench.state;
    trials.watch(nodes, &[sent]);
    bench.tick(1_000);
    let (outcome, found) = (ended(&bench).outcome, findings(ended(&bench)));
    assert_eq!((outcome, found), (Outcome::Void, vec![]));
}

#[test]
fn a_canary_ends_with_its_attempt_and_frees_nothing_of_the_next() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    // Everybody else is full: the attempt begins anew.
    for _ in 0..2 {
        for n in (1..=6).filter(|n| *n != number(node)) {
            let _ = bench.run(decline(n, 1, 1));
        }
    }
    assert_eq!((ended(&bench).outcome, findings(ended(&bench))), (Outcome::Void, vec![]), "nobody missed it");
    bench.tick(2_000);
    assert_eq!(bench.attempts[&asked.id], 2);
    let busy = |bench: &Bench| {
        let views = bench.state.nodes();
        views.iter().find(|view| view.info.node == node).map(|view| view.busy)
    };
    let again = bench.leases.iter().filter(|(who, _)| *who == node).count() == 2;
    assert_eq!(busy(&bench), Some(u32::from(again)));
    let first = offer(1).funded.submitted.request.seed;
    let seeds = bench.leases.iter().map(|(_, request)| request.seed).filter(|seed| *seed != first);
    assert_eq!(seeds.count(), 1, "everybody knows the request's seed now");
    bench.tick(999);
    assert_eq!(busy(&bench), Some(u32::from(again)), "the lease of the second attempt is its own");
}

#[test]
fn who_comes_back_is_asked_again_as_in_any_slot() {
    for leaves in [false, true] {
        let mut bench = with_canary(6);
        let (node, asked) = canary(&bench);
        let info = newcomer(number(node));
        let back = |bench: &mut Bench, session: u128| {
            if leaves {
                let session = Uuid::from_u128(session - 1);
                bench.run(Command::NodeLeft { node, session }).unwrap();
            }
            let session = Uuid::from_u128(session);
            bench.run(Command::NodeJoined(Connected { session, ..info.clone() })).unwrap();
        };
        back(&mut bench, 2);
        let leases: Vec<_> = bench.leases.iter().filter(|(who, _)| *who == node).collect();
        assert_eq!(leases, [&(node, asked.clone()), &(node, asked.clone())]);
        let reveal = commit_trial(&mut bench, node, &asked, 55);
        answer_all(&mut bench);
        back(&mut bench, 3);
        let requests = bench.reveal_requests.iter().filter(|who| **who == node).count();
        assert_eq!(requests, 2);
        bench.run(reveal).unwrap();
        say(&mut bench, true);
        assert_eq!(ended(&bench).outcome, Outcome::Passed);
    }
}

#[test]
fn who_comes_back_as_somebody_else_is_not_asked_again() {
    let mut bench = with_canary(6);
    let (node, _) = canary(&bench);
    let class = "fast".to_owned();
    let other = Connected { session: Uuid::from_u128(2), class: class.clone(), ..newcomer(number(node)) };
    bench.run(Command::NodeJoined(other)).unwrap();
    assert_eq!(findings(ended(&bench)), [Finding::Missed]);
    assert_eq!(bench.leases.iter().filter(|(who, _)| *who == node).count(), 1);

    let mut bench = entering(3);
    let node = bench.leases[0].0;
    let other = Connected { session: Uuid::from_u128(2), class, ..newcomer(4) };
    bench.run(Command::NodeJoined(other)).unwrap();
    assert_eq!(ended(&bench).outcome, Outcome::Void);
    bench.tick(5_000);
    assert!(bench.refused.is_empty() && !on_trial(&bench), "nobody judges its new class: {node}");

    // While its answer is scored, too: what follows is the first operator's, and the second one's node is tried anew.
    for is_good in [true, false] {
        let mut bench = entering(3);
        let (node, asked) = bench.leases[0].clone();
        answer_trial(&mut bench, node, &asked, 5);
        let operator = Address([99; 20]);
        let other = Connected { session: Uuid::from_u128(2), operator, ..newcomer(4) };
        bench.run(Command::NodeJoined(other)).unwrap();
        (0..if is_good { 1 } else { 2 }).for_each(|_| say(&mut bench, is_good));
        let first = if is_good { Finding::Completed } else { Finding::Bad(Reason::Challenge) };
        assert_eq!((ended(&bench).outcome, findings(ended(&bench))[0]), (Outcome::Void, first));
        assert_eq!(ended(&bench).conduct[0].operator, newcomer(4).operator);
        assert!(on_trial(&bench) && bench.refused.is_empty(), "it was not tried itself");
        let (again, asked) = bench.leases[1].clone();
        assert_eq!(again, node);
        answer_trial(&mut bench, node, &asked, 5);
        say(&mut bench, true);
        assert_eq!((bench.tried[1].outcome, on_trial(&bench)), (Outcome::Passed, false));
    }
}

#[test]
fn a_canary_that_is_asked_to_referee_its_attempt_may_decline() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    commit_trial(&mut bench, node, &asked, 55);
    answer_all(&mut bench);
    assert_eq!(bench.run(decline(number(node), 1, 1)), Err(Rejection::NotLeased), "nobody has asked it");
    let answers = bench.evidence.as_ref().unwrap().answers().iter().map(|(hash, ..)| *hash).collect();
    bench.run(Command::MoreReferees { request: asked.id, attempt: 1, round: 1, count: 3, answers }).unwrap();
    for job in bench.jobs.clone().iter().filter(|(referee, _)| *referee != node) {
        bench.run(report(job, |_| ())).unwrap();
    }
    bench.run(decline(number(node), 1, 1)).unwrap();
    let outcomes = bench.evidence.as_ref().unwrap().referees.iter().map(|referee| referee.outcome);
    assert_eq!(outcomes.filter(|outcome| *outcome == RefereeOutcome::Declined).count(), 1);
    assert!(bench.collected.contains(&(asked.id, 1, 2)), "nobody waits for it");
}

#[test]
fn a_reveal_that_does_not_open_the_commitment_is_bad() {
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    let digest = Hash32([1; 32]);
    let commit = SignedCommitment { digest, signature: sign(&key_of(node), &digest) };
    let slot = Slot { request_hash: asked.hash(&DOMAIN), attempt: 1, node };
    let statement = says(number(node), &slot, &digest);
    bench.run(Command::Committed { node, request: asked.id, attempt: 1, commit, statement }).unwrap();
    answer_all(&mut bench);
    let reveal = Box::new(answer(1, 0));
    let statement = says_of(number(node), &slot, &reveal);
    bench.run(Command::Revealed { node, request: asked.id, attempt: 1, reveal, statement }).unwrap();
    assert_eq!(bench.false_reveals, 1);
    assert_eq!(findings(ended(&bench)), [Finding::Bad(Reason::Mismatch)]);
}

#[test]
fn the_canary_replaces_nobody_and_few_operators_have_none() {
    let mut bench = with_canary(6);
    let (node, _) = canary(&bench);
    for _ in 0..6 {
        let Some(n) =
            bench.drawn().into_iter().zip(bench.outcomes()).find(|(_, o)| o.is_none()).map(|(n, _)| n)
        else {
            break;
        };
        bench.run(decline(n, 1, 1)).unwrap();
        if bench.attempts[&Uuid::from_u128(1)] > 1 {
            break;
        }
        let drawn = bench.drawn().into_iter().zip(bench.outcomes());
        for (n, outcome) in drawn.filter(|(n, _)| *n == number(node)) {
            assert_eq!(outcome, Some(SlotOutcome::Busy), "{n}");
        }
    }
    let bench = with_canary(5);
    let original = offer(1).funded.submitted.request.seed;
    assert!(bench.leases.iter().all(|(_, request)| request.seed == original));
}

#[test]
fn a_canary_that_sees_both_seeds_shows_nothing() {
    // Six operators: three answer, one has the canary; all of the others referee the attempt.
    let mut bench = with_canary(6);
    let (node, asked) = canary(&bench);
    answer_all(&mut bench);
    let answers = bench.evidence.as_ref().unwrap().answers().iter().map(|(hash, ..)| *hash).collect();
    let request = asked.id;
    bench.run(Command::MoreReferees { request, attempt: 1, round: 1, count: 3, answers }).unwrap();
    assert!(bench.jobs.iter().any(|(referee, _)| *referee == node));
    answer_trial(&mut bench, node, &asked, 55);
    say(&mut bench, true);
    assert_eq!((ended(&bench).outcome, findings(ended(&bench))), (Outcome::Void, vec![]));
}
