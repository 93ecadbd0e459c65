//! A request (protocol section 3): fixed by the gateway before anyone works on it.

use crate::{
    bytes::{Hash32, hex_bytes},
    fingerprint::Fingerprint,
    grammar::{Grammar, MAX_GRAMMAR_BYTES},
    hash::{Encoder, keccak},
    identity::Domain,
    sampling::SamplingParams,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Most tokens that a prompt may have, and most that may be asked for.
pub const MAX_TOKENS: u32 = 8_192;
/// Most stop strings of a request.
pub const MAX_STOPS: usize = 4;
/// Longest stop string, bytes.
pub const MAX_STOP_BYTES: usize = 64;
/// Replicas of a request: at least, and at most after escalation (section 7).
pub const MIN_REPLICAS: u32 = 3;
pub const MAX_REPLICAS: u32 = 7;

/// What every attempt and every node shares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub id: Uuid,
    /// BLAKE3 of the model, as the registry lists it.
    pub model_root: Hash32,
    /// Token ids of the rendered chat template.
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    pub seed: u64,
    /// What the answer must look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<Grammar>,
}

/// A request that breaks a limit; names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("prompt has {actual} tokens; allowed are 1 to {MAX_TOKENS}")]
    Prompt { actual: usize },
    #[error("max_tokens is {actual}; allowed are 1 to {MAX_TOKENS}")]
    MaxTokens { actual: u32 },
    #[error("stop must be at most {MAX_STOPS} non-empty strings of at most {MAX_STOP_BYTES} bytes")]
    Stop,
    #[error("grammar has {actual} bytes; allowed are 1 to {MAX_GRAMMAR_BYTES}")]
    Grammar { actual: usize },
}

impl Request {
    /// Checks the limits above; the parameters of `sampling` were checked when it was made.
    pub fn validate(&self) -> Result<(), RequestError> {
        if self.prompt.is_empty() || self.prompt.len() > MAX_TOKENS as usize {
            return Err(RequestError::Prompt { actual: self.prompt.len() });
        }
        if self.max_tokens == 0 || self.max_tokens > MAX_TOKENS {
            return Err(RequestError::MaxTokens { actual: self.max_tokens });
        }
        if self.stop.len() > MAX_STOPS || self.stop.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            return Err(RequestError::Stop);
        }
        match &self.grammar {
            Some(grammar) if !(1..=MAX_GRAMMAR_BYTES).contains(&grammar.text.len()) => {
                Err(RequestError::Grammar { actual: grammar.text.len() })
            }
            _ => Ok(()),
        }
    }

    /// The request hash: every commitment is to this hash, on this network. Bias and grammar came with version 2 of the
    /// encoding; a request without them has the hash that it had before, so that its receipts still verify.
    pub fn hash(&self, domain: &Domain) -> Hash32 {
        let s = &self.sampling;
        let plain = s.logit_bias.is_empty() && self.grammar.is_none();
        let mut encoder = domain
            .encode(Encoder::new(if plain { "infera.request.v1" } else { "infera.request.v2" }))
            .fixed(self.id.as_bytes())
            .fixed(&self.model_root.0)
            .tokens(&self.prompt)
            .u32(s.temperature.to_bits())
            .u32(s.top_p.to_bits())
            .u32(s.top_k)
            .u32(s.min_p.to_bits())
            .u32(s.frequency_penalty.to_bits())
            .u32(s.presence_penalty.to_bits())
            .u32(self.max_tokens)
            .u64(self.seed)
            .u32(u32::try_from(self.stop.len()).unwrap_or(u32::MAX));
        for stop in &self.stop {
            encoder = encoder.bytes(stop.as_bytes());
        }
        if plain {
            return encoder.keccak();
        }
        encoder = encoder.u32(u32::try_from(s.logit_bias.len()).unwrap_or(u32::MAX));
        for (token, bias) in &s.logit_bias {
            encoder = encoder.u32(*token).u32(bias.to_bits());
        }
        let (kind, text) = self.grammar.as_ref().map_or((0, ""), |g| (g.kind.code(), g.text.as_str()));
        encoder.u8(kind).bytes(text.as_bytes()).keccak()
    }
}

/// The seed of the answer with this index, where several are asked for with one seed: the first one's is the seed
/// itself.
pub fn choice_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let hash = Encoder::new("infera.choice.v1").u64(seed).u32(index).keccak();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.0[..8]);
    u64::from_be_bytes(bytes)
}

/// Why a generation ended (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    Eos,
    Length,
    Stop,
    Grammar,
}

impl Finish {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Eos => 1,
            Self::Length => 2,
            Self::Stop => 3,
            Self::Grammar => 4,
        }
    }
}

