//! config.json: what it says of the shape, read as transformers (version 4 or 5) reads it.

use serde::{Deserialize, Deserializer};

use super::super::error::EngineError;
use super::super::shape::{Activation, Scaling, Shape, Window, unsupported};
use super::family::{FAMILIES, Family};

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// Keys that are used; others describe training, sampling or a program.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    attention_bias: Option<bool>,
    rope_theta: Option<f64>,
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    /// Absent and null differ.
    #[serde(deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    quantization_config: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    full_attention: Option<Box<Rope>>,
    sliding_attention: Option<Box<Rope>>,
}

fn present<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Option<usize>>, D::Error> {
    Ok(Some(Option::deserialize(input)?))
}

fn need<T>(value: Option<T>, key: &str) -> Result<T, EngineError> {
    value.ok_or_else(|| EngineError::Format(format!("config.json: {key} is missing")))
}

impl Config {
    pub fn read(bytes: &[u8]) -> Result<Self, EngineError> {
        serde_json::from_slice(bytes).map_err(|e| EngineError::Format(format!("config.json: {e}")))
    }

    pub fn family(&self) -> Result<&'static Family, EngineError> {
        let classes = self.architectures.as_deref().unwrap_or_default();
        let found = match classes {
            [] => FAMILIES.iter().find(|f| self.model_type.as_deref() == Some(f.model_type)),
            [class] => FAMILIES.iter().find(|f| f.class == class),
            _ => None,
        };
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.class).collect();
        found.map_or_else(
            || {
                let (classes, kind) = (&self.architectures, &self.model_type);
                unsupported(format!(
                    "config.json: architectures {classes:?}, model_type {kind:?}; computed are {}",
                    known.join(", ")
                ))
            },
            Ok,
        )
    }

    fn refuse_others(&self, family: &Family) -> Result<(), EngineError> {
        let activation = match family.activation {
            Activation::Silu => (&self.hidden_act, "silu"),
            Activation::GeluTanh => (&self.hidden_activation, "gelu_pytorch_tanh"),
        };
        if let (Some(got), expected) = activation
            && got != expected
        {
            return unsupported(format!("config.json: activation {got}, computed is {expected}"));
        }
        for (key, there) in [
            ("attn_logit_softcapping", self.attn_logit_softcapping.is_some()),
            ("final_logit_softcapping", self.final_logit_softcapping.is_some()),
            ("use_bidirectional_attention", self.use_bidirectional_attention == Some(true)),
            ("quantization_config", self.quantization_config.is_some()),
            ("partial_rotary_factor", self.partial_rotary_factor.is_some_and(|f| f != 1.0)),
        ] {
            if there {
                return unsupported(format!("config.json: {key}"));
            }
        }
        Ok(())
    }

    /// The parameters of the layers that see everything.
    fn rope(&self) -> Rope {
        let (now, old) = (self.rope_parameters.as_ref(), self.rope_scaling.as_ref());
        let nested = now.and_then(|r| r.full_attention.as_deref());
        nested.or(now).or(old).cloned().unwrap_or_default()
    }

    fn scaling(&self, rope: &Rope, context: usize) -> Result<Scaling, EngineError> {
        if rope.partial_rotary_factor.is_some_and(|f| f != 1.0) {
            return unsupported("config.json: partial_rotary_factor".into());
        }
        match rope.rope_type.as_deref().or(rope.old_type.as_deref()) {
            None | Some("default") => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear(need(rope.factor, "the rotary embedding's factor")?)),
            Some("llama3") => Ok(Scaling::Llama3 {
                factor: need(rope.factor, "the rotary embedding's factor")?,
                low: need(rope.low_freq_factor, "low_freq_factor")?,
                high: need(rope.high_freq_factor, "high_freq_factor")?,
                original: rope.original_max_position_embeddings.unwrap_or(context as f64),
            }),
            Some(other) => unsupported(format!(
                "config.json: a rotary embedding of type {other}; computed are default, linear, llama3"
            )),
        }
    }

    /// Every how many layers one sees everything.
    fn every(&self, family: &Family, layers: usize) -> Result<usize, EngineError> {
        let Some(types) = &self.layer_types else {
            return Ok(self.sliding_window_pattern.unwrap_or(family.every));
        };
        let every = types.iter().position(|t| t == FULL).map_or(0, |at| at + 1);
        let fits = |(i, kind): (usize, &String)| {
            let full = every > 0 && (i + 1) % every == 0;
            kind == if full { FULL } else { SLIDING }
        };
        if types.len() != layers || !types.iter().enumerate().all(fits) {
            return unsupported(format!(
                "config.json: layer_types that do not repeat every {every} of {layers}"
            ));
        }
        Ok(every)
    }

    fn window(
        &self,
        family: &Family,
        rope_base: f64,
        (layers, context): (usize, usize),
    ) -> Result<Option<Window>, EngineError> {
        let Some(default) = family.window else {
            let slides = self.layer_types.as_ref().is_some_and(|t| t.iter().any(|t| t != FULL));
            if slides || self.use_sliding_window == Some(true) {
                return unsupported(format!("config.json: windows in a model of the class {}", family.class));
            }
            return Ok(None);
        };
        let Some(size) = self.sliding_window.unwrap_or(Some(default)) else {
            return match family.window_rope_base {
                None => Ok(None),
                Some(_) => unsupported("config.json: sliding_window is null".into()),
            };
        };
        let Some(base) = family.window_rope_base else {
            if self.layer_types.as_ref().is_some_and(|t| t.iter().any(|t| t != SLIDING)) {
                return unsupported(format!(
                    "config.json: layer_types in a model of the class {}",
                    family.class
                ));
            }
            return Ok((size < context).then_some(Window { size, every: 0, rope_base }));
        };
        let nested = self.rope_parameters.as_ref().and_then(|r| r.sliding_attention.as_deref());
        if let Some(nested) = nested
            && self.scaling(nested, context)? != Scaling::None
        {
            return unsupported("config.json: a scaled rotary embedding in layers with a window".into());
        }
        let given = nested.and_then(|r| r.rope_theta).or(self.rope_local_base_freq);
        Ok(Some(Window { size, every: self.every(family, layers)?, rope_base: given.unwrap_or(base) }))
    }

    pub fn shape(&self, family: &Family) -> Result<Shape, EngineError> {
        self.refuse_others(family)?;
        let (width, heads) =
            (need(self.hidden_size, "hidden_size")?, need(self.num_attention_heads, "num_attention_heads")?);
        let layers = need(self.num_hidden_layers, "num_hidden_layers")?;
        let context = need(self.max_position_embeddings, "max_position_embeddings")?;
        let head = self.head_dim.or(family.head).unwrap_or(width / heads.max(1));
        let rope = self.rope();
        let rope_base = rope.rope_theta.or(self.rope_theta).unwrap_or(family.rope_base);
        let scaling = self.scaling(&rope, context)?;
        let window = self.window(family, rope_base, (layers, context))?;
        if window.is_some() && family.window_rope_base.is_none() && scaling != Scaling::None {
            return unsupported("config.json: windows together with a scaled rotary embedding".into());
        }
        let scored = match family.scaled_embedding {
            true => self.query_pre_attn_scalar.unwrap_or(256.0),
            false => head as f64,
        };
        Shape {
            layers,
            width,
            ffn: need(self.intermediate_size, "intermediate_size")?,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head,
            vocabulary: need(self.vocab_size, "vocab_size")?,
            context,
            rope_base,
            scaling,
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            tied: self.tie_word_embeddings.unwrap_or(family.tied),
            activation: family.activation,
            embedding_scale: if family.scaled_embedding { (width as f32).sqrt() } else { 1.0 },
            attention_scale: (1.0 / scored.sqrt()) as f32,
            qkv_bias: family.qkv_bias || self.attention_bias == Some(true),
            qk_norm: family.qk_norm,
            post_norms: family.post_norms,
            window,
            packed: 0,
        }
        .check()
    }
}
