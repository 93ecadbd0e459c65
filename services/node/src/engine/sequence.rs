//! One job in the engine: what it has so far, the draw of its next token, and when it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use infera_prompt::{StopMatcher, Tokenizer};
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::request::Finish;
use infera_protocol::sampling::{Counts, SampleError, candidates, choose};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::model::Cache;
use super::{Event, Job, Start};

/// Most tokens of a prompt that are computed in one step.
pub(super) const PIECE: usize = 128;

pub(super) struct Sequence {
    job: Job,
    events: mpsc::Sender<Event>,
    cancelled: Arc<AtomicBool>,
    pub cache: Cache,
    /// The last token drawn, not yet in the cache.
    last: u32,
    generated: u32,
    counts: Counts,
    stop: StopMatcher,
}

impl Sequence {
    pub fn new(start: Start, cache: Cache) -> Self {
        let Start { job, events, cancelled } = start;
        let stop = StopMatcher::new(&job.stop);
        Self { job, events, cancelled, cache, last: 0, generated: 0, counts: Counts::new(), stop }
    }

    pub fn id(&self) -> Uuid {
        self.job.id
    }

    /// Nobody wants the rest.
    pub fn abandoned(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.events.is_closed()
    }

    /// The next piece of the prompt and whether it is the last one; `None` once the prompt is in the cache.
    pub fn piece(&self) -> Option<(std::ops::Range<usize>, bool)> {
        let (start, end) = (self.cache.length, self.job.prompt.len());
        (start < end).then(|| (start..end.min(start + PIECE), start + PIECE >= end))
    }

    pub fn prompt(&self) -> &[u32] {
        &self.job.prompt
    }

    pub fn last(&self) -> u32 {
        self.last
    }

    /// Draws the next token and sends it; gives the reason if it was the last one.
    pub fn draw(&mut self, logits: &[f32], tokenizer: &Tokenizer) -> Result<Option<Finish>, SampleError> {
        let found = candidates(logits, &self.job.params, &self.counts)?;
        let choice = choose(&found, self.job.params.temperature, self.job.seed, self.generated)?;
        let token = choice.token;
        self.last = token;
        self.generated += 1;
        *self.counts.entry(token).or_default() += 1;
        // The channel has room for every token; a closed one shows at the next step.
        let _ = self.events.try_send(Event::Token { token, fingerprint: Fingerprint::of(&choice) });
        let finish = if self.job.end_tokens.contains(&token) {
            Some(Finish::Eos)
        } else if self.stop.push(tokenizer.token_bytes(token)).is_some() {
            Some(Finish::Stop)
        } else if self.generated >= self.job.max_tokens {
            Some(Finish::Length)
        } else {
            None
        };
        Ok(finish)
    }

    pub fn end(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}
