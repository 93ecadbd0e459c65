//! The engine on the real model.

use std::sync::Arc;

use infera_node::engine::{
    Busy, Class, Device, Engine, EngineConfig, EngineError, Event, Finish, Job, PREEMPTED, reference_logits,
};
use infera_prompt::{Message, Prompt};
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::sampling::SamplingParams;
use tokio::sync::mpsc::Receiver;
use uuid::Uuid;

use crate::{ONE_AT_A_TIME, model_path};

pub fn config(class: Class, threads: usize) -> EngineConfig {
    EngineConfig {
        model_path: model_path(),
        class,
        device: Device::Cpu,
        slots: 8,
        scorers: 8,
        threads,
        max_context: 1024,
        cache_tokens: None,
        memory_limit: None,
        rounding: None,
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub fingerprints: Vec<Fingerprint>,
    pub finish: Finish,
}

pub fn collect(mut receiver: Receiver<Event>) -> Answer {
    let (mut tokens, mut fingerprints) = (Vec::new(), Vec::new());
    while let Some(event) = receiver.blocking_recv() {
        match event {
            Event::Token { token, fingerprint } => {
                assert_eq!(fingerprint.entries()[0].token, token);
                tokens.push(token);
                fingerprints.push(fingerprint);
            }
            Event::Finished { finish } => return Answer { tokens, fingerprints, finish },
            Event::Failed { reason } => panic!("{reason}"),
        }
    }
    panic!("the channel closed without an end after {} tokens", tokens.len());
}

pub fn job(prompt: &Prompt, text: &str, temperature: f32, max_tokens: u32) -> Job {
    Job {
        id: Uuid::now_v7(),
        prompt: prompt.render(&[Message::new("user", text)]).unwrap(),
        params: SamplingParams { temperature, ..SamplingParams::default() },
        max_tokens,
        stop: Vec::new(),
        seed: 42,
        end_tokens: prompt.end_tokens().to_vec(),
        grammar: None,
    }
}

pub const QUESTIONS: [&str; 5] = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "List three prime numbers.",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' to German.",
];

/// A prompt of more than one piece.
fn long_question() -> String {
    let text = "The river runs past the old mill, under the bridge and down to the harbour. ".repeat(14);
    format!("{text}Where does the river run?")
}

pub fn jobs(prompt: &Prompt) -> Vec<Job> {
    let mut jobs: Vec<Job> = QUESTIONS
        .iter()
        .enumerate()
        .map(|(i, q)| job(prompt, q, if i % 2 == 0 { 0.0 } else { 0.8 }, 16))
        .collect();
    jobs.push(job(prompt, &long_question(), 0.8, 8));
    jobs.push(job(prompt, QUESTIONS[0], 0.8, 16));
    jobs
}

/// The first difference, in one line.
pub fn assert_same(got: &[Answer], expected: &[Answer], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let parting = g.tokens.iter().zip(&e.tokens).position(|(a, b)| a != b);
        assert!(g.tokens == e.tokens, "{what}: answer {i} parts at token {parting:?}");
        let parting = g.fingerprints.iter().zip(&e.fingerprints).position(|(a, b)| a != b);
        assert!(g == e, "{what}: answer {i} has another fingerprint at token {parting:?}");
    }
}

pub fn alone(engine: &Engine, jobs: &[Job]) -> Vec<Answer> {
    jobs.iter().map(|j| collect(engine.generate(j.clone()).unwrap())).collect()
}

pub fn together(engine: &Engine, jobs: &[Job]) -> Vec<Answer> {
    let running: Vec<_> = jobs.iter().map(|j| engine.generate(j.clone()).unwrap()).collect();
    running.into_iter().map(collect).collect()
}

#[test]
fn answers_that_the_capital_of_france_is_paris() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    for class in [Class::Exact, Class::Fast] {
        let engine = Engine::start(config(class, 1)).unwrap();
        let answer = collect(engine.generate(job(&prompt, QUESTIONS[0], 0.0, 32)).unwrap());
        let text = prompt.decode(&answer.tokens);
        assert!(text.contains("Paris"), "{class:?}: {text}");
        assert_eq!(answer.finish, Finish::Eos);
        assert_eq!(answer.tokens.last(), Some(&2), "the end token is the last token");
    }
}

