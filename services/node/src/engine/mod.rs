//! The engine: token ids in, tokens with fingerprints out. One OS thread owns the model.
//!
//! Jobs join and leave between steps. A step computes, in one pass over the weights, the next token of every sequence
//! that is past its prompt and a piece of every prompt that is not; memory for keys and values is taken in blocks of 16
//! tokens, and a prompt that begins like an earlier one finds its blocks filled. None of this can be seen in the results:
//! `infera_kernels` gives the same bits for a token whatever its company, however its prompt was cut, on any number of
//! threads and on any instruction set. So pieces may follow the clock, cached beginnings may be used, and [`Engine::score`]
//! sees in one pass exactly what [`Engine::generate`] saw token by token.
//!
//! ```text
//!   generate(job), score(job) --channel--> thread { admit | step: forward, draw } --events--> receiver of the job
//! ```
//!
//! `reference` is the same forward pass written with libtorch: the tests hold the kernels against it, and both against
//! transformers.

mod cpu;
mod error;
mod gate;
mod kv;
mod quant;
mod reference;
mod sequence;
mod shape;
mod source;
mod thread;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use infera_grammar::Matcher;
use infera_prompt::{Prompt, Tokenizer};
use infera_protocol::fingerprint::Fingerprint;
pub use infera_protocol::request::Finish;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::CancellationToken;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

#[doc(hidden)]
pub use cpu::engine_logits;
pub use error::{Busy, DrawError, EngineError};
#[doc(hidden)]
pub use reference::reference_logits;
pub use shape::MemoryNeed;

use gate::Gate;
use sequence::Start;
use shape::Shape;
use source::Source;

/// Most sequences at once.
pub const MAX_SLOTS: usize = 64;
/// Most threads.
pub const MAX_THREADS: usize = 256;

/// The numerics class: results of one class are equal bit for bit, on every processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Inputs of all products, keys and values in f32.
    Exact,
    /// Inputs of 4-bit matrices rounded to 15 bits in groups of 32, keys and values to half precision: up to twice as
    /// fast, with half the cache. Logits are f32.
    Fast,
}

impl Class {
    /// As it is written in hellos and configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
        }
    }
}

/// What to load and how.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// A GGUF file, or a folder with config.json and safetensors, of one of the architectures that the engine computes.
    pub model_path: PathBuf,
    /// Numerics.
    pub class: Class,
    /// Sequences at once, 1 to [`MAX_SLOTS`].
    pub slots: usize,
    /// Threads, 1 to [`MAX_THREADS`]; more than free cores makes everything slower.
    pub threads: usize,
    /// Most tokens of a sequence, prompt and answer together; at most the model's context length.
    pub max_context: usize,
    /// Tokens whose keys and values are kept, running jobs' and cached beginnings' together; `None`: `max_context` for
    /// every slot. With less, jobs wait for each other's memory.
    pub cache_tokens: Option<usize>,
    /// Most bytes that the engine may need; `None` for no limit.
    pub memory_limit: Option<u64>,
}

impl EngineConfig {
    /// Blocks of the cache.
    fn blocks(&self) -> usize {
        match self.cache_tokens {
            Some(tokens) => tokens.div_ceil(kv::BLOCK),
            None => self.slots * self.max_context.div_ceil(kv::BLOCK),
        }
    }
}

/// One generation.
#[derive(Debug, Clone)]
pub struct Job {
    /// Names it in [`Engine::cancel`].
    pub id: Uuid,
    /// Token ids of the rendered prompt.
    pub prompt: Vec<u32>,
    /// Parameters of the draw.
    pub params: SamplingParams,
    /// At least 1.
    pub max_tokens: u32,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Seed of the draw.
    pub seed: u64,
    /// Tokens that end the generation: the model registry's.
    pub end_tokens: Vec<u32>,
    /// What the answer must look like, at its beginning; made for the same end tokens.
    pub grammar: Option<Matcher>,
}

/// What a job's receiver gets: tokens, then exactly one `Finished` or `Failed`. A cancelled job's channel just closes.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The next token. The end token and the token that completes a stop string are tokens like any other.
    Token {
        /// Its id.
        token: u32,
        /// What the engine saw when it drew it.
        fingerprint: Fingerprint,
    },
    /// The generation is complete.
    Finished {
        /// Why it ended.
        finish: Finish,
    },
    /// The generation broke off for a reason of the engine's.
    Failed {
        /// In words.
        reason: String,
    },
}

/// An answer to be scored.
#[derive(Debug, Clone)]
pub struct ScoreJob {
    /// Names it in [`Engine::cancel`].
    pub id: Uuid,
    /// Token ids of the rendered prompt.
    pub prompt: Vec<u32>,
    /// The answer's tokens, at least one.
    pub tokens: Vec<u32>,
    /// Parameters of the draw that the answer claims.
    pub params: SamplingParams,
    /// Seed of that draw.
    pub seed: u64,
    /// The grammar of that draw, at its beginning. A token that it does not allow is no candidate, its margin is
    /// infinite, and what follows it is scored without the grammar.
    pub grammar: Option<Matcher>,
}

