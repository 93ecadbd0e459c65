//! Wire messages into validated domain types and back. Errors name the field.

mod evidence;

use crate::{MAX_REVEAL_BYTES, WireError, v1};
use infera_protocol::{
    assignment::Eligible,
    bytes::{BytesError, EvmSignature, Hash32, Signature},
    evidence::{Reveal, SignedCommitment},
    fingerprint::Fingerprint,
    grammar::{Grammar, GrammarKind},
    identity::{HelloClaims, NodeBinding},
    request::{Finish, Output, Request},
    sampling::SamplingParams,
};
use uuid::Uuid;

pub use evidence::{conduct, conduct_to_wire, decline, evidence, outcome_to_wire, referee_to_wire};

/// Most slots of an attempt: 7 results and those that were replaced.
pub const MAX_SLOTS: usize = 64;
/// Most answers that one referee's job is about: the most results and a planted defect.
pub const MAX_SUBJECTS: usize = 8;
/// Most concurrent sequences that a node may declare.
pub const MAX_NODE_SLOTS: u32 = 64;
/// Longest account name, model id and other short text, bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// Longest name that a gateway is answered under, bytes.
pub const MAX_REPLY_TO_BYTES: usize = 64;

/// A UUID from 16 bytes.
pub fn uuid(field: &'static str, bytes: &[u8]) -> Result<Uuid, WireError> {
    Uuid::from_slice(bytes)
        .map_err(|_| WireError::invalid(field, format!("{} bytes, expected 16", bytes.len())))
}

/// A fixed-size value.
pub fn fixed<'a, T>(field: &'static str, bytes: &'a [u8]) -> Result<T, WireError>
where
    T: TryFrom<&'a [u8], Error = BytesError>,
{
    T::try_from(bytes).map_err(|error| WireError::invalid(field, error.to_string()))
}

/// A message field that must be there.
pub fn required<'a, T>(field: &'static str, value: &'a Option<T>) -> Result<&'a T, WireError> {
    value.as_ref().ok_or(WireError::Missing { field })
}

/// A non-empty text of at most [`MAX_NAME_BYTES`].
pub fn name(field: &'static str, text: &str) -> Result<String, WireError> {
    if text.is_empty() || text.len() > MAX_NAME_BYTES {
        return Err(WireError::invalid(
            field,
            format!("{} bytes, allowed are 1 to {MAX_NAME_BYTES}", text.len()),
        ));
    }
    Ok(text.to_owned())
}

fn sampling(s: &v1::Sampling) -> Result<SamplingParams, WireError> {
    let mut sampling = SamplingParams {
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        frequency_penalty: s.frequency_penalty,
        presence_penalty: s.presence_penalty,
        ..SamplingParams::default()
    };
    for v1::LogitBias { token, bias } in &s.logit_bias {
        if sampling.logit_bias.insert(*token, *bias).is_some() {
            let reason = format!("names token {token} twice");
            return Err(WireError::invalid("request.sampling.logit_bias", reason));
        }
    }
    sampling.validate().map_err(|e| WireError::invalid("request.sampling", e.to_string()))?;
    Ok(sampling)
}

fn grammar(wire: &v1::Grammar) -> Result<Grammar, WireError> {
    let kind = match v1::GrammarKind::try_from(wire.kind) {
        Ok(v1::GrammarKind::JsonSchema) => GrammarKind::JsonSchema,
        Ok(v1::GrammarKind::Regex) => GrammarKind::Regex,
        Ok(v1::GrammarKind::Unspecified) | Err(_) => {
            return Err(WireError::invalid("request.grammar.kind", format!("unknown kind {}", wire.kind)));
        }
    };
    Ok(Grammar { kind, text: wire.text.clone() })
}

fn grammar_to_wire(grammar: &Grammar) -> v1::Grammar {
    let kind = match grammar.kind {
        GrammarKind::JsonSchema => v1::GrammarKind::JsonSchema,
        GrammarKind::Regex => v1::GrammarKind::Regex,
    };
    v1::Grammar { kind: kind.into(), text: grammar.text.clone() }
}

