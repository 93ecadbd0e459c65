//! One job in the engine: what it has so far, what the next step computes for it, and when it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use infera_grammar::Matcher;
use infera_prompt::{StopMatcher, Tokenizer};
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::margin::{Place, standing};
use infera_protocol::request::Finish;
use infera_protocol::sampling::{Candidate, Counts, SamplingParams, choose};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::cpu::Span;
use super::error::DrawError;
use super::kv::Table;
use super::logits::{Logits, Row, needs_all};
use super::{Event, Job, Score, ScoreJob};

/// Longest run of tokens that is looked up to guess the next one.
const NGRAM: usize = 3;

/// What a sequence is for.
pub(super) enum Purpose {
    Generate { events: mpsc::Sender<Event>, max_tokens: u32, stop: StopMatcher, end_tokens: Vec<u32> },
    Score { scores: Vec<Score>, reply: Option<oneshot::Sender<Result<Vec<Score>, String>>> },
}

pub(super) struct Sequence {
    /// Its tokens grow with the answer, its grammar goes along.
    job: Start,
    pub table: Table,
    counts: Counts,
    /// What the step computes: tokens that follow those in the cache.
    step: Vec<u32>,
    /// Rows of logits that the step gives.
    logits: usize,
    /// Guessed tokens at the end of `step`.
    guessed: usize,
    /// Guesses so far that were right, and all.
    guesses: (u32, u32),
}

/// What ended a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Finished(Finish),
    Scored,
}

/// A job; at first with nothing computed.
pub(super) struct Start {
    pub id: Uuid,
    cancelled: Arc<AtomicBool>,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    /// Tokens of the prompt.
    prompt: usize,
    params: SamplingParams,
    seed: u64,
    /// Where the answer stands in its grammar.
    grammar: Option<Matcher>,
    /// Tokens whose keys and values will be in the cache at the end.
    pub capacity: usize,
    purpose: Purpose,
}

impl Start {
    pub fn generate(job: Job, events: mpsc::Sender<Event>, cancelled: Arc<AtomicBool>) -> Self {
        let stop = StopMatcher::new(&job.stop);
        let (max_tokens, end_tokens) = (job.max_tokens, job.end_tokens);
        Self {
            id: job.id,
            cancelled,
            prompt: job.prompt.len(),
            // The last token is never written to the cache.
            capacity: job.prompt.len() + max_tokens as usize - 1,
            tokens: job.prompt,
            params: job.params,
            seed: job.seed,
            grammar: job.grammar,
            purpose: Purpose::Generate { events, max_tokens, stop, end_tokens },
        }
    }

    pub fn score(
        job: ScoreJob,
        reply: oneshot::Sender<Result<Vec<Score>, String>>,
        cancelled: Arc<AtomicBool>,
    ) -> Self {
        let prompt = job.prompt.len();
        let tokens = [job.prompt, job.tokens].concat();
        Self {
            id: job.id,
            cancelled,
            prompt,
            capacity: tokens.len() - 1,
            tokens,
            params: job.params,
            seed: job.seed,
            grammar: job.grammar,
            purpose: Purpose::Score { scores: Vec::new(), reply: Some(reply) },
        }
    }

    /// The tokens that may be in the cache already: an answer to be scored is not taken from there.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt]
    }

    /// Nobody wants it any more.
    pub fn is_abandoned(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.purpose.is_closed()
    }

    pub fn fail(mut self, reason: &str) {
        self.purpose.fail(reason);
    }
}

impl Purpose {
    fn is_closed(&self) -> bool {
        match self {
            Self::Generate { events, .. } => events.is_closed(),
            Self::Score { reply, .. } => reply.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    fn fail(&mut self, reason: &str) {
        match self {
            Self::Generate { events, .. } => {
                let _ = events.try_send(Event::Failed { reason: reason.to_owned() });
            }
            Self::Score { reply, .. } => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(Err(reason.to_owned()));
                }
            }
        }
    }
}

impl Sequence {
    pub fn new(job: Start, table: Table) -> Self {
        Self { job, table, counts: Counts::new(), step: Vec::new(), logits: 0, guessed: 0, guesses: (0, 0) }
    }

