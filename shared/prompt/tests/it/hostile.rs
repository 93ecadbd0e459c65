//! Files that lie about themselves.

use infera_prompt::gguf::{GgmlType, Gguf, GgufError, Value};
use infera_prompt::{Message, Prompt, PromptError};
use proptest::prelude::*;

use crate::memory::peak_of;
use crate::support::{Vocabulary, fixture, gguf_with_template, header, string, tensor};

fn read(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(bytes, bytes.len() as u64)
}

fn with_tensor(tensor: &[u8], data: usize) -> Vec<u8> {
    let mut file = [&header(3, 1, 0)[..], tensor].concat();
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

#[test]
fn a_small_file_is_read() {
    let mut file = header(3, 1, 2);
    file.extend([string("a.b"), 4u32.to_le_bytes().into(), 7u32.to_le_bytes().into()].concat());
    file.extend([string("list"), 9u32.to_le_bytes().into(), 5u32.to_le_bytes().into()].concat());
    file.extend([&2u64.to_le_bytes()[..], &(-1i32).to_le_bytes(), &5i32.to_le_bytes()].concat());
    file.extend(tensor("w", &[32, 2], 3, 0));
    let data = file.len().next_multiple_of(32);
    file.resize(data + 40, 1);
    let gguf = read(&file).unwrap();
    assert_eq!(gguf.u32("a.b").unwrap(), 7);
    assert_eq!(gguf.get("list"), Some(&Value::Array(vec![Value::Signed(-1), Value::Signed(5)])));
    assert_eq!(gguf.integers("list").unwrap(), [-1, 5]);
    let w = gguf.tensor("w").unwrap();
    assert_eq!((w.kind, w.start, w.bytes), (GgmlType::Q4_1, data as u64, 40));
    assert_eq!(gguf.string("a.b").unwrap_err().to_string(), "GGUF metadata key a.b is not text");
    assert_eq!(gguf.u32("no").unwrap_err().to_string(), "GGUF metadata key no is missing");
    assert_eq!(gguf.tensor("no").unwrap_err().to_string(), "GGUF tensor no: is missing");
    let bare = Prompt::new(&gguf).unwrap_err();
    assert!(matches!(bare, PromptError::Gguf(GgufError::Key { .. })), "{bare}");
}

#[test]
fn lies_are_refused_without_allocating() {
    let entry =
        |kind: u32, rest: &[u8]| [&header(3, 0, 1)[..], &string("k"), &kind.to_le_bytes(), rest].concat();
    let huge = u64::MAX.to_le_bytes();
    for (file, text) in [
        (b"GGML".to_vec(), "does not begin with GGUF"),
        (b"GG".to_vec(), "cut off at byte 2"),
        (header(1, 0, 0), "version 1"),
        (header(3, u64::MAX, 0), "number of tensors is 18446744073709551615"),
        (header(3, 0, u64::MAX), "number of metadata entries"),
        (entry(8, &huge), "length of a string"),
        (entry(8, &(1u64 << 20).to_le_bytes()), "cut off"),
        (entry(9, &[&4u32.to_le_bytes()[..], &huge].concat()), "length of an array"),
        (entry(9, &[&4u32.to_le_bytes()[..], &(4u64 << 20).to_le_bytes()].concat()), "cut off"),
        (entry(9, &[&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat()), "value type 9"),
        (entry(77, &[]), "value type 77"),
        (entry(7, &[2]), "a boolean"),
        (entry(8, &[&1u64.to_le_bytes()[..], &[0xFF]].concat()), "is not UTF-8"),
        (with_tensor(&tensor("w", &[], 0, 0), 0), "0 dimensions"),
        (with_tensor(&tensor("w", &[1; 5], 0, 0), 0), "5 dimensions"),
        (with_tensor(&tensor("w", &[u64::MAX, 2], 0, 0), 0), "shape"),
        (with_tensor(&tensor("w", &[u64::MAX], 0, 0), 0), "shape"),
        (with_tensor(&tensor("w", &[0], 0, 0), 0), "shape"),
        (with_tensor(&tensor("w", &[33], 3, 0), 40), "33 columns do not fill blocks of 32"),
        (with_tensor(&tensor("w", &[32], 3, 0), 19), "reaches past the end"),
        (with_tensor(&tensor("w", &[32], 3, 8), 64), "offset 8 is not a multiple of 32"),
        (with_tensor(&tensor("w", &[32], 3, u64::MAX - 31), 64), "reaches past the end"),
    ] {
        let got = read(&file).unwrap_err().to_string();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
}

#[test]
fn repeated_names_are_refused() {
    let one = [string("k"), 7u32.to_le_bytes().into(), vec![1]].concat();
    let file = [header(3, 0, 2), one.clone(), one].concat();
    assert_eq!(read(&file).unwrap_err().to_string(), "GGUF metadata key k occurs twice");
    let mut file = [header(3, 2, 0), tensor("w", &[8], 0, 0), tensor("w", &[8], 0, 32)].concat();
    file.resize(file.len().next_multiple_of(32) + 64, 0);
    assert_eq!(read(&file).unwrap_err().to_string(), "GGUF tensor w: occurs twice");
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let two = |second: &[u64], offset: u64| {
        let tensors = [tensor("a", &[16], 0, 0), tensor("b", second, 0, offset)].concat();
        let mut file = [header(3, 2, 0), tensors].concat();
        file.resize(file.len().next_multiple_of(32) + 256, 0);
        read(&file).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(two(&[8], 64), Ok(()));
    assert_eq!(two(&[8], 32), Err("GGUF tensor b: lies where a lies".into()));
    assert!(two(&[8], 0).unwrap_err().contains("lies where"));
    assert!(two(&[64], 32).unwrap_err().contains("past the end"));
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let mut file = std::fs::read(fixture("tokenizers/spm.gguf")).unwrap();
    file[8] = 1;
    file.extend(tensor("w", &[32, 2], 3, 0));
    let header = file.len();
    file.resize(header.next_multiple_of(32) + 40, 0);
    assert!(read(&file).is_ok());
    for end in (0..header).filter(|end| end % 7 == 0 || *end < 2000).chain(header..file.len()) {
        let error = read(&file[..end]).expect_err("a part of the file").to_string();
        assert!(error.contains("cut off") || error.contains("past the end"), "{end}: {error}");
        // The length may be a lie too.
        assert!(Gguf::read(&file[..end], file.len() as u64).is_err() || end >= header);
    }
}

#[test]
fn counts_take_no_memory() {
    let entry = |rest: &[u8]| [&header(3, 0, 1)[..], &string("k"), rest].concat();
    let array = |element: u32, count: u64| {
        entry(&[&9u32.to_le_bytes()[..], &element.to_le_bytes(), &count.to_le_bytes()].concat())
    };
    for exponent in [20, 22, 30, 60, 63] {
        let huge = 1u64 << exponent;
        for file in [
            header(3, huge, 0),
            header(3, 0, huge),
            entry(&[&8u32.to_le_bytes()[..], &huge.to_le_bytes()].concat()),
            array(0, huge),
            array(8, huge),
            array(12, huge),
            [&header(3, 0, 1)[..], &huge.to_le_bytes()].concat(),
            [&header(3, 1, 0)[..], &huge.to_le_bytes()].concat(),
        ] {
            let (result, peak) = peak_of(|| read(&file).map(|_| ()));
            assert!(result.is_err());
            assert!(peak < 64 << 10, "2^{exponent}: {peak} bytes for a file of {}", file.len());
        }
    }
}

/// The worst that a header can take is a value of 32 bytes for one byte of an array, and twice while a list grows.
#[test]
fn memory_is_bounded_by_the_file() {
    let count = 1u64 << 20;
    let bytes = [&9u32.to_le_bytes()[..], &0u32.to_le_bytes(), &count.to_le_bytes()].concat();
    let one = |key: &str| [string(key), bytes.clone(), vec![7; count as usize]].concat();
    let many = |n: u64| {
        let entries: Vec<u8> = (0..n).flat_map(|i| one(&i.to_string())).collect();
        [header(3, 0, n), entries].concat()
    };
    let file = many(3);
    let (gguf, peak) = peak_of(|| read(&file));
    assert!(gguf.is_ok());
    assert!(peak < 100 * file.len(), "{peak} bytes for {}", file.len());
    let file = many(5);
    let (gguf, peak) = peak_of(|| read(&file));
    assert!(gguf.unwrap_err().to_string().contains("number of array elements"));
    assert!(peak < 100 * file.len(), "{peak} bytes for {}", file.len());
}

fn prompt_of(file: &[u8]) -> Result<Prompt, PromptError> {
    Prompt::new(&Gguf::read(file, file.len() as u64)?)
}

fn refused(vocabulary: &Vocabulary) -> String {
    prompt_of(&vocabulary.gguf("x")).expect_err("a tokenizer that is refused").to_string()
}

#[test]
fn tokenizers_that_lie_are_refused() {
    let small = || Vocabulary::small(&["<s>", "</s>"]);
    let with = |change: &dyn Fn(&mut Vocabulary)| {
        let mut v = small();
        change(&mut v);
        refused(&v)
    };
    assert!(prompt_of(&small().gguf("x")).is_ok());
    for (got, text) in [
        (with(&|v| v.merges = vec!["a b".into()]), "`ab`"),
        (with(&|v| v.merges = vec!["a zz".into()]), "`zz`"),
        (with(&|v| v.merges = vec!["ab".into()]), "is not two tokens"),
        (with(&|v| v.merges = vec![" b".into()]), "is not two tokens"),
        (with(&|v| v.tokens.push(("a".into(), 1))), "the token \"a\" twice"),
        (with(&|v| v.tokens[5].1 = 77), "token_type has a 77"),
        (with(&|v| v.tokens.push(("y".repeat(1025), 1))), "1025 bytes in the name of a token"),
        (with(&|v| v.eos = 9999), "end token 9999 is outside"),
        (with(&|v| v.pre = "unheard"), "tokenizer.ggml.pre is unheard"),
        (with(&|v| v.model = "t5"), "tokenizer.ggml.model is t5"),
        (with(&|v| v.tokens.clear()), "has no tokens"),
        (with(&|v| v.model = "llama"), "0 scores for"),
        (with(&|v| (v.model, v.scores) = ("llama", vec![f32::NAN; v.tokens.len()])), "finite"),
        (with(&|v| v.tokens.extend((0..600).map(|i| (format!("{i:01000}"), 3)))), "special tokens of"),
        (with(&|v| v.tokens.extend((0..600_000).map(|i| (format!("{i:x}_"), 1)))), "the limit is 524288"),
    ] {
        assert!(got.contains(text), "{got} should contain {text}");
    }
}

#[test]
fn merges_cannot_make_control_tokens() {
    let mut v = Vocabulary::small(&["<s>", "</s>"]);
    v.tokens.push(("<s".into(), 1));
    v.merges = vec!["< s".into(), "<s >".into()];
    let prompt = prompt_of(&v.gguf("{{ bos_token }}{{ messages[0].content }}")).unwrap();
    let ids = prompt.render(&[Message::new("user", "<s>")]).unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 0).count(), 1, "{ids:?}");
    assert_eq!(prompt.decode(&ids), "<s>");
    let mut v = Vocabulary::small(&["<s>", "</s>"]);
    v.tokens.push(("<s".into(), 1));
    (v.model, v.scores) = ("llama", vec![0.0; v.tokens.len()]);
    let ids = prompt_of(&v.gguf("{{ messages[0].content }}")).unwrap().tokenizer().encode("<s>").unwrap();
    assert!(!ids.contains(&0), "{ids:?}");
}

/// All prefixes of one long word: every token can be cut in as many ways as it has letters.
#[test]
fn a_vocabulary_with_too_many_merges_is_refused() {
    let mut v = Vocabulary::small(&["<s>", "</s>"]);
    v.tokens.extend((2..=1000).map(|n| ("a".repeat(n), 1)));
    v.tokens.extend((2..=1000).map(|n| ("b".repeat(n), 1)));
    v.tokens.extend((2..=1000).map(|n| ("c".repeat(n), 1)));
    (v.model, v.scores) = ("llama", vec![0.0; v.tokens.len()]);
    assert!(refused(&v).contains("more than 1048576 merges"));
}

#[test]
fn a_huge_template_is_refused() {
    let file = gguf_with_template(&"x".repeat(300 << 10), None, Some("</s>"));
    assert!(prompt_of(&file).unwrap_err().to_string().contains("the limit is 262144"));
    let file = gguf_with_template(&"x".repeat(2 << 20), None, Some("</s>"));
    assert!(prompt_of(&file).unwrap_err().to_string().contains("length of a string"));
}

/// A directory with this `tokenizer.json`.
fn directory(tokenizer: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("config.json", &br#"{"max_position_embeddings": 64}"#[..]),
        ("tokenizer_config.json", br#"{"eos_token": "</s>"}"#),
        ("chat_template.jinja", b"{{ messages[0].content }}"),
        ("tokenizer.json", tokenizer),
    ] {
        std::fs::write(dir.path().join(file), text).unwrap();
    }
    dir
}

fn json_error(tokenizer: &str) -> String {
    let dir = directory(tokenizer.as_bytes());
    Prompt::load(dir.path()).expect_err("a tokenizer.json that is refused").to_string()
}

/// A whole `tokenizer.json` with these parts.
fn tokenizer_json(normalizer: &str, pre: &str, model: &str, added: &str) -> String {
    let end = r#"{"id": 2, "content": "</s>", "special": true}"#;
    format!(
        r#"{{"added_tokens": [{end}{added}], "normalizer": {normalizer}, "pre_tokenizer": {pre}, "model": {{
        "type": "BPE", "vocab": {{"a": 0, "b": 1}}, "merges": [] {model}}}}}"#
    )
}

