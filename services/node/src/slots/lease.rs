//! From a lease to its commitment.

use std::{io, sync::Arc, time::Duration};

use infera_grammar::Matcher;
use infera_protocol::{
    commitment::commitment,
    ids,
    request::{Output, Request},
    typed,
};
use infera_runtime::{clock, trace};
use infera_wire::{convert, v1};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tracing::Instrument;
use uuid::Uuid;

use super::{KEEP_MS, OLDEST_MS, Slots, State};
use crate::{
    engine::{Busy, Event, Job, PREEMPTED},
    journal::{Entry, Key, Promise},
};

/// Tokens of a stream go out this often; the first one at once.
const DELTA_EVERY: Duration = Duration::from_millis(50);
/// How long a new attempt waits for the slot of the attempt that it replaces: one step of the engine.
const SUPERSEDE: Duration = Duration::from_secs(5);

/// A lease that was taken.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub request: Request,
    pub key: Key,
    pub job: Uuid,
    pub stream: bool,
    pub commit_deadline_ms: i64,
}

impl Slots {
    /// Takes a lease, or declines it.
    pub fn lease(self: &Arc<Self>, lease: &v1::Lease, draining: bool) {
        let request = match convert::required("lease.request", &lease.request).and_then(convert::request) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!(%error, "a lease is malformed");
                return;
            }
        };
        let key = (request.id, lease.attempt);
        if self.known(key) {
            return;
        }
        match self.journal.read(key) {
            Ok(None) => {}
            Ok(Some(Entry::Open(promise))) => return self.promised(key, promise),
            Ok(Some(Entry::Closed)) => return self.decline(&request, key, "closed"),
            Err(error) => {
                // There may have been a promise, so this slot is not computed again.
                tracing::error!(%error, request_id = %key.0, attempt = key.1, "a promise of the journal is damaged");
                return self.decline(&request, key, "journal");
            }
        }
        let disliked = || self.setting.faults.as_ref().and_then(|faults| faults.declines(&request));
        let stale = || is_stale(key.0).then_some("stale");
        if let Some(reason) = self.unfit(&request, draining).or_else(stale).or_else(disliked) {
            return self.decline(&request, key, reason);
        }
        let patience = if self.supersede(key) { SUPERSEDE } else { Duration::ZERO };
        let job = Uuid::now_v7();
        let state = State::Generating { job, until_ms: lease.commit_deadline_ms, cancelled: false };
        self.states.lock().insert(key, state);
        let span = tracing::info_span!(
            "node generate",
            "gen_ai.operation.name" = "chat",
            request_id = %request.id,
            attempt = lease.attempt,
            node = %self.identity.node(),
            "gen_ai.usage.output_tokens" = tracing::field::Empty,
        );
        trace::set_parent(&span, &lease.traceparent);
        let (stream, commit_deadline_ms) = (lease.stream, lease.commit_deadline_ms);
        let work = Work { request, key, job, stream, commit_deadline_ms };
        let slots = self.clone();
        tokio::spawn(async move { slots.work(work, patience).await }.instrument(span));
    }

    /// Why this node can't work on a request, whatever it is asked to do with it.
    pub(super) fn unfit(&self, request: &Request, draining: bool) -> Option<&'static str> {
        if draining {
            return Some("draining");
        }
        (request.model_root != self.setting.weights.root()).then_some("model")
    }

    /// Earlier attempts of a request are wanted by nobody once there is a later one. True if one was computed.
    fn supersede(&self, key: Key) -> bool {
        let mut any = false;
        for (other, state) in self.states.lock().iter_mut() {
            if let State::Generating { job, cancelled, .. } = state
                && other.0 == key.0
                && other.1 < key.1
            {
                *cancelled = true;
                self.engine.cancel(*job);
                any = true;
            }
        }
        any
    }

    /// A lease that was delivered twice, or that an earlier run had promised: the same answer again.
    fn known(&self, key: Key) -> bool {
        let commit = match self.states.lock().get(&key) {
            None => return false,
            Some(State::Generating { .. }) => return true,
            Some(State::Promised { promise, .. }) => promise.commit.clone(),
        };
        self.outgoing.send(v1::from_node::Message::Commit(commit));
        true
    }

    async fn work(&self, work: Work, patience: Duration) {
        let began = Instant::now();
        let (request, key) = (&work.request, work.key);
        let output = match &self.setting.faults {
            None => self.compute(&work, patience).await,
            Some(faults) => faults.answer(self, &work, patience).await,
        };
        let wanted = self.is_wanted(&work);
        let output = match output {
            Ok(output) if wanted => output,
            Err(reason) if wanted => {
                self.remove(&work);
                return self.decline(request, key, reason);
            }
            _ => return self.remove(&work),
        };
        let tokens = output.tokens.len();
        tracing::Span::current().record("gen_ai.usage.output_tokens", tokens);
        if let Err(error) = self.promise(request, key, output) {
            tracing::error!(%error, request_id = %key.0, "a commitment can't be written and is not sent");
            self.remove(&work);
            // A file that is there is a promise: a decline would contradict it, and the lease just ends.
            if matches!(self.journal.read(key), Ok(None)) {
                self.decline(request, key, "journal");
            }
            return;
        }
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(request_id = %key.0, attempt = key.1, tokens, ms, "lease is committed");
    }

    /// Generates, with deltas if the lease asks for them; or the reason of a decline.
    pub(crate) async fn compute(&self, work: &Work, patience: Duration) -> Result<Output, &'static str> {
        let events = self.start(work, patience).await?;
        if !self.is_wanted(work) {
            self.engine.cancel(work.job);
        }
        self.collect(work, events).await
    }

    /// Begins a job; while all slots are taken it tries again for `patience`.
    async fn start(&self, work: &Work, patience: Duration) -> Result<mpsc::Receiver<Event>, &'static str> {
        let request = &work.request;
        let grammar = self.grammar(request).await?;
        let until = Instant::now() + patience;
        loop {
            let job = Job {
                id: work.job,
                prompt: request.prompt.clone(),
                params: request.sampling.clone(),
                max_tokens: request.max_tokens,
                stop: request.stop.clone(),
                seed: request.seed,
                end_tokens: self.setting.end_tokens.clone(),
                grammar: grammar.clone(),
            };
            match self.engine.generate(job) {
                Ok(events) => return Ok(events),
                Err(Busy::Full { .. }) if Instant::now() < until => sleep(Duration::from_millis(10)).await,
                Err(busy) => {
                    tracing::info!(%busy, request_id = %request.id, "lease is declined");
                    return Err(match busy {
                        Busy::Full { .. } => "full",
                        Busy::Paused => PREEMPTED,
                        _ => "engine",
                    });
                }
            }
        }
    }

    /// The request's grammar, ready for its first token; or the reason of a decline.
    pub(super) async fn grammar(&self, request: &Request) -> Result<Option<Matcher>, &'static str> {
        let Some(grammar) = &request.grammar else { return Ok(None) };
        self.grammars.matcher(grammar).await.map(Some).map_err(|reason| {
            tracing::info!(reason, request_id = %request.id, "the grammar cannot be used, lease is declined");
            "grammar"
        })
    }

    /// Whether the slot is still this job's, and nobody cancelled it.
    pub(crate) fn is_wanted(&self, work: &Work) -> bool {
        let states = self.states.lock();
        matches!(states.get(&work.key), Some(State::Generating { job, cancelled: false, .. }) if *job == work.job)
    }

    fn remove(&self, work: &Work) {
        let mut states = self.states.lock();
        if matches!(states.get(&work.key), Some(State::Generating { job, .. }) if *job == work.job) {
            states.remove(&work.key);
        }
    }

    /// All tokens, or the reason of a decline; a job that was cancelled has one too, which nobody asks for.
    async fn collect(&self, work: &Work, mut events: mpsc::Receiver<Event>) -> Result<Output, &'static str> {
        let (mut tokens, mut fingerprints, mut sent) = (Vec::new(), Vec::new(), 0);
        let mut last_sent: Option<Instant> = None;
        while let Some(event) = events.recv().await {
            match event {
                Event::Token { token, fingerprint } => {
                    tokens.push(token);
                    fingerprints.extend(fingerprint.encode());
                    if let Some(faults) = &self.setting.faults {
                        faults.after_token(tokens.len()).await;
                    }
                    if last_sent.is_none_or(|last| last.elapsed() >= DELTA_EVERY) {
                        self.deltas(work, sent, &tokens[sent..]);
                        sent = tokens.len();
                        last_sent = Some(Instant::now());
                    }
                }
                Event::Finished { finish } => {
                    self.deltas(work, sent, &tokens[sent..]);
                    return Ok(Output { tokens, fingerprints, finish });
                }
                Event::Failed { reason } if reason == PREEMPTED => return Err(PREEMPTED),
                Event::Failed { reason } => {
                    tracing::error!(reason, request_id = %work.key.0, "the engine failed");
                    return Err("engine");
                }
            }
        }
        // Cancelled, or the engine has ended.
        Err("engine")
    }

    pub(crate) fn deltas(&self, work: &Work, offset: usize, tokens: &[u32]) {
        if work.stream && !tokens.is_empty() {
            self.outgoing.send(v1::from_node::Message::Deltas(v1::Deltas {
                request_id: work.key.0.as_bytes().to_vec(),
                attempt: work.key.1,
                offset: u32::try_from(offset).unwrap_or(u32::MAX),
                tokens: tokens.to_vec(),
            }));
        }
    }

    /// What a slot promises with this output.
    fn promise_of(&self, request: &Request, key: Key, output: Output) -> io::Result<Promise> {
        let (place, domain) = (self.place(request, key.1), &self.identity.domain);
        let salt = self.identity.salt(&place);
        let digest = commitment(domain, &place, &output, &salt);
        let state = |digest| self.identity.state(&digest).map_err(io::Error::other);
        let committed = state(typed::slot_commitment_digest(domain, &place, &digest))?;
        let revealed = state(typed::slot_reveal_digest(domain, &place, &output, &salt))?;
        Ok(Promise {
            commit: v1::Commit {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                commitment: digest.to_vec(),
                signature: self.identity.sign(&digest).to_vec(),
                statement: committed.to_vec(),
            },
            reveal: v1::Reveal {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                finish: convert::finish_to_wire(output.finish).into(),
                tokens: output.tokens,
                fingerprints: output.fingerprints,
                salt: salt.to_vec(),
                statement: revealed.to_vec(),
            },
        })
    }

    /// Commits: journal first, then the wire.
    fn promise(&self, request: &Request, key: Key, output: Output) -> io::Result<()> {
        let second = self.setting.faults.as_ref().and_then(|faults| faults.second(&output));
        let promise = self.promise_of(request, key, output)?;
        self.journal.write(key, &promise)?;
        infera_runtime::planned::hit("node.committed");
        self.promised(key, Box::new(promise));
        if let Some(output) = second {
            let commit = self.promise_of(request, key, output)?.commit;
            self.outgoing.send(v1::from_node::Message::Commit(commit));
        }
        Ok(())
    }

    /// A promise that is on disk: says it.
    fn promised(&self, key: Key, promise: Box<Promise>) {
        let commit = promise.commit.clone();
        let until_ms = clock::now_ms() + KEEP_MS;
        self.states.lock().insert(key, State::Promised { promise, until_ms });
        self.outgoing.send(v1::from_node::Message::Commit(commit));
    }
}

/// What was promised for such an old request may be forgotten.
fn is_stale(request: Uuid) -> bool {
    let made_ms = i64::try_from(ids::time_ms(request)).unwrap_or(i64::MAX);
    let stale = made_ms < clock::now_ms() - OLDEST_MS;
    if stale {
        tracing::warn!(%request, made_ms, "a request that is over a day old is declined: is this machine's clock right?");
    }
    stale
}
