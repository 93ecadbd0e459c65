//! What distinguishes the families, as data, and what their tensors are called.

use super::super::shape::{Activation, Shape};

/// A matrix or vector of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Part {
    AttnNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    Output,
    PostAttnNorm,
    FfnNorm,
    Gate,
    Up,
    Down,
    PostFfnNorm,
}

/// A matrix or vector of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Name {
    Embedding,
    Norm,
    /// Absent where the embedding is the head.
    Head,
    /// Of the layer with this index.
    Layer(usize, Part),
}

impl Name {
    /// Everything that a model of this shape has: (name, rows, cols), vectors with one row.
    pub fn all(s: &Shape) -> Vec<(Self, usize, usize)> {
        let mut parts = vec![
            (Part::AttnNorm, 1, s.width),
            (Part::Q, s.query_width(), s.width),
            (Part::K, s.kv_width(), s.width),
            (Part::V, s.kv_width(), s.width),
            (Part::Output, s.width, s.query_width()),
            (Part::FfnNorm, 1, s.width),
            (Part::Gate, s.ffn, s.width),
            (Part::Up, s.ffn, s.width),
            (Part::Down, s.width, s.ffn),
        ];
        if s.qkv_bias {
            let (q, kv) = (s.query_width(), s.kv_width());
            parts.extend([(Part::QBias, 1, q), (Part::KBias, 1, kv), (Part::VBias, 1, kv)]);
        }
        if s.qk_norm {
            parts.extend([(Part::QNorm, 1, s.head), (Part::KNorm, 1, s.head)]);
        }
        if s.post_norms {
            parts.extend([(Part::PostAttnNorm, 1, s.width), (Part::PostFfnNorm, 1, s.width)]);
        }
        let mut all = vec![(Self::Embedding, s.vocabulary, s.width), (Self::Norm, 1, s.width)];
        if !s.tied {
            all.push((Self::Head, s.vocabulary, s.width));
        }
        for layer in 0..s.layers {
            all.extend(parts.iter().map(|(part, rows, cols)| (Self::Layer(layer, *part), *rows, *cols)));
        }
        all
    }

    pub fn is_norm(self) -> bool {
        match self {
            Self::Norm => true,
            Self::Embedding | Self::Head => false,
            Self::Layer(_, part) => matches!(
                part,
                Part::AttnNorm
                    | Part::QNorm
                    | Part::KNorm
                    | Part::PostAttnNorm
                    | Part::FfnNorm
                    | Part::PostFfnNorm
            ),
        }
    }
}

/// A family of models. The values that transformers takes where config.json is silent are its classes' (version 5).
#[derive(Debug, PartialEq)]
pub(super) struct Family {
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// `architectures` in config.json.
    pub class: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    pub activation: Activation,
    /// Always there; other families may have it.
    pub qkv_bias: bool,
    pub qk_norm: bool,
    pub post_norms: bool,
    /// Token embeddings are multiplied by the square root of the width.
    pub scaled_embedding: bool,
    /// GGUF has the rows of queries and keys in the order that turns neighbours against each other.
    pub permuted_in_gguf: bool,
    /// Safetensors have the norms less 1; GGUF never has.
    pub norms_less_one: bool,
    /// Where config.json does not say.
    pub tied: bool,
    /// Where config.json does not say; `None`: the width over the heads.
    pub head: Option<usize>,
    /// Of the layers that see everything, where the file does not say.
    pub rope_base: f64,
    /// Tokens of a window where config.json does not say; `None`: the family has no windows.
    pub window: Option<usize>,
    /// Every how many layers one sees everything, where the file does not say.
    pub every: usize,
    /// Of the layers with a window, where the file does not say; `None`: as the others.
    pub window_rope_base: Option<f64>,
}

