//! `POST /v1/auth/nonce` and `POST /v1/auth/login`: a wallet's signature buys an API key (ERC-4361).

use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::web::{Data, Payload};
use actix_web::{HttpRequest, HttpResponse};
use infera_protocol::rfc3339;
use infera_protocol::siwe::{Expected, Message, SiweError, VERSION};
use infera_runtime::clock;
use infera_runtime::http::ApiError;
use infera_runtime::jwt::Claims;
use serde_json::json;

use super::{body, client};
use crate::app::App;
use crate::domain::Refusal;
use crate::domain::account::{LoginBody, NonceBody};
use crate::error::database;
use crate::keys::{self, Added, NewKey, SESSION_SCOPES};
use crate::sign_in::{self, SignIn};

/// Largest body, bytes: a message has at most 4 KiB, and JSON may double it.
pub(super) const MAX_SMALL_BODY: usize = 16 * 1024;
/// What the message says to people.
const STATEMENT: &str =
    "Sign in to Infera. This gives out an API key for the account of this wallet and moves no money.";
/// The name of a sign-in in the list of keys.
const SESSION_NAME: &str = "sign-in";

pub(super) async fn nonce(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let sign_in = enabled(&app)?;
    limit(&app, &request, "nonces").await?;
    let asked = NonceBody::parse(&body::read(&request, payload, MAX_SMALL_BODY).await?)?;
    let life = Duration::from_secs(app.config.nonce_secs);
    let nonce = sign_in::nonce(&app.kv, life).await.map_err(client::key_value)?;
    let now_ms = clock::now_ms();
    let until_ms = now_ms.saturating_add(i64::try_from(life.as_millis()).unwrap_or(0));
    let Some(origin) = sign_in.origins.first() else {
        return Err(ApiError::internal("a gateway without an address of its own"));
    };
    let message = asked.address.map(|address| Message {
        scheme: None,
        domain: origin.domain().to_owned(),
        address,
        statement: Some(STATEMENT.to_owned()),
        uri: origin.to_string(),
        chain_id: sign_in.chain_id,
        nonce: nonce.clone(),
        issued_at_ms: now_ms,
        expiration_ms: Some(until_ms),
        not_before_ms: None,
        request_id: None,
        resources: Vec::new(),
    });
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(json!({
        "object": "sign_in.nonce",
        "nonce": nonce,
        "expires_at": until_ms / 1000,
        "domain": origin.domain(),
        "uri": origin.to_string(),
        "version": VERSION,
        "chain_id": sign_in.chain_id,
        "statement": STATEMENT,
        "issued_at": rfc3339::format_ms(now_ms),
        "expiration_time": rfc3339::format_ms(until_ms),
        "message": message.map(|message| message.to_string()),
    })))
}

pub(super) async fn login(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let outcome = signed_in(&app, &request, payload).await;
    let name = match &outcome {
        Ok(_) => "signed_in",
        Err(error) if error.status == StatusCode::TOO_MANY_REQUESTS => "limited",
        Err(error) if error.status.is_server_error() => "failed",
        Err(_) => "refused",
    };
    app.metrics.sign_in(name);
    outcome
}

async fn signed_in(app: &App, request: &HttpRequest, payload: Payload) -> Result<HttpResponse, ApiError> {
    let sign_in = enabled(app)?;
    limit(app, request, "logins").await?;
    let body = LoginBody::parse(&body::read(request, payload, MAX_SMALL_BODY).await?)?;
    let life = Duration::from_secs(app.config.nonce_secs);
    check(app, sign_in, &body)?;
    // Last: who cannot sign cannot use up another's nonce.
    if !sign_in::take(&app.kv, &body.message.nonce, life).await.map_err(client::key_value)? {
        let message = "the message's Nonce was not given out here, was used, or has expired; ask for a new one and sign again";
        return Err(ApiError::unauthorized("invalid_nonce", message).with_param("message"));
    }
    let account = body.message.address.to_string();
    let secs = i64::try_from(app.config.session_hours.saturating_mul(3_600)).unwrap_or(i64::MAX);
    let claims = Claims::new(account, keys::AUDIENCE, &SESSION_SCOPES, secs);
    let api_key = sign_in.key(&claims).map_err(ApiError::internal)?;
    let new = NewKey { claims: &claims, name: SESSION_NAME, session: true };
    match keys::add(&app.db, &new, app.config.max_keys).await.map_err(database)? {
        Added::Stored => {}
        Added::Full => return Err(ApiError::internal("a sign-in was counted as a key")),
    }
    tracing::info!(account = claims.sub, jti = claims.jti, "a wallet signed in");
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(json!({
        "object": "sign_in",
        "api_key": api_key,
        "account": claims.sub,
        "jti": claims.jti,
        "scopes": claims.scope,
        "expires_at": claims.exp,
    })))
}

/// Whether the message is for this gateway, now, and signed by its address.
fn check(app: &App, sign_in: &SignIn, body: &LoginBody) -> Result<(), ApiError> {
    let expected = Expected {
        origins: &sign_in.origins,
        chain_id: sign_in.chain_id,
        now_ms: clock::now_ms(),
        max_age_ms: i64::try_from(app.config.nonce_secs.saturating_mul(1_000)).unwrap_or(i64::MAX),
    };
    body.message.check(&expected).map_err(unauthorized)?;
    body.message.check_signature(&body.text, &body.signature).map_err(unauthorized)
}

/// Well-formed, and not good enough: 401 rather than 400.
fn unauthorized(error: SiweError) -> ApiError {
    let refusal = ApiError::from(Refusal::from(error));
    ApiError { status: StatusCode::UNAUTHORIZED, ..refusal }
}

pub(super) fn enabled(app: &App) -> Result<&SignIn, ApiError> {
    app.sign_in.as_ref().ok_or_else(|| {
        let message = "wallets cannot sign in at this gateway (`signing_key_path` is not set); \
                       ask its operator for an api key";
        ApiError::not_found(message).with_code("sign_in_disabled")
    })
}

async fn limit(app: &App, request: &HttpRequest, what: &str) -> Result<(), ApiError> {
    client::limit(app, what, &client::address(app, request), app.config.sign_ins_per_minute).await
}
