//! Admission of nodes, and what a session does with frames that it should not get.

use std::collections::BTreeMap;
use std::time::Duration;

use infera_protocol::bytes::Hash32;
use infera_protocol::stakes::Stakes;
use infera_runtime::{clock, network};
use infera_testkit::eventually;
use infera_testkit::synthetic::{Behaviour, Socket, SyntheticNode};
use infera_wire::v1::{self, from_dispatcher, from_node};
use infera_wire::{MAX_FRAME_BYTES, Message as _};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use crate::world::{On, PATIENCE, World, nodes};

async fn refused(mut socket: Socket, hello: v1::Hello) -> String {
    socket.send(from_node::Message::Hello(hello)).await;
    socket.refusal().await
}

#[actix_rt::test]
async fn a_hello_must_hold_in_every_part() {
    let world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let node = SyntheticNode::new(&world.network, 1);
    let other = SyntheticNode::new(&world.network, 2);

    let socket = node.dial(running.address).await;
    let replayed = node.hello(&socket.nonce);
    let fresh = node.dial(running.address).await;
    assert_ne!(socket.nonce, fresh.nonce);
    assert_eq!(refused(fresh, replayed).await, "bad_signature", "a hello for another challenge");

    type Forge = fn(&mut v1::Hello);
    let forgeries: [(Forge, &str); 6] = [
        (|h| h.slots = 5, "bad_signature"),
        (|h| h.slots = 0, "bad_hello"),
        (|h| h.slots = 65, "bad_hello"),
        (|h| h.node.truncate(31), "bad_hello"),
        (|h| h.signature = vec![0; 64], "bad_signature"),
        (|h| h.binding_signature[10] ^= 1, "bad_binding"),
    ];
    for (forge, code) in forgeries {
        let socket = node.dial(running.address).await;
        let mut hello = node.hello(&socket.nonce);
        forge(&mut hello);
        assert_eq!(refused(socket, hello).await, code);
    }

    let dial = async |node: &SyntheticNode| {
        let socket = node.dial(running.address).await;
        let hello = node.hello(&socket.nonce);
        refused(socket, hello).await
    };
    assert_eq!(dial(&SyntheticNode { expiry_ms: 1, ..node.clone() }).await, "binding_expired");
    // Evidence is not kept for so long.
    for expiry_ms in [node.expiry_ms + 2 * 3_600_000, i64::MAX] {
        assert_eq!(dial(&SyntheticNode { expiry_ms, ..node.clone() }).await, "bad_binding");
    }
    let unknown = SyntheticNode { weights_root: Hash32([0xee; 32]), ..node.clone() };
    assert_eq!(dial(&unknown).await, "unknown_model");
    assert_eq!(dial(&SyntheticNode { class: "warm".into(), ..node.clone() }).await, "unknown_class");
    let mut elsewhere = node.clone();
    elsewhere.domain.chain_id += 1;
    assert_eq!(dial(&elsewhere).await, "bad_signature", "a hello for another network");

    // An operator can't be claimed: the binding names who signed it.
    let socket = node.dial(running.address).await;
    let mut stolen = node.hello(&socket.nonce);
    stolen.operator = other.operator().to_vec();
    assert_eq!(refused(socket, stolen).await, "bad_signature");
    assert!(running.get("/v1/nodes").await.contains("\"nodes\":[]"));
    let counted = "infera_dispatcher_sessions_refused_total{code=\"bad_hello\"} ";
    assert_eq!(world.metric(&running, counted).await, 3.0);
    running.stop().await;
}

