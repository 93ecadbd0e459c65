//! Admission by possession, referees, and what is remembered of operators.

use infera_protocol::bytes::Hash32;
use infera_protocol::evidence::RefereeOutcome;
use infera_protocol::judgement::{Conduct, Finding};
use infera_protocol::trust::Reason;
use infera_testkit::eventually;
use infera_testkit::synthetic::{Behaviour, SyntheticNode};
use infera_wire::convert;
use infera_wire::v1::{self, from_dispatcher, from_node, verdict::Outcome};
use serde_json::Value;
use uuid::Uuid;

use crate::world::{On, PATIENCE, World, nodes};

#[actix_rt::test]
async fn who_lacks_the_weights_is_not_admitted() {
    let mut world = World::new(On::Embedded).await;
    world.network.registry.releases = vec![Hash32([9; 32])];
    world.write_network();
    let running = world.start(world.config()).await;
    let node = SyntheticNode::new(&world.network, 1);
    let challenged = async || {
        let mut socket = node.dial(running.address).await;
        let hello = node.hello(&socket.nonce);
        socket.send(from_node::Message::Hello(hello)).await;
        match socket.next().await {
            Some(from_dispatcher::Message::RangeChallenge(challenge)) => (socket, challenge),
            other => panic!("not asked for the weights: {other:?}"),
        }
    };
    let (_, first) = challenged().await;
    let (_, second) = challenged().await;
    assert_ne!(first.ranges, second.ranges, "nobody knows the ranges before");

    type Spoil = fn(&mut v1::RangeProof);
    let spoils: [Spoil; 4] = [
        |proof| proof.slices[0][7] ^= 1,
        |proof| drop(proof.slices.pop()),
        |proof| proof.nonce[0] ^= 1,
        |proof| proof.slices[1].truncate(100),
    ];
    for spoil in spoils {
        let (mut socket, challenge) = challenged().await;
        let mut proof = node.prove(&challenge);
        spoil(&mut proof);
        socket.send(from_node::Message::RangeProof(proof)).await;
        assert_eq!(socket.refusal().await, "weights_unproven");
    }
    // An answer to an earlier challenge.
    let (mut socket, _) = challenged().await;
    socket.send(from_node::Message::RangeProof(node.prove(&first))).await;
    assert_eq!(socket.refusal().await, "weights_unproven");
    let (mut socket, _) = challenged().await;
    socket.send(from_node::Message::Draining(v1::Draining {})).await;
    assert_eq!(socket.refusal().await, "proof_expected");
    assert!(running.get("/v1/nodes").await.contains("\"nodes\":[]"));
    node.connect(running.address).await;
    running.stop().await;

    // A release that nobody approved.
    world.network.registry.releases = vec![Hash32([8; 32])];
    world.write_network();
    let running = world.start(world.config()).await;
    let mut socket = node.dial(running.address).await;
    let hello = node.hello(&socket.nonce);
    socket.send(from_node::Message::Hello(hello)).await;
    assert_eq!(socket.refusal().await, "unknown_release");
    running.stop().await;
}

#[actix_rt::test]
async fn weights_are_asked_for_again_and_again() {
    let world = World::new(On::Embedded).await;
    let mut config = world.config();
    (config.recheck_secs, config.proof_secs) = (1, 1);
    let running = world.start(config).await;
    let node = SyntheticNode::new(&world.network, 1);
    let mut socket = node.connect(running.address).await;
    let again = async |socket: &mut infera_testkit::synthetic::Socket| loop {
        match socket.next().await {
            Some(from_dispatcher::Message::RangeChallenge(challenge)) => return challenge,
            Some(_) => {}
            None => panic!("the session has ended"),
        }
    };
    let challenge = again(&mut socket).await;
    socket.send(from_node::Message::RangeProof(node.prove(&challenge))).await;
    again(&mut socket).await;
    // This one is not answered: the session ends, and the operator's record shows it.
    assert_eq!(socket.refusal().await, "weights_unproven");
    let operator = node.operator();
    let told = async || {
        let standing: Value =
            serde_json::from_str(&running.get(&format!("/v1/operators/{operator}")).await).unwrap();
        standing["last_faults"][0]["reason"] == "challenge"
    };
    eventually(PATIENCE, told).await;
    running.stop().await;
}

