//! What this node has leased: from the lease to the reveal, over lost connections and crashes.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use infera_grammar::Matcher;
use infera_protocol::{
    bytes::Hash32,
    commitment::{Slot, commitment, decline_digest},
    request::{Output, Request},
};
use infera_runtime::{CancellationToken, clock, trace};
use infera_wire::{convert, v1};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    engine::{Busy, Engine, Event, Job, PREEMPTED},
    fault::{self, Fault},
    grammar::Grammars,
    identity::Identity,
    journal::{Journal, Key, Promise},
};

/// Tokens of a stream go out this often; the first one at once.
const DELTA_EVERY: Duration = Duration::from_millis(50);
/// A promise that nobody asked for in this time is forgotten.
const KEEP_MS: i64 = 3_600 * 1_000;
/// Frames of streams that may wait for the wire; further ones are dropped, they are not durable.
const DELTAS: usize = 192;
/// Further frames that may wait. Whoever lets more pile up is disconnected: nothing but deltas is ever dropped while
/// the session goes on.
const ANSWERS: usize = 4_096;
/// How far this machine's clock may be behind the dispatcher's before a lease that runs is given up.
const CLOCK_SKEW_MS: i64 = 60_000;
/// How long a new attempt waits for the slot of the attempt that it replaces: one step of the engine.
const SUPERSEDE: Duration = Duration::from_secs(5);

/// What does not change while the node runs.
pub struct Setting {
    pub model_root: Hash32,
    pub end_tokens: Vec<u32>,
    pub fault: Option<Fault>,
}

enum State {
    /// The engine's job, and the moment after which nobody wants it.
    Generating {
        job: Uuid,
        until_ms: i64,
        /// By the dispatcher or a newer attempt: its end needs no answer.
        cancelled: bool,
    },
    Promised {
        promise: Box<Promise>,
        until_ms: i64,
    },
}

/// A lease that was taken.
struct Work {
    request: Request,
    key: Key,
    job: Uuid,
    stream: bool,
}

/// All slots, and the way to the dispatcher while there is one.
pub struct Slots {
    engine: Engine,
    pub identity: Identity,
    journal: Journal,
    pub setting: Setting,
    states: Mutex<HashMap<Key, State>>,
    grammars: Arc<Grammars>,
    outgoing: Mutex<Option<Outgoing>>,
}

/// The queue of one session, in the order of what happened: a commitment never overtakes its stream.
struct Outgoing {
    frames: mpsc::Sender<v1::FromNode>,
    /// Cancelled when the queue is full.
    behind: CancellationToken,
}

impl Outgoing {
    fn queued(&self) -> usize {
        self.frames.max_capacity() - self.frames.capacity()
    }
}

impl Slots {
    /// Takes up the promises of an earlier run.
    ///
    /// # Errors
    /// The journal can't be listed: without it, this node might answer a slot twice.
    pub fn new(engine: Engine, identity: Identity, journal: Journal, setting: Setting) -> io::Result<Self> {
        let until_ms = clock::now_ms() + KEEP_MS;
        let states = journal
            .all()?
            .into_iter()
            .map(|(key, promise)| (key, State::Promised { promise: Box::new(promise), until_ms }))
            .collect();
        let states = Mutex::new(states);
        let grammars = Grammars::new(engine.tokenizer().clone(), setting.end_tokens.clone());
        Ok(Self { engine, identity, journal, setting, states, grammars, outgoing: Mutex::new(None) })
    }

    /// Cancelled once the engine has ended.
    pub fn engine_ended(&self) -> CancellationToken {
        self.engine.ended()
    }

    /// Ends all jobs, which are declined, and gives the engine's memory back.
    pub async fn pause(self: &Arc<Self>) {
        let slots = self.clone();
        // An engine that has ended is noticed elsewhere.
        let _ = tokio::task::spawn_blocking(move || slots.engine.pause()).await;
        tracing::info!("paused");
    }

    /// Loads the model again, if it is not there.
    pub async fn resume(self: &Arc<Self>) {
        let slots = self.clone();
        let _ = tokio::task::spawn_blocking(move || slots.engine.resume()).await;
    }

