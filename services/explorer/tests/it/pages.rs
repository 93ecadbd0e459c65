//! The pages say what the receipt says, and never run what a name contains.

use infera_testkit::evidence::{Answer, Case, Referee};

use crate::harness::{On, World};

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
