//! Who asks: the API key in `Authorization: Bearer KEY`, and how often it may.

use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::http::header::AUTHORIZATION;
use infera_protocol::bytes::Address;
use infera_runtime::clock;
use infera_runtime::http::ApiError;
use infera_runtime::jwt::Claims;

use crate::app::App;
use crate::error::database;
use crate::keys::{self, AUDIENCE, MAX_ACCOUNT, SCOPE_CHAT, SCOPE_KEYS, SCOPE_RECEIPTS};

/// How one gets the scope that managing keys needs.
pub(super) const SIGN_IN: &str = "only the key of a sign-in has it: sign in with the account's wallet";

/// Checks the key: form, signature, time, revocation.
pub(crate) async fn caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let header = request.headers().get(AUTHORIZATION).ok_or_else(|| {
        ApiError::unauthorized("invalid_api_key", "there is no api key: send `Authorization: Bearer KEY`")
    })?;
    let token = header.to_str().ok().and_then(bearer).ok_or_else(|| {
        ApiError::unauthorized("invalid_api_key", "the header Authorization must be `Bearer KEY`")
    })?;
    let claims = app.verifier.verify(token, AUDIENCE)?;
    if claims.sub.is_empty() || claims.sub.len() > MAX_ACCOUNT {
        let message = format!("the api key's account must have 1 to {MAX_ACCOUNT} bytes");
        return Err(ApiError::unauthorized("invalid_api_key", message));
    }
    if keys::is_revoked(&app.db, &claims.jti).await.map_err(database)? {
        let message = "the api key was revoked; create a new one";
        return Err(ApiError::unauthorized("revoked_api_key", message));
    }
    Ok(claims)
}

/// [`caller`], with the scope that asking for answers, and taking that back, needs.
pub(crate) async fn scoped_caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let claims = caller(app, request).await?;
    need(&claims, SCOPE_CHAT, "create one that has it")?;
    Ok(claims)
}

/// [`caller`], with the scope that managing keys needs.
pub(crate) async fn keys_caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let claims = caller(app, request).await?;
    need(&claims, SCOPE_KEYS, SIGN_IN)?;
    Ok(claims)
}

/// [`caller`], with the quota that looking at an account needs.
pub(crate) async fn account_caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let claims = caller(app, request).await?;
    quota(app, &claims, 1).await?;
    Ok(claims)
}

/// [`account_caller`], with the scope that a receipt's evidence needs.
pub(crate) async fn receipts_caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let claims = account_caller(app, request).await?;
    need(&claims, SCOPE_RECEIPTS, "create one that has it, or ask without a key for the receipt alone")?;
    Ok(claims)
}

pub(super) fn need(claims: &Claims, scope: &str, remedy: &str) -> Result<(), ApiError> {
    if claims.allows(scope) {
        return Ok(());
    }
    let message = format!("the api key lacks the scope `{scope}`; {remedy}");
    Err(ApiError::forbidden(message).with_code("insufficient_scope"))
}

/// [`scoped_caller`], with the quota that asking for answers needs.
pub(crate) async fn chat_caller(app: &App, request: &HttpRequest) -> Result<Claims, ApiError> {
    let claims = scoped_caller(app, request).await?;
    quota(app, &claims, 1).await?;
    Ok(claims)
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// Counts requests in the current minute: one for each answer that is asked for. A wallet's account makes keys as it
/// likes, so they count together; other keys come from the operator, and each counts for itself.
pub(crate) async fn quota(app: &App, claims: &Claims, requests: u64) -> Result<(), ApiError> {
    let limit = app.config.requests_per_minute;
    if limit == 0 || requests == 0 {
        return Ok(());
    }
    let now = clock::now_secs();
    let wallet = claims.sub.parse::<Address>().is_ok();
    let (who, what) = if wallet { (&claims.sub, "account") } else { (&claims.jti, "api key") };
    let counter = format!("gateway.rpm.{who}.{}", now / 60);
    match app.kv.incr(&counter, requests, Duration::from_secs(90)).await {
        Ok(count) if count > limit => {
            let message = format!("this {what} may send {limit} requests a minute; wait for the next one");
            let wait = u64::try_from(60 - now.rem_euclid(60)).unwrap_or(60);
            Err(ApiError::rate_limited(message).retry_after(wait))
        }
        Ok(_) => Ok(()),
        Err(error) => {
            // Without its counters the gateway serves rather than refuses: money is checked elsewhere.
            tracing::warn!(%error, "quota is not counted");
            Ok(())
        }
    }
}
