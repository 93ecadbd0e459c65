//! `verifier.collected` and `verifier.close`: one transaction each, from which one verdict follows.

use std::sync::Arc;

use infera_bus::{Envelope, Reject, outbox};
use infera_embed::{Embedder, similarity_millionths};
use infera_protocol::agreement::Relation;
use infera_protocol::bytes::{Hash32, NodeId};
use infera_protocol::ids::message_id;
use infera_runtime::clock;
use infera_runtime::network::Live;
use infera_wire::topology::keys;
use infera_wire::{MAX_BUS_BODY_BYTES, Message, v1};
use sea_orm::DatabaseTransaction;
use tokio::sync::Notify;
use tracing::Instrument;
use uuid::Uuid;

use crate::domain::{self, Case, EXACT_CLASS, Finding, Judgement, Rejection};
use crate::fit::unfit;
use crate::metrics::Metrics;
use crate::store::{self, verdicts};
use crate::texts::{Text, Texts};

/// What both consumers share.
pub(crate) struct Arbiter {
    pub live: Live,
    pub texts: Texts,
    pub embedder: Embedder,
    pub metrics: Metrics,
    /// Wakes the indexer.
    pub indexable: Arc<Notify>,
}

impl Arbiter {
    /// Handles `results.collected`.
    pub async fn collected(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let timer = self.metrics.decide_seconds.start_timer();
        let wire: v1::ResultsCollected = self.decode("results.collected", envelope)?;
        let mut case = domain::admit(&self.live.now(), &wire, clock::now_ms()).map_err(|e| self.reject(e))?;
        drop(wire);
        let (id, round) = (case.request_id(), case.round_key());
        if let Some(stored) = store::closing(tx, id).await? {
            return self.repeat(tx, stored).await;
        }
        if let Some(stored) = store::verdict(tx, id, round).await? {
            return self.repeat(tx, stored).await;
        }
        let span = tracing::info_span!(
            "decide",
            otel.name = "verifier decide",
            infera.request.id = %id,
            infera.attempt = case.evidence.attempt,
            infera.round = case.round,
            infera.outcome = tracing::field::Empty,
        );
        case.evidence.unfit = self.unfit(&case).await?;
        self.note_similarities(&mut case).await?;
        self.decide(tx, &case).instrument(span).await?;
        timer.observe_duration();
        Ok(())
    }

    /// The nodes whose results do not keep to the request's grammar or stop strings. On another thread.
    async fn unfit(&self, case: &Case) -> Result<Vec<NodeId>, Reject> {
        let request = case.evidence.request.clone();
        if request.grammar.is_none() && request.stop.is_empty() {
            return Ok(Vec::new());
        }
        let text = self.text(&request.model_root)?;
        let results = case.outputs().into_iter().map(|(node, output)| (node, output.clone())).collect();
        let id = case.request_id();
        let check = move || unfit(&request, text.prompt.tokenizer(), &text.vocabulary, results);
        let found = tokio::task::spawn_blocking(check).await.map_err(|e| Reject::Retry(e.to_string()))?;
        for (node, reason) in &found {
            tracing::warn!(request_id = %id, %node, reason, "a result does not keep to its grammar or stop strings");
        }
        Ok(found.into_iter().map(|(node, _)| node).collect())
    }

    fn text(&self, model: &Hash32) -> Result<Arc<Text>, Reject> {
        let text = self.texts.get(model);
        text.ok_or_else(|| Reject::Retry(format!("the tokenizer of model {model} is not loaded")))
    }

    async fn decide(&self, tx: &DatabaseTransaction, case: &Case) -> Result<(), Reject> {
        let findings = domain::findings(&case.evidence);
        let Judgement { verdict, evidence } =
            domain::judge(case, MAX_BUS_BODY_BYTES).map_err(|e| self.reject(e))?;
        let (id, round) = (case.request_id(), case.round_key());
        tracing::Span::current().record("infera.outcome", domain::outcome_name(&verdict));
        if matches!(verdict.outcome, Some(v1::verdict::Outcome::Failed(_)))
            && let Some(last) = store::last_round(tx, id).await?
            && domain::attempt_of(round) < domain::attempt_of(last)
        {
            // A newer attempt is under way; what an older one lacks says nothing about it.
            tracing::info!(request_id = %id, attempt = case.evidence.attempt, newest = domain::attempt_of(last),
                "failure of an older attempt ignored");
            return Ok(());
        }
        let row = verdicts::Model {
            request_id: id,
            round,
            outcome: domain::outcome_name(&verdict).to_owned(),
            model: case.evidence.model.clone(),
            class: case.evidence.class.clone(),
            reply_to: case.reply_to.clone(),
            decided_at_ms: verdict.decided_at_ms,
            body: verdict.encode_to_vec(),
            evidence,
        };
        if !self.write(tx, row, domain::is_closing(&verdict)).await? {
            return Ok(());
        }
        store::insert_findings(tx, id, round, &findings).await?;
        if matches!(verdict.outcome, Some(v1::verdict::Outcome::Verified(_))) {
            store::to_index(tx, id, round, verdict.decided_at_ms).await?;
            self.indexable.notify_one();
        }
        self.report(case, &verdict, &findings);
        Ok(())
    }

