//! Files that lie about themselves.

use infera_prompt::gguf::{GgmlType, Gguf, GgufError, Value};
use infera_prompt::{Prompt, PromptError};
use proptest::prelude::*;

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn header(version: u32, tensors: u64, entries: u64) -> Vec<u8> {
    [&b"GGUF"[..], &version.to_le_bytes(), &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
}

fn read(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(bytes, bytes.len() as u64)
}

fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
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

proptest! {
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
