//! The class bf16 on the real model: what a GPU computes with the same operations of libtorch, here on the processor.

use clap::Parser;
use infera_node::engine::{
    Busy, Class, Device, Engine, EngineConfig, EngineError, Event, Finish, Job, PREEMPTED, Score, ScoreJob,
    memory_need,
};
use infera_prompt::Prompt;
use infera_protocol::sampling::SamplingParams;
use infera_runtime::CancellationToken;
use uuid::Uuid;

use crate::engine::{Answer, QUESTIONS, alone, collect, config, job, jobs, resident, together};
use crate::{ONE_AT_A_TIME, model_path};

/// How far behind the scorer's own choice a token of an honest answer may be, in logits: answers of this class part only
/// where two tokens are this near to each other.
const NEAR_TIE: f64 = 0.3;

fn bf16(slots: usize) -> EngineConfig {
    EngineConfig { slots, scorers: 2, ..config(Class::Bf16, 1) }
}

fn score(engine: &Engine, job: &Job, tokens: &[u32]) -> Vec<Score> {
    let asked = ScoreJob {
        id: Uuid::now_v7(),
        prompt: job.prompt.clone(),
        tokens: tokens.to_vec(),
        params: job.params.clone(),
        seed: job.seed,
        grammar: None,
    };
    engine.score(asked).unwrap().blocking_recv().unwrap().unwrap()
}

fn worst(scores: &[Score]) -> f64 {
    scores.iter().map(|s| s.margin).fold(0.0, f64::max)
}

/// Answers to the same jobs are equal up to where they part, and there the other's token is a near-tie.
fn part_at_near_ties(engine: &Engine, jobs: &[Job], answers: &[Answer], others: &[Answer]) -> usize {
    let mut partings = 0;
    for ((job, answer), other) in jobs.iter().zip(answers).zip(others) {
        let Some(at) = answer.tokens.iter().zip(&other.tokens).position(|(a, b)| a != b) else {
            assert_eq!(answer.tokens, other.tokens);
            continue;
        };
        partings += 1;
        let margin = worst(&score(engine, job, &other.tokens[..=at]));
        assert!(margin <= NEAR_TIE, "parts at {at} by {margin}");
    }
    partings
}

#[test]
fn answers_in_bf16_are_those_of_the_model() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(4)).unwrap();
    let asked = job(&prompt, QUESTIONS[0], 0.0, 32);
    let answer = collect(engine.generate(asked.clone()).unwrap());
    let text = prompt.decode(&answer.tokens);
    assert!(text.contains("Paris"), "{text}");
    assert_eq!((answer.finish, answer.tokens.last()), (Finish::Eos, Some(&2)));
    // The exact class, the definition of the model, finds these tokens near its own.
    let exact = Engine::start(EngineConfig { slots: 1, scorers: 1, ..config(Class::Exact, 2) }).unwrap();
    for job in jobs(&prompt) {
        let answer = collect(engine.generate(job.clone()).unwrap());
        let scores = score(&exact, &job, &answer.tokens);
        assert!(worst(&scores) <= NEAR_TIE, "{}", worst(&scores));
        for (score, fingerprint) in scores.iter().zip(&answer.fingerprints) {
            let of = |f: &infera_protocol::fingerprint::Fingerprint| {
                let mut all: Vec<(u32, f32)> = f.entries().iter().map(|e| (e.token, e.logprob())).collect();
                all.sort_by_key(|(token, _)| *token);
                all
            };
            for (token, logprob) in of(&score.fingerprint) {
                let own = of(fingerprint).into_iter().find(|(other, _)| *other == token);
                // Unlikely tokens are far less certain; they are in no draw's reach.
                if let (Some((_, own)), true) = (own, logprob > -5.0) {
                    assert!((own - logprob).abs() < 0.5, "token {token}: {own}, exact {logprob}");
                }
            }
        }
    }
}

#[test]
fn batches_in_bf16_part_only_at_near_ties() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(4)).unwrap();
    let jobs: Vec<Job> =
        ["rivers", "prime numbers", "bread", "the moon", "bicycles", "chess", "bees", "jazz"]
            .iter()
            .enumerate()
            .map(|(i, subject)| {
                job(&prompt, &format!("Tell me about {subject}."), if i % 2 == 0 { 0.0 } else { 0.8 }, 24)
            })
            .collect();
    let expected = alone(&engine, &jobs);
    // Each in a batch of four, beside others and beginnings of its own prompt that are in the cache.
    let (left, right) = jobs.split_at(4);
    let together = [together(&engine, left), together(&engine, right)].concat();
    let partings = part_at_near_ties(&engine, &jobs, &expected, &together);
    assert!(partings < jobs.len(), "all of {partings} part");
    // What the scorer sees in one pass is what the generator saw token by token, up to the class's distance.
    for (job, answer) in jobs.iter().zip(&expected) {
        let scores = score(&engine, job, &answer.tokens);
        assert_eq!(scores.len(), answer.tokens.len());
        assert!(worst(&scores) <= NEAR_TIE, "{}", worst(&scores));
    }
    // Another prompt's answer is far from what would have been drawn.
    assert!(worst(&score(&engine, &jobs[0], &expected[2].tokens)) > 3.0);
}

