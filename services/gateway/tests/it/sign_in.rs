//! Signing in with a wallet, and the keys that one makes then.

use infera_gateway::keys;
use infera_protocol::siwe::Message;
use infera_runtime::jwt::{Claims, Signer};
use infera_runtime::{clock, db};
use infera_testkit::unique;
use serde_json::{Value, json};

use crate::support::{Column, Files, Gateway, World, chat, json_of};
use crate::wallet::Wallet;

both!(
    pages_of_listed_origins_may_ask,
    a_wallet_signs_in_and_asks,
    a_message_is_good_once,
    what_is_wrong_with_a_message_is_named,
    bodies_that_are_no_sign_in,
    keys_are_made_listed_and_revoked,
    what_keys_may_not,
    keys_have_limits,
    the_oldest_sign_in_gives_way,
    addresses_have_limits,
    no_sign_in_without_a_signing_key,
    expired_keys_are_forgotten,
);

async fn refused(response: reqwest::Response, status: u16, code: &str) -> Value {
    assert_eq!(response.status(), status, "{code}");
    let body = json_of(response).await;
    assert_eq!(body["error"]["code"], code, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().len() > 10, "{body}");
    body["error"].clone()
}

async fn a_wallet_signs_in_and_asks(column: Column) {
    let mut world = World::new(column).await;
    let wallet = Wallet::new();
    let bare = json_of(world.post_to("/v1/auth/nonce", None, &json!({})).await).await;
    assert_eq!((&bare["domain"], &bare["uri"]), (&json!("gateway.test"), &json!("http://gateway.test")));
    assert_eq!((&bare["chain_id"], &bare["message"]), (&json!(31_337), &json!(null)));
    assert!(bare["expires_at"].as_i64().unwrap() > clock::now_secs() + 200);

    // A message that the client builds, from a page elsewhere it would be.
    let message = Message {
        statement: None,
        nonce: bare["nonce"].as_str().unwrap().to_owned(),
        expiration_ms: None,
        ..wallet.message(&world).await
    };
    let response = world.post_to("/v1/auth/login", None, &wallet.login(&message)).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["cache-control"]),
        (200, &"no-store".parse().unwrap())
    );
    let body = json_of(response).await;
    assert_eq!(body["account"], wallet.account());
    assert_eq!(body["scopes"], json!(["chat", "receipts", "keys"]));
    assert!(body["expires_at"].as_i64().unwrap() > clock::now_secs() + 23 * 3_600);

    world.key = body["api_key"].as_str().unwrap().to_owned();
    let pending = world.send(&chat(json!({})));
    let submitted = world.net.next().await;
    assert_eq!(submitted.account, wallet.account());
    world.net.answer(&submitted, "Paris");
    assert_eq!(pending.await.unwrap().status(), 200);
}

async fn a_message_is_good_once(column: Column) {
    let world = World::new(column).await;
    // The embedded store is one process's; in a cluster replicas share one.
    let replicas: Vec<Gateway> = match column {
        Column::Embedded => Vec::new(),
        Column::Cluster => vec![world.replica().await, world.replica().await],
    };
    let urls: Vec<String> = std::iter::once(&world.gateway)
        .chain(&replicas)
        .map(|gateway| format!("http://{}/v1/auth/login", gateway.address))
        .collect();
    let wallet = Wallet::new();
    let body = wallet.login(&wallet.message(&world).await).to_string();
    let logins = urls.iter().cycle().take(9).map(|url| world.client.post(url).body(body.clone()).send());
    let mut codes = Vec::new();
    for response in futures::future::join_all(logins).await {
        let response = response.unwrap();
        let status = response.status().as_u16();
        codes.push((status, json_of(response).await["error"]["code"].as_str().map(str::to_owned)));
    }
    codes.sort();
    let lost = (401, Some("invalid_nonce".to_owned()));
    assert_eq!(codes[0], (200, None), "{codes:?}");
    assert!(codes[1..].iter().all(|code| *code == lost), "{codes:?}");

    // Who fails for another reason keeps the nonce.
    let message = wallet.message(&world).await;
    let forged =
        json!({ "message": message.to_string(), "signature": Wallet::new().sign(&message.to_string()) });
    refused(world.post_to("/v1/auth/login", None, &forged).await, 401, "invalid_signature").await;
    assert_eq!(world.post_to("/v1/auth/login", None, &wallet.login(&message)).await.status(), 200);
}

