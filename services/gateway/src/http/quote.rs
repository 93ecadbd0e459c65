//! `POST /v1/quote`: what a chat request would cost at most. Nothing is stored, nothing is asked of a node.

use actix_web::web::{Data, Payload};
use actix_web::{HttpRequest, HttpResponse};
use infera_protocol::money::hold_micro;
use infera_runtime::http::ApiError;
use serde_json::json;

use super::{MAX_BODY, auth, body};
use crate::app::App;
use crate::domain::chat::ChatRequest;

/// Amounts named `..._micro` are 10^-6 of it.
pub(super) const CURRENCY: &str = "INFER";

/// The body is that of `POST /v1/chat/completions`, and so are the checks.
pub(super) async fn quote(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let caller = auth::chat_caller(&app, &request).await?;
    let chat = ChatRequest::parse(&body::read(&request, payload, MAX_BODY).await?)?;
    let served = app.served(&chat.model)?;
    let request = app.request(&caller.sub, &chat, &served).await?;
    let (price_micro, replicas) = (served.model.price_micro, app.config.replicas);
    let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
    let hold_micro = most(replicas, price_micro, prompt_tokens, request.max_tokens, chat.n)?;
    Ok(HttpResponse::Ok().json(json!({
        "object": "quote",
        "model": served.model.id,
        "prompt_tokens": prompt_tokens,
        "max_tokens": request.max_tokens,
        "n": chat.n,
        "replicas": replicas,
        "price_micro": price_micro,
        "hold_micro": hold_micro,
        "currency": CURRENCY,
    })))
}

/// What settlement holds for `n` answers. Each is a request of its own.
fn most(k: u32, price_micro: u64, prompt_tokens: u32, max_tokens: u32, n: u32) -> Result<u64, ApiError> {
    let one = hold_micro(k, price_micro, prompt_tokens, max_tokens);
    // The ledger's amounts are below 2^63.
    let all = one.and_then(|one| one.checked_mul(n.into())).filter(|all| i64::try_from(*all).is_ok());
    all.ok_or_else(|| {
        let message = "the request's price is beyond any balance; lower `max_tokens`";
        ApiError::bad_request("max_tokens", message).with_code("price_overflow")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_no_balance_can_have_is_refused() {
        assert_eq!(most(3, 2, 10, 90, 2).unwrap(), 1_200);
        assert_eq!(most(3, u64::MAX, 10, 90, 1).unwrap_err().code.as_deref(), Some("price_overflow"));
        assert_eq!(most(1, i64::MAX as u64, 1, 0, 1).unwrap(), i64::MAX as u64);
        assert!(most(1, i64::MAX as u64, 1, 0, 2).is_err());
    }

    proptest! {
        #[test]
        fn a_quote_is_what_the_answers_hold(
            k in 1_u32..=7, price in 0_u64..1 << 40, prompt in 0_u32..1 << 20, max in 1_u32..1 << 20, n in 1_u32..=8,
        ) {
            let held = (0..n).try_fold(0_u64, |sum, _| sum.checked_add(hold_micro(k, price, prompt, max)?));
            let quoted = most(k, price, prompt, max, n).ok();
            prop_assert_eq!(quoted, held.filter(|sum| *sum <= i64::MAX as u64));
        }
    }
}
