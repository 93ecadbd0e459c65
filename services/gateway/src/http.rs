//! Routes of the gateway.
//!
//! | route | needs | answers |
//! |---|---|---|
//! | `POST /v1/chat/completions` | key with scope `chat` | an answer, plain or streamed |
//! | `GET /v1/models`, `/v1/models/{id}` | key | what is served |
//! | `GET /v1/requests/{id}` | key of the account that asked | where it stands |
//! | `DELETE /v1/requests/{id}` | key of the account that asked, with scope `chat` | cancels it |
//! | `/livez`, `/readyz`, `/metrics` | | |

mod auth;
mod body;
mod chat;
mod leave;
mod models;
mod requests;
mod sse;

use actix_web::web::{self, ServiceConfig};
use infera_runtime::health::{self, Health};
use infera_runtime::http::defaults;

pub(crate) use leave::LeaveGuard;

use crate::app::App;

/// Largest body, bytes.
pub const MAX_BODY: usize = 1024 * 1024;

pub(crate) fn routes(app: web::Data<App>, health: Health) -> impl Fn(&mut ServiceConfig) + Clone + Send {
    move |config| {
        config
            .configure(health::routes(health.clone()))
            .configure(defaults(MAX_BODY))
            .app_data(app.clone())
            .route("/v1/chat/completions", web::post().to(chat::create))
            .route("/v1/models", web::get().to(models::list))
            .route("/v1/models/{id:.+}", web::get().to(models::get))
            .route("/v1/requests/{id}", web::get().to(requests::get))
            .route("/v1/requests/{id}", web::delete().to(requests::cancel));
    }
}
