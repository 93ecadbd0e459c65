//! A request from its offer to its closing verdict.

use infera_protocol::bytes::Address;
use infera_protocol::evidence::SlotOutcome::{
    Declined, Disconnected, Mismatch, NoCommit, NoReveal, Revealed,
};
use infera_protocol::slashing::Contradiction;
use infera_testkit::eventually;
use infera_testkit::synthetic::{Behaviour, SyntheticNode, answer};
use infera_wire::topology::keys;
use infera_wire::v1::{self, from_dispatcher, from_node, verdict::Outcome};
use infera_wire::{Message, convert};
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::world::{GATEWAY, On, PATIENCE, World, nodes, outcomes, traceparent};

macro_rules! on_both {
    ($($name:ident),* $(,)?) => { $( mod $name {
        #[actix_rt::test]
        async fn embedded() { super::super::$name(super::On::Embedded).await; }
        #[actix_rt::test]
        async fn cluster() { super::super::$name(super::On::Cluster).await; }
    } )* };
}

mod on_both {
    use super::On;
    on_both!(
        three_of_four_answer,
        silent_nodes_are_replaced,
        declines_and_lost_sessions_are_replaced_at_once,
        broken_reveals_are_replaced,
        more_nodes_until_none_are_left,
        an_attempt_without_majority_begins_again,
        a_node_reconnects_within_its_lease,
        too_few_operators_wait,
        deltas_reach_the_gateway,
        an_offer_that_is_said_twice_is_held_once,
    );
}

/// Says a closing verdict until every node of the list was released.
async fn close(world: &World, id: Uuid, attempt: u32, nodes: &[&infera_testkit::synthetic::Running]) {
    eventually(PATIENCE, async || {
        world.fail(id);
        nodes.iter().all(|node| node.was_released(id, attempt))
    })
    .await;
}

