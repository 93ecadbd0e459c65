//! Models of any shape: what opens is computed by the kernels as libtorch computes it, and nothing panics.

use std::path::Path;

use infera_node::engine::{Class, engine_logits, reference_logits};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

#[derive(Debug, Clone)]
struct Small {
    class: &'static str,
    layers: usize,
    width: usize,
    ffn: usize,
    kv_heads: usize,
    /// Query heads for each of them.
    group: usize,
    /// Half a head.
    half: usize,
    vocabulary: usize,
    window: usize,
    tied: bool,
    half_precision: bool,
}

fn small() -> impl Strategy<Value = Small> {
    let classes = [
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma3ForCausalLM",
    ];
    let sides = (1usize..=3, 1usize..=70, 1usize..=70, 1usize..=3, 1usize..=3, 1usize..=20);
    let rest = (2usize..=60, 1usize..=12, any::<bool>(), any::<bool>());
    (prop::sample::select(classes.to_vec()), sides, rest).prop_map(
        |(class, (layers, width, ffn, kv_heads, group, half), (vocabulary, window, tied, half_precision))| {
            Small {
                class,
                layers,
                width,
                ffn,
                kv_heads,
                group,
                half,
                vocabulary,
                window,
                tied,
                half_precision,
            }
        },
    )
}

impl Small {
    fn config(&self) -> Value {
        json!({
            "architectures": [self.class],
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.kv_heads * self.group,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 2 * self.half,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "sliding_window": self.window,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 2 * self.half,
        })
    }

    /// Names and shapes, as transformers names them.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (w, head) = (self.width, 2 * self.half);
        let (q, kv) = (self.kv_heads * self.group * head, self.kv_heads * head);
        let mut layer = vec![
            ("input_layernorm.weight", vec![w]),
            ("post_attention_layernorm.weight", vec![w]),
            ("self_attn.q_proj.weight", vec![q, w]),
            ("self_attn.k_proj.weight", vec![kv, w]),
            ("self_attn.v_proj.weight", vec![kv, w]),
            ("self_attn.o_proj.weight", vec![w, q]),
            ("mlp.gate_proj.weight", vec![self.ffn, w]),
            ("mlp.up_proj.weight", vec![self.ffn, w]),
            ("mlp.down_proj.weight", vec![w, self.ffn]),
        ];
        if self.class.starts_with("Qwen2") {
            let biases = [("q", q), ("k", kv), ("v", kv)];
            let names = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
            layer.extend(names.into_iter().zip(biases.map(|(_, size)| vec![size])));
        }
        if self.class.starts_with("Qwen3") || self.class.starts_with("Gemma3") {
            layer.extend([("self_attn.q_norm.weight", vec![head]), ("self_attn.k_norm.weight", vec![head])]);
        }
        if self.class.starts_with("Gemma3") {
            let names = ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"];
            layer.extend(names.map(|n| (n, vec![w])));
        }
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocabulary, w]),
            ("model.norm.weight".to_owned(), vec![w]),
        ];
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocabulary, w]));
        }
        for i in 0..self.layers {
            all.extend(layer.iter().map(|(n, shape)| (format!("model.layers.{i}.{n}"), shape.clone())));
        }
        all
    }

    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config().to_string()).unwrap();
        let (mut header, mut data, mut state) = (Map::new(), Vec::new(), 1u32);
        for (name, shape) in self.tensors() {
            let start = data.len();
            let inputs = if shape.len() == 2 { shape[1] } else { 4 };
            for _ in 0..shape.iter().product::<usize>() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (f64::from(state >> 8) / f64::from(1 << 23) - 1.0) * 2.0 / (inputs as f64).sqrt();
                let x = if name.contains("norm") { 0.5 + x } else { x } as f32;
                match self.half_precision {
                    true => data.extend(&x.to_le_bytes()[2..]),
                    false => data.extend(x.to_le_bytes()),
                }
            }
            let dtype = if self.half_precision { "BF16" } else { "F32" };
            header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]}));
        }
        let header = Value::Object(header).to_string();
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn kernels_compute_any_shape_as_libtorch_does(model in small(), prefilled in 1usize..=18) {
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path());
        let tokens: Vec<u32> = (0..18u32).map(|i| (i * i * 7 + i) % model.vocabulary as u32).collect();
        let expected = reference_logits(folder.path(), &tokens).unwrap();
        let got = engine_logits(folder.path(), Class::Exact, &tokens, prefilled).unwrap();
        for (at, (got, expected)) in got.iter().zip(&expected[prefilled - 1..]).enumerate() {
            for (got, expected) in got.iter().zip(expected) {
                let far = (got - expected).abs();
                prop_assert!(far <= 1e-4 * expected.abs().max(4.0), "token {at}: {got}, libtorch {expected}");
            }
        }
        engine_logits(folder.path(), Class::Fast, &tokens, prefilled).unwrap();
    }
}
