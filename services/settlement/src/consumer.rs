//! Deliveries: what was submitted is held or rejected, what was decided is settled or released.
//!
//! Every handler runs in the transaction of [`infera_bus::consume`]: ledger, request, receipt, journal and the messages
//! to others commit together or not at all.

use infera_bus::{Envelope, Reject, outbox};
use infera_protocol::{evidence::Evidence, ids::message_id, receipt::Receipt, registry::Manifest};
use infera_runtime::{clock, network::Live};
use infera_wire::{
    WireError,
    convert::{self, Funded, Submitted},
    decode,
    topology::keys,
    v1,
};
use sea_orm::DatabaseTransaction;
use uuid::Uuid;

use crate::{
    domain::{self, Quote, Rejection, State},
    escrow::{Freshness, spend},
    exposure::Exposure,
    holds,
    ledger::{self, LedgerError},
    metrics::Metrics,
    store::{
        requests::{self, Close, NewRequest, ReceiptRow, RequestRow},
        rewards,
    },
};

/// What the handlers need.
pub struct Consumer {
    pub manifest: Manifest,
    pub live: Live,
    pub metrics: Metrics,
    /// Above its cap no paid request is funded.
    pub exposure: Exposure,
    /// Escrow is spent only while the chain is seen.
    pub freshness: Freshness,
    /// Told that a receipt was written.
    pub written: std::sync::Arc<tokio::sync::Notify>,
}

impl From<LedgerError> for Reject {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Db(error) => error.into(),
            other => Self::DeadLetter(other.to_string()),
        }
    }
}

impl Consumer {
    /// `request.submitted`: holds the price and says `RequestFunded`, or says `RequestRejected`.
    ///
    /// # Errors
    /// [`Reject`].
    pub async fn submitted(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let wire: v1::RequestSubmitted = decode("RequestSubmitted", &envelope.body)?;
        let submitted = convert::submitted(&wire)?;
        let id = submitted.request.id;
        if let Some(row) = requests::find(tx, id).await? {
            return self.again(tx, &submitted, &row).await;
        }
        let now_ms = clock::now_ms();
        let roots = self.live.now();
        let registry = roots.registries.current();
        let quote = domain::quote(&submitted, registry);
        let (price_micro, held_micro) =
            quote.as_ref().map_or((0, 0), |quote| (quote.price_micro, quote.hold_micro));
        let new = NewRequest {
            id,
            account: &submitted.account,
            model: &submitted.model,
            request_hash: submitted.request.hash(&self.manifest.domain),
            k: submitted.k,
            calibration_hash: registry.calibration.hash(),
            price_micro,
            held_micro,
            deadline_ms: submitted.deadline_ms,
            prompt_tokens: u32::try_from(submitted.request.prompt.len()).unwrap_or(u32::MAX),
            submitted_at_ms: submitted.submitted_at_ms,
        };
        if !requests::open(tx, &new, now_ms).await? {
            return Err(Reject::Retry("the request is being funded by somebody else".into()));
        }
        let outcome = match quote.and_then(|quote| self.admissible(quote)) {
            Ok(quote) => {
                let (account, micro) = (&submitted.account, quote.hold_micro);
                spend::hold(tx, id, account, micro, &self.freshness, submitted.deadline_ms, now_ms).await?
            }
            Err(rejection) => Err(rejection),
        };
        match outcome {
            Ok(()) => {
                tracing::info!(request = %id, held_micro, "request funded");
                self.metrics.request("funded");
                say_funded(tx, submitted, price_micro, held_micro, now_ms).await
            }
            Err(rejection) => {
                tracing::info!(request = %id, code = rejection.code, "request rejected");
                self.metrics.request("rejected");
                requests::close(tx, id, &Close::rejected(&rejection), now_ms).await?;
                say_rejected(tx, &submitted, rejection.code, &rejection.message).await
            }
        }
    }

    /// Paid work only below the exposure cap.
    fn admissible(&self, quote: Quote) -> Result<Quote, Rejection> {
        match self.exposure.rejection().filter(|_| quote.hold_micro > 0) {
            Some(rejection) => Err(rejection),
            None => Ok(quote),
        }
    }