pub fn request(wire: &v1::Request) -> Result<Request, WireError> {
    let sampling = sampling(required("request.sampling", &wire.sampling)?)?;
    let request = Request {
        id: uuid("request.id", &wire.id)?,
        model_root: fixed("request.model_root", &wire.model_root)?,
        prompt: wire.prompt.clone(),
        sampling,
        max_tokens: wire.max_tokens,
        stop: wire.stop.clone(),
        seed: wire.seed,
        grammar: wire.grammar.as_ref().map(grammar).transpose()?,
    };
    request.validate().map_err(|e| WireError::invalid("request", e.to_string()))?;
    Ok(request)
}

pub fn request_to_wire(request: &Request) -> v1::Request {
    let s = &request.sampling;
    v1::Request {
        id: request.id.as_bytes().to_vec(),
        model_root: request.model_root.to_vec(),
        prompt: request.prompt.clone(),
        sampling: Some(v1::Sampling {
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            logit_bias: s
                .logit_bias
                .iter()
                .map(|(token, bias)| v1::LogitBias { token: *token, bias: *bias })
                .collect(),
        }),
        max_tokens: request.max_tokens,
        stop: request.stop.clone(),
        seed: request.seed,
        grammar: request.grammar.as_ref().map(grammar_to_wire),
    }
}

pub fn finish(field: &'static str, wire: i32) -> Result<Finish, WireError> {
    match v1::Finish::try_from(wire) {
        Ok(v1::Finish::Eos) => Ok(Finish::Eos),
        Ok(v1::Finish::Length) => Ok(Finish::Length),
        Ok(v1::Finish::Stop) => Ok(Finish::Stop),
        Ok(v1::Finish::Grammar) => Ok(Finish::Grammar),
        Ok(v1::Finish::Unspecified) | Err(_) => {
            Err(WireError::invalid(field, format!("unknown finish {wire}")))
        }
    }
}

pub fn finish_to_wire(finish: Finish) -> v1::Finish {
    match finish {
        Finish::Eos => v1::Finish::Eos,
        Finish::Length => v1::Finish::Length,
        Finish::Stop => v1::Finish::Stop,
        Finish::Grammar => v1::Finish::Grammar,
    }
}

pub fn eligible(wire: &v1::Eligible) -> Result<Eligible, WireError> {
    Ok(Eligible {
        node: fixed("eligible.node", &wire.node)?,
        operator: fixed("eligible.operator", &wire.operator)?,
        class: name("eligible.class", &wire.class)?,
        weight: wire.weight,
        audit_ppm: wire.audit_ppm,
        trusted: wire.trusted,
    })
}

pub fn eligible_to_wire(eligible: &Eligible) -> v1::Eligible {
    v1::Eligible {
        node: eligible.node.to_vec(),
        operator: eligible.operator.to_vec(),
        class: eligible.class.clone(),
        weight: eligible.weight,
        audit_ppm: eligible.audit_ppm,
        trusted: eligible.trusted,
    }
}

/// What a hello claims, with its two signatures still to be checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub claims: HelloClaims,
    pub binding_signature: EvmSignature,
    pub signature: Signature,
    pub version: String,
}

pub fn hello(wire: &v1::Hello) -> Result<Hello, WireError> {
    let node = fixed("hello.node", &wire.node)?;
    if wire.slots == 0 || wire.slots > MAX_NODE_SLOTS {
        return Err(WireError::invalid(
            "hello.slots",
            format!("{}, allowed are 1 to {MAX_NODE_SLOTS}", wire.slots),
        ));
    }
    Ok(Hello {
        claims: HelloClaims {
            node,
            operator: fixed("hello.operator", &wire.operator)?,
            binding: NodeBinding {
                node,
                signer: fixed("hello.signer", &wire.signer)?,
                expiry_ms: wire.binding_expiry_ms,
            },
            release_hash: fixed("hello.release_hash", &wire.release_hash)?,
            weights_root: fixed("hello.weights_root", &wire.weights_root)?,
            class: name("hello.class", &wire.class)?,
            slots: wire.slots,
        },
        binding_signature: fixed("hello.binding_signature", &wire.binding_signature)?,
        signature: fixed("hello.signature", &wire.signature)?,
        version: name("hello.version", &wire.version)?,
    })
}

pub fn commitment(wire: &v1::Commit) -> Result<SignedCommitment, WireError> {
    Ok(SignedCommitment {
        digest: fixed("commit.commitment", &wire.commitment)?,
        signature: fixed("commit.signature", &wire.signature)?,
    })
}

