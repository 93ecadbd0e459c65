use std::path::PathBuf;

use infera_prompt::gguf::Gguf;
use parking_lot::Mutex;

use super::*;

/// Threads of libtorch are a setting of the process, and more than there are cores take turns.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const FAMILIES: [&str; 6] = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Tokens of sequence `i`, all of different lengths.
fn prompt(i: usize) -> Vec<u32> {
    (0..9 + 4 * i as u32).map(|t| (t * t * 31 + t * 7 + 13 * i as u32) % 256).collect()
}

/// Bits of the logits after a prompt and after each of some more tokens, of each sequence; in groups of `together`.
fn run(model: &Model, sequences: usize, together: usize) -> Vec<Vec<u32>> {
    let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
    let mut all: Vec<Vec<u32>> = Vec::new();
    let mut caches = Vec::new();
    for i in 0..sequences {
        let mut cache = model.cache(64).unwrap();
        all.push(bits(model.prefill(&prompt(i), &mut cache, true).unwrap().unwrap()));
        caches.push(cache);
    }
    for round in 0..3u32 {
        for (group, caches) in caches.chunks_mut(together).enumerate() {
            let token = |i: usize| (round * 17 + (group * together + i) as u32 * 5) % 256;
            let mut steps: Vec<Step<'_>> =
                caches.iter_mut().enumerate().map(|(i, cache)| Step { token: token(i), cache }).collect();
            for (i, logits) in model.decode(&mut steps).unwrap().into_iter().enumerate() {
                all[group * together + i].extend(bits(logits));
            }
        }
    }
    all
}

#[test]
fn company_and_threads_change_no_bit_in_any_family() {
    let _one = ONE_AT_A_TIME.lock();
    let _guard = tch::no_grad_guard();
    for family in FAMILIES {
        let model = Model::load(&Source::open(&fixture(family)).unwrap(), Class::Exact, 64).unwrap();
        tch::set_num_threads(1);
        let alone = run(&model, 4, 1);
        for (threads, together) in [(1, 4), (2, 3), (3, 4)] {
            tch::set_num_threads(threads);
            assert!(
                run(&model, 4, together) == alone,
                "{family}: {together} together with {threads} threads"
            );
        }
    }
}

/// Greedy tokens after a prompt.
fn greedy(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut cache = model.cache(prompt.len() + count).unwrap();
    let best =
        |logits: &[f32]| (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
    let mut tokens = vec![best(&model.prefill(prompt, &mut cache, true).unwrap().unwrap())];
    while tokens.len() < count {
        let token = *tokens.last().unwrap();
        let logits = model.decode(&mut [Step { token, cache: &mut cache }]).unwrap();
        tokens.push(best(&logits[0]));
    }
    tokens
}

#[test]
fn real_models_continue_a_sentence_as_transformers_does() {
    let _one = ONE_AT_A_TIME.lock();
    let _guard = tch::no_grad_guard();
    let cache = Path::new(&std::env::var_os("HOME").unwrap()).join(".cache/infera");
    for (variable, file) in [
        ("INFERA_MODEL", "models/smollm2-135m-instruct-q4_1"),
        ("INFERA_GEMMA", "test-models/gemma-3-270m-q4_k_m"),
    ] {
        let path =
            std::env::var_os(variable).map_or_else(|| cache.join(format!("{file}.gguf")), PathBuf::from);
        let name = Path::new(file).file_name().unwrap().to_str().unwrap();
        let record = std::fs::read(fixture(&format!("{name}.json"))).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        let tokens = |key: &str| serde_json::from_value::<Vec<u32>>(record[key].clone()).unwrap();
        let model = Model::load(&Source::open(&path).unwrap(), Class::Exact, 64).unwrap();
        assert_eq!(greedy(&model, &tokens("sentence"), 24), tokens("greedy"), "{name}");
        drop(model);
        // 4-bit matrices with bf16 inputs choose other words now and then, but of the same language.
        let model = Model::load(&Source::open(&path).unwrap(), Class::Fast, 64).unwrap();
        let header = Gguf::open(&path).unwrap();
        let names = header.strings("tokenizer.ggml.tokens").unwrap();
        let text: String =
            greedy(&model, &tokens("sentence"), 24).iter().map(|t| names[*t as usize]).collect();
        assert!(text.contains("France") || text.contains("Paris"), "{name}: {text}");
    }
}
