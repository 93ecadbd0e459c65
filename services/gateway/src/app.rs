//! What every HTTP handler shares, and the two things that handlers do to requests: submit and cancel.

use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use infera_bus::outbox::{self, Relay};
use infera_grammar::GrammarError;
use infera_prompt::PromptError;
use infera_protocol::bytes::Hash32;
use infera_protocol::hash::keccak;
use infera_protocol::ids::{choice_id, message_id};
use infera_protocol::request::{MAX_TOKENS, Request, choice_seed};
use infera_runtime::http::ApiError;
use infera_runtime::jwt::Verifier;
use infera_runtime::kv::Kv;
use infera_runtime::{CancellationToken, clock, db, planned};
use infera_wire::convert::{Submitted, submitted_to_wire};
use infera_wire::topology::keys;
use infera_wire::v1;
use sea_orm::{DatabaseConnection, DbErr};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use uuid::Uuid;

use crate::actor::{Replies, Wait};
use crate::catalog::{Catalog, Served};
use crate::config::Config;
use crate::domain::answer::{Head, Place};
use crate::domain::chat::ChatRequest;
use crate::domain::merge::Mode;
use crate::error::database;
use crate::http::LeaveGuard;
use crate::metrics::Metrics;
use crate::places::{Full, Places};
use crate::settlement::Settlement;
use crate::sign_in::SignIn;
use crate::store::{self, NewRequest, request};
use crate::wait::Waiter;

/// Seconds after which a client that found the gateway busy should come back.
const RETRY_SECS: u64 = 2;

pub(crate) struct App {
    pub config: Config,
    /// This replica's word in routing keys.
    pub replica: String,
    pub db: DatabaseConnection,
    pub kv: Kv,
    pub verifier: Verifier,
    pub catalog: Catalog,
    pub replies: Addr<Replies>,
    pub relay: Relay,
    pub metrics: Metrics,
    /// `None` where wallets cannot sign in.
    pub sign_in: Option<SignIn>,
    /// `None` where accounts are not served.
    pub settlement: Option<Settlement>,
    /// Prompts that may be rendered at a time.
    pub renders: Arc<Semaphore>,
    /// For prompts that are rendered or wait for it.
    pub places: Places,
    /// Cancelled when waiting clients must be sent away.
    pub drained: CancellationToken,
}

/// What a client asked for, submitted now or earlier under the same `Idempotency-Key`.
pub(crate) struct Submission {
    pub served: Arc<Served>,
    pub head: Head,
    /// In the order of their indices, at least one.
    pub choices: Vec<Waiting>,
    pub stops: Vec<String>,
    /// See [`ChatRequest::logprobs`].
    pub logprobs: Option<u32>,
}

/// One of the answers: a request of the network that is waited for.
pub(crate) struct Waiting {
    pub place: Place,
    pub waiter: Waiter,
}

/// A request as every node will see it, and its row.
struct Fixed {
    submitted: Submitted,
    new: NewRequest,
}

impl App {
    /// Fixes the request (section 3), stores it together with the message that submits it, and begins to
    /// wait. A repeat of a stored request begins to wait for that one. `guard` is armed before anything is
    /// stored, unless the client gave a key and may come back: one that leaves during this, or gets an error
    /// although the row may be there, has its request cancelled.
    pub(crate) async fn submit(
        &self,
        account: &str,
        chat: &ChatRequest,
        key: Option<String>,
        guard: &mut LeaveGuard,
    ) -> Result<Submission, ApiError> {
        let served = self.served(&chat.model)?;
        let body_hash = body_hash(chat)?;
        if let Some(key) = &key
            && let Some(row) = store::by_key(&self.db, account, key).await.map_err(database)?
        {
            return self.repeat(row, chat, served, &body_hash).await;
        }
        let fixed = self.fix(account, chat, key, &served, body_hash).await?;
        let mut choices = Vec::with_capacity(fixed.len());
        for (index, one) in (0..).zip(&fixed) {
            let waiter = self.wait(&one.submitted, chat, false).await?;
            choices.push(Waiting { place: Place { index, id: one.new.id }, waiter });
        }
        let Some(first) = fixed.first().map(|one| &one.new) else {
            return Err(ApiError::internal("a request for no answer"));
        };
        if first.idempotency_key.is_none() {
            fixed.iter().for_each(|one| guard.arm(one.new.id));
        }
        if !self.store(&fixed).await.map_err(database)? {
            // Another request with the same key was faster.
            let key = first.idempotency_key.as_deref().unwrap_or_default();
            let row = store::by_key(&self.db, account, key).await.map_err(database)?;
            let row = row.ok_or_else(|| ApiError::internal("a request vanished while it was repeated"))?;
            return self.repeat(row, chat, served, &body_hash).await;
        }
        let head = self.head(&served, first.id, first.submitted_ms);
        Ok(Submission { head, served, choices, stops: chat.stop.clone(), logprobs: chat.logprobs })
    }

