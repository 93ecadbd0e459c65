//! OpenAI's answer bodies, with what is ours under the key `infera`.

use infera_protocol::bytes::{Hash32, NodeId};
use infera_protocol::request::Finish;
use serde_json::{Value, json};
use uuid::Uuid;

use super::outcome::{Answer, Generation};

/// What every body of one answer shares.
#[derive(Debug, Clone)]
pub struct Head {
    /// The first choice's request.
    pub id: Uuid,
    pub model: String,
    /// BLAKE3 of the weights: the fingerprint of the system that answers.
    pub weights_root: Hash32,
    /// Seconds since 1970.
    pub created: i64,
    /// `receipts_url` of the configuration.
    pub receipts_url: String,
}

/// One of the answers: a request of the network, with a receipt of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub index: u32,
    pub id: Uuid,
}

/// A choice that is complete.
#[derive(Debug)]
pub struct Choice<'a> {
    pub place: Place,
    pub answer: &'a Answer,
    pub delivered: &'a Generation,
    /// What the client sees of it.
    pub text: String,
    /// `null` unless asked for.
    pub logprobs: Value,
}

impl Head {
    fn base(&self, object: &str) -> Value {
        let root = self.weights_root.to_string();
        json!({
            "id": format!("chatcmpl-{}", self.id),
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": format!("fp_{}", root.get(2..14).unwrap_or_default()),
        })
    }

    fn infera(&self, id: Uuid, answer: &Answer, delivered_by: NodeId, fast: bool) -> Value {
        let mut value = json!({
            "receipt": id,
            "receipt_url": format!("{}/v1/receipts/{id}", self.receipts_url.trim_end_matches('/')),
            "verdict": "verified",
            "similarity": f64::from(answer.similarity_millionths) / 1e6,
            "nodes": answer.nodes,
            "delivered_by": delivered_by,
        });
        if fast {
            value["stream"] = "fast".into();
        }
        value
    }

    /// A `chat.completion`. `infera` tells of the first choice, and under `choices` of each where there are several.
    pub fn completion(&self, choices: &[Choice<'_>]) -> Value {
        let mut body = self.base("chat.completion");
        body["choices"] = choices
            .iter()
            .map(|choice| {
                json!({
                    "index": choice.place.index,
                    "message": { "role": "assistant", "content": choice.text, "refusal": null, "annotations": [] },
                    "logprobs": choice.logprobs,
                    "finish_reason": finish_reason(choice.delivered.finish),
                })
            })
            .collect();
        body["usage"] = usage(choices.iter().map(|choice| (choice.answer, choice.delivered)));
        let mut told = choices.iter().map(|choice| {
            (choice.place.index, self.infera(choice.place.id, choice.answer, choice.delivered.node, false))
        });
        body["infera"] = told.next().map_or(Value::Null, |(_, first)| first);
        if choices.len() > 1 {
            let mut all = vec![body["infera"].clone()];
            all.extend(told.map(|(_, value)| value));
            for (value, choice) in all.iter_mut().zip(choices) {
                value["index"] = choice.place.index.into();
            }
            body["infera"]["choices"] = all.into();
        }
        body
    }

    /// A `chat.completion.chunk`. `usage` is null where the client asked for a usage chunk, else absent.
    fn chunk(&self, choices: Value, usage: bool) -> Value {
        let mut body = self.base("chat.completion.chunk");
        body["choices"] = choices;
        if usage {
            body["usage"] = Value::Null;
        }
        body
    }

    /// The first chunk of a choice: who speaks, and in the fast mode that nothing is verified yet.
    pub fn first_chunk(&self, place: Place, usage: bool, fast: bool) -> Value {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        let mut body = self.chunk(choice(place, delta, Value::Null, Value::Null), usage);
        if fast {
            body["infera"] = json!({ "receipt": place.id, "stream": "fast", "verdict": "pending" });
        }
        body
    }

    /// A piece of text.
    pub fn text_chunk(&self, place: Place, text: &str, usage: bool) -> Value {
        self.chunk(choice(place, json!({ "content": text }), Value::Null, Value::Null), usage)
    }

    /// The last chunk of a choice: why it ended, its log-probabilities, which only its verdict brings, and the receipt.
    pub fn last_chunk(&self, last: &Choice<'_>, usage: bool, fast: bool) -> Value {
        let reason = finish_reason(last.delivered.finish).into();
        let mut body = self.chunk(choice(last.place, json!({}), last.logprobs.clone(), reason), usage);
        body["infera"] = self.infera(last.place.id, last.answer, last.delivered.node, fast);
        body
    }

    /// The chunk that `stream_options.include_usage` asks for.
    pub fn usage_chunk<'a>(&self, choices: impl Iterator<Item = (&'a Answer, &'a Generation)>) -> Value {
        let mut body = self.base("chat.completion.chunk");
        body["choices"] = json!([]);
        body["usage"] = usage(choices);
        body
    }
}