/// A reveal within its limits: one well-formed fingerprint per token.
pub fn reveal(wire: &v1::Reveal) -> Result<Reveal, WireError> {
    let size = wire.fingerprints.len() + wire.tokens.len() * 4;
    if size > MAX_REVEAL_BYTES {
        return Err(WireError::invalid("reveal", format!("{size} bytes, at most {MAX_REVEAL_BYTES}")));
    }
    let prints = Fingerprint::decode_all(&wire.fingerprints)
        .map_err(|e| WireError::invalid("reveal.fingerprints", e.to_string()))?;
    if prints.len() != wire.tokens.len() {
        return Err(WireError::invalid(
            "reveal.fingerprints",
            format!("{} for {} tokens", prints.len(), wire.tokens.len()),
        ));
    }
    Ok(Reveal {
        output: Output {
            tokens: wire.tokens.clone(),
            fingerprints: wire.fingerprints.clone(),
            finish: finish("reveal.finish", wire.finish)?,
        },
        salt: fixed("reveal.salt", &wire.salt)?,
    })
}

/// What every service needs of a submitted request.
#[derive(Debug, Clone, PartialEq)]
pub struct Submitted {
    pub request: Request,
    pub account: String,
    pub model: String,
    pub k: u32,
    pub reply_to: String,
    pub stream: bool,
    pub submitted_at_ms: i64,
    pub deadline_ms: i64,
    pub salt: Hash32,
    pub bid_micro: u64,
}

/// One word of a routing key: `[A-Za-z0-9_-]{1,64}`.
fn reply_to(text: &str) -> Result<String, WireError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if text.is_empty() || text.len() > MAX_REPLY_TO_BYTES || !text.bytes().all(word) {
        return Err(WireError::invalid(
            "submitted.reply_to",
            format!("not 1 to {MAX_REPLY_TO_BYTES} letters, digits, - and _"),
        ));
    }
    Ok(text.to_owned())
}

pub fn submitted(wire: &v1::RequestSubmitted) -> Result<Submitted, WireError> {
    use infera_protocol::request::{MAX_REPLICAS, MIN_REPLICAS};
    if !(MIN_REPLICAS..=MAX_REPLICAS).contains(&wire.k) {
        return Err(WireError::invalid(
            "submitted.k",
            format!("{}, allowed are {MIN_REPLICAS} to {MAX_REPLICAS}", wire.k),
        ));
    }
    if wire.deadline_ms <= wire.submitted_at_ms || wire.submitted_at_ms < 0 {
        return Err(WireError::invalid("submitted.deadline_ms", "not after submitted_at_ms"));
    }
    Ok(Submitted {
        request: request(required("submitted.request", &wire.request)?)?,
        account: name("submitted.account", &wire.account)?,
        model: name("submitted.model", &wire.model)?,
        k: wire.k,
        reply_to: reply_to(&wire.reply_to)?,
        stream: wire.stream,
        submitted_at_ms: wire.submitted_at_ms,
        deadline_ms: wire.deadline_ms,
        salt: fixed("submitted.salt", &wire.salt)?,
        bid_micro: wire.bid_micro,
    })
}

pub fn submitted_to_wire(submitted: &Submitted) -> v1::RequestSubmitted {
    v1::RequestSubmitted {
        request: Some(request_to_wire(&submitted.request)),
        account: submitted.account.clone(),
        model: submitted.model.clone(),
        k: submitted.k,
        reply_to: submitted.reply_to.clone(),
        stream: submitted.stream,
        submitted_at_ms: submitted.submitted_at_ms,
        deadline_ms: submitted.deadline_ms,
        salt: submitted.salt.to_vec(),
        bid_micro: submitted.bid_micro,
    }
}

/// A funded request: what was submitted, and the price that its hold was made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Funded {
    pub submitted: Submitted,
    pub held_micro: u64,
    pub price_micro: u64,
    pub funded_at_ms: i64,
}

pub fn funded(wire: &v1::RequestFunded) -> Result<Funded, WireError> {
    Ok(Funded {
        submitted: submitted(required("funded.submitted", &wire.submitted)?)?,
        held_micro: wire.held_micro,
        price_micro: wire.price_micro,
        funded_at_ms: wire.funded_at_ms,
    })
}

