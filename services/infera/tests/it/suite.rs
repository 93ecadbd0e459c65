//! What a network must do, on either column.

use std::{collections::HashSet, time::Duration};

use infera_runtime::CancellationToken;
use infera_testkit::{TempDir, eventually, otlp::Receiver, sqlite_url};
use serde_json::Value;

use crate::{accounts, governed, network::Network};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded() {
    everything("embedded").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cluster() {
    everything("cluster").await;
}

async fn everything(profile: &'static str) {
    let traces = Receiver::start().await;
    let endpoint = traces.endpoint();
    let mut options = vec!["--otlp", &endpoint];
    // The cluster column searches over Qdrant's protocol; there is no server to install, so the exact index
    // is served over it, unless QDRANT_URL names a real one.
    let qdrant = if profile == "cluster" { Some(qdrant().await) } else { None };
    let url = qdrant.as_ref().map(|(url, _)| url.as_str());
    options.extend(url.iter().flat_map(|url| ["--qdrant", url]));
    let network = Network::start(profile, &options);
    let answers = network.openai_client();
    let receipt = answers["plain"]["receipt"].as_str().unwrap().to_owned();
    receipts_prove_themselves(&network, &receipt).await;
    the_books_balance(&network).await;
    operators_are_paid(&network).await;
    accounts::wallets_have_accounts(&network).await;
    governed::holders_decide_and_strangers_check(&network).await;
    history_is_there(&network, &receipt).await;
    one_trace_per_request(&network, &traces).await;
    a_second_start_goes_on(&network, &receipt).await;
}

/// An address that speaks Qdrant's gRPC, and the folder that it keeps its vectors in.
async fn qdrant() -> (String, Option<TempDir>) {
    if let Ok(url) = std::env::var("QDRANT_URL") {
        return (url, None);
    }
    let dir = TempDir::new().unwrap();
    let index = infera_embed::Exact::open(&sqlite_url(&dir), None).await.unwrap();
    let index = std::sync::Arc::new(index);
    let running = infera_embed::serve::start(index, "127.0.0.1:0", CancellationToken::new()).await.unwrap();
    (running.url(), Some(dir))
}

async fn receipts_prove_themselves(network: &Network, id: &str) {
    let document = network.anchored_receipt(id).await;
    let (status, printed) = network.verify(&document);
    assert_eq!(status, Some(0), "{printed}");
    assert!(printed.contains("3 of 3 nodes agreed"), "{printed}");
    // Every byte is changed in the protocol's own tests; here, with the chain, a few of each region, and the
    // one field that only the chain can check.
    let text = String::from_utf8(document.clone()).unwrap();
    let sequence = text.find("\"sequence\":").unwrap() + 11;
    let mut changed_sequence = document.clone();
    changed_sequence[sequence] ^= 1;
    for at in (0..document.len()).step_by(document.len() / 12).chain([sequence]) {
        let mut changed = document.clone();
        changed[at] ^= 1;
        let (status, printed) = network.verify(&changed);
        assert_eq!(status, Some(1), "byte {at} was changed: {printed}");
    }
    // A program that shares no code with this one says the same, with the chain and without.
    let rpc_url = network.url("rpc_url");
    let rpc = ["--rpc", rpc_url.as_str()];
    let (chain, alone): (&[&str], &[&str]) = (&rpc, &[]);
    for (options, bytes, expected) in
        [(chain, &document, 0), (alone, &document, 0), (chain, &changed_sequence, 1)]
    {
        let (status, printed) = network.verify_in_python(bytes, options);
        assert_eq!(status, Some(expected), "{options:?}: {printed}");
    }
    // A stranger sees the receipt, and neither prompt nor answers.
    let url = format!("{}/v1/receipts/{id}", network.url("settlement_url"));
    let public = network.http.get(url).send().await.unwrap().bytes().await.unwrap();
    let (status, printed) = network.verify(&public);
    assert_eq!(status, Some(3), "{printed}");
    assert!(printed.contains("only partly checked"), "{printed}");
    assert_eq!(serde_json::from_slice::<Value>(&public).unwrap()["evidence"], Value::Null);
    let (status, printed) = network.verify_in_python(&public, chain);
    assert_eq!(status, Some(3), "{printed}");
}

pub async fn the_books_balance(network: &Network) {
    let audit = network.get(&format!("{}/v1/ledger/audit", network.url("settlement_url"))).await;
    assert_eq!(audit["ok"], true, "{audit}");
    assert_eq!(audit["sum_micro"], 0, "{audit}");
}

/// From the answer to tokens at the operator's address; and stake in and out.
async fn operators_are_paid(network: &Network) {
    let (status, printed) = network.command(&["ledger", "audit"]);
    assert_eq!(status, Some(0), "{printed}");
    assert!(printed.contains("the books balance"), "{printed}");

    let earnings = |node: &str| -> Value {
        let (status, printed) = network.command(&["operator", "earnings", "--json", "--node", node]);
        assert_eq!(status, Some(0), "{printed}");
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    };
    let micro = |earnings: &Value, part: &str| earnings[part].as_u64().unwrap();
    // Four nodes, three of which answered each request: at least one of two has earned.
    let node = ["1", "2"].into_iter().find(|node| micro(&earnings(node), "earned_micro") > 0).unwrap();
    let claimable = eventually(Duration::from_secs(60), async || {
        // The challenge delay, without the waiting.
        let pass =
            serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": "evm_increaseTime", "params": [31]});
        network.http.post(network.url("rpc_url")).json(&pass).send().await.unwrap();
        let earnings = earnings(node);
        let parts = ["pending_micro", "verified_micro", "claimable_micro", "paid_micro"];
        let sum: u64 = parts.iter().map(|part| micro(&earnings, part)).sum();
        assert_eq!(sum, micro(&earnings, "earned_micro"), "{earnings}");
        Some(micro(&earnings, "claimable_micro")).filter(|claimable| *claimable > 0).ok_or(earnings)
    })
    .await;
    // Of a public network operators reach the gateway alone.
    let base_url = network.url("base_url");
    let gateway = base_url.trim_end_matches("/v1");
    let claim = ["operator", "claim", "--node", node, "--settlement", gateway];
    let (status, printed) = network.command(&claim);
    assert!(status == Some(0) && printed.contains("claimed "), "{printed}");
    assert!(micro(&earnings(node), "paid_micro") >= claimable);
    let (status, printed) = network.command(&["operator", "claim", "--node", node]);
    assert!(status == Some(0) && printed.contains("nothing new"), "{printed}");
    // The same under the name of what earns.
    let (_, printed) = network.command(&["node", "earnings", "--node", node]);
    assert!(
        ["pending", "verified", "claimable", "paid"].iter().all(|word| printed.contains(word)),
        "{printed}"
    );

    let (status, printed) = network.command(&["operator", "stake", "1500", "--node", node]);
    assert!(status == Some(1) && printed.contains("--faucet"), "{printed}");
    let (status, printed) = network.command(&["operator", "stake", "1500", "--faucet", "--node", node]);
    assert!(status == Some(0) && printed.contains("staked 1500.000000 INFER"), "{printed}");
    let (status, printed) = network.command(&["operator", "unstake", "500", "--node", node]);
    assert!(status == Some(0) && printed.contains("on its way out 500.000000 INFER"), "{printed}");
    let (status, printed) = network.command(&["operator", "unstake", "--node", node]);
    assert!(status == Some(1) && printed.contains("too early"), "{printed}");
}

async fn history_is_there(network: &Network, id: &str) {
    let explorer = network.url("explorer_url");
    let row = eventually(Duration::from_secs(30), || async {
        let response = network.http.get(format!("{explorer}/v1/history/{id}")).send().await.ok()?;
        let row: Value = response.json().await.ok()?;
        (row["status"] == "anchored").then_some(row)
    })
    .await;
    assert_eq!(row["receipt"]["verified"].as_array().unwrap().len(), 3, "{row}");
    let operators: HashSet<_> =
        row["receipt"]["verified"].as_array().unwrap().iter().map(|v| v["operator"].to_string()).collect();
    assert_eq!(operators.len(), 3, "{row}");
    let found = network.get(&format!("{explorer}/v1/search?q=the+capital+of+France+is+Paris&limit=5")).await;
    assert!(!found["data"].as_array().unwrap().is_empty(), "{found}");
    let page =
        network.http.get(format!("{explorer}/receipts/{id}")).send().await.unwrap().text().await.unwrap();
    assert!(page.contains(id) && page.contains("infera verify"));
}

/// One request, one trace: every service and three nodes have a span in it, and every span but the first
/// has its parent in it.
async fn one_trace_per_request(network: &Network, traces: &Receiver) {
    let id =
        format!("{:032x}", 0x5eed_0000_0000_0000_0000_0000_0000_0000_u128 + u128::from(std::process::id()));
    let body = serde_json::json!({
        "model": network.url("model"), "temperature": 0, "max_tokens": 4,
        "messages": [{"role": "user", "content": "Hi"}],
    });
    let response = network
        .http
        .post(format!("{}/chat/completions", network.url("base_url")))
        .bearer_auth(network.key())
        .header("traceparent", format!("00-{id}-00f067aa0ba902b7-01"))
        .json(&body)
        .send()
        .await
        .unwrap();
    assert!(response.status().is_success());
    let wanted = [
        "settlement.submitted process",
        "mempool.funded process",
        "dispatcher attempt",
        "node generate",
        "verifier.collected process",
        "settlement.verdict process",
        "mempool.verdict process",
        "gateway.verdict process",
        "explorer.receipt process",
    ];
    let of_trace = |spans: &[infera_testkit::otlp::Span]| -> Vec<infera_testkit::otlp::Span> {
        spans.iter().filter(|span| span.trace_id == id).cloned().collect()
    };
    let complete = |spans: &[infera_testkit::otlp::Span]| {
        let spans = of_trace(spans);
        wanted.iter().all(|name| spans.iter().any(|span| span.name == *name))
            && spans.iter().filter(|span| span.name == "node generate").count() == 3
            && spans.iter().any(|span| span.parent.as_deref() == Some("00f067aa0ba902b7"))
            && spans.iter().all(|span| {
                span.parent.as_deref() == Some("00f067aa0ba902b7")
                    || spans.iter().any(|other| Some(&other.span_id) == span.parent.as_ref())
            })
    };
    let spans = of_trace(&traces.wait_for(complete, Duration::from_secs(60)).await);
    let ancestors = |name: &str| {
        let mut span = spans.iter().find(|span| span.name == name).unwrap();
        let mut names = vec![span.name.clone()];
        while let Some(parent) = spans.iter().find(|other| Some(&other.span_id) == span.parent.as_ref()) {
            names.push(parent.name.clone());
            span = parent;
        }
        names
    };
    let way = ancestors("node generate");
    assert!(way.contains(&"dispatcher attempt".to_owned()), "{way:?}");
    assert!(way.contains(&"mempool.funded process".to_owned()), "{way:?}");
    assert!(way.contains(&"settlement.submitted process".to_owned()), "{way:?}");
    assert!(ancestors("explorer.receipt process").contains(&"verifier.collected process".to_owned()));
}

async fn a_second_start_goes_on(network: &Network, id: &str) {
    let key = network.key();
    network.down();
    network.up();
    assert_eq!(network.key(), key);
    let (status, printed) = network.verify(&network.anchored_receipt(id).await);
    assert_eq!(status, Some(0), "{printed}");
    let answer = network.ask("What is the capital of Italy?", "after-restart").await.unwrap();
    assert_eq!(answer["infera"]["verdict"], "verified", "{answer}");
    the_books_balance(network).await;
}
