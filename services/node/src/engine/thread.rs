//! The engine's loop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use infera_prompt::Tokenizer;
use infera_protocol::request::Finish;

use super::error::EngineError;
use super::model::{Model, Step};
use super::sequence::Sequence;
use super::weights::ROWS;
use super::{Active, Event, Start};

pub(super) struct Worker {
    model: Model,
    tokenizer: Arc<Tokenizer>,
    active: Active,
    sequences: Vec<Sequence>,
}

/// A sequence's place in the list and how it ended.
type Ended = (usize, Result<Finish, EngineError>);

impl Worker {
    pub fn new(model: Model, tokenizer: Arc<Tokenizer>, active: Active) -> Self {
        Self { model, tokenizer, active, sequences: Vec::new() }
    }

    /// Works until the engine is dropped.
    pub fn run(mut self, inbox: &Receiver<Start>) {
        while self.admit(inbox) {
            self.sweep();
            self.prefill();
            self.decode();
        }
        for sequence in self.sequences.drain(..) {
            self.active.lock().remove(&sequence.id());
        }
    }

    /// Takes new jobs, waiting for one if there is nothing to do; false when the engine is dropped.
    fn admit(&mut self, inbox: &Receiver<Start>) -> bool {
        loop {
            let start = if self.sequences.is_empty() {
                match inbox.recv() {
                    Ok(start) => start,
                    Err(_) => return false,
                }
            } else {
                match inbox.try_recv() {
                    Ok(start) => start,
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            };
            // The last token is never written to the cache.
            let capacity = start.job.prompt.len() + start.job.max_tokens as usize - 1;
            match self.model.cache(capacity) {
                Ok(cache) => self.sequences.push(Sequence::new(start, cache)),
                Err(e) => {
                    self.active.lock().remove(&start.job.id);
                    let _ = start.events.try_send(Event::Failed { reason: EngineError::from(e).to_string() });
                }
            }
        }
    }

    /// Drops the sequences that nobody waits for.
    fn sweep(&mut self) {
        let active = &self.active;
        self.sequences.retain(|s| {
            let keep = !s.abandoned();
            if !keep {
                active.lock().remove(&s.id());
            }
            keep
        });
    }

    /// One piece of the prompt of the oldest sequence that has one.
    fn prefill(&mut self) {
        let Some(at) = self.sequences.iter().position(|s| s.piece().is_some()) else { return };
        if let Some(end) = self.prefill_piece(at).transpose() {
            self.finish(vec![(at, end)]);
        }
    }

    fn prefill_piece(&mut self, at: usize) -> Result<Option<Finish>, EngineError> {
        let sequence = &mut self.sequences[at];
        let Some((range, last)) = sequence.piece() else { return Ok(None) };
        let tokens = sequence.prompt()[range].to_vec();
        let logits = self.model.prefill(&tokens, &mut sequence.cache, last)?;
        match logits {
            Some(logits) => Ok(sequence.draw(&logits, &self.tokenizer)?),
            None => Ok(None),
        }
    }

    /// One token for every sequence that is past its prompt.
    fn decode(&mut self) {
        let ready: Vec<usize> =
            (0..self.sequences.len()).filter(|i| self.sequences[*i].piece().is_none()).collect();
        let mut ended: Vec<Ended> = Vec::new();
        for group in ready.chunks(ROWS) {
            self.decode_group(group, &mut ended);
        }
        self.finish(ended);
    }

    fn decode_group(&mut self, group: &[usize], ended: &mut Vec<Ended>) {
        let mut steps: Vec<Step<'_>> = Vec::with_capacity(group.len());
        for (i, sequence) in self.sequences.iter_mut().enumerate() {
            if group.contains(&i) {
                steps.push(Step { token: sequence.last(), cache: &mut sequence.cache });
            }
        }
        match self.model.decode(&mut steps) {
            Err(e) => {
                let reason = e.to_string();
                ended.extend(group.iter().map(|i| (*i, Err(EngineError::Thread(reason.clone())))));
            }
            Ok(all) => {
                for (i, logits) in group.iter().zip(all) {
                    match self.sequences[*i].draw(&logits, &self.tokenizer) {
                        Ok(None) => {}
                        Ok(Some(finish)) => ended.push((*i, Ok(finish))),
                        Err(e) => ended.push((*i, Err(e.into()))),
                    }
                }
            }
        }
    }

    /// Frees the slots of ended sequences, then tells their receivers.
    fn finish(&mut self, mut ended: Vec<Ended>) {
        ended.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        for (at, how) in ended {
            let sequence = self.sequences.remove(at);
            self.active.lock().remove(&sequence.id());
            sequence.end(match how {
                Ok(finish) => Event::Finished { finish },
                Err(e) => Event::Failed { reason: e.to_string() },
            });
        }
    }
}