/// How one token of an answer looks to the scorer.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    /// The answer's token.
    pub token: u32,
    /// Its place among the candidates by `z + T g`, 0 for the one that the scorer draws; `None`: no candidate.
    pub rank: Option<u32>,
    /// The best candidate's `z + T g` minus the token's, in logits: 0 where the scorer draws the same.
    pub margin: f64,
    /// Log-softmax of the model's logits at the token.
    pub raw_logprob: f32,
    /// What the scorer saw at this place.
    pub fingerprint: Fingerprint,
}

/// Why a job failed that was running when the engine was paused.
pub const PREEMPTED: &str = "preempted";

/// Says that the thread has ended.
struct Ends(Arc<Gate>, CancellationToken);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.ended();
        self.1.cancel();
    }
}

type Active = Arc<Mutex<HashMap<Uuid, Arc<AtomicBool>>>>;

/// A running engine. Dropping it ends the thread after the current step; jobs that still run are closed.
#[derive(Debug)]
pub struct Engine {
    /// `None` only wakes the thread.
    starts: Option<SyncSender<Option<Start>>>,
    gate: Arc<Gate>,
    active: Active,
    slots: usize,
    max_context: usize,
    vocabulary: usize,
    need: MemoryNeed,
    tokenizer: Arc<Tokenizer>,
    thread: Option<JoinHandle<()>>,
    ended: CancellationToken,
}

fn in_range(field: &'static str, range: &'static str, got: usize, most: usize) -> Result<(), EngineError> {
    if got >= 1 && got <= most { Ok(()) } else { Err(EngineError::Setting { field, got, range }) }
}

fn read_shape(config: &EngineConfig) -> Result<(Source, Shape), EngineError> {
    in_range("slots", "1 to 64", config.slots, MAX_SLOTS)?;
    in_range("threads", "1 to 256", config.threads, MAX_THREADS)?;
    let source = Source::open(&config.model_path)?;
    let shape = source.shape();
    in_range("max_context", "1 to the model's context length", config.max_context, shape.context)?;
    if let Some(tokens) = config.cache_tokens {
        in_range("cache_tokens", "1 to 2^24", tokens, 1 << 24)?;
    }
    Ok((source, shape))
}

/// What an engine of this configuration will need, from the header of the model file alone.
///
/// # Errors
/// The file or the configuration cannot be used.
pub fn memory_need(config: &EngineConfig) -> Result<MemoryNeed, EngineError> {
    let (_, shape) = read_shape(config)?;
    Ok(shape.memory(config))
}

