//! The engine: token ids in, tokens with fingerprints out. One OS thread owns the model.
//!
//! Jobs join and leave between steps. A step is at most one piece of a prompt (128 tokens) and one token for every
//! sequence that is past its prompt, in groups of four rows. Where a prompt is cut depends on the prompt alone, and a
//! sequence's numbers do not depend on its neighbours; so a job gives the same tokens and the same fingerprints, bit for
//! bit, alone and in company and with any number of threads. What that takes: `Linear::forward` and `model::attention`.
//!
//! ```text
//!   generate(job) --bounded channel--> thread { prefill piece | decode step | draw } --events--> receiver of the job
//! ```

mod error;
mod model;
mod quant;
mod sequence;
mod shape;
mod source;
mod thread;
mod weights;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use infera_prompt::{Prompt, Tokenizer};
use infera_protocol::fingerprint::Fingerprint;
pub use infera_protocol::request::Finish;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::CancellationToken;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

pub use error::{Busy, EngineError};
#[doc(hidden)]
pub use model::reference_logits;
pub use shape::MemoryNeed;

use model::Model;
use shape::Shape;
use source::Source;

/// Most sequences at once.
pub const MAX_SLOTS: usize = 64;
/// Most threads.
pub const MAX_THREADS: usize = 256;

/// The numerics class: results of one class compare with the class's tolerances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// f32 throughout: honest nodes agree token by token.
    Exact,
    /// 4-bit matrices with bf16 inputs: twice as fast in a sixth of the memory. As independent of neighbours and
    /// threads as `Exact`, but measured on one kind of processor only: between kinds, expect equality up to near-ties.
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
    /// Threads of libtorch, 1 to [`MAX_THREADS`]; more than free cores collapses everything.
    pub threads: usize,
    /// Most tokens of a sequence, prompt and answer together; at most the model's context length.
    pub max_context: usize,
    /// Most bytes that the engine may need; `None` for no limit.
    pub memory_limit: Option<u64>,
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

struct Start {
    job: Job,
    events: mpsc::Sender<Event>,
    cancelled: Arc<AtomicBool>,
}

type Active = Arc<Mutex<HashMap<Uuid, Arc<AtomicBool>>>>;

/// A running engine. Dropping it ends the thread after the current step; jobs that still run are closed.
#[derive(Debug)]
pub struct Engine {
    starts: Option<SyncSender<Start>>,
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

fn set_threads(threads: usize) {
    // libtorch takes the number of threads between operations once only.
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tch::set_num_interop_threads(1));
    tch::set_num_threads(threads as i32);
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
        let no_tokenizer = || EngineError::Unsupported("a tokenizer outside a GGUF file".into());
        let tokenizer = Arc::new(Tokenizer::new(source.gguf().ok_or_else(no_tokenizer)?)?);
        // A slot has one job at a time, so that a start always finds room.
        let (starts, inbox) = sync_channel(config.slots);
        let active: Active = Arc::default();
        let (ready, loaded) = oneshot::channel();
        let (names, actives) = (tokenizer.clone(), active.clone());
        let (slots, max_context, vocabulary) = (config.slots, config.max_context, shape.vocabulary);
        let ended = CancellationToken::new();
        let ends = ended.clone().drop_guard();
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
            // Dropped when the thread ends, by a panic too.
            let _ends = ends;
            set_threads(config.threads);
            let guard = tch::no_grad_guard();
            match Model::load(&source, config.class, config.max_context) {
                Err(e) => drop(ready.send(Err(e))),
                Ok(model) => {
                    drop(source);
                    if ready.send(Ok(())).is_ok() {
                        thread::Worker::new(model, names, actives).run(&inbox);
                    }
                }
            }
            drop(guard);
        })?;
        loaded.blocking_recv().map_err(|_| EngineError::Thread("it ended while loading".into()))??;
        let thread = Some(thread);
        Ok(Self {
            starts: Some(starts),
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
        self.check(&job)?;
        let starts = self.starts.as_ref().ok_or(Busy::Stopped)?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let (events, receiver) = mpsc::channel(job.max_tokens as usize + 1);
        let id = job.id;
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
        if starts.try_send(Start { job, events, cancelled }).is_err() {
            self.active.lock().remove(&id);
            return Err(Busy::Stopped);
        }
        Ok(receiver)
    }

    fn check(&self, job: &Job) -> Result<(), Busy> {
        let impossible = |text: String| Err(Busy::Impossible(text));
        if let Err(e) = job.params.validate() {
            return impossible(e.to_string());
        }
        if job.prompt.is_empty() || job.max_tokens == 0 {
            return impossible("prompt and max_tokens must not be empty".into());
        }
        let (prompt, limit) = (job.prompt.len(), self.max_context);
        if prompt.saturating_add(job.max_tokens as usize) > limit {
            let text = format!(
                "prompt ({prompt} tokens) and max_tokens ({}) exceed the context of {limit}",
                job.max_tokens
            );
            return impossible(text);
        }
        match job.prompt.iter().find(|t| **t as usize >= self.vocabulary) {
            Some(token) => {
                impossible(format!("prompt has token {token}, the vocabulary {}", self.vocabulary))
            }
            None => Ok(()),
        }
    }

    /// Ends a job before its next token; its channel closes. Unknown ids are ignored.
    pub fn cancel(&self, id: Uuid) {
        if let Some(flag) = self.active.lock().get(&id) {
            flag.store(true, Ordering::Relaxed);
        }
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
