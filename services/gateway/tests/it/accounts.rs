//! What settlement answers, at the gateway's address.

use infera_gateway::keys;
use infera_runtime::jwt::Claims;
use infera_testkit::eventually;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use uuid::Uuid;

use std::sync::Arc;

use crate::books::Books;
use crate::support::{Column, DEADLINE, World, chat, json_of};
use crate::wallet::Wallet;

both!(
    what_settlement_says_is_passed_on,
    only_what_belongs_to_the_request_is_passed_on,
    keys_are_checked_first,
    receipts_are_everybodys,
    what_stands_behind_the_chain_is_everybodys,
    strangers_are_limited_by_address,
    a_long_answer_comes_as_it_is_made,
    without_settlement,
    a_slow_settlement,
    a_huge_answer,
    who_stops_reading_keeps_nobody_out,
    who_leaves_keeps_nobody_out,
    strangers_keep_no_account_out,
    answers_that_are_none,
    a_gateway_without_settlement,
);

const JSON: &str = "200 OK\r\ncontent-type: application/json";

async fn with(column: Column, books: &Books) -> World {
    let url = format!("{}/", books.url);
    World::with(column, move |config| {
        config.settlement_url = url;
        config.settlement_timeout_secs = 1;
        config.settlement_max_mib = 1;
    })
    .await
}

