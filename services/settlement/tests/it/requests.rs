//! Holds, verdicts, receipts: on both columns of the table of ports.

use infera_protocol::document::{Document, Outcome, Status, check};
use infera_runtime::db;
use infera_settlement::{
    config::HoldsConfig,
    holds::{self, HoldError},
};
use infera_testkit::eventually;
use infera_wire::v1;
use uuid::Uuid;

use crate::{
    network::{Network, submitted_bytes, verdict_bytes},
    service::{Column, DEADLINE, Place},
};

/// Each test on SQLite with the bus in process, and on PostgreSQL with RabbitMQ.
macro_rules! on_both_columns {
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::service::Column::Embedded).await;
            })*
        }
        mod cluster {
            $(#[tokio::test]
            async fn $name() {
                super::$name(crate::service::Column::Cluster).await;
            })*
        }
    };
}

on_both_columns!(
    a_verified_request_is_charged_and_paid,
    duplicates_and_a_verdict_that_comes_first_change_nothing,
    what_cannot_be_paid_is_rejected_and_a_failure_is_refunded,
    more_replicas_than_were_held_never_cost_more,
    garbage_and_forged_evidence_are_dead_letters,
    credits_are_given_once,
    a_hold_whose_verdict_was_lost_is_found_and_given_back,
);

async fn a_hold_whose_verdict_was_lost_is_found_and_given_back(column: Column) {
    let mut place = Place::new(column, Network::offline()).await;
    place.config.holds = HoldsConfig { grace_secs: 0, check_secs: 1 };
    let mut funded = place.listen("mempool.funded").await;
    let service = place.start().await;
    let submitted = place.network.submitted("alice");
    let id = submitted.request.id;
    place.submit(&submitted);
    let _: v1::RequestFunded = funded.next().await;
    // Its verdict can't be used, and ends among the dead letters.
    let mut evidence = place.network.evidence(&submitted, 3, 0);
    evidence.post_proof = evidence.assign_proof;
    place.decide(&verdict_with_id(place.network.verified(&evidence)));
    let figures = [
        "infera_settlement_holds_overdue 1\n",
        "infera_settlement_holds_overdue_micro 600\n",
        "infera_bus_deliveries_total{outcome=\"dead\",queue=\"settlement.verdict\"} 1\n",
    ];
    eventually(DEADLINE, async || {
        let (_, metrics) = service.get("/metrics", None).await;
        let metrics = String::from_utf8(metrics).unwrap();
        if figures.iter().all(|figure| metrics.contains(figure)) { Ok(()) } else { Err(metrics) }
    })
    .await;

    let common = &place.config.common;
    let db = db::connect(common.database_url.expose(), common.database_schema.as_deref()).await.unwrap();
    let rows = holds::overdue(&db, 0, 10).await.unwrap();
    assert_eq!(rows.iter().map(|row| (row.id, row.held_micro)).collect::<Vec<_>>(), [(id, 600)]);
    assert!(holds::overdue(&db, 600, 10).await.unwrap().is_empty(), "it was funded just now");
    assert!(matches!(holds::release(&db, id, 600).await, Err(HoldError::Early(_))));
    assert!(matches!(holds::release(&db, Uuid::now_v7(), 0).await, Err(HoldError::Unknown(_))));
    assert_eq!(holds::release(&db, id, 0).await.unwrap(), 600);
    assert!(matches!(holds::release(&db, id, 0).await, Err(HoldError::Closed { .. })));
    assert_eq!(service.balance(&place, "alice").await, (10_000, 0));

    // What comes later changes nothing.
    let usable = place.network.evidence(&submitted, 3, 0);
    let mut late = verdict_with_id(place.network.verified(&usable));
    late.round = 2;
    place.decide(&late);
    let next = place.network.submitted("bob");
    place.submit(&next);
    place.decide(&place.network.failed(&next));
    service.wait_balance(&place, "bob", (500, 0)).await;
    assert_eq!(service.balance(&place, "alice").await, (10_000, 0));
    service.audit().await;
    service.stop().await;
}