async fn what_is_wrong_with_a_message_is_named(column: Column) {
    let world =
        World::with(column, |config| config.sign_in_origins = vec!["https://app.example.org".into()]).await;
    let wallet = Wallet::new();
    let now = clock::now_ms();
    type Change = fn(&mut Message, i64);
    for (change, code, says) in [
        ((|m, _| m.domain = "evil.example.org".into()) as Change, "wrong_domain", "`gateway.test`"),
        (|m, _| m.domain = "gateway.test:8080".into(), "wrong_domain", "`app.example.org`"),
        (|m, _| m.scheme = Some("https".into()), "wrong_domain", "https://gateway.test"),
        (|m, _| m.uri = "http://evil.example.org/".into(), "wrong_domain", "http://gateway.test"),
        (|m, _| m.chain_id = 1, "wrong_chain", "31337"),
        (|m, _| m.nonce = "neverGivenOut123".into(), "invalid_nonce", "Nonce"),
        (|m, now| m.expiration_ms = Some(now - 120_000), "message_expired", "Expiration Time"),
        (|m, now| m.issued_at_ms = now - 3_600_000, "message_expired", "Issued At"),
        (|m, now| m.issued_at_ms = now + 3_600_000, "message_not_valid_yet", "Issued At"),
        (|m, now| m.not_before_ms = Some(now + 120_000), "message_not_valid_yet", "Not Before"),
        (|m, _| m.address = Wallet::new().address(), "invalid_signature", "sign with that account"),
    ] {
        let mut message = wallet.message(&world).await;
        change(&mut message, now);
        let response = world.post_to("/v1/auth/login", None, &wallet.login(&message)).await;
        let error = refused(response, 401, code).await;
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
    }
    // A page that is allowed, and clocks that differ a little.
    for change in [
        (|m, _| {
            m.domain = "app.example.org".into();
            m.uri = "https://app.example.org/account".into();
        }) as Change,
        |m, now| m.issued_at_ms = now + 30_000,
        |m, now| m.expiration_ms = Some(now - 30_000),
    ] {
        let mut message = wallet.message(&world).await;
        change(&mut message, clock::now_ms());
        let response = world.post_to("/v1/auth/login", None, &wallet.login(&message)).await;
        assert_eq!(response.status(), 200, "{message}");
    }
}

async fn bodies_that_are_no_sign_in(column: Column) {
    let world = World::new(column).await;
    let wallet = Wallet::new();
    let message = wallet.message(&world).await;
    let text = message.to_string();
    let signature = wallet.sign(&text);
    let with = |message: &str, signature: &str| json!({ "message": message, "signature": signature });
    for (path, body, status, code, param) in [
        ("/v1/auth/login", json!({}), 400, "missing_required_parameter", json!("message")),
        ("/v1/auth/login", json!({ "message": text }), 400, "missing_required_parameter", json!("signature")),
        ("/v1/auth/login", with("", &signature), 400, "invalid_message", json!("message")),
        (
            "/v1/auth/login",
            with(&text.replace("0x", "0X"), &signature),
            400,
            "invalid_message",
            json!("message"),
        ),
        ("/v1/auth/login", with(&format!("{text}\n"), &signature), 400, "invalid_message", json!("message")),
        (
            "/v1/auth/login",
            with(&text.replace('\n', "\r\n"), &signature),
            400,
            "invalid_message",
            json!("message"),
        ),
        ("/v1/auth/login", with(&text.to_lowercase(), &signature), 400, "invalid_message", json!("message")),
        ("/v1/auth/login", with(&"x".repeat(5_000), &signature), 400, "invalid_message", json!("message")),
        ("/v1/auth/login", with(&text, &signature[..130]), 400, "invalid_signature", json!("signature")),
        (
            "/v1/auth/login",
            with(&text, &format!("{signature}00")),
            400,
            "invalid_signature",
            json!("signature"),
        ),
        (
            "/v1/auth/login",
            with(&text, &format!("0x{}", "00".repeat(65))),
            401,
            "invalid_signature",
            json!("signature"),
        ),
        ("/v1/auth/login", json!([]), 400, "invalid_json", json!(null)),
        ("/v1/auth/login", json!("x".repeat(20_000)), 413, "request_too_large", json!(null)),
        ("/v1/auth/nonce", json!({ "address": "0x1" }), 400, "invalid_value", json!("address")),
        ("/v1/auth/nonce", json!({ "adress": "0x1" }), 400, "unknown_parameter", json!("adress")),
    ] {
        let error = refused(world.post_to(path, None, &body).await, status, code).await;
        assert_eq!(error["param"], param, "{error}");
    }
    assert_eq!(world.client.get(world.url("/v1/auth/nonce")).send().await.unwrap().status(), 405);
    // After all of this the message is still good.
    assert_eq!(world.post_to("/v1/auth/login", None, &with(&text, &signature)).await.status(), 200);
}

