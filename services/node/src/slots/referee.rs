//! Referee's work (protocol section 8): other nodes' answers, scored.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use infera_protocol::{
    bytes::Hash32,
    referee::{Report, TokenScore, report_digest},
    request::{Output, Request},
};
use infera_runtime::{CancellationToken, trace};
use infera_wire::{MAX_FRAME_BYTES, WireError, convert, v1};
use parking_lot::Mutex;
use tokio::{sync::Semaphore, time::sleep};
use tracing::Instrument;
use uuid::Uuid;

use super::Slots;
use crate::{
    engine::{Busy, PREEMPTED, Score, ScoreJob},
    journal::Key,
};

/// Leases that are worked on or wait; further ones are declined.
const MOST_LEASES: usize = 16;
/// Answers of one lease.
const MOST_SUBJECTS: usize = 8;
/// Most bytes of a token's score: a margin and a fingerprint of 8.
const SCORE_BYTES: usize = 4 + 1 + 8 * 6;
/// Room in a frame for all that is no score.
const FRAME_REST: usize = 8 * 1024;

/// A lease, by what it asks: it may come again, and with other answers of the same attempt.
type Task = (Key, Vec<Hash32>);

struct Running {
    cancelled: CancellationToken,
    until_ms: i64,
}

/// The leases that were taken.
pub(super) struct Referees {
    running: Mutex<HashMap<Task, Running>>,
    /// The engine's places.
    places: Semaphore,
}

impl Referees {
    pub fn new(scorers: usize) -> Self {
        Self { running: Mutex::default(), places: Semaphore::new(scorers) }
    }

    pub fn running(&self) -> usize {
        self.running.lock().len()
    }

    pub fn cancel(&self, key: Key) {
        self.end(|task, _| task.0 == key);
    }

    pub fn expire(&self, now_ms: i64) {
        self.end(|_, running| running.until_ms < now_ms);
    }

    fn end(&self, which: impl Fn(&Task, &Running) -> bool) {
        self.running.lock().retain(|task, running| {
            let ends = which(task, running);
            if ends {
                running.cancelled.cancel();
            }
            !ends
        });
    }
}

/// A lease that was read.
struct Lease {
    request: Request,
    key: Key,
    /// Without fingerprints.
    subjects: Vec<Output>,
}

fn read(lease: &v1::RefereeLease) -> Result<Lease, WireError> {
    let request = convert::request(convert::required("referee_lease.request", &lease.request)?)?;
    if lease.subjects.is_empty() || lease.subjects.len() > MOST_SUBJECTS {
        let text = format!("{}, allowed are 1 to {MOST_SUBJECTS}", lease.subjects.len());
        return Err(WireError::invalid("referee_lease.subjects", text));
    }
    let subject = |subject: &v1::Subject| {
        let finish = convert::finish("subject.finish", subject.finish)?;
        Ok(Output { tokens: subject.tokens.clone(), fingerprints: Vec::new(), finish })
    };
    let subjects = lease.subjects.iter().map(subject).collect::<Result<_, WireError>>()?;
    Ok(Lease { key: (request.id, lease.attempt), request, subjects })
}

/// Scores as they are reported. `foreign` says which tokens the model does not know: nothing else stood in for them.
pub(crate) fn report(scores: &[Score], foreign: impl Fn(usize) -> bool) -> Report {
    let one = |(i, score): (usize, &Score)| TokenScore {
        margin_micro: if foreign(i) { u32::MAX } else { TokenScore::margin_micro(score.margin) },
        fingerprint: score.fingerprint.clone(),
    };
    Report { scores: scores.iter().enumerate().map(one).collect() }
}

impl Slots {
    /// Takes a referee's lease, or declines it. One that is worked on already is not begun again; one that was answered
    /// is: the report is the same, byte for byte.
    pub fn referee(self: &Arc<Self>, lease: &v1::RefereeLease, draining: bool) {
        let (until_ms, traceparent) = (lease.deadline_ms, &lease.traceparent);
        let lease = match read(lease) {
            Ok(lease) => lease,
            Err(error) => return tracing::warn!(%error, "a referee's lease is malformed"),
        };
        let task: Task = (lease.key, lease.subjects.iter().map(Output::hash).collect());
        let cancelled = CancellationToken::new();
        {
            let mut running = self.referees.running.lock();
            if running.contains_key(&task) {
                return;
            }
            let full = running.len() >= MOST_LEASES || !self.outgoing.takes_large();
            if let Some(reason) = self.unfit(&lease.request, draining).or(full.then_some("full")) {
                return self.decline(&lease.request, lease.key, reason);
            }
            running.insert(task.clone(), Running { cancelled: cancelled.clone(), until_ms });
        }
        let span = tracing::info_span!(
            "node referee",
            request_id = %lease.key.0,
            attempt = lease.key.1,
            node = %self.identity.node(),
            subjects = lease.subjects.len(),
            tokens = lease.subjects.iter().map(|subject| subject.tokens.len()).sum::<usize>(),
        );
        trace::set_parent(&span, traceparent);
        let slots = self.clone();
        let work = async move {
            tokio::select! {
                () = slots.judge(&lease) => { slots.referees.running.lock().remove(&task); }
                // Whoever cancelled it has removed it.
                () = cancelled.cancelled() => {}
            }
        };
        tokio::spawn(work.instrument(span));
    }

