//! How a request ends: the closing messages of other services, checked.

use std::collections::HashMap;

use infera_protocol::bytes::{NodeId, hex_bytes};
use infera_protocol::request::{Finish, MAX_TOKENS};
use infera_wire::convert::{self, MAX_SLOTS};
use infera_wire::{WireError, v1};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest code and longest reason that are kept of another service's message, bytes.
const MAX_CODE: usize = 64;
const MAX_REASON: usize = 512;

/// The closing state of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Verified(Answer),
    /// Closed without an answer by a verdict; the hold is released.
    Failed {
        code: String,
        reason: String,
    },
    /// Never admitted.
    Rejected {
        code: String,
        message: String,
    },
}

/// A verified answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub result: Generation,
    /// The verified set in the order of the draw; the first one's result is delivered.
    pub nodes: Vec<NodeId>,
    pub similarity_millionths: u32,
    pub prompt_tokens: u32,
    /// Verified results that differ from the delivered one, in the order of the draw.
    pub others: Vec<Generation>,
}

/// One node's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    pub node: NodeId,
    pub tokens: Vec<u32>,
    pub finish: Finish,
    /// As the node revealed them; empty where nobody asked for log-probabilities, or the evidence cannot be read.
    #[serde(default, with = "hex_bytes", skip_serializing_if = "Vec::is_empty")]
    pub fingerprints: Vec<u8>,
}

impl Answer {
    /// The first verified result, in the order of the draw, that extends what was emitted.
    pub fn extending(&self, emitted: &[u32]) -> Option<&Generation> {
        std::iter::once(&self.result).chain(&self.others).find(|result| result.tokens.starts_with(emitted))
    }
}

/// The closing outcome of a verdict; `None` for one that does not close.
///
/// # Errors
/// Names the field that is wrong.
pub fn of_verdict(verdict: &v1::Verdict) -> Result<Option<(Uuid, Outcome)>, WireError> {
    let id = convert::uuid("verdict.request_id", &verdict.request_id)?;
    let outcome = match &verdict.outcome {
        None => return Err(WireError::Missing { field: "verdict.outcome" }),
        Some(v1::verdict::Outcome::MoreNodes(_) | v1::verdict::Outcome::MoreReferees(_)) => return Ok(None),
        Some(v1::verdict::Outcome::Verified(verified)) => Outcome::Verified(answer(verified)?),
        Some(v1::verdict::Outcome::Failed(failed)) => {
            Outcome::Failed { code: cut(&failed.code, MAX_CODE), reason: cut(&failed.reason, MAX_REASON) }
        }
    };
    Ok(Some((id, outcome)))
}

/// The outcome of a rejection.
///
/// # Errors
/// Names the field that is wrong.
pub fn of_rejection(rejected: &v1::RequestRejected) -> Result<(Uuid, Outcome), WireError> {
    let id = convert::uuid("rejected.request_id", &rejected.request_id)?;
    let code = cut(&rejected.code, MAX_CODE);
    Ok((id, Outcome::Rejected { code, message: cut(&rejected.message, MAX_REASON) }))
}

fn answer(verified: &v1::Verified) -> Result<Answer, WireError> {
    if verified.nodes.is_empty() || verified.nodes.len() > MAX_SLOTS {
        let count = verified.nodes.len();
        return Err(WireError::invalid("verified.nodes", format!("{count}, allowed are 1 to {MAX_SLOTS}")));
    }
    if verified.tokens.len() > MAX_TOKENS as usize {
        let count = verified.tokens.len();
        return Err(WireError::invalid("verified.tokens", format!("{count}, at most {MAX_TOKENS}")));
    }
    let nodes: Vec<NodeId> = verified
        .nodes
        .iter()
        .map(|node| convert::fixed("verified.nodes", node.as_slice()))
        .collect::<Result<_, _>>()?;
    let mut result = Generation {
        node: nodes[0],
        tokens: verified.tokens.clone(),
        finish: convert::finish("verified.finish", verified.finish)?,
        fingerprints: Vec::new(),
    };
    let others = from_evidence(&verified.evidence, &nodes, &mut result);
    Ok(Answer {
        others,
        similarity_millionths: verified.lowest_similarity_millionths.min(1_000_000),
        prompt_tokens: verified.prompt_tokens,
        result,
        nodes,
    })
}

/// The parts of the evidence that hold results; everything else is skipped unread.
#[derive(Deserialize)]
struct EvidenceView {
    slots: Vec<SlotView>,
}

#[derive(Deserialize)]
struct SlotView {
    node: NodeId,
    reveal: Option<RevealView>,
}

#[derive(Deserialize)]
struct RevealView {
    output: OutputView,
}

#[derive(Deserialize)]
struct OutputView {
    tokens: Vec<u32>,
    finish: Finish,
    #[serde(default, with = "hex_bytes")]
    fingerprints: Vec<u8>,
}