    /// The same request under another message id: says the same again, moves nothing.
    async fn again(
        &self,
        tx: &DatabaseTransaction,
        submitted: &Submitted,
        row: &RequestRow,
    ) -> Result<(), Reject> {
        if row.account != submitted.account {
            return Err(Reject::DeadLetter("the request's id belongs to another account".into()));
        }
        let hash = submitted.request.hash(&self.manifest.domain);
        if row.request_hash != hash.0 || row.k != i64::from(submitted.k) {
            return Err(Reject::DeadLetter(
                "the request's id belongs to another request: its content or k differs".into(),
            ));
        }
        match state(row)? {
            State::Open => {
                let (price, held) = (positive(row.price_micro)?, positive(row.held_micro)?);
                say_funded(tx, submitted.clone(), price, held, row.funded_at_ms).await
            }
            State::Rejected => say_rejected(tx, submitted, &row.code, &row.message).await,
            State::Settled | State::Released => Ok(()),
        }
    }

    /// `verdict.*`: a closing verdict settles or releases the hold; the first one counts.
    ///
    /// # Errors
    /// [`Reject`]; `Retry` for a verdict that overtook its request.
    pub async fn verdict(&self, tx: &DatabaseTransaction, envelope: &Envelope) -> Result<(), Reject> {
        let verdict: v1::Verdict = decode("Verdict", &envelope.body)?;
        let id = convert::uuid("verdict.request_id", &verdict.request_id)?;
        let outcome = convert::required("verdict.outcome", &verdict.outcome)?;
        let open = |outcome: &v1::verdict::Outcome| {
            use v1::verdict::Outcome;
            matches!(outcome, Outcome::MoreNodes(_) | Outcome::MoreReferees(_))
        };
        if open(outcome) {
            return Ok(());
        }
        let Some(row) = requests::find(tx, id).await? else {
            return Err(Reject::Retry("the request is not funded yet".into()));
        };
        if state(&row)? != State::Open {
            tracing::debug!(request = %id, state = row.state, "verdict of a closed request");
            return Ok(());
        }
        let now_ms = clock::now_ms();
        match outcome {
            v1::verdict::Outcome::Verified(verified) => self.settle(tx, &row, verified, now_ms).await,
            v1::verdict::Outcome::Failed(failed) => self.release(tx, &row, failed, now_ms).await,
            v1::verdict::Outcome::MoreNodes(_) | v1::verdict::Outcome::MoreReferees(_) => Ok(()),
        }
    }

    async fn release(
        &self,
        tx: &DatabaseTransaction,
        row: &RequestRow,
        failed: &v1::Failed,
        now_ms: i64,
    ) -> Result<(), Reject> {
        if !holds::give_back(tx, row, &failed.code, &failed.reason, now_ms).await? {
            return Err(Reject::Retry("the request is being closed by somebody else".into()));
        }
        self.metrics.request("released");
        tracing::info!(request = %row.id, code = failed.code, released_micro = row.held_micro, "hold released");
        Ok(())
    }

    async fn settle(
        &self,
        tx: &DatabaseTransaction,
        row: &RequestRow,
        verified: &v1::Verified,
        now_ms: i64,
    ) -> Result<(), Reject> {
        let (evidence, receipt) = self.receipt(row, &verified.evidence)?;
        let hold = spend::take(tx, row).await?;
        let closing = domain::settle_transfer(&row.account, hold, evidence.k, &receipt)?;
        let charged_micro = closing.charged.micro();
        let close = Close { state: State::Settled, charged_micro, code: "", message: "" };
        if !requests::close(tx, row.id, &close, now_ms).await? {
            return Err(Reject::Retry("the request is being closed by somebody else".into()));
        }
        ledger::post(tx, &closing.transfer, now_ms).await?;
        spend::charge(tx, row, receipt.output_tokens, &closing.charged).await?;
        let bytes = serde_json::to_vec(&receipt).map_err(|error| Reject::DeadLetter(error.to_string()))?;
        let issued = v1::ReceiptIssued { receipt: bytes.clone(), model: row.model.clone() };
        let stored = ReceiptRow {
            request_id: row.id,
            account: row.account.clone(),
            receipt: bytes,
            evidence: evidence.canonical().map_err(|error| Reject::DeadLetter(error.to_string()))?,
        };
        requests::add_receipt(tx, stored, receipt.leaf().to_vec(), now_ms).await?;
        rewards::note_unpaid(tx, row.id, &receipt.unpaid, now_ms).await?;
        outbox::enqueue(tx, keys::RECEIPT, message_id("receipt", row.id, 0), &issued).await?;
        self.metrics.request("settled");
        self.metrics.charged(charged_micro);
        // Early at worst: the next count corrects it.
        self.exposure.charged(charged_micro);
        tracing::info!(request = %row.id, charged_micro, nodes = receipt.verified.len(), "request settled");
        // Early at worst: the batcher looks again soon.
        self.written.notify_one();
        Ok(())
    }

