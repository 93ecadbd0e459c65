//! What must be refused, with the right status and a body that names the field.

use infera_runtime::jwt::{Claims, Signer};
use infera_testkit::TempDir;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Column, DEADLINE, MODEL, World, chat, json_of};

both!(bad_keys, bad_bodies, a_huge_body_is_not_read, bad_headers_and_paths, quotas, garbage_on_the_queues);

async fn bad_keys(column: Column) {
    let world = World::new(column).await;
    let issue = |claims: &Claims| world.files.signer.issue(claims).unwrap();
    let good = Claims::new("alice", infera_gateway::keys::AUDIENCE, &["chat"], 600);
    let elsewhere = TempDir::new().unwrap();
    let forger = Signer::load_or_create(&elsewhere.path().join("k.pem")).unwrap();
    let genuine = issue(&good);
    let (head, _) = genuine.rsplit_once('.').unwrap();
    for (what, key, status, code) in [
        ("none", None, 401, "invalid_api_key"),
        ("empty", Some(String::new()), 401, "invalid_api_key"),
        ("nonsense", Some("sk-nonsense".into()), 401, "invalid_api_key"),
        ("forged", Some(forger.issue(&good).unwrap()), 401, "invalid_api_key"),
        ("cut", Some(head.to_owned()), 401, "invalid_api_key"),
        ("unsigned", Some(format!("{head}.AAAA")), 401, "invalid_api_key"),
        ("expired", Some(issue(&Claims { exp: good.iat - 60, ..good.clone() })), 401, "expired_api_key"),
        (
            "for others",
            Some(issue(&Claims { aud: "dispatcher".into(), ..good.clone() })),
            401,
            "invalid_api_key",
        ),
        ("anonymous", Some(issue(&Claims { sub: String::new(), ..good.clone() })), 401, "invalid_api_key"),
        ("no scope", Some(issue(&Claims { scope: vec![], ..good.clone() })), 403, "insufficient_scope"),
    ] {
        let mut request =
            world.client.post(world.url("/v1/chat/completions")).body(chat(json!({})).to_string());
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{what}");
        let body = json_of(response).await;
        assert_eq!(body["error"]["code"], code, "{what}: {body}");
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }
}

async fn bad_bodies(column: Column) {
    let mut world = World::new(column).await;
    let deep = format!("{{\"model\":{}1{}}}", "[".repeat(5_000), "]".repeat(5_000));
    for (body, status, code, param) in [
        (chat(json!({ "messages": [] })).to_string(), 400, "invalid_value", json!("messages")),
        (chat(json!({ "model": "gpt-99" })).to_string(), 404, "model_not_found", json!("model")),
        (chat(json!({ "model": 5 })).to_string(), 400, "invalid_type", json!("model")),
        (chat(json!({ "temperature": "hot" })).to_string(), 400, "invalid_type", json!("temperature")),
        (chat(json!({ "temperature": 9 })).to_string(), 400, "invalid_value", json!("temperature")),
        (chat(json!({ "n": 9 })).to_string(), 400, "invalid_value", json!("n")),
        (chat(json!({ "tools": [{}] })).to_string(), 400, "unsupported_parameter", json!("tools")),
        (
            chat(json!({ "logit_bias": { "49152": 100 } })).to_string(),
            400,
            "invalid_value",
            json!("logit_bias"),
        ),
        (
            chat(json!({ "logprobs": true, "top_logprobs": 20 })).to_string(),
            400,
            "invalid_value",
            json!("top_logprobs"),
        ),
        (chat(json!({ "temprature": 1 })).to_string(), 400, "unknown_parameter", json!("temprature")),
        (chat(json!({ "infera": { "x": 1 } })).to_string(), 400, "unknown_parameter", json!("infera.x")),
        ("{\"model\":".to_owned(), 400, "invalid_json", json!(null)),
        (String::new(), 400, "invalid_json", json!(null)),
        ("[1, 2]".to_owned(), 400, "invalid_json", json!(null)),
        (deep, 400, "invalid_json", json!(null)),
    ] {
        let shown: String = body.chars().take(120).collect();
        let request = world.client.post(world.url("/v1/chat/completions")).bearer_auth(&world.key).body(body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{shown}");
        assert_eq!(response.headers()["content-type"], "application/json");
        assert!(response.headers().contains_key("x-request-id"));
        let body = json_of(response).await;
        let error = &body["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!(code), &param), "{shown}: {body}");
        assert_eq!(error["type"], "invalid_request_error");
        if let Some(param) = param.as_str() {
            assert!(
                error["message"].as_str().unwrap().contains(param),
                "the message names the field: {body}"
            );
        }
    }
    assert!(world.net.more().is_empty(), "nothing of this is submitted");
}

async fn a_huge_body_is_not_read(column: Column) {
    let world = World::new(column).await;
    // A usual client that sends everything it has gets the answer.
    let huge = chat(json!({ "user": "x".repeat(20 * 1024 * 1024) }));
    let response = world.post(&huge).send().await.unwrap();
    assert_eq!(response.status(), 413);
    assert_eq!(json_of(response).await["error"]["code"], "request_too_large");

    // Refused by its head: nothing of the body was sent.
    let mut socket = tokio::net::TcpStream::connect(world.gateway.address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 20971520\r\n\r\n",
        world.key
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    tokio::time::timeout(DEADLINE, socket.read_exact(&mut answer)).await.expect("an answer").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");

    // A client that writes all it has before it reads: it may stop writing, but it reads why.
    let mut socket = tokio::net::TcpStream::connect(world.gateway.address).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    let block = vec![b'x'; 64 * 1024];
    for _ in 0..20 * 16 {
        if socket.write_all(&block).await.is_err() {
            break;
        }
    }
    let mut answer = [0; 12];
    tokio::time::timeout(DEADLINE, socket.read_exact(&mut answer)).await.expect("an answer").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");

    // Without a declared length, refused once the limit is passed.
    let chunks = futures::stream::iter((0..64).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 * 1024])));
    let request = world.client.post(world.url("/v1/chat/completions")).bearer_auth(&world.key);
    let response = request.body(reqwest::Body::wrap_stream(chunks)).send().await.unwrap();
    assert_eq!(response.status(), 413);

    // Another's key is checked before anything is read.
    let request = world.client.post(world.url("/v1/chat/completions")).body(huge.to_string());
    assert_eq!(request.send().await.unwrap().status(), 401);
}

