//! OpenAI's error body, whatever went wrong.

use std::fmt;

use actix_web::error::{JsonPayloadError, PayloadError, QueryPayloadError};
use actix_web::http::StatusCode;
use actix_web::http::header::RETRY_AFTER;
use actix_web::web::{self, JsonConfig, PayloadConfig, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, ResponseError};

/// An error as a client sees it: `{"error":{"message","type","param","code"}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// OpenAI's `type`, as `invalid_request_error`.
    pub kind: &'static str,
    /// Machine-readable reason, as `model_not_found`.
    pub code: Option<String>,
    /// One sentence for people, with a remedy.
    pub message: String,
    /// The field of the request that is wrong, as `messages[0].role`.
    pub param: Option<String>,
    /// Seconds after which a repeat makes sense; sent as `retry-after`.
    pub retry_after_secs: Option<u64>,
}

impl ApiError {
    /// Any status; the constructors below are the usual ones.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, message: message.into(), param: None, retry_after_secs: None }
    }

    /// 400: `param` (or `None`) is wrong; the message says what it must be.
    pub fn bad_request<'a>(param: impl Into<Option<&'a str>>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { param: param.into().map(str::to_owned), ..error }
    }

    /// 401 with a code, as `invalid_api_key`.
    pub fn unauthorized(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message).with_code(code)
    }

    /// 403.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message).with_code("forbidden")
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message).with_code("not_found")
    }

    /// 413: more than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than the limit of {limit} bytes; send less");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
            .with_code("request_too_large")
    }

    /// 429: too many requests for now.
    pub fn rate_limited(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).with_code("rate_limit_exceeded")
    }

    /// 429: the account has nothing left; OpenAI's clients know this code.
    pub fn insufficient_quota(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota", message)
            .with_code("insufficient_quota")
    }

    /// 503: a dependency is away; a repeat may succeed.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "api_error", message).with_code("service_unavailable")
    }

    /// 500: `cause` goes to the log only, the client learns no more than that it was our fault.
    pub fn internal(cause: impl fmt::Display) -> Self {
        tracing::error!(%cause, "request failed");
        let message = "something failed on our side; try again, and quote the x-request-id if it stays";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "api_error", message).with_code("internal_error")
    }

    /// Sets the machine-readable reason.
    #[must_use]
    pub fn with_code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    /// Names the field that is wrong.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says after how many seconds a repeat makes sense.
    #[must_use]
    pub fn retry_after(mut self, secs: u64) -> Self {
        self.retry_after_secs = Some(secs);
        self
    }

    /// The body, also for an error inside a stream.
    pub fn body(&self) -> serde_json::Value {
        serde_json::json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }

    /// What a response says that has only a status: an unknown path, a wrong method.
    pub(super) fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::NOT_FOUND => {
                Self::not_found("there is nothing at this path").with_code("unknown_url")
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                Self::new(status, "invalid_request_error", "this path does not take this method")
                    .with_code("method_not_allowed")
            }
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(
                status,
                "invalid_request_error",
                "the body is larger than this path takes; send less",
            )
            .with_code("request_too_large"),
            _ if status.is_client_error() => {
                let reason = status.canonical_reason().unwrap_or("refused").to_lowercase();
                Self::new(status, "invalid_request_error", format!("the request cannot be read: {reason}"))
            }
            _ => Self::new(status, "api_error", "something failed on our side; try again"),
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.as_u16(), self.message)?;
        match &self.param {
            Some(param) => write!(f, " ({param})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        if let Some(secs) = self.retry_after_secs {
            response.insert_header((RETRY_AFTER, secs));
        }
        response.json(self.body())
    }
}

/// Limits JSON bodies to `limit` bytes and turns their errors into [`ApiError`]. Any content type is
/// read as JSON, as OpenAI's API does.
pub fn json_config(limit: usize) -> JsonConfig {
    JsonConfig::default()
        .limit(limit)
        .content_type_required(false)
        .content_type(|_| true)
        .error_handler(move |error, _: &HttpRequest| json_error(&error, limit).into())
}

/// Limits raw bodies (`web::Bytes`, `String`) to `limit` bytes. actix makes their errors itself; the
/// [`request_id`](super::request_id) middleware gives them our body.
pub fn payload_config(limit: usize) -> PayloadConfig {
    PayloadConfig::new(limit)
}

/// [`json_config`] and [`payload_config`] with `limit`, and the same error body for query strings,
/// path segments and unknown paths.
pub fn defaults(limit: usize) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .app_data(json_config(limit))
            .app_data(payload_config(limit))
            .app_data(web::QueryConfig::default().error_handler(|error, _| {
                let QueryPayloadError::Deserialize(error) = error else {
                    return ApiError::bad_request(None, "the query string cannot be read").into();
                };
                ApiError::bad_request(None, format!("the query string cannot be read: {error}")).into()
            }))
            .app_data(web::PathConfig::default().error_handler(|error, _| {
                ApiError::bad_request(None, format!("the path cannot be read: {error}")).into()
            }));
    }
}

fn json_error(error: &JsonPayloadError, limit: usize) -> ApiError {
    match error {
        JsonPayloadError::OverflowKnownLength { .. }
        | JsonPayloadError::Overflow { .. }
        | JsonPayloadError::Payload(PayloadError::Overflow) => ApiError::too_large(limit),
        JsonPayloadError::Deserialize(error) => {
            ApiError::bad_request(None, format!("the body is not the JSON that is expected: {error}"))
                .with_code("invalid_json")
        }
        other => ApiError::bad_request(None, format!("the body cannot be read: {other}")),
    }
}
