//! What the verifier counts.

use infera_protocol::agreement::Relation;
use infera_runtime::health::{Health, SECONDS};
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use crate::domain::{Finding, relation_name};

#[derive(Clone)]
pub(crate) struct Metrics {
    /// By outcome: verified, more_nodes, more_referees, failed.
    pub verdicts: IntCounterVec,
    /// Pairs of results by relation.
    pub relations: IntCounterVec,
    /// Stored verdicts that were said again.
    pub repeated: IntCounter,
    /// Messages that no honest service sent.
    pub rejected: IntCounter,
    /// Rounds of the exact class with unequal results.
    pub exact_alarms: IntCounter,
    /// From the delivery to the commit's start.
    pub decide_seconds: Histogram,
    pub unindexed: IntGauge,
    pub indexed: IntCounter,
}

impl Metrics {
    pub fn new(health: &Health) -> prometheus::Result<Self> {
        let metrics = Self {
            verdicts: health.counters(
                "infera_verifier_verdicts_total",
                "Verdicts by outcome; repeats are not counted.",
                &["outcome"],
            )?,
            relations: health.counters(
                "infera_verifier_relations_total",
                "Compared pairs of results by how they stand to each other.",
                &["relation"],
            )?,
            repeated: health.counter(
                "infera_verifier_verdicts_repeated_total",
                "Stored verdicts that were published again for a repeated message.",
            )?,
            rejected: health.counter(
                "infera_verifier_rejected_total",
                "Messages refused because no honest service could have sent them.",
            )?,
            exact_alarms: health.counter(
                "infera_verifier_exact_inequality_total",
                "Rounds of the exact class whose results were not all equal: an alarm about the class.",
            )?,
            decide_seconds: health.histogram(
                "infera_verifier_decide_duration_seconds",
                "Time to check, compare and decide one round.",
                SECONDS,
            )?,
            unindexed: health.gauge(
                "infera_verifier_unindexed_answers",
                "Verified answers whose vectors are not in the index yet.",
            )?,
            indexed: health.counter("infera_verifier_indexed_total", "Vectors written to the index.")?,
        };
        for outcome in ["verified", "more_nodes", "more_referees", "failed"] {
            metrics.verdicts.with_label_values(&[outcome]);
        }
        Ok(metrics)
    }

    /// Counts the pairs; returns how many are equal, unconfirmed and in disagreement.
    pub fn count(&self, findings: &[Finding]) -> (usize, usize, usize) {
        let (mut equal, mut unconfirmed, mut disagree) = (0, 0, 0);
        for finding in findings {
            self.relations.with_label_values(&[relation_name(finding.relation)]).inc();
            match finding.relation {
                Relation::Equal => equal += 1,
                Relation::Unconfirmed { .. } => unconfirmed += 1,
                Relation::Disagree(_) => disagree += 1,
            }
        }
        (equal, unconfirmed, disagree)
    }
}