/// What a node reveals: the generation and what it saw at every token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    pub tokens: Vec<u32>,
    /// Encodings of [`crate::fingerprint::Fingerprint`], one per token, concatenated.
    #[serde(with = "hex_bytes")]
    pub fingerprints: Vec<u8>,
    pub finish: Finish,
}

impl Output {
    pub fn tokens_root(&self) -> Hash32 {
        Encoder::new("infera.tokens.v1").tokens(&self.tokens).keccak()
    }

    pub fn fingerprint_root(&self) -> Hash32 {
        keccak(&[b"infera.fingerprints.v1", &self.fingerprints])
    }

    /// What two results must share to be equal (section 7): tokens and finish.
    pub fn hash(&self) -> Hash32 {
        Encoder::new("infera.output.v1").tokens(&self.tokens).u8(self.finish.code()).keccak()
    }
}

/// Checks an output against its request's limits and the model's end tokens (section 5): 1 to max_tokens tokens, an end
/// token only as the last one and exactly with `Eos`, `Length` only at exactly max_tokens, `Stop` and `Grammar` only
/// where the request has such, one well-formed fingerprint per token. Where a stop string or a grammar ends takes the
/// model's vocabulary; that is the verifier's to check ([`crate::evidence::Evidence::unfit`]).
///
/// # Errors
/// What is wrong, for people.
pub fn check_output(request: &Request, output: &Output, end_tokens: &[u32]) -> Result<(), &'static str> {
    let most = request.max_tokens as usize;
    if output.tokens.is_empty() {
        return Err("the result has no tokens");
    }
    if output.tokens.len() > most {
        return Err("the result has more tokens than max_tokens");
    }
    let end = output.tokens.iter().position(|token| end_tokens.contains(token));
    match (output.finish, end) {
        (_, Some(at)) if at + 1 < output.tokens.len() => return Err("the result goes on after an end token"),
        (Finish::Eos, None) => return Err("the result says `eos` without an end token"),
        (Finish::Length | Finish::Stop | Finish::Grammar, Some(_)) => {
            return Err("the result ends with an end token and does not say `eos`");
        }
        (Finish::Length, None) if output.tokens.len() != most => {
            return Err("the result says `length` before max_tokens");
        }
        (Finish::Stop, None) if request.stop.is_empty() => {
            return Err("the result says `stop`, but the request has no stop strings");
        }
        (Finish::Grammar, None) if request.grammar.is_none() => {
            return Err("the result says `grammar`, but the request has none");
        }
        _ => {}
    }
    match Fingerprint::decode_all(&output.fingerprints) {
        Err(_) => Err("the fingerprints are malformed"),
        Ok(prints) if prints.len() != output.tokens.len() => Err("not one fingerprint per token"),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{bytes::Address, grammar::GrammarKind};

    pub(crate) fn sample() -> Request {
        Request {
            id: Uuid::from_u128(1),
            model_root: Hash32([2; 32]),
            prompt: vec![1, 2, 3],
            sampling: SamplingParams::default(),
            max_tokens: 16,
            stop: vec!["END".into()],
            seed: 42,
            grammar: None,
        }
    }

    fn grammar(kind: GrammarKind, text: &str) -> Option<Grammar> {
        Some(Grammar { kind, text: text.into() })
    }

    #[test]
    fn every_field_changes_the_hash() {
        let domain = Domain { chain_id: 1, contract: Address([1; 20]) };
        let base = sample().hash(&domain);
        let mut changed = vec![
            Request { id: Uuid::from_u128(2), ..sample() },
            Request { model_root: Hash32([3; 32]), ..sample() },
            Request { prompt: vec![1, 2], ..sample() },
            Request { max_tokens: 17, ..sample() },
            Request { stop: vec![], ..sample() },
            Request { seed: 43, ..sample() },
            Request { grammar: grammar(GrammarKind::Regex, "true"), ..sample() },
            Request { grammar: grammar(GrammarKind::JsonSchema, "true"), ..sample() },
            Request { grammar: grammar(GrammarKind::Regex, "false"), ..sample() },
        ];
        let mut warm = sample();
        warm.sampling.temperature = 0.25;
        changed.push(warm);
        for bias in [(5, 1.0), (5, -1.0), (6, 1.0)] {
            let mut biased = sample();
            biased.sampling.logit_bias.insert(bias.0, bias.1);
            changed.push(biased);
        }
        let mut hashes = std::collections::BTreeSet::from([base]);
        for request in changed {
            assert!(hashes.insert(request.hash(&domain)), "{request:?}");
        }
        assert_ne!(sample().hash(&Domain { chain_id: 2, ..domain }), base);
    }

    #[test]
    fn outputs_keep_to_the_requests_limits() {
        let print = |token: u32| {
            let entry = crate::fingerprint::Entry { token, logprob: 0 };
            Fingerprint::new(vec![entry]).unwrap().encode()
        };
        let output = |tokens: usize, prints: usize, finish| {
            let mut tokens = vec![7; tokens];
            if let (Finish::Eos, Some(last)) = (finish, tokens.last_mut()) {
                *last = 2;
            }
            let fingerprints = (0..prints).flat_map(|_| print(7)).collect();
            Output { tokens, fingerprints, finish }
        };
        let of = |tokens: &[u32], finish| Output {
            tokens: tokens.to_vec(),
            ..output(tokens.len(), tokens.len(), finish)
        };
        // max_tokens is 16.
        let table = [
            (output(1, 1, Finish::Eos), None),
            (output(16, 16, Finish::Eos), None),
            (output(16, 16, Finish::Length), None),
            (output(3, 3, Finish::Stop), None),
            (output(0, 0, Finish::Eos), Some("no tokens")),
            (output(17, 17, Finish::Eos), Some("more tokens")),
            (output(17, 17, Finish::Length), Some("more tokens")),
            (output(15, 15, Finish::Length), Some("length")),
            (output(2, 1, Finish::Eos), Some("one fingerprint per token")),
            (output(1, 2, Finish::Eos), Some("one fingerprint per token")),
            (output(1, 0, Finish::Eos), Some("one fingerprint per token")),
            (output(3, 3, Finish::Grammar), Some("the request has none")),
            (of(&[7, 3], Finish::Eos), None),
            (of(&[7, 7], Finish::Eos), Some("`eos` without an end token")),
            (of(&[7, 2], Finish::Stop), Some("does not say `eos`")),
            (of(&[[7; 15].as_slice(), &[2]].concat(), Finish::Length), Some("does not say `eos`")),
            (of(&[3, 2], Finish::Eos), Some("after an end token")),
            (of(&[7, 2, 7], Finish::Stop), Some("after an end token")),
            (Output { fingerprints: vec![1, 0], ..output(1, 1, Finish::Eos) }, Some("malformed")),
        ];
        for (output, expected) in table {
            let actual = check_output(&sample(), &output, &[2, 3]).err();
            let fits = match (actual, expected) {
                (Some(actual), Some(expected)) => actual.contains(expected),
                (actual, expected) => actual == expected,
            };
            assert!(fits, "{actual:?}, expected {expected:?}: {output:?}");
        }
        let formed = Request { grammar: grammar(GrammarKind::Regex, "a"), ..sample() };
        assert_eq!(check_output(&formed, &output(3, 3, Finish::Grammar), &[2]), Ok(()));
        let endless = Request { stop: vec![], ..sample() };
        assert!(
            check_output(&endless, &output(3, 3, Finish::Stop), &[2])
                .unwrap_err()
                .contains("no stop strings")
        );
    }

    #[test]
    fn a_request_without_the_optional_parts_has_its_first_hash() {
        let domain = Domain { chain_id: 31_337, contract: Address([1; 20]) };
        assert_eq!(
            sample().hash(&domain).to_string(),
            "0xd962f9f2a867de3e7d0a010bec994ef18da42d6f4b080a5b8bf90777ec037c7f"
        );
    }

    #[test]
    fn choices_have_seeds_of_their_own() {
        let seeds: std::collections::BTreeSet<u64> = (0..8).map(|i| choice_seed(42, i)).collect();
        assert_eq!((seeds.len(), choice_seed(42, 0)), (8, 42));
        assert_ne!(choice_seed(42, 1), choice_seed(43, 1));
    }

    #[test]
    fn a_request_without_the_optional_parts_is_read() {
        let json = serde_json::to_value(sample()).unwrap();
        assert!(json.get("grammar").is_none() && json["sampling"].get("logit_bias").is_none());
        assert_eq!(serde_json::from_value::<Request>(json).unwrap(), sample());
        let mut full = Request { grammar: grammar(GrammarKind::JsonSchema, "{}"), ..sample() };
        full.sampling.logit_bias = [(7, 0.1), (9, -100.0)].into();
        let json = serde_json::to_vec(&full).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&json).unwrap(), full);
    }

    #[test]
    fn limits_name_the_field() {
        assert_eq!(
            Request { max_tokens: 0, ..sample() }.validate(),
            Err(RequestError::MaxTokens { actual: 0 })
        );
        assert_eq!(
            Request { prompt: vec![], ..sample() }.validate(),
            Err(RequestError::Prompt { actual: 0 })
        );
        assert_eq!(Request { stop: vec![String::new()], ..sample() }.validate(), Err(RequestError::Stop));
        for bytes in [0, MAX_GRAMMAR_BYTES + 1] {
            assert_eq!(
                Request { grammar: grammar(GrammarKind::Regex, &"a".repeat(bytes)), ..sample() }.validate(),
                Err(RequestError::Grammar { actual: bytes })
            );
        }
    }
}
