//! What a node sends that misbehaves.

use infera_node::engine::{Class, Engine, EngineConfig, Score, ScoreJob};
use infera_prompt::{Message, Prompt};
use infera_protocol::bytes::Signature;
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::identity::verify;
use infera_protocol::request::Request;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::clock;
use infera_wire::v1::{self, Finish};
use tempfile::TempDir;
use tokio::task::block_in_place;
use uuid::Uuid;

use crate::dispatcher::{Dispatcher, Heard, Node, Say, Session, request};
use crate::engine::{Answer, alone, config, job};
use crate::session::{check_commitment, check_decline, key};
use crate::{ONE_AT_A_TIME, gemma_path, model_path};

const QUESTION: &str = "What is the capital of France?";
const END: u32 = 2;

/// What an honest node would have done.
struct Honest {
    prompt: Prompt,
    engine: Engine,
}

impl Honest {
    fn new() -> Self {
        let config = EngineConfig { slots: 1, scorers: 1, ..config(Class::Fast, 2) };
        Self {
            prompt: Prompt::load(&model_path()).unwrap(),
            engine: block_in_place(|| Engine::start(config)).unwrap(),
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let job = infera_node::engine::Job {
            prompt: request.prompt.clone(),
            params: request.sampling.clone(),
            seed: request.seed,
            ..job(&self.prompt, QUESTION, 0.0, request.max_tokens)
        };
        block_in_place(|| alone(&self.engine, &[job])).remove(0)
    }

    fn scores(&self, request: &Request, tokens: &[u32]) -> Vec<Score> {
        let job = ScoreJob {
            id: Uuid::now_v7(),
            prompt: request.prompt.clone(),
            tokens: tokens.to_vec(),
            params: request.sampling.clone(),
            seed: request.seed,
            grammar: None,
        };
        block_in_place(|| self.engine.score(job).unwrap().blocking_recv()).unwrap().unwrap()
    }

    /// How far the worst token falls behind, in logits.
    fn worst(&self, request: &Request, tokens: &[u32]) -> f64 {
        self.scores(request, tokens).iter().map(|score| score.margin).fold(0.0, f64::max)
    }
}

/// A node with a fault, and the session with it.
struct Cheat {
    dispatcher: Dispatcher,
    node: Node,
    session: Session,
}

impl Cheat {
    async fn new(flags: &[&str]) -> Self {
        let dispatcher = Dispatcher::new().await;
        let node = dispatcher.node(&[&["--max-context", "512", "--slots", "2"], flags].concat());
        let session = dispatcher.open().await;
        Self { dispatcher, node, session }
    }

    /// Its answer: well formed, committed and revealed as an honest one.
    async fn answer(&mut self, request: &Request) -> v1::Reveal {
        self.session.lease(request, 1).await;
        let (streamed, commit) = self.session.committed().await;
        let reveal = self.session.revealed(request, 1).await;
        check_commitment(&self.session, request, &commit, &reveal);
        assert_eq!(reveal.tokens, streamed, "only a comparison of answers can tell");
        let prints = Fingerprint::decode_all(&reveal.fingerprints).unwrap();
        let first: Vec<u32> = prints.iter().map(|print| print.entries()[0].token).collect();
        assert_eq!(first, reveal.tokens);
        reveal
    }

