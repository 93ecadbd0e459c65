//! The pages say what the receipt says, and never run what a name contains.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use infera_testkit::eventually;
use infera_testkit::evidence::{Answer, Case, Referee};

use crate::harness::{On, PATIENCE, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_has_a_page_with_every_field() {
    let world = World::new(On::Embedded).await;
    let explorer = world.start().await;
    let case = Case::new(&world.network)
        .answers([
            Answer::tokens(&[5, 2]),
            Answer::NoCommit,
            Answer::tokens(&[5, 2]),
            Answer::tokens(&[6, 2]),
        ])
        .referees([Referee::Denies(vec![vec![6, 2]])]);
    world.issue(&case).await;
    explorer.until_receipts(1).await;
    let receipt = case.receipt();
    let path = format!("/receipts/{}", receipt.id);

    let (status, page) = explorer.text(&path).await;
    assert_eq!(status, 200);
    let json = serde_json::to_value(&receipt).unwrap();
    for (name, value) in json.as_object().unwrap() {
        // Numbers and times are formatted; lists of nodes are a table of their own.
        if let Some(text) = value.as_str() {
            assert!(page.contains(text), "{name} is missing");
        }
        let listed = ["verified", "unpaid", "payments"].contains(&name.as_str());
        assert!(listed || page.contains(&format!("<dt>{name}</dt>")), "{name} is not explained");
    }
    for node in receipt.verified.iter().map(|v| v.node).chain(receipt.unpaid.iter().map(|u| u.node)) {
        assert!(page.contains(&node.to_string()));
    }
    assert!(page.contains("no commitment") && page.contains("outlier"));
    assert!(page.contains("pending"));
    assert!(page.contains(&receipt.leaf().to_string()));
    assert!(page.contains("infera verify receipt.json --rpc http://127.0.0.1:8545"));

    world.anchor(3, std::slice::from_ref(&receipt)).await;
    explorer.until_anchored(1).await;
    let (_, page) = explorer.text(&path).await;
    assert!(page.contains("batch 3") && page.contains(&format!("0x{}", "ee".repeat(32))));
    let (_, home) = explorer.text("/").await;
    assert!(home.contains(&path) && home.contains("2 of 3") && home.contains("batch 3"));
    explorer.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_have_a_page_and_nothing_is_run() {
    let world = World::new(On::Embedded).await;
    let explorer = world.start().await;
    let (status, page) = explorer.text("/").await;
    assert_eq!(status, 200);
    assert!(page.contains("No answer has been verified yet"));

    let (status, page) = explorer.text("/receipts/01900000-0000-7000-8000-000000000000").await;
    assert_eq!(status, 404);
    assert!(page.contains("There is no such receipt"));
    let (status, page) = explorer.text("/?operator=me").await;
    assert_eq!(status, 400);
    assert!(page.contains("operator must be an address"));

    let script = "%3Cscript%3Ealert(1)%3C/script%3E";
    for path in [format!("/?q={script}"), format!("/?model={script}"), format!("/?{script}=1")] {
        let response = reqwest::get(format!("{}{path}", explorer.url)).await.unwrap();
        let policy = response.headers()["content-security-policy"].to_str().unwrap().to_owned();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        let page = response.text().await.unwrap();
        assert!(!page.contains("<script>alert"), "{path}");
    }
    for asset in ["/assets/style.css", "/assets/live.js"] {
        assert_eq!(explorer.text(asset).await.0, 200);
    }
    explorer.stop().await;
}

/// Answers the first request with `body`, as settlement does at the gateway's address, and refuses the others, as the
/// gateway does; says how many there were.
async fn governance(body: String) -> (String, Arc<AtomicUsize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked_for = Arc::new(AtomicUsize::new(0));
    let count = asked_for.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            let asked = std::str::from_utf8(&request[..read]).unwrap();
            assert!(asked.starts_with("GET /v1/governance "), "{asked}");
            let status = if count.fetch_add(1, Relaxed) == 0 { "200 OK" } else { "429 Too Many Requests" };
            let head =
                format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n");
            let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (url, asked_for)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_holders_decide_has_a_page() {
    let world = World::new(On::Embedded).await;
    let hash = format!("0x{}", "ab".repeat(32));
    let told = serde_json::json!({
        "registry": {
            "block": 77, "time_secs": 1_790_000_000, "revision": 3, "releases": [], "calibration_hash": hash,
            "models": [
                { "id": "first", "weights_root": hash, "similarity_threshold_millionths": 600_000, "price_cap_micro": 2, "active": true },
                { "id": "second", "weights_root": hash, "similarity_threshold_millionths": 600_000, "price_cap_micro": 2, "active": false },
            ],
        },
        "proposals": [{
            "id": hash, "state": "executed", "description": "Serve <script>alert(1)</script>\n\nmore", "quorum_micro": 40_000_000,
            "actions": [{ "call": "withdraw_model", "id": "second" }], "deadline_secs": 1_790_000_100,
            "votes": { "for_micro": 990_000_000, "against_micro": 0, "abstain_micro": 0 },
        }],
    });
    let (url, asked_for) = governance(told.to_string()).await;
    let explorer = world.start_with(|config| config.receipts_url = url).await;
    let (status, page) = explorer.text("/governance").await;
    assert_eq!(status, 200, "{page}");
    for text in
        ["first", "withdrawn", "withdraw the model second", "executed", "990.000000", "block 77", &hash]
    {
        assert!(page.contains(text), "{text} is missing");
    }
    assert!(!page.contains("<script>alert"), "a description is text");
    // All who look are one address to the gateway: what was told is shown again, also when that says it is too much.
    eventually(PATIENCE, async || {
        let (status, again) = explorer.text("/governance").await;
        assert_eq!((status, &again), (200, &page));
        asked_for.load(Relaxed) > 1
    })
    .await;
    explorer.stop().await;
    // Nobody answers: the page says so, and the others go on.
    let explorer = world.start_with(|config| config.receipts_url = "http://127.0.0.1:1".into()).await;
    let (status, page) = explorer.text("/governance").await;
    assert_eq!(status, 503);
    assert!(page.contains("try again"), "{page}");
    assert_eq!(explorer.text("/").await.0, 200);
    explorer.stop().await;
}
