//! `POST /v1/chat/completions`.

use std::sync::Arc;

use actix_web::http::StatusCode;
use actix_web::web::{Data, Payload};
use actix_web::{HttpRequest, HttpResponse};
use infera_runtime::http::ApiError;
use tracing::{Instrument, Span, field::Empty};

use super::leave::LeaveGuard;
use super::{auth, body, sse};
use crate::app::{App, Submission};
use crate::domain::chat::ChatRequest;
use crate::domain::outcome::{Answer, Generation, Outcome};
use crate::domain::text;
use crate::error::of_outcome;
use crate::metrics::{Ending, Pending};
use crate::wait::Waited;

/// Longest `Idempotency-Key`, bytes.
const MAX_KEY: usize = 255;

pub(crate) async fn create(
    app: Data<App>,
    request: HttpRequest,
    payload: Payload,
) -> Result<HttpResponse, ApiError> {
    let claims = auth::chat_caller(&app, &request).await?;
    let key = idempotency_key(&request)?;
    let body = body::read(&request, payload).await?;
    let chat = ChatRequest::parse(&body)?;
    drop(body);
    let span = span(&chat);
    answer(app, claims.sub, chat, key).instrument(span).await
}

/// OpenTelemetry's GenAI span: parameters and counts, never texts.
fn span(chat: &ChatRequest) -> Span {
    tracing::info_span!(
        "chat",
        otel.name = format!("chat {}", chat.model.chars().take(100).collect::<String>()),
        otel.status_code = Empty,
        gen_ai.operation.name = "chat",
        gen_ai.provider.name = "infera",
        gen_ai.request.model = chat.model,
        gen_ai.request.stream = chat.stream,
        gen_ai.request.temperature = chat.sampling.temperature,
        gen_ai.request.max_tokens = chat.max_tokens,
        gen_ai.response.id = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        error.type = Empty,
    )
}

fn idempotency_key(request: &HttpRequest) -> Result<Option<String>, ApiError> {
    let Some(value) = request.headers().get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=MAX_KEY).contains(&key.len()));
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        let message = format!("the header Idempotency-Key must be 1 to {MAX_KEY} printable ASCII characters");
        ApiError::bad_request("Idempotency-Key", message).with_code("invalid_value")
    })
}

async fn answer(
    app: Data<App>,
    account: String,
    chat: ChatRequest,
    key: Option<String>,
) -> Result<HttpResponse, ApiError> {
    let mut pending = app.metrics.start(&chat.model);
    let mut guard = LeaveGuard::new(app.clone(), &account);
    let submission = match app.submit(&account, &chat, key, &mut guard).await {
        Ok(submission) => submission,
        Err(error) => {
            pending.end(Ending::Refused);
            return Err(error);
        }
    };
    Span::current().record("gen_ai.response.id", format!("chatcmpl-{}", submission.id));
    if chat.stream {
        sse::respond(&app, submission, &chat, pending, guard).await
    } else {
        plain(submission, pending, guard).await
    }
}

async fn plain(
    mut submission: Submission,
    mut pending: Pending,
    mut guard: LeaveGuard,
) -> Result<HttpResponse, ApiError> {
    let outcome = loop {
        match submission.waiter.next().await {
            Waited::Tokens(_) => {}
            Waited::Closed(outcome) => break Ok(outcome),
            Waited::Late => break Err(late(&mut pending)),
            Waited::Draining => {
                guard.send_away().await;
                break Err(draining(&mut pending));
            }
        }
    };
    guard.stay();
    let outcome = outcome?;
    match verified(&outcome, &mut pending) {
        Ok(answer) => {
            let tokenizer = submission.served.prompt.tokenizer();
            let text = text::visible(tokenizer, &answer.result.tokens, &submission.stops);
            delivered(answer, &answer.result, &mut pending);
            Ok(HttpResponse::Ok().json(submission.head.completion(answer, &text)))
        }
        Err(error) => Err(error),
    }
}

/// The answer of an outcome, or the error that the client gets instead.
pub(super) fn verified<'a>(outcome: &'a Arc<Outcome>, pending: &mut Pending) -> Result<&'a Answer, ApiError> {
    match (outcome.as_ref(), of_outcome(outcome)) {
        (Outcome::Verified(answer), _) => Ok(answer),
        (outcome, error) => {
            pending.end(if matches!(outcome, Outcome::Failed { .. }) {
                Ending::Failed
            } else {
                Ending::Rejected
            });
            let error = error.unwrap_or_else(|| ApiError::internal("an outcome without an error"));
            let span = Span::current();
            span.record("error.type", error.code.as_deref().unwrap_or("unknown"));
            span.record("otel.status_code", "ERROR");
            Err(error)
        }
    }
}

/// Counts an answer that goes out.
pub(super) fn delivered(answer: &Answer, result: &Generation, pending: &mut Pending) {
    let span = Span::current();
    span.record("gen_ai.usage.input_tokens", answer.prompt_tokens);
    span.record("gen_ai.usage.output_tokens", result.tokens.len());
    span.record("gen_ai.response.finish_reasons", format!("{:?}", result.finish).to_lowercase());
    pending.tokens(answer.prompt_tokens, result.tokens.len());
    pending.end(Ending::Verified);
}

pub(super) fn late(pending: &mut Pending) -> ApiError {
    pending.end(Ending::Late);
    let message =
        "there was no verdict before the deadline; with the same Idempotency-Key a repeat asks again";
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "api_error", message).with_code("deadline")
}

pub(super) fn draining(pending: &mut Pending) -> ApiError {
    pending.end(Ending::Draining);
    let message =
        "the gateway is being restarted; repeat the request, with the same Idempotency-Key if it had one";
    ApiError::unavailable(message).with_code("shutting_down").retry_after(2)
}