const LLAMA: Family = Family {
    gguf: "llama",
    class: "LlamaForCausalLM",
    model_type: "llama",
    activation: Activation::Silu,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    scaled_embedding: false,
    permuted_in_gguf: true,
    norms_less_one: false,
    tied: false,
    head: None,
    rope_base: 10_000.0,
    window: None,
    every: 0,
    window_rope_base: None,
};

/// A GGUF file of a Mistral model calls itself llama.
pub(super) static FAMILIES: [Family; 5] = [
    LLAMA,
    Family { class: "MistralForCausalLM", model_type: "mistral", window: Some(4096), ..LLAMA },
    Family {
        gguf: "qwen2",
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        qkv_bias: true,
        permuted_in_gguf: false,
        ..LLAMA
    },
    Family {
        gguf: "qwen3",
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        qk_norm: true,
        permuted_in_gguf: false,
        head: Some(128),
        ..LLAMA
    },
    Family {
        gguf: "gemma3",
        class: "Gemma3ForCausalLM",
        model_type: "gemma3_text",
        activation: Activation::GeluTanh,
        qk_norm: true,
        post_norms: true,
        scaled_embedding: true,
        permuted_in_gguf: false,
        norms_less_one: true,
        tied: true,
        head: Some(256),
        rope_base: 1_000_000.0,
        window: Some(4096),
        every: 6,
        window_rope_base: Some(10_000.0),
        ..LLAMA
    },
];

impl Family {
    pub fn in_gguf(&self, name: Name) -> String {
        let (layer, part) = match name {
            Name::Embedding => return "token_embd.weight".into(),
            Name::Norm => return "output_norm.weight".into(),
            Name::Head => return "output.weight".into(),
            Name::Layer(layer, part) => (layer, part),
        };
        let text = match part {
            Part::AttnNorm => "attn_norm.weight",
            Part::Q => "attn_q.weight",
            Part::K => "attn_k.weight",
            Part::V => "attn_v.weight",
            Part::QBias => "attn_q.bias",
            Part::KBias => "attn_k.bias",
            Part::VBias => "attn_v.bias",
            Part::QNorm => "attn_q_norm.weight",
            Part::KNorm => "attn_k_norm.weight",
            Part::Output => "attn_output.weight",
            Part::PostAttnNorm => "post_attention_norm.weight",
            Part::FfnNorm => "ffn_norm.weight",
            Part::Gate => "ffn_gate.weight",
            Part::Up => "ffn_up.weight",
            Part::Down => "ffn_down.weight",
            Part::PostFfnNorm => "post_ffw_norm.weight",
        };
        format!("blk.{layer}.{text}")
    }

    pub fn in_safetensors(&self, name: Name) -> String {
        let (layer, part) = match name {
            Name::Embedding => return "model.embed_tokens.weight".into(),
            Name::Norm => return "model.norm.weight".into(),
            Name::Head => return "lm_head.weight".into(),
            Name::Layer(layer, part) => (layer, part),
        };
        let text = match part {
            Part::AttnNorm => "input_layernorm.weight",
            Part::Q => "self_attn.q_proj.weight",
            Part::K => "self_attn.k_proj.weight",
            Part::V => "self_attn.v_proj.weight",
            Part::QBias => "self_attn.q_proj.bias",
            Part::KBias => "self_attn.k_proj.bias",
            Part::VBias => "self_attn.v_proj.bias",
            Part::QNorm => "self_attn.q_norm.weight",
            Part::KNorm => "self_attn.k_norm.weight",
            Part::Output => "self_attn.o_proj.weight",
            Part::FfnNorm if self.post_norms => "pre_feedforward_layernorm.weight",
            Part::FfnNorm | Part::PostAttnNorm => "post_attention_layernorm.weight",
            Part::Gate => "mlp.gate_proj.weight",
            Part::Up => "mlp.up_proj.weight",
            Part::Down => "mlp.down_proj.weight",
            Part::PostFfnNorm => "post_feedforward_layernorm.weight",
        };
        format!("model.layers.{layer}.{text}")
    }
}
