//! The families' forward passes against transformers' (`tests/fixtures/make.py`): the same model as safetensors and as
//! GGUF, prompts computed at once and token by token.

use std::path::{Path, PathBuf};

use infera_node::engine::{
    Class, Device, Engine, EngineConfig, Event, Job, engine_logits, reference_logits, torch_logits,
};
use infera_protocol::sampling::SamplingParams;
use serde::Deserialize;
use serde_json::json;

use crate::{ONE_AT_A_TIME, gemma_path, model_path};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tokens() -> Vec<u32> {
    serde_json::from_slice(&std::fs::read(fixture("tokens.json")).unwrap()).unwrap()
}

/// What transformers computed after each token.
fn expected(folder: &str, positions: usize) -> Vec<Vec<f32>> {
    let bytes = std::fs::read(fixture(folder).join("logits.bin")).unwrap();
    let all: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(all.len() % positions, 0);
    all.chunks(all.len() / positions).map(<[f32]>::to_vec).collect()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits reach from about -6 to 6; two orders of summing in f32 differ by a few millionths.
const TOLERANCE: f32 = 1e-4;

fn agrees(model: &Path, folder: &str) {
    let tokens = tokens();
    let expected = expected(folder, tokens.len());
    let spread = expected.iter().flatten().fold(0f32, |a, x| a.max(x.abs()));
    assert!(spread > 2.0, "{folder}: logits within {spread} would hide an error");
    for (at, (got, expected)) in reference_logits(model, &tokens).unwrap().iter().zip(&expected).enumerate() {
        let far = farthest(got, expected);
        assert!(far <= TOLERANCE, "{}, libtorch, token {at}: {far} of {spread}", model.display());
    }
    let whole = engine_logits(model, Class::Exact, &tokens, 1).unwrap();
    for prefilled in [1, 10, tokens.len()] {
        let got = engine_logits(model, Class::Exact, &tokens, prefilled).unwrap();
        assert!(got == whole[prefilled - 1..], "{}: cuts change bits", model.display());
        assert_eq!(got.len(), tokens.len() + 1 - prefilled);
        for (at, (got, expected)) in got.iter().zip(&expected[prefilled - 1..]).enumerate() {
            let far = farthest(got, expected);
            let name = model.display();
            assert!(
                far <= TOLERANCE,
                "{name}, {prefilled} at once, token {}: {far} of {spread}",
                at + prefilled - 1
            );
        }
    }
}

/// libtorch's forward pass of the engine, in f32: batches of next tokens, pieces from the start and in the middle.
fn libtorch_agrees(model: &Path, folder: &str) {
    let tokens = tokens();
    let expected = expected(folder, tokens.len());
    let count = tokens.len();
    for (prefilled, piece) in [(1, 1), (10, 10), (count, count), (count, 7)] {
        let got = torch_logits(model, false, &tokens, (prefilled, piece)).unwrap();
        assert_eq!(got.len(), count + 1 - prefilled);
        for (at, (got, expected)) in got.iter().zip(&expected[prefilled - 1..]).enumerate() {
            let (far, at, name) = (farthest(got, expected), at + prefilled - 1, model.display());
            assert!(far <= TOLERANCE, "{name}, {prefilled} in pieces of {piece}, token {at}: {far}");
        }
    }
    // In bf16, with its 8 bits, they are near.
    let got = torch_logits(model, true, &tokens, (count / 2, 7)).unwrap();
    let far = got.iter().zip(&expected[count / 2 - 1..]).map(|(g, e)| farthest(g, e)).fold(0.0, f32::max);
    assert!(far > TOLERANCE && far < 0.3, "{}: {far} in bf16", model.display());
}

#[test]
fn libtorch_computes_safetensors_as_transformers() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"] {
        libtorch_agrees(&fixture(family), family);
    }
}

#[test]
fn libtorch_computes_gguf_as_transformers() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"] {
        libtorch_agrees(&fixture(&format!("{family}.gguf")), family);
    }
    libtorch_agrees(&fixture("quantised.gguf"), "quantised");
}

#[test]
fn safetensors_compute_as_transformers() {
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"] {
        agrees(&fixture(family), family);
    }
    // The file itself, with config.json beside it.
    agrees(&fixture("llama/model.safetensors"), "llama");
}

#[test]
fn gguf_computes_as_transformers() {
    for family in ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"] {
        agrees(&fixture(&format!("{family}.gguf")), family);
    }
}

#[test]
fn quantised_matrices_compute_as_transformers_with_the_dequantised() {
    agrees(&fixture("quantised.gguf"), "quantised");
}

