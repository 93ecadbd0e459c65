//! The explorer over synthetic receipts, to look at its pages: `cargo run -p infera-explorer --example
//! synthetic -- 127.0.0.1:8085`. Ctrl-C ends it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::sync::Arc;

use infera_bus::{Bus, Envelope, Topology};
use infera_embed::{Embedder, Exact, Index, Point};
use infera_explorer::{Config, Deps};
use infera_protocol::merkle::MerkleTree;
use infera_runtime::shutdown;
use infera_testkit::evidence::{Answer, Case, Network, Referee};
use infera_testkit::{TempDir, embedder_path, sqlite_url_named};
use infera_wire::{Message, topology::keys, v1};
use uuid::Uuid;

const ANSWERS: [&str; 4] = [
    "The capital of France is Paris.",
    "Quicksort picks a pivot, partitions the list and sorts both parts.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "A good espresso needs fine grounds, nine bars and about 25 seconds.",
];

fn main() {
    let bind = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8085".to_owned());
    actix_rt::System::new().block_on(run(bind));
}

async fn run(bind: String) {
    let dir = TempDir::new().unwrap();
    let network = Network::new();
    network.write(dir.path());
    let embedder = Embedder::load(&embedder_path()).unwrap();
    let index = Arc::new(Exact::open(&sqlite_url_named(&dir, "vectors"), None).await.unwrap());
    let bus = Bus::in_process();
    bus.declare(&Topology::network()).await.unwrap();
    let mut config = Config::load(None).unwrap();
    config.common.http_bind = bind.clone();
    config.common.database_url = sqlite_url_named(&dir, "explorer").into();
    config.common.manifest_path = dir.path().join("network.json");
    let deps =
        Deps { embedder: Some(embedder.clone()), index: Some(index.clone()), ..Deps::new(bus.clone()) };
    let stop = shutdown::on_signals();
    let running = actix_rt::spawn(infera_explorer::run(config, deps, stop));

    let cases: Vec<Case> = (0..60_u32).map(|n| case(&network, n)).collect();
    for (n, case) in cases.iter().enumerate() {
        let (id, answer) = (case.request.id, ANSWERS[n % ANSWERS.len()]);
        let vector = embedder.embed(vec![answer.to_owned()]).await.unwrap().remove(0);
        let decided_at_ms = case.receipt().decided_at_ms;
        index
            .upsert(&Point { request_id: id, model: case.model.clone(), decided_at_ms, vector })
            .await
            .unwrap();
        say(&bus, keys::RECEIPT, case.receipt_issued().encode_to_vec()).await;
    }
    for (sequence, batch) in cases[..50].chunks(10).enumerate() {
        let sequence = sequence as u64 + 1;
        let leaves: Vec<_> = batch.iter().map(|case| case.receipt().leaf()).collect();
        let anchored = v1::BatchAnchored {
            sequence,
            receipts_root: MerkleTree::new(&leaves).unwrap().root().to_vec(),
            request_ids: batch.iter().map(|case| case.request.id.as_bytes().to_vec()).collect(),
            transaction: vec![0xe7; 32],
            block_number: 100 + sequence,
            anchored_at_ms: batch[0].submitted_at_ms + 60_000,
        };
        say(&bus, keys::BATCH_ANCHORED, anchored.encode_to_vec()).await;
    }
    println!("http://{bind}/ and http://{bind}/receipts/{}", cases[7].request.id);
    running.await.unwrap().unwrap();
}

async fn say(bus: &Bus, key: &str, body: Vec<u8>) {
    bus.publish(key, Envelope::new(Uuid::now_v7(), key, body)).await.unwrap();
}

fn case(network: &Network, n: u32) -> Case {
    let mut case = Case::new(network);
    case.submitted_at_ms += i64::from(n) * 47_000;
    let tokens: Vec<u32> = (0..20 + n % 40).map(|t| 100 + t).chain([2]).collect();
    let answer = Answer::tokens(&tokens);
    case.answers = match n % 7 {
        0 => vec![answer.clone(), answer.clone(), Answer::NoCommit, answer],
        3 => vec![answer.clone(), Answer::tokens(&[7, 2]), answer],
        _ => vec![answer; 3],
    };
    if n % 7 == 3 {
        case.referees = vec![Referee::Denies(vec![vec![7, 2]]); 2];
    }
    case
}