async fn keys_are_made_listed_and_revoked(column: Column) {
    let world = World::new(column).await;
    let wallet = Wallet::new();
    let session = wallet.sign_in(&world).await;
    let body = json!({ "name": "laptop", "days": 7, "scopes": ["chat"] });
    let made = json_of(world.post_to("/v1/keys", Some(&session.key), &body).await).await;
    let (key, jti) = (made["api_key"].as_str().unwrap(), made["jti"].as_str().unwrap());
    assert_eq!((&made["account"], &made["scopes"]), (&json!(wallet.account()), &json!(["chat"])));
    assert_eq!(made["expires_at"].as_i64().unwrap() - made["created_at"].as_i64().unwrap(), 7 * 86_400);
    assert_eq!(world.get("/v1/models", key).await.status(), 200);

    let list = json_of(world.get("/v1/keys", &session.key).await).await;
    let rows = list["data"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(
        (&rows[0]["jti"], &rows[0]["name"], &rows[0]["sign_in"]),
        (&json!(jti), &json!("laptop"), &json!(false))
    );
    assert_eq!((&rows[1]["jti"], &rows[1]["current"]), (&json!(session.jti), &json!(true)));
    assert!(!list.to_string().contains(key), "the key is shown once");

    let delete = async |jti: &str, key: &str| {
        world.client.delete(world.url(&format!("/v1/keys/{jti}"))).bearer_auth(key).send().await.unwrap()
    };
    assert_eq!(json_of(delete(jti, &session.key).await).await["revoked"], true);
    refused(world.get("/v1/models", key).await, 401, "revoked_api_key").await;
    assert_eq!(delete(jti, &session.key).await.status(), 200, "a repeat changes nothing");
    // Signing out.
    assert_eq!(delete(&session.jti, &session.key).await.status(), 200);
    refused(world.get("/v1/keys", &session.key).await, 401, "revoked_api_key").await;
    // Another sign-in sees neither.
    let again = wallet.sign_in(&world).await;
    let list = json_of(world.get("/v1/keys", &again.key).await).await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
}

async fn what_keys_may_not(column: Column) {
    let world = World::new(column).await;
    let (alice, bob) = (Wallet::new().sign_in(&world).await, Wallet::new().sign_in(&world).await);
    let delete = async |jti: &str, key: &str| {
        world.client.delete(world.url(&format!("/v1/keys/{jti}"))).bearer_auth(key).send().await.unwrap()
    };
    // Another's keys are as unknown as keys that never were.
    for jti in [bob.jti.as_str(), "nothing", "..", "%00", "' or 1=1 --"] {
        let response = delete(jti, &alice.key).await;
        assert_eq!(response.status(), 404, "{jti}");
    }
    assert_eq!(world.get("/v1/models", &bob.key).await.status(), 200);
    // A key cannot make, list or revoke others, whoever made it.
    let body = json!({ "name": "ci" });
    let made = json_of(world.post_to("/v1/keys", Some(&alice.key), &body).await).await;
    let (operators, operators_jti) = world.files.key("demo");
    for key in [made["api_key"].as_str().unwrap(), &operators] {
        refused(world.post_to("/v1/keys", Some(key), &body).await, 403, "insufficient_scope").await;
        refused(world.get("/v1/keys", key).await, 403, "insufficient_scope").await;
        refused(delete(&alice.jti, key).await, 403, "insufficient_scope").await;
    }
    // It may revoke itself, as one may that `infera keys` made.
    assert_eq!(delete(made["jti"].as_str().unwrap(), made["api_key"].as_str().unwrap()).await.status(), 200);
    assert_eq!(delete(&operators_jti, &operators).await.status(), 200);
    refused(world.get("/v1/models", &operators).await, 401, "revoked_api_key").await;
    for (body, code, param) in [
        (json!({}), "missing_required_parameter", "name"),
        (json!({ "name": "ci", "days": 366 }), "invalid_value", "days"),
        (json!({ "name": "ci", "scopes": ["keys"] }), "invalid_value", "scopes"),
        (json!({ "name": "ci", "account": "demo" }), "unknown_parameter", "account"),
    ] {
        let error = refused(world.post_to("/v1/keys", Some(&alice.key), &body).await, 400, code).await;
        assert_eq!(error["param"], param);
    }
}

async fn keys_have_limits(column: Column) {
    let world = World::with(column, |config| config.max_keys = 3).await;
    let session = Wallet::new().sign_in(&world).await;
    let body = json!({ "name": "ci" });
    let all = (0..8).map(|_| world.post_to("/v1/keys", Some(&session.key), &body));
    let mut made = Vec::new();
    for response in futures::future::join_all(all).await {
        match response.status().as_u16() {
            200 => made.push(json_of(response).await),
            _ => drop(refused(response, 409, "too_many_keys").await),
        }
    }
    assert_eq!(made.len(), 3, "whatever happens at the same time");
    let jti = made[0]["jti"].as_str().unwrap();
    let revoke = world.client.delete(world.url(&format!("/v1/keys/{jti}"))).bearer_auth(&session.key);
    assert_eq!(revoke.send().await.unwrap().status(), 200);
    assert_eq!(world.post_to("/v1/keys", Some(&session.key), &body).await.status(), 200);
    // So many a minute; a second window may begin meanwhile.
    let mut limited = None;
    for _ in 0..22 {
        let response = world.post_to("/v1/keys", Some(&session.key), &body).await;
        if response.status() == 429 {
            limited = Some(response);
            break;
        }
    }
    let limited = limited.expect("making keys is limited");
    assert!(limited.headers().contains_key("retry-after"));
}

async fn the_oldest_sign_in_gives_way(column: Column) {
    let world = World::new(column).await;
    let wallet = Wallet::new();
    let first = wallet.sign_in(&world).await;
    let second = wallet.sign_in(&world).await;
    for _ in 1..keys::MAX_SESSIONS {
        wallet.sign_in(&world).await;
    }
    refused(world.get("/v1/keys", &first.key).await, 401, "revoked_api_key").await;
    let list = json_of(world.get("/v1/keys", &second.key).await).await;
    assert_eq!(list["data"].as_array().unwrap().len() as u64, keys::MAX_SESSIONS);
}

async fn addresses_have_limits(column: Column) {
    let world = World::with(column, |config| {
        config.sign_ins_per_minute = 3;
        config.trust_forwarded_for = true;
    })
    .await;
    let [a, b] = [rand::random::<u32>(), rand::random::<u32>()]
        .map(|bits| std::net::Ipv6Addr::from(u128::from(bits) << 64).to_string());
    for path in ["/v1/auth/nonce", "/v1/auth/login"] {
        let post = async |from: &str| {
            let request = world.client.post(world.url(path)).header("x-forwarded-for", from).body("{}");
            request.send().await.unwrap()
        };
        let mut limited = None;
        for _ in 0..7 {
            let response = post(&format!("10.0.0.1, {a}")).await;
            if response.status() == 429 {
                limited = Some(response);
                break;
            }
        }
        let limited = limited.expect("an address is limited");
        let wait: u64 = limited.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait));
        refused(limited, 429, "rate_limit_exceeded").await;
        assert_ne!(post(&b).await.status(), 429, "another address has its own counter");
    }
}