pub fn funded_to_wire(funded: &Funded) -> v1::RequestFunded {
    v1::RequestFunded {
        submitted: Some(submitted_to_wire(&funded.submitted)),
        held_micro: funded.held_micro,
        price_micro: funded.price_micro,
        funded_at_ms: funded.funded_at_ms,
    }
}

/// Why a request is closed before enough of its results agree; also the code of the verdict that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// Its deadline passed.
    Deadline,
    /// Its own account cancelled it.
    Cancelled,
    /// The mempool was full when it came.
    Overloaded,
}

impl CloseReason {
    pub const ALL: [Self; 3] = [Self::Deadline, Self::Cancelled, Self::Overloaded];

    /// As in `CloseRequested.reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Cancelled => "cancelled",
            Self::Overloaded => "overloaded",
        }
    }

    /// The reason of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire_request() -> v1::Request {
        request_to_wire(&Request {
            id: Uuid::from_u128(5),
            model_root: Hash32([1; 32]),
            prompt: vec![1],
            sampling: SamplingParams {
                logit_bias: [(3, -100.0), (70_000, 0.5)].into(),
                ..SamplingParams::default()
            },
            max_tokens: 4,
            stop: vec!["x".into()],
            seed: 9,
            grammar: Some(Grammar { kind: GrammarKind::JsonSchema, text: "{}".into() }),
        })
    }

    #[test]
    fn a_request_survives_the_wire() {
        let regex = Some(v1::Grammar { kind: v1::GrammarKind::Regex.into(), text: "a|b".into() });
        for grammar in [wire_request().grammar, regex, None] {
            let wire = v1::Request { grammar, ..wire_request() };
            assert_eq!(request_to_wire(&request(&wire).unwrap()), wire);
        }
    }

    fn field_bias(bias: Vec<v1::LogitBias>) -> String {
        let mut wire = wire_request();
        wire.sampling.as_mut().unwrap().logit_bias = bias;
        request(&wire).unwrap_err().to_string()
    }

    fn field_grammar(grammar: v1::Grammar) -> String {
        request(&v1::Request { grammar: Some(grammar), ..wire_request() }).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_named() {
        let field = |change: fn(&mut v1::Request)| {
            let mut wire = wire_request();
            change(&mut wire);
            request(&wire).unwrap_err().to_string()
        };
        assert!(field(|r| r.id.clear()).contains("request.id"));
        assert!(field(|r| r.model_root.push(0)).contains("request.model_root"));
        assert!(field(|r| r.sampling = None).contains("request.sampling"));
        assert!(field(|r| r.max_tokens = 0).contains("max_tokens"));
        assert!(field(|r| r.stop = vec![String::new()]).contains("stop"));
        let bias = |token, bias| v1::LogitBias { token, bias };
        assert!(field_bias(vec![bias(5, 1.0), bias(5, 2.0)]).contains("names token 5 twice"));
        assert!(field_bias(vec![bias(5, -100.5)]).contains("logit_bias must be from -100 to 100"));
        assert!(field_bias((0..301).map(|t| bias(t, 1.0)).collect()).contains("at most 300 tokens"));
        let grammar = |kind, text: &str| v1::Grammar { kind, text: text.into() };
        assert!(field_grammar(grammar(0, "a")).contains("request.grammar.kind"));
        assert!(field_grammar(grammar(9, "a")).contains("request.grammar.kind"));
        assert!(field_grammar(grammar(2, "")).contains("grammar has 0 bytes"));
        assert!(field_grammar(grammar(2, &"a".repeat(16_385))).contains("grammar has 16385 bytes"));
    }

    #[test]
    fn close_reasons_have_names_of_their_own() {
        for reason in CloseReason::ALL {
            assert_eq!(CloseReason::parse(reason.as_str()), Some(reason));
        }
        assert_eq!(CloseReason::parse("boredom"), None);
    }

    #[test]
    fn reply_to_is_one_word_of_a_routing_key() {
        for good in ["g", "gw-1", "Gw_2", &"a".repeat(64)] {
            assert_eq!(reply_to(good).unwrap(), good);
        }
        for bad in ["", "a.b", "#", "*", "gw 1", "gw\u{e9}", &"a".repeat(65)] {
            assert!(reply_to(bad).unwrap_err().to_string().contains("submitted.reply_to"), "{bad}");
        }
    }
}