/// From eight on, the largest logits are picked on the device; draws that look at others get all of them.
#[test]
fn large_batches_draw_as_small_ones() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(12)).unwrap();
    let mut jobs: Vec<Job> = (0..12).map(|i| job(&prompt, QUESTIONS[i % 5], 0.8, 12)).collect();
    for (i, job) in jobs.iter_mut().enumerate() {
        job.seed = i as u64;
    }
    jobs[3].params = SamplingParams { logit_bias: [(260, 100.0)].into(), ..SamplingParams::greedy() };
    jobs[5].params.presence_penalty = 2.0;
    jobs[7].params.top_k = 1;
    jobs[9].params.top_p = 0.5;
    let expected = alone(&engine, &jobs);
    let together = together(&engine, &jobs);
    assert_eq!(together[3].tokens, vec![260; 12], "a bias brings any token forward");
    part_at_near_ties(&engine, &jobs, &expected, &together);
    for (answer, other) in expected.iter().zip(&together) {
        let (first, other) = (&answer.fingerprints[0], &other.fingerprints[0]);
        if answer.tokens[0] == other.entries()[0].token {
            let far = (first.entries()[0].logprob() - other.entries()[0].logprob()).abs();
            assert!(far < 0.3, "the first token's log-probability differs by {far}");
        }
    }
}

#[test]
fn sequences_join_leave_and_are_cancelled() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(3)).unwrap();
    let endless = |question: &str| Job { end_tokens: vec![], ..job(&prompt, question, 0.8, 400) };
    let asked = job(&prompt, QUESTIONS[3], 0.0, 20);
    let expected = alone(&engine, std::slice::from_ref(&asked));
    // Two long ones take the first places; a third joins, and moves down when they are gone.
    let long = [endless(QUESTIONS[1]), endless(QUESTIONS[2])];
    let mut running: Vec<_> = long.iter().map(|job| engine.generate(job.clone()).unwrap()).collect();
    for events in &mut running {
        assert!(matches!(events.blocking_recv(), Some(Event::Token { .. })));
    }
    let last = endless(QUESTIONS[4]);
    let mut third = engine.generate(last.clone()).unwrap();
    assert!(matches!(engine.generate(asked.clone()), Err(Busy::Full { slots: 3 })));
    let mut tokens = Vec::new();
    let next = |tokens: &mut Vec<u32>, events: &mut tokio::sync::mpsc::Receiver<Event>| {
        let Some(Event::Token { token, .. }) = events.blocking_recv() else { panic!("no token") };
        tokens.push(token);
    };
    (0..4).for_each(|_| next(&mut tokens, &mut third));
    long.iter().for_each(|job| engine.cancel(job.id));
    running.into_iter().for_each(|mut events| while events.blocking_recv().is_some() {});
    (0..12).for_each(|_| next(&mut tokens, &mut third));
    let joined = collect(engine.generate(asked.clone()).unwrap());
    part_at_near_ties(&engine, std::slice::from_ref(&asked), &expected, &[joined]);
    engine.cancel(last.id);
    while let Some(event) = third.blocking_recv() {
        assert!(matches!(event, Event::Token { .. }), "a cancelled job's channel closes");
    }
    assert!(worst(&score(&engine, &last, &tokens)) <= NEAR_TIE, "what moved was moved as a whole");
    assert_eq!(engine.free_slots(), 3);
}

#[test]
fn long_prompts_turns_and_scores_share_steps() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(3)).unwrap();
    let river = "The river runs past the old mill, under the bridge and down to the harbour. ".repeat(20);
    let long = job(&prompt, &format!("{river}Where does the river run?"), 0.8, 16);
    let first = collect(engine.generate(long.clone()).unwrap());
    // The next turn begins in the cache with tokens that were drawn one by one.
    let mut turn = long.clone();
    turn.id = Uuid::now_v7();
    turn.prompt.extend(&first.tokens);
    turn.prompt.extend(prompt.render(&[infera_prompt::Message::new("user", "And then?")]).unwrap());
    let noise = engine.generate(job(&prompt, QUESTIONS[1], 1.0, 40)).unwrap();
    let cached = collect(engine.generate(turn.clone()).unwrap());
    let scores = score(&engine, &long, &first.tokens);
    collect(noise);
    assert!(worst(&scores) <= NEAR_TIE, "{}", worst(&scores));
    let fresh = Engine::start(bf16(1)).unwrap();
    assert!(worst(&score(&fresh, &turn, &cached.tokens)) <= NEAR_TIE);
}

