//! The engine: token ids in, tokens with fingerprints out. One OS thread owns the model.
//!
//! Classes `exact` and `fast` are computed by `infera_kernels` on a processor, `bf16` by libtorch on a GPU; what follows
//! about bits holds for the first two, `torch` says what differs.
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

mod backend;
mod cpu;
mod device;
mod error;
mod gate;
mod job;
mod kv;
mod logits;
mod quant;
mod reference;
mod rounding;
mod sequence;
mod shape;
mod source;
mod thread;
mod torch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use infera_prompt::{Prompt, Tokenizer};
pub use infera_protocol::request::Finish;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::CancellationToken;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

#[doc(hidden)]
pub use cpu::engine_logits;
pub use device::{Device, DeviceChoice, choose};
pub use error::{Busy, DrawError, EngineError};
pub use job::{Event, Job, Score, ScoreJob};
#[doc(hidden)]
pub use reference::reference_logits;
pub use rounding::Rounding;
pub use shape::MemoryNeed;
#[doc(hidden)]
pub use torch::torch_logits;

use gate::{Gate, Waited};
use sequence::Start;
use shape::Shape;
use source::Source;
pub(crate) use source::weight_files;

/// Most generations at once on a processor.
pub const MAX_SLOTS: usize = 64;
/// Most generations at once with libtorch.
pub const MAX_TORCH_SLOTS: usize = 256;
/// Most answers that are scored at once.
pub const MAX_SCORERS: usize = 8;
/// Most sequences at once with libtorch.
const MAX_PLACES: usize = MAX_TORCH_SLOTS + MAX_SCORERS;
/// Most threads.
pub const MAX_THREADS: usize = 256;

/// The numerics class: results of `exact` and of `fast` are equal bit for bit, on every processor; those of `bf16` are
/// equal up to near-ties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Inputs of all products, keys and values in f32.
    Exact,
    /// Inputs of 4-bit matrices rounded to 15 bits in groups of 32, keys and values to half precision: up to twice as
    /// fast, with half the cache. Logits are f32.
    Fast,
    /// Weights, activations, keys and values in bf16, sums in f32, computed by libtorch: for GPUs. Logits are f32. The
    /// batch changes the last bits, so an answer may part from another node's where two tokens are nearly as likely.
    Bf16,
}

