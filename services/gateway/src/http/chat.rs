//! `POST /v1/chat/completions`.

use std::sync::Arc;

use actix_web::http::StatusCode;
use actix_web::web::{Data, Payload};
use actix_web::{HttpRequest, HttpResponse};
use futures::future::try_join_all;
use infera_runtime::http::ApiError;
use tracing::{Instrument, Span, field::Empty};
use uuid::Uuid;

use super::leave::LeaveGuard;
use super::{MAX_BODY, auth, body, sse};
use crate::app::{App, Submission, Waiting};
use crate::domain::answer::{Choice, Place};
use crate::domain::chat::ChatRequest;
use crate::domain::outcome::{Answer, Generation, Outcome};
use crate::domain::{logprobs, text};
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
    let body = body::read(&request, payload, MAX_BODY).await?;
    let chat = ChatRequest::parse(&body)?;
    drop(body);
    auth::quota(&app, &claims, u64::from(chat.n) - 1).await?;
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
        gen_ai.request.choice.count = chat.n,
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
    Span::current().record("gen_ai.response.id", format!("chatcmpl-{}", submission.head.id));
    if chat.stream {
        sse::respond(&app, submission, &chat, pending, guard).await
    } else {
        plain(submission, pending, guard).await
    }
}

/// Why there is no answer.
pub(super) enum Broken {
    /// One of the choices, this request, closed without one.
    Closed(Uuid, Arc<Outcome>),
    Late,
    Draining,
}

impl Broken {
    /// Counts it, and cancels what nobody waits for any more.
    pub(super) async fn error(self, pending: &mut Pending, guard: &mut LeaveGuard) -> ApiError {
        match self {
            Self::Closed(id, outcome) => {
                let error = verified(&outcome, pending).err();
                // The other choices are worth nothing without this one.
                guard.closed(id);
                guard.send_away().await;
                error.unwrap_or_else(|| ApiError::internal("an outcome without an error"))
            }
            Self::Late => {
                guard.stay();
                late(pending)
            }
            Self::Draining => {
                guard.send_away().await;
                draining(pending)
            }
        }
    }
}

async fn plain(
    mut submission: Submission,
    mut pending: Pending,
    mut guard: LeaveGuard,
) -> Result<HttpResponse, ApiError> {
    let waits = submission.choices.iter_mut().map(outcome);
    let outcomes = match try_join_all(waits).await {
        Ok(outcomes) => outcomes,
        Err(broken) => return Err(broken.error(&mut pending, &mut guard).await),
    };
    guard.stay();
    let mut choices = Vec::with_capacity(outcomes.len());
    for (choice, outcome) in submission.choices.iter().zip(&outcomes) {
        let answer = verified(outcome, &mut pending)?;
        choices.push(submission.choice(choice.place, answer, &answer.result));
    }
    delivered(choices.iter().map(|choice| (choice.answer, choice.delivered)), &mut pending);
    Ok(HttpResponse::Ok().json(submission.head.completion(&choices)))
}

/// The outcome of one choice, if it is an answer.
async fn outcome(choice: &mut Waiting) -> Result<Arc<Outcome>, Broken> {
    loop {
        match choice.waiter.next().await {
            Waited::Tokens(_) => {}
            Waited::Closed(outcome) if matches!(*outcome, Outcome::Verified(_)) => return Ok(outcome),
            Waited::Closed(outcome) => return Err(Broken::Closed(choice.place.id, outcome)),
            Waited::Late => return Err(Broken::Late),
            Waited::Draining => return Err(Broken::Draining),
        }
    }
}

impl Submission {
    /// A choice as the client sees it.
    pub(super) fn choice<'a>(
        &self,
        place: Place,
        answer: &'a Answer,
        delivered: &'a Generation,
    ) -> Choice<'a> {
        let tokenizer = self.served.prompt.tokenizer();
        let logprobs = self.logprobs.map(|top| logprobs::of(tokenizer, delivered, &self.stops, top));
        let text = text::visible(tokenizer, &delivered.tokens, &self.stops);
        Choice { place, answer, delivered, text, logprobs: logprobs.unwrap_or_default() }
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

/// Counts the answers that go out.
pub(super) fn delivered<'a>(
    choices: impl Iterator<Item = (&'a Answer, &'a Generation)>,
    pending: &mut Pending,
) {
    let (mut input, mut output, mut reasons) = (0, 0, Vec::new());
    for (answer, result) in choices {
        input += answer.prompt_tokens;
        output += result.tokens.len();
        reasons.push(format!("{:?}", result.finish).to_lowercase());
    }
    let span = Span::current();
    span.record("gen_ai.usage.input_tokens", input);
    span.record("gen_ai.usage.output_tokens", output);
    span.record("gen_ai.response.finish_reasons", reasons.join(","));
    pending.tokens(input, output);
    pending.end(Ending::Verified);
}

fn late(pending: &mut Pending) -> ApiError {
    pending.end(Ending::Late);
    let message =
        "there was no verdict before the deadline; with the same Idempotency-Key a repeat asks again";
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, "api_error", message).with_code("deadline")
}

fn draining(pending: &mut Pending) -> ApiError {
    pending.end(Ending::Draining);
    let message =
        "the gateway is being restarted; repeat the request, with the same Idempotency-Key if it had one";
    ApiError::unavailable(message).with_code("shutting_down").retry_after(2)
}
