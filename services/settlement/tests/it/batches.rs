//! Receipts on a real chain: proofs that the contract accepts, restarts and losses.

use infera_protocol::{
    bytes::{Address, Hash32},
    document::{Document, Status, check},
    identity::Domain,
};
use infera_runtime::config::Secret;
use infera_settlement::chain::{B256, Chain, ChainReader, devnet::Devnet};
use infera_testkit::{anvil::Anvil, eventually};
use infera_wire::v1;
use uuid::Uuid;

use crate::{
    chain::SETTLER,
    network::Network,
    service::{Column, DEADLINE, Place, Service},
};

const CHAIN: u64 = 31_337;

pub async fn deploy(rpc: &str) -> Address {
    Address(crate::chain::contracts(rpc).await.settlement.into())
}

/// A place whose service anchors on the chain at `rpc`.
pub async fn place(column: Column, rpc: &str, contract: Address) -> Place {
    let mut place = Place::new(column, Network::new(Domain { chain_id: CHAIN, contract }, rpc)).await;
    place.config.chain.settler_key = Secret::new(SETTLER);
    place.config.batch.age_ms = 50;
    place.config.chain.resend_ms = 200;
    place
}

/// Submits and decides `count` requests; returns their ids.
pub fn decided(place: &Place, count: usize) -> Vec<Uuid> {
    (0..count)
        .map(|_| {
            let submitted = place.network.submitted("alice");
            place.submit(&submitted);
            place.decide(&place.network.verified(&place.network.evidence(&submitted, 2, 1)));
            submitted.request.id
        })
        .collect()
}

pub async fn document(service: &Service, place: &Place, id: Uuid) -> Option<(Document, Vec<u8>)> {
    let (status, body) = service.get(&format!("/v1/receipts/{id}"), Some(&place.key("alice"))).await;
    (status == 200).then(|| (serde_json::from_slice(&body).unwrap(), body))
}

pub async fn anchored(service: &Service, place: &Place, ids: &[Uuid]) -> Vec<Document> {
    let mut documents = Vec::new();
    for id in ids {
        let (document, bytes) = eventually(DEADLINE, async || {
            document(service, place, *id).await.filter(|(document, _)| document.status == Status::Anchored)
        })
        .await;
        let report = check(&bytes, &place.network.manifest, &place.network.registry.clone().into());
        assert!(!report.failed(), "{:?}", report.checks);
        documents.push(document);
    }
    documents
}

fn words(hashes: &[Hash32]) -> Vec<B256> {
    hashes.iter().map(|hash| hash.0.into()).collect()
}

/// The contract accepts each document's proof, and not that of a changed receipt.
pub async fn prove(reader: &ChainReader, documents: &[Document]) {
    for document in documents {
        let anchor = document.anchor.as_ref().unwrap();
        assert_eq!(reader.batch(anchor.sequence).await.unwrap().unwrap().0, anchor.receipts_root.0);
        let holds = async |leaf: Hash32| {
            reader.verify_receipt(anchor.sequence, leaf.0.into(), words(&anchor.proof)).await.unwrap()
        };
        assert!(holds(document.receipt.leaf()).await);
        let mut changed = document.receipt.clone();
        changed.payments[0].amount_micro += 1;
        assert!(!holds(changed.leaf()).await);
    }
}

pub async fn reader(rpc: &str, contract: Address) -> ChainReader {
    ChainReader::connect(rpc, contract.0.into()).await.unwrap()
}

#[tokio::test]
async fn receipts_are_proved_on_the_chain_embedded() {
    receipts_are_proved_on_the_chain(Column::Embedded).await;
}

#[tokio::test]
async fn receipts_are_proved_on_the_chain_cluster() {
    receipts_are_proved_on_the_chain(Column::Cluster).await;
}

async fn receipts_are_proved_on_the_chain(column: Column) {
    let anvil = Anvil::start().await;
    let contract = deploy(anvil.url()).await;
    let mut place = place(column, anvil.url(), contract).await;
    place.config.batch.size = 3;
    place.config.batch.limit = 4;
    let mut told = place.listen("explorer.anchored").await;
    let service = place.start().await;
    let ids = decided(&place, 10);
    let documents = anchored(&service, &place, &ids).await;
    let reader = reader(anvil.url(), contract).await;
    prove(&reader, &documents).await;

    let head = reader.head().await.unwrap();
    assert!(head.sequence >= 3, "at most four receipts a batch: {}", head.sequence);
    let mut seen = Vec::new();
    let mut total = 0;
    for sequence in 1..=head.sequence {
        let message: v1::BatchAnchored = told.next().await;
        let posted = reader.posted(message.sequence, 0).await.unwrap().unwrap();
        assert_eq!(message.receipts_root, posted.batch.receipts_root.to_vec());
        assert_eq!((message.transaction, message.block_number), (posted.tx.to_vec(), posted.block));
        assert_eq!(message.request_ids.len() as u64, posted.batch.count);
        seen.extend(message.request_ids.iter().map(|id| Uuid::from_slice(id).unwrap()));
        let here = reader.posted(sequence, 0).await.unwrap().unwrap().batch;
        total += here.total;
        assert_ne!(here.reward_root, B256::ZERO);
    }
    seen.sort();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(seen, expected);
    assert_eq!(total, 10 * 120);
    assert_eq!(service.json("/readyz", None).await["checks"]["chain"], "up");
    service.stop().await;
}

