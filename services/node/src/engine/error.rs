use infera_grammar::GrammarError;
use infera_prompt::PromptError;
use infera_prompt::gguf::GgufError;
use infera_protocol::sampling::SampleError;
use thiserror::Error;
use uuid::Uuid;

/// Why an engine does not start or a generation fails.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The model file cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Its tokenizer cannot be used.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// Reading a file of the model failed.
    #[error("cannot read the model file: {0}")]
    Io(#[from] std::io::Error),
    /// A file of the model is broken or does not belong to it.
    #[error("not a usable model: {0}")]
    Format(String),
    /// The model has something that this engine does not compute.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// A setting is out of range.
    #[error("{field} is {got}, allowed are {range}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: usize,
        /// What is allowed.
        range: &'static str,
    },
    /// More memory needed than allowed.
    #[error(
        "the model needs {need_mib} MiB ({weights_mib} MiB of weights, {cache_mib} MiB of cache for all slots), \
         allowed are {limit_mib} MiB: lower slots or max_context, take the class fast, or raise the limit"
    )]
    Memory {
        /// Total.
        need_mib: u64,
        /// Weights.
        weights_mib: u64,
        /// Key-value caches.
        cache_mib: u64,
        /// The limit.
        limit_mib: u64,
    },
    /// The device is not there, has too little memory, or failed.
    #[error("{0}")]
    Device(String),
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// The logits cannot be drawn from.
    #[error(transparent)]
    Draw(#[from] DrawError),
    /// The engine's thread cannot be started or is gone.
    #[error("the engine's thread: {0}")]
    Thread(String),
}

/// Why there is no next token.
#[derive(Debug, Error)]
pub enum DrawError {
    /// The logits cannot be drawn from.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The grammar allows nothing.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
}

/// Why a job is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Busy {
    /// All slots are taken.
    #[error("all {slots} slots are taken")]
    Full {
        /// How many there are.
        slots: usize,
    },
    /// As many answers are scored as may be at once.
    #[error("all {scorers} places for scoring are taken")]
    Scoring {
        /// How many there are.
        scorers: usize,
    },
    /// A job with this id runs already.
    #[error("job {0} runs already")]
    Duplicate(Uuid),
    /// The job breaks a limit; no node of this configuration can do it.
    #[error("{0}")]
    Impossible(String),
    /// The engine is paused.
    #[error("the engine is paused")]
    Paused,
    /// The engine has ended.
    #[error("the engine has ended")]
    Stopped,
}
