//! A request from its funding to its closing verdict.

use infera_testkit::eventually;
use infera_wire::topology::keys;
use infera_wire::v1::{self, verdict::Outcome};
use uuid::Uuid;

use crate::world::{On, PATIENCE, World, funded, id};

mod on_both {
    use super::On;

    macro_rules! on_both {
        ($($name:ident),* $(,)?) => { $( mod $name {
            #[actix_rt::test]
            async fn embedded() { super::super::$name(super::On::Embedded).await; }
            #[actix_rt::test]
            async fn cluster() { super::super::$name(super::On::Cluster).await; }
        } )* };
    }

    on_both!(
        offers_follow_the_slots_and_the_turns,
        a_request_stays_until_its_closing_verdict,
        cancels_are_for_the_own_account,
        a_deadline_asks_for_the_close,
    );
}

async fn offers_follow_the_slots_and_the_turns(on: On) {
    let mut world = World::new(on).await;
    let running = world.start().await;
    let mut flood = Vec::new();
    for _ in 0..3 {
        let request = funded("flood");
        world.fund(&request).await;
        flood.push(id(&request));
    }
    let mut late = funded("late");
    late.submitted.bid_micro = 9;
    world.fund(&late).await;
    eventually(PATIENCE, async || running.depth().await == 4).await;
    let listed = running.mempool().await;
    assert_eq!(listed["models"][0]["pending"], 4);
    assert_eq!(listed["models"][0]["window"], 0, "no dispatcher has reported");
    assert_eq!(listed["models"][0]["bids_micro"], serde_json::json!({ "min": 0, "median": 0, "max": 9 }));
    let text = listed.to_string();
    assert!(!text.contains("flood") && !text.contains("prompt"), "nobody's business: {text}");

    let report = world.report(7, &[]);
    // One of each account, although the flood came first; the outbox does not keep their order.
    let mut offered = [world.offered().await, world.offered().await];
    offered.sort_by_key(|(request, _)| *request == flood[0]);
    let [(first, message), (second, _)] = offered;
    assert_eq!([first, second], [id(&late), flood[0]]);
    assert_eq!(message.funded.unwrap(), infera_wire::convert::funded_to_wire(&late), "as it was funded");
    report.abort();
    // Both are held, and three slots are free: the next of the flood.
    let report = world.report(3, &[first, second]);
    assert_eq!(world.offered().await.0, flood[1]);
    report.abort();
    let report = world.report(0, &[first, second, flood[1]]);
    eventually(PATIENCE, async || running.mempool().await["models"][0]["offered"] == 3).await;
    world.close(first).await;
    eventually(PATIENCE, async || running.depth().await == 3).await;
    report.abort();
    let _report = world.report(3, &[second, flood[1]]);
    assert_eq!(world.offered().await.0, flood[2]);
    running.stop().await;
}

async fn a_request_stays_until_its_closing_verdict(on: On) {
    let mut world = World::new(on).await;
    let running = world.start().await;
    let requests = [funded("a"), funded("b")];
    for request in &requests {
        world.fund(request).await;
        world.fund(request).await;
    }
    eventually(PATIENCE, async || running.depth().await == 2).await;
    let report = world.report(3, &[]);
    let (offered, _) = world.offered().await;
    report.abort();
    world.verdict(offered, Outcome::MoreNodes(v1::MoreNodes { count: 2 })).await;
    running.stop().await;

    // After a restart it knows what it offered, and offers the other one only.
    let running = world.start().await;
    assert_eq!(running.depth().await, 2);
    let _report = world.report(3, &[offered]);
    let (other, _) = world.offered().await;
    assert_ne!(other, offered);
    for request in [offered, other] {
        world.close(request).await;
        world.close(request).await;
    }
    eventually(PATIENCE, async || running.depth().await == 0).await;
    running.stop().await;
    let running = world.start().await;
    assert_eq!(running.depth().await, 0);
    running.stop().await;
}