/// A copy of a model with another config.json must give other logits, or the comparisons above prove little.
#[test]
fn every_number_of_the_configuration_matters() {
    let tokens = tokens();
    for (model, key, value) in [
        ("llama", "rms_norm_eps", json!(0.05)),
        ("llama", "rope_parameters", json!({"rope_theta": 20000.0})),
        ("llama3", "rope_parameters", json!({"rope_theta": 500.0})),
        ("llama3", "rope_parameters", json!({"rope_theta": 500.0, "rope_type": "linear", "factor": 8.0})),
        ("mistral", "sliding_window", json!(7)),
        ("mistral", "sliding_window", json!(null)),
        ("gemma3", "sliding_window", json!(5)),
        ("gemma3", "query_pre_attn_scalar", json!(30)),
        ("gemma3", "rope_parameters", json!({"full_attention": {"rope_theta": 1e6}})),
        ("gemma3", "layer_types", json!(vec!["sliding_attention"; 6])),
        ("gemma3", "layer_types", json!(vec!["full_attention"; 6])),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixture(model)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value.clone();
        std::fs::write(&path, config.to_string()).unwrap();
        let got = engine_logits(folder.path(), Class::Exact, &tokens, tokens.len()).unwrap();
        let far = farthest(&got[0], &expected(model, tokens.len())[tokens.len() - 1]);
        assert!(far > 10.0 * TOLERANCE, "{model} with {key} {value} differs by {far}");
    }
}

/// The logits of a recorded model that tell whether two implementations agree.
#[derive(Deserialize)]
struct Recorded {
    tokens: Vec<u32>,
    logits: Vec<Picked>,
}

#[derive(Deserialize)]
struct Picked {
    position: usize,
    values: Vec<(usize, f32)>,
}

fn agrees_on_real_weights(model: &Path, record: &str, tolerance: f32) {
    let record: Recorded = serde_json::from_slice(&std::fs::read(fixture(record)).unwrap()).unwrap();
    let got = engine_logits(model, Class::Exact, &record.tokens, 1).unwrap();
    for picked in &record.logits {
        for (token, expected) in &picked.values {
            let far = (got[picked.position][*token] - expected).abs();
            let at = picked.position;
            assert!(far <= tolerance, "token {token} after {at}: {far} from {expected}");
        }
    }
}

/// The same records with libtorch: in f32, and in bf16 with the class's distance.
fn libtorch_agrees_on_real_weights(model: &Path, record: &str, in_bf16: f32) {
    let record: Recorded = serde_json::from_slice(&std::fs::read(fixture(record)).unwrap()).unwrap();
    for (bf16, tolerance) in [(false, 2e-3), (true, in_bf16)] {
        let got = torch_logits(model, bf16, &record.tokens, (1, 1)).unwrap();
        let mut most = 0f32;
        for picked in &record.logits {
            for (token, expected) in &picked.values {
                most = most.max((got[picked.position][*token] - expected).abs());
            }
        }
        assert!(most <= tolerance, "{}, bf16 {bf16}: {most}", model.display());
    }
}

#[test]
fn libtorch_computes_real_weights_as_transformers() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    libtorch_agrees_on_real_weights(&model_path(), "smollm2-135m-instruct-q4_1.json", 1.2);
    libtorch_agrees_on_real_weights(&gemma_path(), "gemma-3-270m-q4_k_m.json", 0.3);
}

#[test]
fn smollm2_computes_as_transformers() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    agrees_on_real_weights(&model_path(), "smollm2-135m-instruct-q4_1.json", 2e-3);
}

#[test]
fn gemma_3_270m_computes_as_transformers() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    agrees_on_real_weights(&gemma_path(), "gemma-3-270m-q4_k_m.json", 2e-3);
}

#[derive(Deserialize)]
struct Continued {
    sentence: Vec<u32>,
    greedy: Vec<u32>,
}

/// The tokens that transformers chooses; the class fast may choose others at a near-tie, but says the same.
#[test]
fn real_models_continue_a_sentence_as_transformers_does() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    for (model_path, record) in
        [(model_path(), "smollm2-135m-instruct-q4_1.json"), (gemma_path(), "gemma-3-270m-q4_k_m.json")]
    {
        let record: Continued = serde_json::from_slice(&std::fs::read(fixture(record)).unwrap()).unwrap();
        for class in [Class::Exact, Class::Fast] {
            let config = EngineConfig {
                model_path: model_path.clone(),
                class,
                device: Device::Cpu,
                slots: 1,
                scorers: 1,
                threads: 2,
                max_context: 64,
                cache_tokens: None,
                memory_limit: None,
                rounding: None,
            };
            let engine = Engine::start(config).unwrap();
            let job = Job {
                id: uuid::Uuid::now_v7(),
                prompt: record.sentence.clone(),
                params: SamplingParams::greedy(),
                max_tokens: record.greedy.len() as u32,
                stop: vec![],
                seed: 0,
                end_tokens: vec![],
                grammar: None,
            };
            let mut events = engine.generate(job).unwrap();
            let mut tokens = Vec::new();
            while let Some(event) = events.blocking_recv() {
                match event {
                    Event::Token { token, .. } => tokens.push(token),
                    Event::Finished { .. } => break,
                    Event::Failed { reason } => panic!("{reason}"),
                }
            }
            if class == Class::Exact {
                assert_eq!(tokens, record.greedy, "{}", model_path.display());
            }
            let text: Vec<u8> =
                tokens.iter().flat_map(|t| engine.tokenizer().token_bytes(*t)).copied().collect();
            let text = String::from_utf8_lossy(&text);
            assert!(text.contains("France") || text.contains("Paris"), "{}: {text}", model_path.display());
        }
    }
}