async fn what_settlement_says_is_passed_on(column: Column) {
    let mut books = Books::saying(JSON, r#"{"account":"alice","available_micro":5}"#).await;
    let world = with(column, &books).await;
    let session = Wallet::new().sign_in(&world).await;
    for key in [&world.key, &session.key] {
        let response = world.get("/v1/balance", key).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/json");
        assert_eq!(response.headers()["cache-control"], "private, no-store");
        assert_eq!(response.headers()["content-length"], "39");
        assert_eq!(json_of(response).await["available_micro"], 5);
        let heard = books.heard().remove(0);
        assert_eq!(heard.line, "GET /v1/balance");
        assert_eq!(heard.headers["authorization"], format!("Bearer {key}"));
    }
    let query = "from=2026-11-01T00%3A00%3A00Z&limit=3&model=a%2Fb&format=csv";
    for (path, line) in [
        (format!("/v1/usage?{query}"), format!("GET /v1/usage?{query}")),
        (format!("/v1/statement?{query}"), format!("GET /v1/statement?{query}")),
    ] {
        assert_eq!(world.get(&path, &world.key).await.status(), 200);
        assert_eq!(books.heard()[0].line, line);
    }
    let body = json!({ "cumulative_micro": "123", "signature": "0x00" });
    assert_eq!(world.post_to("/v1/vouchers", Some(&world.key), &body).await.status(), 200);
    let heard = books.heard().remove(0);
    assert_eq!((heard.line.as_str(), heard.body), ("POST /v1/vouchers", body.to_string()));

    // A refusal of settlement's is the client's to read.
    let refusal = json!({ "error": { "code": "bad_voucher", "message": "`signature` ...", "type": "t", "param": "signature" } });
    let refusing =
        Books::saying("409 Conflict\r\ncontent-type: application/json", &refusal.to_string()).await;
    let world = with(column, &refusing).await;
    let response = world.post_to("/v1/vouchers", Some(&world.key), &body).await;
    assert_eq!(response.status(), 409);
    assert_eq!(json_of(response).await, refusal);
}

async fn only_what_belongs_to_the_request_is_passed_on(column: Column) {
    let head = "200 OK\r\ncontent-type: text/csv\r\ncontent-disposition: attachment; filename=\"usage.csv\"\r\n\
                set-cookie: a=b\r\nx-internal: secret\r\nkeep-alive: timeout=5\r\nserver: books\r\n\
                x-request-id: theirs\r\ncache-control: private, max-age=5";
    let mut books = Books::saying(head, "a,b\r\n").await;
    let world = with(column, &books).await;
    let request = world.client.get(world.url("/v1/usage")).bearer_auth(&world.key);
    let request = request
        .header("accept", "text/csv")
        .header("cookie", "session=1")
        .header("x-forwarded-for", "10.0.0.1")
        .header("x-internal", "1")
        .header("te", "trailers")
        .header("host", "gateway.test")
        .header("x-request-id", "mine-7");
    let response = request.send().await.unwrap();
    let headers = response.headers().clone();
    assert_eq!(
        (&headers["content-type"], &headers["x-request-id"]),
        (&"text/csv".parse().unwrap(), &"mine-7".parse().unwrap())
    );
    assert_eq!(headers["content-disposition"], "attachment; filename=\"usage.csv\"");
    assert_eq!(headers["cache-control"], "private, max-age=5");
    for name in ["set-cookie", "x-internal", "keep-alive", "server"] {
        assert!(!headers.contains_key(name), "{name}");
    }
    assert_eq!(response.text().await.unwrap(), "a,b\r\n");
    let heard = books.heard().remove(0);
    assert_eq!(heard.headers["x-request-id"], "mine-7");
    assert_eq!(heard.headers["accept"], "text/csv");
    let names: Vec<&str> = heard.headers.keys().map(String::as_str).collect();
    let mut expected = vec!["accept", "authorization", "host", "x-request-id"];
    expected.extend(heard.headers.contains_key("traceparent").then_some("traceparent"));
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert_eq!(format!("http://{}", heard.headers["host"]), books.url);

    let long = world.get(&format!("/v1/usage?model={}", "x".repeat(3_000)), &world.key).await;
    assert_eq!(long.status(), 400);
    let long = json_of(long).await;
    assert_eq!(long["error"]["param"], "query");
    let body = json!({ "signature": "x".repeat(20_000) });
    assert_eq!(world.post_to("/v1/vouchers", Some(&world.key), &body).await.status(), 413);
    assert!(books.heard().is_empty());
}

async fn keys_are_checked_first(column: Column) {
    let mut books = Books::saying(JSON, "{}").await;
    let url = books.url.clone();
    let world = World::with(column, |config| {
        config.settlement_url = url;
        config.requests_per_minute = 6;
    })
    .await;
    let (key, jti) = world.files.key("alice");
    let session = Wallet::new().sign_in(&world).await;
    keys::revoke(&world.database().await, &jti).await.unwrap();
    let revoke =
        world.client.delete(world.url(&format!("/v1/keys/{}", session.jti))).bearer_auth(&session.key);
    assert_eq!(revoke.send().await.unwrap().status(), 200);
    let receipt = format!("/v1/receipts/{}", Uuid::now_v7());
    for path in ["/v1/balance", "/v1/usage", "/v1/statement", &receipt] {
        for key in [key.as_str(), &session.key, "sk-nonsense"] {
            let response = world.get(path, key).await;
            assert_eq!(response.status(), 401, "{path}");
        }
    }
    for key in [Some(key.as_str()), Some("sk-nonsense"), None] {
        assert_eq!(world.post_to("/v1/vouchers", key, &json!({})).await.status(), 401);
    }
    for path in ["/v1/balance", "/v1/usage", "/v1/statement"] {
        assert_eq!(world.client.get(world.url(path)).send().await.unwrap().status(), 401);
    }
    assert!(books.heard().is_empty(), "settlement hears nothing of these");
    let mut limited = false;
    for _ in 0..13 {
        limited |= world.get("/v1/balance", &world.key).await.status() == 429;
    }
    assert!(limited, "looking counts as a request");
}

async fn receipts_are_everybodys(column: Column) {
    let mut books = Books::saying(JSON, r#"{"receipt":{}}"#).await;
    let world = with(column, &books).await;
    let id = Uuid::now_v7();
    for path in [format!("/v1/receipts/{id}"), format!("/v1/receipts/chatcmpl-{id}")] {
        let response = world.client.get(world.url(&path)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let heard = books.heard().remove(0);
        assert_eq!(heard.line, format!("GET /v1/receipts/{id}"));
        assert!(!heard.headers.contains_key("authorization"));
    }
    assert_eq!(world.get(&format!("/v1/receipts/{id}"), &world.key).await.status(), 200);
    assert!(books.heard()[0].headers.contains_key("authorization"), "the account gets the evidence");
    let claims = Claims::new("alice", keys::AUDIENCE, &["chat"], 600);
    let refused = world.get(&format!("/v1/receipts/{id}"), &world.files.signer.issue(&claims).unwrap()).await;
    assert_eq!(refused.status(), 403);
    let refused = json_of(refused).await;
    assert_eq!(refused["error"]["code"], "insufficient_scope");
    assert!(refused["error"]["message"].as_str().unwrap().contains("`receipts`"), "{refused}");
    assert!(books.heard().is_empty(), "a key for something else brings no evidence");
    for bad in ["nothing", "..%2Fbalance", "%2e%2e", "chatcmpl-"] {
        let response = world.client.get(world.url(&format!("/v1/receipts/{bad}"))).send().await.unwrap();
        assert!([400, 404].contains(&response.status().as_u16()), "{bad}");
    }
    assert!(books.heard().is_empty());
}

/// What `infera verify --batches` and `infera operator` ask settlement for.
async fn what_stands_behind_the_chain_is_everybodys(column: Column) {
    let mut books = Books::saying(JSON, r#"{"sequence":7}"#).await;
    let world = with(column, &books).await;
    let operator = format!("0x{}", "ab".repeat(20));
    let paths = [
        "/v1/governance".to_owned(),
        "/v1/batches/7".to_owned(),
        "/v1/batches/7/receipts?from=500".to_owned(),
        "/v1/batches/7/rewards".to_owned(),
        format!("/v1/operators/{operator}"),
        format!("/v1/operators/{operator}/rewards/7"),
    ];
    for path in &paths {
        let response = world.client.get(world.url(path)).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(json_of(response).await, json!({ "sequence": 7 }));
        let heard = books.heard().remove(0);
        assert_eq!(heard.line, format!("GET {path}"));
        assert_eq!(world.get(path, &world.key).await.status(), 200, "with a key as well");
        assert_eq!(books.heard().len(), 1);
        assert_eq!(world.get(path, "sk-nonsense").await.status(), 401, "a key that is sent is a good one");
    }
    for (bad, field) in [
        ("/v1/batches/x", "sequence"),
        ("/v1/batches/-1/receipts", "sequence"),
        ("/v1/batches/99999999999999999999/rewards", "sequence"),
        ("/v1/operators/0xab", "address"),
        ("/v1/operators/..%2Fbalance", "address"),
        (&format!("/v1/operators/{operator}/rewards/..%2F..%2Fbalance"), "sequence"),
    ] {
        let response = world.client.get(world.url(bad)).send().await.unwrap();
        assert_eq!(response.status(), 400, "{bad}");
        assert_eq!(json_of(response).await["error"]["param"], field, "{bad}");
    }
    assert!(books.heard().is_empty());
}

async fn strangers_are_limited_by_address(column: Column) {
    let books = Books::saying(JSON, "{}").await;
    let url = books.url.clone();
    let world = World::with(column, |config| {
        config.settlement_url = url;
        config.public_per_minute = 3;
        config.trust_forwarded_for = true;
    })
    .await;
    let [a, b] = [rand::random::<u32>(), rand::random::<u32>()]
        .map(|bits| std::net::Ipv6Addr::from(u128::from(bits) << 64).to_string());
    let get = async |from: &str, path: &str| {
        let request = world.client.get(world.url(path)).header("x-forwarded-for", from);
        request.send().await.unwrap()
    };
    let receipt = format!("/v1/receipts/{}", Uuid::now_v7());
    let mut limited = None;
    // A minute may end in between.
    for path in ["/v1/governance", &receipt, "/v1/batches/1"].into_iter().cycle().take(7) {
        let response = get(&a, path).await;
        limited = limited.or((response.status() == 429).then_some(response));
    }
    assert!(limited.expect("an address is limited").headers().contains_key("retry-after"));
    assert_eq!(get(&b, "/v1/governance").await.status(), 200, "others are not");
    assert_eq!(world.get(&receipt, &world.key).await.status(), 200, "a key counts for itself");
}

async fn a_long_answer_comes_as_it_is_made(column: Column) {
    let goes_on = Arc::new(Notify::new());
    let waits = goes_on.clone();
    let books = Books::answering(move |mut socket, _| {
        let waits = waits.clone();
        Box::pin(async move {
            let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\ntransfer-encoding: chunked\r\n\r\n";
            socket.write_all(head).await.unwrap();
            socket.write_all(b"7\r\nfirst\r\n\r\n").await.unwrap();
            // The second line is not written before the client has the first.
            waits.notified().await;
            socket.write_all(b"8\r\nsecond\r\n\r\n0\r\n\r\n").await.unwrap();
        })
    })
    .await;
    let url = books.url.clone();
    let world = World::with(column, |config| config.settlement_url = url).await;
    let mut response = world.get("/v1/usage?format=csv", &world.key).await;
    assert!(!response.headers().contains_key("content-length"));
    let first =
        tokio::time::timeout(DEADLINE, response.chunk()).await.expect("the first line comes").unwrap();
    assert_eq!(first.unwrap(), "first\r\n");
    goes_on.notify_one();
    assert_eq!(response.text().await.unwrap(), "second\r\n");
}

async fn without_settlement(column: Column) {
    let books = Books::saying(JSON, "{}").await;
    let mut world = with(column, &books).await;
    drop(books);
    let response = world.get("/v1/balance", &world.key).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body = json_of(response).await;
    assert_eq!(body["error"]["code"], "settlement_unavailable");
    assert!(body["error"]["message"].as_str().unwrap().contains("settlement service"), "{body}");
    assert!(!body.to_string().contains("127.0.0.1"), "addresses inside are nobody's business: {body}");
    // Answers do not wait for it, and the gateway is ready.
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    world.net.answer(&submitted, "Paris");
    assert_eq!(pending.await.unwrap().status(), 200);
    assert_eq!(world.client.get(world.url("/readyz")).send().await.unwrap().status(), 200);
    let metrics = world.client.get(world.url("/metrics")).send().await.unwrap().text().await.unwrap();
    let counted = r#"infera_gateway_forwards_total{outcome="unavailable",route="/v1/balance"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
}

async fn a_slow_settlement(column: Column) {
    // One that accepts and says nothing, and one that stops in the middle.
    let silent = Books::answering(|socket, _| {
        Box::pin(async move {
            std::future::pending::<()>().await;
            drop(socket);
        })
    })
    .await;
    let world = with(column, &silent).await;
    let response = world.get("/v1/balance", &world.key).await;
    assert_eq!(response.status(), 503);
    assert_eq!(json_of(response).await["error"]["code"], "settlement_unavailable");

    let stalls = Books::answering(|mut socket, heard| {
        Box::pin(async move {
            let length =
                if heard.line.contains("sized") { "content-length: 9" } else { "transfer-encoding: chunked" };
            let first = if heard.line.contains("sized") { "abcd" } else { "4\r\nabcd\r\n" };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\n{length}\r\n\r\n{first}");
            socket.write_all(head.as_bytes()).await.unwrap();
            if heard.line.contains("hangs") {
                std::future::pending::<()>().await;
            }
        })
    })
    .await;
    let world = with(column, &stalls).await;
    for how in ["hangs", "hangs&sized", "breaks", "breaks&sized"] {
        let response = world.get(&format!("/v1/usage?{how}"), &world.key).await;
        assert_eq!(response.status(), 200);
        let read = tokio::time::timeout(DEADLINE, response.bytes()).await.expect("it ends");
        assert!(read.is_err(), "half an answer looks like none: {how}");
    }
}

async fn a_huge_answer(column: Column) {
    let books = Books::answering(|mut socket, heard| {
        Box::pin(async move {
            let block = vec![b'x'; 64 * 1024];
            let sized = heard.line.contains("sized");
            let length = if sized { "content-length: 20000000" } else { "transfer-encoding: chunked" };
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\n{length}\r\n\r\n");
            socket.write_all(head.as_bytes()).await.unwrap();
            let blocks = if heard.line.contains("fits") { 16 } else { 400 };
            for _ in 0..blocks {
                let written = async {
                    socket.write_all(format!("{:x}\r\n", block.len()).as_bytes()).await?;
                    socket.write_all(&block).await?;
                    socket.write_all(b"\r\n").await
                };
                if written.await.is_err() {
                    return;
                }
            }
            let _ = socket.write_all(b"0\r\n\r\n").await;
        })
    })
    .await;
    let world = with(column, &books).await;
    let fits = world.get("/v1/usage?fits", &world.key).await;
    assert_eq!(fits.bytes().await.unwrap().len(), 1024 * 1024);
    let declared = world.get("/v1/usage?sized", &world.key).await;
    assert_eq!(declared.status(), 502);
    let body = json_of(declared).await;
    assert_eq!(body["error"]["code"], "answer_too_large");
    assert!(body["error"]["message"].as_str().unwrap().contains("1 MiB"), "{body}");
    let endless = world.get("/v1/usage", &world.key).await;
    assert_eq!(endless.status(), 200);
    assert!(endless.bytes().await.is_err(), "it is cut");
}

/// More than what sockets hold where the query says `endless`, `{}` otherwise.
async fn endless() -> Books {
    Books::answering(|mut socket, heard| {
        Box::pin(async move {
            if !heard.line.contains("endless") {
                return drop(socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await);
            }
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\ntransfer-encoding: chunked\r\n\r\n";
            let mut written = socket.write_all(head.as_bytes()).await;
            let block = format!("{:x}\r\n{}\r\n", 64 * 1024, "x".repeat(64 * 1024));
            while written.is_ok() {
                written = socket.write_all(block.as_bytes()).await;
            }
        })
    })
    .await
}

async fn who_stops_reading_keeps_nobody_out(column: Column) {
    let books = endless().await;
    let url = books.url.clone();
    let world = World::with(column, move |config| {
        config.settlement_url = url;
        config.settlement_timeout_secs = 1;
        config.settlement_max_open = 1;
    })
    .await;
    let unread = world.get("/v1/usage?endless", &world.key).await;
    assert_eq!(unread.status(), 200);
    assert_eq!(world.get("/v1/balance", &world.key).await.status(), 503, "one may be open");
    eventually(DEADLINE, async || {
        let status = world.get("/v1/balance", &world.key).await.status();
        (status == 200).then_some(()).ok_or(status)
    })
    .await;
    assert!(unread.bytes().await.is_err(), "it is cut, and does not look whole");
}

async fn who_leaves_keeps_nobody_out(column: Column) {
    let books = Books::answering(|mut socket, heard| {
        Box::pin(async move {
            if !heard.line.contains("silent") {
                return drop(socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await);
            }
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/csv\r\ntransfer-encoding: chunked\r\n\r\n";
            socket.write_all(format!("{head}4\r\nabcd\r\n").as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        })
    })
    .await;
    let url = books.url.clone();
    let world = World::with(column, move |config| {
        config.settlement_url = url;
        config.settlement_timeout_secs = 300;
        config.settlement_max_open = 1;
    })
    .await;
    let left = world.get("/v1/usage?silent", &world.key).await;
    assert_eq!(world.get("/v1/balance", &world.key).await.status(), 503, "one may be open");
    drop(left);
    eventually(DEADLINE, async || {
        let status = world.get("/v1/balance", &world.key).await.status();
        (status == 200).then_some(()).ok_or(status)
    })
    .await;
}

async fn strangers_keep_no_account_out(column: Column) {
    let books = endless().await;
    let url = books.url.clone();
    let world = World::with(column, move |config| {
        config.settlement_url = url;
        config.settlement_timeout_secs = 300;
        config.settlement_max_open = 8;
    })
    .await;
    let stranger = async |path: &str| world.client.get(world.url(path)).send().await.unwrap();
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(stranger("/v1/batches/1/receipts?endless").await);
    }
    assert!(unread.iter().all(|answer| answer.status() == 200));
    for path in ["/v1/governance", &format!("/v1/receipts/{}", Uuid::now_v7())] {
        assert_eq!(stranger(path).await.status(), 503, "{path}: half as many as accounts");
        assert_eq!(
            world.get(path, &world.key).await.status(),
            200,
            "{path}: accounts have places of their own"
        );
    }
    assert_eq!(world.get("/v1/balance", &world.key).await.status(), 200);
}

async fn answers_that_are_none(column: Column) {
    for (head, status, code) in [
        ("302 Found\r\nlocation: http://127.0.0.1:1/", 502, "bad_gateway"),
        ("502 Bad Gateway\r\ncontent-type: text/html", 503, "settlement_unavailable"),
        ("nonsense", 503, "settlement_unavailable"),
    ] {
        let books = Books::saying(head, "<html>").await;
        let world = with(column, &books).await;
        let response = world.get("/v1/balance", &world.key).await;
        assert_eq!(response.status(), status, "{head}");
        assert_eq!(json_of(response).await["error"]["code"], code, "{head}");
    }
}

async fn a_gateway_without_settlement(column: Column) {
    let world = World::new(column).await;
    for path in ["/v1/balance", "/v1/usage", "/v1/statement"] {
        let response = world.get(path, &world.key).await;
        assert_eq!(response.status(), 404);
        let body = json_of(response).await;
        assert_eq!(body["error"]["code"], "accounts_disabled");
        assert!(body["error"]["message"].as_str().unwrap().contains("settlement_url"), "{body}");
    }
}
