//! `GET /v1/models`: what is served, and its price.

use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse};
use infera_protocol::registry::Model;
use infera_runtime::http::ApiError;
use serde_json::{Value, json};

use super::{auth, quote::CURRENCY};
use crate::app::App;

pub(crate) async fn list(app: Data<App>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    auth::caller(&app, &request).await?;
    let data: Vec<Value> =
        app.catalog.all().iter().map(|served| body(&served.model, app.config.replicas)).collect();
    Ok(HttpResponse::Ok().json(json!({ "object": "list", "data": data })))
}

pub(crate) async fn get(
    app: Data<App>,
    request: HttpRequest,
    id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    auth::caller(&app, &request).await?;
    Ok(HttpResponse::Ok().json(body(&app.served(&id)?.model, app.config.replicas)))
}

fn body(model: &Model, replicas: u32) -> Value {
    json!({
        "id": model.id,
        "object": "model",
        "created": model.created_secs,
        "owned_by": "infera",
        "infera": {
            "weights_root": model.weights_root,
            "context_length": model.context_length,
            // Per token, prompt and answer alike, and replica.
            "price_micro": model.price_micro,
            "replicas": replicas,
            "currency": CURRENCY,
        },
    })
}
