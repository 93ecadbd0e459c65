//! Usage and statements, as their owner reads them.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::escrow::World;

/// What the wallet reads of it, in JSON and as CSV.
pub async fn statements(world: &World, ids: &[Uuid]) {
    let key = world.place.key(&world.name());
    let get = async |path: &str| world.service.json(path, Some(&key)).await;
    let usage = get("/v1/usage?from=1999-12-01&to=2000-01-01").await;
    assert_eq!((&usage["totals"]["requests"], &usage["data"]), (&json!(0), &json!([])));
    let usage = get("/v1/usage").await;
    assert_eq!(
        usage["totals"],
        json!({
            "requests": 4, "settled": 3, "prompt_tokens": 40, "completion_tokens": 60, "charged_micro": 360,
        })
    );
    let all = usage["data"].as_array().unwrap().clone();
    assert_eq!(all[0]["state"], "rejected", "the newest first");
    assert_eq!(all[0]["code"], "insufficient_quota");
    for one in &all[1..] {
        assert!(ids.iter().any(|id| one["receipt_id"] == json!(id)), "{one}");
        assert_eq!((&one["held_micro"], &one["charged_micro"]), (&json!(600), &json!(120)));
        assert_eq!((&one["submitted_at_ms"], one["batch"].is_i64()), (&json!(1_000), true), "{one}");
    }
    assert_eq!(get("/v1/usage?model=other").await["totals"]["requests"], 0);
    // Page by page it is the same.
    let (mut paged, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = get(&format!("/v1/usage?limit=3{cursor}")).await;
        paged.extend(page["data"].as_array().unwrap().clone());
        assert_eq!(page["totals"]["requests"], 4, "of the whole period");
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(paged, all);
    let (status, csv) = world.service.get("/v1/usage?format=csv", Some(&key)).await;
    let csv = String::from_utf8(csv).unwrap();
    assert_eq!((status, csv.matches("\r\n").count()), (200, 5), "{csv}");
    assert!(csv.starts_with("request_id,model,state,code,prompt_tokens,"), "{csv}");

    let statement = get("/v1/statement").await;
    let lines = statement["data"].as_array().unwrap();
    let kinds: Vec<&str> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[1], kinds[kinds.len() - 1]), ("opening", "deposit", "closing"), "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == "hold").count(), 3);
    assert_eq!(kinds.iter().filter(|kind| **kind == "charge").count(), 3);
    let last = &lines[lines.len() - 1];
    assert_eq!((&last["balance_micro"], &last["held_micro"]), (&json!(1_640), &json!(0)));
    let mut sum = 0;
    for line in lines {
        sum += line["amount_micro"].as_i64().unwrap();
        assert_eq!(line["balance_micro"], sum, "{line}");
    }
    // The next page opens with what the one before closed with.
    let first = get("/v1/statement?limit=3").await;
    let second = get(&format!("/v1/statement?cursor={}", first["next_cursor"].as_str().unwrap())).await;
    assert_eq!(first["data"][4]["kind"], "closing");
    assert_eq!(second["data"][0]["balance_micro"], first["data"][4]["balance_micro"]);
    let rest = second["data"].as_array().unwrap();
    assert_eq!(
        &rest[1..],
        &lines[4..lines.len() - 1].iter().cloned().chain([last_of(rest)]).collect::<Vec<_>>()
    );
    let (status, csv) = world.service.get("/v1/statement?format=csv", Some(&key)).await;
    let csv = String::from_utf8(csv).unwrap();
    assert_eq!((status, csv.matches("\r\n").count()), (200, lines.len() + 1), "{csv}");
    assert!(csv.trim_end().ends_with(",0,0,1640"), "{csv}");
    for path in
        ["/v1/usage?limit=1001", "/v1/usage?from=x", "/v1/statement?to=2&from=3", "/v1/usage?unknown=1"]
    {
        assert_eq!(world.service.get(path, Some(&key)).await.0, 400, "{path}");
    }
    for path in ["/v1/usage", "/v1/statement", "/v1/balance"] {
        assert_eq!(world.service.get(path, None).await.0, 401, "{path}");
    }
    let others = world.service.json("/v1/usage", Some(&world.place.key("alice"))).await;
    assert_eq!(others["totals"]["requests"], 0, "nobody sees another's");
}

fn last_of(lines: &[Value]) -> Value {
    lines[lines.len() - 1].clone()
}