/// Tokens and fingerprints, bit for bit. Only the first run is compared with others of its class: classes differ.
fn is_independent_of_company_order_and_threads(class: Class) {
    let prompt = Prompt::load(&model_path()).unwrap();
    let jobs = jobs(&prompt);
    let engine = Engine::start(config(class, 1)).unwrap();
    let expected = alone(&engine, &jobs);
    assert_same(&together(&engine, &jobs), &expected, "in company");
    drop(engine);
    let engine = Engine::start(config(class, 2)).unwrap();
    let turned: Vec<Job> = jobs.iter().rev().cloned().collect();
    let mut answers = together(&engine, &turned);
    answers.reverse();
    assert_same(&answers, &expected, "in another order with two threads");
    assert_same(&alone(&engine, &jobs[..2]), &expected[..2], "alone with two threads");
    assert_ne!(expected[0].tokens, expected[6].tokens, "the temperature matters");
}

#[test]
fn exact_results_do_not_depend_on_company_order_or_threads() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    is_independent_of_company_order_and_threads(Class::Exact);
}

#[test]
fn fast_results_do_not_depend_on_company_order_or_threads() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    is_independent_of_company_order_and_threads(Class::Fast);
}

/// Three hundred prompts (one hundred in the class fast), each in one of many forms and lengths.
fn many(prompt: &Prompt, count: usize) -> Vec<Job> {
    let subjects =
        ["rivers", "prime numbers", "bread", "the moon", "bicycles", "chess", "bees", "glass", "jazz", "tea"];
    let asks = [
        "Explain",
        "Write a poem about",
        "Give three facts about",
        "Argue against",
        "Ask me about",
        "Name kinds of",
    ];
    (0..count)
        .map(|i| {
            let (subject, ask) = (subjects[i % 10], asks[i / 10 % 6]);
            let text = format!("{ask} {subject}{}", ", please".repeat(i / 60 * 3));
            let mut job = job(prompt, &text, [0.0, 0.8, 1.2][i % 3], 6);
            job.seed = i as u64;
            job
        })
        .collect()
}

/// Keeps `slots` jobs running.
fn in_batches(engine: &Engine, jobs: &[Job], slots: usize) -> Vec<Answer> {
    let mut running = std::collections::VecDeque::new();
    let mut answers = Vec::new();
    for job in jobs {
        if running.len() == slots {
            answers.extend(running.pop_front().map(collect));
        }
        running.push_back(engine.generate(job.clone()).unwrap());
    }
    answers.extend(running.into_iter().map(collect));
    answers
}

fn none_differs(class: Class, count: usize) {
    let prompt = Prompt::load(&model_path()).unwrap();
    let jobs = many(&prompt, count);
    let with = |slots, threads, cache_tokens| {
        Engine::start(EngineConfig { slots, cache_tokens, max_context: 256, ..config(class, threads) })
            .unwrap()
    };
    let expected = in_batches(&with(1, 1, None), &jobs, 1);
    let engine = with(4, 2, None);
    assert_same(&in_batches(&engine, &jobs, 4), &expected, "batches of 4, two threads");
    // A cache for a few prompts, and the jobs in another order: other beginnings are found in it.
    let engine = with(16, 2, Some(16 * 64));
    let turned: Vec<Job> = jobs.iter().rev().cloned().collect();
    let mut answers = in_batches(&engine, &turned, 16);
    answers.reverse();
    assert_same(&answers, &expected, "batches of 16 in a small cache");
}

#[test]
fn none_of_300_prompts_differs_in_the_exact_class() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    none_differs(Class::Exact, 300);
}

#[test]
fn none_of_100_prompts_differs_in_the_fast_class() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    none_differs(Class::Fast, 100);
}

#[test]
fn joining_late_changes_nothing() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(config(Class::Exact, 1)).unwrap();
    let (first, second) = (job(&prompt, QUESTIONS[1], 0.8, 40), job(&prompt, QUESTIONS[3], 0.0, 20));
    let expected = alone(&engine, &[first.clone(), second.clone()]);
    let mut running = engine.generate(first).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < 5 {
        if let Some(Event::Token { token, .. }) = running.blocking_recv() {
            tokens.push(token);
        }
    }
    let late = collect(engine.generate(second).unwrap());
    assert_same(&[late], &expected[1..], "joining late");
    let rest = collect(running);
    tokens.extend(rest.tokens);
    assert_eq!(tokens, expected[0].tokens);
}

