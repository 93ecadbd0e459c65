//! Search by meaning, over the index that the verifier writes.

use infera_embed::Point;
use infera_testkit::evidence::Case;
use uuid::Uuid;

use crate::harness::{On, World, embedder};

async fn index(world: &World, request_id: Uuid, text: &str) {
    let vector = embedder().embed(vec![text.to_owned()]).await.unwrap().remove(0);
    let point = Point { request_id, model: "synthetic".to_owned(), decided_at_ms: 1_790_000_000_000, vector };
    world.index.upsert(&point).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_found_by_meaning_with_their_receipts() {
    let world = World::new(On::Embedded).await;
    let explorer = world.start().await;
    let (paris, sort) = (Case::new(&world.network), Case::new(&world.network));
    for (case, text) in [
        (&paris, "The capital of France is Paris."),
        (&sort, "Quicksort picks a pivot and partitions the list."),
    ] {
        world.issue(case).await;
        index(&world, case.request.id, text).await;
    }
    // In the index, but its receipt is still on its way.
    index(&world, Uuid::now_v7(), "Paris, the capital of France, lies on the Seine.").await;
    explorer.until_receipts(2).await;

    let (status, found) = explorer.get("/v1/search?q=Which%20city%20is%20France%27s%20capital%3F").await;
    assert_eq!(status, 200);
    let hits = found["data"].as_array().unwrap();
    assert_eq!(hits.len(), 1, "{hits:?}");
    assert_eq!(hits[0]["id"], paris.request.id.to_string());
    assert_eq!(hits[0]["model"], "synthetic");
    assert!(hits[0]["score"].as_f64().unwrap() > 0.5);

    let (_, everything) = explorer.get("/v1/search?q=anything&min_score=-1").await;
    assert_eq!(everything["data"].as_array().unwrap().len(), 2);
    let (_, nothing) = explorer.get("/v1/search?q=France&min_score=1").await;
    assert_eq!(nothing["data"].as_array().unwrap().len(), 0);
    let (_, one) = explorer.get("/v1/search?q=anything&min_score=-1&limit=1").await;
    assert!(one["data"].as_array().unwrap().len() <= 1);

    for (path, param) in [
        ("/v1/search", "q"),
        ("/v1/search?q=", "q"),
        ("/v1/search?q=a&min_score=7", "min_score"),
        ("/v1/search?q=a&limit=101", "limit"),
        (&format!("/v1/search?q={}", "a".repeat(2_001)), "q"),
    ] {
        let (status, error) = explorer.get(path).await;
        assert_eq!((status, error["error"]["param"].as_str()), (400, Some(param)), "{path}");
    }
    let (status, page) = explorer.text("/?q=capital+of+France").await;
    assert_eq!(status, 200);
    assert!(page.contains(&format!("/receipts/{}", paris.request.id)));
    assert!(!page.contains(&format!("/receipts/{}", sort.request.id)));
    explorer.stop().await;
}