async fn three_of_four_answer(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let mut playing = Vec::new();
    for node in nodes(&world, 4) {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let listed: serde_json::Value = serde_json::from_str(&running.get("/v1/nodes").await).unwrap();
    assert_eq!(listed["nodes"].as_array().unwrap().len(), 4);
    assert_eq!(listed["nodes"][0]["model"], "synthetic");
    let funded = world.funded(Uuid::now_v7(), 3);
    let offered = world.offer(&funded);
    let (collected, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [Revealed; 3]);
    assert_eq!((collected.attempt, collected.round, collected.exhausted), (1, 1, false));
    assert_eq!(collected.eligible.len(), 4);
    let honest = answer(&funded.submitted.request);
    assert!(evidence.revealed().all(|(_, output)| *output == honest));
    let lease = playing.iter().find_map(|node| node.leases().pop()).unwrap();
    assert_eq!(lease.traceparent[3..35], traceparent(offered.id)[3..35], "one trace");
    let drawn: Vec<_> = playing.iter().filter(|n| evidence.slots.iter().any(|s| s.node == n.node)).collect();
    assert_eq!(drawn.len(), 3);
    assert!(on == On::Cluster || !offered.published.is_finished(), "held until the verdict");
    close(&world, offered.id, 1, &drawn).await;
    offered.published.await.unwrap();
    // The mempool offers a closed request again only by mistake; it computes nothing.
    let again = world.offer(&funded);
    again.published.await.unwrap();
    eventually(PATIENCE, async || world.metric(&running, "infera_dispatcher_requests ").await == 0.0).await;
    assert_eq!(world.metric(&running, "infera_dispatcher_attempts_total ").await, 1.0);
    running.stop().await;
}

async fn silent_nodes_are_replaced(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.lease_secs = 1;
    let running = world.start(config).await;
    let nodes = nodes(&world, 4);
    let silent = nodes[0].run(running.address, Behaviour::Silent).await;
    let mut playing = Vec::new();
    for node in &nodes[1..] {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let offered = world.offer(&world.drawing(&nodes, &[silent.node]));
    let (collected, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [NoCommit, Revealed, Revealed, Revealed]);
    assert!(collected.exhausted, "all four operators were drawn");
    eventually(PATIENCE, async || silent.was_cancelled(offered.id, 1)).await;
    running.stop().await;
}

async fn declines_and_lost_sessions_are_replaced_at_once(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 5);
    let declines = nodes[0].run(running.address, Behaviour::Decline).await;
    let vanishes = nodes[1].run(running.address, Behaviour::Vanish).await;
    let mut playing = Vec::new();
    for node in &nodes[2..] {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    world.offer(&world.drawing(&nodes, &[declines.node, vanishes.node]));
    // A lease has 60 s here: whoever waited for it would be too late.
    let (collected, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [Declined, Disconnected, Revealed, Revealed, Revealed]);
    assert_eq!(collected.slots[0].decline.as_ref().unwrap().reason, "full");
    running.stop().await;
}

async fn broken_reveals_are_replaced(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.reveal_secs = 1;
    let running = world.start(config).await;
    let nodes = nodes(&world, 5);
    let mute = nodes[0].run(running.address, Behaviour::NoReveal).await;
    let liar = nodes[1].run(running.address, Behaviour::Mismatch).await;
    let mut playing = Vec::new();
    for node in &nodes[2..] {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    world.offer(&world.drawing(&nodes, &[mute.node, liar.node]));
    let (_, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [NoReveal, Mismatch, Revealed, Revealed, Revealed]);
    assert!(evidence.slots.iter().all(|slot| slot.commitment.is_some()), "all are under the post draw");
    running.stop().await;
}

async fn more_nodes_until_none_are_left(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.verdict_secs = 1;
    let running = world.start(config).await;
    let mut playing = Vec::new();
    for node in nodes(&world, 5) {
        playing.push(node.run(running.address, Behaviour::Garbage).await);
    }
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    let (first, _) = world.collected().await;
    // The first verdict is lost: the same results come again.
    let (again, _) = world.collected().await;
    assert_eq!(again, first);
    let more = |round| world.verdict(offered.id, 1, round, Outcome::MoreNodes(v1::MoreNodes { count: 2 }));
    more(7);
    more(1);
    more(1);
    let (second, evidence) = loop {
        let (collected, evidence) = world.collected().await;
        if collected.round > 1 {
            break (collected, evidence);
        }
    };
    assert_eq!((second.attempt, second.round, second.exhausted), (1, 2, true));
    assert_eq!(outcomes(&evidence), [Revealed; 5]);
    assert_eq!(second.slots[..3], first.slots[..3], "what was collected stays");
    let all: Vec<_> = playing.iter().collect();
    close(&world, offered.id, 1, &all).await;
    running.stop().await;
}

async fn an_attempt_without_majority_begins_again(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.lease_secs = 1;
    config.max_tries = 2;
    let running = world.start(config).await;
    let nodes = nodes(&world, 3);
    let mut playing = Vec::new();
    for (node, behaviour) in nodes.iter().zip([Behaviour::Honest, Behaviour::Silent, Behaviour::Silent]) {
        playing.push(node.run(running.address, behaviour).await);
    }
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    // Tries are bounded: then what is there is reported.
    let (collected, evidence) = world.collected().await;
    assert_eq!((collected.attempt, collected.round, collected.exhausted), (2, 1, true));
    assert_eq!(evidence.revealed().count(), 1);
    assert!(playing[0].was_released(offered.id, 1), "the first attempt is over for its nodes");
    running.stop().await;
}

async fn a_node_reconnects_within_its_lease(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 3);
    let others = [
        nodes[1].run_gated(running.address, Behaviour::Honest).await,
        nodes[2].run(running.address, Behaviour::Honest).await,
    ];
    let node = &nodes[0];
    let mut socket = node.connect(running.address).await;
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    let lease = socket.lease().await;
    // Lost before the commitment: nobody can replace it, so it gets its lease again.
    socket.cut();
    let mut socket = node.connect(running.address).await;
    assert_eq!(socket.lease().await, lease);
    let output = answer(&convert::request(lease.request.as_ref().unwrap()).unwrap());
    let (commit, salt) = node.commit(&lease, &output);
    socket.send(from_node::Message::Commit(commit.clone())).await;
    // Lost after it: the commitment stands, and the same bytes again change nothing.
    socket.cut();
    let mut socket = node.connect(running.address).await;
    socket.send(from_node::Message::Commit(commit)).await;
    eventually(PATIENCE, async || !others[0].leases().is_empty()).await;
    others[0].let_commit(1);
    loop {
        if let from_dispatcher::Message::RevealRequest(asked) = socket.next().await.unwrap() {
            assert_eq!((asked.request_id, asked.attempt), (offered.id.as_bytes().to_vec(), 1));
            break;
        }
    }
    // Lost between the question and the answer: it is asked again.
    socket.cut();
    let mut socket = node.connect(running.address).await;
    loop {
        if let from_dispatcher::Message::RevealRequest(_) = socket.next().await.unwrap() {
            break;
        }
    }
    socket.send(from_node::Message::Reveal(node.reveal(&lease, &output, &salt))).await;
    let (_, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [Revealed; 3]);
    running.stop().await;
}

async fn too_few_operators_wait(on: On) {
    let mut world = World::new(on).await;
    let mut config = world.config();
    config.close_grace_secs = 1;
    let running = world.start(config).await;
    let mut slots = world.bus.subscribe_transient("test.slots", &[keys::SLOTS], 64).await.unwrap();
    let nodes = nodes(&world, 3);
    let first = nodes[0].run(running.address, Behaviour::Honest).await;
    // A second node of the same operator is no help.
    let mut sibling = SyntheticNode::new(&world.network, 9);
    sibling.operator = nodes[0].operator.clone();
    let sibling = sibling.run(running.address, Behaviour::Honest).await;
    let second = nodes[1].run(running.address, Behaviour::Honest).await;
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    loop {
        let delivery = slots.next().await.unwrap();
        let report = v1::SlotsReport::decode(delivery.envelope.body.as_ref()).unwrap();
        let held = report.models[0].offers_held.contains(&offered.id.as_bytes().to_vec());
        if held && report.models[0].operators == 2 {
            let slots = (report.models[0].free, report.models[0].total);
            assert_eq!(slots, (0, 12), "a request of three needs a third operator");
            break;
        }
    }
    assert!(first.leases().is_empty() && second.leases().is_empty());
    let third = nodes[2].run(running.address, Behaviour::Honest).await;
    let (_, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [Revealed; 3]);
    assert_eq!((third.leases().len(), evidence.class.as_str()), (1, "exact"));
    assert_eq!(first.leases().len() + sibling.leases().len(), 1, "one node per operator");
    // Where no class has enough operators, all classes are drawn from.
    third.kill();
    let mut fast = SyntheticNode::new(&world.network, 8);
    fast.class = "fast".to_owned();
    let fast = fast.run(running.address, Behaviour::Honest).await;
    eventually(PATIENCE, async || running.get("/v1/nodes").await.matches("exact").count() == 3).await;
    world.fail(offered.id);
    let mixed = world.offer(&world.funded(Uuid::now_v7(), 3));
    let (_, evidence) = world.collected().await;
    assert_eq!((fast.leases().len(), evidence.class.as_str()), (1, "mixed"));
    assert_eq!(evidence.class_of(&fast.node), Some("fast"));
    world.fail(mixed.id);
    // A request that no node can take is closed by the verifier; past its deadline it is asked to.
    let mut late = world.funded(Uuid::now_v7(), 5);
    late.submitted.deadline_ms = late.submitted.submitted_at_ms + 1;
    let late = world.offer(&late);
    let close = world.close_asked().await;
    assert_eq!(close.submitted.unwrap().request.unwrap().id, late.id.as_bytes());
    world.fail(late.id);
    late.published.await.unwrap();
    running.stop().await;
}

async fn deltas_reach_the_gateway(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let key = keys::deltas(GATEWAY);
    let mut deltas = world.bus.subscribe_transient("test.deltas", &[&key], 1024).await.unwrap();
    let mut playing = Vec::new();
    for node in nodes(&world, 3) {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let mut funded = world.funded(Uuid::now_v7(), 3);
    funded.submitted.stream = true;
    world.offer(&funded);
    let honest = answer(&funded.submitted.request);
    let mut heard = std::collections::BTreeMap::<Vec<u8>, Vec<u32>>::new();
    while heard.values().filter(|tokens| **tokens == honest.tokens).count() < 3 {
        let delivery = tokio::time::timeout(PATIENCE, deltas.next()).await.unwrap().unwrap();
        let batch = v1::DeltaBatch::decode(delivery.envelope.body.as_ref()).unwrap();
        for entry in batch.entries {
            assert_eq!(
                (entry.request_id.as_slice(), entry.attempt),
                (&funded.submitted.request.id.as_bytes()[..], 1)
            );
            let tokens = heard.entry(entry.node).or_default();
            assert_eq!(entry.offset as usize, tokens.len(), "in order and without a gap");
            tokens.extend(entry.tokens);
        }
    }
    world.collected().await;
    running.stop().await;
}

/// Two live deliveries of one message: the second is acked, and neither comes back until it is a dead letter.
async fn an_offer_that_is_said_twice_is_held_once(on: On) {
    let mut world = World::new(on).await;
    let running = world.start(world.config()).await;
    let funded = world.funded(Uuid::now_v7(), 3);
    let both = [world.offer(&funded), world.offer(&funded)];
    eventually(PATIENCE, async || {
        both.iter().any(|offered| offered.published.is_finished()) || on == On::Cluster
    })
    .await;
    let mut playing = Vec::new();
    for node in nodes(&world, 3) {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let (collected, _) = world.collected().await;
    assert_eq!(collected.attempt, 1);
    // Whatever had become a dead letter would be in front of this one.
    let garbage = infera_bus::Envelope::new(Uuid::now_v7(), keys::REQUEST_OFFERED, vec![0xff; 40]);
    world.bus.publish(keys::REQUEST_OFFERED, garbage).await.unwrap();
    let (_, reason) = world.dead_letter().await;
    assert!(reason.contains("RequestOffered"), "{reason}");
    close(&world, funded.submitted.request.id, 1, &playing.iter().collect::<Vec<_>>()).await;
    for offered in both {
        offered.published.await.unwrap();
    }
    running.stop().await;
}

/// A second, different commitment: the first counts, and both together cost the operator its stake.
#[actix_rt::test]
async fn equivocation_is_kept() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 3);
    let mut playing = Vec::new();
    playing.push(nodes[0].run(running.address, Behaviour::Equivocate).await);
    // The others commit only after that, so that the attempt is still open.
    playing.push(nodes[1].run_gated(running.address, Behaviour::Honest).await);
    playing.push(nodes[2].run(running.address, Behaviour::Honest).await);
    let db = infera_runtime::db::connect(&world.database_url, None).await.unwrap();
    db.execute_unprepared("ALTER TABLE contradictions RENAME TO away").await.unwrap();
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    eventually(PATIENCE, async || {
        world.metric(&running, "infera_dispatcher_contradictions_total{kind=\"two_commitments\"}").await
            == 1.0
    })
    .await;
    playing[1].let_commit(1);
    let (_, evidence) = world.collected().await;
    assert_eq!(outcomes(&evidence), [Revealed; 3], "the first commitment counts");
    // What the database could not take is tried again.
    db.execute_unprepared("ALTER TABLE away RENAME TO contradictions").await.unwrap();
    // Anybody can read what costs the operator its stake, and check it.
    let get = async |path: &str| {
        let response =
            reqwest::get(format!("http://{}/v1/contradictions{path}", running.address)).await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let list = eventually(PATIENCE, async || {
        let list = get("").await.1;
        (list["contradictions"] != json!([])).then_some(list)
    })
    .await;
    let kept = &list["contradictions"][0];
    assert_eq!((list["contradictions"].as_array().unwrap().len(), &list["has_more"]), (1, &json!(false)));
    assert_eq!((&kept["kind"], &kept["request"]), (&json!("two_commitments"), &json!(offered.id)));
    let (_, evidence) = get(&format!("/{}", kept["id"].as_str().unwrap())).await;
    let evidence: Contradiction = serde_json::from_value(evidence).unwrap();
    let operator = evidence.operator(&world.network.manifest.domain).unwrap();
    assert_eq!(kept["operator"], json!(operator.to_string()));
    let of = async |who: Address| get(&format!("?operator={who}")).await.1;
    assert_eq!(of(operator).await, list);
    assert_eq!(of(Address([1; 20])).await["contradictions"], json!([]));
    let (status, refused) = get("?operator=me").await;
    assert_eq!(status, 400, "{refused}");
    assert_eq!(get(&format!("/{}", offered.id)).await.0, 404);
    running.stop().await;
}

/// What is no offer goes to the dead letters, and the next offer is served.
#[actix_rt::test]
async fn garbage_on_the_queue_stops_nothing() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let mut playing = Vec::new();
    for node in nodes(&world, 3) {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let bus = world.bus.clone();
    let envelope = infera_bus::Envelope::new(Uuid::now_v7(), keys::REQUEST_OFFERED, vec![0xff; 40]);
    bus.publish(keys::REQUEST_OFFERED, envelope).await.unwrap();
    let (queue, reason) = world.dead_letter().await;
    assert_eq!(queue, "dispatcher.offered");
    assert!(reason.contains("RequestOffered"), "{reason}");
    let mut bad = world.funded(Uuid::now_v7(), 3);
    bad.submitted.request.max_tokens = 0;
    world.offer(&bad);
    assert!(world.dead_letter().await.1.contains("max_tokens"));
    world.offer(&world.funded(Uuid::now_v7(), 3));
    world.collected().await;
    running.stop().await;
}
