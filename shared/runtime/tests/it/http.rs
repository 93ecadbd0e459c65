use std::net::SocketAddr;
use std::sync::Arc;

use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpResponse, Responder};
use infera_runtime::CancellationToken;
use infera_runtime::health::{self, Health};
use infera_runtime::http::{self, ApiError, HttpError, RequestId};
use infera_testkit::eventually;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use crate::DEADLINE;

const LIMIT: usize = 1024 * 1024;

#[derive(Serialize, Deserialize)]
struct Echo {
    text: String,
}

/// A handler that says when it has begun and ends when it is told to.
#[derive(Default)]
struct Slow {
    begun: Notify,
    end: Notify,
}

struct Server {
    url: String,
    health: Health,
    slow: Arc<Slow>,
    token: CancellationToken,
    running: JoinHandle<Result<(), HttpError>>,
}

async fn slow(slow: web::Data<Slow>) -> impl Responder {
    slow.begun.notify_one();
    slow.end.notified().await;
    "done"
}

fn routes(config: &mut ServiceConfig) {
    config
        .configure(http::defaults(LIMIT))
        .route("/echo", web::post().to(async |body: web::Json<Echo>| web::Json(body.into_inner())))
        .route("/bytes", web::post().to(async |body: web::Bytes| format!("{}", body.len())))
        .route("/items/{n}", web::get().to(async |n: web::Path<u32>| n.to_string()))
        .route("/query", web::get().to(async |echo: web::Query<Echo>| echo.into_inner().text))
        .route("/id", web::get().to(async |id: RequestId| id.0))
        .route("/quota", web::get().to(async || ApiError::rate_limited("too fast").retry_after(7).error()))
        .route(
            "/field",
            web::get().to(async || ApiError::bad_request("messages[0].role", "must be text").error()),
        )
        .route("/boom", web::get().to(async || ApiError::internal("password hunter2").error()))
        .route("/slow", web::get().to(slow));
}

trait AsResult {
    fn error(self) -> Result<HttpResponse, ApiError>;
}

impl AsResult for ApiError {
    fn error(self) -> Result<HttpResponse, ApiError> {
        Err(self)
    }
}