    /// The model that a client names.
    pub(crate) fn served(&self, model: &str) -> Result<Arc<Served>, ApiError> {
        self.catalog.get(model).ok_or_else(|| {
            let known: Vec<String> =
                self.catalog.all().iter().map(|served| served.model.id.clone()).collect();
            let name: String = model.chars().take(100).collect();
            ApiError::not_found(format!(
                "the model `{name}` is not served here; there are: {}",
                known.join(", ")
            ))
            .with_code("model_not_found")
            .with_param("model")
        })
    }

    /// What every node will be asked: the messages as token ids, limits and parameters checked.
    pub(crate) async fn request(
        &self,
        account: &str,
        chat: &ChatRequest,
        served: &Arc<Served>,
    ) -> Result<Request, ApiError> {
        // Hopelessly long texts are not tokenised, which would take seconds.
        let bytes: usize = chat.messages.iter().map(|message| message.content.len()).sum();
        fit(None, 1, bytes / served.longest_token, served)?;
        known_tokens(chat, served)?;
        let _place = self.places.take(account).map_err(busy)?;
        self.admit_form(served, chat).await?;
        let prompt = self.render(served.clone(), chat).await?;
        let max_tokens = fit(chat.max_tokens, self.config.default_max_tokens, prompt.len(), served)?;
        let id = Uuid::now_v7();
        let request = Request {
            id,
            model_root: served.model.weights_root,
            sampling: chat.sampling.clone(),
            max_tokens,
            stop: chat.stop.clone(),
            // By chance alone: one that follows from what nodes see would tell them which jobs are canaries.
            seed: chat.seed.unwrap_or_else(rand::random),
            prompt,
            grammar: chat.form.as_ref().map(|form| form.grammar.clone()),
        };
        request.validate().map_err(|error| ApiError::bad_request(None, error.to_string()))?;
        Ok(request)
    }

    /// What is asked for, one request of the network for each answer. Only the first one has the key.
    async fn fix(
        &self,
        account: &str,
        chat: &ChatRequest,
        key: Option<String>,
        served: &Arc<Served>,
        body_hash: Hash32,
    ) -> Result<Vec<Fixed>, ApiError> {
        let request = self.request(account, chat, served).await?;
        let submitted_ms = clock::now_ms();
        let one = |index| {
            let request = Request {
                id: choice_id(request.id, index),
                seed: choice_seed(request.seed, index),
                ..request.clone()
            };
            let key = key.clone().filter(|_| index == 0);
            self.fixed(account, chat, key, request, body_hash, submitted_ms)
        };
        Ok((0..chat.n).map(one).collect())
    }

    fn fixed(
        &self,
        account: &str,
        chat: &ChatRequest,
        idempotency_key: Option<String>,
        request: Request,
        body_hash: Hash32,
        submitted_ms: i64,
    ) -> Fixed {
        let deadline_ms = submitted_ms.saturating_add(self.config.deadline_ms());
        let new = NewRequest {
            id: request.id,
            account: account.to_owned(),
            idempotency_key,
            body_hash: body_hash.to_vec(),
            model: chat.model.clone(),
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            stop: chat.stop.clone(),
            submitted_ms,
            deadline_ms,
            logprobs: chat.logprobs.is_some(),
        };
        let submitted = Submitted {
            request,
            account: account.to_owned(),
            model: chat.model.clone(),
            k: self.config.replicas,
            reply_to: self.replica.clone(),
            stream: chat.stream,
            submitted_at_ms: submitted_ms,
            deadline_ms,
            salt: Hash32(rand::random()),
            bid_micro: chat.bid_micro,
        };
        Fixed { submitted, new }
    }

