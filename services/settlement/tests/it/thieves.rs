//! What somebody can do to escrows who has the settler's key.

use infera_settlement::chain::{Call, Chain as Settler, Charge, Port};

use crate::{
    chain::SETTLER,
    escrow::{CHARGE, HOLD, World},
    service::Column,
    wallets::sign,
};

#[tokio::test]
async fn a_settler_takes_no_more_than_was_signed_and_no_charge_counts_twice() {
    let world = World::new(Column::Embedded).await;
    world.ready(1_000).await;
    let request = world.ask();
    world.decide(&request);
    world.wait("/escrow/charged_on_chain_micro", CHARGE).await;
    // A settler that steals, with the same key.
    let settler = Settler::connect(world.anvil.url(), SETTLER, world.contracts.settlement).await.unwrap();
    let sequence = settler.head().await.unwrap().sequence;
    let account = world.consumer.address();
    let charge = async |cumulative: u128, voucher| {
        let charges = vec![Charge { account, cumulative, voucher }];
        let (nonce, fees) = (settler.next_nonce().await.unwrap(), settler.fees().await.unwrap());
        settler.sign(&[Call::Charge { sequence, charges }], nonce, fees).await
    };
    let beyond = charge(1_001, None).await.unwrap_err().to_string();
    assert!(beyond.contains("allowed 1000, not 1001"), "{beyond}");
    let forged = charge(1_001, Some((1_001, sign(1, &world.domain(), 1_001)))).await.unwrap_err().to_string();
    assert!(forged.contains("not signed by it"), "{forged}");
    // The charge of before again takes nothing.
    let again = charge(120, None).await.unwrap();
    settler.send_raw(&again.raw).await.unwrap();
    world.mine(1).await;
    let now = world.consumer.account(account).await.unwrap();
    assert_eq!((now.escrow, now.charged), (880, 120));
    // Within the voucher it can take more than the books charged: they see it, and do not lend it again.
    let stolen = charge(500, None).await.unwrap();
    settler.send_raw(&stolen.raw).await.unwrap();
    world.wait("/escrow/charged_on_chain_micro", 500).await;
    world.wait("/available_micro", 500).await;
    world.audit(|audit| audit["escrow_charged_micro"] == 500).await;
    world.service.stop().await;
}

#[tokio::test]
async fn who_owes_more_than_was_signed_stops_nobody_elses_charge() {
    let world = World::with(Column::Embedded, |place| place.config.rewards.queue = false).await;
    world.consumer.deposit(2_000).await.unwrap();
    world.allow(1_000).await;
    world.wait("/available_micro", 1_000).await;
    let other = world.other(1_000).await;
    world.decide(&world.ask());
    world.wait("/escrow/charged_on_chain_micro", CHARGE).await;
    // While a request is open, somebody with the settler's key takes all that was signed for.
    let open = world.ask();
    world.wait("/held_micro", HOLD).await;
    let settler = Settler::connect(world.anvil.url(), SETTLER, world.contracts.settlement).await.unwrap();
    let sequence = settler.head().await.unwrap().sequence;
    let charges = vec![Charge { account: world.consumer.address(), cumulative: 1_000, voucher: None }];
    let (nonce, fees) = (settler.next_nonce().await.unwrap(), settler.fees().await.unwrap());
    let stolen = settler.sign(&[Call::Charge { sequence, charges }], nonce, fees).await.unwrap();
    settler.send_raw(&stolen.raw).await.unwrap();
    world.wait("/escrow/charged_on_chain_micro", 1_000).await;
    // What the request costs is beyond the voucher. It waits, and nobody else does.
    world.decide(&open);
    world.wait("/escrow/charged_micro", 1_000 + CHARGE).await;
    let submitted = world.place.network.submitted(&other.account_name());
    world.place.submit(&submitted);
    world.decide(&submitted);
    world.charged(other.address(), 120).await;
    world.charged(world.consumer.address(), 1_000).await;
    // It is taken once its owner signs for it.
    world.allow(2_000).await;
    world.charged(world.consumer.address(), 1_120).await;
    world.audit(|audit| audit["escrow_charged_micro"] == 1_240).await;
    world.service.stop().await;
}