impl Class {
    /// As it is written in hellos and configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Fast => "fast",
            Self::Bf16 => "bf16",
        }
    }

    /// Most generations at once.
    #[must_use]
    pub fn max_slots(self) -> usize {
        match self {
            Self::Exact | Self::Fast => MAX_SLOTS,
            Self::Bf16 => MAX_TORCH_SLOTS,
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
    /// What computes: a GPU computes the class bf16 alone.
    pub device: Device,
    /// Generations at once, 1 to the class's [`Class::max_slots`].
    pub slots: usize,
    /// Answers that are scored at once, beside the generations, 0 to [`MAX_SCORERS`].
    pub scorers: usize,
    /// Threads, 1 to [`MAX_THREADS`]; more than free cores makes everything slower.
    pub threads: usize,
    /// Most tokens of a sequence, prompt and answer together; at most the model's context length.
    pub max_context: usize,
    /// Tokens whose keys and values are kept, running jobs' and cached beginnings' together; `None`: `max_context` for
    /// every slot and every scorer. With less, jobs wait for each other's memory.
    pub cache_tokens: Option<usize>,
    /// Most bytes that the engine may need; `None` for no limit.
    pub memory_limit: Option<u64>,
    /// Cheaper weights than the file's, to test the network; `None` for honest work.
    pub rounding: Option<Rounding>,
}

impl EngineConfig {
    /// Blocks of the cache.
    fn blocks(&self) -> usize {
        match self.cache_tokens {
            Some(tokens) => tokens.div_ceil(kv::BLOCK),
            None => (self.slots + self.scorers) * self.max_context.div_ceil(kv::BLOCK),
        }
    }
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

/// Whose places a job takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Generate,
    Score,
}

/// A job that was taken and has not ended.
#[derive(Debug)]
struct Taken {
    lane: Lane,
    cancelled: Arc<AtomicBool>,
}

type Active = Arc<Mutex<HashMap<Uuid, Taken>>>;

/// A running engine. Dropping it ends the thread after the current step; jobs that still run are closed.
#[derive(Debug)]
pub struct Engine {
    /// `None` only wakes the thread.
    starts: Option<SyncSender<Option<Start>>>,
    gate: Arc<Gate>,
    active: Active,
    slots: usize,
    scorers: usize,
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
    let slots = if config.class == Class::Bf16 { "1 to 256" } else { "1 to 64" };
    in_range("slots", slots, config.slots, config.class.max_slots())?;
    if config.device != Device::Cpu && config.class != Class::Bf16 {
        return Err(EngineError::Device(format!("{} computes the class bf16 alone", config.device)));
    }
    if config.scorers > 0 {
        in_range("scorers", "0 to 8", config.scorers, MAX_SCORERS)?;
    }
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
    Ok(backend::memory(&shape, config))
}

impl Engine {
    /// Loads the model in a thread of its own and returns when it is ready (1 to 3 s for SmolLM2-135M).
    ///
    /// # Errors
    /// The file, the configuration or the memory that it needs; see [`EngineError`].
    pub fn start(config: EngineConfig) -> Result<Self, EngineError> {
        let (source, shape) = read_shape(&config)?;
        let need = backend::memory(&shape, &config);
        need.check(config.memory_limit)?;
        let tokenizer = Arc::new(match source.gguf() {
            Some(gguf) => Tokenizer::new(gguf)?,
            None => {
                let path = &config.model_path;
                let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
                Prompt::load(folder)?.into_tokenizer()
            }
        });
        // A place has one job at a time, so that a start always finds room; and one call to wake up.
        let (starts, inbox) = sync_channel(config.slots + config.scorers + 1);
        let (active, gate): (Active, _) = (Arc::default(), Arc::new(Gate::new()));
        let (ready, loaded) = oneshot::channel();
        let (slots, scorers, vocabulary) = (config.slots, config.scorers, shape.vocabulary);
        let max_context = backend::context(&config);
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
            scorers,
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
        self.submit(job.id, Lane::Generate, |cancelled| Start::generate(job, events, cancelled))?;
        Ok(receiver)
    }

    /// Scores an answer in one pass over it, which shares its steps with running generations and takes none of their
    /// slots. The receiver gets one score
    /// for each token of the answer, or the reason why there are none; a cancelled job's is closed.
    ///
    /// # Errors
    /// See [`Busy`]; nothing was started.
    pub fn score(&self, job: ScoreJob) -> Result<oneshot::Receiver<Result<Vec<Score>, String>>, Busy> {
        self.check(&job.prompt, job.tokens.len(), "tokens", &job.params)?;
        self.in_vocabulary("tokens", &job.tokens)?;
        let (reply, receiver) = oneshot::channel();
        self.submit(job.id, Lane::Score, |cancelled| Start::score(job, reply, cancelled))?;
        Ok(receiver)
    }

    fn submit(&self, id: Uuid, lane: Lane, make: impl FnOnce(Arc<AtomicBool>) -> Start) -> Result<(), Busy> {
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
            let taken = active.values().filter(|job| job.lane == lane).count();
            match lane {
                Lane::Generate if taken >= self.slots => return Err(Busy::Full { slots: self.slots }),
                Lane::Score if taken >= self.scorers => return Err(Busy::Scoring { scorers: self.scorers }),
                _ => active.insert(id, Taken { lane, cancelled: cancelled.clone() }),
            };
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
        if let Some(job) = self.active.lock().get(&id) {
            job.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Stops after the present step, fails all jobs with [`PREEMPTED`] and lets go of weights and cache; returns once that
    /// is done. Threads sleep from then on.
    ///
    /// # Errors
    /// [`Busy::Paused`]: the pause's end was asked for meanwhile. [`Busy::Stopped`]: the engine has ended.
    pub fn pause(&self) -> Result<(), Busy> {
        self.turn(false)
    }

    /// Loads the model again; returns when it is ready. While it cannot be loaded, because the device is still used by
    /// others for instance, it is tried again every few seconds.
    ///
    /// # Errors
    /// [`Busy::Paused`]: a pause was asked for meanwhile. [`Busy::Stopped`]: the engine has ended.
    pub fn resume(&self) -> Result<(), Busy> {
        self.turn(true)
    }

    fn turn(&self, running: bool) -> Result<(), Busy> {
        let starts = self.starts.as_ref().ok_or(Busy::Stopped)?;
        if self.gate.ask(running) {
            // A full channel has something that wakes the thread.
            let _ = starts.try_send(None);
        }
        match self.gate.wait(running) {
            Waited::Reached => Ok(()),
            Waited::Overtaken => Err(Busy::Paused),
            Waited::Ended => Err(Busy::Stopped),
        }
    }

    /// Cancelled once the engine's thread has ended, for whatever reason: it computes nothing any more.
    #[must_use]
    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Slots without a generation.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        let generating = self.active.lock().values().filter(|job| job.lane == Lane::Generate).count();
        self.slots.saturating_sub(generating)
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
        for job in self.active.lock().values() {
            job.cancelled.store(true, Ordering::Relaxed);
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