async fn a_verified_request_is_charged_and_paid(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    let (mut funded, mut issued) =
        (place.listen("mempool.funded").await, place.listen("explorer.receipt").await);
    let service = place.start().await;
    let submitted = place.network.submitted("alice");
    place.submit(&submitted);
    let message: v1::RequestFunded = funded.next().await;
    assert_eq!((message.held_micro, message.price_micro), (600, 2));
    assert_eq!(service.balance(&place, "alice").await, (9_400, 600));

    place.decide(&place.network.more_nodes(&submitted));
    // Two of three agree: each verified replica earns 2 x (10 + 20) = 60.
    let evidence = place.network.evidence(&submitted, 2, 1);
    let receipt_path = format!("/v1/receipts/{}", submitted.request.id);
    let (status, body) = service.get(&receipt_path, None).await;
    assert_eq!(status, 404);
    assert!(String::from_utf8(body).unwrap().contains("no_receipt"));
    place.decide(&verdict_with_id(place.network.verified(&evidence)));
    let message: v1::ReceiptIssued = issued.next().await;
    assert_eq!(message.model, "test-model");
    assert_eq!(service.balance(&place, "alice").await, (9_880, 0));
    let audit = service.audit().await;
    assert_eq!(audit["operators_micro"], 120);
    assert_eq!(audit["issuance_micro"], -10_500);
    assert_eq!(audit["reserve_micro"], 0);

    let (_, public) = service.get(&receipt_path, None).await;
    let document: Document = serde_json::from_slice(&public).unwrap();
    assert_eq!((document.status, document.evidence), (Status::Pending, None));
    assert_eq!(serde_json::to_vec(&document.receipt).unwrap(), message.receipt);
    let (_, others) = service.get(&receipt_path, Some(&place.key("bob"))).await;
    assert_eq!(others, public);
    let (_, own) = service.get(&receipt_path, Some(&place.key("alice"))).await;
    let report = check(&own, &place.network.manifest, &place.network.registry.clone().into());
    assert!(!report.failed(), "{:?}", report.checks);
    let unchecked: Vec<_> = report
        .checks
        .iter()
        .filter(|c| matches!(c.outcome, Outcome::NotChecked(_)))
        .map(|c| c.name)
        .collect();
    assert_eq!(unchecked, ["merkle proof"]);

    // Evidence holds the prompt and the answer: a key for something else does not bring it.
    let (status, body) = service.get(&receipt_path, Some(&place.key_for("alice", &["chat"]))).await;
    let body = String::from_utf8(body).unwrap();
    assert_eq!(status, 403, "{body}");
    assert!(body.contains("insufficient_scope") && body.contains("`receipts`"), "{body}");

    assert_eq!(service.get(&receipt_path, Some("forged")).await.0, 401);
    assert_eq!(service.get("/v1/balance", None).await.0, 401);
    assert_eq!(service.get("/v1/receipts/none", None).await.0, 400);
    assert_eq!(service.get(&format!("/v1/receipts/{}", Uuid::now_v7()), None).await.0, 404);
    service.stop().await;
}

/// The first form of a closing verdict after `MoreNodes` has another message id.
fn verdict_with_id(mut verdict: v1::Verdict) -> v1::Verdict {
    verdict.round = 2;
    verdict
}

async fn duplicates_and_a_verdict_that_comes_first_change_nothing(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    let mut issued = place.listen("explorer.receipt").await;
    let service = place.start().await;
    let requests: Vec<_> = (0..4).map(|_| place.network.submitted("alice")).collect();
    for submitted in &requests {
        let verdict = place.network.verified(&place.network.evidence(submitted, 3, 0));
        let (id, body) = verdict_bytes(&verdict);
        place.publish("verdict.gw-1", id, body.clone());
        for _ in 0..2 {
            place.submit(submitted);
            place.publish("request.submitted", Uuid::now_v7(), submitted_bytes(submitted).1);
            place.publish("verdict.gw-1", id, body.clone());
            place.publish("verdict.gw-1", Uuid::now_v7(), body.clone());
        }
    }
    for _ in &requests {
        let _: v1::ReceiptIssued = issued.next().await;
    }
    // A late refusal of what is settled.
    place.publish("verdict.gw-1", Uuid::now_v7(), verdict_bytes(&place.network.failed(&requests[0])).1);
    let last = place.network.submitted("alice");
    place.submit(&last);
    // 4 x 3 replicas x 60, and the hold of the last.
    service.wait_balance(&place, "alice", (10_000 - 4 * 180 - 600, 600)).await;
    let audit = service.audit().await;
    assert_eq!(audit["operators_micro"], 4 * 180);
    assert_eq!(audit["transfers"], 2 + 4 * 2 + 1);
    service.stop().await;
}

async fn what_cannot_be_paid_is_rejected_and_a_failure_is_refunded(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    let (mut rejected, mut funded) =
        (place.listen("gateway.rejected").await, place.listen("mempool.funded").await);
    let service = place.start().await;
    let poor = place.network.submitted("bob");
    place.submit(&poor);
    let message: v1::RequestRejected = rejected.next().await;
    assert_eq!((message.code.as_str(), message.reply_to.as_str()), ("insufficient_quota", "gw-1"));
    assert!(message.message.contains("600") && message.message.contains("500"), "{}", message.message);
    // Asked again under another message id: nothing is funded after the refusal was said.
    place.publish("request.submitted", Uuid::now_v7(), submitted_bytes(&poor).1);
    place.submit(&place.network.submitted("nobody"));
    let nobody = loop {
        let message: v1::RequestRejected = rejected.next().await;
        if message.account != "bob" {
            break message;
        }
    };
    assert_eq!((nobody.account.as_str(), nobody.code.as_str()), ("nobody", "insufficient_quota"));
    let mut unknown = place.network.submitted("alice");
    unknown.model = "gpt-9".into();
    place.submit(&unknown);
    let unknown = loop {
        let message: v1::RequestRejected = rejected.next().await;
        if message.account == "alice" {
            break message;
        }
    };
    assert_eq!(unknown.code, "model_not_found");
    assert_eq!(service.balance(&place, "bob").await, (500, 0));

    let submitted = place.network.submitted("alice");
    place.submit(&submitted);
    let _: v1::RequestFunded = funded.next().await;
    assert_eq!(service.balance(&place, "alice").await, (9_400, 600));
    place.decide(&place.network.failed(&submitted));
    service.wait_balance(&place, "alice", (10_000, 0)).await;
    // What failed stays failed.
    let late = place.network.verified(&place.network.evidence(&submitted, 3, 0));
    place.publish("verdict.gw-1", Uuid::now_v7(), verdict_bytes(&late).1);
    let next = place.network.submitted("alice");
    place.submit(&next);
    let _: v1::RequestFunded = funded.next().await;
    assert_eq!(service.balance(&place, "alice").await, (9_400, 600));
    assert_eq!(service.audit().await["operators_micro"], 0);
    service.stop().await;
}

