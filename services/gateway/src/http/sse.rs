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
use futures::future::select_all;
use infera_runtime::http::ApiError;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;
use uuid::Uuid;

use super::chat::{Broken, delivered, verified};
use super::leave::LeaveGuard;
use crate::app::{App, Submission, Waiting};
use crate::domain::chat::ChatRequest;
use crate::domain::outcome::{Answer, Generation, Outcome};
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
    let choices = std::mem::take(&mut submission.choices);
    let mut streams: Vec<Stream> =
        choices.into_iter().map(|choice| Stream::new(choice, &submission.stops)).collect();
    let first = timeout(HEAD_WAIT, next(&mut streams)).await.ok();
    let first = match first.map(|(at, waited)| (at, broken(streams[at].choice.place.id, waited))) {
        Some((_, Err(broken))) => return Err(broken.error(&mut pending, &mut guard).await),
        Some((at, Ok(step))) => Some((at, step)),
        None => None,
    };
    let (sender, receiver) = mpsc::channel(CHANNEL);
    let producer = Producer {
        writer: Writer { sender, last: Instant::now() },
        submission,
        streams,
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

/// One of the answers while it runs.
struct Stream {
    choice: Waiting,
    text: TextStream,
    emitted: Vec<u32>,
    /// Its outcome, and which of the verified results was delivered.
    closed: Option<(Arc<Outcome>, Generation)>,
}

impl Stream {
    fn new(choice: Waiting, stops: &[String]) -> Self {
        Self { choice, text: TextStream::new(stops.to_vec()), emitted: Vec::new(), closed: None }
    }
}

/// What happens next, and to which of the streams that still run. Cancelling it loses nothing.
async fn next(streams: &mut [Stream]) -> (usize, Waited) {
    let running = streams.iter_mut().enumerate().filter(|(_, stream)| stream.closed.is_none());
    let waits: Vec<_> = running
        .map(|(at, stream)| Box::pin(async move { (at, stream.choice.waiter.next().await) }))
        .collect();
    if waits.is_empty() {
        return std::future::pending().await;
    }
    select_all(waits).await.0
}

/// What a stream goes on with.
enum Step {
    Tokens(Vec<u32>),
    Closed(Arc<Outcome>),
}

fn broken(id: Uuid, waited: Waited) -> Result<Step, Broken> {
    match waited {
        Waited::Tokens(tokens) => Ok(Step::Tokens(tokens)),
        Waited::Closed(outcome) if matches!(*outcome, Outcome::Verified(_)) => Ok(Step::Closed(outcome)),
        Waited::Closed(outcome) => Err(Broken::Closed(id, outcome)),
        Waited::Late => Err(Broken::Late),
        Waited::Draining => Err(Broken::Draining),
    }
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
    streams: Vec<Stream>,
    writer: Writer,
    usage: bool,
    fast: bool,
    heartbeat: Duration,
    pending: Pending,
    guard: LeaveGuard,
}

impl Producer {
    async fn run(mut self, first: Option<(usize, Step)>) {
        if self.produce(first).await.is_ok() {
            self.guard.stay();
        } else {
            self.pending.end(Ending::Left);
        }
    }

    async fn produce(&mut self, mut next: Option<(usize, Step)>) -> Result<(), Left> {
        for at in 0..self.streams.len() {
            let place = self.streams[at].choice.place;
            self.writer.event(&self.submission.head.first_chunk(place, self.usage, self.fast)).await?;
        }
        while self.streams.iter().any(|stream| stream.closed.is_none()) {
            let step = match next.take() {
                Some(step) => Ok(step),
                None => self.wait().await?,
            };
            match step {
                Ok((at, Step::Tokens(tokens))) => self.emit(at, &tokens).await?,
                Ok((at, Step::Closed(outcome))) => {
                    if let Some(contradicted) = self.close(at, outcome).await? {
                        self.guard.send_away().await;
                        return self.writer.event(&contradicted.body()).await;
                    }
                }
                Err(broken) => {
                    let error = broken.error(&mut self.pending, &mut self.guard).await;
                    return self.writer.event(&error.body()).await;
                }
            }
        }
        self.end().await
    }

    /// Waits for what comes next, with comments while nothing does.
    async fn wait(&mut self) -> Result<Result<(usize, Step), Broken>, Left> {
        loop {
            tokio::select! {
                (at, waited) = next(&mut self.streams) => {
                    let id = self.streams[at].choice.place.id;
                    return Ok(broken(id, waited).map(|step| (at, step)));
                }
                () = self.writer.sender.closed() => return Err(Left),
                () = sleep_until(self.writer.last + self.heartbeat) => {
                    self.writer.bytes(Bytes::from_static(HEARTBEAT)).await?;
                }
            }
        }
    }

    async fn emit(&mut self, at: usize, tokens: &[u32]) -> Result<(), Left> {
        let stream = &mut self.streams[at];
        stream.emitted.extend_from_slice(tokens);
        let text = stream.text.push(self.submission.served.prompt.tokenizer(), tokens);
        self.show(at, text).await
    }

    async fn show(&mut self, at: usize, text: String) -> Result<(), Left> {
        if text.is_empty() {
            return Ok(());
        }
        self.pending.first_text();
        let place = self.streams[at].choice.place;
        self.writer.event(&self.submission.head.text_chunk(place, &text, self.usage)).await
    }

    /// The rest of one answer. An error: the verdict is another than what was streamed.
    async fn close(&mut self, at: usize, outcome: Arc<Outcome>) -> Result<Option<ApiError>, Left> {
        let answer = match verified(&outcome, &mut self.pending) {
            Ok(answer) => answer,
            Err(error) => return Ok(Some(error)),
        };
        let place = self.streams[at].choice.place;
        self.guard.closed(place.id);
        let Some(result) = answer.extending(&self.streams[at].emitted).cloned() else {
            self.pending.end(Ending::Contradicted);
            let message = format!(
                "the verified answer is another than what was streamed so far; it is in the receipt {}",
                place.id
            );
            let status = actix_web::http::StatusCode::BAD_GATEWAY;
            return Ok(Some(ApiError::new(status, "api_error", message).with_code("stream_contradicted")));
        };
        let rest = result.tokens.get(self.streams[at].emitted.len()..).unwrap_or_default().to_vec();
        self.emit(at, &rest).await?;
        let tail = self.streams[at].text.finish();
        self.show(at, tail).await?;
        let last = self.submission.choice(place, answer, &result);
        self.writer.event(&self.submission.head.last_chunk(&last, self.usage, self.fast)).await?;
        self.streams[at].closed = Some((outcome, result));
        Ok(None)
    }

    async fn end(&mut self) -> Result<(), Left> {
        let closed = self.streams.iter().filter_map(|stream| stream.closed.as_ref());
        let choices: Vec<(&Answer, &Generation)> = closed
            .filter_map(|(outcome, result)| match outcome.as_ref() {
                Outcome::Verified(answer) => Some((answer, result)),
                _ => None,
            })
            .collect();
        if self.usage {
            self.writer.event(&self.submission.head.usage_chunk(choices.iter().copied())).await?;
        }
        delivered(choices.into_iter(), &mut self.pending);
        self.writer.bytes(Bytes::from_static(DONE)).await
    }
}
