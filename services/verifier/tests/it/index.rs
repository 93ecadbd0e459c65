//! Delivered answers reach the index, whatever happens in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use infera_embed::{Exact, Hit, Index, IndexError, Point, Qdrant, serve};
use infera_runtime::CancellationToken;
use infera_testkit::evidence::{Answer, Case};
use infera_testkit::{eventually, sqlite_url_named};

use crate::harness::{On, PATIENCE, World, embedder, tokens};

async fn search(index: &dyn Index, text: &str) -> Vec<Hit> {
    let vector = embedder().embed(vec![text.to_owned()]).await.unwrap().remove(0);
    index.search(&vector, 10, 0.5).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_found_by_meaning_over_qdrants_grpc() {
    let mut world = World::new(On::Embedded).await;
    let stop = CancellationToken::new();
    let _ends = stop.clone().drop_guard();
    let exact = Exact::open(&sqlite_url_named(&world.dir, "served"), None).await.unwrap();
    let server = serve::start(Arc::new(exact), "127.0.0.1:0", stop.clone()).await.unwrap();
    let index = Arc::new(Qdrant::connect(&server.url(), None, "answers").unwrap());
    let verifier = world.start_with(index.clone()).await;

    let answer = |text: &str| vec![Answer::tokens(&tokens(text)); 3];
    let paris = Case::new(&world.network).answers(answer("The capital of France is Paris."));
    let sort = Case::new(&world.network).answers(answer("Quicksort picks a pivot and partitions the list."));
    let empty = Case::new(&world.network).answers(answer(""));
    for case in [&paris, &sort, &empty] {
        world.collect(case).await;
        world.verdict().await;
    }
    eventually(PATIENCE, || async { search(index.as_ref(), "France's capital city").await.len() == 1 }).await;
    eventually(PATIENCE, || async {
        search(index.as_ref(), "sorting algorithm with a pivot").await.len() == 1
    })
    .await;
    let hit = search(index.as_ref(), "France's capital city").await.remove(0);
    assert_eq!((hit.request_id, hit.model.as_str()), (paris.request.id, "smollm2"));
    eventually(PATIENCE, || async { verifier.metric("infera_verifier_unindexed_answers", "").await == 0.0 })
        .await;
    assert_eq!(
        verifier.metric("infera_verifier_indexed_total", "").await,
        2.0,
        "an empty answer has no meaning"
    );
    verifier.stop().await;
}

/// An index that can be away.
struct Flaky {
    inner: Arc<dyn Index>,
    away: AtomicBool,
}

impl Flaky {
    fn check(&self) -> Result<(), IndexError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(IndexError::Qdrant("away".to_owned()));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Index for Flaky {
    async fn upsert(&self, point: &Point) -> Result<(), IndexError> {
        self.check()?;
        self.inner.upsert(point).await
    }
    async fn search(&self, vector: &[f32], limit: usize, min_score: f32) -> Result<Vec<Hit>, IndexError> {
        self.inner.search(vector, limit, min_score).await
    }
    async fn ping(&self) -> Result<(), IndexError> {
        self.check()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_index_delays_no_verdict() {
    let mut world = World::new(On::Embedded).await;
    let flaky = Arc::new(Flaky { inner: world.index.clone(), away: AtomicBool::new(true) });
    let verifier = world.start_with(flaky.clone()).await;
    let case = Case::new(&world.network).answers(vec![Answer::tokens(&tokens("Rome is in Italy.")); 3]);
    world.collect(&case).await;
    world.verdict().await;
    eventually(PATIENCE, || async { verifier.get("/readyz").await.1["failing"][0] == "index" }).await;
    assert_eq!(search(world.index.as_ref(), "Rome is in Italy.").await, []);
    verifier.stop().await;

    // It waits in the database, over a restart.
    flaky.away.store(false, Ordering::SeqCst);
    let verifier = world.start_with(flaky).await;
    let index = world.index.clone();
    eventually(PATIENCE, || async { search(index.as_ref(), "Rome is in Italy.").await.len() == 1 }).await;
    verifier.stop().await;
}
