use infera_protocol::bytes::{Address, EvmSignature, Hash32};
use infera_protocol::identity::{NodeBinding, node_id};
use infera_protocol::slashing::{AccusedCommitment, Contradiction, SignedBinding, Statement};
use infera_runtime::db;
use infera_runtime::health::Health;
use infera_runtime::network::Live;
use infera_testkit::evidence::{Case, Network, key};
use infera_testkit::{TempDir, eventually, sqlite_url};
use infera_wire::convert;

use super::*;
use crate::domain::{Rules, State};
use crate::{standing, store};

/// Node n with room for `queue` frames, and what it would receive.
fn join(network: &Network, n: u8, queue: usize) -> (Join, mpsc::Receiver<v1::FromDispatcher>) {
    let (sender, receiver) = mpsc::channel(queue);
    let session = Uuid::now_v7();
    let info = Connected {
        node: node_id(&key(n)),
        operator: Address([n; 20]),
        session,
        model_root: network.registry.models[0].weights_root,
        class: "exact".to_owned(),
        slots: 4,
        release_hash: Hash32::ZERO,
        bound: SignedBinding {
            binding: NodeBinding { node: node_id(&key(n)), signer: Address([n; 20]), expiry_ms: 0 },
            signature: EvmSignature([0; 65]),
        },
        version: "test".to_owned(),
        connected_at_ms: 0,
    };
    (Join { info, outgoing: Outgoing { session, frames: sender, kill: CancellationToken::new() } }, receiver)
}

async fn tools(dir: &TempDir, network: &Network) -> Tools {
    let db = db::connect(&sqlite_url(dir), None).await.unwrap();
    db::migrate::<store::Migrator>(&db).await.unwrap();
    let bus = Bus::in_process();
    bus.declare(&infera_bus::Topology::network()).await.unwrap();
    network.write(dir.path());
    Tools {
        bus,
        db,
        metrics: Metrics::register(&Health::new("test")).unwrap(),
        replica: "test".to_owned(),
        slots_ttl_ms: 5_000,
        shutdown: CancellationToken::new(),
        live: Live::load(&dir.path().join("network.json"), &dir.path().join("models.json")).unwrap(),
    }
}

/// However many different commitments a node signs for one slot, they are one fault.
#[actix_rt::test]
async fn a_contradiction_is_kept_and_counted_once_a_slot() {
    let (dir, network) = (TempDir::new().unwrap(), Network::new());
    let tools = tools(&dir, &network).await;
    let (request, operator) = (Uuid::now_v7(), Address([7; 20]));
    let (join, _receiver) = join(&network, 1, 1);
    let statement = Statement { signature: EvmSignature([0; 65]), bound: join.info.bound };
    let said = |n: u8| AccusedCommitment::new(Hash32([n; 32]), statement);
    let mut slot = Slot { request_hash: Hash32([1; 32]), attempt: 1, node: join.info.node };
    for attempt in 1..=2 {
        slot.attempt = attempt;
        for second in 2..=4 {
            let evidence = Contradiction::TwoCommitments { slot, first: said(1), second: said(second) };
            effects::keep(&tools, request, operator, &evidence).await.unwrap();
            let kept = store::contradictions(&tools.db, Some(operator), None, 9).await.unwrap();
            let faults = standing::last_faults(&tools.db, &operator, 9).await.unwrap();
            assert_eq!((kept.len(), faults.len()), (attempt as usize, attempt as usize));
        }
    }
}

/// A node whose queue is full is cut off at once, and another takes its place: nobody waits for it.
#[actix_rt::test]
async fn a_node_that_falls_behind_is_cut_off() {
    let (dir, network) = (TempDir::new().unwrap(), Network::new());
    let tools = tools(&dir, &network).await;
    let (bus, shutdown) = (tools.bus.clone(), tools.shutdown.clone());
    let domain = network.manifest.domain;
    let rules = Rules {
        domain,
        key: network.dispatcher.clone(),
        registry: network.registry.clone().into(),
        lease_ms: 60_000,
        reveal_ms: 10_000,
        referee_ms: 30_000,
        verdict_ms: 15_000,
        max_tries: 5,
        close_grace_ms: 10_000,
        hand_back_ms: 2_000,
        max_requests: 16,
        canary_ppm: 0,
        entry_trials: false,
    };
    let actor = Assignments::new(State::new(rules), tools).start();
    // Three of them have no room left, so whoever is drawn, one of those is.
    let mut killed = Vec::new();
    let mut receivers = Vec::new();
    for n in 1..=6 {
        let (join, receiver) = join(&network, n, 1);
        if n <= 4 {
            join.outgoing.frames.try_send(frames::released(Uuid::nil(), 1)).unwrap();
            killed.push(join.outgoing.kill.clone());
        }
        actor.send(join).await.unwrap();
        receivers.push(receiver);
    }
    let mut case = Case::new(&network);
    case.submitted_at_ms = clock::now_ms();
    let wire = case.funded();
    let funded = convert::funded(&wire).unwrap();
    let mut subscription = bus.subscribe("dispatcher.offered", 4).await.unwrap();
    let publisher = bus.clone();
    let envelope = Envelope::new(Uuid::now_v7(), keys::REQUEST_OFFERED, vec![1]);
    actix_rt::spawn(async move { publisher.publish(keys::REQUEST_OFFERED, envelope).await });
    let delivery = subscription.next().await.unwrap();
    let offer = Box::new(Offer::new(funded, wire, &domain));
    actor.send(Offered { offer, delivery }).await.unwrap();
    eventually(Duration::from_secs(60), async || killed.iter().any(CancellationToken::is_cancelled)).await;
    let left = actor.send(ListNodes).await.unwrap();
    let cut = killed.iter().filter(|kill| kill.is_cancelled()).count();
    assert_eq!(left.len(), 6 - cut, "exactly those are gone");
    shutdown.cancel();
}
