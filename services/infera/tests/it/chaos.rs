//! What must not be lost when parts misbehave or die.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    network::{Network, PATIENCE},
    suite::the_books_balance,
};

const REQUESTS: usize = 20;

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

/// The receipt of an answer, once it is on the chain.
async fn receipt(network: &Network, answer: &Value) -> Value {
    serde_json::from_slice(&network.anchored_receipt(&receipt_id(answer)).await).unwrap()
}

/// The operators of `list` in a receipt that satisfy `which`.
fn operators(document: &Value, list: &str, which: impl Fn(&Value) -> bool) -> Vec<String> {
    let rows = document["receipt"][list].as_array().unwrap();
    rows.iter().filter(|row| which(row)).map(|row| row["operator"].to_string()).collect()
}

const FRANCE: &str = "What is the capital of France?";
const PARIS: &str = "The capital of France is Paris.";

/// The receipts of three times four requests, four at once, so that nobody's places run out. While all operators are
/// equally new, three of five are drawn: that the first four miss one of them has the probability (2/5)^4 = 2.6%, and of
/// the others the next eight.
async fn twelve_answers(network: &Network, name: &str) -> Vec<Value> {
    let mut documents = Vec::new();
    for batch in 0..3 {
        let asked = (0..4).map(|i| async move { network.ask(FRANCE, &format!("{name}-{batch}-{i}")).await });
        for answer in futures::future::join_all(asked).await {
            let answer = answer.unwrap();
            assert_eq!(answer["choices"][0]["message"]["content"], PARIS, "{answer}");
            documents.push(receipt(network, &answer).await);
        }
    }
    documents
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_garbage_node_is_an_outlier_and_is_not_paid() {
    let network = Network::start("embedded", &["--nodes", "5", "--node-fault", "5=garbage"]);
    let (mut outliers, mut paid) = (HashSet::new(), HashSet::new());
    for document in twelve_answers(&network, "garbage").await {
        outliers.extend(operators(&document, "unpaid", |row| row["reason"] == "outlier"));
        paid.extend(operators(&document, "payments", |_| true));
    }
    assert_eq!(outliers.len(), 1, "the garbage node, and no other: {outliers:?}");
    assert!(paid.is_disjoint(&outliers), "{paid:?} {outliers:?}");
    // Referees denied it: its operator is not drawn any more, and can see why.
    let operator = outliers.into_iter().next().unwrap();
    let url = format!("{}/v1/operators/{}", network.url("dispatcher_url"), operator.trim_matches('"'));
    let standing = network.get(&url).await;
    assert_eq!(
        (&standing["eligible"], &standing["last_faults"][0]["reason"]),
        (&false.into(), &"answer".into())
    );
    the_books_balance(&network).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_in_mid_answer_is_replaced_and_is_not_paid() {
    // It dies after three tokens of every answer, and is started again.
    let network = Network::start("embedded", &["--nodes", "5", "--node-fault", "5=crash"]);
    let (mut died, mut paid) = (HashSet::new(), HashSet::new());
    for document in twelve_answers(&network, "crash").await {
        assert_eq!(operators(&document, "verified", |_| true).len(), 3, "{document}");
        died.extend(operators(&document, "unpaid", |_| true));
        paid.extend(operators(&document, "payments", |_| true));
    }
    assert_eq!(died.len(), 1, "the node that dies, and no other: {died:?}");
    assert!(paid.is_disjoint(&died), "{paid:?} {died:?}");
    the_books_balance(&network).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_service_that_is_killed_loses_a_request() {
    let network = Network::start("cluster", &[]);
    let services = ["gateway", "settlement", "mempool", "dispatcher", "verifier", "explorer"];
    let mut settled = 0;
    for (round, service) in services.into_iter().enumerate() {
        let numbers = round * REQUESTS..(round + 1) * REQUESTS;
        let network = &network;
        let requests = numbers.map(|number| async move {
            let (question, key) = (format!("What is {number} + 1?"), format!("chaos-{number}"));
            let first = network.ask(&question, &key).await;
            match first {
                // Only the gateway's own death may break a client's connection; its repeat gets the answer.
                Err(_) if service == "gateway" => ask_until_answered(network, number).await,
                other => other.unwrap_or_else(|e| panic!("{service}: {e}\n{}", network.logs())),
            }
        });
        let (answers, open) = tokio::join!(futures::future::join_all(requests), async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            let balance = network.get(&format!("{}/v1/balance", network.url("settlement_url"))).await;
            network.kill9(service);
            balance["held_micro"].as_u64().unwrap()
        });
        assert!(open > 0, "{service} was killed when nothing was under way");
        let receipts: HashSet<_> = answers.iter().map(receipt_id).collect();
        assert_eq!(receipts.len(), REQUESTS, "{service}: two requests share a receipt");
        for id in &receipts {
            let document: Value = serde_json::from_slice(&network.anchored_receipt(id).await).unwrap();
            assert_eq!(document["receipt"]["id"], *id);
        }
        settled += receipts.len();
        audited(network, settled).await;
    }
}

/// One credit, and a hold and a settlement for each request: nothing was posted twice, nothing is held.
async fn audited(network: &Network, requests: usize) {
    // The audit is computed anew every few seconds.
    infera_testkit::eventually(Duration::from_secs(30), || async {
        let url = format!("{}/v1/ledger/audit", network.url("settlement_url"));
        let audit: Value = network.http.get(url).send().await.ok()?.json().await.ok()?;
        assert_ne!(audit["ok"], false, "{audit}");
        (audit["held_micro"] == 0 && audit["transfers"] == 1 + 2 * requests).then_some(())
    })
    .await;
}

/// Every step of a request's way, from the gateway's transaction to the explorer's.
const STEPS: [&str; 44] = [
    "gateway.request.before_commit",
    "gateway.request.after_commit",
    "outbox.request.submitted.before_publish",
    "outbox.request.submitted.after_publish",
    "settlement.submitted.before_commit",
    "settlement.submitted.after_commit",
    "outbox.request.funded.before_publish",
    "outbox.request.funded.after_publish",
    "mempool.funded.before_commit",
    "mempool.funded.after_commit",
    "mempool.offer.after_commit",
    "outbox.request.offered.before_publish",
    "outbox.request.offered.after_publish",
    "dispatcher.attempt.stored",
    "dispatcher.leased",
    "dispatcher.committed",
    "dispatcher.revealed",
    "dispatcher.collected.published",
    "node.committed",
    "verifier.collected.before_commit",
    "verifier.collected.after_commit",
    "outbox.verdict.before_publish",
    "outbox.verdict.after_publish",
    "settlement.verdict.before_commit",
    "settlement.verdict.after_commit",
    "mempool.verdict.before_commit",
    "mempool.verdict.after_commit",
    "gateway.verdict.before_commit",
    "gateway.verdict.after_commit",
    "outbox.receipt.before_publish",
    "outbox.receipt.after_publish",
    "settlement.batch.after_form",
    "settlement.batch.after_sign",
    "settlement.batch.after_send",
    "settlement.batch.before_mark",
    "settlement.batch.after_mark",
    "outbox.batch.anchored.before_publish",
    "outbox.batch.anchored.after_publish",
    "explorer.receipt.before_commit",
    "explorer.receipt.after_commit",
    "explorer.anchored.before_commit",
    "explorer.anchored.after_commit",
    "verifier.index.before_upsert",
    "verifier.index.after_upsert",
];

/// The process that is at a step dies there, once for every step, while requests come in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_at_every_step_loses_nothing_and_settles_nothing_twice() {
    let mut network = Network::new("cluster", &[]);
    let plan = network.data().join("plan");
    std::fs::create_dir(&plan).unwrap();
    network.set_env("INFERA_FAIL", format!("*=once:{}", plan.display()));
    network.up();
    for step in STEPS {
        std::fs::write(plan.join(step), "").unwrap();
    }
    let left = || -> Vec<String> {
        std::fs::read_dir(&plan).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    let mut receipts = HashSet::new();
    let deadline = Instant::now() + 4 * PATIENCE;
    for number in 0.. {
        let answer = ask_until_answered(&network, number).await;
        let id = receipt_id(&answer);
        let document: Value = serde_json::from_slice(&network.anchored_receipt(&id).await).unwrap();
        assert_eq!(document["receipt"]["id"], *id);
        assert!(receipts.insert(id), "two requests share a receipt");
        if left().is_empty() && number >= 5 {
            break;
        }
        assert!(Instant::now() < deadline, "never passed: {:?}\n{}", left(), network.logs());
    }
    audited(&network, receipts.len()).await;
    let explorer = network.url("explorer_url");
    for id in receipts {
        infera_testkit::eventually(PATIENCE, || async {
            let row: Value = network
                .http
                .get(format!("{explorer}/v1/history/{id}"))
                .send()
                .await
                .ok()?
                .json()
                .await
                .ok()?;
            (row["status"] == "anchored").then_some(())
        })
        .await;
    }
}

/// Node 5 commits to two answers for each slot: the first is as good as any, and both together cost it half of its stake.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_signs_two_answers_is_slashed() {
    let network = Network::start("embedded", &["--nodes", "5", "--node-fault", "5=equivocating"]);
    network.succeeds(&["operator", "stake", "1000", "--faucet", "--node", "5"]);
    let dispatcher = format!("{}/v1/contradictions", network.url("dispatcher_url"));
    let mut found = Value::Null;
    for number in 0..12 {
        ask_until_answered(&network, number).await;
        found = network.get(&dispatcher).await["contradictions"][0].clone();
        if !found.is_null() {
            break;
        }
    }
    assert_eq!(found["kind"], "two_commitments", "not drawn in 12 requests: {found}\n{}", network.logs());
    let evidence = network.get(&format!("{dispatcher}/{}", found["id"].as_str().unwrap())).await;

    let file = network.data().join("evidence.json");
    let slash = ["operator", "slash", file.to_str().unwrap(), "--node", "1"];
    let mut forged = evidence.clone();
    forged["second"]["commitment"] = Value::from(format!("0x{}", "33".repeat(32)));
    for (evidence, expected) in [(&forged, "not signed by the signer"), (&Value::Null, "no evidence")] {
        std::fs::write(&file, evidence.to_string()).unwrap();
        let (status, printed) = network.command(&slash);
        assert!(status == Some(1) && printed.contains(expected), "{printed}");
    }
    std::fs::write(&file, evidence.to_string()).unwrap();
    let printed = network.succeeds(&slash);
    assert!(printed.contains("lost 500.000000 INFER; 50.000000 INFER"), "{printed}");
    let operator = found["operator"].as_str().unwrap();
    assert!(printed.to_lowercase().contains(operator), "{printed}");
    let (status, printed) = network.command(&slash);
    assert!(status == Some(1) && printed.contains("has paid for this slot"), "{printed}");
    the_books_balance(&network).await;
}
