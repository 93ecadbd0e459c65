//! The numbers of a model and the memory that it needs.

use infera_kernels::KvPool;

use super::EngineConfig;
use super::cpu::{kv_element, step_bytes};
use super::error::EngineError;

pub(super) const MIB: u64 = 1 << 20;

/// What the gate of a feed-forward block goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

/// Layers that see only the last `size` tokens, the present one included, and turn by a base of their own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    pub size: usize,
    /// Every `every`-th layer (counted from 1) sees everything; 0: none does.
    pub every: usize,
    pub rope_base: f64,
}

/// What the speeds of the rotary embedding are divided by, in the layers that see everything.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scaling {
    None,
    /// One factor for all.
    Linear(f64),
    /// Llama 3.1's: `factor` for waves longer than `original / low` tokens, none for those shorter than
    /// `original / high`, and a line between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// A factor for each speed, in the model file.
    Table,
}

/// The dimensions of a decoder and what distinguishes its family from the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    pub layers: usize,
    pub width: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Numbers of a head; `heads * head` may differ from `width`.
    pub head: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub rope_base: f64,
    pub scaling: Scaling,
    pub norm_eps: f64,
    /// The embedding is the head.
    pub tied: bool,
    pub activation: Activation,
    /// Token embeddings are multiplied by it.
    pub embedding_scale: f32,
    /// Scores of queries and keys are multiplied by it.
    pub attention_scale: f32,
    /// Queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Each head of queries and keys is normalised before it is turned.
    pub qk_norm: bool,
    /// What attention and feed-forward give is normalised before it is added.
    pub post_norms: bool,
    pub window: Option<Window>,
    /// Bytes of all matrices as the engine packs them.
    pub packed: u64,
}

/// Bytes that an engine will hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights as they lie in memory.
    pub weights: u64,
    /// Keys and values of all blocks.
    pub cache: u64,
    /// What the largest step needs.
    pub step: u64,
}

impl MemoryNeed {
    /// All, and what the process with its libraries needs on top.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.step + 128 * MIB
    }

    pub(super) fn check(&self, limit: Option<u64>) -> Result<(), EngineError> {
        match limit {
            Some(limit) if self.total() > limit => Err(EngineError::Memory {
                need_mib: self.total() / MIB,
                weights_mib: self.weights / MIB,
                cache_mib: self.cache / MIB,
                limit_mib: limit / MIB,
            }),
            _ => Ok(()),
        }
    }
}

pub(super) fn unsupported<T>(text: String) -> Result<T, EngineError> {
    Err(EngineError::Unsupported(text))
}

/// A speed of Llama 3.1's scaling; transformers' `_compute_llama3_parameters` in f64.
fn llama3(speed: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let turns = original * speed / std::f64::consts::TAU;
    if turns < low {
        speed / factor
    } else if turns > high {
        speed
    } else {
        let smooth = (turns - low) / (high - low);
        (1.0 - smooth) * speed / factor + smooth * speed
    }
}

impl Shape {
    /// Whether the numbers are those of a model that this engine computes, and its memory can be counted.
    pub fn check(self) -> Result<Self, EngineError> {
        for (what, got, most) in [
            ("the number of layers", self.layers, 512),
            ("the width", self.width, 1 << 16),
            ("the feed-forward width", self.ffn, 1 << 18),
            ("the number of heads", self.heads, 1 << 10),
            ("the number of key-value heads", self.kv_heads, 1 << 10),
            ("the size of a head", self.head, 1 << 10),
            ("the vocabulary", self.vocabulary, 1 << 20),
            ("the context length", self.context, 1 << 20),
        ] {
            if got == 0 || got > most {
                return unsupported(format!("{what} is {got}, computed are 1 to {most}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head.is_multiple_of(2) {
            let (heads, kv, head) = (self.heads, self.kv_heads, self.head);
            return unsupported(format!("{heads} heads of {head} for queries, {kv} for keys"));
        }
        for (what, got, least, most) in [
            ("the epsilon of the norms", self.norm_eps, 0.0, 0.1),
            ("the base of the rotary embedding", self.rope_base, 1.0, 1e12),
            (
                "the windows' base of the rotary embedding",
                self.window.map_or(1.0, |w| w.rope_base),
                1.0,
                1e12,
            ),
            ("the scale of attention", f64::from(self.attention_scale), 1e-6, 1e3),
        ] {
            if !(least..=most).contains(&got) {
                return unsupported(format!("{what} is {got}, computed are {least} to {most}"));
            }
        }
        if self.window.is_some_and(|w| w.size == 0) {
            return unsupported("a window of 0 tokens".into());
        }
        let fits = match self.scaling {
            Scaling::None | Scaling::Table => true,
            Scaling::Linear(factor) => (1e-3..=1e6).contains(&factor),
            Scaling::Llama3 { factor, low, high, original } => {
                (1e-3..=1e6).contains(&factor) && low > 0.0 && high > low && high < 1e6 && original >= 1.0
            }
        };
        if fits { Ok(self) } else { unsupported(format!("a rotary embedding with {:?}", self.scaling)) }
    }

    /// How many tokens back a layer sees, the present one included; `None`: all.
    pub fn reach(&self, layer: usize) -> Option<usize> {
        let window = self.window.filter(|w| !(layer + 1).is_multiple_of(w.every))?;
        Some(window.size)
    }

    /// Angles of the rotary embedding per position, one for each pair of a head, in f64: those of the layers that see
    /// everything and those of the layers with a window. `factors` are the file's, for [`Scaling::Table`].
    pub fn speeds(&self, factors: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let plain = |base: f64| -> Vec<f64> {
            (0..self.head / 2).map(|i| libm::pow(base, -2.0 * i as f64 / self.head as f64)).collect()
        };
        let mut full = plain(self.rope_base);
        for (i, speed) in full.iter_mut().enumerate() {
            *speed = match self.scaling {
                Scaling::None => *speed,
                Scaling::Linear(factor) => *speed / factor,
                Scaling::Llama3 { factor, low, high, original } => {
                    llama3(*speed, factor, low, high, original)
                }
                Scaling::Table => *speed / factors.get(i).copied().unwrap_or(1.0),
            };
        }
        let windowed = self.window.map_or_else(Vec::new, |w| plain(w.rope_base));
        (full, windowed)
    }

    /// Outputs of the query matrix.
    pub fn query_width(&self) -> usize {
        self.heads * self.head
    }

    /// Outputs of the key matrix, and of the value matrix.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head
    }

    /// Bytes that an engine of this configuration holds once it has loaded the model; while it loads, the largest
    /// matrix is there twice more.
    pub fn memory(&self, config: &EngineConfig) -> MemoryNeed {
        let vectors =
            self.layers * (4 * self.width + self.query_width() + 2 * self.kv_width() + 2 * self.head);
        // Cosines and sines, for each of the two kinds of layers.
        let tables = config.max_context * self.head * if self.window.is_some() { 2 } else { 1 };
        let block = KvPool::block_bytes(kv_element(config.class), self.layers, self.kv_heads, self.head);
        MemoryNeed {
            weights: self.packed + 4 * (vectors + tables) as u64,
            cache: block as u64 * config.blocks() as u64,
            step: step_bytes(self),
        }
    }
}
