//! OpenAI's answer bodies, with what is ours under the key `infera`.

use infera_protocol::bytes::{Hash32, NodeId};
use infera_protocol::request::Finish;
use serde_json::{Value, json};
use uuid::Uuid;

use super::outcome::{Answer, Generation};

/// What every body of one answer shares.
#[derive(Debug, Clone)]
pub struct Head {
    pub id: Uuid,
    pub model: String,
    /// BLAKE3 of the weights: the fingerprint of the system that answers.
    pub weights_root: Hash32,
    /// Seconds since 1970.
    pub created: i64,
    /// `receipts_url` of the configuration.
    pub receipts_url: String,
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

    fn infera(&self, answer: &Answer, delivered_by: NodeId, fast: bool) -> Value {
        let mut value = json!({
            "receipt": self.id,
            "receipt_url": format!("{}/v1/receipts/{}", self.receipts_url.trim_end_matches('/'), self.id),
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

    /// A `chat.completion`.
    pub fn completion(&self, answer: &Answer, text: &str) -> Value {
        let mut body = self.base("chat.completion");
        body["choices"] = json!([{
            "index": 0,
            "message": { "role": "assistant", "content": text, "refusal": null, "annotations": [] },
            "logprobs": null,
            "finish_reason": finish_reason(answer.result.finish),
        }]);
        body["usage"] = usage(answer, &answer.result);
        body["infera"] = self.infera(answer, answer.result.node, false);
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

    /// The first chunk: who speaks, and in the fast mode that nothing is verified yet.
    pub fn first_chunk(&self, usage: bool, fast: bool) -> Value {
        let delta = json!({ "role": "assistant", "content": "", "refusal": null });
        let mut body = self.chunk(choice(delta, Value::Null), usage);
        if fast {
            body["infera"] = json!({ "receipt": self.id, "stream": "fast", "verdict": "pending" });
        }
        body
    }

    /// A piece of text.
    pub fn text_chunk(&self, text: &str, usage: bool) -> Value {
        self.chunk(choice(json!({ "content": text }), Value::Null), usage)
    }

    /// The last chunk with a choice: why it ended, and the receipt.
    pub fn last_chunk(&self, answer: &Answer, delivered: &Generation, usage: bool, fast: bool) -> Value {
        let mut body = self.chunk(choice(json!({}), finish_reason(delivered.finish).into()), usage);
        body["infera"] = self.infera(answer, delivered.node, fast);
        body
    }

    /// The chunk that `stream_options.include_usage` asks for.
    pub fn usage_chunk(&self, answer: &Answer, delivered: &Generation) -> Value {
        let mut body = self.base("chat.completion.chunk");
        body["choices"] = json!([]);
        body["usage"] = usage(answer, delivered);
        body
    }
}

fn choice(delta: Value, finish_reason: Value) -> Value {
    json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason }])
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Eos | Finish::Stop | Finish::Grammar => "stop",
    }
}

fn usage(answer: &Answer, delivered: &Generation) -> Value {
    let completion = delivered.tokens.len();
    json!({
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": answer.prompt_tokens as usize + completion,
    })
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
            result: Generation { node, tokens: vec![1, 2], finish },
            nodes: vec![node, NodeId([2; 32])],
            similarity_millionths: 1_000_000,
            prompt_tokens: 5,
            others: vec![],
        }
    }

    #[test]
    fn a_completion_has_openais_fields_and_ours() {
        let body = head().completion(&answer(Finish::Eos), "Paris");
        assert_eq!(body["id"], format!("chatcmpl-{}", Uuid::from_u128(1)));
        assert_eq!(body["choices"][0]["message"]["content"], "Paris");
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        assert_eq!(body["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7 }));
        assert_eq!(body["system_fingerprint"], "fp_abababababab");
        assert_eq!(body["infera"]["receipt_url"], format!("http://r/v1/receipts/{}", Uuid::from_u128(1)));
        assert_eq!(body["infera"]["similarity"], 1.0);
        assert_eq!(body["infera"]["nodes"][0], format!("0x{}", "01".repeat(32)));
        assert_eq!(head().completion(&answer(Finish::Length), "")["choices"][0]["finish_reason"], "length");
    }

    #[test]
    fn usage_is_null_in_every_chunk_but_its_own_and_only_if_asked_for() {
        let answer = answer(Finish::Stop);
        for asked in [false, true] {
            for chunk in [
                head().first_chunk(asked, false),
                head().text_chunk("x", asked),
                head().last_chunk(&answer, &answer.result, asked, false),
            ] {
                assert_eq!(chunk.get("usage"), asked.then_some(&Value::Null));
                assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
            }
        }
        let chunk = head().usage_chunk(&answer, &answer.result);
        assert_eq!((chunk["choices"].clone(), chunk["usage"]["total_tokens"].clone()), (json!([]), json!(7)));
    }

    #[test]
    fn a_fast_stream_says_so_at_both_ends() {
        let answer = answer(Finish::Eos);
        assert_eq!(head().first_chunk(false, true)["infera"]["verdict"], "pending");
        let last = head().last_chunk(&answer, &answer.result, false, true);
        assert_eq!(
            (&last["infera"]["stream"], &last["infera"]["verdict"]),
            (&json!("fast"), &json!("verified"))
        );
        assert_eq!(head().last_chunk(&answer, &answer.result, false, false)["infera"].get("stream"), None);
    }
}