const BYTES: &str = r#"{"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}"#;

#[test]
fn a_tokenizer_json_that_lies_is_refused() {
    let plain = directory(tokenizer_json("null", BYTES, "", "").as_bytes());
    assert_eq!(Prompt::load(plain.path()).unwrap().tokenizer().encode("ab").unwrap(), [0, 1]);
    let regex = |r: &str| {
        format!(
            r#"{{"type": "Split", "pattern": {{"Regex": "{r}"}}, "behavior": "Isolated", "invert": false}}"#
        )
    };
    let deep = "[".repeat(100_000);
    for (got, text) in [
        (json_error(""), "cannot be read"),
        (json_error("{}"), "missing field `model`"),
        (json_error(&deep), "cannot be read"),
        (json_error(&format!("{{\"model\": {deep}")), "cannot be read"),
        (json_error(&tokenizer_json(r#"{"type": "Lowercase"}"#, BYTES, "", "")), "normalizer Lowercase"),
        (json_error(&tokenizer_json("null", &regex("(a+)+$"), "", "")), "is of no family served"),
        (json_error(&tokenizer_json("null", "null", "", "")), "neither byte-level nor SentencePiece"),
        (json_error(&tokenizer_json("null", BYTES, r#", "dropout": 0.5"#, "")), "dropout"),
        (
            json_error(&tokenizer_json("null", BYTES, r#", "continuing_subword_prefix": "é""#, "")),
            "continuing_subword",
        ),
        (
            json_error(&tokenizer_json("null", BYTES, r#", "end_of_word_suffix": "x""#, "")),
            "end_of_word_suffix",
        ),
        (
            json_error(&tokenizer_json("null", BYTES, "", r#", {"id": 0, "content": "c"}"#)),
            "id 0 is given to",
        ),
        (
            json_error(&tokenizer_json("null", BYTES, "", r#", {"id": 4294967295, "content": "c"}"#)),
            "token ids",
        ),
        (json_error(&tokenizer_json("null", BYTES, "", r#", {"id": -1, "content": "c"}"#)), "cannot be read"),
        (
            json_error(&tokenizer_json("null", BYTES, "", r#", {"id": 5, "content": "c", "lstrip": true}"#)),
            "strips",
        ),
        (
            json_error(&tokenizer_json("null", BYTES, "", r#", {"id": 1, "content": "\ud800"}"#)),
            "cannot be read",
        ),
    ] {
        assert!(got.contains(text), "{got} should contain {text}");
        assert!(got.len() < 600, "{} letters of error", got.len());
    }
    for (merges, text) in [
        (r#"["a x"]"#, "`x`"),
        (r#"[["a", "b"]]"#, "`ab`"),
        (r#"["a  b"]"#, "is not two tokens"),
        (r#"[["a"]]"#, "not two tokens"),
        (r#"[["a", "b", "c"]]"#, "not two tokens"),
        ("[7]", "a merge of two tokens"),
        ("{}", "a list of at most"),
    ] {
        let json =
            tokenizer_json("null", BYTES, "", "").replace("\"merges\": []", &format!("\"merges\": {merges}"));
        let got = json_error(&json);
        assert!(got.contains(text), "{got} should contain {text}");
    }
}

#[test]
fn a_directory_that_lies_is_refused() {
    let good = tokenizer_json("null", BYTES, "", "");
    let after = |file: &str, text: &[u8]| {
        let dir = directory(good.as_bytes());
        std::fs::write(dir.path().join(file), text).unwrap();
        Prompt::load(dir.path()).expect_err(file).to_string()
    };
    let big = vec![b' '; (8 << 20) + 1];
    for (got, text) in [
        (after("config.json", b"{}"), "config.json has no max_position_embeddings"),
        (after("config.json", br#"{"max_position_embeddings": 0}"#), "has no max_position_embeddings"),
        (after("config.json", br#"{"max_position_embeddings": 1e999}"#), "config.json"),
        (
            after("config.json", br#"{"max_position_embeddings": 9, "vocab_size": 99999999}"#),
            "99999999 token ids",
        ),
        (after("config.json", b"[]"), "config.json"),
        (after("config.json", &big), "is larger than 8388608 bytes"),
        (after("tokenizer_config.json", b"{"), "tokenizer_config.json"),
        (after("generation_config.json", br#"{"eos_token_id": 77}"#), "end token 77 is outside"),
        (after("generation_config.json", br#"{"eos_token_id": [-1]}"#), "generation_config.json"),
        (after("chat_template.jinja", b"\xff"), "is not UTF-8"),
        (after("chat_template.jinja", &big), "is larger than 262144 bytes"),
        (after("chat_template.jinja", b"{% if %}"), "syntax error"),
    ] {
        assert!(got.contains(text), "{got} should contain {text}");
    }
    let endless = directory(good.replace("</s>", "<stop>").as_bytes());
    assert!(Prompt::load(endless.path()).unwrap_err().to_string().contains("names no end token"));
    let dir = tempfile::tempdir().unwrap();
    assert!(Prompt::load(dir.path()).unwrap_err().to_string().contains("config.json is missing"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changed_models_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut v = Vocabulary::small(&["<s>", "</s>"]);
        v.tokens.push(("ab".into(), 1));
        v.merges.push("a b".into());
        let mut file = v.gguf("{{ bos_token }}{% for m in messages %}{{ m.role + m.content|trim }}{% endfor %}");
        for (at, with) in &changes {
            let at = at.index(file.len());
            file[at] = *with;
        }
        let (_, peak) = peak_of(|| {
            if let Ok(prompt) = prompt_of(&file) {
                let _ = prompt.render(&[Message::new("user", "ab <s>"), Message::new("assistant", "c")]);
            }
        });
        prop_assert!(peak < 64 << 20, "{} bytes", peak);
    }

    #[test]
    fn changed_tokenizer_json_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), name in 0usize..3,
    ) {
        let name = ["qwen2", "spm_first", "gemma"][name];
        let mut json = std::fs::read(fixture(&format!("tokenizers/{name}.json"))).unwrap();
        for (at, with) in &changes {
            let at = at.index(json.len());
            json[at] = *with;
        }
        let dir = directory(&json);
        let (_, peak) = peak_of(|| {
            if let Ok(prompt) = Prompt::load(dir.path()) {
                let _ = prompt.render(&[Message::new("user", "hello 123\n  you")]);
            }
        });
        prop_assert!(peak < 64 << 20, "{} bytes", peak);
    }

    #[test]
    fn bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300), entries in 0u64..4, tensors in 0u64..4) {
        let _ = read(&[header(3, tensors, entries), tail].concat());
    }

    #[test]
    fn changed_files_never_panic(at in 0usize..200, with in any::<u8>()) {
        let mut file = header(3, 1, 1);
        file.extend([string("general.alignment"), 4u32.to_le_bytes().into(), 32u32.to_le_bytes().into()].concat());
        file.extend(tensor("w", &[32, 2], 3, 0));
        file.resize(file.len().next_multiple_of(32) + 40, 1);
        let at = at % file.len();
        file[at] = with;
        let _ = read(&file);
    }
}
