//! HTTP as every service speaks it: one server, one error body, one span and one id per request.
//!
//! ```text
//! http::serve(|config| { config.configure(health::routes(health.clone())) ... }, bind, token, bound)
//!    └─ every request: x-request-id, traceparent -> root span "POST /v1/chat/completions", metrics
//!    └─ every error:   {"error": {"message", "type", "param", "code"}}
//! ```

mod error;
mod request;
mod server;

pub use error::{ApiError, defaults, json_config, payload_config};
pub use request::{HttpMetrics, REQUEST_ID, RequestId, request_id};
pub use server::{HttpError, app, serve};