    /// Reports on all answers, or declines.
    async fn judge(&self, lease: &Lease) {
        let began = Instant::now();
        match self.reports(lease).await {
            Ok(reports) => {
                self.outgoing.send(v1::from_node::Message::RefereeReport(v1::RefereeReport {
                    request_id: lease.key.0.as_bytes().to_vec(),
                    attempt: lease.key.1,
                    reports,
                }));
                let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(request_id = %lease.key.0, attempt = lease.key.1, ms, "answers are scored");
            }
            Err(reason) => self.decline(&lease.request, lease.key, reason),
        }
    }

    async fn reports(&self, lease: &Lease) -> Result<Vec<v1::SubjectReport>, &'static str> {
        let tokens: usize = lease.subjects.iter().map(|subject| subject.tokens.len()).sum();
        if tokens.saturating_mul(SCORE_BYTES) > MAX_FRAME_BYTES - FRAME_REST {
            tracing::info!(tokens, request_id = %lease.key.0, "the report would be larger than a frame");
            return Err("engine");
        }
        let place = self.place(&lease.request, lease.key.1);
        let mut reports = Vec::new();
        for subject in &lease.subjects {
            let report = match &self.setting.faults {
                None => self.score_subject(&lease.request, subject).await?,
                Some(faults) => faults.report(self, &lease.request, subject).await?,
            };
            let scores = report.encode();
            let (domain, node) = (&self.identity.domain, &place.node);
            let digest =
                report_digest(domain, &place.request_hash, place.attempt, node, &subject.hash(), &scores);
            reports.push(v1::SubjectReport { scores, signature: self.identity.sign(&digest).to_vec() });
        }
        Ok(reports)
    }

    /// One answer. A token that the model does not know could not have been drawn; in its place, token 0 is read.
    pub(crate) async fn score_subject(
        &self,
        request: &Request,
        subject: &Output,
    ) -> Result<Report, &'static str> {
        let foreign = |token: u32| token as usize >= self.engine.vocabulary();
        let known: Vec<u32> = subject.tokens.iter().map(|t| if foreign(*t) { 0 } else { *t }).collect();
        let scores = self.score(request, &known).await?;
        Ok(report(&scores, |i| foreign(subject.tokens[i])))
    }

    /// Scores tokens as an answer to a request, once there is a place; or the reason of a decline.
    pub(crate) async fn score(&self, request: &Request, tokens: &[u32]) -> Result<Vec<Score>, &'static str> {
        let grammar = self.grammar(request).await?;
        let _place = self.referees.places.acquire().await.map_err(|_| "engine")?;
        let job = || ScoreJob {
            id: Uuid::now_v7(),
            prompt: request.prompt.clone(),
            tokens: tokens.to_vec(),
            params: request.sampling.clone(),
            seed: request.seed,
            grammar: grammar.clone(),
        };
        let scores = loop {
            match self.engine.score(job()) {
                Ok(scores) => break scores,
                // A lease that was cancelled leaves the engine at its next step.
                Err(Busy::Scoring { .. }) => sleep(Duration::from_millis(10)).await,
                Err(busy) => {
                    tracing::info!(%busy, request_id = %request.id, "an answer can't be scored");
                    return Err(if busy == Busy::Paused { PREEMPTED } else { "engine" });
                }
            }
        };
        match scores.await {
            Ok(Ok(scores)) => Ok(scores),
            Ok(Err(reason)) if reason == PREEMPTED => Err(PREEMPTED),
            Ok(Err(reason)) => {
                tracing::error!(reason, request_id = %request.id, "the engine failed");
                Err("engine")
            }
            // The engine has ended.
            Err(_) => Err("engine"),
        }
    }
}
