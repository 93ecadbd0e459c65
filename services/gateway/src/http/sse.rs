//! Streams: server-sent events that hold only `data:` lines and comments, as OpenAI's clients expect.
//!
//! A task of its own produces them into a short channel. actix does not drop a pending stream when its
//! client leaves, so heartbeat comments are written into silence: the first that fails closes the channel.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::web::Bytes;
use futures::StreamExt;
use infera_runtime::http::ApiError;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::chat::{delivered, draining, late, verified};
use super::leave::LeaveGuard;
use crate::app::{App, Submission};
use crate::domain::answer::Head;
use crate::domain::chat::ChatRequest;
use crate::domain::outcome::Outcome;
use crate::domain::text::TextStream;
use crate::metrics::{Ending, Pending};
use crate::wait::Waited;

/// Events that wait for a slow client.
const CHANNEL: usize = 32;
/// A stream's head is held back for so long, so that a request which is refused at once gets its status.
const HEAD_WAIT: Duration = Duration::from_secs(1);
const HEARTBEAT: &[u8] = b": working\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Answers with a stream, or with an error where it is known before the first byte.
pub(crate) async fn respond(
    app: &App,
    mut submission: Submission,
    chat: &ChatRequest,
    mut pending: Pending,
    mut guard: LeaveGuard,
) -> Result<HttpResponse, ApiError> {
    let first = timeout(HEAD_WAIT, submission.waiter.next()).await.ok();
    let refused = match &first {
        Some(Waited::Closed(outcome)) => verified(outcome, &mut pending).err(),
        Some(Waited::Late) => Some(late(&mut pending)),
        Some(Waited::Draining) => Some(draining(&mut pending)),
        Some(Waited::Tokens(_)) | None => None,
    };
    if let Some(error) = refused {
        if matches!(first, Some(Waited::Draining)) {
            guard.send_away().await;
        }
        guard.stay();
        return Err(error);
    }
    let (sender, receiver) = mpsc::channel(CHANNEL);
    let producer = Producer {
        writer: Writer { sender, last: Instant::now() },
        text: TextStream::new(submission.stops.clone()),
        head: submission.head.clone(),
        submission,
        emitted: Vec::new(),
        usage: chat.include_usage,
        fast: chat.fast,
        heartbeat: app.config.heartbeat(),
        pending,
        guard,
    };
    actix_web::rt::spawn(producer.run(first).in_current_span());
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("cache-control", "no-cache"))
        .insert_header(("x-accel-buffering", "no"))
        .streaming(ReceiverStream::new(receiver).map(Ok::<Bytes, Infallible>)))
}

/// The client went away.
struct Left;

struct Writer {
    sender: mpsc::Sender<Bytes>,
    last: Instant,
}

impl Writer {
    async fn bytes(&mut self, bytes: Bytes) -> Result<(), Left> {
        self.last = Instant::now();
        self.sender.send(bytes).await.map_err(|_| Left)
    }

    async fn event(&mut self, value: &Value) -> Result<(), Left> {
        self.bytes(Bytes::from(format!("data: {value}\n\n"))).await
    }
}

struct Producer {
    submission: Submission,
    head: Head,
    writer: Writer,
    text: TextStream,
    emitted: Vec<u32>,
    usage: bool,
    fast: bool,
    heartbeat: Duration,
    pending: Pending,
    guard: LeaveGuard,
}

impl Producer {
    async fn run(mut self, first: Option<Waited>) {
        if self.produce(first).await.is_ok() {
            self.guard.stay();
        } else {
            self.pending.end(Ending::Left);
        }
    }

    async fn produce(&mut self, mut next: Option<Waited>) -> Result<(), Left> {
        self.writer.event(&self.head.first_chunk(self.usage, self.fast)).await?;
        loop {
            let waited = match next.take() {
                Some(waited) => waited,
                None => self.wait().await?,
            };
            match waited {
                Waited::Tokens(tokens) => self.emit(&tokens).await?,
                Waited::Closed(outcome) => return self.close(&outcome).await,
                Waited::Late => {
                    let error = late(&mut self.pending);
                    return self.writer.event(&error.body()).await;
                }
                Waited::Draining => {
                    self.guard.send_away().await;
                    let error = draining(&mut self.pending);
                    return self.writer.event(&error.body()).await;
                }
            }
        }
    }

    /// Waits for what comes next, with comments while nothing does.
    async fn wait(&mut self) -> Result<Waited, Left> {
        loop {
            tokio::select! {
                waited = self.submission.waiter.next() => return Ok(waited),
                () = self.writer.sender.closed() => return Err(Left),
                () = sleep_until(self.writer.last + self.heartbeat) => {
                    self.writer.bytes(Bytes::from_static(HEARTBEAT)).await?;
                }
            }
        }
    }

    async fn emit(&mut self, tokens: &[u32]) -> Result<(), Left> {
        self.emitted.extend_from_slice(tokens);
        let text = self.text.push(self.submission.served.prompt.tokenizer(), tokens);
        self.show(text).await
    }

    async fn show(&mut self, text: String) -> Result<(), Left> {
        if text.is_empty() {
            return Ok(());
        }
        self.pending.first_text();
        self.writer.event(&self.head.text_chunk(&text, self.usage)).await
    }

    async fn close(&mut self, outcome: &Arc<Outcome>) -> Result<(), Left> {
        let answer = match verified(outcome, &mut self.pending) {
            Ok(answer) => answer,
            Err(error) => return self.writer.event(&error.body()).await,
        };
        let Some(result) = answer.extending(&self.emitted) else {
            self.pending.end(Ending::Contradicted);
            let message = format!(
                "the verified answer is another than what was streamed so far; it is in the receipt {}",
                self.head.id
            );
            let status = actix_web::http::StatusCode::BAD_GATEWAY;
            let error = ApiError::new(status, "api_error", message).with_code("stream_contradicted");
            return self.writer.event(&error.body()).await;
        };
        let rest = result.tokens.get(self.emitted.len()..).unwrap_or_default();
        self.emit(rest).await?;
        let tail = self.text.finish();
        self.show(tail).await?;
        self.writer.event(&self.head.last_chunk(answer, result, self.usage, self.fast)).await?;
        if self.usage {
            self.writer.event(&self.head.usage_chunk(answer, result)).await?;
        }
        delivered(answer, result, &mut self.pending);
        self.writer.bytes(Bytes::from_static(DONE)).await
    }
}
