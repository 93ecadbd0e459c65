//! Verdicts over the bus, on both columns of the ports table.

use infera_protocol::evidence::Evidence;
use infera_protocol::grammar::{Grammar, GrammarKind};
use infera_protocol::receipt::Receipt;
use infera_protocol::request::{Finish, Output};
use infera_testkit::eventually;
use infera_testkit::evidence::{Answer, Case, Referee, fingerprint, output};
use infera_wire::topology::queues;
use infera_wire::v1::verdict::Outcome;
use infera_wire::{Message, v1};
use uuid::Uuid;

use crate::harness::{On, PATIENCE, World, tokens};

macro_rules! on_both {
    ($($name:ident)*) => {
        mod embedded { $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() { Box::pin(super::$name(super::World::new(super::On::Embedded).await)).await; }
        )* }
        mod cluster { $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() { Box::pin(super::$name(super::World::new(super::On::Cluster).await)).await; }
        )* }
    };
}

on_both! {
    equal_answers_are_verified
    an_outlier_is_left_out_and_alarms_the_exact_class
    too_few_equal_answers_ask_for_more_nodes_then_for_none
    an_older_attempt_never_fails_a_newer_one
    repeats_get_the_stored_bytes
    the_first_to_close_wins
    close_and_collected_race_to_one_closing_verdict
    garbage_is_dead_lettered_and_stops_nothing
    a_restart_goes_on
    a_result_that_breaks_its_grammar_agrees_with_nothing
    a_result_that_misses_its_stop_string_agrees_with_nothing
}

fn answer(text: &str) -> Answer {
    Answer::tokens(&tokens(text))
}

fn verified(verdict: &v1::Verdict) -> &v1::Verified {
    match &verdict.outcome {
        Some(Outcome::Verified(verified)) => verified,
        other => panic!("expected a verified outcome, got {}", name(other)),
    }
}

fn failed(verdict: &v1::Verdict) -> &str {
    match &verdict.outcome {
        Some(Outcome::Failed(failed)) => &failed.code,
        other => panic!("expected a failed outcome, got {}", name(other)),
    }
}

fn name(outcome: &Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Verified(_)) => "verified",
        Some(Outcome::MoreNodes(_)) => "more nodes",
        Some(Outcome::MoreReferees(_)) => "more referees",
        Some(Outcome::Failed(_)) => "failed",
        None => "nothing",
    }
}

