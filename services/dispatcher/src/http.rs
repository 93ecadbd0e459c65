//! Routes: the nodes' WebSocket, and what anybody may know of nodes, operators and their contradictions.

use std::sync::Arc;

use actix_web::web::{self, Data, Payload, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse};
use infera_runtime::http::ApiError;
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::actor::ListNodes;
use crate::contradictions;
use crate::domain::nodes::NodeView;
use crate::operators;
use crate::session::{NodeSession, Shared};

/// Largest HTTP body that is read; no route takes one.
const MAX_BODY: usize = 4_096;

/// Adds the routes.
pub fn routes(shared: Arc<Shared>, places: Arc<Semaphore>) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .configure(infera_runtime::http::defaults(MAX_BODY))
            .app_data(Data::from(shared))
            .app_data(Data::from(places))
            .route("/v1/node/session", web::get().to(session))
            .route("/v1/nodes", web::get().to(nodes))
            .route("/v1/contradictions", web::get().to(contradictions::list))
            .route("/v1/contradictions/{id}", web::get().to(contradictions::one))
            .route("/v1/operators", web::get().to(operators::list))
            .route("/v1/operators/{operator}", web::get().to(operators::one));
    }
}

async fn session(
    request: HttpRequest,
    payload: Payload,
    shared: Data<Shared>,
    places: Data<Semaphore>,
) -> Result<HttpResponse, actix_web::Error> {
    let full = || ApiError::unavailable("as many nodes as allowed are connected; try another dispatcher");
    let permit = places.into_inner().try_acquire_owned().map_err(|_| full())?;
    let (response, ws, incoming) = actix_ws::handle(&request, payload)?;
    NodeSession::start(shared.into_inner(), ws, incoming, permit);
    Ok(response)
}

/// The body of `GET /v1/nodes`.
#[derive(Debug, Serialize)]
struct NodeList {
    nodes: Vec<NodeItem>,
}

#[derive(Debug, Serialize)]
struct NodeItem {
    node: String,
    operator: String,
    class: String,
    model_root: String,
    /// Registry id of the model.
    model: String,
    slots: u32,
    /// Those of them that count: a node has to show that it keeps up with many.
    slots_shown: u32,
    busy: u32,
    draining: bool,
    /// Its entry trial is not over: it takes no requests yet.
    on_trial: bool,
    release_hash: String,
    version: String,
    connected_at_ms: i64,
}

async fn nodes(shared: Data<Shared>) -> Result<web::Json<NodeList>, ApiError> {
    let views = shared.assignments.send(ListNodes).await.map_err(ApiError::internal)?;
    Ok(web::Json(NodeList { nodes: views.into_iter().map(|view| item(&shared, view)).collect() }))
}

fn item(shared: &Shared, view: NodeView) -> NodeItem {
    let NodeView { info, shown, busy, draining, on_trial } = view;
    NodeItem {
        node: info.node.to_string(),
        operator: info.operator.to_string(),
        model: shared
            .live
            .now()
            .registries
            .current()
            .by_root(&info.model_root)
            .map(|m| m.id.clone())
            .unwrap_or_default(),
        model_root: info.model_root.to_string(),
        class: info.class,
        slots: info.slots,
        slots_shown: shown,
        busy,
        draining,
        on_trial,
        release_hash: info.release_hash.to_string(),
        version: info.version,
        connected_at_ms: info.connected_at_ms,
    }
}
