//! What an answer would cost, and what it then holds.

use futures::future::join_all;
use infera_protocol::money::hold_micro;
use infera_testkit::eventually;
use serde_json::json;

use crate::support::{Column, DEADLINE, MODEL, World, chat, json_of};
use crate::wallet::Wallet;

both!(
    prompts_that_wait_are_bounded,
    an_account_leaves_places_to_others,
    all_keys_of_a_wallet_count_together,
    a_quote_is_what_settlement_holds,
    a_quote_checks_what_a_request_checks,
    models_have_a_price
);

async fn a_quote_is_what_settlement_holds(column: Column) {
    let mut world = World::with(column, |config| config.replicas = 5).await;
    for change in [
        json!({}),
        json!({ "max_tokens": 7 }),
        json!({ "n": 3, "max_tokens": 11, "seed": 4 }),
        json!({ "response_format": { "type": "json_object" }, "max_tokens": 50 }),
        json!({ "messages": [{ "role": "user", "content": "word ".repeat(1_900) }] }),
    ] {
        let body = chat(change);
        let quote = json_of(world.post_to("/v1/quote", Some(&world.key), &body).await).await;
        assert!(world.net.more().is_empty(), "nothing is submitted");
        let pending = world.send(&body);
        let count = body["n"].as_u64().unwrap_or(1);
        let mut held = 0;
        for _ in 0..count {
            let submitted = world.net.next().await;
            let request = submitted.request.as_ref().unwrap();
            let prompt = request.prompt.len() as u32;
            assert_eq!(
                (quote["prompt_tokens"].as_u64(), quote["max_tokens"].as_u64()),
                (Some(prompt.into()), Some(request.max_tokens.into()))
            );
            held += hold_micro(submitted.k, 2, prompt, request.max_tokens).unwrap();
            world.net.answer(&submitted, "Paris");
        }
        assert_eq!(quote["hold_micro"], held, "{quote}");
        assert_eq!(
            (&quote["replicas"], &quote["price_micro"], &quote["n"]),
            (&json!(5), &json!(2), &json!(count))
        );
        assert_eq!((&quote["currency"], &quote["model"]), (&json!("INFER"), &json!(MODEL)));
        assert_eq!(pending.await.unwrap().status(), 200);
    }
}

async fn a_quote_checks_what_a_request_checks(column: Column) {
    let mut world = World::with(column, |config| config.requests_per_minute = 8).await;
    for body in [
        chat(json!({ "model": "gpt-99" })),
        chat(json!({ "messages": [] })),
        chat(json!({ "max_tokens": 5_000 })),
        chat(json!({ "temprature": 1 })),
    ] {
        let quoted = world.post_to("/v1/quote", Some(&world.key), &body).await;
        world.key = world.files.key("alice").0;
        let asked = world.post(&body).send().await.unwrap();
        assert_eq!(quoted.status(), asked.status());
        assert_eq!(json_of(quoted).await, json_of(asked).await);
    }
    assert_eq!(world.post_to("/v1/quote", None, &chat(json!({}))).await.status(), 401);
    assert!(world.net.more().is_empty());
    // Rendering is work: it counts as a request.
    let mut limited = false;
    for _ in 0..17 {
        limited |= world.post_to("/v1/quote", Some(&world.key), &chat(json!({}))).await.status() == 429;
    }
    assert!(limited);
}

async fn models_have_a_price(column: Column) {
    let world = World::new(column).await;
    let list = json_of(world.get("/v1/models", &world.key).await).await;
    let one = json_of(world.get(&format!("/v1/models/{MODEL}"), &world.key).await).await;
    assert_eq!(list["data"][0], one);
    assert_eq!(
        (&one["infera"]["price_micro"], &one["infera"]["replicas"], &one["infera"]["currency"]),
        (&json!(2), &json!(3), &json!("INFER"))
    );
}

async fn prompts_that_wait_are_bounded(column: Column) {
    let world = World::with(column, |config| config.max_prompts = 1).await;
    // Each takes a while to read; a few come at a time until one finds the place taken.
    let body = chat(json!({ "messages": [{ "role": "user", "content": "one two ".repeat(900) }] }));
    let refused = eventually(DEADLINE, async || {
        let asked = (0..8).map(|_| world.post_to("/v1/quote", Some(&world.key), &body));
        let (taken, refused): (Vec<_>, Vec<_>) =
            join_all(asked).await.into_iter().partition(|response| response.status() == 200);
        assert!(!taken.is_empty(), "who comes first is served");
        refused.into_iter().next()
    })
    .await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(json_of(refused).await["error"]["code"], "overloaded");
    let after = world.post_to("/v1/quote", Some(&world.key), &body).await;
    assert_eq!(after.status(), 200, "a place that was left is free again");
}

async fn an_account_leaves_places_to_others(column: Column) {
    let world = World::with(column, |config| config.max_prompts = 2).await;
    let (other, _) = world.files.key("bob");
    let body = chat(json!({ "messages": [{ "role": "user", "content": "one two ".repeat(900) }] }));
    let refused = eventually(DEADLINE, async || {
        let asked = join_all((0..8).map(|_| world.post_to("/v1/quote", Some(&world.key), &body)));
        let (asked, other) = tokio::join!(asked, world.post_to("/v1/quote", Some(&other), &body));
        assert_eq!(other.status(), 200, "others have their share");
        // Where both places are taken it is 503.
        asked.into_iter().find(|response| response.status() == 429)
    })
    .await;
    assert!(refused.headers().contains_key("retry-after"));
    let refused = json_of(refused).await;
    assert!(refused["error"]["message"].as_str().unwrap().contains("this account's share"), "{refused}");
}

async fn all_keys_of_a_wallet_count_together(column: Column) {
    let world = World::with(column, |config| config.requests_per_minute = 4).await;
    let session = Wallet::new().sign_in(&world).await;
    let body = json!({ "name": "laptop", "days": 7, "scopes": ["chat"] });
    let mut keys = vec![session.key.clone()];
    for _ in 0..2 {
        let made = json_of(world.post_to("/v1/keys", Some(&session.key), &body).await).await;
        keys.push(made["api_key"].as_str().unwrap().to_owned());
    }
    let mut limited = None;
    // A minute may end in between: of nine in two minutes five are in one. No key sends more than three.
    for key in keys.iter().cycle().take(9) {
        let response = world.post_to("/v1/quote", Some(key), &chat(json!({}))).await;
        limited = limited.or((response.status() == 429).then_some(response));
    }
    let limited = json_of(limited.expect("the account is limited")).await;
    assert!(limited["error"]["message"].as_str().unwrap().contains("this account"), "{limited}");
}