#[test]
fn cached_beginnings_and_guesses_change_nothing() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    for class in [Class::Exact, Class::Fast] {
        let engine = Engine::start(config(class, 2)).unwrap();
        let long = job(&prompt, &long_question(), 0.8, 24);
        // Repeats itself, so that guesses are made.
        let counting = job(&prompt, "Repeat 'one two three' ten times.", 0.0, 60);
        let first = alone(&engine, &[long.clone(), counting.clone()]);
        let again = alone(&engine, &[long.clone(), counting.clone()]);
        assert_same(&again, &first, "with the prompt in the cache");
        // The next turn of the conversation begins with tokens that were drawn one by one.
        let mut next = long.clone();
        next.prompt.extend(&first[0].tokens);
        next.prompt.extend(prompt.render(&[Message::new("user", "And then?")]).unwrap());
        let cached = alone(&engine, std::slice::from_ref(&next));
        drop(engine);
        let fresh = Engine::start(config(class, 1)).unwrap();
        assert_same(&alone(&fresh, &[next]), &cached, "with a cached turn");
        // In company nothing is guessed.
        let company = together(&fresh, &[counting, long]);
        assert_same(&company, &[first[1].clone(), first[0].clone()], "without guesses");
    }
}

#[test]
fn jobs_wait_for_memory_in_turn() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let roomy = Engine::start(config(Class::Fast, 1)).unwrap();
    let jobs: Vec<Job> = QUESTIONS.iter().map(|q| job(&prompt, q, 0.8, 40)).collect();
    let expected = together(&roomy, &jobs);
    drop(roomy);
    let narrow = EngineConfig { cache_tokens: Some(160), ..config(Class::Fast, 1) };
    let engine = Engine::start(narrow).unwrap();
    assert_same(&together(&engine, &jobs), &expected, "with memory for two at a time");
    let large = Job { max_tokens: 200, ..jobs[0].clone() };
    let refused = engine.generate(large).unwrap_err().to_string();
    assert!(refused.contains("exceed the context of 160"), "{refused}");
}

/// The kernels against libtorch: another program, another order of sums.
#[test]
fn fingerprints_are_those_of_libtorch_up_to_rounding() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let asked = job(&prompt, QUESTIONS[3], 0.0, 8);
    let mut far = [0f32; 2];
    for (class, far) in [Class::Exact, Class::Fast].into_iter().zip(&mut far) {
        let engine = Engine::start(config(class, 2)).unwrap();
        let answer = collect(engine.generate(asked.clone()).unwrap());
        let tokens = [&asked.prompt[..], &answer.tokens[..answer.tokens.len() - 1]].concat();
        let reference = reference_logits(&model_path(), &tokens).unwrap();
        for (fingerprint, logits) in answer.fingerprints.iter().zip(&reference[asked.prompt.len() - 1..]) {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|z| (z - most).exp()).sum();
            for entry in fingerprint.entries() {
                let expected = logits[entry.token as usize] - most - sum.ln();
                // Half precision keeps 11 bits.
                let rounding = expected.abs() / 2048.0;
                *far = far.max((entry.logprob() - expected).abs() - rounding);
            }
        }
    }
    assert!(far[0] < 0.002, "exact: {far:?}");
    assert!(far[1] < 0.02 && far[1] > far[0], "fast: {far:?}");
}

#[test]
fn ends_as_section_5_says() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(config(Class::Fast, 1)).unwrap();
    let base = job(&prompt, QUESTIONS[0], 0.0, 32);
    let whole = collect(engine.generate(base.clone()).unwrap());
    let cut = collect(engine.generate(Job { max_tokens: 3, ..base.clone() }).unwrap());
    assert_eq!((cut.finish, &cut.tokens[..]), (Finish::Length, &whole.tokens[..3]));
    let one = collect(engine.generate(Job { max_tokens: 1, ..base.clone() }).unwrap());
    assert_eq!((one.finish, one.tokens.len()), (Finish::Length, 1));
    let exactly = Job { max_tokens: whole.tokens.len() as u32, ..base.clone() };
    assert_eq!(collect(engine.generate(exactly).unwrap()).finish, Finish::Eos);
    // A stop string that lies across the border of two tokens.
    let second = prompt.decode(&whole.tokens[1..2]);
    let stop = format!("{}{}", prompt.decode(&whole.tokens[..1]), &second[..second.len().min(2)]);
    let stopped = collect(engine.generate(Job { stop: vec![stop.clone()], ..base.clone() }).unwrap());
    assert_eq!((stopped.finish, &stopped.tokens[..]), (Finish::Stop, &whole.tokens[..2]), "{stop:?}");
    let other = collect(engine.generate(Job { stop: vec!["never said".into()], ..base }).unwrap());
    assert_eq!(other, whole);
}

