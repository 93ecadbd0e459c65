//! Names on the bus: one topic exchange, its routing keys, the durable queues bound to them and
//! the queue for dead letters. Pure data; `infera-bus` makes it real in both adapters.
//!
//! ```text
//! request.submitted           -> settlement.submitted
//! request.funded              -> mempool.funded
//! request.rejected.<replica>  -> gateway.rejected
//! request.offered             -> dispatcher.offered
//! results.collected           -> verifier.collected
//! close.requested             -> verifier.close
//! verdict.<replica>           -> settlement.verdict, mempool.verdict, gateway.verdict, dispatcher.conduct
//! cancel.requested            -> mempool.cancel
//! receipt                     -> explorer.receipt
//! batch.anchored              -> explorer.anchored
//! slots, deltas.<replica>     -> transient queues only
//! @<queue>                    -> that durable queue
//! ```
//!
//! `<replica>` is the gateway replica that waits for the answer: one word, `[A-Za-z0-9_-]+`.
//! Patterns follow AMQP's topic exchange: `*` stands for one word, `#` for any number of words.

/// The exchange that every message goes through.
pub const EXCHANGE: &str = "infera.events";

/// The queue (and the exchange in front of it) that keeps what could not be processed.
pub const DEAD_LETTERS: &str = "infera.dead";

/// Redeliveries after which a message goes to the dead letters: it is delivered at most
/// `DELIVERY_LIMIT + 1` times.
pub const DELIVERY_LIMIT: u32 = 20;

/// Routing keys.
pub mod keys {
    pub const REQUEST_SUBMITTED: &str = "request.submitted";
    pub const REQUEST_FUNDED: &str = "request.funded";
    pub const REQUEST_OFFERED: &str = "request.offered";
    pub const RESULTS_COLLECTED: &str = "results.collected";
    pub const CLOSE_REQUESTED: &str = "close.requested";
    pub const CANCEL_REQUESTED: &str = "cancel.requested";
    pub const RECEIPT: &str = "receipt";
    pub const BATCH_ANCHORED: &str = "batch.anchored";
    /// Free slots of a dispatcher replica: transient.
    pub const SLOTS: &str = "slots";

    /// Every rejection, whichever gateway replica waits for it.
    pub const ANY_REQUEST_REJECTED: &str = "request.rejected.*";
    /// Every verdict, whichever gateway replica waits for it.
    pub const ANY_VERDICT: &str = "verdict.*";

    /// A rejection that the gateway replica `replica` waits for.
    pub fn request_rejected(replica: &str) -> String {
        format!("request.rejected.{replica}")
    }

    /// A verdict that the gateway replica `replica` waits for.
    pub fn verdict(replica: &str) -> String {
        format!("verdict.{replica}")
    }

    /// Text deltas for the gateway replica `replica`: transient.
    pub fn deltas(replica: &str) -> String {
        format!("deltas.{replica}")
    }

    /// To the durable queue `queue` alone, past the exchange: for a dead letter that goes back to where it failed.
    pub fn direct(queue: &str) -> String {
        format!("@{queue}")
    }

    /// The queue of a [`direct`] key.
    pub fn direct_queue(routing_key: &str) -> Option<&str> {
        routing_key.strip_prefix('@')
    }
}

/// Names of queues: durable ones are constants, transient ones are made per replica.
pub mod queues {
    pub const SETTLEMENT_SUBMITTED: &str = "settlement.submitted";
    pub const SETTLEMENT_VERDICT: &str = "settlement.verdict";
    pub const MEMPOOL_FUNDED: &str = "mempool.funded";
    pub const MEMPOOL_VERDICT: &str = "mempool.verdict";
    pub const MEMPOOL_CANCEL: &str = "mempool.cancel";
    pub const GATEWAY_REJECTED: &str = "gateway.rejected";
    pub const GATEWAY_VERDICT: &str = "gateway.verdict";
    pub const DISPATCHER_OFFERED: &str = "dispatcher.offered";
    pub const DISPATCHER_CONDUCT: &str = "dispatcher.conduct";
    pub const VERIFIER_COLLECTED: &str = "verifier.collected";
    pub const VERIFIER_CLOSE: &str = "verifier.close";
    pub const EXPLORER_RECEIPT: &str = "explorer.receipt";
    pub const EXPLORER_ANCHORED: &str = "explorer.anchored";

    /// Wakes the clients that wait at one gateway replica; bind it to
    /// [`super::keys::verdict`] and [`super::keys::request_rejected`] of that replica.
    pub fn gateway_reply(replica: &str) -> String {
        format!("gateway.reply.{replica}")
    }

    /// Deltas for one gateway replica; bind it to [`super::keys::deltas`] of that replica.
    pub fn gateway_deltas(replica: &str) -> String {
        format!("gateway.deltas.{replica}")
    }

    /// Closing verdicts for one dispatcher replica; bind it to [`super::keys::ANY_VERDICT`].
    pub fn dispatcher_verdict(replica: &str) -> String {
        format!("dispatcher.verdict.{replica}")
    }

    /// Slot reports for one mempool replica; bind it to [`super::keys::SLOTS`].
    pub fn mempool_slots(replica: &str) -> String {
        format!("mempool.slots.{replica}")
    }
}

/// A durable queue and the pattern of routing keys that it receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueBinding {
    pub queue: &'static str,
    pub pattern: &'static str,
}