#[actix_rt::test]
async fn garbage_ends_its_own_session_only() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 4);
    let mut playing = Vec::new();
    for node in &nodes[..3] {
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let node = &nodes[3];
    let before_hello = [Message::binary(vec![0xff; 64]), Message::text("hello"), Message::binary(vec![])];
    for message in before_hello {
        let mut socket = node.dial(running.address).await;
        socket.send_raw(message).await;
        assert_eq!(socket.refusal().await, "bad_frame");
    }
    let mut socket = node.dial(running.address).await;
    socket.send(from_node::Message::Draining(v1::Draining {})).await;
    assert_eq!(socket.refusal().await, "hello_expected");

    let mut socket = node.connect(running.address).await;
    let hello = node.hello(&socket.nonce);
    socket.send(from_node::Message::Hello(hello)).await;
    assert_eq!(socket.refusal().await, "hello_twice");

    let id = Uuid::now_v7().as_bytes().to_vec();
    let bad: [from_node::Message; 4] = [
        from_node::Message::Commit(v1::Commit { request_id: vec![1], ..v1::Commit::default() }),
        from_node::Message::Reveal(v1::Reveal {
            request_id: id.clone(),
            attempt: 1,
            tokens: vec![1, 2],
            fingerprints: vec![9],
            finish: 1,
            salt: vec![0; 32],
            statement: vec![0; 65],
        }),
        from_node::Message::Decline(v1::Decline { request_id: id.clone(), ..v1::Decline::default() }),
        from_node::Message::Deltas(v1::Deltas { request_id: vec![], ..v1::Deltas::default() }),
    ];
    for message in bad {
        let mut socket = node.connect(running.address).await;
        socket.send(message).await;
        assert_eq!(socket.refusal().await, "bad_frame");
    }
    let mut socket = node.connect(running.address).await;
    let huge = v1::FromNode {
        message: Some(from_node::Message::Deltas(v1::Deltas {
            request_id: id,
            attempt: 1,
            offset: 0,
            tokens: vec![u32::MAX; MAX_FRAME_BYTES / 4],
        })),
    };
    socket.send_raw(Message::binary(huge.encode_to_vec())).await;
    // The answer may be lost with the connection, which the dispatcher closes on unread bytes.
    eventually(PATIENCE, async || {
        let nodes = running.get("/v1/nodes").await;
        !nodes.contains(&node.id().to_string())
    })
    .await;

    // The others never noticed.
    world.offer(&world.funded(Uuid::now_v7(), 3));
    world.collected().await;
    assert!(playing.iter().all(|node| !node.has_ended()));
    running.stop().await;
}

#[actix_rt::test]
async fn frames_about_foreign_slots_are_refused_and_cancelled() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 3);
    let mut socket = nodes[0].connect(running.address).await;
    let _others = [
        nodes[1].run(running.address, Behaviour::Honest).await,
        nodes[2].run(running.address, Behaviour::Honest).await,
    ];
    world.offer(&world.funded(Uuid::now_v7(), 3));
    let lease = socket.lease().await;
    let request = infera_wire::convert::request(lease.request.as_ref().unwrap()).unwrap();
    let output = infera_testkit::synthetic::answer(&request);

    // Another attempt of the same request.
    let stale = v1::Lease { attempt: 9, ..lease.clone() };
    socket.send(from_node::Message::Commit(nodes[0].commit(&stale, &output).0)).await;
    let infera_wire::v1::from_dispatcher::Message::Cancel(cancel) = socket.next().await.unwrap() else {
        panic!("a stale commitment is cancelled")
    };
    assert_eq!(cancel.attempt, 9);

    // A reveal that nobody asked for changes nothing, and the slot goes on.
    let (commit, salt) = nodes[0].commit(&lease, &output);
    socket.send(from_node::Message::Reveal(nodes[0].reveal(&lease, &output, &salt))).await;
    socket.send(from_node::Message::Commit(commit)).await;
    loop {
        match socket.next().await.unwrap() {
            infera_wire::v1::from_dispatcher::Message::RevealRequest(_) => break,
            other => assert!(!matches!(other, infera_wire::v1::from_dispatcher::Message::Refused(_))),
        }
    }
    socket.send(from_node::Message::Reveal(nodes[0].reveal(&lease, &output, &salt))).await;
    let (_, evidence) = world.collected().await;
    assert_eq!(evidence.revealed().count(), 3);

    // A commitment that somebody else signed ends the session of who sends it.
    world.offer(&world.funded(Uuid::now_v7(), 3));
    let lease = socket.lease().await;
    socket.send(from_node::Message::Commit(nodes[1].commit(&lease, &output).0)).await;
    assert_eq!(socket.refusal().await, "bad_signature");
    running.stop().await;
}

