//! A GGUF file: what its metadata say of the shape.

use std::io::BufReader;
use std::path::Path;

use infera_prompt::gguf::{Gguf, GgufError, Value};

use super::super::error::EngineError;
use super::super::shape::{Scaling, Shape, Window, unsupported};
use super::family::{FAMILIES, Family};
use super::{Source, Tensor};

/// Llama 3.1's scaling of the rotary embedding: what each speed is divided by.
pub(super) const FACTORS: &str = "rope_freqs.weight";

pub(super) fn open(path: &Path) -> Result<Source, EngineError> {
    let (file, length) = super::open(path)?;
    let gguf = Gguf::read(BufReader::with_capacity(1 << 16, &file), length)?;
    let architecture = gguf.string("general.architecture")?;
    let Some(family) = FAMILIES.iter().find(|f| f.gguf == architecture) else {
        return unsupported(format!("architecture {architecture}; computed are llama, qwen2, qwen3, gemma3"));
    };
    let shape = shape(&gguf, family)?;
    let tensors = gguf.tensors().iter().map(|(name, info)| {
        let kind = match info.kind.block() {
            Some(_) => Ok(info.kind),
            None => Err(format!("{:?}", info.kind)),
        };
        let dims = info.dims.iter().rev().copied().collect();
        (name.clone(), Tensor { file: 0, kind, dims, start: info.start, bytes: info.bytes })
    });
    let tensors = tensors.collect();
    Ok(Source { shape, family, files: vec![file], tensors, gguf: Some(gguf), rounding: None })
}

struct Metadata<'a> {
    gguf: &'a Gguf,
    architecture: &'static str,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn number(&self, key: &str) -> Result<usize, EngineError> {
        Ok(self.gguf.u32(&self.key(key))? as usize)
    }

    /// `None` if the key is absent; of another type it is an error.
    fn optional<T>(
        &self,
        key: &str,
        get: impl FnOnce(&Gguf, &str) -> Result<T, GgufError>,
    ) -> Result<Option<T>, EngineError> {
        let key = self.key(key);
        if self.gguf.get(&key).is_none() {
            return Ok(None);
        }
        Ok(Some(get(self.gguf, &key)?))
    }

    fn size(&self, key: &str) -> Result<Option<usize>, EngineError> {
        Ok(self.optional(key, Gguf::u32)?.map(|n| n as usize))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, EngineError> {
        Ok(self.optional(key, Gguf::f32)?.map(f64::from))
    }

    /// Keys that change the computation in ways that no family here has.
    fn refuse_others(&self) -> Result<(), EngineError> {
        for key in ["expert_count", "final_logit_softcapping", "attn_logit_softcapping", "logit_scale"] {
            let key = self.key(key);
            match self.gguf.get(&key) {
                None | Some(Value::Unsigned(0)) => {}
                Some(Value::Float(x)) if *x == 0.0 => {}
                Some(other) => return unsupported(format!("{key} is {other:?}")),
            }
        }
        Ok(())
    }

    fn scaling(&self) -> Result<Scaling, EngineError> {
        let kind = self.optional("rope.scaling.type", |g, k| g.string(k).map(str::to_owned))?;
        let table = self.gguf.tensor(FACTORS).is_ok();
        match kind.as_deref() {
            None | Some("none") if table => Ok(Scaling::Table),
            None | Some("none") => Ok(Scaling::None),
            Some("linear") if !table => match self.float("rope.scaling.factor")? {
                Some(factor) => Ok(Scaling::Linear(factor)),
                None => unsupported("linear scaling of the rotary embedding without a factor".into()),
            },
            Some(other) => unsupported(format!("{} is {other}", self.key("rope.scaling.type"))),
        }
    }

    fn window(&self, family: &Family, rope_base: f64, context: usize) -> Result<Option<Window>, EngineError> {
        let size = self.size("attention.sliding_window")?.filter(|size| *size > 0);
        let Some(size) = size else {
            return match family.window_rope_base {
                None => Ok(None),
                Some(_) => unsupported(format!("{} is missing", self.key("attention.sliding_window"))),
            };
        };
        if family.window_rope_base.is_none() && size >= context {
            return Ok(None);
        }
        if family.gguf.starts_with("qwen") {
            return unsupported("windows in a Qwen model".into());
        }
        let every = self.size("attention.sliding_window_pattern")?.unwrap_or(family.every);
        let base = self.float("rope.freq_base_swa")?;
        Ok(Some(Window { size, every, rope_base: base.or(family.window_rope_base).unwrap_or(rope_base) }))
    }
}

fn shape(gguf: &Gguf, family: &Family) -> Result<Shape, EngineError> {
    let m = Metadata { gguf, architecture: family.gguf };
    m.refuse_others()?;
    let (width, heads) = (m.number("embedding_length")?, m.number("attention.head_count")?);
    let (layers, context) = (m.number("block_count")?, m.number("context_length")?);
    let head = m.size("attention.key_length")?.unwrap_or(width / heads.max(1));
    let values = m.size("attention.value_length")?.unwrap_or(head);
    let rotated = m.size("rope.dimension_count")?.unwrap_or(head);
    if values != head || rotated != head {
        return unsupported(format!("heads of {head} for keys, {values} for values, {rotated} rotated"));
    }
    let rope_base = m.float("rope.freq_base")?.unwrap_or(family.rope_base);
    let window = m.window(family, rope_base, context)?;
    let scaling = m.scaling()?;
    if window.is_some() && family.window_rope_base.is_none() && scaling != Scaling::None {
        return unsupported("windows together with a scaled rotary embedding".into());
    }
    let vocabulary = gguf.tensor("token_embd.weight")?.dims.get(1).copied().unwrap_or(0);
    // The one model of this size has another scale: llama.cpp's rule for Gemma 3 27B, 1 / sqrt(width / heads).
    let scored = if family.scaled_embedding && layers == 62 {
        width as f32 / heads.max(1) as f32
    } else {
        head as f32
    };
    Shape {
        layers,
        width,
        ffn: m.number("feed_forward_length")?,
        heads,
        kv_heads: m.size("attention.head_count_kv")?.unwrap_or(heads),
        head,
        vocabulary: usize::try_from(vocabulary).unwrap_or(usize::MAX),
        context,
        rope_base,
        scaling,
        norm_eps: f64::from(gguf.f32(&m.key("attention.layer_norm_rms_epsilon"))?),
        tied: gguf.tensor("output.weight").is_err(),
        activation: family.activation,
        embedding_scale: if family.scaled_embedding { (width as f32).sqrt() } else { 1.0 },
        attention_scale: 1.0 / scored.sqrt(),
        qkv_bias: family.qkv_bias || gguf.tensor("blk.0.attn_q.bias").is_ok(),
        qk_norm: family.qk_norm,
        post_norms: family.post_norms,
        window,
        packed: 0,
    }
    .check()
}