/// All that a bus declares: exchanges and durable queues, without prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    pub exchange: &'static str,
    /// Names both the exchange and the queue of dead letters.
    pub dead_letters: &'static str,
    /// Redeliveries before a message is a dead letter.
    pub delivery_limit: u32,
    pub queues: Vec<QueueBinding>,
}

impl Topology {
    /// The network's own topology, the one every service declares.
    pub fn network() -> Self {
        use queues::*;
        let bind = |queue, pattern| QueueBinding { queue, pattern };
        Self {
            exchange: EXCHANGE,
            dead_letters: DEAD_LETTERS,
            delivery_limit: DELIVERY_LIMIT,
            queues: vec![
                bind(SETTLEMENT_SUBMITTED, keys::REQUEST_SUBMITTED),
                bind(MEMPOOL_FUNDED, keys::REQUEST_FUNDED),
                bind(GATEWAY_REJECTED, keys::ANY_REQUEST_REJECTED),
                bind(DISPATCHER_OFFERED, keys::REQUEST_OFFERED),
                bind(VERIFIER_COLLECTED, keys::RESULTS_COLLECTED),
                bind(VERIFIER_CLOSE, keys::CLOSE_REQUESTED),
                bind(SETTLEMENT_VERDICT, keys::ANY_VERDICT),
                bind(MEMPOOL_VERDICT, keys::ANY_VERDICT),
                bind(GATEWAY_VERDICT, keys::ANY_VERDICT),
                bind(DISPATCHER_CONDUCT, keys::ANY_VERDICT),
                bind(MEMPOOL_CANCEL, keys::CANCEL_REQUESTED),
                bind(EXPLORER_RECEIPT, keys::RECEIPT),
                bind(EXPLORER_ANCHORED, keys::BATCH_ANCHORED),
            ],
        }
    }
}

/// Whether a topic `pattern` receives the routing `key`.
pub fn matches(pattern: &str, key: &str) -> bool {
    fn walk(pattern: &[&str], key: &[&str]) -> bool {
        match (pattern.split_first(), key.split_first()) {
            (None, None) => true,
            (Some((&"#", rest)), _) => {
                walk(rest, key) || key.split_first().is_some_and(|(_, tail)| walk(pattern, tail))
            }
            (Some((&word, rest)), Some((&head, tail))) if word == "*" || word == head => walk(rest, tail),
            _ => false,
        }
    }
    let pattern: Vec<&str> = pattern.split('.').collect();
    let key: Vec<&str> = key.split('.').collect();
    walk(&pattern, &key)
}

/// What a message under `routing_key` is: the key without the replica it is addressed to
/// (`verdict.gw-1` is a `verdict`).
pub fn kind(routing_key: &str) -> &str {
    const ADDRESSED: [&str; 3] = ["request.rejected", "verdict", "deltas"];
    ADDRESSED
        .into_iter()
        .find(|kind| routing_key.strip_prefix(kind).is_some_and(|rest| rest.starts_with('.')))
        .unwrap_or(routing_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receivers(key: &str) -> Vec<&'static str> {
        Topology::network()
            .queues
            .iter()
            .filter(|binding| matches(binding.pattern, key))
            .map(|binding| binding.queue)
            .collect()
    }

    #[test]
    fn patterns_follow_the_topic_exchange() {
        for (pattern, key, expected) in [
            ("verdict.*", "verdict.gw", true),
            ("verdict.*", "verdict", false),
            ("verdict.*", "verdict.gw.more", false),
            ("verdict.#", "verdict", true),
            ("verdict.#", "verdict.gw.more", true),
            ("#", "anything.at.all", true),
            ("*.b.#", "a.b", true),
            ("*.b.#", "b", false),
            ("#.c", "a.b.c", true),
            ("slots", "slots", true),
            ("slots", "slot", false),
        ] {
            assert_eq!(matches(pattern, key), expected, "{pattern} against {key}");
        }
    }

    #[test]
    fn every_message_reaches_the_queues_of_the_plan() {
        assert_eq!(receivers(keys::REQUEST_SUBMITTED), ["settlement.submitted"]);
        assert_eq!(receivers(keys::REQUEST_FUNDED), ["mempool.funded"]);
        assert_eq!(receivers(keys::REQUEST_OFFERED), ["dispatcher.offered"]);
        assert_eq!(receivers(&keys::request_rejected("gw-1")), ["gateway.rejected"]);
        assert_eq!(receivers(keys::RESULTS_COLLECTED), ["verifier.collected"]);
        assert_eq!(receivers(keys::CLOSE_REQUESTED), ["verifier.close"]);
        assert_eq!(
            receivers(&keys::verdict("gw-1")),
            ["settlement.verdict", "mempool.verdict", "gateway.verdict", "dispatcher.conduct"]
        );
        assert_eq!(receivers(keys::CANCEL_REQUESTED), ["mempool.cancel"]);
        assert_eq!(receivers(keys::RECEIPT), ["explorer.receipt"]);
        assert_eq!(receivers(keys::BATCH_ANCHORED), ["explorer.anchored"]);
        assert!(receivers(keys::SLOTS).is_empty());
        assert!(receivers(&keys::deltas("gw-1")).is_empty());
    }

    #[test]
    fn a_kind_forgets_the_replica() {
        assert_eq!(kind("verdict.gw-1"), "verdict");
        assert_eq!(kind("request.rejected.gw-1"), "request.rejected");
        assert_eq!(kind("deltas.gw-1"), "deltas");
        assert_eq!(kind("request.submitted"), "request.submitted");
        assert_eq!(kind("verdicts"), "verdicts");
    }
}