async fn cancels_are_for_the_own_account(on: On) {
    let mut world = World::new(on).await;
    let running = world.start().await;
    let (early, mut pending, offered) = (funded("alice"), funded("alice"), funded("bob"));
    // More operators than there are: it stays pending.
    pending.submitted.k = 7;
    // A cancel may overtake its request, which waits for its funds.
    world.cancel(id(&early), "mallory").await;
    world.cancel(id(&early), "alice").await;
    world.fund(&early).await;
    assert_eq!(world.close_asked().await, (id(&early), "cancelled".to_owned()));

    world.fund(&offered).await;
    let report = world.report(3, &[]);
    assert_eq!(world.offered().await.0, id(&offered));
    world.fund(&pending).await;
    world.cancel(id(&pending), "mallory").await;
    world.cancel(id(&pending), "bob").await;
    world.cancel(id(&offered), "bob").await;
    assert_eq!(world.close_asked().await, (id(&offered), "cancelled".to_owned()), "also once it is offered");
    world.cancel(id(&pending), "alice").await;
    world.cancel(id(&pending), "alice").await;
    assert_eq!(world.close_asked().await, (id(&pending), "cancelled".to_owned()), "asked for once");
    eventually(PATIENCE, async || running.mempool().await["models"][0]["closing"] == 3).await;
    // The verifier decides: until then they stay, and are not offered.
    report.abort();
    let next = funded("carol");
    world.fund(&next).await;
    let report = world.report(60, &[]);
    assert_eq!(world.offered().await.0, id(&next));
    report.abort();
    for request in [&early, &pending, &offered] {
        world.close(id(request)).await;
    }
    eventually(PATIENCE, async || running.depth().await == 1).await;
    running.stop().await;
}

async fn a_deadline_asks_for_the_close(on: On) {
    let mut world = World::new(on).await;
    let running = world.start().await;
    let mut request = funded("a");
    request.submitted.deadline_ms = request.submitted.submitted_at_ms + 1;
    world.fund(&request).await;
    let _report = world.report(64, &[]);
    assert_eq!(world.close_asked().await, (id(&request), "deadline".to_owned()));
    let next = funded("a");
    world.fund(&next).await;
    assert_eq!(world.offered().await.0, id(&next), "the late one was never offered");
    running.stop().await;
}

#[actix_rt::test]
async fn garbage_goes_to_the_dead_letters() {
    let mut world = World::new(On::Embedded).await;
    let running = world.start().await;
    let garbage = vec![0xff; 40];
    for (key, queue, field) in [
        (keys::REQUEST_FUNDED, "mempool.funded", "RequestFunded"),
        (keys::CANCEL_REQUESTED, "mempool.cancel", "CancelRequested"),
    ] {
        let envelope = infera_bus::Envelope::new(Uuid::now_v7(), key, garbage.clone());
        world.bus.publish(key, envelope).await.unwrap();
        let (from, reason) = world.dead_letter().await;
        assert_eq!(from, queue);
        assert!(reason.contains(field), "{reason}");
    }
    let mut bad = funded("a");
    bad.submitted.k = 2;
    world.fund(&bad).await;
    assert!(world.dead_letter().await.1.contains("submitted.k"));
    world.bus.publish_transient(keys::SLOTS, infera_bus::Envelope::new(Uuid::now_v7(), "slots", garbage));
    world.cancel(Uuid::now_v7(), "").await;
    assert!(world.dead_letter().await.1.contains("cancel.account"));

    // It goes on, ready.
    let request = funded("a");
    world.fund(&request).await;
    let _report = world.report(3, &[]);
    assert_eq!(world.offered().await.0, id(&request));
    eventually(PATIENCE, async || running.get("/readyz").await.contains("\"ready\"")).await;
    assert!(running.get("/metrics").await.contains("infera_mempool_offers_total 1"));
    running.stop().await;
}