async fn a_newer_session_replaces_the_older(on: On) {
    let world = World::new(on).await;
    let running = world.start(world.config()).await;
    let node = SyntheticNode::new(&world.network, 1);
    let mut older = node.connect(running.address).await;
    let _newer = node.connect(running.address).await;
    assert_eq!(older.refusal().await, "replaced");
    let key = format!("infera:node:{}", node.id().to_string().trim_start_matches("0x"));
    eventually(PATIENCE, async || world.kv.get(&key).await.unwrap()).await;

    // At another replica of the same network, too: it learns of it with its next heartbeat.
    let mut config = world.config();
    config.heartbeat_secs = 1;
    let other = world.start(config).await;
    let mut there = node.connect(other.address).await;
    let _here = node.connect(running.address).await;
    assert_eq!(there.refusal().await, "replaced");
    other.stop().await;
    running.stop().await;
}

#[actix_rt::test]
async fn a_newer_session_replaces_the_older_embedded() {
    a_newer_session_replaces_the_older(On::Embedded).await;
}

#[actix_rt::test]
async fn a_newer_session_replaces_the_older_cluster() {
    a_newer_session_replaces_the_older(On::Cluster).await;
}

#[actix_rt::test]
async fn who_answers_no_ping_is_gone() {
    let world = World::new(On::Embedded).await;
    let mut config = world.config();
    config.heartbeat_secs = 1;
    config.hello_secs = 1;
    let running = world.start(config).await;
    let node = SyntheticNode::new(&world.network, 1);
    // Nobody reads this socket, so nobody answers its pings.
    let mut deaf = node.connect(running.address).await;
    let alive = SyntheticNode::new(&world.network, 2).run(running.address, Behaviour::Honest).await;
    eventually(PATIENCE, async || {
        let nodes = running.get("/v1/nodes").await;
        !nodes.contains(&node.id().to_string()) && nodes.contains(&alive.node.to_string())
    })
    .await;
    assert_eq!(deaf.refusal().await, "silent");
    // Nor does a connection stay that never says hello.
    let mut mute = node.dial(running.address).await;
    assert_eq!(mute.refusal().await, "hello_timeout");
    running.stop().await;
}

#[actix_rt::test]
async fn connections_are_bounded_and_a_drain_is_announced() {
    let world = World::new(On::Embedded).await;
    let mut config = world.config();
    config.max_sessions = 1;
    let running = world.start(config).await;
    let node = SyntheticNode::new(&world.network, 1);
    let mut socket = node.connect(running.address).await;
    let url = format!("ws://{}/v1/node/session", running.address);
    let refused = tokio_tungstenite::connect_async(&url).await;
    assert!(refused.unwrap_err().to_string().contains("503"));
    let ready: serde_json::Value = eventually(PATIENCE, async || {
        let body: serde_json::Value = serde_json::from_str(&running.get("/readyz").await).unwrap();
        (body["status"] == "ready").then_some(body)
    })
    .await;
    assert_eq!(ready["checks"]["bus"], "up");
    socket.send(from_node::Message::Draining(v1::Draining {})).await;
    eventually(PATIENCE, async || running.get("/v1/nodes").await.contains("\"draining\":true")).await;
    // The dispatcher's own end closes the sessions, and does not wait for them.
    let ended = tokio::time::timeout(Duration::from_secs(30), running.stop());
    ended.await.expect("a shutdown is not held up by sessions");
    assert_eq!(socket.next().await, None);
}

