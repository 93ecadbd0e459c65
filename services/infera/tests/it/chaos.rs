//! What must not be lost when parts misbehave or die.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{network::Network, suite::the_books_balance};

const REQUESTS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(150);

/// A developer's loop: asks again, with the same key, until there is an answer.
async fn ask_until_answered(network: &Network, number: usize) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match network.ask(&format!("What is {number} + 1?"), &format!("chaos-{number}")).await {
            Ok(answer) => return answer,
            Err(error) if Instant::now() > deadline => {
                panic!("request {number}: {error}\n{}", network.logs())
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(300)).await,
        }
    }
}

fn receipt_id(answer: &Value) -> String {
    answer["infera"]["receipt"].as_str().unwrap_or_else(|| panic!("no receipt: {answer}")).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_garbage_node_is_an_outlier_and_is_not_paid_and_a_killed_one_is_replaced() {
    let network = Network::start("embedded", &["--nodes", "5", "--node-fault", "5=garbage"]);
    let nodes = network.get(&format!("{}/v1/nodes", network.url("dispatcher_url"))).await;
    assert_eq!(nodes["nodes"].as_array().unwrap().len(), 5);
    let mut outliers = HashSet::new();
    let mut paid = HashSet::new();
    for round in 0..8 {
        if round == 2 {
            network.kill9("node-1");
        }
        let key = format!("garbage-{round}");
        let body = serde_json::json!({
            "model": network.url("model"), "temperature": 0, "max_tokens": 48,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        });
        let response = network
            .http
            .post(format!("{}/chat/completions", network.url("base_url")))
            .bearer_auth(network.key())
            .header("Idempotency-Key", key)
            .json(&body)
            .send();
        let (response, ()) = tokio::join!(response, async {
            if round == 4 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                network.kill9("node-2");
            }
        });
        let answer: Value = response.unwrap().json().await.unwrap();
        assert_eq!(answer["choices"][0]["message"]["content"], "The capital of France is Paris.", "{answer}");
        let document: Value =
            serde_json::from_slice(&network.anchored_receipt(&receipt_id(&answer)).await).unwrap();
        for unpaid in document["receipt"]["unpaid"].as_array().unwrap() {
            if unpaid["reason"] == "outlier" {
                outliers.insert(unpaid["operator"].to_string());
            }
        }
        for payment in document["receipt"]["payments"].as_array().unwrap() {
            paid.insert(payment["operator"].to_string());
        }
    }
    // A draw of three of five misses the garbage node in 8 requests with probability (4/10)^8 = 0.07%.
    assert_eq!(outliers.len(), 1, "the garbage node, and no other: {outliers:?}");
    assert!(paid.is_disjoint(&outliers), "{paid:?} {outliers:?}");
    the_books_balance(&network).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_service_that_is_killed_loses_a_request() {
    let network = Network::start("cluster", &[]);
    for service in ["gateway", "settlement", "mempool", "dispatcher", "verifier", "explorer"] {
        let base = match service {
            "gateway" => 0,
            "settlement" => 100,
            "mempool" => 200,
            "dispatcher" => 300,
            "verifier" => 400,
            _ => 500,
        };
        let requests = (0..REQUESTS).map(|i| ask_until_answered(&network, base + i));
        let (answers, ()) = tokio::join!(futures::future::join_all(requests), async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            network.kill9(service);
        });
        let receipts: HashSet<_> = answers.iter().map(receipt_id).collect();
        assert_eq!(receipts.len(), REQUESTS, "{service}: two requests share a receipt");
        for id in &receipts {
            let document: Value = serde_json::from_slice(&network.anchored_receipt(id).await).unwrap();
            assert_eq!(document["receipt"]["id"], *id);
        }
        the_books_balance(&network).await;
        let audit = network.get(&format!("{}/v1/ledger/audit", network.url("settlement_url"))).await;
        assert_eq!(audit["held_micro"], 0, "{service}: {audit}");
    }
}
