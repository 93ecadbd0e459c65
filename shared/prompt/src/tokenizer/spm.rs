//! SentencePiece's vocabulary with scores, as merges.

use std::collections::HashMap;

use super::parts::{Kind, MAX_MERGES};
use crate::error::PromptError;

/// The merges that make the same tokens as scores do: every way to cut a token into two others, best score first, as
/// transformers' `generate_merges` orders them. Only ordinary tokens take part, so that no text becomes a control token.
pub(super) fn merges(
    names: &[String],
    kinds: &[Kind],
    scores: &[f64],
) -> Result<Vec<(String, String)>, PromptError> {
    let ordinary = || names.iter().zip(kinds).enumerate().filter(|(_, (_, kind))| **kind == Kind::Normal);
    let known: HashMap<&str, ()> = ordinary().map(|(_, (name, _))| (name.as_str(), ())).collect();
    let mut found: Vec<(f64, usize, usize, &str, &str)> = Vec::new();
    for (id, (name, _)) in ordinary() {
        let letters = name.chars().count();
        for (nth, (at, _)) in name.char_indices().enumerate().skip(1) {
            let (left, right) = name.split_at(at);
            if known.contains_key(left) && known.contains_key(right) {
                found.push((scores[id], nth, letters - nth, left, right));
            }
        }
        if found.len() > MAX_MERGES {
            let text = format!("the vocabulary makes more than {MAX_MERGES} merges");
            return Err(PromptError::Unsupported(text));
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    Ok(found.into_iter().map(|(_, _, _, left, right)| (left.to_owned(), right.to_owned())).collect())
}