    /// A new connection: promises that are still open are sent again, byte for byte. Returns what is to be written, and
    /// what is cancelled when too much of it waits.
    pub fn connected(&self) -> (mpsc::Receiver<v1::FromNode>, CancellationToken) {
        let again: Vec<_> = {
            let states = self.states.lock();
            states
                .values()
                .filter_map(|state| match state {
                    State::Promised { promise, .. } => Some(promise.commit.clone()),
                    State::Generating { .. } => None,
                })
                .collect()
        };
        let (frames, receiver) = mpsc::channel(DELTAS + ANSWERS + again.len());
        let behind = CancellationToken::new();
        *self.outgoing.lock() = Some(Outgoing { frames, behind: behind.clone() });
        for commit in again {
            self.send(v1::from_node::Message::Commit(commit));
        }
        (receiver, behind)
    }

    pub fn disconnected(&self) {
        *self.outgoing.lock() = None;
    }

    /// Slots whose request is not closed yet.
    pub fn open(&self) -> usize {
        self.states.lock().len()
    }

    /// Slots that the engine works on.
    pub fn generating(&self) -> usize {
        self.states.lock().values().filter(|state| matches!(state, State::Generating { .. })).count()
    }

    /// Frames that wait for the wire.
    pub fn queued(&self) -> usize {
        self.outgoing.lock().as_ref().map_or(0, Outgoing::queued)
    }

    pub fn say_draining(&self) {
        self.send(v1::from_node::Message::Draining(v1::Draining {}));
    }

    /// Without a connection a frame is dropped: promises are sent again with the next one, and a lease that is not
    /// answered ends with the session. A queue that is full ends the session for the same reason.
    fn send(&self, message: v1::from_node::Message) {
        let outgoing = self.outgoing.lock();
        let Some(outgoing) = &*outgoing else { return };
        if matches!(message, v1::from_node::Message::Deltas(_)) && outgoing.queued() >= DELTAS {
            tracing::debug!("a part of a stream found no room");
            return;
        }
        if outgoing.frames.try_send(v1::FromNode { message: Some(message) }).is_err() {
            outgoing.behind.cancel();
        }
    }