    pub fn id(&self) -> Uuid {
        self.job.id
    }

    pub fn token(&self, i: usize) -> u32 {
        self.job.tokens[i]
    }

    /// Nobody wants the rest.
    pub fn is_abandoned(&self) -> bool {
        self.job.is_abandoned()
    }

    /// Tokens that are known and not in the cache.
    fn pending(&self) -> usize {
        let known = match self.job.purpose {
            Purpose::Generate { .. } => self.job.tokens.len(),
            // Nothing follows the last one.
            Purpose::Score { .. } => self.job.tokens.len() - 1,
        };
        known - self.table.length
    }

    /// Whether it only waits for its next token; otherwise a prompt or an answer has to be read first.
    pub fn is_decoding(&self) -> bool {
        matches!(self.job.purpose, Purpose::Generate { .. }) && self.pending() == 1
    }

    /// Plans a step of at most `rows` tokens with at most `logits` rows of logits; gives both counts.
    pub fn plan(&mut self, rows: usize, logits: usize) -> (usize, usize) {
        let start = self.table.length;
        let mut count = self.pending().min(rows);
        // Rows from this one on say something about a token of the answer.
        let first = match self.job.purpose {
            Purpose::Generate { .. } => self.job.tokens.len() - 1,
            Purpose::Score { .. } => self.job.prompt - 1,
        };
        count = count.min(first.max(start) + logits - start);
        self.step.clear();
        self.step.extend_from_slice(&self.job.tokens[start..start + count]);
        self.logits = (start + count).saturating_sub(first.max(start));
        self.guessed = 0;
        (count, self.logits)
    }

    /// Adds a guess of the token after the next one: what followed the last time that the same tokens stood here. A wrong
    /// one costs a row, a right one saves a step; the drawn tokens are the same either way.
    pub fn guess(&mut self) {
        let Purpose::Generate { max_tokens, .. } = self.job.purpose else { return };
        let (right, all) = self.guesses;
        let left = (self.job.prompt + max_tokens as usize).saturating_sub(self.job.tokens.len());
        if !self.is_decoding() || left < 2 || (all >= 8 && right * 4 < all) {
            return;
        }
        let end = self.job.tokens.len();
        let found = (2..=NGRAM).rev().find_map(|n| {
            let last = self.job.tokens.get(end.checked_sub(n)?..)?;
            let before = &self.job.tokens[..end - 1];
            before.windows(n).rposition(|w| w == last).map(|at| self.job.tokens[at + n])
        });
        if let Some(token) = found {
            self.step.push(token);
            self.guessed = 1;
            self.logits += 1;
        }
    }

