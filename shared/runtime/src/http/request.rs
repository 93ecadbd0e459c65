//! What happens around every request: its id, its span, its figures, and the body of bare errors.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Next;
use actix_web::web::Bytes;
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest, ResponseError, dev::Payload, web};
use prometheus::{HistogramOpts, HistogramVec, IntGauge, Registry};
use tracing::{Instrument, Span, field::Empty};
use uuid::Uuid;

use super::ApiError;
use crate::health::{Health, SECONDS};

/// The header that names a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client's own id is kept up to this length.
const MAX_REQUEST_ID: usize = 128;
/// The label of paths that no route matches: paths themselves are unbounded.
const UNMATCHED: &str = "unmatched";

/// The id of the request: the client's `x-request-id`, or a new UUIDv7. Also an extractor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestId(pub String);

impl RequestId {
    fn of(request: &ServiceRequest) -> Self {
        request
            .headers()
            .get(REQUEST_ID)
            .and_then(|value| value.to_str().ok())
            .filter(|id| !id.is_empty() && id.len() <= MAX_REQUEST_ID)
            // It goes into logs and into a header: plain characters only.
            .filter(|id| id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b)))
            .map_or_else(|| Self(Uuid::now_v7().to_string()), |id| Self(id.to_owned()))
    }
}

impl FromRequest for RequestId {
    type Error = Error;
    type Future = std::future::Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let id = request.extensions().get::<Self>().cloned();
        std::future::ready(
            id.ok_or_else(|| ApiError::internal("the request_id middleware is missing").into()),
        )
    }
}

/// OpenTelemetry's HTTP server metrics under Prometheus names.
pub struct HttpMetrics {
    duration: HistogramVec,
    active: IntGauge,
}

impl HttpMetrics {
    /// Adds `http_server_request_duration_seconds{http_request_method,http_route,http_response_status_code}`
    /// (its `_count` is the number of requests) and `http_server_active_requests` to `registry`.
    ///
    /// # Errors
    /// When the registry has them already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let opts = HistogramOpts::new(
            "http_server_request_duration_seconds",
            "Time from the head of a request to the head of its response.",
        );
        let labels = ["http_request_method", "http_route", "http_response_status_code"];
        let duration = HistogramVec::new(opts.buckets(SECONDS.to_vec()), &labels)?;
        let active = IntGauge::new("http_server_active_requests", "Requests that have no response yet.")?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(active.clone()))?;
        Ok(Self { duration, active })
    }
}

/// Counts a request as active until it is dropped, also when the client leaves.
struct Active(Option<IntGauge>);

impl Active {
    fn start(health: Option<&web::Data<Health>>) -> Self {
        let gauge = health.and_then(|health| health.http()).map(|http| http.active.clone());
        if let Some(gauge) = &gauge {
            gauge.inc();
        }
        Self(gauge)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some(gauge) = &self.0 {
            gauge.dec();
        }
    }
}

/// The middleware; `App::wrap(from_fn(request_id))`, which [`serve`](super::serve) does.
///
/// Accepts or creates `x-request-id` and returns it, opens one span per request named `METHOD route` whose
/// parent is the caller's `traceparent` (open until the last byte of the body), counts the request, and
/// gives errors without a JSON body ours.
///
/// # Errors
/// Those of other middlewares, with our body and the id; handlers' errors are responses already.
pub async fn request_id<B>(request: ServiceRequest, next: Next<B>) -> Result<ServiceResponse<BoxBody>, Error>
where
    B: MessageBody + 'static,
{
    let id = RequestId::of(&request);
    let method = method_label(request.method());
    let route = request.match_pattern().unwrap_or_else(|| UNMATCHED.to_owned());
    let health = request.app_data::<web::Data<Health>>().cloned();
    let span = root_span(&request, &id, method, &route);
    request.extensions_mut().insert(id.clone());

    let active = Active::start(health.as_ref());
    let started = Instant::now();
    // No clone of the request may be held here: the router needs it for itself.
    let mut result =
        next.call(request).instrument(span.clone()).await.map(ServiceResponse::map_into_boxed_body);
    if let Ok(response) = &mut result
        && is_wrong_method(response, &route)
    {
        *response.response_mut().status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    }
    drop(active);

    let status = match &result {
        Ok(response) => response.status(),
        Err(error) => error.as_response_error().status_code(),
    };
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
    if let Some(http) = health.as_ref().and_then(|health| health.http()) {
        http.duration
            .with_label_values(&[method, &route, status.as_str()])
            .observe(started.elapsed().as_secs_f64());
    }
    match result {
        Ok(response) => Ok(finish(response, &id, span)),
        Err(error) => Err(with_id(&error, &id)),
    }
}

/// An error that a middleware or a guard returned, with our body and the id.
fn with_id(error: &Error, id: &RequestId) -> Error {
    let status = error.as_response_error().status_code();
    let body = error.as_error::<ApiError>().cloned().unwrap_or_else(|| ApiError::of_status(status));
    let mut response = body.error_response();
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    InternalError::from_response(body, response).into()
}

fn root_span(request: &ServiceRequest, id: &RequestId, method: &str, route: &str) -> Span {
    let span = tracing::info_span!(
        parent: None,
        "http request",
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = method,
        http.route = route,
        http.response.status_code = Empty,
        request_id = id.0,
    );
    if let Some(parent) = request.headers().get("traceparent").and_then(|value| value.to_str().ok()) {
        crate::trace::set_parent(&span, parent);
    }
    span
}

/// Methods are a bounded set as labels, as OpenTelemetry asks.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}

fn finish(response: ServiceResponse<BoxBody>, id: &RequestId, span: Span) -> ServiceResponse<BoxBody> {
    let mut response = if is_bare_error(&response) { with_error_body(response) } else { response };
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response.map_body(|_, body| match body.size() {
        BodySize::Stream => BoxBody::new(SpanBody { body, span }),
        BodySize::None | BodySize::Sized(_) => body,
    })
}

/// True when a route has this path but not this method, which actix answers with a bare 404: the path is
/// then known, but nothing has consumed it.
fn is_wrong_method(response: &ServiceResponse<BoxBody>, route: &str) -> bool {
    response.status() == StatusCode::NOT_FOUND
        && route != UNMATCHED
        && is_bare_error(response)
        && !response.request().match_info().unprocessed().is_empty()
}

/// True for the errors that actix itself makes: no body, or one in plain text.
fn is_bare_error(response: &ServiceResponse<BoxBody>) -> bool {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    let bare = match response.headers().get("content-type").and_then(|value| value.to_str().ok()) {
        None => true,
        Some(kind) => kind.starts_with("text/plain"),
    };
    is_error && bare && response.response().body().size() != BodySize::Stream
}

fn with_error_body(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let (request, old) = response.into_parts();
    let status = old.status();
    let error = old.error().map(ToString::to_string);
    let mut body = ApiError::of_status(status);
    // A client may read why its own request was refused, not why we failed.
    if let (true, Some(reason)) = (status.is_client_error(), error) {
        body.message = format!("the request cannot be read: {reason}");
    }
    let mut fresh = body.error_response();
    for (name, value) in old.headers() {
        if name != "content-type" && name != "content-length" {
            fresh.headers_mut().append(name.clone(), value.clone());
        }
    }
    ServiceResponse::new(request, fresh)
}

/// A streamed body inside its request's span, so that the span ends with the stream.
struct SpanBody {
    body: BoxBody,
    span: Span,
}

impl MessageBody for SpanBody {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = &mut *self;
        let _entered = this.span.enter();
        Pin::new(&mut this.body).poll_next(cx)
    }
}
