//! The read model over the bus, on both columns of the ports table.

use infera_protocol::document::Status;
use infera_testkit::eventually;
use infera_testkit::evidence::{Answer, Case, Referee};
use infera_wire::topology::queues;
use infera_wire::{Message, v1};
use uuid::Uuid;

use crate::harness::{PATIENCE, World, anchored};

macro_rules! on_both {
    ($($name:ident)*) => {
        mod embedded { $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                Box::pin(super::$name(super::World::new(crate::harness::On::Embedded).await)).await;
            }
        )* }
        mod cluster { $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                Box::pin(super::$name(super::World::new(crate::harness::On::Cluster).await)).await;
            }
        )* }
    };
}

on_both! {
    receipts_are_listed_filtered_and_paged
    receipt_and_anchor_come_in_either_order_and_twice
    garbage_is_dead_lettered_and_stops_nothing
    exports_stream_everything
    a_restart_goes_on
}

/// `count` receipts, one second apart, oldest first.
fn cases(world: &World, count: i64) -> Vec<Case> {
    (0..count)
        .map(|n| {
            let mut case = Case::new(&world.network);
            case.submitted_at_ms += n * 1_000;
            case
        })
        .collect()
}

async fn receipts_are_listed_filtered_and_paged(world: World) {
    let explorer = world.start().await;
    let mut cases = cases(&world, 7);
    cases[2].model = "other".to_owned();
    cases[2].request.model_root = world.network.registry.models[1].weights_root;
    let outlier = Referee::Denies(vec![vec![6, 2]]);
    cases[3] = cases[3]
        .clone()
        .answers([Answer::tokens(&[5, 2]), Answer::tokens(&[6, 2]), Answer::tokens(&[5, 2])])
        .referees([outlier.clone(), outlier]);
    for case in &cases {
        world.issue(case).await;
    }
    explorer.until_receipts(7).await;
    let newest_first: Vec<Uuid> = cases.iter().rev().map(|case| case.request.id).collect();
    assert_eq!(explorer.ids("").await, newest_first);
    assert_eq!(explorer.ids("model=other").await, [cases[2].request.id]);
    assert_eq!(explorer.ids("model=nobody").await, [] as [Uuid; 0]);

    let from = cases[4].receipt().decided_at_ms;
    assert_eq!(explorer.ids(&format!("from_ms={from}")).await, newest_first[..3]);
    assert_eq!(explorer.ids(&format!("to_ms={from}&limit=2")).await, newest_first[3..5]);

    // Pages follow each other without gap and overlap.
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let (_, page) = explorer.get(&format!("/v1/history?limit=3&cursor={cursor}")).await;
        for receipt in page["data"].as_array().unwrap() {
            seen.push(receipt["id"].as_str().unwrap().parse::<Uuid>().unwrap());
        }
        match page["next_cursor"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => break,
        }
    }
    assert_eq!(seen, newest_first);

    // By who took part, the outlier included.
    let receipt = cases[3].receipt();
    let outlier = receipt.unpaid[0];
    let expected: Vec<Uuid> = cases
        .iter()
        .rev()
        .map(Case::receipt)
        .filter(|r| {
            let verified = r.verified.iter().map(|v| v.node);
            verified.chain(r.unpaid.iter().map(|u| u.node)).any(|node| node == outlier.node)
        })
        .map(|r| r.id)
        .collect();
    assert!(expected.contains(&receipt.id));
    assert_eq!(explorer.ids(&format!("node={}", outlier.node)).await, expected);
    assert_eq!(explorer.ids(&format!("operator={}", outlier.operator)).await, expected);

    // The receipt is the one that was issued.
    let (status, detail) = explorer.get(&format!("/v1/history/{}", receipt.id)).await;
    assert_eq!((status, &detail["status"]), (200, &serde_json::to_value(Status::Pending).unwrap()));
    assert_eq!(detail["receipt"], serde_json::to_value(&receipt).unwrap());
    assert_eq!(detail["anchor"], serde_json::Value::Null);

    for (path, param) in [
        ("/v1/history?limit=201", "limit"),
        ("/v1/history?status=lost", "status"),
        ("/v1/history?q=hello", "q"),
        ("/v1/history/17", "id"),
        ("/v1/export.csv?limit=5", "limit"),
    ] {
        let (status, error) = explorer.get(path).await;
        assert_eq!((status, error["error"]["param"].as_str()), (400, Some(param)), "{path}");
    }
    assert_eq!(explorer.get(&format!("/v1/history/{}", Uuid::now_v7())).await.0, 404);
    eventually(PATIENCE, || async { explorer.get("/readyz").await.0 == 200 }).await;
    explorer.stop().await;
}