impl Server {
    async fn start() -> Self {
        let (health, slow, token) =
            (Health::new("fixture"), Arc::new(Slow::default()), CancellationToken::new());
        let (bound, address) = oneshot::channel();
        let factory = {
            let (health, slow) = (health.clone(), slow.clone());
            move |config: &mut ServiceConfig| {
                let data = web::Data::from(slow.clone());
                config.configure(health::routes(health.clone())).app_data(data).configure(routes);
            }
        };
        let stop = token.clone();
        let running =
            actix_web::rt::spawn(async move { http::serve(factory, "127.0.0.1:0", stop, Some(bound)).await });
        let address: SocketAddr = address.await.unwrap();
        Self { url: format!("http://{address}"), health, slow, token, running }
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::get(format!("{}{path}", self.url)).await.unwrap()
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::Response {
        reqwest::Client::new().post(format!("{}{path}", self.url)).body(body).send().await.unwrap()
    }
}

/// Asserts the status and OpenAI's body, and returns the inner object.
async fn error_of(answer: reqwest::Response, status: u16) -> Value {
    assert_eq!(answer.status().as_u16(), status);
    assert!(answer.headers().contains_key("x-request-id"));
    assert_eq!(answer.headers()["content-type"], "application/json");
    let body: Value = answer.json().await.unwrap();
    let error = &body["error"];
    assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
    assert!(error["type"].is_string(), "{body}");
    for name in ["param", "code"] {
        assert!(error.as_object().unwrap().contains_key(name), "{body}");
    }
    error.clone()
}

#[actix_web::test]
async fn every_error_has_the_same_body() {
    let server = Server::start().await;
    assert_eq!(server.post("/echo", r#"{"text":"hi"}"#).await.text().await.unwrap(), r#"{"text":"hi"}"#);

    let error = error_of(server.post("/echo", r#"{"text":"#).await, 400).await;
    assert_eq!(error["code"], "invalid_json");
    let error = error_of(server.post("/echo", r#"{"txt":"hi"}"#).await, 400).await;
    assert!(error["message"].as_str().unwrap().contains("text"), "it names the field: {error}");
    error_of(server.post("/echo", vec![0xff; 10]).await, 400).await;

    assert_eq!(error_of(server.get("/nowhere").await, 404).await["code"], "unknown_url");
    assert_eq!(error_of(server.get("/echo").await, 405).await["code"], "method_not_allowed");
    error_of(server.get("/items/many").await, 400).await;
    error_of(server.get("/query?txt=1").await, 400).await;

    assert_eq!(error_of(server.get("/field").await, 400).await["param"], "messages[0].role");
    let answer = server.get("/quota").await;
    assert_eq!(answer.headers()["retry-after"], "7");
    assert_eq!(error_of(answer, 429).await["code"], "rate_limit_exceeded");
    let error = error_of(server.get("/boom").await, 500).await;
    assert!(!error.to_string().contains("hunter2"), "causes are not for clients: {error}");
}

#[actix_web::test]
async fn twenty_mebibytes_are_refused_with_a_body() {
    let server = Server::start().await;
    for path in ["/echo", "/bytes"] {
        let error = error_of(server.post(path, vec![b' '; 20 * LIMIT]).await, 413).await;
        assert_eq!(error["code"], "request_too_large", "{path}");
    }
    // Without a length, in chunks.
    let chunks = futures::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>(vec![b' '; LIMIT])));
    error_of(server.post("/echo", reqwest::Body::wrap_stream(chunks)).await, 413).await;
    assert_eq!(server.get("/livez").await.status(), 200);
}

#[actix_web::test]
async fn requests_have_an_id() {
    let server = Server::start().await;
    let ask = async |id: &str| {
        let answer = reqwest::Client::new()
            .get(format!("{}/id", server.url))
            .header("x-request-id", id)
            .send()
            .await
            .unwrap();
        let header = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(answer.text().await.unwrap(), header, "the handler sees the same id");
        header
    };
    assert_eq!(ask("client-7.a:b_c").await, "client-7.a:b_c");
    for bad in ["", "a b", "<script>", &"x".repeat(129)] {
        let id = ask(bad).await;
        assert_eq!(id.len(), 36, "a fresh UUID: {id}");
    }
    assert_ne!(ask("").await, ask("").await);
}

#[actix_web::test]
async fn readiness_names_what_fails() {
    let server = Server::start().await;
    let readyz = async || {
        let answer = server.get("/readyz").await;
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    assert_eq!(readyz().await.0, 200);
    let (bus, db) = (server.health.check("bus"), server.health.check("database"));
    assert_eq!(readyz().await.0, 503, "not up until it is said");
    db.up();
    bus.down("connection refused");
    let (status, body) = readyz().await;
    assert_eq!((status, &body["status"]), (503, &Value::from("failing")));
    assert_eq!(body["failing"], serde_json::json!(["bus"]));
    assert_eq!(body["checks"], serde_json::json!({ "bus": "connection refused", "database": "up" }));
    bus.up();
    assert_eq!(
        readyz().await,
        (
            200,
            serde_json::json!({
                "service": "fixture", "status": "ready", "checks": { "bus": "up", "database": "up" }, "failing": [],
            })
        )
    );
    server.health.set_draining();
    let (status, body) = readyz().await;
    assert_eq!((status, &body["status"]), (503, &Value::from("draining")));
    assert_eq!(server.get("/livez").await.status(), 200, "it still lives");
}

#[actix_web::test]
async fn requests_are_counted_under_bounded_labels() {
    let server = Server::start().await;
    let counter = server.health.counters("fixture_total", "things", &["kind"]).unwrap();
    counter.with_label_values(&["a"]).inc_by(2);
    assert!(server.health.counter("fixture_total", "again").is_err(), "a name is taken once");
    for n in 0..3 {
        server.get(&format!("/items/{n}")).await;
        server.get(&format!("/nowhere/{n}")).await;
    }
    let odd = reqwest::Method::from_bytes(b"BREW").unwrap();
    reqwest::Client::new().request(odd, format!("{}/id", server.url)).send().await.unwrap();
    let text = server.get("/metrics").await.text().await.unwrap();
    let count = |method: &str, route: &str, status: &str| {
        format!(
            "http_server_request_duration_seconds_count{{http_request_method=\"{method}\",\
             http_response_status_code=\"{status}\",http_route=\"{route}\"}}"
        )
    };
    assert!(text.contains(&format!("{} 3", count("GET", "/items/{n}", "200"))), "{text}");
    assert!(text.contains(&format!("{} 3", count("GET", "unmatched", "404"))), "{text}");
    assert!(text.contains(&count("_OTHER", "/id", "405")), "{text}");
    assert!(text.contains("fixture_total{kind=\"a\"} 2"), "{text}");
    assert!(text.contains("http_server_active_requests 1"), "this one: {text}");
}

#[actix_web::test]
async fn a_cancelled_server_answers_what_it_has_begun() {
    let server = Server::start().await;
    let url = server.url.clone();
    let answer = tokio::spawn(reqwest::get(format!("{url}/slow")));
    server.slow.begun.notified().await;
    server.token.cancel();
    eventually(DEADLINE, async || reqwest::get(format!("{url}/livez")).await.is_err()).await;
    server.slow.end.notify_one();
    assert_eq!(answer.await.unwrap().unwrap().text().await.unwrap(), "done");
    server.running.await.unwrap().unwrap();
}

#[actix_web::test]
async fn an_address_that_cannot_be_had_is_one_clear_sentence() {
    let server = Server::start().await;
    let taken = server.url.trim_start_matches("http://").to_owned();
    for (bind, names) in
        [(taken.as_str(), "already taken"), ("nonsense", "ADDRESS:PORT"), ("192.0.2.1:80", "cannot listen")]
    {
        let error = http::serve(routes, bind, CancellationToken::new(), None).await.unwrap_err().to_string();
        assert!(error.contains(names) && error.contains(bind) && error.contains("http_bind"), "{error}");
    }
}
