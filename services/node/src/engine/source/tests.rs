//! Files that are broken, cut off, hostile or labelled as something else.

use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::shape::Activation;
use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a small model with another config.json.
fn with_config(name: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let folder = TempDir::new().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

fn refusal(path: &Path) -> String {
    Source::open(path).unwrap_err().to_string()
}

/// A safetensors file of a header and `data` zeros.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn read(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, String> {
    safetensors::header(&mut &bytes[..], bytes.len() as u64, 0).map_err(|e| format!("{e:?}"))
}

#[test]
fn shapes_are_read_from_both_formats_alike() {
    for name in ["llama", "mistral", "qwen2", "qwen3", "gemma3"] {
        let (a, b) =
            (Source::open(&fixture(name)).unwrap(), Source::open(&fixture(&format!("{name}.gguf"))).unwrap());
        // GGUF has f32 where config.json has decimals.
        let rounded = |s: Shape| Shape { norm_eps: f64::from(s.norm_eps as f32), ..s };
        assert_eq!(rounded(a.shape()), rounded(b.shape()), "{name}");
        assert_eq!(a.speeds().unwrap(), b.speeds().unwrap(), "{name}");
        for (part, rows, cols) in Name::all(&a.shape()) {
            let same = a.matrix(part, rows, cols).unwrap().dequantise()
                == b.matrix(part, rows, cols).unwrap().dequantise();
            assert!(same, "{name}: {part:?}");
        }
    }
    let gemma = Source::open(&fixture("gemma3")).unwrap().shape();
    assert_eq!((gemma.activation, gemma.scaling), (Activation::GeluTanh, Scaling::Linear(4.0)));
    assert_eq!(
        (0..6).map(|i| gemma.reach(i)).collect::<Vec<_>>(),
        [[Some(6); 5].as_slice(), &[None]].concat()
    );
    let (a, b) = (Source::open(&fixture("llama3")).unwrap(), Source::open(&fixture("llama3.gguf")).unwrap());
    assert_eq!((a.shape().head, b.shape().head, b.shape().scaling), (32, 32, Scaling::Table));
    for (a, b) in a.speeds().unwrap().full.iter().zip(b.speeds().unwrap().full) {
        assert!((a - b).abs() <= 1e-6 * a, "{a} {b}");
    }
}

#[test]
fn packed_matrices_are_counted_for_the_memory() {
    for name in ["quantised.gguf", "llama", "gemma3.gguf", "qwen2"] {
        let source = Source::open(&fixture(name)).unwrap();
        let s = source.shape();
        let model = super::super::cpu::Model::load(&source, crate::engine::Class::Exact, 1, 16, 1).unwrap();
        let (counted, packed) = (s.packed as usize, model.packed());
        assert!(packed <= counted && counted <= packed + packed / 4, "{name}: {packed}, counted {counted}");
    }
}

