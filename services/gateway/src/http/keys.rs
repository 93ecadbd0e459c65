//! `/v1/keys`: an account's API keys. What is kept of a key says what it is for; the key itself is shown once.

use actix_web::http::StatusCode;
use actix_web::web::{Data, Path, Payload};
use actix_web::{HttpRequest, HttpResponse};
use infera_runtime::clock;
use infera_runtime::http::ApiError;
use infera_runtime::jwt::Claims;
use serde_json::{Value, json};

use super::login::{MAX_SMALL_BODY, enabled};
use super::{auth, body, client};
use crate::app::App;
use crate::domain::account::KeyBody;
use crate::error::database;
use crate::keys::{self, Added, KEY_SCOPES, NewKey, SCOPE_KEYS};
use crate::store::api_key;

/// Keys that an account may make in a minute: made and revoked ones take room until they would have expired.
const CREATED_PER_MINUTE: u64 = 10;

pub(super) async fn list(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let claims = auth::keys_caller(&app, &request).await?;
    let rows = keys::live(&app.db, &claims.sub, clock::now_ms()).await.map_err(database)?;
    let data: Vec<Value> = rows.iter().map(|row| shown(row, &claims)).collect();
    Ok(HttpResponse::Ok().json(json!({ "object": "list", "data": data })))
}

pub(super) async fn create(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let claims = auth::keys_caller(&app, &request).await?;
    let sign_in = enabled(&app)?;
    client::limit(&app, "keys", &claims.sub, CREATED_PER_MINUTE).await?;
    let max_days = u32::try_from(app.config.max_key_days).unwrap_or(u32::MAX);
    let body = body::read(&request, payload, MAX_SMALL_BODY).await?;
    let wanted = KeyBody::parse(&body, &KEY_SCOPES, max_days)?;
    let new = Claims::new(claims.sub, keys::AUDIENCE, &wanted.scopes, i64::from(wanted.days) * 86_400);
    let api_key = sign_in.key(&new).map_err(ApiError::internal)?;
    let stored = NewKey { claims: &new, name: &wanted.name, session: false };
    match keys::add(&app.db, &stored, app.config.max_keys).await.map_err(database)? {
        Added::Stored => {}
        Added::Full => {
            let message =
                format!("the account has {} keys, as many as it may; revoke one", app.config.max_keys);
            let error = ApiError::new(StatusCode::CONFLICT, "invalid_request_error", message);
            return Err(error.with_code("too_many_keys"));
        }
    }
    tracing::info!(account = new.sub, jti = new.jti, "an api key was made");
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(json!({
        "object": "api_key",
        "api_key": api_key,
        "account": new.sub,
        "jti": new.jti,
        "name": wanted.name,
        "scopes": new.scope,
        "created_at": new.iat,
        "expires_at": new.exp,
    })))
}

/// A key may always revoke itself, one that `infera keys` made too.
pub(super) async fn revoke(
    app: Data<App>,
    request: HttpRequest,
    jti: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let claims = auth::caller(&app, &request).await?;
    if *jti != claims.jti {
        let claims = auth::need(&claims, SCOPE_KEYS, auth::SIGN_IN).map(|()| claims)?;
        // Ids are UUIDs; not every database takes every text.
        let known = uuid::Uuid::parse_str(&jti).is_ok();
        if !known || !keys::is_of(&app.db, &claims.sub, &jti).await.map_err(database)? {
            let message = "this account has no such key; GET /v1/keys lists them";
            return Err(ApiError::not_found(message).with_code("key_not_found").with_param("jti"));
        }
    }
    keys::revoke(&app.db, &jti).await.map_err(database)?;
    tracing::info!(jti = *jti, "an api key was revoked by its account");
    Ok(HttpResponse::Ok().json(json!({ "object": "api_key", "jti": *jti, "revoked": true })))
}

fn shown(row: &api_key::Model, claims: &Claims) -> Value {
    json!({
        "object": "api_key",
        "jti": row.jti,
        "name": row.name,
        "scopes": row.scopes.split(' ').collect::<Vec<_>>(),
        "created_at": row.created_ms / 1000,
        "expires_at": row.expires_ms / 1000,
        "sign_in": row.session,
        "current": row.jti == claims.jti,
    })
}
