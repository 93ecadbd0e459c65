//! The engine's loop: admit, compute one step for everybody, draw.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use infera_prompt::Tokenizer;
use parking_lot::Mutex;

use super::Active;
use super::cpu::{LOGIT_ROWS, Model, STEP_ROWS, Span};
use super::kv::Blocks;
use super::sequence::{End, Sequence, Start};

/// How long a step may take while others wait for their next token: a prompt is read in pieces of about this time.
const STEP_SECS: f64 = 0.1;
/// Rows of prompts that a step has in any case.
const LEAST_ROWS: usize = 16;

pub(super) struct Worker {
    model: Model,
    blocks: Blocks,
    tokenizer: Arc<Tokenizer>,
    active: Active,
    sequences: Vec<Sequence>,
    /// Jobs that wait for memory, first come first served.
    waiting: VecDeque<Start>,
    /// Of a row in a step with many; cuts follow it, results do not.
    row_secs: f64,
}

/// A sequence's place in the list and how it ended.
type Ended = (usize, Result<End, String>);

impl Worker {
    pub fn new(model: Model, blocks: usize, tokenizer: Arc<Tokenizer>, active: Active) -> Self {
        let blocks = Blocks::new(blocks);
        Self {
            model,
            blocks,
            tokenizer,
            active,
            sequences: Vec::new(),
            waiting: VecDeque::new(),
            row_secs: 1e-3,
        }
    }

    /// Works until the engine is dropped.
    pub fn run(mut self, inbox: &Receiver<Start>) {
        while self.receive(inbox) {
            self.sweep();
            self.admit();
            self.step();
        }
        for id in self.sequences.iter().map(Sequence::id).chain(self.waiting.iter().map(|s| s.id)) {
            self.active.lock().remove(&id);
        }
    }

    /// Takes new jobs, waiting for one if there is nothing to do; false when the engine is dropped.
    fn receive(&mut self, inbox: &Receiver<Start>) -> bool {
        loop {
            let start = if self.sequences.is_empty() && self.waiting.is_empty() {
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
            self.waiting.push_back(start);
        }
    }

    /// Drops the jobs that nobody waits for.
    fn sweep(&mut self) {
        let (active, blocks) = (&self.active, &mut self.blocks);
        self.waiting.retain(|start| {
            let keep = !start.is_abandoned();
            if !keep {
                active.lock().remove(&start.id);
            }
            keep
        });
        self.sequences.retain(|sequence| {
            let keep = !sequence.is_abandoned();
            if !keep {
                blocks.close(&sequence.table);
                active.lock().remove(&sequence.id());
            }
            keep
        });
    }

    /// Starts the jobs that there is memory for.
    fn admit(&mut self) {
        while let Some(start) = self.waiting.pop_front() {
            if let Some(table) = self.blocks.open(start.prompt(), start.capacity) {
                self.sequences.push(Sequence::new(start, table));
            } else if self.sequences.is_empty() {
                // Everything is free and it is still too little: `Engine` refuses such jobs.
                self.active.lock().remove(&start.id);
                start.fail("the cache is too small for this job");
            } else {
                self.waiting.push_front(start);
                return;
            }
        }
    }

    /// Gives every sequence its share of the step.
    fn plan(&mut self) -> usize {
        let decoding = self.sequences.iter().filter(|s| s.is_decoding()).count();
        let reading = self.sequences.len() - decoding;
        let mut rows = STEP_ROWS - decoding;
        if decoding > 0 {
            rows = rows.min(((STEP_SECS / self.row_secs) as usize).max(LEAST_ROWS));
        }
        let mut logits = LOGIT_ROWS;
        for sequence in self.sequences.iter_mut().filter(|s| s.is_decoding()) {
            logits -= sequence.plan(1, 1).1;
        }
        // Equal shares; what a short prompt leaves goes to the next one.
        let mut left = reading;
        let mut all = decoding;
        for sequence in self.sequences.iter_mut().filter(|s| !s.is_decoding()) {
            let (count, wanted) = sequence.plan(rows.div_ceil(left), (logits - (left - 1)).max(1));
            left -= 1;
            rows -= count;
            all += count;
            logits -= wanted;
        }
        if let [only] = &mut self.sequences[..] {
            only.guess();
        }
        all
    }

    fn step(&mut self) {
        if self.sequences.is_empty() {
            return;
        }
        let began = Instant::now();
        let rows = self.plan();
        let spans: Vec<Span<'_>> =
            self.sequences.iter().map(Sequence::span).filter(|s| !s.tokens.is_empty()).collect();
        self.model.forward(&spans);
        let ended = self.draw();
        for sequence in &mut self.sequences {
            let mut table = std::mem::take(&mut sequence.table);
            self.blocks.remember(&mut table, |i| sequence.token(i));
            sequence.table = table;
        }
        self.finish(ended);
        if rows >= LEAST_ROWS {
            let secs = began.elapsed().as_secs_f64() / rows as f64;
            self.row_secs += (secs - self.row_secs) * 0.25;
        }
    }

    /// Draws of all sequences, at the same time.
    fn draw(&mut self) -> Vec<Ended> {
        let (logits, cpu) = self.model.logits();
        let mut row = 0;
        let work: Vec<_> = self
            .sequences
            .iter_mut()
            .map(|sequence| {
                let first = row;
                row += sequence.logits();
                Mutex::new((sequence, first, Ok(None)))
            })
            .collect();
        let tokenizer = &self.tokenizer;
        cpu.each(work.len(), &|i| {
            let (sequence, first, outcome) = &mut *work[i].lock();
            *outcome = sequence.take(&logits, *first, tokenizer);
        });
        let outcomes = work.into_iter().map(|w| w.into_inner().2).enumerate();
        outcomes
            .filter_map(|(i, outcome)| match outcome {
                Ok(None) => None,
                Ok(Some(end)) => Some((i, Ok(end))),
                Err(e) => Some((i, Err(e.to_string()))),
            })
            .collect()
    }

    /// Frees the slots of ended sequences, then tells their receivers.
    fn finish(&mut self, ended: Vec<Ended>) {
        for (at, how) in ended.into_iter().rev() {
            let sequence = self.sequences.remove(at);
            self.blocks.close(&sequence.table);
            self.active.lock().remove(&sequence.id());
            sequence.end(how);
        }
    }
}