impl Engine {
    /// Loads the model in a thread of its own and returns when it is ready (1 to 3 s for SmolLM2-135M).
    ///
    /// # Errors
    /// The file, the configuration or the memory that it needs; see [`EngineError`].
    pub fn start(config: EngineConfig) -> Result<Self, EngineError> {
        let (source, shape) = read_shape(&config)?;
        let need = shape.memory(&config);
        need.check(config.memory_limit)?;
        let tokenizer = Arc::new(match source.gguf() {
            Some(gguf) => Tokenizer::new(gguf)?,
            None => {
                let path = &config.model_path;
                let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
                Prompt::load(folder)?.into_tokenizer()
            }
        });
        // A slot has one job at a time, so that a start always finds room; and one call to wake up.
        let (starts, inbox) = sync_channel(config.slots + 1);
        let (active, gate): (Active, _) = (Arc::default(), Arc::new(Gate::new()));
        let (ready, loaded) = oneshot::channel();
        let (slots, vocabulary) = (config.slots, shape.vocabulary);
        let max_context = config.max_context.min(config.blocks() * kv::BLOCK);
        let ended = CancellationToken::new();
        let ends = Ends(gate.clone(), ended.clone());
        let main =
            thread::Main { config, tokenizer: tokenizer.clone(), active: active.clone(), gate: gate.clone() };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            // Dropped when the thread ends, by a panic too.
            let _ends = ends;
            main.run(source, ready, &inbox);
        })?;
        loaded.blocking_recv().map_err(|_| EngineError::Thread("it ended while loading".into()))??;
        let thread = Some(thread);
        Ok(Self {
            starts: Some(starts),
            gate,
            active,
            slots,
            max_context,
            vocabulary,
            need,
            tokenizer,
            thread,
            ended,
        })
    }

    /// Starts a generation. The receiver holds all its events without a reader.
    ///
    /// # Errors
    /// See [`Busy`]; nothing was started.
    pub fn generate(&self, job: Job) -> Result<mpsc::Receiver<Event>, Busy> {
        self.check(&job.prompt, job.max_tokens as usize, "max_tokens", &job.params)?;
        let (events, receiver) = mpsc::channel(job.max_tokens as usize + 1);
        self.submit(job.id, |cancelled| Start::generate(job, events, cancelled))?;
        Ok(receiver)
    }

    /// Scores an answer in one pass over it, which shares its steps with running generations. The receiver gets one score
    /// for each token of the answer, or the reason why there are none; a cancelled job's is closed.
    ///
    /// # Errors
    /// See [`Busy`]; nothing was started.
    pub fn score(&self, job: ScoreJob) -> Result<oneshot::Receiver<Result<Vec<Score>, String>>, Busy> {
        self.check(&job.prompt, job.tokens.len(), "tokens", &job.params)?;
        self.in_vocabulary("tokens", &job.tokens)?;
        let (reply, receiver) = oneshot::channel();
        self.submit(job.id, |cancelled| Start::score(job, reply, cancelled))?;
        Ok(receiver)
    }

    fn submit(&self, id: Uuid, make: impl FnOnce(Arc<AtomicBool>) -> Start) -> Result<(), Busy> {
        let starts = self.starts.as_ref().ok_or(Busy::Stopped)?;
        if !self.gate.is_open() {
            return Err(Busy::Paused);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        {
            let mut active = self.active.lock();
            if active.contains_key(&id) {
                return Err(Busy::Duplicate(id));
            }
            if active.len() >= self.slots {
                return Err(Busy::Full { slots: self.slots });
            }
            active.insert(id, cancelled.clone());
        }
        if starts.try_send(Some(make(cancelled))).is_err() {
            self.active.lock().remove(&id);
            return Err(Busy::Stopped);
        }
        Ok(())
    }

    fn check(&self, prompt: &[u32], more: usize, field: &str, params: &SamplingParams) -> Result<(), Busy> {
        let impossible = |text: String| Err(Busy::Impossible(text));
        if let Err(e) = params.validate() {
            return impossible(e.to_string());
        }
        if prompt.is_empty() || more == 0 {
            return impossible(format!("prompt and {field} must not be empty"));
        }
        let (length, limit) = (prompt.len(), self.max_context);
        if length.saturating_add(more) > limit {
            return impossible(format!(
                "prompt ({length} tokens) and {field} ({more}) exceed the context of {limit}"
            ));
        }
        if let Some(token) = params.logit_bias.keys().next_back() {
            self.in_vocabulary("logit_bias", &[*token])?;
        }
        self.in_vocabulary("prompt", prompt)
    }

    fn in_vocabulary(&self, field: &str, tokens: &[u32]) -> Result<(), Busy> {
        match tokens.iter().find(|t| **t as usize >= self.vocabulary) {
            Some(token) => Err(Busy::Impossible(format!(
                "{field} has token {token}, the vocabulary {}",
                self.vocabulary
            ))),
            None => Ok(()),
        }
    }

    /// Ends a job before its next token; its channel closes. Unknown ids are ignored.
    pub fn cancel(&self, id: Uuid) {
        if let Some(flag) = self.active.lock().get(&id) {
            flag.store(true, Ordering::Relaxed);
        }
    }

    /// Stops after the present step, fails all jobs with [`PREEMPTED`] and lets go of weights and cache; returns once that
    /// is done. Threads sleep from then on.
    ///
    /// # Errors
    /// [`Busy::Stopped`]: the engine has ended.
    pub fn pause(&self) -> Result<(), Busy> {
        self.turn(false)
    }

    /// Loads the model again; returns when it is ready.
    ///
    /// # Errors
    /// [`Busy::Stopped`]: the engine has ended, perhaps because the model cannot be loaded any more.
    pub fn resume(&self) -> Result<(), Busy> {
        self.turn(true)
    }

    fn turn(&self, running: bool) -> Result<(), Busy> {
        let starts = self.starts.as_ref().ok_or(Busy::Stopped)?;
        if self.gate.ask(running) {
            // A full channel has something that wakes the thread.
            let _ = starts.try_send(None);
        }
        if self.gate.wait(running) { Ok(()) } else { Err(Busy::Stopped) }
    }

    /// Cancelled once the engine's thread has ended, for whatever reason: it computes nothing any more.
    #[must_use]
    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Slots without a job.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.slots.saturating_sub(self.active.lock().len())
    }

    /// Tokens that the model knows.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Bytes that were stated before loading.
    #[must_use]
    pub fn memory(&self) -> MemoryNeed {
        self.need
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.starts = None;
        for flag in self.active.lock().values() {
            flag.store(true, Ordering::Relaxed);
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has closed every job's channel already.
            let _ = thread.join();
        }
    }
}

/// The prompt of a model file: kept here so that a node loads it from the same path.
///
/// # Errors
/// See [`Prompt::load`].
pub fn prompt(config: &EngineConfig) -> Result<Prompt, EngineError> {
    Ok(Prompt::load(&config.model_path)?)
}