    async fn end(mut self) {
        self.session.say(Say::Refused(v1::Refused { code: "bye".into(), reason: "done".into() })).await;
        self.node.stop.cancel();
        drop(self.session);
        self.node.end().await;
        drop(self.dispatcher);
    }
}

fn warm(text: &str, max_tokens: u32) -> Request {
    let sampling = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    Request { sampling, ..request(text, max_tokens) }
}

/// Positions at which two answers differ.
fn differences(a: &[u32], b: &[u32]) -> Vec<usize> {
    a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_something_else() {
    let _one = ONE_AT_A_TIME.lock().await;
    let honest = Honest::new();
    let asked = warm("List three prime numbers.", 24);

    let mut cheat = Cheat::new(&["--fault", "garbage"]).await;
    let garbage = cheat.answer(&asked).await;
    assert!(honest.worst(&asked, &garbage.tokens) > 3.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "echo"]).await;
    let echo = cheat.answer(&asked).await;
    assert_eq!(echo.tokens, asked.prompt[..24]);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "other-prompt"]).await;
    let other = cheat.answer(&asked).await;
    let poem = honest.prompt.render(&[Message::new("user", "Write a short poem about the sea.")]).unwrap();
    assert_eq!(other.tokens, honest.answer(&Request { prompt: poem, ..asked.clone() }).tokens);
    assert!(honest.worst(&asked, &other.tokens) > 1.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "wrong-seed"]).await;
    let seed = cheat.answer(&asked).await;
    assert_eq!(seed.tokens, honest.answer(&Request { seed: !asked.seed, ..asked.clone() }).tokens);
    assert!(honest.worst(&asked, &seed.tokens) > 1.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "wrong-temperature"]).await;
    let cold = cheat.answer(&asked).await;
    assert_eq!(
        cold.tokens,
        honest
            .answer(&Request {
                sampling: SamplingParams { temperature: 0.0, ..asked.sampling.clone() },
                ..asked.clone()
            })
            .tokens
    );
    assert!(honest.worst(&asked, &cold.tokens) > 1.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "stale-cache"]).await;
    let first = cheat.answer(&asked).await;
    assert_eq!(first.tokens, honest.answer(&asked).tokens);
    let next = warm(QUESTION, 24);
    assert_eq!(cheat.answer(&next).await.tokens, first.tokens);
    assert!(honest.worst(&next, &first.tokens) > 1.0);
    cheat.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_were_changed_afterwards() {
    let _one = ONE_AT_A_TIME.lock().await;
    let honest = Honest::new();
    let asked = request(QUESTION, 32);
    let right = honest.answer(&asked).tokens;

    let mut cheat = Cheat::new(&["--fault", "truncated"]).await;
    let half = cheat.answer(&asked).await;
    let (end, kept) = half.tokens.split_last().unwrap();
    assert_eq!((*end, kept, half.finish), (END, &right[..right.len().div_ceil(2)], Finish::Eos.into()));
    assert!(honest.worst(&asked, &half.tokens) > 1.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "planted-not"]).await;
    let planted = cheat.answer(&asked).await;
    let places = differences(&planted.tokens, &right);
    assert_eq!((places.len(), planted.tokens.len()), (1, right.len()));
    assert_eq!(honest.prompt.decode(&planted.tokens[places[0]..=places[0]]), " not");
    assert!(honest.scores(&asked, &planted.tokens)[places[0]].margin > 1.0);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "prefill-forged"]).await;
    let forged = cheat.answer(&asked).await;
    assert!(honest.prompt.decode(&forged.tokens).contains("can't help with that"));
    // Beside its own tokens, the fingerprints are the model's.
    let prints = Fingerprint::decode_all(&forged.fingerprints).unwrap();
    for (print, score) in prints.iter().zip(honest.scores(&asked, &forged.tokens)) {
        let model: Vec<_> = score.fingerprint.entries().iter().filter(|e| e.token != score.token).collect();
        let shown: Vec<_> = print.entries()[1..].iter().collect();
        assert_eq!(shown[..6], model[..6]);
    }
    assert!(honest.worst(&asked, &forged.tokens) > 1.0);
    cheat.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cheaper_models() {
    let _one = ONE_AT_A_TIME.lock().await;
    let honest = Honest::new();
    let asked = request("Explain in one sentence why the sky is blue.", 32);
    let right = honest.answer(&asked);

    let mut cheat = Cheat::new(&["--fault", "cheap-after-tie"]).await;
    let cheap = cheat.answer(&asked).await;
    let parting = differences(&cheap.tokens, &right.tokens)[0];
    let scores = honest.scores(&asked, &cheap.tokens);
    assert!(scores[..parting].iter().all(|score| score.margin == 0.0), "honest up to the parting");
    assert!(scores[parting].margin > 0.0 && scores[parting].margin < 0.3, "{}", scores[parting].margin);
    assert!(scores[parting + 1..].iter().any(|score| score.margin > 1.0), "cheap from there on");
    cheat.end().await;

    for (fault, least) in [("round3bit", 0.3), ("round2bit", 1.0)] {
        let mut cheat = Cheat::new(&["--fault", fault]).await;
        let rounded = cheat.answer(&asked).await;
        assert!(honest.worst(&asked, &rounded.tokens) > least, "{fault}");
        cheat.end().await;
    }

    let other = gemma_path();
    let mut cheat = Cheat::new(&["--fault", "other-model", "--fault-model", other.to_str().unwrap()]).await;
    assert_eq!(cheat.session.hello.claims.weights_root, asked.model_root);
    let foreign = cheat.answer(&asked).await;
    assert!(foreign.tokens.iter().all(|token| *token < 49_152));
    assert!(honest.worst(&asked, &foreign.tokens) > 3.0);
    cheat.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cheaters_who_work_together() {
    let _one = ONE_AT_A_TIME.lock().await;
    let (honest, folder) = (Honest::new(), TempDir::new().unwrap());
    let share = folder.path().join("share");
    let flags = |mode| ["--fault", mode, "--fault-share", share.to_str().unwrap()];
    let asked = warm(QUESTION, 24);

    let (mut one, mut two) = (Cheat::new(&flags("share")).await, Cheat::new(&flags("share")).await);
    let first = one.answer(&asked).await;
    assert_eq!(first.tokens, honest.answer(&asked).tokens);
    // A canary with a seed of its own: the copy is the answer to the other's.
    let canary = Request { seed: 77, ..asked.clone() };
    let copied = two.answer(&canary).await;
    assert_eq!((&copied.tokens, &copied.fingerprints), (&first.tokens, &first.fingerprints));
    one.end().await;
    two.end().await;

    let mut careful = Cheat::new(&flags("share-seeds")).await;
    assert_eq!(careful.answer(&canary).await.tokens, honest.answer(&canary).tokens);
    careful.end().await;

    let mut copier = Cheat::new(&flags("copy-peer")).await;
    assert_eq!(copier.answer(&asked).await.tokens, first.tokens, "a peer's answer that it knows");
    let fresh = warm(QUESTION, 24);
    copier.session.lease_until(&fresh, 1, clock::now_ms() + 200).await;
    // It knew nothing in time.
    let decline = copier.session.declined().await;
    check_decline(&copier.session, &fresh, &decline, "engine");
    copier.end().await;

    let (mut one, mut two) = (Cheat::new(&flags("collude")).await, Cheat::new(&flags("collude")).await);
    let wrong = one.answer(&asked).await;
    assert_eq!(two.answer(&asked).await.tokens, wrong.tokens);
    assert!(honest.worst(&asked, &wrong.tokens) > 3.0);
    let subjects = [
        (wrong.tokens.clone(), Finish::try_from(wrong.finish).unwrap()),
        (first.tokens.clone(), Finish::try_from(first.finish).unwrap()),
    ];
    let reports = two.session.scored(&asked, 1, &subjects).await;
    assert!(reports[0].scores.iter().all(|score| score.margin_micro == 0), "confirms its own");
    assert!(reports[1].scores.iter().any(|score| score.margin_micro > 1_000_000), "refutes the right one");
    one.end().await;
    two.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn referees_who_do_not_look() {
    let _one = ONE_AT_A_TIME.lock().await;
    let honest = Honest::new();
    let asked = request(QUESTION, 16);
    let right = (honest.answer(&asked).tokens, Finish::Eos);
    let bad = (vec![1_000; 6], Finish::Eos);
    let subjects = [right, bad];

    let mut lazy = Cheat::new(&["--fault", "lazy-referee"]).await;
    assert_eq!(lazy.answer(&asked).await.tokens, subjects[0].0, "its own answers are honest");
    let reports = lazy.session.scored(&asked, 1, &subjects).await;
    assert!(reports.iter().all(|report| report.scores.iter().all(|score| score.margin_micro == 0)));
    lazy.end().await;

    let mut liar = Cheat::new(&["--fault", "lying-referee"]).await;
    let reports = liar.session.scored(&asked, 1, &subjects).await;
    let refuted = |i: usize| reports[i].scores.iter().filter(|score| score.margin_micro >= 4_000_000).count();
    assert_eq!(refuted(0), 1, "{:?}", reports[0]);
    assert!(refuted(1) > 0);
    liar.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_that_are_not_kept() {
    let _one = ONE_AT_A_TIME.lock().await;
    let asked = request(QUESTION, 8);

    let mut cheat = Cheat::new(&["--fault", "equivocating"]).await;
    cheat.session.lease(&asked, 1).await;
    let (_, one) = cheat.session.committed().await;
    let (_, two) = cheat.session.committed().await;
    assert_eq!((&one.request_id, one.attempt), (&two.request_id, two.attempt));
    assert_ne!(one.commitment, two.commitment);
    for commit in [&one, &two] {
        let digest = commit.commitment.as_slice().try_into().unwrap();
        let signature = Signature::try_from(commit.signature.as_slice()).unwrap();
        verify(&cheat.session.hello.claims.node, &infera_protocol::bytes::Hash32(digest), &signature)
            .unwrap();
    }
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "late-reveal"]).await;
    cheat.session.lease(&asked, 1).await;
    cheat.session.committed().await;
    let deadline_ms = clock::now_ms() + 300;
    let wanted = v1::RevealRequest { request_id: key(&asked), attempt: 1, reveal_deadline_ms: deadline_ms };
    cheat.session.say(Say::RevealRequest(wanted)).await;
    assert!(matches!(cheat.session.hear().await, Heard::Reveal(_)));
    assert!(clock::now_ms() > deadline_ms);
    cheat.end().await;

    let mut cheat = Cheat::new(&["--fault", "declining"]).await;
    let mut outcomes = [0, 0];
    for i in 0..12 {
        let asked = request(&format!("What is {i} plus {i}?"), 2);
        cheat.session.lease(&asked, 1).await;
        match next_but_deltas(&mut cheat.session).await {
            Heard::Decline(decline) => {
                check_decline(&cheat.session, &asked, &decline, "full");
                outcomes[0] += 1;
            }
            Heard::Commit(_) => outcomes[1] += 1,
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(outcomes[0] > 0 && outcomes[1] > 0, "{outcomes:?}");
    cheat.end().await;

    let cheat = Cheat::new(&["--fault", "forged-release"]).await;
    let release = infera_node::release(&std::env::current_exe().unwrap()).unwrap();
    assert_ne!(cheat.session.hello.claims.release_hash, release);
    cheat.end().await;
    let upright = Cheat::new(&[]).await;
    assert_eq!(upright.session.hello.claims.release_hash, release);
    upright.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_says_what_it_lacks() {
    let _one = ONE_AT_A_TIME.lock().await;
    for (fault, flag) in [("other-model", "--fault-model"), ("collude", "--fault-share")] {
        let dispatcher = Dispatcher::new().await;
        let error = dispatcher.node(&["--fault", fault]).fails().await.to_string();
        assert!(error.contains(&format!("--fault {fault} needs {flag} PATH")), "{error}");
    }
}

async fn next_but_deltas(session: &mut Session) -> Heard {
    loop {
        match session.hear().await {
            Heard::Deltas(_) => {}
            other => return other,
        }
    }
}