async fn more_replicas_than_were_held_never_cost_more(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    let mut issued = place.listen("explorer.receipt").await;
    let service = place.start().await;
    let mut submitted = place.network.submitted("alice");
    // Held: 3 x 2 x (10 + 21) = 186; five replicas of 2 x (10 + 20) earn 300.
    submitted.request.max_tokens = 21;
    place.submit(&submitted);
    place.decide(&place.network.verified(&place.network.evidence(&submitted, 5, 2)));
    let _: v1::ReceiptIssued = issued.next().await;
    assert_eq!(service.balance(&place, "alice").await, (10_000 - 186, 0));
    let audit = service.audit().await;
    assert_eq!((&audit["operators_micro"], &audit["reserve_micro"]), (&300.into(), &(-114).into()));
    service.stop().await;
}

async fn garbage_and_forged_evidence_are_dead_letters(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    let (mut dead, mut funded) = (place.listen("infera.dead").await, place.listen("mempool.funded").await);
    let service = place.start().await;
    place.publish("request.submitted", Uuid::now_v7(), vec![0xff; 40]);
    assert!(dead.dead().await.contains("RequestSubmitted"));
    place.publish("verdict.gw-1", Uuid::now_v7(), vec![0xff; 40]);
    assert!(dead.dead().await.contains("Verdict"));

    let submitted = place.network.submitted("alice");
    place.submit(&submitted);
    let _: v1::RequestFunded = funded.next().await;
    // The same id for another request.
    let mut swapped = submitted.clone();
    swapped.request.seed += 1;
    place.publish("request.submitted", Uuid::now_v7(), submitted_bytes(&swapped).1);
    assert!(dead.dead().await.contains("another request"));
    let mut fewer = submitted.clone();
    fewer.k = 5;
    place.publish("request.submitted", Uuid::now_v7(), submitted_bytes(&fewer).1);
    assert!(dead.dead().await.contains("another request"));
    let honest = place.network.evidence(&submitted, 2, 1);
    let other = place.network.submitted("alice");
    let mut forgeries = Vec::new();
    let mut forge = |expected: &'static str, change: &dyn Fn(&mut infera_protocol::evidence::Evidence)| {
        let mut evidence = honest.clone();
        change(&mut evidence);
        forgeries.push((expected, evidence));
    };
    forge("price_micro", &|e| e.price_micro = 3);
    forge("account", &|e| e.account = "bob".into());
    forge("request.id", &|e| e.request.id = other.request.id);
    forge("request_hash", &|e| e.request.max_tokens += 1);
    forge("`k`", &|e| e.k = 1);
    forge("terms.calibration", &|e| e.terms.calibration.pairs.clear());
    forge("dispatcher", &|e| e.dispatcher = infera_protocol::bytes::VrfKey(e.slots[0].node.0));
    forge("draw", &|e| e.slots.swap(0, 2));
    forge("epoch", &|e| e.epoch += 1);
    forge("assignment", &|e| e.assign_proof = e.post_proof);
    forge("commitment", &|e| {
        let stolen = e.slots[0].reveal.clone();
        e.slots[2].reveal = stolen;
    });
    forge("post draw", &|e| e.post_proof = e.assign_proof);
    for (expected, evidence) in forgeries {
        let mut verdict = place.network.verified(&evidence);
        verdict.request_id = submitted.request.id.as_bytes().to_vec();
        place.publish("verdict.gw-1", Uuid::now_v7(), verdict_bytes(&verdict).1);
        let reason = dead.dead().await;
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
    // Without a quorum there is no receipt.
    let split = place.network.verified(&place.network.evidence(&submitted, 1, 2));
    place.publish("verdict.gw-1", Uuid::now_v7(), verdict_bytes(&split).1);
    assert!(dead.dead().await.contains("no quorum"));
    assert_eq!(service.balance(&place, "alice").await, (9_400, 600));

    place.decide(&place.network.verified(&honest));
    service.wait_balance(&place, "alice", (9_880, 0)).await;
    service.audit().await;
    service.stop().await;
}

async fn credits_are_given_once(column: Column) {
    let place = Place::new(column, Network::offline()).await;
    for _ in 0..2 {
        let service = place.start().await;
        assert_eq!(service.balance(&place, "alice").await, (10_000, 0));
        assert_eq!(service.audit().await["issuance_micro"], -10_500);
        service.stop().await;
    }
}
