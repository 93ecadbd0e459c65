//! BERT's encoder, as all-MiniLM-L6-v2 needs it: one sequence at a time, so no padding and no mask.

use std::collections::HashMap;
use std::path::Path;

use tch::{IndexOp, Kind, TchError, Tensor};

use crate::error::EmbedError;

const LAYERS: usize = 6;
const HEADS: i64 = 12;
const HIDDEN: i64 = 384;
const EPSILON: f64 = 1e-12;

struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_linear(&self.weight, Some(&self.bias))
    }
}

struct Norm(Linear);

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        x.f_layer_norm([HIDDEN], Some(&self.0.weight), Some(&self.0.bias), EPSILON, false)
    }
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_out: Linear,
    attention_norm: Norm,
    widen: Linear,
    narrow: Linear,
    norm: Norm,
}

impl Layer {
    /// `x`: [tokens, 384] -> the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let tokens = x.size()[0];
        // [tokens, 384] -> [1, heads, tokens, 32]
        let heads = |linear: &Linear| {
            linear.forward(x)?.f_view([1, tokens, HEADS, HIDDEN / HEADS])?.f_transpose(1, 2)
        };
        let mixed = Tensor::f_scaled_dot_product_attention(
            &heads(&self.query)?,
            &heads(&self.key)?,
            &heads(&self.value)?,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        let mixed = mixed.f_transpose(1, 2)?.f_contiguous()?.f_view([tokens, HIDDEN])?;
        let x = self.attention_norm.forward(&self.attention_out.forward(&mixed)?.f_add(x)?)?;
        let wide = self.widen.forward(&x)?.f_gelu("none")?;
        self.norm.forward(&self.narrow.forward(&wide)?.f_add(&x)?)
    }
}

/// The weights. Not `Sync`: one caller at a time.
pub(crate) struct Bert {
    words: Tensor,
    positions: Tensor,
    kind: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
}

impl Bert {
    /// Reads `model.safetensors` and runs it once, so that a wrong shape is found at start.
    pub(crate) fn load(path: &Path) -> Result<Self, EmbedError> {
        let file = |reason: String| EmbedError::File { path: path.to_owned(), reason };
        if !path.is_file() {
            return Err(file("it does not exist".to_owned()));
        }
        let mut weights: HashMap<String, Tensor> =
            Tensor::read_safetensors(path).map_err(|e| file(e.to_string()))?.into_iter().collect();
        let bert = Self::take(&mut weights).map_err(file)?;
        bert.embed(&[101, 102]).map_err(|e| file(e.to_string()))?;
        Ok(bert)
    }

    fn take(weights: &mut HashMap<String, Tensor>) -> Result<Self, String> {
        let mut tensor = |name: String| {
            let found = weights.remove(&name).ok_or_else(|| format!("tensor {name} is missing"))?;
            Ok::<_, String>(found.to_kind(Kind::Float))
        };
        let mut linear = |name: String| {
            Ok::<_, String>(Linear {
                weight: tensor(format!("{name}.weight"))?,
                bias: tensor(format!("{name}.bias"))?,
            })
        };
        let mut layers = Vec::with_capacity(LAYERS);
        for i in 0..LAYERS {
            let mut part = |name: &str| linear(format!("encoder.layer.{i}.{name}"));
            layers.push(Layer {
                query: part("attention.self.query")?,
                key: part("attention.self.key")?,
                value: part("attention.self.value")?,
                attention_out: part("attention.output.dense")?,
                attention_norm: Norm(part("attention.output.LayerNorm")?),
                widen: part("intermediate.dense")?,
                narrow: part("output.dense")?,
                norm: Norm(part("output.LayerNorm")?),
            });
        }
        let norm = Norm(linear("embeddings.LayerNorm".into())?);
        Ok(Self {
            words: tensor("embeddings.word_embeddings.weight".into())?,
            positions: tensor("embeddings.position_embeddings.weight".into())?,
            // Every text is a first segment: one row of the table.
            kind: tensor("embeddings.token_type_embeddings.weight".into())?
                .f_i(0)
                .map_err(|e| e.to_string())?,
            norm,
            layers,
        })
    }

    /// Mean of the last layer over all tokens, scaled to length 1. `ids` is not empty.
    pub(crate) fn embed(&self, ids: &[i64]) -> Result<Vec<f32>, TchError> {
        tch::no_grad(|| {
            let count = i64::try_from(ids.len()).unwrap_or(i64::MAX);
            let words = self.words.f_index_select(0, &Tensor::f_from_slice(ids)?)?;
            let positions = self.positions.f_narrow(0, 0, count)?;
            let mut x = self.norm.forward(&words.f_add(&positions)?.f_add(&self.kind)?)?;
            for layer in &self.layers {
                x = layer.forward(&x)?;
            }
            let mean = x.f_mean_dim(0, false, Kind::Float)?;
            let unit = mean.f_div(&mean.f_norm()?)?;
            Vec::<f32>::try_from(unit)
        })
    }
}
