//! The one service that is called while a client waits: settlement, for what people ask about their money. Answers are
//! passed on as they come. Why this is right, and why nothing else does it: `docs/src/decisions/0017-accounts.md`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use actix_web::body::{BoxBody, SizedStream};
use actix_web::http::StatusCode;
use actix_web::http::header::{
    ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_TYPE, ETAG, HeaderName, HeaderValue,
    IF_NONE_MATCH, LAST_MODIFIED, LINK, RETRY_AFTER,
};
use actix_web::web::Bytes;
use actix_web::{HttpMessage, HttpRequest, HttpResponse, HttpResponseBuilder};
use futures::{Stream, StreamExt};
use infera_runtime::http::{ApiError, REQUEST_ID, RequestId};
use infera_runtime::trace;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tracing::{Instrument, Span, field::Empty};

use crate::config::Config;
use crate::error::Error;
use crate::metrics::Metrics;

/// How long settlement may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Seconds after which a client that found settlement away, or busy, should come back.
const RETRY_SECS: u64 = 5;
/// Parts of an answer that wait for the client.
const PIECES: usize = 2;
/// The least that a client reads, bytes a second over the whole answer.
const SLOWEST: u64 = 64 * 1024;
/// Longest query string, bytes.
const MAX_QUERY: usize = 2048;
const MIB: u64 = 1024 * 1024;

/// What goes along to settlement. Everything else stays here: cookies, proxies' notes, what belongs to the connection.
const REQUEST_HEADERS: [HeaderName; 4] = [AUTHORIZATION, ACCEPT, CONTENT_TYPE, IF_NONE_MATCH];
/// What comes back; `content-length` follows from the body.
const RESPONSE_HEADERS: [HeaderName; 7] =
    [CONTENT_TYPE, CONTENT_DISPOSITION, CACHE_CONTROL, ETAG, LAST_MODIFIED, LINK, RETRY_AFTER];

/// The settlement service.
pub(crate) struct Settlement {
    client: reqwest::Client,
    base: String,
    /// Without a byte for so long, it counts as away; a client that takes none for so long is cut.
    patience: Duration,
    max_bytes: u64,
    /// Answers that callers with an API key may have open.
    open: Arc<Semaphore>,
    /// Those of everybody else, who is many and must not keep accounts out.
    strangers: Arc<Semaphore>,
}

/// What is asked of settlement.
pub(crate) struct Ask<'a> {
    pub method: reqwest::Method,
    /// The route's pattern: a label.
    pub route: &'static str,
    /// What stands behind the base address, checked.
    pub path: String,
    pub client: &'a HttpRequest,
    pub body: Option<Bytes>,
}

impl Settlement {
    /// `None` where none is configured.
    ///
    /// # Errors
    /// [`Error::Settlement`].
    pub(crate) fn new(config: &Config) -> Result<Option<Self>, Error> {
        if config.settlement_url.is_empty() {
            return Ok(None);
        }
        let patience = Duration::from_secs(config.settlement_timeout_secs);
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .build()
            .map_err(Error::Settlement)?;
        Ok(Some(Self {
            client,
            base: config.settlement_url.trim_end_matches('/').to_owned(),
            patience,
            max_bytes: config.settlement_max_mib.saturating_mul(MIB),
            open: Arc::new(Semaphore::new(config.settlement_max_open)),
            strangers: Arc::new(Semaphore::new(config.settlement_max_open.div_ceil(2))),
        }))
    }

    /// Asks, and answers the client as settlement answers.
    ///
    /// # Errors
    /// 503 where settlement is away, slow or busy, 502 where it answers what cannot be passed on.
    pub(crate) async fn ask(&self, ask: Ask<'_>, metrics: &Metrics) -> Result<HttpResponse, ApiError> {
        let span = tracing::info_span!(
            "ask settlement",
            otel.name = format!("{} {}", ask.method, ask.route),
            otel.kind = "client",
            otel.status_code = Empty,
            http.request.method = ask.method.as_str(),
            http.response.status_code = Empty,
        );
        let route = ask.route;
        let answer = self.passed(ask, metrics).instrument(span.clone()).await;
        let outcome = match &answer {
            Ok(_) => "passed",
            Err((outcome, _)) => {
                span.record("otel.status_code", "ERROR");
                outcome
            }
        };
        metrics.forward(route, outcome);
        answer.map_err(|(_, error)| error)
    }

