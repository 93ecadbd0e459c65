//! The engine's loop: admit, compute one step for everybody, draw.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use infera_prompt::Tokenizer;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::backend::{Cache, Model};
use super::cpu::Span;
use super::error::EngineError;
use super::gate::Gate;
use super::sequence::{End, Sequence, Start};
use super::source::Source;
use super::{Active, EngineConfig, PREEMPTED, torch};

/// How long a step may take while others wait for their next token: a prompt is read in pieces of about this time.
const STEP_SECS: f64 = 0.1;
/// How long to wait before a model that could not be loaded after a pause is loaded again.
const AGAIN: Duration = Duration::from_secs(3);
/// Rows of prompts that a step has in any case.
const LEAST_ROWS: usize = 16;

/// What the engine's thread needs.
pub(super) struct Main {
    pub config: EngineConfig,
    pub tokenizer: Arc<Tokenizer>,
    pub active: Active,
    pub gate: Arc<Gate>,
}

type Inbox = Receiver<Option<Start>>;

impl Main {
    /// Loads, says so, and works until the engine is dropped, with pauses in between.
    pub fn run(self, source: Source, ready: oneshot::Sender<Result<(), EngineError>>, inbox: &Inbox) {
        let mut model = match self.load(source) {
            Ok(model) => model,
            Err(e) => return drop(ready.send(Err(e))),
        };
        if ready.send(Ok(())).is_err() {
            return;
        }
        loop {
            match Worker::new(model, &self).run(inbox) {
                After::Pause => {}
                After::End => return,
                After::Failure(error) => return tracing::error!(%error, "the engine can't go on"),
            }
            // The model is gone by now.
            torch::release(&self.config);
            self.gate.reached(false);
            let mut load = || {
                let loaded = Source::open(&self.config.model_path).and_then(|source| self.load(source));
                if loaded.is_err() {
                    torch::release(&self.config);
                }
                loaded
            };
            let sleep = Sleep { active: &self.active, gate: &self.gate, inbox };
            let Some(loaded) = sleep.then(&mut load, AGAIN) else { return };
            model = loaded;
            self.gate.reached(true);
        }
    }

    fn load(&self, source: Source) -> Result<Model, EngineError> {
        Model::load(&source.rounded(self.config.rounding), &self.config)
    }
}

/// A pause of the engine's thread.
struct Sleep<'a> {
    active: &'a Active,
    gate: &'a Gate,
    inbox: &'a Inbox,
}