async fn no_sign_in_without_a_signing_key(column: Column) {
    let world = World::with(column, |config| config.signing_key_path = "".into()).await;
    for path in ["/v1/auth/nonce", "/v1/auth/login"] {
        let error = refused(world.post_to(path, None, &json!({})).await, 404, "sign_in_disabled").await;
        assert!(error["message"].as_str().unwrap().contains("signing_key_path"), "{error}");
    }
    assert_eq!(world.get("/v1/models", &world.key).await.status(), 200);

    // A key whose signatures nobody would accept is found at the start.
    let strange = world.files.dir.path().join("strange.pem");
    Signer::load_or_create(&strange).unwrap();
    for (path, says) in [(strange, "jwks.json"), (world.files.dir.path().join("none.pem"), "none.pem")] {
        let mut config = world.config.clone();
        config.signing_key_path = path;
        let deps = infera_gateway::Deps {
            bus: world.net.bus.clone(),
            kv: infera_runtime::kv::Kv::memory(),
            bound: None,
        };
        let error = std::thread::spawn(move || {
            let run = infera_gateway::run(config, deps, infera_runtime::CancellationToken::new());
            actix_rt::System::new().block_on(run).unwrap_err().to_string()
        });
        let error = tokio::task::spawn_blocking(move || error.join().unwrap()).await.unwrap();
        assert!(error.contains(says), "{error}");
    }
}