    /// Whether the model's tokens can keep to what is asked for. Compiling takes up to some 100 ms: not on this thread.
    async fn admit_form(&self, served: &Arc<Served>, chat: &ChatRequest) -> Result<(), ApiError> {
        let Some(form) = chat.form.clone() else { return Ok(()) };
        let turn = self.renders.clone().acquire_owned().await.map_err(ApiError::internal)?;
        let served = served.clone();
        let admit = move || {
            let _turn = turn;
            served.vocabulary.admit(&form.grammar).map_err(|error| (form.param, error))
        };
        let admitted = tokio::task::spawn_blocking(admit).await.map_err(ApiError::internal)?;
        admitted.map_err(|(param, error)| match error {
            GrammarError::Refused(reason) => {
                let message = format!("`{param}` cannot be used: {reason}; change it or leave it out");
                ApiError::bad_request(param.as_str(), message).with_code("invalid_value")
            }
            other => ApiError::internal(other),
        })
    }

    /// Token ids of the chat. A megabyte of text takes a second or two: not on this thread, and not on all cores.
    async fn render(&self, served: Arc<Served>, chat: &ChatRequest) -> Result<Vec<u32>, ApiError> {
        let turn = self.renders.clone().acquire_owned().await.map_err(ApiError::internal)?;
        let messages = chat.messages.clone();
        // The turn ends with the work, not with a client that leaves meanwhile.
        let render = move || {
            let _turn = turn;
            served.prompt.render(&messages)
        };
        let rendered = tokio::task::spawn_blocking(render).await;
        rendered.map_err(ApiError::internal)?.map_err(|error| match error {
            PromptError::NoMessages | PromptError::Role { .. } | PromptError::Template(_) => {
                ApiError::bad_request("messages", error.to_string()).with_code("invalid_value")
            }
            other => ApiError::internal(other),
        })
    }

    /// One transaction: the rows and the messages. `false`: the key is taken, nothing was written.
    async fn store(&self, fixed: &[Fixed]) -> Result<bool, DbErr> {
        let tx = db::begin(&self.db).await?;
        for one in fixed {
            if !store::insert(&tx, &one.new).await? {
                tx.rollback().await?;
                return Ok(false);
            }
            let id = message_id("request.submitted", one.new.id, 0);
            outbox::enqueue(&tx, keys::REQUEST_SUBMITTED, id, &submitted_to_wire(&one.submitted)).await?;
        }
        planned::pause("gateway.request.before_commit").await;
        tx.commit().await?;
        planned::pause("gateway.request.after_commit").await;
        self.relay.wake();
        Ok(true)
    }

    async fn repeat(
        &self,
        row: request::Model,
        chat: &ChatRequest,
        served: Arc<Served>,
        body_hash: &Hash32,
    ) -> Result<Submission, ApiError> {
        if row.body_hash != body_hash.as_bytes() {
            return Err(ApiError::new(
                actix_web::http::StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_error",
                "this Idempotency-Key was used for another request; use a new key for a new request",
            )
            .with_code("idempotency_key_reused")
            .with_param("Idempotency-Key"));
        }
        self.metrics.repeat(&chat.model);
        // A row that is closed is found by the first look; an open one may close at any time. The other answers' rows
        // were written with it, under ids that follow from its own.
        let mut choices = Vec::new();
        for index in 0..chat.n {
            let id = choice_id(row.id, index);
            let wait = Wait {
                id,
                stream: mode(chat, self.config.replicas),
                max_tokens: u32::try_from(row.max_tokens).unwrap_or(MAX_TOKENS),
            };
            let waiter = self.waiter(wait, row.deadline_ms, true).await?;
            choices.push(Waiting { place: Place { index, id }, waiter });
        }
        Ok(Submission {
            head: self.head(&served, row.id, row.submitted_ms),
            served,
            choices,
            stops: row.stops().map_err(ApiError::internal)?,
            logprobs: chat.logprobs,
        })
    }

    async fn wait(
        &self,
        submitted: &Submitted,
        chat: &ChatRequest,
        look_first: bool,
    ) -> Result<Waiter, ApiError> {
        let wait = Wait {
            id: submitted.request.id,
            stream: mode(chat, submitted.k),
            max_tokens: submitted.request.max_tokens,
        };
        self.waiter(wait, submitted.deadline_ms, look_first).await
    }