    /// The receipt that follows from the evidence, which is checked: money moves by signatures, not by the verifier's
    /// word.
    fn receipt(&self, row: &RequestRow, evidence: &[u8]) -> Result<(Evidence, Receipt), Reject> {
        let dead =
            |reason: String| Reject::DeadLetter(format!("the verdict's evidence is not usable: {reason}"));
        let evidence: Evidence = serde_json::from_slice(evidence).map_err(|e| dead(e.to_string()))?;
        let calibration = evidence.terms.calibration.hash();
        let fits = [
            ("request.id", evidence.request.id == row.id),
            ("account", evidence.account == row.account),
            ("model", evidence.model == row.model),
            ("price_micro", u64::try_from(row.price_micro) == Ok(evidence.price_micro)),
            ("domain", evidence.domain == self.manifest.domain),
            ("dispatcher", self.manifest.dispatchers.contains(&evidence.dispatcher)),
            ("request_hash", evidence.request_hash().0[..] == row.request_hash[..]),
            ("k", i64::from(evidence.k) == row.k),
            // Decided under the calibration of its funding, or after a change under the new one.
            (
                "terms.calibration",
                calibration.0[..] == row.calibration_hash[..]
                    || calibration == self.live.now().registries.current().calibration.hash(),
            ),
        ];
        if let Some((field, _)) = fits.iter().find(|(_, fits)| !fits) {
            return Err(dead(format!("`{field}` is not the funded request's or this network's")));
        }
        evidence
            .check_request()
            .and_then(|()| evidence.check_assignment())
            .and_then(|()| evidence.check_slots())
            .and_then(|()| evidence.check_post())
            .and_then(|()| evidence.check_referees())
            .map_err(|error| dead(error.to_string()))?;
        let receipt = Receipt::build(&evidence).map_err(|error| dead(error.to_string()))?;
        Ok((evidence, receipt))
    }
}

async fn say_funded(
    tx: &DatabaseTransaction,
    submitted: Submitted,
    price_micro: u64,
    held_micro: u64,
    funded_at_ms: i64,
) -> Result<(), Reject> {
    let id = message_id("request.funded", submitted.request.id, 0);
    let funded = convert::funded_to_wire(&Funded { submitted, held_micro, price_micro, funded_at_ms });
    Ok(outbox::enqueue(tx, keys::REQUEST_FUNDED, id, &funded).await?)
}

async fn say_rejected(
    tx: &DatabaseTransaction,
    submitted: &Submitted,
    code: &str,
    message: &str,
) -> Result<(), Reject> {
    let request: Uuid = submitted.request.id;
    let rejected = v1::RequestRejected {
        request_id: request.as_bytes().to_vec(),
        reply_to: submitted.reply_to.clone(),
        code: code.to_owned(),
        message: message.to_owned(),
        account: submitted.account.clone(),
    };
    let key = keys::request_rejected(&submitted.reply_to);
    Ok(outbox::enqueue(tx, &key, message_id("request.rejected", request, 0), &rejected).await?)
}

fn state(row: &RequestRow) -> Result<State, Reject> {
    State::parse(&row.state)
        .ok_or_else(|| Reject::DeadLetter(format!("`requests.state` of {} is `{}`", row.id, row.state)))
}

fn positive(micro: i64) -> Result<u64, Reject> {
    u64::try_from(micro).map_err(|_| WireError::invalid("requests", "a stored amount is negative").into())
}