async fn receipt_and_anchor_come_in_either_order_and_twice(world: World) {
    let explorer = world.start().await;
    let cases = cases(&world, 4);
    let receipts: Vec<_> = cases.iter().map(Case::receipt).collect();
    // The first batch is anchored before its second receipt is heard of.
    world.issue(&cases[0]).await;
    world.anchor(1, &receipts[..2]).await;
    explorer.until_anchored(1).await;
    world.issue(&cases[1]).await;
    world.issue(&cases[2]).await;
    explorer.until_anchored(2).await;
    explorer.until_receipts(3).await;
    assert_eq!(explorer.ids("status=pending").await, [cases[2].request.id]);
    assert_eq!(explorer.ids("status=anchored").await, [cases[1].request.id, cases[0].request.id]);

    let (_, detail) = explorer.get(&format!("/v1/history/{}", cases[1].request.id)).await;
    assert_eq!(detail["status"], "anchored");
    assert_eq!(detail["anchor"]["sequence"], 1);
    assert_eq!(detail["anchor"]["receipts"], 2);
    assert_eq!(detail["anchor"]["block_number"], 41);

    // Again, and again under other message ids.
    for nth in 0..2 {
        world.issue_as(&cases[0].receipt_issued(), cases[0].request.id, nth).await;
        let batch = anchored(1, &receipts[..2]).encode_to_vec();
        world.say("batch.anchored", Uuid::now_v7(), batch).await;
    }
    world.issue(&cases[3]).await;
    explorer.until_receipts(4).await;
    let (_, stats) = explorer.get("/v1/stats").await;
    assert_eq!((&stats["anchored"], &stats["batches"]), (&2.into(), &1.into()));
    let charged: u64 = receipts.iter().map(|receipt| receipt.charged_micro).sum();
    assert_eq!(stats["charged_micro"], charged);
    explorer.stop().await;
}

async fn garbage_is_dead_lettered_and_stops_nothing(mut world: World) {
    let explorer = world.start().await;
    let case = Case::new(&world.network);
    world.issue(&case).await;
    explorer.until_receipts(1).await;
    let receipt = |change: &dyn Fn(&mut v1::ReceiptIssued)| {
        let mut issued = Case::new(&world.network).receipt_issued();
        change(&mut issued);
        issued.encode_to_vec()
    };
    let mut stranger = Case::new(&world.network);
    stranger.network.manifest.domain.chain_id = 5;
    let mut second = case.clone();
    second.answers = vec![Answer::tokens(&[77, 2]); 3];
    let bad_receipts: Vec<(Vec<u8>, &str)> = vec![
        (b"\xff\xff".to_vec(), "not a receipt message"),
        (receipt(&|r| r.model.clear()), "receipt.model"),
        (receipt(&|r| r.receipt.truncate(40)), "is no receipt"),
        (receipt(&|r| r.receipt.insert(1, b' ')), "canonical"),
        (stranger.receipt_issued().encode_to_vec(), "another network"),
        (second.receipt_issued().encode_to_vec(), "another receipt of this request"),
    ];
    for (body, reason) in bad_receipts {
        world.say("receipt", Uuid::now_v7(), body).await;
        let (queue, said) = world.dead_letter().await;
        assert_eq!(queue, queues::EXPLORER_RECEIPT);
        assert!(said.contains(reason), "expected `{reason}` in `{said}`");
    }
    let batch = |change: &dyn Fn(&mut v1::BatchAnchored)| {
        let mut batch = anchored(1, &[case.receipt()]);
        change(&mut batch);
        batch.encode_to_vec()
    };
    world.say("batch.anchored", Uuid::now_v7(), batch(&|_| {})).await;
    explorer.until_anchored(1).await;
    let bad_batches: Vec<(Vec<u8>, &str)> = vec![
        (batch(&|b| b.sequence = 0), "anchored.sequence"),
        (batch(&|b| b.receipts_root.push(0)), "anchored.receipts_root"),
        (batch(&|b| b.request_ids.clear()), "anchored.request_ids"),
        (batch(&|b| b.request_ids[0].clear()), "anchored.request_ids"),
        (batch(&|b| b.block_number = u64::MAX), "anchored.block_number"),
        (batch(&|b| b.transaction = vec![1; 32]), "another batch 1"),
    ];
    for (body, reason) in bad_batches {
        world.say("batch.anchored", Uuid::now_v7(), body).await;
        let (queue, said) = world.dead_letter().await;
        assert_eq!(queue, queues::EXPLORER_ANCHORED);
        assert!(said.contains(reason), "expected `{reason}` in `{said}`");
    }
    let good = Case::new(&world.network);
    world.issue(&good).await;
    explorer.until_receipts(2).await;
    explorer.stop().await;
}

async fn exports_stream_everything(world: World) {
    let explorer = world.start().await;
    // More than a page of the export.
    let cases = cases(&world, 520);
    for chunk in cases.chunks(64) {
        for case in chunk {
            world.issue(case).await;
        }
    }
    explorer.until_receipts(520).await;
    let receipts: Vec<_> = cases[..2].iter().map(Case::receipt).collect();
    world.anchor(1, &receipts).await;
    explorer.until_anchored(2).await;

    let (status, csv) = explorer.text("/v1/export.csv").await;
    assert_eq!(status, 200);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 521);
    let columns = lines[0].split(',').count();
    assert!(lines.iter().all(|line| line.split(',').count() == columns));
    assert!(lines[1].starts_with(&cases[519].request.id.to_string()));
    assert!(lines[520].starts_with(&format!("{},synthetic,anchored,1,", cases[0].request.id)));

    let (_, jsonl) = explorer.text("/v1/export.jsonl?status=anchored").await;
    let rows: Vec<serde_json::Value> =
        jsonl.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["receipt"], serde_json::to_value(&receipts[0]).unwrap());
    assert_eq!((&rows[0]["status"], &rows[0]["batch"]), (&"anchored".into(), &1.into()));
    explorer.stop().await;
}

async fn a_restart_goes_on(world: World) {
    let cases = cases(&world, 2);
    let explorer = world.start().await;
    world.issue(&cases[0]).await;
    explorer.until_receipts(1).await;
    explorer.stop().await;
    world.issue(&cases[1]).await;
    let explorer = world.start().await;
    explorer.until_receipts(2).await;
    assert_eq!(explorer.ids("").await, [cases[1].request.id, cases[0].request.id]);
    explorer.stop().await;
}
