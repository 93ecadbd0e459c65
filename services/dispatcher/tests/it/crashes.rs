//! A dispatcher that ends in the middle of a request: the offer comes again, as a new attempt.

use std::time::Duration;

use infera_protocol::evidence::SlotOutcome::Revealed;
use infera_testkit::synthetic::{Behaviour, Running as Node, answer};
use infera_testkit::{Process, cluster, eventually, free_port};
use infera_wire::v1::from_dispatcher::Message as FromDispatcher;
use infera_wire::v1::from_node;
use uuid::Uuid;

use crate::world::{On, PATIENCE, World, nodes, outcomes};

async fn a_replica_that_ends_leaves_its_requests_to_the_next(on: On) {
    let mut world = World::new(on).await;
    let nodes = nodes(&world, 3);
    let first = world.start(world.config()).await;
    let mut socket = nodes[0].connect(first.address).await;
    let _others = [
        nodes[1].run_gated(first.address, Behaviour::Honest).await,
        nodes[2].run_gated(first.address, Behaviour::Honest).await,
    ];
    let offered = world.offer(&world.funded(Uuid::now_v7(), 3));
    let lease = socket.lease().await;
    assert_eq!(lease.attempt, 1);
    first.stop().await;
    assert_eq!(socket.next().await, None);

    let second = world.start(world.config()).await;
    let output = answer(&infera_wire::convert::request(lease.request.as_ref().unwrap()).unwrap());
    let mut socket = nodes[0].connect(second.address).await;
    // What was computed for the first attempt is stale, and the node is told.
    socket.send(from_node::Message::Commit(nodes[0].commit(&lease, &output).0)).await;
    let Some(FromDispatcher::Cancel(cancel)) = socket.next().await else { panic!("it is cancelled") };
    assert_eq!((cancel.request_id, cancel.attempt), (offered.id.as_bytes().to_vec(), 1));
    let _others = [
        nodes[1].run(second.address, Behaviour::Honest).await,
        nodes[2].run(second.address, Behaviour::Honest).await,
    ];
    let lease = socket.lease().await;
    assert_eq!(lease.attempt, 2, "fenced by a number that was stored before");
    let (commit, salt) = nodes[0].commit(&lease, &output);
    socket.send(from_node::Message::Commit(commit)).await;
    while !matches!(socket.next().await, Some(FromDispatcher::RevealRequest(_))) {}
    socket.send(from_node::Message::Reveal(nodes[0].reveal(&lease, &output, &salt))).await;
    let (collected, evidence) = world.collected().await;
    assert_eq!((collected.attempt, outcomes(&evidence)), (2, vec![Revealed; 3]));
    eventually(PATIENCE, async || {
        world.fail(offered.id);
        world.metric(&second, "infera_dispatcher_requests ").await == 0.0
    })
    .await;
    offered.published.await.unwrap();
    second.stop().await;
}

#[actix_rt::test]
async fn a_replica_that_ends_leaves_its_requests_embedded() {
    a_replica_that_ends_leaves_its_requests_to_the_next(On::Embedded).await;
}

#[actix_rt::test]
async fn a_replica_that_ends_leaves_its_requests_cluster() {
    a_replica_that_ends_leaves_its_requests_to_the_next(On::Cluster).await;
}

/// Two replicas, and the nodes are at one of them: whichever gets an offer, it is served.
#[actix_rt::test]
async fn offers_find_the_replica_that_has_nodes() {
    let mut world = World::new(On::Cluster).await;
    let mut config = world.config();
    config.hand_back_secs = 1;
    let without = world.start(config.clone()).await;
    let with = world.start(config).await;
    let _playing = play(&world, with.address).await;
    let mut open = std::collections::BTreeSet::new();
    for _ in 0..4 {
        open.insert(world.offer(&world.funded(Uuid::now_v7(), 3)).id);
    }
    while !open.is_empty() {
        let (collected, _) = world.collected().await;
        let submitted = collected.funded.unwrap().submitted.unwrap();
        let request = Uuid::from_slice(&submitted.request.unwrap().id).unwrap();
        open.remove(&request);
        world.fail(request);
    }
    assert_eq!(world.metric(&without, "infera_dispatcher_collected_total ").await, 0.0);
    without.stop().await;
    with.stop().await;
}

/// The process is aborted at every step of a request's way through it; the next process finishes.
#[actix_rt::test]
async fn killed_at_every_step_a_request_still_ends() {
    for point in [
        "dispatcher.attempt.stored=abort",
        "dispatcher.leased=abort@2",
        "dispatcher.committed=abort@2",
        "dispatcher.revealed=abort@3",
        "dispatcher.collected.published=abort",
    ] {
        let mut world = World::new(On::Cluster).await;
        let funded = world.funded(Uuid::now_v7(), 3);
        let mut doomed = spawn(&world, point).await;
        let address = doomed.address;
        let playing = play(&world, address).await;
        world.offer(&funded).published.await.unwrap();
        eventually(PATIENCE, || std::future::ready(doomed.process.exited())).await;
        drop(playing);

        let next = spawn(&world, "").await;
        let _playing = play(&world, next.address).await;
        let attempt = loop {
            let (collected, evidence) = world.collected().await;
            assert_eq!(outcomes(&evidence), [Revealed; 3], "{point}");
            // Killed after it published, the first attempt's results are there as well: of whichever the
            // verifier decides, the closing verdict ends the request.
            if collected.attempt == 2 {
                break collected.attempt;
            }
            assert!(point.starts_with("dispatcher.collected"), "{point}");
        };
        assert_eq!(attempt, 2, "{point}");
        eventually(PATIENCE, async || {
            world.fail(funded.submitted.request.id);
            let metrics = reqwest::get(format!("http://{}/metrics", next.address)).await.unwrap();
            metrics.text().await.unwrap().contains("infera_dispatcher_requests 0")
        })
        .await;
    }
}

struct Spawned {
    process: Process,
    address: std::net::SocketAddr,
}

async fn spawn(world: &World, fail: &str) -> Spawned {
    let cluster = cluster();
    let config = world.config();
    let port = free_port();
    let toml = format!(
        "http_bind = \"127.0.0.1:{port}\"\ndatabase_url = \"{}\"\ndatabase_schema = \"{}\"\nbus_url = \"{}\"\nbus_prefix = \"{}\"\nkv_url = \"{}\"\nmanifest_path = \"{}\"\nregistry_path = \"{}\"\nkey_path = \"{}\"\n",
        cluster.pg_url,
        world.schema,
        cluster.amqp_url,
        world.prefix,
        cluster.redis_url,
        config.common.manifest_path.display(),
        config.common.registry_path.display(),
        config.key_path.display(),
    );
    let name = Uuid::now_v7();
    let path = world.dir.path().join(format!("{name}.toml"));
    std::fs::write(&path, toml).unwrap();
    let log = world.dir.path().join(format!("{name}.log"));
    let process = Process::spec(env!("CARGO_BIN_EXE_infera-dispatcher"), log)
        .args([&path])
        .env("INFERA_FAIL", fail)
        .spawn();
    let address = format!("127.0.0.1:{port}").parse().unwrap();
    eventually(Duration::from_secs(60), async || {
        let answer = reqwest::get(format!("http://{address}/readyz")).await;
        answer.is_ok_and(|answer| answer.status().is_success())
    })
    .await;
    Spawned { process, address }
}

async fn play(world: &World, address: std::net::SocketAddr) -> Vec<Node> {
    let mut playing = Vec::new();
    for node in nodes(world, 3) {
        playing.push(node.run(address, Behaviour::Honest).await);
    }
    playing
}
