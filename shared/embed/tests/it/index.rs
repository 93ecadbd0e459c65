//! One suite, both adapters.

use std::sync::Arc;

use infera_embed::{DIMENSIONS, Exact, Index, IndexConfig, IndexError, Point, Qdrant, open, serve};
use infera_runtime::CancellationToken;
use infera_testkit::{TempDir, cluster, sqlite_url, unique};
use uuid::Uuid;

/// A unit vector in the plane of the first two axes.
fn at(degrees: f32) -> Vec<f32> {
    let mut vector = vec![0.0; DIMENSIONS];
    vector[0] = degrees.to_radians().cos();
    vector[1] = degrees.to_radians().sin();
    vector
}

fn point(n: u128, degrees: f32) -> Point {
    let decided_at_ms = 1_700_000_000_000 + i64::try_from(n).unwrap();
    Point { request_id: Uuid::from_u128(n), model: format!("model-{n}"), decided_at_ms, vector: at(degrees) }
}

async fn suite(index: &dyn Index) {
    index.ping().await.unwrap();
    assert_eq!(index.search(&at(0.0), 10, -1.0).await.unwrap(), [], "nothing is there yet");

    for (n, degrees) in [(1, 0.0), (2, 30.0), (3, 60.0), (4, 180.0)] {
        index.upsert(&point(n, degrees)).await.unwrap();
    }
    let found = index.search(&at(10.0), 10, 0.5).await.unwrap();
    let ids: Vec<u128> = found.iter().map(|hit| hit.request_id.as_u128()).collect();
    assert_eq!(ids, [1, 2, 3], "nearest first, and nothing below the threshold");
    assert!((found[0].score - 10_f32.to_radians().cos()).abs() < 1e-4, "{found:?}");
    assert_eq!((found[1].model.as_str(), found[1].decided_at_ms), ("model-2", 1_700_000_000_002));

    assert_eq!(index.search(&at(10.0), 2, 0.5).await.unwrap().len(), 2);
    assert_eq!(index.search(&at(10.0), 0, 0.5).await.unwrap().len(), 0);
    assert_eq!(index.search(&at(10.0), 10, -1.0).await.unwrap().len(), 4);

    // Written again: one point a request, the later vector counts.
    index.upsert(&Point { model: "other".to_owned(), ..point(1, 180.0) }).await.unwrap();
    let found = index.search(&at(180.0), 10, 0.9).await.unwrap();
    let mut models: Vec<&str> = found.iter().map(|hit| hit.model.as_str()).collect();
    models.sort_unstable();
    assert_eq!(models, ["model-4", "other"]);

    for bad in [vec![1.0; DIMENSIONS - 1], vec![f32::NAN; DIMENSIONS]] {
        let refused = index.upsert(&Point { vector: bad.clone(), ..point(9, 0.0) }).await;
        assert!(matches!(refused, Err(IndexError::Vector(_))), "{refused:?}");
        assert!(matches!(index.search(&bad, 1, 0.0).await, Err(IndexError::Vector(_))));
    }
    assert_eq!(index.search(&at(10.0), 10, -1.0).await.unwrap().len(), 4);
}

#[tokio::test]
async fn exact_on_sqlite() {
    let dir = TempDir::new().unwrap();
    suite(&Exact::open(&sqlite_url(&dir), None).await.unwrap()).await;
}

#[tokio::test]
async fn exact_on_postgres() {
    let schema = unique("vectors");
    suite(&Exact::open(&cluster().pg_url, Some(&schema)).await.unwrap()).await;
}

#[tokio::test]
async fn exact_reads_more_than_a_page() {
    let dir = TempDir::new().unwrap();
    let url = sqlite_url(&dir);
    let writer = Exact::open(&url, None).await.unwrap();
    for n in 1..=1_030 {
        writer.upsert(&point(n, if n == 1_029 { 1.0 } else { 90.0 })).await.unwrap();
    }
    // A second handle, as another process has it.
    let reader = Exact::open(&url, None).await.unwrap();
    let found = reader.search(&at(0.0), 3, 0.9).await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].request_id, Uuid::from_u128(1_029));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_may_open_it_at_once() {
    let dir = TempDir::new().unwrap();
    let (sqlite, schema) = (sqlite_url(&dir), unique("vectors"));
    for (url, schema) in [(sqlite, None), (cluster().pg_url.clone(), Some(schema))] {
        let opening: Vec<_> = (0..6)
            .map(|_| {
                let (url, schema) = (url.clone(), schema.clone());
                tokio::spawn(async move { Exact::open(&url, schema.as_deref()).await })
            })
            .collect();
        for opened in opening {
            opened.await.unwrap().unwrap().ping().await.unwrap();
        }
    }
}

/// The exact index behind Qdrant's gRPC.
async fn served(dir: &TempDir, stop: &CancellationToken) -> String {
    let exact = Exact::open(&sqlite_url(dir), None).await.unwrap();
    serve::start(Arc::new(exact), "127.0.0.1:0", stop.clone()).await.unwrap().url()
}

#[tokio::test]
async fn qdrant_client_against_the_served_index() {
    let dir = TempDir::new().unwrap();
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    let url = served(&dir, &stop).await;
    suite(&Qdrant::connect(&url, None, "answers").unwrap()).await;
    // A second client finds the collection and its points.
    let again = Qdrant::connect(&url, None, "answers").unwrap();
    assert_eq!(again.search(&at(10.0), 10, -1.0).await.unwrap().len(), 4);
    // Another collection is not this index.
    let other = Qdrant::connect(&url, None, "other").unwrap();
    assert!(matches!(other.ping().await, Err(IndexError::Qdrant(_))));
}

#[tokio::test]
async fn qdrant_client_against_a_real_server() {
    let Ok(url) = std::env::var("QDRANT_URL") else {
        eprintln!("QDRANT_URL is not set: no real server to test against");
        return;
    };
    suite(&Qdrant::connect(&url, None, &unique("answers")).unwrap()).await;
}

#[tokio::test]
async fn a_qdrant_that_comes_later_is_no_reason_to_stop() {
    let free = infera_testkit::free_port();
    let index = Qdrant::connect(&format!("http://127.0.0.1:{free}"), None, "answers").unwrap();
    assert!(index.upsert(&point(1, 0.0)).await.is_err());

    let dir = TempDir::new().unwrap();
    let exact = Exact::open(&sqlite_url(&dir), None).await.unwrap();
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    serve::start(Arc::new(exact), &format!("127.0.0.1:{free}"), stop).await.unwrap();
    let (index, late) = (&index, &point(1, 0.0));
    infera_testkit::eventually(std::time::Duration::from_secs(20), || index.upsert(late)).await;
    assert_eq!(index.search(&at(0.0), 1, 0.9).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_configuration_names_one_index() {
    let none = open(&IndexConfig::default()).await.map(drop);
    assert!(matches!(none, Err(IndexError::NotConfigured)), "{none:?}");
    let dir = TempDir::new().unwrap();
    let config = IndexConfig { database_url: sqlite_url(&dir).into(), ..IndexConfig::default() };
    open(&config).await.unwrap().upsert(&point(1, 0.0)).await.unwrap();
}
