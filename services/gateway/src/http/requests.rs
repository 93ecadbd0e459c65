//! `/v1/requests/{id}`: where a request stands, and the way to cancel it.

use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse};
use infera_runtime::http::ApiError;
use infera_runtime::jwt::Claims;
use serde_json::{Value, json};
use uuid::Uuid;

use super::auth;
use crate::app::App;
use crate::error::database;
use crate::store::{self, request};

pub(crate) async fn get(
    app: Data<App>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let row = own(&app, &auth::caller(&app, &request).await?, &id).await?;
    let status = row.state.clone();
    Ok(HttpResponse::Ok().json(body(&row, &status)))
}

pub(crate) async fn cancel(
    app: Data<App>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let row = own(&app, &auth::scoped_caller(&app, &request).await?, &id).await?;
    if !row.is_open() {
        // Too late, and no harm: the answer says how it ended.
        let status = row.state.clone();
        return Ok(HttpResponse::Ok().json(body(&row, &status)));
    }
    app.cancel(row.id, &row.account).await.map_err(database)?;
    Ok(HttpResponse::Accepted().json(body(&row, "cancelling")))
}

/// The caller's request: another account's is as unknown as one that never was.
async fn own(app: &App, claims: &Claims, id: &str) -> Result<request::Model, ApiError> {
    let unknown = || {
        ApiError::not_found("this account has no such request; it may be too old")
            .with_code("request_not_found")
    };
    let id = Uuid::parse_str(id.strip_prefix("chatcmpl-").unwrap_or(id)).map_err(|_| {
        ApiError::bad_request("id", "`id` must be a UUID, or the `id` of an answer")
            .with_code("invalid_value")
    })?;
    let row = store::by_id(&app.db, id).await.map_err(database)?;
    row.filter(|row| row.account == claims.sub).ok_or_else(unknown)
}

fn body(row: &request::Model, status: &str) -> Value {
    json!({
        "id": row.id,
        "object": "request",
        "status": status,
        "model": row.model,
        "created": row.submitted_ms / 1000,
        "deadline": row.deadline_ms / 1000,
        "error": row.code.as_ref().map(|code| json!({ "code": code, "message": row.message })),
    })
}