async fn equal_answers_are_verified(mut world: World) {
    let verifier = world.start().await;
    let case = Case::new(&world.network).answers(vec![answer("Paris."); 3]);
    world.collect(&case).await;

    let (_, verdict) = world.verdict().await;
    assert_eq!(verdict.request_id, case.request.id.as_bytes());
    assert_eq!((verdict.attempt, verdict.round, verdict.account.as_str()), (1, 1, "alice"));
    let verified = verified(&verdict);
    assert_eq!(verified.tokens, tokens("Paris."), "the end token stays");
    assert_eq!(verified.nodes.len(), 3);
    // The evidence is what a receipt follows from, and its first node is the delivered one.
    let evidence: Evidence = serde_json::from_slice(&verified.evidence).unwrap();
    assert_eq!(evidence.canonical().unwrap(), verified.evidence);
    let receipt = Receipt::build(&evidence).unwrap();
    let nodes: Vec<Vec<u8>> = receipt.verified.iter().map(|v| v.node.to_vec()).collect();
    assert_eq!(nodes, verified.nodes);

    let (status, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    assert_eq!((status, body["closed"].as_bool()), (200, Some(true)));
    let view = &body["verdicts"][0];
    assert_eq!(view["outcome"], "verified");
    assert_eq!(view["slots"].as_array().unwrap().len(), 3);
    assert_eq!(view["relations"].as_array().unwrap().len(), 3);
    assert!(view["relations"].as_array().unwrap().iter().all(|pair| pair["relation"] == "equal"));
    let text = body.to_string();
    assert!(!text.contains("tokens") && !text.contains("Paris"), "no content: {text}");
    assert_eq!(verifier.metric("infera_verifier_exact_inequality_total", "").await, 0.0);

    let (status, body) = verifier.get("/v1/verdicts/nonsense").await;
    assert_eq!((status, body["error"]["param"].as_str()), (400, Some("request_id")));
    let (status, _) = verifier.get(&format!("/v1/verdicts/{}", Uuid::now_v7())).await;
    assert_eq!(status, 404);
    let ready = || async { verifier.get("/readyz").await.0 == 200 };
    eventually(PATIENCE, ready).await;
    verifier.stop().await;
}

async fn an_outlier_is_left_out_and_alarms_the_exact_class(mut world: World) {
    let verifier = world.start().await;
    let answers =
        [answer("The capital is Paris."), answer("Bananas are yellow."), answer("The capital is Paris.")];
    let mut case = Case::new(&world.network).answers(answers);
    world.collect(&case).await;
    // Inequality is refereed; who denies an answer is followed by two more, as far as there are.
    let more = |verdict: &v1::Verdict| match &verdict.outcome {
        Some(Outcome::MoreReferees(more)) => (more.count, more.answers.len()),
        other => panic!("expected more referees, got {}", name(other)),
    };
    assert_eq!(more(&world.verdict().await.1), (1, 2));
    let denies = Referee::Denies(vec![tokens("Bananas are yellow.")]);
    case = Case { round: 2, ..case }.referees([denies.clone()]);
    world.collect(&case).await;
    assert_eq!(more(&world.verdict().await.1), (2, 1));
    case = Case { round: 3, ..case }.referees([denies.clone(), denies]);
    world.collect(&case).await;
    let (_, verdict) = world.verdict().await;
    let conduct: Vec<&str> = verdict.conduct.iter().map(|c| c.finding.as_str()).collect();
    assert_eq!(conduct, ["verified", "answer", "verified", "completed", "completed"]);
    let outcome = verified(&verdict);
    assert_eq!(outcome.nodes.len(), 2);
    assert_eq!(outcome.tokens, tokens("The capital is Paris."));

    let (_, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    let relations = body["verdicts"][2]["relations"].as_array().unwrap();
    let of = |relation: &str| relations.iter().filter(|pair| pair["relation"] == relation).count();
    assert_eq!((of("equal"), relations.len()), (1, 3), "{relations:?}");
    let unequal = relations.iter().find(|pair| pair["relation"] != "equal").unwrap();
    let similarity = unequal["similarity_millionths"].as_i64().unwrap();
    assert!(similarity < 500_000, "bananas are not the capital: {similarity}");
    assert_eq!(verifier.metric("infera_verifier_exact_inequality_total", "").await, 1.0);

    // Elsewhere inequality is no alarm about the class, and near-ties that mean the same are found.
    let (a, b) = (tokens("The capital is Paris."), tokens("The capital was Paris."));
    let parting = a.iter().zip(&b).position(|(x, y)| x != y).unwrap();
    let tie = |own: &[u32], other: &[u32]| {
        let mut output = output(own, Finish::Eos);
        output.fingerprints = (0..own.len())
            .flat_map(|at| {
                let beside = if at == parting { other[at] } else { own[at] ^ 1 };
                fingerprint(&[own[at], beside])
            })
            .collect();
        Answer::Output(output)
    };
    let mut case = Case::new(&world.network).answers([tie(&a, &b), tie(&b, &a), tie(&a, &b)]);
    case.class = "fast".to_owned();
    case = case.referees([Referee::confirms()]);
    world.collect(&case).await;
    let (_, verdict) = world.verdict().await;
    let outcome = verified(&verdict);
    assert_eq!(outcome.nodes.len(), 3, "each is confirmed, and they are alike");
    let lowest = outcome.lowest_similarity_millionths;
    assert!((600_000..1_000_000).contains(&lowest), "{lowest}");
    let receipt = Receipt::build(&serde_json::from_slice(&outcome.evidence).unwrap()).unwrap();
    assert_eq!((receipt.referees.len(), receipt.lowest_similarity_millionths), (1, lowest));
    let (_, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    let relations = body["verdicts"][0]["relations"].as_array().unwrap();
    let unconfirmed: Vec<_> = relations.iter().filter(|pair| pair["relation"] == "unconfirmed").collect();
    assert_eq!(unconfirmed.len(), 2, "{relations:?}");
    assert_eq!(unconfirmed[0]["parting"].as_u64(), Some(parting as u64));
    assert_eq!(verifier.metric("infera_verifier_exact_inequality_total", "").await, 1.0);
    verifier.stop().await;
}

async fn too_few_equal_answers_ask_for_more_nodes_then_for_none(mut world: World) {
    let verifier = world.start().await;
    let mut case = Case::new(&world.network)
        .answers([answer("One."), answer("Two."), answer("Three.")])
        .referees([Referee::confirms()]);
    case.nodes = 9;
    world.collect(&case).await;
    let (first, verdict) = world.verdict().await;
    assert!(matches!(&verdict.outcome, Some(Outcome::MoreNodes(more)) if more.count == 2));

    // With two more, one of them silent, nobody has a majority and nobody is left.
    case.round = 2;
    case.exhausted = true;
    case.answers.extend([answer("Two."), Answer::NoReveal(output(&[5, 2], Finish::Eos))]);
    world.collect(&case).await;
    let (second, verdict) = world.verdict().await;
    assert_eq!(failed(&verdict), "no_quorum");
    assert_ne!(first, second);
    let (_, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    assert_eq!(body["verdicts"].as_array().unwrap().len(), 2);
    assert_eq!(body["verdicts"][0]["more_nodes"], 2);
    assert_eq!(body["verdicts"][1]["code"], "no_quorum");
    assert_eq!(body["verdicts"][1]["slots"][4]["outcome"], "no_reveal");

    // Nobody answered at all.
    let mut silent =
        Case::new(&world.network).answers([Answer::NoCommit, Answer::Declined, Answer::Disconnected]);
    silent.exhausted = true;
    world.collect(&silent).await;
    assert_eq!(failed(&world.verdict().await.1), "no_nodes");

    // The same with a quorum among five.
    let mut case = Case::new(&world.network)
        .answers([answer("One."), answer("Two."), answer("Three.")])
        .referees([Referee::confirms()]);
    case.nodes = 9;
    world.collect(&case).await;
    world.verdict().await;
    case.round = 2;
    case.answers.extend([answer("Two."), answer("Two.")]);
    world.collect(&case).await;
    let (_, verdict) = world.verdict().await;
    assert_eq!(verified(&verdict).nodes.len(), 3);
    assert_eq!(verified(&verdict).tokens, tokens("Two."));
    verifier.stop().await;
}

async fn an_older_attempt_never_fails_a_newer_one(mut world: World) {
    let verifier = world.start().await;
    let split = vec![answer("One."), answer("Two."), answer("Three.")];
    let mut newer = Case {
        attempt: 2,
        nodes: 9,
        ..Case::new(&world.network).answers(split).referees([Referee::confirms()])
    };
    world.collect(&newer).await;
    assert!(matches!(world.verdict().await.1.outcome, Some(Outcome::MoreNodes(_))));
    let older = Case { attempt: 1, exhausted: true, ..newer.clone() };
    world.collect(&older).await;
    world.settled().await;
    newer.round = 2;
    newer.answers.extend([answer("Two."), answer("Two.")]);
    world.collect(&newer).await;
    // Nothing was said about the older attempt in between.
    let (_, verdict) = world.verdict().await;
    assert_eq!((verified(&verdict).nodes.len(), verdict.attempt), (3, 2));
    // An older attempt with a majority may close.
    let first = Case::new(&world.network)
        .answers(vec![answer("One."), answer("Two."), answer("Three.")])
        .referees([Referee::confirms()]);
    let newer = Case { attempt: 2, nodes: 9, ..first.clone() };
    world.collect(&newer).await;
    world.verdict().await;
    world.collect(&Case { attempt: 1, answers: vec![answer("One."); 3], ..newer }).await;
    let (_, verdict) = world.verdict().await;
    assert_eq!((verified(&verdict).nodes.len(), verdict.attempt), (3, 1));
    verifier.stop().await;
}

async fn repeats_get_the_stored_bytes(mut world: World) {
    let verifier = world.start().await;
    let mut case = Case::new(&world.network)
        .answers([answer("One."), answer("Two."), answer("Three.")])
        .referees([Referee::confirms()]);
    case.nodes = 9;
    world.collect(&case).await;
    let first = world.verdict().await;

    // The same message again is the inbox's: nothing is said. Another message about the same round,
    // even with other content, gets what was said.
    world.collect(&case).await;
    let other = Case { answers: vec![answer("Four."); 3], ..case.clone() };
    world.settled().await;
    world.collect_as(&other, 1).await;
    assert_eq!(world.verdict().await, first);

    // Another attempt is another round.
    let second = Case { attempt: 2, answers: vec![answer("Four."); 3], ..case.clone() };
    world.collect(&second).await;
    let closing = world.verdict().await;
    assert_eq!(verified(&closing.1).tokens, tokens("Four."));

    // Closed: whatever comes gets the closing verdict.
    for (nth, late) in [(2, &case), (3, &Case { attempt: 3, ..case.clone() })] {
        world.settled().await;
        world.collect_as(late, nth).await;
        assert_eq!(world.verdict().await, closing);
    }
    world.settled().await;
    world.close(&case, "deadline").await;
    assert_eq!(world.verdict().await, closing);
    assert_eq!(verifier.metric("infera_verifier_verdicts_repeated_total", "").await, 4.0);
    assert_eq!(verifier.metric("infera_verifier_verdicts_total", "").await, 2.0);
    verifier.stop().await;
}

async fn the_first_to_close_wins(mut world: World) {
    let verifier = world.start().await;
    let case = Case::new(&world.network).answers(vec![answer("Paris."); 3]);
    world.close(&case, "cancelled").await;
    let closing = world.verdict().await;
    assert_eq!(failed(&closing.1), "cancelled");
    assert_eq!(closing.1.account, "alice");
    world.settled().await;
    world.collect(&case).await;
    assert_eq!(world.verdict().await, closing);
    let (_, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    assert_eq!(body["verdicts"].as_array().unwrap().len(), 1);
    assert_eq!(body["verdicts"][0]["code"], "cancelled");
    verifier.stop().await;
}

async fn close_and_collected_race_to_one_closing_verdict(mut world: World) {
    // Two replicas: on PostgreSQL their transactions overlap.
    let one = world.start().await;
    let two = if world.config().common.database_url.expose().starts_with("postgres") {
        Some(world.start().await)
    } else {
        None
    };
    let cases: Vec<Case> =
        (0..12).map(|_| Case::new(&world.network).answers(vec![answer("Paris."); 3])).collect();
    for case in &cases {
        world.collect(case).await;
        world.close(case, "deadline").await;
        world.collect_as(case, 1).await;
    }
    // Every message is answered, and never with two different closing verdicts.
    let answered = || async {
        let mut sum = 0.0;
        for replica in [Some(&one), two.as_ref()].into_iter().flatten() {
            sum += replica.metric("infera_verifier_verdicts_total", "").await;
            sum += replica.metric("infera_verifier_verdicts_repeated_total", "").await;
        }
        sum >= 3.0 * cases.len() as f64
    };
    eventually(PATIENCE, answered).await;
    let mut said: std::collections::BTreeMap<Vec<u8>, Vec<u8>> = std::collections::BTreeMap::new();
    while said.len() < cases.len() {
        let (_, verdict) = world.verdict().await;
        let bytes = verdict.encode_to_vec();
        let before = said.insert(verdict.request_id.clone(), bytes.clone());
        assert!(before.is_none_or(|before| before == bytes), "two closing verdicts for one request");
    }
    for case in &cases {
        let (_, body) = one.get(&format!("/v1/verdicts/{}", case.request.id)).await;
        assert_eq!(body["verdicts"].as_array().unwrap().len(), 1, "{body}");
    }
    one.stop().await;
    if let Some(two) = two {
        two.stop().await;
    }
}

async fn garbage_is_dead_lettered_and_stops_nothing(mut world: World) {
    let verifier = world.start().await;
    let good = Case::new(&world.network).answers(vec![answer("Paris."); 3]);
    let collected = |change: &dyn Fn(&mut v1::ResultsCollected)| {
        let mut wire = good.collected();
        change(&mut wire);
        wire.encode_to_vec()
    };
    let mut stranger = good.clone();
    stranger.network.dispatcher = infera_protocol::vrf::VrfSecret::from_seed(&[9; 32]).unwrap();
    let mut other_price = good.collected();
    other_price.funded.as_mut().unwrap().price_micro = 1;
    let bad: Vec<(Vec<u8>, &str)> = vec![
        (b"\xff\xff not protobuf".to_vec(), "results.collected"),
        (collected(&|w| w.funded = None), "collected.funded"),
        (stranger.collected().encode_to_vec(), "is not a dispatcher of this network"),
        (collected(&|w| w.assign_proof[0] ^= 1), "assignment"),
        (collected(&|w| w.post_proof[0] ^= 1), "post draw"),
        (collected(&|w| w.slots.swap(0, 1)), "the draw gives"),
        (collected(&|w| w.slots[1].reveal.as_mut().unwrap().salt[0] ^= 1), "do not fit together"),
        (collected(&|w| w.slots[1].commit.as_mut().unwrap().signature[0] ^= 1), "not signed by the node"),
        (collected(&|w| w.eligible.reverse()), "canonical order"),
        (collected(&|w| w.round = 0), "rounds count from 1"),
        (other_price.encode_to_vec(), "the registry says 2"),
        (
            collected(&|w| {
                let funded = w.funded.as_mut().unwrap();
                funded.submitted.as_mut().unwrap().reply_to = "a.b".into();
            }),
            "reply_to",
        ),
    ];
    for (body, reason) in &bad {
        world.say("results.collected", Uuid::now_v7(), body.clone()).await;
        let (queue, said) = world.dead_letter().await;
        assert_eq!(queue, queues::VERIFIER_COLLECTED);
        assert!(said.contains(reason), "expected `{reason}` in `{said}`");
    }
    let close = v1::CloseRequested { submitted: Some(good.submitted()), reason: "whim".to_owned() };
    world.say("close.requested", Uuid::now_v7(), close.encode_to_vec()).await;
    let (queue, said) = world.dead_letter().await;
    assert_eq!(queue, queues::VERIFIER_CLOSE);
    assert!(said.contains("`whim`"), "{said}");
    assert_eq!(verifier.metric("infera_verifier_rejected_total", "").await, bad.len() as f64 + 1.0);

    // None of it closed the request.
    world.collect(&good).await;
    assert_eq!(verified(&world.verdict().await.1).nodes.len(), 3);
    verifier.stop().await;
}

async fn a_restart_goes_on(mut world: World) {
    let case = Case::new(&world.network).answers(vec![answer("Paris."); 3]);
    let verifier = world.start().await;
    world.collect(&case).await;
    let closing = world.verdict().await;
    verifier.stop().await;

    // Collected while it was away.
    let later = Case::new(&world.network).answers(vec![answer("Rome."); 3]);
    world.collect(&later).await;
    world.collect_as(&case, 1).await;
    let verifier = world.start().await;
    let mut heard = [world.verdict().await, world.verdict().await];
    heard.sort_by_key(|(_, verdict)| verdict.request_id != case.request.id.as_bytes());
    assert_eq!(heard[0], closing);
    assert_eq!(verified(&heard[1].1).tokens, tokens("Rome."));
    verifier.stop().await;
}

#[test]
fn an_output_of_a_case_is_well_formed() {
    let Output { tokens, fingerprints, .. } = output(&[7, 8], Finish::Eos);
    assert_eq!(
        tokens.len(),
        infera_protocol::fingerprint::Fingerprint::decode_all(&fingerprints).unwrap().len()
    );
}

async fn a_result_that_breaks_its_grammar_agrees_with_nothing(mut world: World) {
    let verifier = world.start().await;
    // Without the end token: the grammar is at its end.
    let said = |text: &str, finish| {
        let mut ids = tokens(text);
        ids.pop();
        Answer::Output(output(&ids, finish))
    };
    let network = world.network.clone();
    let asked = |answers: Vec<Answer>| {
        let mut case = Case::new(&network).answers(answers).referees([Referee::confirms()]);
        case.request.grammar = Some(Grammar { kind: GrammarKind::Regex, text: "(yes|no)".into() });
        case
    };
    let (yes, other) = (said("yes", Finish::Grammar), said("yes indeed", Finish::Grammar));

    let case = asked(vec![yes.clone(), other.clone(), yes.clone()]);
    world.collect(&case).await;
    let (_, verdict) = world.verdict().await;
    let outcome = verified(&verdict);
    assert_eq!(outcome.nodes.len(), 2);
    assert_eq!(outcome.finish(), v1::Finish::Grammar);
    // The receipt follows from the evidence without a look at the grammar.
    let evidence: Evidence = serde_json::from_slice(&outcome.evidence).unwrap();
    let receipt = Receipt::build(&evidence).unwrap();
    let nodes: Vec<Vec<u8>> = receipt.verified.iter().map(|v| v.node.to_vec()).collect();
    assert_eq!(nodes, outcome.nodes);
    let (_, body) = verifier.get(&format!("/v1/verdicts/{}", case.request.id)).await;
    let relations = body["verdicts"][0]["relations"].as_array().unwrap();
    let of = |relation: &str| relations.iter().filter(|pair| pair["relation"] == relation).count();
    assert_eq!((of("equal"), of("unfit")), (1, 2), "{relations:?}");

    // A majority that breaks it is none.
    world.collect(&asked(vec![other.clone(), other.clone(), yes.clone()])).await;
    let (_, verdict) = world.verdict().await;
    assert!(matches!(verdict.outcome, Some(Outcome::MoreNodes(_))), "{}", name(&verdict.outcome));
    for wrong in [
        other,
        said("yes", Finish::Length),
        said("ye", Finish::Grammar),
        said("maybe", Finish::Length),
        Answer::Output(output(&tokens("yes"), Finish::Eos)),
    ] {
        let mut case = asked(vec![wrong.clone(); 3]);
        case.request.max_tokens = match &wrong {
            Answer::Output(output) if output.finish == Finish::Length => output.tokens.len() as u32,
            _ => 16,
        };
        case.exhausted = true;
        world.collect(&case).await;
        let (_, verdict) = world.verdict().await;
        assert_eq!(failed(&verdict), "no_quorum");
        let Some(Outcome::Failed(failed)) = &verdict.outcome else { panic!("failed") };
        assert!(failed.reason.contains("3 do not"), "{}", failed.reason);
    }

    // One that nobody can use is kept to by nobody.
    let mut case = asked(vec![yes; 3]);
    case.request.grammar = Some(Grammar { kind: GrammarKind::Regex, text: "(".into() });
    case.exhausted = true;
    world.collect(&case).await;
    assert_eq!(failed(&world.verdict().await.1), "no_quorum");
    verifier.stop().await;
}

async fn a_result_that_misses_its_stop_string_agrees_with_nothing(mut world: World) {
    let verifier = world.start().await;
    let said = |text: &str, finish| {
        let mut ids = tokens(text);
        ids.pop();
        Answer::Output(output(&ids, finish))
    };
    let stopped = said("one, two", Finish::Stop);
    let network = world.network.clone();
    let asked = |answers: Vec<Answer>| {
        let mut case = Case::new(&network).answers(answers).referees([Referee::confirms()]);
        case.request.stop = vec!["two".into(), "four".into()];
        case
    };
    world
        .collect(&asked(vec![stopped.clone(), said("one, two, three", Finish::Stop), stopped.clone()]))
        .await;
    assert_eq!(verified(&world.verdict().await.1).nodes.len(), 2);
    for wrong in ["one", "one, two, three"] {
        let mut case = asked(vec![said(wrong, Finish::Stop); 3]);
        case.exhausted = true;
        world.collect(&case).await;
        let (_, verdict) = world.verdict().await;
        let Some(Outcome::Failed(failed)) = &verdict.outcome else { panic!("failed") };
        assert!(failed.reason.contains("3 do not"), "{}", failed.reason);
    }
    verifier.stop().await;
}