fn choice(place: Place, delta: Value, logprobs: Value, finish_reason: Value) -> Value {
    json!([{ "index": place.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason }])
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Eos | Finish::Stop | Finish::Grammar => "stop",
    }
}

/// What is charged: every choice is computed, and paid, from its prompt on.
fn usage<'a>(choices: impl Iterator<Item = (&'a Answer, &'a Generation)>) -> Value {
    let (prompt, completion) = choices.fold((0, 0), |(prompt, completion), (answer, delivered)| {
        (prompt + answer.prompt_tokens as usize, completion + delivered.tokens.len())
    });
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            id: Uuid::from_u128(1),
            model: "m".into(),
            weights_root: Hash32([0xab; 32]),
            created: 1_700_000_000,
            receipts_url: "http://r/".into(),
        }
    }

    fn answer(finish: Finish) -> Answer {
        let node = NodeId([1; 32]);
        Answer {
            result: Generation { node, tokens: vec![1, 2], finish, fingerprints: vec![] },
            nodes: vec![node, NodeId([2; 32])],
            similarity_millionths: 1_000_000,
            prompt_tokens: 5,
            others: vec![],
        }
    }

    const FIRST: Place = Place { index: 0, id: Uuid::from_u128(1) };

    fn choice_of(answer: &Answer, place: Place) -> Choice<'_> {
        let logprobs = Value::Null;
        Choice { place, answer, delivered: &answer.result, text: "Paris".into(), logprobs }
    }

    #[test]
    fn several_choices_have_receipts_of_their_own() {
        let answer = answer(Finish::Eos);
        let second = Place { index: 1, id: Uuid::from_u128(9) };
        let body = head().completion(&[choice_of(&answer, FIRST), choice_of(&answer, second)]);
        assert_eq!(body["choices"][1]["index"], 1);
        assert_eq!(body["usage"], json!({ "prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14 }));
        assert_eq!(body["infera"]["receipt"], json!(FIRST.id));
        let told = body["infera"]["choices"].as_array().unwrap();
        let receipts: Vec<_> = told.iter().map(|t| (t["index"].clone(), t["receipt"].clone())).collect();
        assert_eq!(receipts, [(json!(0), json!(FIRST.id)), (json!(1), json!(second.id))]);
        assert_eq!(head().text_chunk(second, "x", false)["choices"][0]["index"], 1);
        assert_eq!(
            head().last_chunk(&choice_of(&answer, second), false, false)["infera"]["receipt"],
            json!(second.id)
        );
    }

    #[test]
    fn a_completion_has_openais_fields_and_ours() {
        let whole = answer(Finish::Eos);
        let body = head().completion(&[choice_of(&whole, FIRST)]);
        assert_eq!(body["infera"].get("choices"), None);
        assert_eq!(body["id"], format!("chatcmpl-{}", Uuid::from_u128(1)));
        assert_eq!(body["choices"][0]["message"]["content"], "Paris");
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        assert_eq!(body["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 }));
        assert_eq!(body["system_fingerprint"], "fp_abababababab");
        assert_eq!(body["infera"]["receipt_url"], format!("http://r/v1/receipts/{}", Uuid::from_u128(1)));
        assert_eq!(body["infera"]["similarity"], 1.0);
        assert_eq!(body["infera"]["nodes"][0], format!("0x{}", "01".repeat(32)));
        let cut = answer(Finish::Length);
        assert_eq!(head().completion(&[choice_of(&cut, FIRST)])["choices"][0]["finish_reason"], "length");
    }

    #[test]
    fn usage_is_null_in_every_chunk_but_its_own_and_only_if_asked_for() {
        let answer = answer(Finish::Stop);
        for asked in [false, true] {
            for chunk in [
                head().first_chunk(FIRST, asked, false),
                head().text_chunk(FIRST, "x", asked),
                head().last_chunk(&choice_of(&answer, FIRST), asked, false),
            ] {
                assert_eq!(chunk.get("usage"), asked.then_some(&Value::Null));
                assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
            }
        }
        let chunk = head().usage_chunk([(&answer, &answer.result)].into_iter());
        assert_eq!((chunk["choices"].clone(), chunk["usage"]["total_tokens"].clone()), (json!([]), json!(7)));
    }

    #[test]
    fn a_fast_stream_says_so_at_both_ends() {
        let answer = answer(Finish::Eos);
        assert_eq!(head().first_chunk(FIRST, false, true)["infera"]["verdict"], "pending");
        let last = head().last_chunk(&choice_of(&answer, FIRST), false, true);
        assert_eq!(
            (&last["infera"]["stream"], &last["infera"]["verdict"]),
            (&json!("fast"), &json!("verified"))
        );
        assert_eq!(head().last_chunk(&choice_of(&answer, FIRST), false, false)["infera"].get("stream"), None);
    }
}
