//! The numbers of a model and the memory that it needs.

use infera_prompt::gguf::{Gguf, Value};

use super::error::EngineError;
use super::{Class, EngineConfig};

const MIB: u64 = 1 << 20;

#[allow(dead_code)]
/// What the gate of a feed-forward block goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

#[allow(dead_code)]
/// Layers that see only the last `size` tokens, the present one included, and turn by a base of their own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    pub size: usize,
    /// Every `every`-th layer (counted from 1) sees everything; 0: none does.
    pub every: usize,
    pub rope_base: f64,
}

#[allow(dead_code)]
/// The dimensions of a decoder and what distinguishes its family from the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    pub layers: usize,
    pub width: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head: usize,
    pub vocabulary: usize,
    pub context: usize,
    pub rope_base: f64,
    pub norm_eps: f64,
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
}

/// Bytes that an engine will hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights as they lie in memory.
    pub weights: u64,
    /// Key-value caches with every slot at `max_context`.
    pub cache: u64,
}

impl MemoryNeed {
    /// Both, and what libtorch and one prefill step need on top.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.cache + 192 * MIB
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

fn unsupported<T>(text: String) -> Result<T, EngineError> {
    Err(EngineError::Unsupported(text))
}

impl Shape {
    pub fn read(gguf: &Gguf) -> Result<Self, EngineError> {
        let architecture = gguf.string("general.architecture")?;
        if architecture != "llama" {
            return unsupported(format!("architecture {architecture}, only llama is computed"));
        }
        let number = |key: &str, most: u32| -> Result<usize, EngineError> {
            let key = format!("llama.{key}");
            match gguf.u32(&key)? {
                n if n >= 1 && n <= most => Ok(n as usize),
                n => unsupported(format!("{key} is {n}, computed are 1 to {most}")),
            }
        };
        for key in ["llama.expert_count", "llama.rope.scaling.type"] {
            match gguf.get(key) {
                None | Some(Value::Unsigned(0)) => {}
                Some(Value::String(s)) if s == "none" => {}
                Some(other) => return unsupported(format!("{key} is {other:?}")),
            }
        }
        if let Some(name) = gguf.tensors().keys().find(|n| n.ends_with(".bias") || *n == "rope_freqs.weight")
        {
            return unsupported(format!("tensor {name}"));
        }
        let (width, heads) = (number("embedding_length", 1 << 16)?, number("attention.head_count", 1 << 10)?);
        let kv_heads = number("attention.head_count_kv", 1 << 10).unwrap_or(heads);
        let head = width / heads;
        let rope = number("rope.dimension_count", 1 << 10).unwrap_or(head);
        if !width.is_multiple_of(heads)
            || !heads.is_multiple_of(kv_heads)
            || rope != head
            || !head.is_multiple_of(2)
        {
            return unsupported(format!("{heads} heads, {kv_heads} for keys, width {width}, {rope} rotated"));
        }
        let embedding = gguf.tensor("token_embd.weight")?;
        let vocabulary = embedding.dims.get(1).copied().unwrap_or(0);
        if vocabulary == 0 || vocabulary > 1 << 20 {
            return unsupported(format!("a vocabulary of {vocabulary}, computed are up to 2^20"));
        }
        Ok(Self {
            layers: number("block_count", 512)?,
            width,
            ffn: number("feed_forward_length", 1 << 18)?,
            heads,
            kv_heads,
            head,
            vocabulary: vocabulary as usize,
            context: number("context_length", 1 << 20)?,
            rope_base: gguf.f32("llama.rope.freq_base").map_or(10_000.0, f64::from),
            norm_eps: f64::from(gguf.f32("llama.attention.layer_norm_rms_epsilon")?),
            tied: gguf.tensor("output.weight").is_err(),
            activation: Activation::Silu,
            embedding_scale: 1.0,
            attention_scale: 1.0 / (head as f32).sqrt(),
            qkv_bias: false,
            qk_norm: false,
            post_norms: false,
            window: None,
        })
    }

    /// Bytes of one token in a cache: keys and values of every layer in f32.
    pub fn cache_bytes(&self) -> u64 {
        (self.layers * 2 * self.kv_heads * self.head * 4) as u64
    }

    pub fn memory(&self, config: &EngineConfig) -> MemoryNeed {
        let layer = (2 * self.width * self.width)
            + (2 * self.width * self.kv_heads * self.head)
            + (3 * self.width * self.ffn);
        let per_1000 = match config.class {
            Class::Exact => 4000,
            // Nibbles, and a bf16 scale and zero for each 32.
            Class::Fast => 625,
        };
        let heads = self.vocabulary * self.width * if self.tied { 1 } else { 2 };
        MemoryNeed {
            weights: (self.layers * layer) as u64 * per_1000 / 1000 + heads as u64 * 4,
            cache: self.cache_bytes() * config.slots as u64 * config.max_context as u64,
        }
    }
}