#[test]
fn slots_are_bounded_and_freed() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(EngineConfig { slots: 2, ..config(Class::Fast, 1) }).unwrap();
    let endless = || Job { end_tokens: vec![], ..job(&prompt, QUESTIONS[1], 0.8, 900) };
    let (a, b) = (endless(), endless());
    let mut first = engine.generate(a.clone()).unwrap();
    let second = engine.generate(b).unwrap();
    assert_eq!(engine.generate(endless()).unwrap_err(), Busy::Full { slots: 2 });
    assert_eq!(engine.free_slots(), 0);
    engine.cancel(a.id);
    while first.blocking_recv().is_some() {}
    // Cancelled: its slot is free before its channel closes; a second one is freed by dropping the receiver.
    let third = engine.generate(job(&prompt, QUESTIONS[0], 0.0, 4)).unwrap();
    drop(second);
    assert_eq!(collect(third).tokens.len(), 4);
    let (one, two) = (job(&prompt, QUESTIONS[0], 0.0, 2), job(&prompt, QUESTIONS[0], 0.0, 2));
    let running = engine.generate(one.clone()).unwrap();
    assert_eq!(engine.generate(one.clone()).unwrap_err(), Busy::Duplicate(one.id));
    collect(running);
    collect(engine.generate(two).unwrap());
    assert_eq!(engine.free_slots(), 2);
}

/// Resident memory of this process, bytes.
pub fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn a_pause_ends_all_jobs_and_frees_the_memory() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(config(Class::Exact, 2)).unwrap();
    let asked = job(&prompt, QUESTIONS[0], 0.8, 16);
    let expected = collect(engine.generate(asked.clone()).unwrap());
    let endless = Job { end_tokens: vec![], ..job(&prompt, QUESTIONS[1], 0.8, 900) };
    let mut running = engine.generate(endless).unwrap();
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
    let before = resident();
    engine.pause().unwrap();
    let freed = before.saturating_sub(resident());
    assert!(freed > engine.memory().weights * 8 / 10, "only {freed} bytes of {:?}", engine.memory());
    let mut last = None;
    while let Some(event) = running.blocking_recv() {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Failed { reason: PREEMPTED.into() }));
    assert_eq!(engine.generate(asked.clone()).unwrap_err(), Busy::Paused);
    assert_eq!(engine.free_slots(), 8);
    engine.pause().unwrap();
    engine.resume().unwrap();
    assert_eq!(collect(engine.generate(asked).unwrap()), expected);
    engine.pause().unwrap();
    drop(engine);
}

#[test]
fn a_model_that_is_away_after_a_pause_is_waited_for() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let folder = tempfile::tempdir().unwrap();
    let (model, away) = (folder.path().join("model.gguf"), folder.path().join("away"));
    std::os::unix::fs::symlink(model_path(), &model).unwrap();
    let engine =
        Engine::start(EngineConfig { model_path: model.clone(), ..config(Class::Exact, 2) }).unwrap();
    let prompt = Prompt::load(&model_path()).unwrap();
    let asked = job(&prompt, QUESTIONS[0], 0.8, 4);
    let expected = collect(engine.generate(asked.clone()).unwrap());
    engine.pause().unwrap();
    std::fs::rename(&model, &away).unwrap();
    std::thread::scope(|scope| {
        let resumed = scope.spawn(|| engine.resume());
        // Wherever it is by now, the owner gets the machine at once.
        while matches!(engine.generate(asked.clone()), Err(Busy::Paused)) {
            assert!(!engine.ended().is_cancelled());
            std::thread::yield_now();
        }
        engine.pause().unwrap();
        assert_eq!(resumed.join().unwrap(), Err(Busy::Paused));
    });
    let resumed = std::thread::scope(|scope| {
        let resumed = scope.spawn(|| engine.resume());
        std::fs::rename(&away, &model).unwrap();
        resumed.join().unwrap()
    });
    assert_eq!(resumed, Ok(()));
    assert_eq!(collect(engine.generate(asked).unwrap()), expected);
    assert!(!engine.ended().is_cancelled());
}