    async fn waiter(&self, wait: Wait, deadline_ms: i64, look_first: bool) -> Result<Waiter, ApiError> {
        let id = wait.id;
        let events = match self.replies.send(wait).await {
            Ok(Ok(events)) => events,
            Ok(Err(full)) => return Err(ApiError::unavailable(format!("{full}; try again")).retry_after(5)),
            Err(error) => return Err(ApiError::internal(error)),
        };
        let left = u64::try_from(deadline_ms.saturating_sub(clock::now_ms())).unwrap_or(0);
        let until = Instant::now()
            + Duration::from_millis(left)
            + Duration::from_secs(self.config.deadline_grace_secs);
        let (db, drained) = (self.db.clone(), self.drained.clone());
        Ok(Waiter::new(id, events, db, self.config.poll(), until, drained, look_first))
    }

    fn head(&self, served: &Served, id: Uuid, submitted_ms: i64) -> Head {
        Head {
            id,
            model: served.model.id.clone(),
            weights_root: served.model.weights_root,
            created: submitted_ms / 1000,
            receipts_url: self.config.receipts_base().to_owned(),
        }
    }

    /// Asks the mempool to close the request as cancelled. Repeating it changes nothing.
    pub(crate) async fn cancel(&self, id: Uuid, account: &str) -> Result<(), DbErr> {
        let message = v1::CancelRequested { request_id: id.as_bytes().to_vec(), account: account.to_owned() };
        let tx = db::begin(&self.db).await?;
        outbox::enqueue(&tx, keys::CANCEL_REQUESTED, message_id("cancel.requested", id, 0), &message).await?;
        tx.commit().await?;
        self.relay.wake();
        Ok(())
    }
}

fn busy(full: Full) -> ApiError {
    let error = match full {
        Full::All => {
            ApiError::unavailable("too many prompts wait to be read now; try again").with_code("overloaded")
        }
        Full::Share(share) => ApiError::rate_limited(format!(
            "many prompts wait to be read, and this account's share of the places, {share}, is taken; try again"
        )),
    };
    error.retry_after(RETRY_SECS)
}

fn mode(chat: &ChatRequest, k: u32) -> Option<Mode> {
    chat.stream.then_some(if chat.fast { Mode::Fast } else { Mode::Majority { k } })
}

/// A bias on a token that the model does not have is a mistake.
fn known_tokens(chat: &ChatRequest, served: &Served) -> Result<(), ApiError> {
    let size = served.model.vocab_size;
    match chat.sampling.logit_bias.keys().next_back() {
        Some(token) if *token >= size => {
            let message = format!(
                "`logit_bias` names token {token}; this model's tokens are 0 to {}",
                size.saturating_sub(1)
            );
            Err(ApiError::bad_request("logit_bias", message).with_code("invalid_value"))
        }
        _ => Ok(()),
    }
}

/// What repeats are compared by: the checked request, so that spacing and defaults do not matter.
fn body_hash(chat: &ChatRequest) -> Result<Hash32, ApiError> {
    let bytes = serde_json::to_vec(chat).map_err(ApiError::internal)?;
    Ok(keccak(&[b"infera.gateway.body.v1", &bytes]))
}

/// Most tokens to generate: what the client asks for if the context has room, else the default or what is left.
fn fit(asked: Option<u32>, default: u32, prompt: usize, served: &Served) -> Result<u32, ApiError> {
    let context = served.model.context_length.min(MAX_TOKENS);
    let room = u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt)).unwrap_or(0);
    let too_long = |param: &str, what: String| {
        let message = format!("this model's context is {context} tokens; {what}");
        Err(ApiError::bad_request(param, message).with_code("context_length_exceeded"))
    };
    match asked {
        _ if room == 0 => too_long(
            "messages",
            format!("the messages have at least {prompt} and leave no room: shorten them"),
        ),
        Some(asked) if asked > room => too_long(
            "max_tokens",
            format!("the messages have {prompt}, so `max_tokens` can be at most {room}"),
        ),
        Some(asked) => Ok(asked),
        None => Ok(default.min(room)),
    }
}
