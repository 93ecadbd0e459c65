//! Entry trials: fresh prompts of tokens drawn at random, answered by a newcomer and scored by a referee. Nobody writes like
//! that, so that these are also the prompts of somebody who wants honest classes to differ: nearly every token is about as
//! likely as the next one. Half of them have `top_p`, whose edge is another place where classes may differ.

use infera_node::engine::{Class, Engine, Job, Rounding, Score, ScoreJob};
use infera_protocol::{
    admission,
    calibration::Bounds,
    hash::keccak,
    referee::{Report, TokenScore, judge},
    registry::{Model, Registry},
    request::Request,
};
use uuid::Uuid;

use crate::{
    record::{Answer, engine, generate, score},
    report::Metric,
    sets::Engines,
    stats::Share,
};

/// The `top_p` of every second trial.
const NUCLEUS: f32 = 0.9;
/// Who enters, and how far its weights are rounded.
const ENTRANTS: [(&str, Option<Rounding>); 3] =
    [("honest", None), ("round3bit", Some(Rounding::ThreeBits)), ("round2bit", Some(Rounding::TwoBits))];

/// Meaningless prompts of which the widest margin between the classes is taken into the bounds.
const CALIBRATING: u32 = 400;

/// `count` trials; those of two names differ.
fn trials(model: &Model, name: &str, count: u32) -> Vec<Request> {
    let trial = |i: u32| {
        let beta = keccak(&[name.as_bytes(), &i.to_be_bytes()]);
        let mut request = admission::trial(&beta, Uuid::from_u128(i.into()), model);
        request.sampling.top_p = if i.is_multiple_of(2) { 1.0 } else { NUCLEUS };
        request
    };
    (0..count).map(trial).collect()
}

/// The widest margin that an honest answer to a meaningless prompt gets from the other class, logits.
pub fn widest(engines: &Engines, model: &Model) -> Result<f64, String> {
    let requests = trials(model, "calibration", CALIBRATING);
    let mut most = 0.0_f64;
    for (author, referee) in [(&engines.exact, &engines.fast), (&engines.fast, &engines.exact)] {
        let answers = generate(author, requests.iter().map(|r| job(r, model)).collect())?;
        let scores = scored(referee, &requests, &answers)?;
        most = scores.iter().flatten().map(|score| score.margin).fold(most, f64::max);
    }
    Ok(most)
}

/// All trials, `count` of each kind.
pub fn measure(path: &std::path::Path, registry: &Registry, count: u32) -> Result<Vec<Metric>, String> {
    let model = registry.models.first().ok_or("the registry has no model")?;
    let requests = trials(model, "bench", count);
    let referees = [engine(path, Class::Exact, None)?, engine(path, Class::Fast, None)?];
    let mut metrics = Vec::new();
    for (name, rounding) in ENTRANTS {
        for class in [Class::Exact, Class::Fast] {
            // A rounded model runs in the cheaper class alone.
            if rounding.is_some() && class == Class::Exact {
                continue;
            }
            let entrant = engine(path, class, rounding)?;
            let answers = generate(&entrant, requests.iter().map(|r| job(r, model)).collect())?;
            for (referee, by) in referees.iter().zip([Class::Exact, Class::Fast]) {
                let bounds = registry
                    .calibration
                    .bounds(class.name(), by.name())
                    .ok_or("the registry has no bounds between these classes")?;
                let (failed, widest) = judged(referee, &requests, &answers, bounds)?;
                let pair = format!("{}_by_{}", class.name(), by.name());
                let share = Share::of(failed, answers.len());
                metrics.push(Metric::share(format!("entry_trial_{name}_{pair}_failed_pct"), share));
                if rounding.is_none() {
                    let bound = f64::from(bounds.margin_milli) / 1_000.0;
                    metrics.push(
                        Metric::new(format!("entry_trial_widest_margin_{pair}"), widest, "logits")
                            .beside(bound),
                    );
                }
            }
        }
    }
    Ok(metrics)
}

fn job(request: &Request, model: &Model) -> Job {
    Job {
        id: request.id,
        prompt: request.prompt.clone(),
        params: request.sampling.clone(),
        max_tokens: request.max_tokens,
        stop: Vec::new(),
        seed: request.seed,
        end_tokens: model.end_tokens.clone(),
        grammar: None,
    }
}

fn scored(referee: &Engine, requests: &[Request], answers: &[Answer]) -> Result<Vec<Vec<Score>>, String> {
    let jobs = requests.iter().zip(answers).map(|(request, answer)| ScoreJob {
        id: Uuid::now_v7(),
        prompt: request.prompt.clone(),
        tokens: answer.tokens.clone(),
        params: request.sampling.clone(),
        seed: request.seed,
        grammar: None,
    });
    score(referee, jobs.collect())
}

/// How many answers fail, and the widest margin of all, logits.
fn judged(
    referee: &Engine,
    requests: &[Request],
    answers: &[Answer],
    bounds: &Bounds,
) -> Result<(usize, f64), String> {
    let (mut failed, mut widest) = (0, 0.0_f64);
    for (scores, answer) in scored(referee, requests, answers)?.into_iter().zip(answers) {
        widest = scores.iter().map(|score| score.margin).fold(widest, f64::max);
        let one = |score: Score| TokenScore {
            margin_micro: TokenScore::margin_micro(score.margin),
            fingerprint: score.fingerprint,
        };
        let report = Report { scores: scores.into_iter().map(one).collect() };
        failed += usize::from(judge(answer.tokens.len(), &report, bounds).is_err());
    }
    Ok((failed, widest))
}