/// What holders admit is served by the nodes that connect from then on, and draws know its terms; nothing is restarted.
#[actix_rt::test]
async fn a_model_that_is_admitted_is_taken_at_once() {
    let mut world = World::new(On::Embedded).await;
    let admitted = world.network.registry.clone();
    world.network.registry.models = vec![infera_testkit::evidence::model("other", Hash32([8; 32]))];
    world.write_network();
    let running = world.start(world.config()).await;
    let nodes = nodes(&world, 3);
    let mut playing = Vec::new();
    let node = SyntheticNode { weights_root: admitted.models[0].weights_root, ..nodes[0].clone() };
    let greeted = async || {
        let mut socket = node.dial(running.address).await;
        let hello = node.hello(&socket.nonce);
        socket.send(from_node::Message::Hello(hello)).await;
        matches!(socket.next().await, Some(from_dispatcher::Message::RangeChallenge(_)))
    };
    assert!(!greeted().await, "nobody has admitted it yet");
    let registry =
        infera_runtime::network::replace(&world.dir.path().join("models.json"), &admitted, 1_000).unwrap();
    world.network.registry = registry;
    world.network.manifest.registry_hash = world.network.registry.hash().unwrap();
    let manifest = &world.network.manifest;
    infera_runtime::network::write_json(&world.dir.path().join("network.json"), manifest).unwrap();
    eventually(PATIENCE, async || greeted().await).await;
    for node in &nodes {
        let node = SyntheticNode { weights_root: admitted.models[0].weights_root, ..node.clone() };
        playing.push(node.run(running.address, Behaviour::Honest).await);
    }
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    let (_, evidence) = world.collected().await;
    assert_eq!((evidence.request.id, evidence.revealed().count()), (offered.id, 3));
    running.stop().await;
}

/// What a node signs after its binding costs nobody's stake, so that its session ends with it.
#[actix_rt::test]
async fn a_session_ends_with_its_binding() {
    let world = World::new(On::Embedded).await;
    let config = infera_dispatcher::Config { heartbeat_secs: 1, ..world.config() };
    let running = world.start(config).await;
    // Long enough for a loaded machine to let it in.
    let expiry_ms = clock::now_ms() + 10_000;
    let node = SyntheticNode { expiry_ms, ..SyntheticNode::new(&world.network, 1) };
    let mut socket = node.connect(running.address).await;
    assert_eq!(socket.refusal().await, "binding_expired");
    assert!(clock::now_ms() >= expiry_ms);
    SyntheticNode::new(&world.network, 1).connect(running.address).await;
    running.stop().await;
}

/// The holders ask for a stake: without it nobody is let in, and who loses it is sent away.
#[actix_rt::test]
async fn who_has_too_little_at_stake_gets_no_work() {
    let world = World::new(On::Embedded).await;
    let node = SyntheticNode::new(&world.network, 1);
    let path = network::stakes_path(&world.config().common.manifest_path);
    let stakes = |active: u64| {
        let active_micro = BTreeMap::from([(node.operator(), active)]);
        network::write_json(&path, &Stakes { minimum_micro: 1_000_000, active_micro }).unwrap();
    };
    stakes(999_999);
    let config = infera_dispatcher::Config { heartbeat_secs: 1, ..world.config() };
    let running = world.start(config).await;
    let hello = async || {
        let mut socket = node.dial(running.address).await;
        let hello = node.hello(&socket.nonce);
        socket.send(from_node::Message::Hello(hello)).await;
        socket.next().await
    };
    let Some(from_dispatcher::Message::Refused(refused)) = hello().await else { panic!("refused") };
    assert_eq!(refused.code, "stake_too_low");
    assert!(refused.reason.contains("less at stake than the 1.000000 INFER"), "{}", refused.reason);
    stakes(1_000_000);
    eventually(PATIENCE, async || {
        matches!(hello().await, Some(from_dispatcher::Message::RangeChallenge(_))).then_some(())
    })
    .await;
    let mut socket = node.connect(running.address).await;
    stakes(0);
    assert_eq!(socket.refusal().await, "stake_too_low");
    running.stop().await;
}
