//! A proposal's description: a line for people, and for a model its whole registry entry.
//!
//! ```text
//! Serve gemma-3-270m
//!
//! (a fence of three backticks and "json")
//! { "id": "gemma-3-270m", "weights_root": "0x...", "weights_bytes": 253000000, "end_tokens": [1, 106], ... }
//! (a fence of three backticks)
//! #proposer=0x...
//! ```
//!
//! The contract keeps hashes only. Whoever follows the chain takes the fields that it does not keep (`weights_bytes`,
//! `end_tokens`, `created_secs`) from here, and [`entry`] checks everything that it does keep. The last line is
//! OpenZeppelin's: nobody else can submit this description.

use alloy::primitives::Address;
use infera_protocol::{governed::ModelTerms, registry::Model};

use super::call::RegistryCall;

/// Longest entry that is read, bytes. One with some hundred end tokens has 3,000.
pub const MAX_ENTRY_BYTES: usize = 16_384;
/// Longest first line, bytes.
pub const MAX_TITLE_BYTES: usize = 200;
const OPEN: &str = "```json";
const CLOSE: &str = "```";

/// A description that does not say what its call says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error(
        "the title must be one line of 1 to {MAX_TITLE_BYTES} bytes without control characters or a fence"
    )]
    Title,
    #[error("the description has no registry entry: a JSON object between a line ```json and a line ```")]
    Missing,
    #[error("the description has more than one registry entry")]
    Several,
    #[error("the registry entry has more than {MAX_ENTRY_BYTES} bytes")]
    TooLong,
    #[error("the registry entry cannot be read: {0}")]
    Content(String),
    #[error("the registry entry says another {0} than the call")]
    Differs(&'static str),
}

/// What a proposal is to say: `title`, and where `call` admits a model its entry.
///
/// # Errors
/// [`EntryError`], also if the entry is not what the call says.
pub fn describe(
    title: &str,
    proposer: Address,
    call: &RegistryCall,
    entry: Option<&Model>,
) -> Result<String, EntryError> {
    if title.trim().is_empty()
        || title.len() > MAX_TITLE_BYTES
        || title.chars().any(char::is_control)
        || title.trim_start().starts_with(CLOSE)
    {
        return Err(EntryError::Title);
    }
    let mut text = format!("{}\n\n", title.trim());
    if let RegistryCall::AdmitModel { id, terms } = call {
        let model = entry.ok_or(EntryError::Missing)?;
        check(model, id, terms)?;
        let json = serde_json::to_string_pretty(model).map_err(|e| EntryError::Content(e.to_string()))?;
        if json.len() > MAX_ENTRY_BYTES {
            return Err(EntryError::TooLong);
        }
        text.push_str(&format!("{OPEN}\n{json}\n{CLOSE}\n"));
    }
    text.push_str(&format!("#proposer={proposer:?}"));
    Ok(text)
}

/// The registry entry of a model that a proposal admits, checked against every value and hash in its call.
///
/// # Errors
/// [`EntryError`]: none, several, or one that says something else than the call.
pub fn entry(description: &str, id: &str, terms: &ModelTerms) -> Result<Model, EntryError> {
    let mut lines = description.lines();
    let mut found: Option<String> = None;
    while let Some(line) = lines.next() {
        if line.trim() != OPEN {
            continue;
        }
        if found.is_some() {
            return Err(EntryError::Several);
        }
        let mut json = String::new();
        loop {
            let line = lines.next().ok_or(EntryError::Missing)?;
            if line.trim() == CLOSE {
                break;
            }
            if json.len() + line.len() >= MAX_ENTRY_BYTES {
                return Err(EntryError::TooLong);
            }
            json.push_str(line);
            json.push('\n');
        }
        found = Some(json);
    }
    let json = found.ok_or(EntryError::Missing)?;
    let model: Model = serde_json::from_str(&json).map_err(|e| EntryError::Content(e.to_string()))?;
    check(&model, id, terms)?;
    Ok(model)
}

