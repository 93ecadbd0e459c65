//! Answers that are scored, on the real model.

use infera_node::engine::{Busy, Class, Engine, EngineConfig, Event, Job, Rounding, ScoreJob};
use infera_prompt::Prompt;
use infera_protocol::sampling::SamplingParams;
use uuid::Uuid;

use crate::engine::{Answer, QUESTIONS, alone, collect, config, job, jobs, together};
use crate::{ONE_AT_A_TIME, model_path};

/// What the scorer sees is what the generator saw: ranks 0, no margin, the same fingerprints, in company too.
#[test]
fn scores_of_an_answer_are_its_own_fingerprints() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    for class in [Class::Exact, Class::Fast] {
        let engine = Engine::start(config(class, 2)).unwrap();
        let asked = jobs(&prompt);
        let answers = alone(&engine, &asked);
        let score = |job: &Job, tokens: &[u32]| ScoreJob {
            id: Uuid::now_v7(),
            prompt: job.prompt.clone(),
            tokens: tokens.to_vec(),
            params: job.params.clone(),
            seed: job.seed,
            grammar: None,
        };
        let noise = engine.generate(job(&prompt, QUESTIONS[1], 1.0, 100)).unwrap();
        let running: Vec<_> = asked
            .iter()
            .zip(&answers)
            .map(|(job, answer)| engine.score(score(job, &answer.tokens)).unwrap())
            .collect();
        for (receiver, answer) in running.into_iter().zip(&answers) {
            let scores = receiver.blocking_recv().unwrap().unwrap();
            assert_eq!(scores.len(), answer.tokens.len());
            for (score, (token, fingerprint)) in
                scores.iter().zip(answer.tokens.iter().zip(&answer.fingerprints))
            {
                assert_eq!((score.token, score.rank, score.margin), (*token, Some(0), 0.0));
                assert_eq!(&score.fingerprint, fingerprint);
                assert!(score.raw_logprob <= 0.0);
            }
        }
        collect(noise);
        // Another prompt's answer is far from what would have been drawn.
        let scores = engine.score(score(&asked[0], &answers[1].tokens)).unwrap().blocking_recv().unwrap();
        let worst = scores.unwrap().iter().map(|s| s.margin).fold(0.0, f64::max);
        assert!(worst > 3.0, "{class:?}: {worst}");
        let empty = engine.score(score(&asked[0], &[])).unwrap_err().to_string();
        assert!(empty.contains("tokens must not be empty"), "{empty}");
        let foreign = engine.score(score(&asked[0], &[60_000])).unwrap_err().to_string();
        assert!(foreign.contains("tokens has token 60000"), "{foreign}");
    }
}

/// However good its noise: what keeps a token out of the draw is not made up for.
#[test]
fn a_token_that_is_no_candidate_falls_behind() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(config(Class::Exact, 2)).unwrap();
    let asked = job(&prompt, QUESTIONS[0], 2.0, 1);
    let params = SamplingParams { top_k: 1, ..asked.params.clone() };
    let drawn = alone(&engine, &[Job { params: params.clone(), ..asked.clone() }])[0].tokens[0];
    let score = |token: u32| {
        let job = ScoreJob {
            id: Uuid::now_v7(),
            prompt: asked.prompt.clone(),
            tokens: vec![token],
            params: params.clone(),
            seed: asked.seed,
            grammar: None,
        };
        engine.score(job).unwrap().blocking_recv().unwrap().unwrap()[0].clone()
    };
    assert_eq!(score(drawn).margin, 0.0);
    let best = score(drawn).raw_logprob;
    for token in (0..49_152).step_by(97).filter(|token| *token != drawn) {
        let score = score(token);
        let distance = f64::from(best - score.raw_logprob);
        assert!(score.rank.is_none() && score.margin >= 0.999 * distance && score.margin > 0.0, "{score:?}");
    }
}

/// Scoring and generating have places of their own.
#[test]
fn scores_take_no_slot_and_slots_no_scorer() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let engine = Engine::start(EngineConfig { slots: 1, scorers: 1, ..config(Class::Fast, 1) }).unwrap();
    let asked = Job { end_tokens: vec![], ..job(&prompt, QUESTIONS[1], 0.0, 900) };
    let mut running = engine.generate(asked.clone()).unwrap();
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })));
    let score = || ScoreJob {
        id: Uuid::now_v7(),
        prompt: asked.prompt.clone(),
        tokens: vec![100; 600],
        params: asked.params.clone(),
        seed: asked.seed,
        grammar: None,
    };
    let first = engine.score(score()).unwrap();
    assert_eq!(engine.score(score()).unwrap_err(), Busy::Scoring { scorers: 1 });
    let another = Job { id: Uuid::now_v7(), ..asked.clone() };
    assert_eq!(engine.generate(another).unwrap_err(), Busy::Full { slots: 1 });
    assert_eq!(engine.free_slots(), 0);
    assert_eq!(first.blocking_recv().unwrap().unwrap().len(), 600);
    assert!(matches!(running.blocking_recv(), Some(Event::Token { .. })), "the generation goes on");
    drop(engine.score(score()).unwrap());
}

/// A test's cheater: the same file with cheaper matrices. Its answers are seen by the honest scorer.
#[test]
fn rounded_weights_are_another_model() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let prompt = Prompt::load(&model_path()).unwrap();
    let asked: Vec<Job> = QUESTIONS.iter().map(|q| job(&prompt, q, 0.0, 24)).collect();
    let cheap = |rounding| {
        let engine = Engine::start(EngineConfig { rounding, ..config(Class::Fast, 2) }).unwrap();
        together(&engine, &asked)
    };
    let rounded = [Some(Rounding::ThreeBits), Some(Rounding::TwoBits)].map(cheap);
    let honest = Engine::start(config(Class::Fast, 2)).unwrap();
    let worst = |answers: &[Answer]| -> f64 {
        let scores = asked.iter().zip(answers).map(|(job, answer)| {
            let asked = ScoreJob {
                id: Uuid::now_v7(),
                prompt: job.prompt.clone(),
                tokens: answer.tokens.clone(),
                params: job.params.clone(),
                seed: job.seed,
                grammar: None,
            };
            honest.score(asked).unwrap().blocking_recv().unwrap().unwrap()
        });
        scores.flatten().map(|score| score.margin).fold(0.0, f64::max)
    };
    let [three, two] = rounded.map(|answers| worst(&answers));
    assert!(three > 0.5 && two > three, "largest margins: {three} with 3 bits, {two} with 2");
}