#[test]
fn impossible_jobs_are_refused_in_words() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(EngineConfig { max_context: 64, ..config(Class::Fast, 1) }).unwrap();
    let base = job(&prompt, QUESTIONS[0], 0.0, 8);
    for (bad, text) in [
        (Job { max_tokens: 60, ..base.clone() }, "exceed the context of 64"),
        (Job { max_tokens: 0, ..base.clone() }, "must not be empty"),
        (Job { prompt: vec![], ..base.clone() }, "must not be empty"),
        (Job { prompt: vec![49_152], ..base.clone() }, "prompt has token 49152"),
        (
            Job {
                params: SamplingParams { logit_bias: [(49_152, 1.0)].into(), ..base.params.clone() },
                ..base.clone()
            },
            "logit_bias has token 49152",
        ),
        (Job { params: SamplingParams { top_k: 0, ..base.params.clone() }, ..base.clone() }, "top_k must be"),
    ] {
        let got = engine.generate(bad).unwrap_err().to_string();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
    assert_eq!(engine.free_slots(), 8);
}

#[test]
fn memory_is_stated_and_limited_before_loading() {
    let base = EngineConfig { scorers: 0, ..config(Class::Exact, 1) };
    let need = |config: &EngineConfig| infera_node::engine::memory_need(config).unwrap();
    let (exact, fast) = (need(&base), need(&EngineConfig { class: Class::Fast, ..base.clone() }));
    let file = std::fs::metadata(model_path()).unwrap().len();
    assert!((file..file + file / 5).contains(&exact.weights), "{exact:?}, the file has {file} bytes");
    assert_eq!(fast.weights, exact.weights);
    assert_eq!(exact.cache, 8 * 1024 * 30 * 2 * 3 * 64 * 4);
    assert_eq!(fast.cache, exact.cache / 2);
    let scoring = need(&EngineConfig { scorers: 1, ..base.clone() });
    assert_eq!(scoring.cache, exact.cache / 8 * 9, "a place for scoring has a whole context of its own");
    let less = EngineConfig { cache_tokens: Some(1000), ..base.clone() };
    assert_eq!(need(&less).cache, 1008 * 30 * 2 * 3 * 64 * 4);
    let refused = Engine::start(EngineConfig { memory_limit: Some(300 << 20), ..base.clone() }).unwrap_err();
    assert!(matches!(refused, EngineError::Memory { limit_mib: 300, .. }), "{refused}");
    for (bad, text) in [
        (EngineConfig { slots: 0, ..base.clone() }, "slots is 0, allowed are 1 to 64"),
        (EngineConfig { scorers: 9, ..base.clone() }, "scorers is 9, allowed are 0 to 8"),
        (EngineConfig { threads: 1000, ..base.clone() }, "threads is 1000"),
        (EngineConfig { max_context: 9000, ..base.clone() }, "max_context is 9000"),
        (EngineConfig { cache_tokens: Some(0), ..base.clone() }, "cache_tokens is 0"),
        (EngineConfig { model_path: "/nowhere".into(), ..base }, "cannot read the model file"),
    ] {
        let got = Engine::start(bad).unwrap_err().to_string();
        assert!(got.contains(text), "{got:?} should contain {text:?}");
    }
}

#[test]
fn dropping_the_engine_closes_its_jobs() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Arc::new(Prompt::load(&model_path()).unwrap());
    let engine = Engine::start(config(Class::Fast, 1)).unwrap();
    let mut running =
        engine.generate(Job { end_tokens: vec![], ..job(&prompt, QUESTIONS[1], 0.8, 900) }).unwrap();
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
    drop(engine);
    let mut last = None;
    while let Some(event) = running.blocking_recv() {
        last = Some(event);
    }
    assert!(matches!(last, None | Some(Event::Token { .. })), "{last:?}");
}
