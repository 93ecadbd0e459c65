//! What the engine's thread steps through: the kernels on a processor, or libtorch on a GPU.

use infera_kernels::Cpu;

use super::cpu::{self, Span};
use super::error::EngineError;
use super::kv::{Blocks, Table};
use super::logits::Logits;
use super::shape::Shape;
use super::source::Source;
use super::torch::{self, Move, Places};
use super::{Class, EngineConfig, MemoryNeed};

/// A loaded model with its cache's memory.
pub(super) enum Model {
    Cpu(Box<cpu::Model>),
    Torch(Box<torch::Model>),
}

/// Sizes of a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Rows at most.
    pub rows: usize,
    /// Rows whose logits are computed at most: one for each sequence at least.
    pub logits: usize,
    /// Whether guessed tokens are worth a row.
    pub guesses: bool,
}

/// Bytes that an engine of this configuration will hold.
pub(super) fn memory(shape: &Shape, config: &EngineConfig) -> MemoryNeed {
    match config.class {
        Class::Exact | Class::Fast => shape.memory(config),
        Class::Bf16 => torch::need(shape, config),
    }
}

/// Most tokens that a sequence can have: of its context, or of the cache if that is smaller.
pub(super) fn context(config: &EngineConfig) -> usize {
    match config.class {
        Class::Exact | Class::Fast => config.max_context.min(config.blocks() * super::kv::BLOCK),
        Class::Bf16 => config.max_context.min(config.cache_tokens.unwrap_or(usize::MAX)),
    }
}

impl Model {
    pub fn load(source: &Source, config: &EngineConfig) -> Result<Self, EngineError> {
        match config.class {
            Class::Exact | Class::Fast => {
                let (threads, context) = (config.threads, config.max_context);
                cpu::Model::load(source, config.class, threads, context, config.blocks())
                    .map(|model| Self::Cpu(Box::new(model)))
            }
            Class::Bf16 => torch::Model::load(source, config).map(|model| Self::Torch(Box::new(model))),
        }
    }

    pub fn limits(&self) -> Limits {
        match self {
            Self::Cpu(_) => Limits { rows: cpu::STEP_ROWS, logits: cpu::LOGIT_ROWS, guesses: true },
            // A guess would leave the batch whose graph is replayed.
            Self::Torch(_) => Limits { rows: torch::STEP_ROWS, logits: torch::LOGIT_ROWS, guesses: false },
        }
    }

    /// One step: writes keys and values of all tokens to the cache and computes the wanted logits, within the limits.
    pub fn forward(&mut self, spans: &[Span<'_>], moves: &[Move]) -> Result<(), EngineError> {
        match self {
            Self::Cpu(model) => {
                model.forward(spans);
                Ok(())
            }
            Self::Torch(model) => {
                model.carry_out(moves)?;
                model.forward(spans)
            }
        }
    }

    /// The logits of the last step, and the processor to work on them.
    pub fn logits(&mut self) -> (Logits<'_>, &mut Cpu) {
        match self {
            Self::Cpu(model) => model.logits(),
            Self::Torch(model) => model.logits(),
        }
    }
}

/// Whose tokens are where in the cache.
pub(super) enum Cache {
    Blocks(Blocks),
    Places(Places),
}

impl Cache {
    pub fn new(config: &EngineConfig) -> Self {
        match config.class {
            Class::Exact | Class::Fast => Self::Blocks(Blocks::new(config.blocks())),
            Class::Bf16 => {
                let (count, context) = torch::places(config);
                Self::Places(Places::new(count, context))
            }
        }
    }

    /// Room for a sequence of at most `capacity` tokens that begins with `prompt`; as much of the prompt as the cache has
    /// is in it already, but never its last token. `None` while there is none.
    pub fn open(&mut self, prompt: &[u32], capacity: usize) -> Option<Table> {
        match self {
            Self::Blocks(blocks) => blocks.open(prompt, capacity),
            Self::Places(places) => places.open(prompt, capacity),
        }
    }

    /// Makes what is in the cache by now findable.
    pub fn remember(&mut self, table: &mut Table, token: impl Fn(usize) -> u32) {
        match self {
            Self::Blocks(blocks) => blocks.remember(table, token),
            Self::Places(places) => places.remember(table, token),
        }
    }

    /// Gives a sequence's room back.
    pub fn close(&mut self, table: &Table) {
        match self {
            Self::Blocks(blocks) => blocks.close(table),
            Self::Places(places) => places.close(table),
        }
    }

    /// Arranges the sequences for the next step; gives what the model has to copy before it.
    pub fn arrange<'a>(&mut self, tables: impl Iterator<Item = &'a mut Table>) -> Vec<Move> {
        match self {
            Self::Blocks(_) => Vec::new(),
            Self::Places(places) => {
                places.compact(tables);
                places.moves()
            }
        }
    }
}