#[tokio::test]
async fn an_anchor_waits_for_its_depth() {
    let anvil = Anvil::start().await;
    let contract = deploy(anvil.url()).await;
    let mut place = place(Column::Embedded, anvil.url(), contract).await;
    place.config.chain.confirmations = 3;
    let service = place.start().await;
    let ids = decided(&place, 1);
    let reader = reader(anvil.url(), contract).await;
    // anvil may refuse a call in the very moment in which it makes a block.
    eventually(DEADLINE, async || reader.head().await.is_ok_and(|head| head.sequence == 1)).await;
    let (first, _) = document(&service, &place, ids[0]).await.unwrap();
    assert_eq!(first.status, Status::Pending);
    mine(anvil.url(), 2).await;
    prove(&reader, &anchored(&service, &place, &ids).await).await;
    service.stop().await;
}

async fn rpc(url: &str, method: &str, params: serde_json::Value) -> serde_json::Value {
    let call = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
    let answer: serde_json::Value =
        reqwest::Client::new().post(url).json(&call).send().await.unwrap().json().await.unwrap();
    assert!(answer.get("error").is_none(), "{method}: {answer}");
    answer["result"].clone()
}

async fn mine(url: &str, blocks: u64) {
    rpc(url, "anvil_mine", serde_json::json!([format!("{blocks:#x}")])).await;
}

#[tokio::test]
async fn while_the_chain_is_away_receipts_wait_and_everything_else_goes_on() {
    let folder = infera_testkit::TempDir::new().unwrap();
    let devnet_config = crate::chain::config(&folder);
    let devnet = Devnet::start(&devnet_config).await.unwrap();
    let url = devnet.rpc_url().to_string();
    let contract = deploy(&url).await;
    devnet.stop().await.unwrap();

    let place = place(Column::Embedded, &url, contract).await;
    let service = place.start().await;
    let ids = decided(&place, 3);
    service.wait_balance(&place, "alice", (10_000 - 3 * 120, 0)).await;
    let down = eventually(DEADLINE, async || {
        let (status, body) = service.get("/readyz", None).await;
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let chain = body["checks"]["chain"].as_str().unwrap().to_owned();
        (status == 503 && body["failing"] == serde_json::json!(["chain", "escrow"]) && chain != "starting")
            .then_some(chain)
    })
    .await;
    assert!(down.contains("eth_chainId"), "{down}");
    let (first, _) = document(&service, &place, ids[0]).await.unwrap();
    assert_eq!(first.status, Status::Pending);

    let devnet = Devnet::start(&devnet_config).await.unwrap();
    prove(&reader(&url, contract).await, &anchored(&service, &place, &ids).await).await;
    service.stop().await;
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn a_batch_that_the_chain_lost_is_posted_again() {
    let anvil = Anvil::start().await;
    let contract = deploy(anvil.url()).await;
    let place = place(Column::Embedded, anvil.url(), contract).await;
    let service = place.start().await;
    let snapshot = rpc(anvil.url(), "evm_snapshot", serde_json::json!([])).await;
    let mut ids = decided(&place, 2);
    anchored(&service, &place, &ids).await;
    rpc(anvil.url(), "evm_revert", serde_json::json!([snapshot])).await;
    let reader = reader(anvil.url(), contract).await;
    assert_eq!(reader.head().await.unwrap().sequence, 0);
    ids.extend(decided(&place, 1));
    prove(&reader, &anchored(&service, &place, &ids[2..]).await).await;
    prove(&reader, &anchored(&service, &place, &ids).await).await;
    service.stop().await;
}

#[tokio::test]
async fn a_contradicting_chain_stops_the_batcher_with_a_reason() {
    let anvil = Anvil::start().await;
    let contract = deploy(anvil.url()).await;
    let place = place(Column::Embedded, anvil.url(), contract).await;
    let service = place.start().await;
    let ids = decided(&place, 1);
    anchored(&service, &place, &ids).await;
    // Another settler with the same key.
    let chain = Chain::connect(anvil.url(), SETTLER, contract.0.into()).await.unwrap();
    let foreign = infera_settlement::chain::Batch {
        sequence: 2,
        previous_hash: chain.head().await.unwrap().hash,
        receipts_root: B256::repeat_byte(1),
        count: 1,
        reward_root: B256::ZERO,
        total: 0,
    };
    let signed = chain.sign_batch(&foreign, chain.next_nonce().await.unwrap()).await.unwrap();
    chain.send_raw(&signed.raw).await.unwrap();
    let more = decided(&place, 1);
    let reason = eventually(DEADLINE, async || {
        let (_, body) = service.get("/readyz", None).await;
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        body["checks"]["chain"]
            .as_str()
            .filter(|reason| reason.contains("another settler"))
            .map(str::to_owned)
    })
    .await;
    assert!(reason.contains("batch 2"), "{reason}");
    let (waiting, _) = document(&service, &place, more[0]).await.unwrap();
    assert_eq!(waiting.status, Status::Pending);
    service.stop().await;
}