async fn referees_report_and_conduct_is_remembered(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let all = nodes(&world, 5);
    let mut playing = Vec::new();
    for node in &all {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let funded = world.funded(Uuid::now_v7(), 3);
    let offered = world.offer(&funded);
    let (_, evidence) = world.collected().await;
    assert!(evidence.is_audited(), "all operators are new");
    let answers = evidence.answers().iter().map(|(hash, ..)| hash.to_vec()).collect();
    world.verdict(offered.id, 1, 1, Outcome::MoreReferees(v1::MoreReferees { count: 2, answers }));
    let (collected, evidence) = world.collected().await;
    assert_eq!(collected.round, 2);
    let outcomes: Vec<_> = evidence.referees.iter().map(|referee| referee.outcome).collect();
    assert_eq!(outcomes, [RefereeOutcome::Reported; 2]);
    let decision = evidence.decide(collected.exhausted);
    let conduct = evidence.conduct(&decision);
    let asked: Vec<_> = playing.iter().filter(|node| !node.referee_leases().is_empty()).collect();
    assert_eq!(asked.len(), 2);
    for node in asked {
        assert!(node.leases().is_empty(), "a referee is no replica");
        let lease = &node.referee_leases()[0];
        assert!(lease.subjects.iter().all(|subject| !subject.tokens.is_empty()));
    }

    // The verdict, said twice under two ids, counts once.
    let slip = Conduct { finding: Finding::Bad(Reason::Answer), ..conduct[0].clone() };
    for id in [Uuid::now_v7(), Uuid::now_v7()] {
        let conduct = std::iter::once(&slip).chain(&conduct[1..]).map(convert::conduct_to_wire).collect();
        world.close_with(&offered, id, conduct).await;
    }
    let standing = async |operator: String| -> Value {
        serde_json::from_str(&running.get(&format!("/v1/operators/{operator}")).await).unwrap()
    };
    let bad = slip.operator.to_string();
    eventually(PATIENCE, async || standing(bad.clone()).await["bad_milli"] == 1_000).await;
    let told = standing(bad.clone()).await;
    assert_eq!((told["eligible"].as_bool(), told["audit_ppm"].as_u64()), (Some(false), Some(1_000_000)));
    assert_eq!(told["last_faults"][0]["reason"], "answer");
    assert_eq!(told["last_faults"][0]["request"], offered.id.to_string());
    assert!(told["recovery"]["days_to_eligible"].as_u64() > Some(0), "{told}");
    let good = standing(conduct[1].operator.to_string()).await;
    assert_eq!((good["verified_milli"].as_u64(), good["eligible"].as_bool()), (Some(1_000), Some(true)));
    let list: Value = serde_json::from_str(&running.get("/v1/operators").await).unwrap();
    assert_eq!(list["operators"].as_array().unwrap().len(), 5);
    assert!(list["alarm_until_ms"].is_null());

    // From the next epoch on it is not drawn any more.
    let left_out = async || {
        let funded = world.funded(Uuid::now_v7(), 3);
        world.offer(&funded);
        let (_, evidence) = world.collected().await;
        world.fail(evidence.request.id);
        !evidence.eligible.iter().any(|eligible| eligible.operator == slip.operator)
    };
    let mut left_out = left_out;
    let until = tokio::time::Instant::now() + PATIENCE;
    while !left_out().await {
        assert!(tokio::time::Instant::now() < until, "it is still drawn");
    }
    let path = "/v1/operators/0x00";
    assert!(running.get(path).await.contains("40 lowercase hex digits"));
    running.stop().await;
}

#[actix_rt::test]
async fn referees_embedded() {
    Box::pin(referees_report_and_conduct_is_remembered(On::Embedded)).await;
}

#[actix_rt::test]
async fn referees_cluster() {
    Box::pin(referees_report_and_conduct_is_remembered(On::Cluster)).await;
}

/// Two of eight operators share their answers; half of all jobs are canaries here, so that it does not take long.
async fn canaries_find_who_shares(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.canary_ppm = 500_000;
    let running = world.start(config).await;
    let mut playing = Vec::new();
    for (n, node) in (1..).zip(nodes(&world, 8)) {
        let behaviour = if n <= 2 { Behaviour::Share } else { Behaviour::Honest };
        playing.push(node.run(running.address, behaviour).await);
    }
    let standing = async |n: usize| -> Value {
        let operator = playing[n].operator;
        serde_json::from_str(&running.get(&format!("/v1/operators/{operator}")).await).unwrap()
    };
    let until = tokio::time::Instant::now() + PATIENCE;
    let found = async || {
        for n in [0, 1] {
            if standing(n).await["last_faults"][0]["reason"] == "copy" {
                // Asked again: record and faults are read one after the other.
                assert_eq!(standing(n).await["eligible"], false);
                return true;
            }
        }
        false
    };
    let passed = r#"infera_dispatcher_trials_total{kind="canary",outcome="passed"}"#;
    // Who is found may be the first that had one.
    while !found().await || world.metric(&running, passed).await == 0.0 {
        assert!(tokio::time::Instant::now() < until, "nobody is found, or no honest canary passes");
        let funded = world.funded(Uuid::now_v7(), 3);
        world.offer(&funded);
        let (_, evidence) = world.collected().await;
        world.fail(evidence.request.id);
    }
    for honest in 2..8 {
        assert!(standing(honest).await["last_faults"].is_null(), "{honest}");
    }
    running.stop().await;
}

#[actix_rt::test]
async fn canaries_embedded() {
    Box::pin(canaries_find_who_shares(On::Embedded)).await;
}

#[actix_rt::test]
async fn canaries_cluster() {
    Box::pin(canaries_find_who_shares(On::Cluster)).await;
}

/// A newcomer that computes something else is sent away once there are trusted operators that can tell.
#[actix_rt::test]
async fn newcomers_are_tried_by_trusted_operators() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let mut playing = Vec::new();
    for node in nodes(&world, 3) {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let trusted = async || {
        let list: Value = serde_json::from_str(&running.get("/v1/operators").await).unwrap();
        let all = list["operators"].as_array().unwrap().clone();
        all.len() == 3 && all.iter().all(|operator| operator["trusted"] == true)
    };
    let until = tokio::time::Instant::now() + PATIENCE;
    while !trusted().await {
        assert!(tokio::time::Instant::now() < until, "nobody is trusted");
        for _ in 0..10 {
            let funded = world.funded(Uuid::now_v7(), 3);
            let offered = world.offer(&funded);
            let (_, evidence) = world.collected().await;
            let verified = evidence.slots.iter().map(|slot| {
                let conduct = Conduct {
                    node: slot.node,
                    operator: slot.operator,
                    finding: Finding::Verified,
                    mean: None,
                };
                convert::conduct_to_wire(&conduct)
            });
            world.close_with(&offered, Uuid::now_v7(), verified.collect()).await;
        }
    }
    let all = nodes(&world, 5);
    let on_trial = async |n: usize| {
        let list: Value = serde_json::from_str(&running.get("/v1/nodes").await).unwrap();
        let id = all[n].id().to_string();
        let nodes = list["nodes"].as_array().unwrap().clone();
        nodes.iter().find(|node| node["node"] == id.as_str()).map(|node| node["on_trial"] == true)
    };
    // The draws learn of the records a little later than they are written.
    let liar = async || {
        let running = all[3].run(running.address, Behaviour::Garbage).await;
        eventually(PATIENCE, async || running.has_ended() || on_trial(3).await == Some(false)).await;
        running.has_ended()
    };
    while !liar().await {
        assert!(tokio::time::Instant::now() < until, "a liar is let in");
    }
    let told = running.get(&format!("/v1/operators/{}", all[3].operator())).await;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["last_faults"][0]["reason"], "challenge", "{told}");
    let honest = all[4].run(running.address, Behaviour::Honest).await;
    eventually(PATIENCE, async || on_trial(4).await == Some(false)).await;
    assert!(!honest.has_ended());
    assert!(!honest.leases().is_empty(), "it was tried");
    running.stop().await;
}