    async fn passed(
        &self,
        ask: Ask<'_>,
        metrics: &Metrics,
    ) -> Result<HttpResponse, (&'static str, ApiError)> {
        // A key that is sent was checked.
        let has_key = ask.client.headers().contains_key(AUTHORIZATION);
        let places = if has_key { &self.open } else { &self.strangers };
        let permit = places.clone().try_acquire_owned().map_err(|_| ("busy", busy()))?;
        let request = self.request(&ask).map_err(|error| ("refused", error))?;
        let sent = timeout(self.patience, request.send()).await;
        let response = match sent {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(("unavailable", away(&error.without_url()))),
            Err(_) => return Err(("unavailable", away(&"no answer in time"))),
        };
        let status = response.status();
        Span::current().record("http.response.status_code", status.as_u16());
        let content_type =
            response.headers().get(CONTENT_TYPE.as_str()).and_then(|value| value.to_str().ok());
        let json = content_type.is_some_and(|kind| kind.starts_with("application/json"));
        if status.is_informational() || status.is_redirection() && status.as_u16() != 304 {
            return Err(("unavailable", unexpected(&status)));
        }
        if status.is_server_error() && !json {
            return Err(("unavailable", away(&status)));
        }
        let length = response.content_length();
        if length.is_some_and(|length| length > self.max_bytes) {
            return Err(("too_large", too_large(self.max_bytes)));
        }
        let status =
            StatusCode::from_u16(status.as_u16()).map_err(|e| ("unavailable", ApiError::internal(e)))?;
        let mut answer = HttpResponse::build(status);
        copy_headers(&response, &mut answer);
        let cut = Cut { metrics: metrics.clone(), route: ask.route };
        let body = self.body(response, permit, cut);
        let body = match length {
            Some(length) => BoxBody::new(SizedStream::new(length, body)),
            None => BoxBody::new(actix_web::body::BodyStream::new(body)),
        };
        Ok(answer.body(body))
    }

    fn request(&self, ask: &Ask<'_>) -> Result<reqwest::RequestBuilder, ApiError> {
        let query = ask.client.query_string();
        if query.len() > MAX_QUERY {
            let message = format!("the query string may have {MAX_QUERY} bytes");
            return Err(ApiError::bad_request("query", message).with_code("invalid_value"));
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let url = format!("{}{}{mark}{query}", self.base, ask.path);
        let mut request = self.client.request(ask.method.clone(), url);
        for name in REQUEST_HEADERS {
            if let Some(value) = ask.client.headers().get(&name) {
                request = request.header(name.as_str(), value.as_bytes());
            }
        }
        if let Some(RequestId(id)) = ask.client.extensions().get::<RequestId>() {
            request = request.header(REQUEST_ID.as_str(), id);
        }
        if let Some(traceparent) = trace::current_traceparent() {
            request = request.header("traceparent", traceparent);
        }
        Ok(match ask.body.clone() {
            Some(body) => request.body(body),
            None => request,
        })
    }

    /// The bytes as they come. A stream that stops, or that is too long, ends with an error, which cuts the client's
    /// connection: half an answer must not look like a whole one. They are taken from settlement by a task of its own,
    /// so that a client that stops reading keeps neither `permit` nor settlement's connection.
    fn body(
        &self,
        response: reqwest::Response,
        permit: OwnedSemaphorePermit,
        cut: Cut,
    ) -> impl Stream<Item = Result<Bytes, io::Error>> + use<> {
        let (sender, receiver) = mpsc::channel(PIECES);
        let pump = Pump::new(sender, self.patience, self.max_bytes);
        tokio::spawn(async move {
            if let Err(reason) = pump.run(response.bytes_stream()).await {
                cut.count(&reason);
            }
            drop(permit);
        });
        futures::stream::unfold(Some(receiver), |receiver| async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Some(Piece::Bytes(bytes)) => Some((Ok(bytes), Some(receiver))),
                Some(Piece::End) => None,
                None => {
                    let error = io::Error::other("the answer of the settlement service broke off");
                    Some((Err(error), None))
                }
            }
        })
    }
}

/// A part of an answer on its way to the client. A channel that closes without an end was cut.
enum Piece {
    Bytes(Bytes),
    End,
}