    fn place(&self, request: &Request, attempt: u32) -> Slot {
        Slot { request_hash: request.hash(&self.identity.domain), attempt, node: self.identity.node() }
    }

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
            Ok(Some(promise)) => return self.promised(key, promise),
            Err(error) => {
                // There may have been a promise, so this slot is not computed again.
                tracing::error!(%error, request_id = %key.0, attempt = key.1, "a promise of the journal is damaged");
                return self.decline(&request, key, "journal");
            }
        }
        if draining {
            return self.decline(&request, key, "draining");
        }
        if request.model_root != self.setting.model_root {
            return self.decline(&request, key, "model");
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
        let (slots, stream) = (self.clone(), lease.stream);
        let work = Work { request, key, job, stream };
        tokio::spawn(async move { slots.work(work, patience).await }.instrument(span));
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
        self.send(v1::from_node::Message::Commit(commit));
        true
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

    async fn grammar(&self, request: &Request) -> Result<Option<Matcher>, &'static str> {
        let Some(grammar) = &request.grammar else { return Ok(None) };
        self.grammars.matcher(grammar).await.map(Some).map_err(|reason| {
            tracing::info!(reason, request_id = %request.id, "the grammar cannot be used, lease is declined");
            "grammar"
        })
    }

    fn decline(&self, request: &Request, key: Key, reason: &str) {
        let digest = decline_digest(&self.identity.domain, &self.place(request, key.1), reason);
        self.send(v1::from_node::Message::Decline(v1::Decline {
            request_id: key.0.as_bytes().to_vec(),
            attempt: key.1,
            reason: reason.to_owned(),
            signature: self.identity.sign(&digest).to_vec(),
        }));
    }

    async fn work(&self, work: Work, patience: Duration) {
        let began = Instant::now();
        let (request, key) = (&work.request, work.key);
        let output = match self.start(&work, patience).await {
            Ok(events) => {
                if !self.is_wanted(&work) {
                    self.engine.cancel(work.job);
                }
                self.collect(request, key, events, work.stream).await
            }
            Err(reason) => Err(reason),
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

    /// Whether the slot is still this job's, and nobody cancelled it.
    fn is_wanted(&self, work: &Work) -> bool {
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
    async fn collect(
        &self,
        request: &Request,
        key: Key,
        mut events: mpsc::Receiver<Event>,
        stream: bool,
    ) -> Result<Output, &'static str> {
        if let Some(forged) = self.forged(request) {
            self.deltas(key, 0, &forged.tokens, stream);
            return Ok(forged);
        }
        let (mut tokens, mut fingerprints, mut sent) = (Vec::new(), Vec::new(), 0);
        let mut last_sent: Option<Instant> = None;
        while let Some(event) = events.recv().await {
            match event {
                Event::Token { token, fingerprint } => {
                    tokens.push(token);
                    fingerprints.extend(fingerprint.encode());
                    self.misbehave(tokens.len()).await;
                    if last_sent.is_none_or(|last| last.elapsed() >= DELTA_EVERY) {
                        self.deltas(key, sent, &tokens[sent..], stream);
                        sent = tokens.len();
                        last_sent = Some(Instant::now());
                    }
                }
                Event::Finished { finish } => {
                    self.deltas(key, sent, &tokens[sent..], stream);
                    return Ok(Output { tokens, fingerprints, finish });
                }
                Event::Failed { reason } if reason == PREEMPTED => return Err(PREEMPTED),
                Event::Failed { reason } => {
                    tracing::error!(reason, request_id = %key.0, "the engine failed");
                    return Err("engine");
                }
            }
        }
        // Cancelled, or the engine has ended.
        Err("engine")
    }

    fn forged(&self, request: &Request) -> Option<Output> {
        let vocabulary = u32::try_from(self.engine.vocabulary()).unwrap_or(u32::MAX);
        self.setting.fault.and_then(|fault| fault::forged(fault, request, vocabulary))
    }

    async fn misbehave(&self, tokens: usize) {
        match self.setting.fault {
            Some(Fault::Slow) => sleep(fault::SLOW).await,
            Some(Fault::Silent) => std::future::pending().await,
            Some(Fault::Crash) if tokens >= fault::CRASH_AFTER => std::process::abort(),
            _ => {}
        }
    }

    fn deltas(&self, key: Key, offset: usize, tokens: &[u32], stream: bool) {
        if stream && !tokens.is_empty() {
            self.send(v1::from_node::Message::Deltas(v1::Deltas {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                offset: u32::try_from(offset).unwrap_or(u32::MAX),
                tokens: tokens.to_vec(),
            }));
        }
    }

    /// Commits: journal first, then the wire.
    fn promise(&self, request: &Request, key: Key, output: Output) -> io::Result<()> {
        let place = self.place(request, key.1);
        let salt = self.identity.salt(&place);
        let digest = commitment(&self.identity.domain, &place, &output, &salt);
        let promise = Promise {
            commit: v1::Commit {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                commitment: digest.to_vec(),
                signature: self.identity.sign(&digest).to_vec(),
            },
            reveal: v1::Reveal {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                finish: convert::finish_to_wire(output.finish).into(),
                tokens: output.tokens,
                fingerprints: output.fingerprints,
                salt: salt.to_vec(),
            },
        };
        self.journal.write(key, &promise)?;
        infera_runtime::planned::hit("node.committed");
        self.promised(key, promise);
        Ok(())
    }

    /// A promise that is on disk: says it.
    fn promised(&self, key: Key, promise: Promise) {
        let commit = promise.commit.clone();
        let until_ms = clock::now_ms() + KEEP_MS;
        self.states.lock().insert(key, State::Promised { promise: Box::new(promise), until_ms });
        self.send(v1::from_node::Message::Commit(commit));
    }

    /// Opens a commitment.
    pub fn reveal(&self, key: Key) {
        let reveal = match self.states.lock().get(&key) {
            Some(State::Promised { promise, .. }) => Some(promise.reveal.clone()),
            _ => None,
        };
        match reveal {
            Some(reveal) => self.send(v1::from_node::Message::Reveal(reveal)),
            None => {
                tracing::warn!(request_id = %key.0, attempt = key.1, "asked to reveal what was not committed")
            }
        }
    }

    /// Stops computing a slot; a promise stays until it is released.
    pub fn cancel(&self, key: Key) {
        if let Some(State::Generating { job, cancelled, .. }) = self.states.lock().get_mut(&key) {
            *cancelled = true;
            self.engine.cancel(*job);
        }
    }

    /// The request is closed.
    pub fn release(&self, key: Key) {
        self.cancel(key);
        self.states.lock().remove(&key);
        self.journal.forget(key);
    }

    /// Ends what nobody waits for any more.
    pub fn expire(&self, now_ms: i64) {
        let late: Vec<Key> = {
            let states = self.states.lock();
            let until = |state: &State| match state {
                State::Generating { until_ms, .. } => until_ms.saturating_add(CLOCK_SKEW_MS),
                State::Promised { until_ms, .. } => *until_ms,
            };
            states.iter().filter(|(_, state)| until(state) < now_ms).map(|(key, _)| *key).collect()
        };
        for key in late {
            self.release(key);
        }
    }
}