    /// What the model has to compute.
    pub fn span(&self) -> Span<'_> {
        Span {
            tokens: &self.step,
            position: self.table.length,
            blocks: &self.table.blocks,
            logits: self.logits,
            whole: matches!(self.job.purpose, Purpose::Score { .. })
                || needs_all(&self.job.params, self.job.grammar.is_some()),
        }
    }

    pub fn logits(&self) -> usize {
        self.logits
    }

    /// Takes the step's logits, of which the first is row `first`; gives the reason if the sequence has ended.
    pub fn take(
        &mut self,
        logits: &Logits<'_>,
        first: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Option<End>, DrawError> {
        if matches!(self.job.purpose, Purpose::Score { .. }) {
            let start = self.table.length;
            self.table.length += self.step.len();
            for i in 0..self.logits {
                let position = start + self.step.len() - self.logits + i + 1;
                self.score(logits.row(first + i), position)?;
            }
            return Ok((self.pending() == 0).then_some(End::Scored));
        }
        self.table.length += self.step.len() - self.guessed;
        if self.logits == 0 {
            return Ok(None);
        }
        for i in 0..=self.guessed {
            let (token, finish) = self.draw(logits.row(first + i), tokenizer)?;
            if finish.is_some() {
                return Ok(finish.map(End::Finished));
            }
            if i < self.guessed {
                let right = self.step[self.step.len() - self.guessed + i] == token;
                self.guesses.1 += 1;
                if !right {
                    break;
                }
                self.guesses.0 += 1;
                self.table.length += 1;
            }
        }
        Ok(None)
    }

    /// Draws the next token and sends it; gives the reason if it was the last one.
    fn draw(&mut self, logits: Row<'_>, tokenizer: &Tokenizer) -> Result<(u32, Option<Finish>), DrawError> {
        let generated = self.job.tokens.len() - self.job.prompt;
        let found = self.candidates(logits)?;
        let choice = choose(&found, self.job.params.temperature, self.job.seed, generated as u32)?;
        let token = choice.token;
        self.job.tokens.push(token);
        *self.counts.entry(token).or_default() += 1;
        let Purpose::Generate { events, max_tokens, stop, end_tokens } = &mut self.job.purpose else {
            return Ok((token, None));
        };
        // The channel has room for every token; a closed one shows at the next step.
        let _ = events.try_send(Event::Token { token, fingerprint: Fingerprint::of(&choice) });
        let ended = end_tokens.contains(&token);
        let only_the_end = match &mut self.job.grammar {
            Some(grammar) if !ended => grammar.push(token)?,
            _ => false,
        };
        let finish = if ended {
            Some(Finish::Eos)
        } else if stop.push(tokenizer.token_bytes(token)).is_some() {
            Some(Finish::Stop)
        } else if only_the_end {
            Some(Finish::Grammar)
        } else if generated + 1 >= *max_tokens as usize {
            Some(Finish::Length)
        } else {
            None
        };
        Ok((token, finish))
    }

    fn candidates(&mut self, logits: Row<'_>) -> Result<Vec<Candidate>, DrawError> {
        let mask = self.job.grammar.as_mut().map(Matcher::mask).transpose()?;
        Ok(logits.candidates(&self.job.params, &self.counts, mask.as_ref())?)
    }

    /// Scores the token at `position` of the sequence from the logits before it.
    fn score(&mut self, logits: Row<'_>, position: usize) -> Result<(), DrawError> {
        let token = self.job.tokens[position];
        let mask = self.job.grammar.as_mut().map(Matcher::mask).transpose()?;
        let place = Place {
            logits: logits.whole(),
            params: &self.job.params,
            emitted: &self.counts,
            mask: mask.as_ref(),
            seed: self.job.seed,
            position: (position - self.job.prompt) as u32,
        };
        let standing = standing(&place, token)?;
        let forbidden = self.forbids(token)?;
        *self.counts.entry(token).or_default() += 1;
        if let Purpose::Score { scores, .. } = &mut self.job.purpose {
            scores.push(Score {
                token,
                rank: standing.rank.map(|rank| rank as u32),
                margin: if forbidden { f64::INFINITY } else { standing.margin },
                raw_logprob: standing.raw_logprob,
                fingerprint: Fingerprint::of(&standing.choice),
            });
        }
        Ok(())
    }

    /// Takes a token of an answer into the grammar. True if it was not allowed: from there on there is none to keep to.
    fn forbids(&mut self, token: u32) -> Result<bool, DrawError> {
        let Some(grammar) = &mut self.job.grammar else { return Ok(false) };
        let allowed = grammar.allows(token)?;
        if !allowed || grammar.ends_with(token) {
            self.job.grammar = None;
        } else {
            grammar.push(token)?;
        }
        Ok(!allowed)
    }

    /// Tells whoever waits.
    pub fn end(mut self, how: Result<End, String>) {
        match (how, &mut self.job.purpose) {
            (Ok(End::Finished(finish)), Purpose::Generate { events, .. }) => {
                let _ = events.try_send(Event::Finished { finish });
            }
            (Ok(_), Purpose::Score { scores, reply }) => {
                if let Some(reply) = reply.take() {
                    let _ = reply.send(Ok(std::mem::take(scores)));
                }
            }
            (Err(reason), purpose) => purpose.fail(&reason),
            (Ok(End::Scored), Purpose::Generate { .. }) => {}
        }
    }
}
