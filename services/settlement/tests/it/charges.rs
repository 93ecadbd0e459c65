//! Which escrows are charged on a real chain, and when.

use infera_testkit::eventually;

use crate::{
    escrow::{CHARGE, HOLD, World},
    service::{Column, DEADLINE},
};

#[tokio::test]
async fn more_accounts_than_a_transaction_takes_are_charged_all_the_same() {
    let world = World::with(Column::Embedded, |place| place.config.escrow.charges = 1).await;
    world.ready(1_000).await;
    let other = world.other(1_000).await;
    world.decide(&world.ask());
    let submitted = world.place.network.submitted(&other.account_name());
    world.place.submit(&submitted);
    world.decide(&submitted);
    for of in [world.consumer.address(), other.address()] {
        world.charged(of, 120).await;
    }
    world.audit(|audit| audit["escrow_charged_micro"] == 240 && audit["escrow_owed_micro"] == 240).await;
    world.service.stop().await;
}

#[tokio::test]
async fn small_sums_wait_unless_they_would_leave() {
    let world = World::with(Column::Embedded, |place| {
        place.config.escrow.charge_min_micro = 200;
        place.config.exposure.check_ms = 20;
    })
    .await;
    world.ready(2_000).await;
    let charged = async || world.consumer.account(world.consumer.address()).await.unwrap().charged;
    let settle = async |sum: i64| {
        let id = world.decide(&world.ask());
        world.wait("/escrow/charged_micro", sum).await;
        eventually(DEADLINE, async || {
            let (status, body) = world.service.get(&format!("/v1/receipts/{id}"), None).await;
            status == 200 && String::from_utf8(body).unwrap().contains("anchored")
        })
        .await;
    };
    settle(120).await;
    assert_eq!(charged().await, 0, "its batch is final, and it was not charged");
    let exposed = async |micro: i64| {
        let line = format!("infera_settlement_exposure_micro {micro}\n");
        eventually(DEADLINE, async || {
            let (_, metrics) = world.service.get("/metrics", None).await;
            let metrics = String::from_utf8(metrics).unwrap();
            if metrics.contains(&line) { Ok(()) } else { Err(metrics) }
        })
        .await;
    };
    exposed(120).await;
    settle(240).await;
    world.wait("/escrow/charged_on_chain_micro", 240).await;
    exposed(0).await;
    settle(360).await;
    assert_eq!(charged().await, 240);
    world.consumer.request_withdrawal(2_000 - 240).await.unwrap();
    world.wait("/escrow/charged_on_chain_micro", 360).await;
    world.service.stop().await;
}

#[tokio::test]
async fn small_sums_keep_nobody_out() {
    let world = World::with(Column::Embedded, |place| {
        place.config.escrow.charge_min_micro = 200;
        place.config.exposure.check_ms = 20;
        place.config.exposure.cap_micro = 100;
    })
    .await;
    world.ready(2_000).await;
    world.decide(&world.ask());
    world.wait("/escrow/charged_on_chain_micro", CHARGE).await;
    eventually(DEADLINE, async || world.check("exposure").await == "up").await;
    world.ask();
    world.wait("/held_micro", HOLD).await;
    world.service.stop().await;
}
