//! Routes of the gateway.
//!
//! | route | needs | answers |
//! |---|---|---|
//! | `POST /v1/chat/completions` | key with scope `chat` | an answer, plain or streamed |
//! | `GET /v1/models`, `/v1/models/{id}` | key | what is served |
//! | `GET /v1/requests/{id}` | key of the account that asked | where it stands |
//! | `DELETE /v1/requests/{id}` | key of the account that asked, with scope `chat` | cancels it |
//! | `POST /v1/quote` | key with scope `chat` | what a chat request would cost at most |
//! | `POST /v1/auth/nonce`, `/v1/auth/login` | | a nonce; an API key for a signed message (ERC-4361) |
//! | `GET /v1/keys`, `POST /v1/keys` | key with scope `keys`: one of a sign-in | the account's keys; a new one |
//! | `DELETE /v1/keys/{jti}` | the same, or the key itself | revokes it |
//! | `GET /v1/balance`, `/v1/usage`, `/v1/statement`, `POST /v1/vouchers` | key | what settlement answers |
//! | `GET /v1/receipts/{id}` | with a key of the account, with scope `receipts`, also the evidence | what settlement answers |
//! | `GET /v1/governance` | | what settlement answers: proposals and the registry on the chain |
//! | `GET /v1/batches/{sequence}`, and below it `/receipts` and `/rewards` | | what settlement answers: what stands behind a root |
//! | `GET /v1/operators/{address}`, and below it `/rewards/{sequence}` | | what settlement answers: what an operator earned |
//! | `/livez`, `/readyz`, `/metrics` | | |
//!
//! Pages of `sign_in_origins` may read what those routes answer that are about an account ([`pages`]).

mod auth;
mod body;
mod chat;
mod client;
mod forward;
mod keys;
mod leave;
mod login;
mod models;
mod pages;
mod quote;
mod requests;
mod sse;

use actix_web::Resource;
use actix_web::middleware::from_fn;
use actix_web::web::{self, ServiceConfig, delete, get, post, resource};
use infera_runtime::health::{self, Health};
use infera_runtime::http::defaults;

pub(crate) use leave::LeaveGuard;

use crate::app::App;

/// Largest body, bytes.
pub const MAX_BODY: usize = 1024 * 1024;

pub(crate) fn routes(app: web::Data<App>, health: Health) -> impl Fn(&mut ServiceConfig) + Clone + Send {
    move |config| {
        // What a page needs on which people sign in.
        let for_pages = |resource: Resource| resource.wrap(from_fn(pages::allow));
        config
            .service(for_pages(resource("/v1/auth/nonce").route(post().to(login::nonce))))
            .service(for_pages(resource("/v1/auth/login").route(post().to(login::login))))
            .service(for_pages(
                resource("/v1/keys").route(get().to(keys::list)).route(post().to(keys::create)),
            ))
            .service(for_pages(resource("/v1/keys/{jti}").route(delete().to(keys::revoke))))
            .service(for_pages(resource("/v1/balance").route(get().to(forward::balance))))
            .service(for_pages(resource("/v1/usage").route(get().to(forward::usage))))
            .service(for_pages(resource("/v1/statement").route(get().to(forward::statement))))
            .service(for_pages(resource("/v1/vouchers").route(post().to(forward::voucher))))
            .service(for_pages(resource("/v1/receipts/{id}").route(get().to(forward::receipt))));
        config
            .configure(health::routes(health.clone()))
            .configure(defaults(MAX_BODY))
            .app_data(app.clone())
            .route("/v1/chat/completions", post().to(chat::create))
            .route("/v1/quote", post().to(quote::quote))
            .route("/v1/governance", get().to(forward::governance))
            .route("/v1/batches/{sequence}", get().to(forward::batch))
            .route("/v1/batches/{sequence}/receipts", get().to(forward::batch_receipts))
            .route("/v1/batches/{sequence}/rewards", get().to(forward::batch_rewards))
            .route("/v1/operators/{address}", get().to(forward::operator))
            .route("/v1/operators/{address}/rewards/{sequence}", get().to(forward::operator_reward))
            .route("/v1/models", get().to(models::list))
            .route("/v1/models/{id:.+}", get().to(models::get))
            .route("/v1/requests/{id}", get().to(requests::get))
            .route("/v1/requests/{id}", delete().to(requests::cancel));
    }
}
