//! What settlement answers, at the gateway's address: accounts, receipts, batches and what operators earned.

use actix_web::http::header::{AUTHORIZATION, CACHE_CONTROL, HeaderValue};
use actix_web::web::{Data, Path, Payload};
use actix_web::{HttpRequest, HttpResponse};
use infera_protocol::bytes::Address;
use infera_runtime::http::ApiError;
use reqwest::Method;
use uuid::Uuid;

use super::login::MAX_SMALL_BODY;
use super::{auth, body, client};
use crate::app::App;
use crate::settlement::{Ask, Settlement};

pub(super) async fn balance(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    of_account(&app, &request, "/v1/balance").await
}

pub(super) async fn usage(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    of_account(&app, &request, "/v1/usage").await
}

pub(super) async fn statement(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    of_account(&app, &request, "/v1/statement").await
}

pub(super) async fn voucher(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let settlement = enabled(&app)?;
    auth::account_caller(&app, &request).await?;
    let body = body::read(&request, payload, MAX_SMALL_BODY).await?;
    let route = "/v1/vouchers";
    let ask = Ask { method: Method::POST, route, path: route.to_owned(), client: &request, body: Some(body) };
    Ok(private(settlement.ask(ask, &app.metrics).await?))
}

/// Receipts are everybody's; a key that is sent must be good for it, because it brings the evidence.
pub(super) async fn receipt(
    app: Data<App>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let settlement = enabled(&app)?;
    let id = Uuid::parse_str(id.strip_prefix("chatcmpl-").unwrap_or(&id)).map_err(|_| {
        let message = "`id` must be a receipt's id, as `infera.receipt` of an answer";
        ApiError::bad_request("id", message).with_code("invalid_value")
    })?;
    if request.headers().contains_key(AUTHORIZATION) {
        auth::receipts_caller(&app, &request).await?;
    } else {
        stranger(&app, &request).await?;
    }
    let (route, path) = ("/v1/receipts/{id}", format!("/v1/receipts/{id}"));
    let ask = Ask { method: Method::GET, route, path, client: &request, body: None };
    Ok(private(settlement.ask(ask, &app.metrics).await?))
}

/// What holders decide is everybody's.
pub(super) async fn governance(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let route = "/v1/governance";
    of_all(&app, &request, route, route.to_owned()).await
}

/// What stands behind a root on the chain, for `infera verify --batches`.
pub(super) async fn batch(
    app: Data<App>,
    request: HttpRequest,
    sequence: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let path = format!("/v1/batches/{}", number(&sequence)?);
    of_all(&app, &request, "/v1/batches/{sequence}", path).await
}

pub(super) async fn batch_receipts(
    app: Data<App>,
    request: HttpRequest,
    sequence: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let path = format!("/v1/batches/{}/receipts", number(&sequence)?);
    of_all(&app, &request, "/v1/batches/{sequence}/receipts", path).await
}

pub(super) async fn batch_rewards(
    app: Data<App>,
    request: HttpRequest,
    sequence: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let path = format!("/v1/batches/{}/rewards", number(&sequence)?);
    of_all(&app, &request, "/v1/batches/{sequence}/rewards", path).await
}

/// What an operator earned, for `infera operator earnings` and `claim`.
pub(super) async fn operator(
    app: Data<App>,
    request: HttpRequest,
    operator: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let path = format!("/v1/operators/{}", address(&operator)?);
    of_all(&app, &request, "/v1/operators/{address}", path).await
}

pub(super) async fn operator_reward(
    app: Data<App>,
    request: HttpRequest,
    of: Path<(String, String)>,
) -> Result<HttpResponse, ApiError> {
    let path = format!("/v1/operators/{}/rewards/{}", address(&of.0)?, number(&of.1)?);
    of_all(&app, &request, "/v1/operators/{address}/rewards/{sequence}", path).await
}

fn number(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| {
        let message = "`sequence` must be a batch's number, from 1";
        ApiError::bad_request("sequence", message).with_code("invalid_value")
    })
}

fn address(text: &str) -> Result<Address, ApiError> {
    text.to_ascii_lowercase().parse().map_err(|_| {
        let message = "`address` must be an operator's address: 0x and 40 hex digits";
        ApiError::bad_request("address", message).with_code("invalid_value")
    })
}

/// What everybody may ask. A key that is sent must be good, and counts instead of the address.
async fn of_all(
    app: &App,
    request: &HttpRequest,
    route: &'static str,
    path: String,
) -> Result<HttpResponse, ApiError> {
    let settlement = enabled(app)?;
    if request.headers().contains_key(AUTHORIZATION) {
        auth::account_caller(app, request).await?;
    } else {
        stranger(app, request).await?;
    }
    let ask = Ask { method: Method::GET, route, path, client: request, body: None };
    settlement.ask(ask, &app.metrics).await
}

/// Who sends no key is counted by address.
async fn stranger(app: &App, request: &HttpRequest) -> Result<(), ApiError> {
    client::limit(app, "public", &client::address(app, request), app.config.public_per_minute).await
}

async fn of_account(app: &App, request: &HttpRequest, route: &'static str) -> Result<HttpResponse, ApiError> {
    let settlement = enabled(app)?;
    auth::account_caller(app, request).await?;
    let ask = Ask { method: Method::GET, route, path: route.to_owned(), client: request, body: None };
    Ok(private(settlement.ask(ask, &app.metrics).await?))
}

fn enabled(app: &App) -> Result<&Settlement, ApiError> {
    app.settlement.as_ref().ok_or_else(|| {
        let message = "accounts and receipts are not served at this gateway (`settlement_url` is not set); \
                       ask its operator where they are";
        ApiError::not_found(message).with_code("accounts_disabled")
    })
}

/// No cache on the way keeps what a key was needed for, unless settlement says otherwise.
fn private(mut answer: HttpResponse) -> HttpResponse {
    if !answer.headers().contains_key(CACHE_CONTROL) {
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    }
    answer
}