/// Fills in the delivered result's fingerprints; returns the verified results unlike it. Evidence that cannot be read
/// gives neither: they are only needed for log-probabilities, and where a stream emitted another beginning than the
/// delivered result's.
fn from_evidence(evidence: &[u8], nodes: &[NodeId], delivered: &mut Generation) -> Vec<Generation> {
    let Ok(view) = serde_json::from_slice::<EvidenceView>(evidence) else { return Vec::new() };
    let mut outputs: HashMap<NodeId, OutputView> = view
        .slots
        .into_iter()
        .filter_map(|slot| slot.reveal.map(|reveal| (slot.node, reveal.output)))
        .collect();
    let mut found: Vec<Generation> = Vec::new();
    for node in nodes {
        let Some(output) = outputs.remove(node) else { continue };
        if *node == delivered.node && output.tokens == delivered.tokens {
            delivered.fingerprints = output.fingerprints;
        } else if output.tokens != delivered.tokens && found.iter().all(|g| g.tokens != output.tokens) {
            let OutputView { tokens, finish, fingerprints } = output;
            found.push(Generation { node: *node, tokens, finish, fingerprints });
        }
    }
    found
}

fn cut(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(n: u8) -> NodeId {
        NodeId([n; 32])
    }

    fn verdict(outcome: v1::verdict::Outcome) -> v1::Verdict {
        v1::Verdict {
            request_id: Uuid::from_u128(7).as_bytes().to_vec(),
            outcome: Some(outcome),
            ..v1::Verdict::default()
        }
    }

    fn verified() -> v1::Verified {
        let slot = |n: u8, tokens: &[u32]| {
            json!({ "node": node(n), "reveal": { "output": { "tokens": tokens, "finish": "eos", "fingerprints": format!("0x0{n}") },
                "salt": "0x" }, "outcome": "revealed" })
        };
        let evidence = json!({ "k": 3, "slots": [
            slot(1, &[1, 2]), slot(2, &[1, 2]), slot(3, &[1, 9]), { "node": node(4), "reveal": null },
        ]});
        v1::Verified {
            evidence: evidence.to_string().into_bytes(),
            tokens: vec![1, 2],
            finish: v1::Finish::Eos.into(),
            nodes: vec![node(2).to_vec(), node(1).to_vec(), node(3).to_vec()],
            lowest_similarity_millionths: 990_000,
            prompt_tokens: 5,
        }
    }

    #[test]
    fn the_first_result_that_extends_what_was_emitted_is_delivered() {
        let (id, outcome) =
            of_verdict(&verdict(v1::verdict::Outcome::Verified(verified()))).unwrap().unwrap();
        assert_eq!(id, Uuid::from_u128(7));
        let Outcome::Verified(answer) = outcome else { panic!("verified") };
        assert_eq!(answer.others.len(), 1);
        assert_eq!(
            (&answer.result.fingerprints[..], &answer.others[0].fingerprints[..]),
            (&[2][..], &[3][..])
        );
        for (emitted, delivered) in [
            (&[][..], Some(node(2))),
            (&[1], Some(node(2))),
            (&[1, 2], Some(node(2))),
            (&[1, 9], Some(node(3))),
            (&[1, 2, 3], None),
            (&[4], None),
        ] {
            assert_eq!(answer.extending(emitted).map(|g| g.node), delivered, "{emitted:?}");
        }
    }

    #[test]
    fn evidence_that_cannot_be_read_gives_no_others() {
        let wire = v1::Verified { evidence: b"{".to_vec(), ..verified() };
        let (_, outcome) = of_verdict(&verdict(v1::verdict::Outcome::Verified(wire))).unwrap().unwrap();
        let Outcome::Verified(answer) = outcome else { panic!("verified") };
        assert!(answer.others.is_empty() && answer.result.fingerprints.is_empty());
    }

    #[test]
    fn more_nodes_does_not_close() {
        let wire = verdict(v1::verdict::Outcome::MoreNodes(v1::MoreNodes { count: 2 }));
        assert_eq!(of_verdict(&wire).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let field = |change: fn(&mut v1::Verified)| {
            let mut wire = verified();
            change(&mut wire);
            of_verdict(&verdict(v1::verdict::Outcome::Verified(wire))).unwrap_err().to_string()
        };
        assert!(field(|v| v.nodes.clear()).contains("verified.nodes"));
        assert!(field(|v| v.nodes[0].clear()).contains("verified.nodes"));
        assert!(field(|v| v.finish = 0).contains("verified.finish"));
        assert!(field(|v| v.tokens = vec![0; 9_000]).contains("verified.tokens"));
        let empty = v1::Verdict::default();
        assert!(of_verdict(&empty).unwrap_err().to_string().contains("verdict.request_id"));
    }

    #[test]
    fn long_reasons_are_cut_between_characters() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }
}