async fn expired_keys_are_forgotten(column: Column) {
    // Without a gateway, which would forget them as well.
    let files = Files::new();
    let common = files.config(column, &unique("gateway")).common;
    let db = db::connect(common.database_url.expose(), common.database_schema.as_deref()).await.unwrap();
    db::migrate::<infera_gateway::Migrator>(&db).await.unwrap();
    let now = clock::now_ms();
    let claims = |secs| Claims::new("0xdead", keys::AUDIENCE, &["chat"], secs);
    let (old, young) = (claims(-2 * 86_400), claims(60));
    for claims in [&old, &young] {
        let new = keys::NewKey { claims, name: "ci", session: false };
        assert_eq!(keys::add(&db, &new, 5).await.unwrap(), keys::Added::Stored);
        keys::revoke(&db, &claims.jti).await.unwrap();
    }
    keys::revoke(&db, "made by infera keys").await.unwrap();
    assert_eq!(keys::prune(&db, now).await.unwrap(), 1);
    let revoked: Vec<String> = keys::revoked(&db).await.unwrap().into_iter().map(|(jti, _)| jti).collect();
    assert!(!revoked.contains(&old.jti) && revoked.contains(&young.jti), "{revoked:?}");
    assert!(revoked.contains(&"made by infera keys".to_owned()));
    assert!(!keys::is_of(&db, "0xdead", &old.jti).await.unwrap());
    assert!(keys::is_of(&db, "0xdead", &young.jti).await.unwrap());
}

/// What a browser does before and after a page asks: fetch's CORS protocol.
async fn pages_of_listed_origins_may_ask(column: Column) {
    let page = "https://app.example.org";
    let world = World::with(column, |config| config.sign_in_origins = vec![page.to_owned()]).await;
    let ask = async |method: &str, path: &str, origin: &str| {
        let method: reqwest::Method = method.parse().unwrap();
        let request = world.client.request(method, world.url(path)).header("origin", origin);
        request.header("access-control-request-method", "POST").body("no json").send().await.unwrap()
    };
    for path in [
        "/v1/auth/nonce",
        "/v1/auth/login",
        "/v1/keys",
        "/v1/keys/x",
        "/v1/balance",
        "/v1/usage",
        "/v1/statement",
        "/v1/vouchers",
        "/v1/receipts/x",
    ] {
        let first = ask("OPTIONS", path, page).await;
        assert_eq!(first.status(), 204, "{path}");
        let headers = first.headers();
        assert_eq!(headers["access-control-allow-origin"], page, "{path}");
        assert_eq!(headers["access-control-allow-headers"], "authorization, content-type");
        assert_eq!(headers["access-control-allow-methods"], "GET, POST, DELETE");
        for origin in ["https://evil.example.org", "http://gateway.test", "null"] {
            let refused = ask("OPTIONS", path, origin).await;
            assert_eq!(refused.status(), 403, "{path}");
            assert!(!refused.headers().contains_key("access-control-allow-origin"), "{path}");
            let refused = json_of(refused).await;
            assert!(refused.to_string().contains("sign_in_origins"), "{refused}");
        }
        // An error is the page's to read as well; it needs no sign-in to be refused.
        let method = if path.contains("auth") { "POST" } else { "GET" };
        let refused = ask(method, path, page).await;
        assert!(refused.status().is_client_error(), "{path}");
        assert_eq!(refused.headers()["access-control-allow-origin"], page, "{path}");
        assert_eq!(refused.headers()["vary"], "origin");
    }
    let nonce = world.client.post(world.url("/v1/auth/nonce")).header("origin", page).body("{}");
    let nonce = nonce.send().await.unwrap();
    assert_eq!(
        (nonce.status().as_u16(), &nonce.headers()["access-control-allow-origin"]),
        (200, &page.parse().unwrap())
    );
    for origin in ["https://evil.example.org", "https://app.example.org.evil.example"] {
        let nonce = world.client.post(world.url("/v1/auth/nonce")).header("origin", origin).body("{}");
        let nonce = nonce.send().await.unwrap();
        assert!(!nonce.headers().contains_key("access-control-allow-origin"), "{origin}");
    }
    let elsewhere = ask("OPTIONS", "/v1/chat/completions", page).await;
    assert!(!elsewhere.headers().contains_key("access-control-allow-origin"));
    // Where nobody can sign in no page may ask.
    let world = World::with(column, |config| {
        config.sign_in_origins = vec![page.to_owned()];
        config.signing_key_path = "".into();
    })
    .await;
    let first =
        world.client.request(reqwest::Method::OPTIONS, world.url("/v1/balance")).header("origin", page);
    let first = first.header("access-control-request-method", "GET").send().await.unwrap();
    assert_eq!(first.status(), 403);
    assert!(!first.headers().contains_key("access-control-allow-origin"));
}