#[test]
fn few_places_are_taken_in_turn() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let narrow = EngineConfig { cache_tokens: Some(200), max_context: 100, ..bf16(8) };
    let engine = Engine::start(narrow).unwrap();
    let jobs: Vec<Job> = QUESTIONS.iter().map(|q| job(&prompt, q, 0.8, 12)).collect();
    for (job, answer) in jobs.iter().zip(together(&engine, &jobs)) {
        assert!(worst(&score(&engine, job, &answer.tokens)) <= NEAR_TIE);
    }
    let refused = engine.generate(Job { max_tokens: 90, ..jobs[0].clone() }).unwrap_err().to_string();
    assert!(refused.contains("exceed the context of 100"), "{refused}");
}

#[test]
fn a_pause_frees_the_tensors_and_resume_loads_them_again() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(bf16(2)).unwrap();
    let asked = job(&prompt, QUESTIONS[0], 0.0, 16);
    let expected = collect(engine.generate(asked.clone()).unwrap());
    let mut running =
        engine.generate(Job { end_tokens: vec![], ..job(&prompt, QUESTIONS[1], 0.8, 900) }).unwrap();
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
    let before = resident();
    engine.pause().unwrap();
    let freed = before.saturating_sub(resident());
    let need = engine.memory();
    assert!(freed > need.weights * 8 / 10, "only {freed} bytes of {need:?}");
    let mut last = None;
    while let Some(event) = running.blocking_recv() {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Failed { reason: PREEMPTED.into() }));
    assert_eq!(engine.generate(asked.clone()).unwrap_err(), Busy::Paused);
    engine.resume().unwrap();
    assert_eq!(collect(engine.generate(asked).unwrap()), expected, "alone in its batch, on the same machine");
    engine.pause().unwrap();
    drop(engine);
}

#[test]
fn memory_and_limits_of_bf16_are_stated_before_loading() {
    let base = EngineConfig { scorers: 0, slots: 8, ..bf16(8) };
    let need = |config: &EngineConfig| memory_need(config).unwrap();
    let weights = 134_515_008;
    let of = need(&base);
    // bf16, and the head once more in f32 on a processor; norms and tables are small.
    let least = 2 * weights + 4 * 49_152 * 576;
    assert!((least..least + least / 50).contains(&of.weights), "{of:?}");
    assert_eq!(of.cache, (8 * 1024 + 1) * 30 * 2 * 3 * 64 * 2);
    let gpu = EngineConfig { device: Device::Cuda(0), ..base.clone() };
    assert_eq!(need(&gpu).weights, of.weights - 4 * 49_152 * 576, "the embedding is the head");
    assert_eq!(
        need(&EngineConfig { slots: 256, ..base.clone() }).cache,
        (256 * 1024 + 1) * 30 * 2 * 3 * 64 * 2
    );
    assert_eq!(
        need(&EngineConfig { cache_tokens: Some(2048), ..base.clone() }).cache,
        (2 * 1024 + 1) * 30 * 2 * 3 * 64 * 2
    );
    let step = |slots| need(&EngineConfig { slots, ..base.clone() }).step;
    assert_eq!(step(9) - step(8), 4 * 49_152, "logits of one place more");
    for (bad, text) in [
        (EngineConfig { slots: 257, ..base.clone() }, "slots is 257, allowed are 1 to 256"),
        (EngineConfig { class: Class::Fast, slots: 65, ..base.clone() }, "slots is 65, allowed are 1 to 64"),
        (EngineConfig { memory_limit: Some(300 << 20), ..base.clone() }, "allowed are 300 MiB"),
        (EngineConfig { class: Class::Exact, ..gpu.clone() }, "cuda:0 computes the class bf16 alone"),
    ] {
        let got = Engine::start(bad).unwrap_err().to_string();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
}

/// Only where libtorch has no part for GPUs.
#[test]
fn a_gpu_that_is_not_there_is_an_error_in_words() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    if tch::Cuda::is_available() {
        return;
    }
    let error = Engine::start(EngineConfig { device: Device::Cuda(0), ..bf16(1) }).unwrap_err();
    assert!(matches!(error, EngineError::Torch(_)), "{error}");
    let choice = "cuda".parse().unwrap();
    let error = infera_node::engine::choose(choice, None).unwrap_err().to_string();
    assert!(
        error.starts_with("libtorch_cuda.so does not load (") && error.contains("LD_LIBRARY_PATH"),
        "{error}"
    );
    let words = ["infera-node", "--device", "cuda", "--model", "/nowhere"];
    let args = infera_node::Args::parse_from(words);
    let run = infera_node::run(args, CancellationToken::new(), tokio::sync::watch::channel(false).1);
    let error = tokio::runtime::Runtime::new().unwrap().block_on(run).unwrap_err().to_string();
    assert!(error.starts_with("the engine does not start: libtorch_cuda.so does not load ("), "{error}");
    let chosen = infera_node::engine::choose("auto".parse().unwrap(), None).unwrap();
    assert_eq!(chosen, (Device::Cpu, Class::Exact));
}