/// Takes an answer from settlement as fast as the client takes it.
struct Pump {
    pieces: mpsc::Sender<Piece>,
    patience: Duration,
    /// Bytes that it may still have.
    left: u64,
    passed: u64,
    /// For the client, over the whole answer.
    waited: Duration,
}

impl Pump {
    fn new(pieces: mpsc::Sender<Piece>, patience: Duration, max_bytes: u64) -> Self {
        Self { pieces, patience, left: max_bytes, passed: 0, waited: Duration::ZERO }
    }

    /// To the end of the answer, or until the client leaves.
    ///
    /// # Errors
    /// Why it was cut.
    async fn run(mut self, bytes: impl Stream<Item = reqwest::Result<Bytes>>) -> Result<(), String> {
        let mut bytes = std::pin::pin!(bytes);
        loop {
            let next = tokio::select! {
                () = self.pieces.closed() => return Ok(()),
                next = timeout(self.patience, bytes.next()) => next,
            };
            let chunk = match next {
                Ok(None) => return self.pass(Piece::End).await.map(drop),
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return Err(error.without_url().to_string()),
                Err(_) => return Err("nothing came in time".to_owned()),
            };
            let length = chunk.len() as u64;
            self.left = self.left.checked_sub(length).ok_or("it is too large")?;
            if !self.pass(Piece::Bytes(chunk)).await? {
                return Ok(());
            }
            self.passed += length;
        }
    }

    /// False where nobody reads any more.
    async fn pass(&mut self, piece: Piece) -> Result<bool, String> {
        // One piece may take as long as the whole patience, all of them together only what a slow line takes besides.
        let line = Duration::from_millis(self.passed.saturating_mul(1_000) / SLOWEST);
        let left = (self.patience + line).saturating_sub(self.waited).min(self.patience);
        let since = Instant::now();
        let sent = timeout(left, self.pieces.send(piece)).await;
        self.waited += since.elapsed();
        sent.map(|sent| sent.is_ok()).map_err(|_| "the client does not read it, or too slowly".to_owned())
    }
}

/// Counts an answer that breaks off.
struct Cut {
    metrics: Metrics,
    route: &'static str,
}

impl Cut {
    fn count(&self, reason: &str) {
        tracing::warn!(reason, route = self.route, "an answer of settlement breaks off");
        self.metrics.forward(self.route, "cut");
    }
}

fn copy_headers(response: &reqwest::Response, answer: &mut HttpResponseBuilder) {
    for name in RESPONSE_HEADERS {
        for value in response.headers().get_all(name.as_str()) {
            if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
                answer.append_header((name.clone(), value));
            }
        }
    }
}

fn away(reason: &dyn std::fmt::Display) -> ApiError {
    tracing::warn!(%reason, "settlement does not answer");
    let message = "the settlement service does not answer; requests for answers go on, try this again";
    ApiError::unavailable(message).with_code("settlement_unavailable").retry_after(RETRY_SECS)
}

fn busy() -> ApiError {
    let message = "too many clients ask for accounts and receipts now; try again";
    ApiError::unavailable(message).with_code("overloaded").retry_after(RETRY_SECS)
}

fn unexpected(status: &dyn std::fmt::Display) -> ApiError {
    tracing::error!(%status, "settlement answers what is not passed on; is settlement_url right?");
    let message = "the settlement service answers something else than expected; tell the gateway's operator";
    ApiError::new(StatusCode::BAD_GATEWAY, "api_error", message).with_code("bad_gateway")
}

fn too_large(limit: u64) -> ApiError {
    let message = format!(
        "the answer is larger than {} MiB; ask for less, as with `from`, `to` or `limit`",
        limit / MIB
    );
    ApiError::new(StatusCode::BAD_GATEWAY, "api_error", message).with_code("answer_too_large")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_takes_an_answer_in_drops_is_cut() {
        let (sender, mut pieces) = mpsc::channel(PIECES);
        let pump = Pump::new(sender, Duration::from_millis(500), u64::MAX);
        // Each piece comes well before the patience ends; all of them are a minute at this pace.
        let answer = futures::stream::iter((0..3_000).map(|_| Ok(Bytes::from_static(&[b'x'; 1024]))));
        let sips = async {
            while pieces.recv().await.is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let (cut, ()) = tokio::join!(pump.run(answer), sips);
        assert!(cut.unwrap_err().contains("too slowly"));
    }
}