    /// Handles `close.requested`.
    pub async fn close(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let wire: v1::CloseRequested = self.decode("close.requested", envelope)?;
        let (submitted, verdict) = domain::close(&wire, clock::now_ms()).map_err(|e| self.reject(e))?;
        let id = submitted.request.id;
        if let Some(stored) = store::closing(tx, id).await? {
            return self.repeat(tx, stored).await;
        }
        let row = verdicts::Model {
            request_id: id,
            round: domain::CLOSE_ROUND,
            outcome: domain::outcome_name(&verdict).to_owned(),
            model: submitted.model,
            class: String::new(),
            reply_to: submitted.reply_to,
            decided_at_ms: verdict.decided_at_ms,
            body: verdict.encode_to_vec(),
            evidence: None,
        };
        if self.write(tx, row, true).await? {
            self.metrics.verdicts.with_label_values(&["failed"]).inc();
            tracing::info!(request_id = %id, code = wire.reason, "request closed");
        }
        Ok(())
    }

    /// Stores a verdict and says it. `false`: another replica closed the request at the same time, and
    /// its verdict was said instead.
    async fn write(
        &self,
        tx: &DatabaseTransaction,
        row: verdicts::Model,
        closing: bool,
    ) -> Result<bool, Reject> {
        let (id, round) = (row.request_id, row.round);
        if closing && !store::close(tx, id, round).await? {
            let stored = store::closing(tx, id).await?;
            let stored =
                stored.ok_or_else(|| Reject::Retry("the closing verdict is not there yet".into()))?;
            self.repeat(tx, stored).await?;
            return Ok(false);
        }
        // Comparing took its time: the request may have been closed meanwhile.
        if !closing && let Some(stored) = store::closing(tx, id).await? {
            self.repeat(tx, stored).await?;
            return Ok(false);
        }
        let (reply_to, body) = (row.reply_to.clone(), row.body.clone());
        if !store::insert(tx, row).await? {
            // Rolled back with everything above; the redelivery finds it.
            return Err(Reject::Retry("another replica decided this round at the same time".into()));
        }
        say(tx, id, round, &reply_to, body).await?;
        Ok(true)
    }

    async fn repeat(&self, tx: &DatabaseTransaction, stored: verdicts::Model) -> Result<(), Reject> {
        self.metrics.repeated.inc();
        tracing::info!(request_id = %stored.request_id, outcome = stored.outcome, "verdict said again");
        say(tx, stored.request_id, stored.round, &stored.reply_to, stored.body).await
    }

    /// Texts are embedded only where answers differ, each once.
    async fn note_similarities(&self, case: &mut Case) -> Result<(), Reject> {
        let answers = case.evidence.answers();
        if answers.len() < 2 {
            return Ok(());
        }
        let model = &case.evidence.request.model_root;
        let text = self.text(model)?;
        let texts = answers.iter().map(|(_, _, output)| text.prompt.decode(&output.tokens)).collect();
        let vectors = self.embedder.embed(texts).await.map_err(|e| Reject::Retry(e.to_string()))?;
        domain::note_similarities(&mut case.evidence, |i, j| similarity_millionths(&vectors[i], &vectors[j]));
        Ok(())
    }

    fn report(&self, case: &Case, verdict: &v1::Verdict, findings: &[Finding]) {
        let (equal, unconfirmed, disagree) = self.metrics.count(findings);
        let outcome = domain::outcome_name(verdict);
        self.metrics.verdicts.with_label_values(&[outcome]).inc();
        let (request_id, attempt, round) = (case.request_id(), case.evidence.attempt, case.round);
        tracing::info!(%request_id, attempt, round, outcome, equal, unconfirmed, disagree, "verdict");
        // Once an attempt: later rounds see the same results again.
        let first = case.round == 1 && case.evidence.class == EXACT_CLASS;
        if first && findings.iter().any(|f| f.relation != Relation::Equal) {
            self.metrics.exact_alarms.inc();
            tracing::warn!(%request_id, attempt, round, unconfirmed, disagree,
                "results of the exact class are not equal: a faulty node, or the class is not exact");
        }
    }

    fn decode<M: Message + Default>(&self, kind: &'static str, envelope: &Envelope) -> Result<M, Reject> {
        infera_wire::decode(kind, &envelope.body).map_err(|e| self.reject(Rejection::Wire(e)))
    }

    fn reject(&self, rejection: Rejection) -> Reject {
        self.metrics.rejected.inc();
        Reject::DeadLetter(rejection.to_string())
    }
}

async fn say(
    tx: &DatabaseTransaction,
    request_id: Uuid,
    round: i64,
    reply_to: &str,
    body: Vec<u8>,
) -> Result<(), Reject> {
    let id = message_id("verdict", request_id, round.unsigned_abs());
    Ok(outbox::enqueue_bytes(tx, &keys::verdict(reply_to), id, body).await?)
}