#[test]
fn old_config_files_mean_the_same() {
    let now = Source::open(&fixture("gemma3")).unwrap().shape();
    let old = with_config("gemma3", |c| {
        let c = c.as_object_mut().unwrap();
        for key in ["rope_parameters", "layer_types", "architectures", "tie_word_embeddings"] {
            c.remove(key);
        }
        c.insert("rope_theta".into(), json!(1e6));
        c.insert("rope_local_base_freq".into(), json!(10000));
        c.insert("rope_scaling".into(), json!({"factor": 4.0, "rope_type": "linear", "type": "linear"}));
        c.insert("sliding_window_pattern".into(), json!(6));
    });
    assert_eq!(Source::open(old.path()).unwrap().shape(), now);
    let now = Source::open(&fixture("mistral")).unwrap().shape();
    for (given, expected) in [(json!(null), None), (json!(128), None), (json!(6), now.window)] {
        let other = with_config("mistral", |c| c["sliding_window"] = given);
        assert_eq!(Source::open(other.path()).unwrap().shape(), Shape { window: expected, ..now });
    }
    let long = with_config("mistral", |c| {
        c.as_object_mut().unwrap().remove("sliding_window");
        c["max_position_embeddings"] = json!(32768);
    });
    assert_eq!(Source::open(long.path()).unwrap().shape().window.map(|w| w.size), Some(4096));
    let scaled = with_config("gemma3", |c| c["query_pre_attn_scalar"] = json!(16));
    assert_eq!(Source::open(scaled.path()).unwrap().shape().attention_scale, 0.25);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let remove = |c: &mut Value, key: &str| drop(c.as_object_mut().unwrap().remove(key));
    type Change = Box<dyn FnOnce(&mut Value)>;
    let set = |key: &'static str, to: Value| -> Change { Box::new(move |c: &mut Value| c[key] = to) };
    for (model, change, text) in [
        ("llama", set("architectures", json!(["GPT2LMHeadModel"])), "GPT2LMHeadModel"),
        ("llama", set("architectures", json!(["Qwen2ForCausalLM"])), "q_proj.bias is missing"),
        (
            "qwen2",
            set("architectures", json!(["LlamaForCausalLM"])),
            "proj.bias in a model of the architecture llama",
        ),
        (
            "gemma3",
            set("architectures", json!(["Qwen3ForCausalLM"])),
            "windows in a model of the class Qwen3",
        ),
        ("llama", set("hidden_size", json!(65)), "asks for [256, 65]"),
        ("llama", set("hidden_size", json!(1_000_000)), "the width is 1000000"),
        ("llama", set("hidden_size", json!(-1)), "config.json: invalid value"),
        ("llama", set("hidden_size", json!("64")), "config.json: invalid type"),
        ("llama", set("num_attention_heads", json!(0)), "the number of heads is 0"),
        ("llama", set("num_attention_heads", json!(8)), "asks for"),
        ("llama", set("num_key_value_heads", json!(3)), "4 heads of 16 for queries, 3 for keys"),
        ("llama", set("num_hidden_layers", json!(1)), "tensor model.layers.1."),
        (
            "llama",
            set("num_hidden_layers", json!(3)),
            "tensor model.layers.2.input_layernorm.weight is missing",
        ),
        ("llama", set("vocab_size", json!(1 << 24)), "the vocabulary is 16777216"),
        ("llama", set("rms_norm_eps", json!(-1.0)), "the epsilon of the norms is -1"),
        ("llama", set("hidden_act", json!("relu")), "activation relu"),
        ("llama", set("attention_bias", json!(true)), "q_proj.bias is missing"),
        ("llama", set("quantization_config", json!({"bits": 4})), "quantization_config"),
        ("llama", set("partial_rotary_factor", json!(0.5)), "partial_rotary_factor"),
        ("llama", set("rope_parameters", json!({"rope_type": "yarn", "factor": 4.0})), "of type yarn"),
        ("llama", set("rope_parameters", json!({"rope_type": "linear"})), "factor is missing"),
        ("llama", set("rope_parameters", json!({"rope_type": "linear", "factor": 0.0})), "Linear(0.0)"),
        ("llama", set("rope_parameters", json!({"rope_theta": 1e300})), "the base of the rotary embedding"),
        ("llama", Box::new(move |c| remove(c, "hidden_size")), "hidden_size is missing"),
        ("llama", Box::new(|c| *c = json!([])), "config.json"),
        ("mistral", set("sliding_window", json!(0)), "a window of 0 tokens"),
        ("qwen2", set("use_sliding_window", json!(true)), "windows in a model of the class Qwen2ForCausalLM"),
        ("gemma3", set("layer_types", json!(["full_attention"])), "layer_types"),
        ("gemma3", set("final_logit_softcapping", json!(30.0)), "final_logit_softcapping"),
        ("gemma3", set("use_bidirectional_attention", json!(true)), "use_bidirectional_attention"),
        ("gemma3", set("hidden_activation", json!("gelu")), "activation gelu"),
    ] {
        let folder = with_config(model, change);
        let got = refusal(folder.path());
        assert!(got.contains(text), "{model}: {got:?} should contain {text:?}");
    }
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let one = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let good = one("F32", "[2,1]", 0, 8);
    let found = read(&file(&good, 8)).unwrap();
    assert_eq!(
        (found["w"].start, found["w"].bytes, &found["w"].dims[..]),
        (8 + good.len() as u64, 8, &[2, 1][..])
    );
    let twice = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let over = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let long = format!("[{}1]", "1,".repeat(9));
    let named = |name: &str| good.replace("\"w\"", &format!("\"{name}\""));
    for (bytes, text) in [
        (vec![1, 2, 3], "3 bytes are no safetensors file"),
        (u64::MAX.to_le_bytes().to_vec(), "a header of 18446744073709551615 bytes"),
        (b"GGUF\x03\0\0\0rest".to_vec(), "not safetensors"),
        (file(&good, 8)[..20].to_vec(), "cut off at byte 20"),
        (file(&good, 7), "lies at 0 to 8 of 7 bytes"),
        (file(&good, 9), "ends at byte"),
        (file("{", 0), "the header"),
        (file("[]", 0), "the header"),
        (file(&"[".repeat(100_000), 0), "the header"),
        (file(&one("F32", "[2,1]", 8, 0), 8), "lies at 8 to 0"),
        (file(&one("F32", "[2,1]", 0, u64::MAX), 8), "lies at"),
        (file(&one("F32", "[3]", 0, 8), 8), "has 8 bytes for the shape [3]"),
        (file(&one("F32", "[4611686018427387904,2]", 0, 8), 8), "has 8 bytes for the shape"),
        (file(&one("F32", "[-1]", 0, 8), 8), "the header"),
        (file(&one("F32", &long, 0, 4), 4), "more than 8 dimensions"),
        (file(&one("F32", "[1]", 4, 8), 8), "begins at byte"),
        (file(&one(&"x".repeat(30), "[1]", 0, 8), 8), "a name of 30 bytes"),
        (file(&named(&"n".repeat(300)), 8), "a name of more than 256 bytes"),
        (file(twice, 8), "tensor w occurs twice"),
        (file(over, 8), "begins at byte"),
    ] {
        let got = read(&bytes).unwrap_err();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
}

#[test]
fn shards_are_found_only_in_the_folder() {
    let write = |folder: &TempDir, map: Value| {
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    };
    for (map, text) in [
        (json!({"w": "../model.safetensors"}), "names the shard"),
        (json!({"w": "/etc/passwd"}), "names the shard"),
        (json!({"w": "config.json"}), "names the shard"),
        (json!({"w": "gone.safetensors"}), "gone.safetensors"),
        (json!({"w": "model-00001-of-00004.safetensors"}), "tensor w is not in the shard"),
        (json!({"w": 3}), "invalid type"),
        (json!([]), "invalid type"),
    ] {
        let folder = with_config("llama3", |_| ());
        write(&folder, map);
        let got = refusal(folder.path());
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
    let folder = with_config("llama3", |_| ());
    let (first, second) = ("model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors");
    std::fs::copy(folder.path().join(first), folder.path().join(second)).unwrap();
    assert!(
        refusal(folder.path()).contains("is in shard 0 and in model-00002"),
        "{}",
        refusal(folder.path())
    );
}

#[test]
fn paths_without_a_model_are_refused() {
    let empty = TempDir::new().unwrap();
    assert!(refusal(empty.path()).contains("config.json"));
    assert!(refusal(&empty.path().join("no.gguf")).contains("no.gguf"));
    assert!(refusal(Path::new("/dev/zero")).contains("is not a file"));
    let cut = empty.path().join("cut.gguf");
    std::fs::write(&cut, b"GG").unwrap();
    assert!(refusal(&cut).contains("config.json"));
}

#[test]
fn gguf_files_that_are_cut_off_or_mislabelled_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    let whole = std::fs::read(fixture("quantised.gguf")).unwrap();
    for length in [4, 100, 1000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        refusal(&path);
    }
    let replace = |from: &[u8], to: &[u8]| {
        let mut bytes = whole.clone();
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to);
        std::fs::write(&path, bytes).unwrap();
        refusal(&path)
    };
    assert!(replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba").contains("architecture mamba"));
    assert!(
        replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_up.wolght").contains("blk.1.ffn_up.weight is missing")
    );
    assert!(
        replace(b"blk.1.attn_v.weight", b"blk.2.attn_v.weight").contains("blk.1.attn_v.weight is missing")
    );
}

/// Opens whatever it is; what opens must also be readable to the last matrix.
fn survives(path: &Path) {
    if let Ok(source) = Source::open(path) {
        let shape = source.shape();
        let _ = source.speeds();
        for (name, rows, cols) in Name::all(&shape) {
            source.matrix(name, rows, cols).unwrap().dequantise();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changed_headers_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let folder = TempDir::new().unwrap();
        for (from, to, header) in [("quantised.gguf", "model.gguf", 3000), ("qwen2/model.safetensors", "model.safetensors", 2500)] {
            let mut bytes = std::fs::read(fixture(from)).unwrap();
            for (at, with) in &changes {
                bytes[at.index(header)] = *with;
            }
            std::fs::write(folder.path().join(to), bytes).unwrap();
        }
        std::fs::copy(fixture("qwen2/config.json"), folder.path().join("config.json")).unwrap();
        survives(&folder.path().join("model.gguf"));
        survives(folder.path());
    }

    #[test]
    fn changed_configurations_never_panic(at in any::<prop::sample::Index>(), with in prop::sample::select(b"0123456789-.eE\"[]{},:ntf ".to_vec())) {
        let folder = with_config("gemma3", |_| ());
        let path = folder.path().join("config.json");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = with;
        std::fs::write(&path, bytes).unwrap();
        survives(folder.path());
    }

    #[test]
    fn any_header_never_panics(text in "[\\[\\]{}\",:a-z0-9._-]{0,200}", data in 0usize..64) {
        let _ = read(&file(&text, data));
        let _ = read(text.as_bytes());
    }
}