async fn bad_headers_and_paths(column: Column) {
    let world = World::new(column).await;
    for key in ["", &"k".repeat(256)] {
        let response = world.post(&chat(json!({}))).header("idempotency-key", key).send().await.unwrap();
        assert_eq!(response.status(), 400);
        assert_eq!(json_of(response).await["error"]["param"], "Idempotency-Key");
    }
    let response = world.client.get(world.url("/v1/chat/completions")).send().await.unwrap();
    assert_eq!(response.status(), 405);
    assert_eq!(json_of(response).await["error"]["code"], "method_not_allowed");
    let response = world.client.get(world.url("/v1/nothing")).send().await.unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(json_of(response).await["error"]["code"], "unknown_url");
    let response =
        world.client.get(world.url("/livez")).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
}

async fn quotas(column: Column) {
    let mut world = World::with(column, |config| config.requests_per_minute = 2).await;
    // Two windows of a minute at most, so five requests cannot all be within the limit.
    let mut refused = None;
    for _ in 0..5 {
        let response = world.post(&chat(json!({ "model": "gpt-99" }))).send().await.unwrap();
        if response.status() == 429 {
            refused = Some(response);
            break;
        }
    }
    let response = refused.expect("the limit is kept");
    let wait: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait));
    assert_eq!(json_of(response).await["error"]["code"], "rate_limit_exceeded");
    // Another key of the same account has its own counter.
    world.key = world.files.key("alice").0;
    assert_eq!(world.post(&chat(json!({ "model": "gpt-99" }))).send().await.unwrap().status(), 404);
}

async fn garbage_on_the_queues(column: Column) {
    use infera_bus::Envelope;
    use infera_wire::topology::keys;
    use uuid::Uuid;

    let mut world = World::new(column).await;
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    for key in [
        keys::verdict(&submitted.reply_to),
        keys::request_rejected(&submitted.reply_to),
        keys::verdict("nobody"),
    ] {
        let bus = world.net.bus.clone();
        let envelope = Envelope::new(Uuid::now_v7(), infera_wire::topology::kind(&key), vec![0xff; 40]);
        tokio::spawn(async move { bus.publish(&key, envelope).await });
    }
    let envelope = Envelope::new(Uuid::now_v7(), "deltas", vec![0xff; 40]);
    world.net.bus.publish_transient(&keys::deltas(&submitted.reply_to), envelope);
    let mut dead = world.net.bus.subscribe(infera_wire::topology::DEAD_LETTERS, 8).await.unwrap();
    for _ in 0..3 {
        let delivery = tokio::time::timeout(DEADLINE, dead.next()).await.expect("a dead letter").unwrap();
        let queue = delivery.dead_letter.as_ref().unwrap().origin_queue.clone();
        assert!(["gateway.verdict", "gateway.rejected"].contains(&queue.as_str()), "{queue}");
        delivery.ack().await.unwrap();
    }
    world.net.answer(&submitted, "still here");
    let body = json_of(pending.await.unwrap()).await;
    assert_eq!(
        (&body["choices"][0]["message"]["content"], &body["model"]),
        (&json!("still here"), &json!(MODEL))
    );
}
