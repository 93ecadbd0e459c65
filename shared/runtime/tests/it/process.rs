//! What concerns a whole process: planned failures and signals.

use std::os::unix::process::ExitStatusExt;

use infera_runtime::health::{self, Health};
use infera_runtime::{http, planned, shutdown};
use infera_testkit::{TempDir, eventually, free_port};

use crate::{DEADLINE, child};

const SIGABRT: i32 = 6;

#[tokio::test]
async fn a_planned_abort_happens_at_its_hit() {
    let dir = TempDir::new().unwrap();
    let mut process = child("process::passes_a_point", &dir.path().join("log"))
        .env(planned::ENV, "fixture.point=abort@3;fixture.other=delay:1")
        .spawn();
    let status = process.wait(DEADLINE).await;
    assert_eq!(status.signal(), Some(SIGABRT), "{}", process.log());
    assert!(process.log().contains("passed 2") && !process.log().contains("passed 3"), "{}", process.log());
}

#[tokio::test]
async fn without_a_plan_nothing_happens() {
    let dir = TempDir::new().unwrap();
    let mut process = child("process::passes_a_point", &dir.path().join("log")).spawn();
    assert!(process.wait(DEADLINE).await.success());
    assert!(process.log().contains("passed 5"), "{}", process.log());
}

#[tokio::test]
#[ignore = "the child of the tests above"]
async fn passes_a_point() {
    planned::check().unwrap();
    for n in 1..=5 {
        planned::hit("fixture.point");
        planned::hit("fixture.unnamed");
        planned::pause("fixture.other").await;
        println!("passed {n}");
    }
}

#[tokio::test]
async fn a_signal_drains_and_ends_the_process() {
    let dir = TempDir::new().unwrap();
    let port = free_port();
    let mut process =
        child("process::serves", &dir.path().join("log")).env("FIXTURE_PORT", port.to_string()).spawn();
    process.wait_ready(&format!("http://127.0.0.1:{port}/readyz"), DEADLINE).await;
    process.terminate();
    let status = process.wait(DEADLINE).await;
    assert!(status.success() && process.log().contains("drained"), "{status}: {}", process.log());
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let dir = TempDir::new().unwrap();
    let port = free_port();
    let mut process = child("process::serves", &dir.path().join("log"))
        .env("FIXTURE_PORT", port.to_string())
        .env("FIXTURE_HANGS", "1")
        .spawn();
    process.wait_ready(&format!("http://127.0.0.1:{port}/readyz"), DEADLINE).await;
    process.terminate();
    eventually(DEADLINE, async || process.log().contains("drained")).await;
    assert!(process.exited().is_none(), "it hangs");
    process.terminate();
    assert_eq!(process.wait(DEADLINE).await.code(), Some(130), "{}", process.log());
}

#[actix_web::test]
#[ignore = "the child of the tests above"]
async fn serves() {
    let token = shutdown::on_signals();
    let health = Health::new("fixture");
    let bind = format!("127.0.0.1:{}", std::env::var("FIXTURE_PORT").unwrap());
    let routes = move |config: &mut actix_web::web::ServiceConfig| {
        config.configure(health::routes(health.clone()));
    };
    http::serve(routes, &bind, token, None).await.unwrap();
    println!("drained");
    if std::env::var_os("FIXTURE_HANGS").is_some() {
        std::future::pending::<()>().await;
    }
}