impl Sleep<'_> {
    /// What `load` gives after the pause, `again` after each time that it fails: the owner may not have let go of the
    /// device yet. `None` when the engine is dropped.
    fn then<T>(&self, load: &mut dyn FnMut() -> Result<T, EngineError>, again: Duration) -> Option<T> {
        let mut wait = None;
        while self.until_open(wait) {
            if !self.gate.begins() {
                wait = None;
                continue;
            }
            match load() {
                Ok(loaded) => return Some(loaded),
                Err(error) => tracing::warn!(%error, "the model can't be loaded yet, trying again"),
            }
            self.gate.reached(false);
            wait = Some(again);
        }
        None
    }

    /// Until the end of a pause; with `wait`, so long, and until the end of a pause that began meanwhile. False when the
    /// engine is dropped.
    fn until_open(&self, wait: Option<Duration>) -> bool {
        let mut until = wait.map(|wait| Instant::now() + wait);
        loop {
            let received = match until {
                Some(until) => self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())),
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match received {
                Ok(start) => {
                    if let Some(start) = start {
                        self.active.lock().remove(&start.id);
                        start.fail(PREEMPTED);
                    }
                    if until.is_none() && self.gate.is_open() {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Timeout) if self.gate.is_open() => return true,
                Err(RecvTimeoutError::Timeout) => until = None,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}

/// What follows when a worker stops.
enum After {
    Pause,
    /// The engine is dropped.
    End,
    /// The device computes nothing any more.
    Failure(EngineError),
}

struct Worker<'a> {
    main: &'a Main,
    model: Model,
    cache: Cache,
    sequences: Vec<Sequence>,
    /// Jobs that wait for memory, first come first served.
    waiting: VecDeque<Start>,
    /// Of a row in a step with many; cuts follow it, results do not.
    row_secs: f64,
}

/// A sequence's place in the list and how it ended.
type Ended = (usize, Result<End, String>);

impl<'a> Worker<'a> {
    fn new(model: Model, main: &'a Main) -> Self {
        let cache = Cache::new(&main.config);
        Self { main, model, cache, sequences: Vec::new(), waiting: VecDeque::new(), row_secs: 1e-3 }
    }

    /// Works until a pause, until the engine is dropped, or until a step fails.
    fn run(mut self, inbox: &Inbox) -> After {
        let (mut goes_on, mut failure) = (true, None);
        while goes_on && failure.is_none() && self.main.gate.is_open() {
            goes_on = self.receive(inbox);
            self.sweep();
            self.admit();
            failure = self.step().err();
        }
        let reason = failure.as_ref().map_or_else(|| PREEMPTED.to_owned(), ToString::to_string);
        for sequence in self.sequences.drain(..) {
            self.main.active.lock().remove(&sequence.id());
            if goes_on {
                sequence.end(Err(reason.clone()));
            }
        }
        for start in self.waiting.drain(..) {
            self.main.active.lock().remove(&start.id);
            if goes_on {
                start.fail(&reason);
            }
        }
        match failure {
            Some(error) => After::Failure(error),
            None if goes_on => After::Pause,
            None => After::End,
        }
    }

    /// Takes new jobs, waiting for one if there is nothing to do; false when the engine is dropped.
    fn receive(&mut self, inbox: &Inbox) -> bool {
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
            match start {
                Some(start) => self.waiting.push_back(start),
                None => return true,
            }
        }
    }

    /// Drops the jobs that nobody waits for.
    fn sweep(&mut self) {
        let (active, cache) = (&self.main.active, &mut self.cache);
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
                cache.close(&sequence.table);
                active.lock().remove(&sequence.id());
            }
            keep
        });
    }

    /// Starts the jobs that there is memory for.
    fn admit(&mut self) {
        while let Some(start) = self.waiting.pop_front() {
            if let Some(table) = self.cache.open(start.prompt(), start.capacity) {
                self.sequences.push(Sequence::new(start, table));
            } else if self.sequences.is_empty() {
                // Everything is free and it is still too little: `Engine` refuses such jobs.
                self.main.active.lock().remove(&start.id);
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
        let limits = self.model.limits();
        let mut rows = limits.rows.saturating_sub(decoding);
        if decoding > 0 {
            rows = rows.min(((STEP_SECS / self.row_secs) as usize).max(LEAST_ROWS));
        }
        let mut logits = limits.logits;
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
        if let ([only], true) = (&mut self.sequences[..], limits.guesses) {
            only.guess();
        }
        all
    }

    fn step(&mut self) -> Result<(), EngineError> {
        if self.sequences.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let moves = self.cache.arrange(self.sequences.iter_mut().map(|s| &mut s.table));
        let rows = self.plan();
        let spans: Vec<Span<'_>> =
            self.sequences.iter().map(Sequence::span).filter(|s| !s.tokens.is_empty()).collect();
        self.model.forward(&spans, &moves)?;
        let ended = self.draw();
        for sequence in &mut self.sequences {
            let mut table = std::mem::take(&mut sequence.table);
            self.cache.remember(&mut table, |i| sequence.token(i));
            sequence.table = table;
        }
        self.finish(ended);
        if rows >= LEAST_ROWS {
            let secs = began.elapsed().as_secs_f64() / rows as f64;
            self.row_secs += (secs - self.row_secs) * 0.25;
        }
        Ok(())
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
        let tokenizer = &self.main.tokenizer;
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
            self.cache.close(&sequence.table);
            self.main.active.lock().remove(&sequence.id());
            sequence.end(how);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::super::gate::Waited;
    use super::*;

    #[test]
    fn a_model_that_cannot_be_loaded_after_a_pause_is_tried_until_it_can() {
        let (active, gate): (Active, _) = (Arc::default(), Gate::new());
        let (starts, inbox) = sync_channel(4);
        let sleep = Sleep { active: &active, gate: &gate, inbox: &inbox };
        gate.ask(false);
        gate.reached(false);
        // Two calls of a pause that is over: the first one wakes up.
        gate.ask(true);
        starts.send(None).unwrap();
        let (mut tries, steps) = (0, Mutex::new(Vec::new()));
        let loaded = std::thread::scope(|scope| {
            let mut load = || {
                tries += 1;
                if tries == 2 {
                    // The owner pauses it again, and lets it go on once it is told that nothing is held any more.
                    gate.ask(false);
                    let (gate, starts, steps) = (&gate, &starts, &steps);
                    scope.spawn(move || {
                        assert_eq!(gate.wait(false), Waited::Reached);
                        steps.lock().push("paused");
                        gate.ask(true);
                        starts.send(None).unwrap();
                    });
                    for _ in 0..1_000 {
                        std::thread::yield_now();
                    }
                    steps.lock().push("let go");
                }
                if tries < 3 { Err(EngineError::Device("the owner's".into())) } else { Ok(tries) }
            };
            sleep.then(&mut load, Duration::from_millis(1))
        });
        assert_eq!((loaded, steps.into_inner()), (Some(3), vec!["let go", "paused"]));
        drop(starts);
        assert_eq!(sleep.then(&mut || Ok(()), Duration::ZERO), None, "the engine is dropped");
    }

    #[test]
    fn a_wait_for_the_model_ends_when_the_opposite_is_asked_for() {
        let gate = Gate::new();
        gate.ask(false);
        gate.reached(false);
        gate.ask(true);
        std::thread::scope(|scope| {
            let resumed = scope.spawn(|| gate.wait(true));
            gate.ask(false);
            assert_eq!(resumed.join().unwrap(), Waited::Overtaken);
        });
        gate.ended();
        assert_eq!(gate.wait(true), Waited::Ended);
    }
}
