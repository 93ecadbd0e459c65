//! Why the gateway does not run, and how what went wrong looks to a client.

use actix_web::http::StatusCode;
use infera_runtime::http::ApiError;
use sea_orm::DbErr;

use crate::domain::Refusal;
use crate::domain::outcome::Outcome;

/// Why the service cannot start or had to stop; one sentence each.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] infera_runtime::config::ConfigError),
    #[error(transparent)]
    Database(#[from] infera_runtime::db::DbError),
    #[error(transparent)]
    Bus(#[from] infera_bus::BusError),
    #[error(transparent)]
    Keys(#[from] infera_runtime::jwt::KeyError),
    #[error(transparent)]
    Http(#[from] infera_runtime::http::HttpError),
    #[error("the metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error(transparent)]
    Network(#[from] infera_runtime::network::NetworkError),
    #[error("{0}")]
    Models(String),
    #[error("{0}")]
    SigningKey(String),
    #[error("the client for the settlement service cannot be made: {0}")]
    Settlement(reqwest::Error),
    /// A task of the service ended although nobody asked it to; the process must be started again.
    #[error("{0} stopped unexpectedly: start the gateway again")]
    Stopped(&'static str),
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::bad_request(refusal.param.as_deref(), refusal.message).with_code(refusal.code)
    }
}

/// A database that does not answer: the client may try again.
pub(crate) fn database(error: DbErr) -> ApiError {
    tracing::error!(%error, "database failed");
    ApiError::unavailable("the gateway's database does not answer; try again").retry_after(2)
}

/// What a client gets for a request that closed without an answer; `None` for a verified one.
pub(crate) fn of_outcome(outcome: &Outcome) -> Option<ApiError> {
    match outcome {
        Outcome::Verified(_) => None,
        Outcome::Failed { code, reason } => Some(failed(code, reason)),
        Outcome::Rejected { code, message } => Some(rejected(code, message)),
    }
}

fn failed(code: &str, reason: &str) -> ApiError {
    let (status, message) = match code {
        "deadline" => (StatusCode::GATEWAY_TIMEOUT, "there was no verdict before the deadline"),
        "cancelled" => (closed_by_client(), "the request was cancelled"),
        "overloaded" => (StatusCode::SERVICE_UNAVAILABLE, "too many requests wait; try again later"),
        "no_nodes" => (StatusCode::SERVICE_UNAVAILABLE, "too few nodes serve this model now"),
        "no_quorum" => (StatusCode::BAD_GATEWAY, "the nodes' answers did not agree"),
        _ => (StatusCode::BAD_GATEWAY, "the request failed"),
    };
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    ApiError::new(status, "api_error", format!("{message}{reason}; nothing was charged")).with_code(code)
}

fn rejected(code: &str, message: &str) -> ApiError {
    match code {
        "insufficient_quota" => ApiError::insufficient_quota(message),
        "rate_limit_exceeded" => ApiError::rate_limited(message),
        "deadline" | "expired" => {
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "api_error", message).with_code(code)
        }
        "cancelled" => ApiError::new(closed_by_client(), "api_error", message).with_code(code),
        "overloaded" | "queue_full" | "account_queue_full" => ApiError::unavailable(message).with_code(code),
        "model_not_found" => ApiError::not_found(message).with_code(code).with_param("model"),
        _ => ApiError::bad_request(None, message).with_code(code),
    }
}

/// 499, as nginx says it: clients do not repeat it by themselves, as they would a 409.
fn closed_by_client() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ending_has_its_status() {
        let failed = |code: &str| Outcome::Failed { code: code.into(), reason: "r".into() };
        let rejected = |code: &str| Outcome::Rejected { code: code.into(), message: "m".into() };
        for (outcome, status) in [
            (failed("deadline"), 504),
            (failed("cancelled"), 499),
            (failed("no_nodes"), 503),
            (failed("overloaded"), 503),
            (failed("no_quorum"), 502),
            (failed("anything"), 502),
            (rejected("insufficient_quota"), 429),
            (rejected("rate_limit_exceeded"), 429),
            (rejected("overloaded"), 503),
            (rejected("anything"), 400),
        ] {
            let error = of_outcome(&outcome).unwrap();
            assert_eq!(error.status.as_u16(), status, "{outcome:?}");
            assert!(error.code.is_some(), "{outcome:?}");
        }
    }
}