fn check(model: &Model, id: &str, terms: &ModelTerms) -> Result<(), EntryError> {
    if model.id != id {
        return Err(EntryError::Differs("id"));
    }
    terms.fits(model).map_err(EntryError::Differs)?;
    let fields = [
        (
            "similarity_threshold_millionths",
            model.similarity_threshold_millionths == terms.similarity_threshold_millionths,
        ),
        // Asked may be less than what is allowed.
        ("price_micro", model.price_micro <= terms.price_cap_micro),
    ];
    match fields.iter().find(|(_, same)| !same) {
        Some((field, _)) => Err(EntryError::Differs(field)),
        None if model.weights_bytes == 0 => Err(EntryError::Content("weights_bytes is 0".into())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use infera_protocol::bytes::Hash32;

    use super::*;

    fn model() -> Model {
        Model {
            id: "gemma".into(),
            weights_root: Hash32([1; 32]),
            weights_bytes: 5,
            tokenizer_hash: Hash32([2; 32]),
            template_hash: Hash32([3; 32]),
            end_tokens: vec![106, 1],
            vocab_size: 10,
            context_length: 11,
            similarity_threshold_millionths: 12,
            price_micro: 13,
            created_secs: 14,
        }
    }

    fn admit(model: &Model) -> RegistryCall {
        RegistryCall::AdmitModel { id: model.id.clone(), terms: ModelTerms::of(model) }
    }

    fn said() -> String {
        describe("Serve gemma", Address::ZERO, &admit(&model()), Some(&model())).unwrap()
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let (model, text) = (model(), said());
        assert_eq!(entry(&text, "gemma", &ModelTerms::of(&model)), Ok(model.clone()));
        assert!(
            text.starts_with("Serve gemma\n") && text.ends_with(&format!("#proposer=0x{}", "0".repeat(40)))
        );
        assert_eq!(
            entry(&text.replace('\n', "\r\n"), "gemma", &ModelTerms::of(&model)),
            Ok(model.clone()),
            "line ends of another system"
        );
    }

    #[test]
    fn an_entry_that_differs_in_anything_is_refused() {
        type Change = fn(&mut Model);
        let changes: [(&str, Change); 8] = [
            ("id", |m| m.id.push('x')),
            ("weights_root", |m| m.weights_root.0[0] ^= 1),
            ("tokenizer_hash", |m| m.tokenizer_hash.0[0] ^= 1),
            ("template_hash", |m| m.template_hash.0[0] ^= 1),
            ("end_tokens", |m| m.end_tokens.push(7)),
            ("vocab_size", |m| m.vocab_size += 1),
            ("context_length", |m| m.context_length += 1),
            ("similarity_threshold_millionths", |m| m.similarity_threshold_millionths += 1),
        ];
        for (field, change) in changes {
            let mut other = model();
            change(&mut other);
            assert_eq!(
                entry(&said(), &other.id, &ModelTerms::of(&other)),
                Err(EntryError::Differs(field)),
                "{field}"
            );
            let refused = describe("Serve gemma", Address::ZERO, &admit(&model()), Some(&other));
            assert_eq!(refused, Err(EntryError::Differs(field)));
        }
        let mut terms = ModelTerms::of(&model());
        terms.price_cap_micro += 1;
        assert!(entry(&said(), "gemma", &terms).is_ok(), "a price below the cap");
        terms.price_cap_micro -= 2;
        assert_eq!(entry(&said(), "gemma", &terms), Err(EntryError::Differs("price_micro")));
    }

    #[test]
    fn a_description_without_one_entry_is_refused() {
        let terms = ModelTerms::of(&model());
        let read = |text: &str| entry(text, "gemma", &terms);
        assert_eq!(read("Serve gemma"), Err(EntryError::Missing));
        assert_eq!(read(&said().replace("```\n", "")), Err(EntryError::Missing), "an open fence");
        assert_eq!(read(&format!("{}\n{}", said(), said())), Err(EntryError::Several));
        assert!(matches!(read("a\n```json\n{}\n```"), Err(EntryError::Content(_))));
        let long = format!("a\n```json\n{}\n```", " ".repeat(MAX_ENTRY_BYTES));
        assert_eq!(read(&long), Err(EntryError::TooLong));
        let extra = said().replacen('{', "{ \"more\": 1,", 1);
        assert!(matches!(read(&extra), Err(EntryError::Content(_))));
    }

    #[test]
    fn a_title_is_one_line() {
        let call = RegistryCall::WithdrawModel { id: "gemma".into() };
        for title in ["", "  ", "a\nb", "a\u{1b}[2J", "```json", &"x".repeat(MAX_TITLE_BYTES + 1)] {
            assert_eq!(describe(title, Address::ZERO, &call, None), Err(EntryError::Title), "{title:?}");
        }
        assert!(describe("Withdraw gemma", Address::ZERO, &call, None).is_ok());
    }
}
