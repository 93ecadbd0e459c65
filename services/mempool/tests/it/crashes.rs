//! A mempool that is killed at any step: every request is offered, and none twice under another id.

use std::time::Duration;

use infera_testkit::{Process, cluster, eventually, free_port};
use uuid::Uuid;

use crate::world::{On, PATIENCE, World, funded, id};

#[actix_rt::test]
async fn killed_at_every_step_every_request_is_offered() {
    for point in [
        "mempool.funded.before_commit",
        "mempool.funded.after_commit",
        "mempool.offer.after_commit",
        "outbox.request.offered.before_publish",
        "outbox.request.offered.after_publish",
    ] {
        let mut world = World::new(On::Cluster).await;
        let (mut doomed, _) = spawn(&world, &format!("{point}=abort")).await;
        let report = world.report(60, &[]);
        let request = funded("a");
        world.fund(&request).await;
        eventually(PATIENCE, || std::future::ready(doomed.exited())).await;

        let _next = spawn(&world, "").await;
        let (offered, _) = world.offered().await;
        assert_eq!(offered, id(&request), "{point}");
        // Whatever was said twice was said under one id: `offered` checks it. A later request
        // shows that nothing else is under way.
        let later = funded("b");
        world.fund(&later).await;
        loop {
            let (offered, _) = world.offered().await;
            if offered == id(&later) {
                break;
            }
            assert_eq!(offered, id(&request), "{point}");
        }
        report.abort();
    }
}

/// The verdict takes the request out of the set once, wherever it is killed.
#[actix_rt::test]
async fn killed_at_the_verdict_the_request_still_leaves() {
    for point in ["mempool.verdict.before_commit", "mempool.verdict.after_commit"] {
        let world = World::new(On::Cluster).await;
        let (mut doomed, url) = spawn(&world, &format!("{point}=abort")).await;
        let request = funded("a");
        world.fund(&request).await;
        eventually(PATIENCE, async || {
            let body = reqwest::get(format!("{url}/v1/mempool")).await.unwrap().text().await.unwrap();
            body.contains("\"depth\":1")
        })
        .await;
        world.close(id(&request)).await;
        eventually(PATIENCE, || std::future::ready(doomed.exited())).await;
        let running = world.start().await;
        eventually(PATIENCE, async || running.depth().await == 0).await;
        running.stop().await;
    }
}

/// The process and its URL.
async fn spawn(world: &World, fail: &str) -> (Process, String) {
    let cluster = cluster();
    let port = free_port();
    let toml = format!(
        "http_bind = \"127.0.0.1:{port}\"\ndatabase_url = \"{}\"\ndatabase_schema = \"{}\"\nbus_url = \"{}\"\nbus_prefix = \"{}\"\n",
        cluster.pg_url, world.schema, cluster.amqp_url, world.prefix,
    );
    let name = Uuid::now_v7();
    let path = world.dir.path().join(format!("{name}.toml"));
    std::fs::write(&path, toml).unwrap();
    let log = world.dir.path().join(format!("{name}.log"));
    let process = Process::spec(env!("CARGO_BIN_EXE_infera-mempool"), log)
        .args([&path])
        .env("INFERA_FAIL", fail)
        .spawn();
    let url = format!("http://127.0.0.1:{port}");
    eventually(Duration::from_secs(60), async || {
        let answer = reqwest::get(format!("{url}/readyz")).await;
        answer.is_ok_and(|answer| answer.status().is_success())
    })
    .await;
    (process, url)
}
