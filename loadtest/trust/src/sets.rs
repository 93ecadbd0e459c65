//! What is recorded, and by which engine.

use std::{io::Write, path::Path, time::Instant};

use infera_node::engine::{Class, Engine, Finish, Job, Rounding};
use infera_prompt::Tokenizer;
use infera_protocol::{fingerprint::Entry, fingerprint::Fingerprint, sampling::SamplingParams};

use crate::record::{Answer, MODES, Setup, WARM, engine, generate, set};

/// The temperature of a node that was asked for [`WARM`].
const HOTTER: f32 = 1.0;
/// Tokens of a stale block of the cache.
const BLOCK: usize = 16;

/// All recordings. Answers of a set with n modes: prompt p, mode m is number p * n + m.
pub struct Sets {
    /// [`MODES`] modes each.
    pub exact: Vec<Answer>,
    pub fast: Vec<Answer>,
    /// 2 modes: greedy and the first seed.
    pub round3: Vec<Answer>,
    pub round2: Vec<Answer>,
    pub stale: Vec<Answer>,
    /// 1 mode: the first seed at another temperature.
    pub hotter: Vec<Answer>,
    /// 2 modes: gemma-3-270m's words, greedy and sampled, in this model's tokens.
    pub other: Vec<Answer>,
    /// 1 mode: greedy until the closest call, the second choice there, and 3-bit weights from then on. The place is
    /// where it parts from `fast`.
    pub after_tie: Vec<Answer>,
}

/// The two honest engines, which also referee.
pub struct Engines {
    pub exact: Engine,
    pub fast: Engine,
}

pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "bench-trust: {text}");
}

impl Sets {
    pub fn record(
        setup: &Setup,
        folder: &Path,
        model: &Path,
        other: &Path,
        engines: &Engines,
    ) -> Result<Self, String> {
        let timed = |name: &str, make: Make<'_>| timed(folder, setup, name, make);
        let fast = timed("fast", &|| generate(&engines.fast, setup.jobs(0..MODES)))?;
        let exact = timed("exact", &|| generate(&engines.exact, setup.jobs(0..MODES)))?;
        let hotter = timed("hotter", &|| {
            let mut jobs = setup.jobs(1..2);
            jobs.iter_mut().for_each(|job| job.params.temperature = HOTTER);
            generate(&engines.fast, jobs)
        })?;
        let stale = timed("stale", &|| generate(&engines.fast, stale_jobs(setup)))?;
        let rounded = |rounding| engine(model, Class::Fast, Some(rounding));
        let round2 = timed("round2", &|| generate(&rounded(Rounding::TwoBits)?, setup.jobs(0..2)))?;
        let round3 = timed("round3", &|| generate(&rounded(Rounding::ThreeBits)?, setup.jobs(0..2)))?;
        let after_tie = timed("after_tie", &|| after_tie(setup, &rounded(Rounding::ThreeBits)?, &fast))?;
        let other = timed("other", &|| other_model(setup, other))?;
        Ok(Self { exact, fast, round3, round2, stale, hotter, other, after_tie })
    }
}

/// Generates a set.
pub type Make<'a> = &'a dyn Fn() -> Result<Vec<Answer>, String>;

/// A set from its file or its engine, with the time that it took.
pub fn timed(folder: &Path, setup: &Setup, name: &str, make: Make<'_>) -> Result<Vec<Answer>, String> {
    let began = Instant::now();
    let answers = set(folder, setup, name, make)?;
    let tokens: usize = answers.iter().map(|a| a.tokens.len()).sum();
    say(&format!(
        "{name}: {} answers, {tokens} tokens, {:.0} s",
        answers.len(),
        began.elapsed().as_secs_f64()
    ));
    Ok(answers)
}

/// A block in the middle of the cache holds another prompt.
fn stale_jobs(setup: &Setup) -> Vec<Job> {
    let count = setup.prompts.len();
    let mut jobs = setup.jobs(0..2);
    for (i, job) in jobs.iter_mut().enumerate() {
        let from = &setup.prompts[(i / 2 + 1) % count];
        // The end of the prompt (who speaks next) stays.
        let end = job.prompt.len().min(from.len()).saturating_sub(5);
        let start = end.saturating_sub(BLOCK);
        job.prompt[start..end].copy_from_slice(&from[start..end]);
    }
    jobs
}

/// Where the draw was closest, the last token excepted, closest first; with the second choice there.
pub fn closest(answer: &Answer, gap: impl Fn(usize, &Fingerprint) -> Option<f64>) -> Vec<(usize, u32)> {
    let mut places: Vec<(f64, usize, u32)> = answer
        .prints
        .iter()
        .enumerate()
        .take(answer.tokens.len().saturating_sub(1))
        .filter_map(|(at, print)| Some((gap(at, print)?, at, print.entries().get(1)?.token)))
        .collect();
    places.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    places.into_iter().map(|(_, at, token)| (at, token)).collect()
}

/// First choice less second choice, greedy.
pub fn greedy_gap(print: &Fingerprint) -> Option<f64> {
    let logprob = |i: usize| Some(f64::from(print.entries().get(i)?.logprob()));
    Some(logprob(0)? - logprob(1)?)
}

fn after_tie(setup: &Setup, cheap: &Engine, fast: &[Answer]) -> Result<Vec<Answer>, String> {
    let count = setup.prompts.len();
    let places: Vec<Option<(usize, u32)>> = (0..count)
        .map(|p| closest(&fast[p * MODES], |_, print| greedy_gap(print)).first().copied())
        .collect();
    let mut jobs = Vec::new();
    for (p, place) in places.iter().enumerate() {
        if let Some((at, token)) = place {
            let mut job = setup.job(p, 0);
            job.prompt.extend(&fast[p * MODES].tokens[..*at]);
            job.prompt.push(*token);
            job.max_tokens = setup.max_tokens - u32::try_from(*at).unwrap_or(0) - 1;
            jobs.push(job);
        }
    }
    let mut tails = generate(cheap, jobs)?.into_iter();
    let whole = |(p, place): (usize, &Option<(usize, u32)>)| {
        let honest = &fast[p * MODES];
        let Some((at, token)) = place else { return honest.clone() };
        let Some(tail) = tails.next() else { return honest.clone() };
        let mut tokens = honest.tokens[..*at].to_vec();
        tokens.push(*token);
        tokens.extend(tail.tokens);
        let mut prints = honest.prints[..*at].to_vec();
        prints.push(tie(&honest.prints[*at], *token));
        prints.extend(tail.prints);
        Answer { tokens, prints, finish: tail.finish }
    };
    Ok(places.iter().enumerate().map(whole).collect())
}

/// A fingerprint that claims `token` was as good as the best: the honest one, with it in the first place.
pub fn tie(honest: &Fingerprint, token: u32) -> Fingerprint {
    let best = honest.entries().first().map_or(0, |e| e.logprob);
    let mut entries = vec![Entry { token, logprob: best }];
    entries.extend(honest.entries().iter().filter(|e| e.token != token).take(7));
    Fingerprint::new(entries).unwrap_or_else(|_| honest.clone())
}

/// A fingerprint that claims there was no choice.
pub fn certain(token: u32) -> Option<Fingerprint> {
    Fingerprint::new(vec![Entry { token, logprob: 0 }]).ok()
}

/// The other model's words, cut to the limit of tokens.
fn other_model(setup: &Setup, model: &Path) -> Result<Vec<Answer>, String> {
    let tokenizer = Tokenizer::from_gguf(model).map_err(|e| e.to_string())?;
    let engine = engine(model, Class::Fast, None)?;
    let mut jobs = Vec::new();
    for (p, text) in setup.texts.iter().enumerate() {
        for mode in 0..2 {
            let mut job = setup.job(p, mode);
            // The file has no chat template.
            let question = format!("Question: {text}\nAnswer:");
            job.prompt = tokenizer.leading_bos().into_iter().collect();
            job.prompt.extend(tokenizer.encode(&question).map_err(|e| e.to_string())?);
            job.end_tokens = tokenizer.end_tokens().to_vec();
            job.params = SamplingParams {
                temperature: if mode == 0 { 0.0 } else { WARM },
                ..SamplingParams::default()
            };
            jobs.push(job);
        }
    }
    let end = *setup.end_tokens().last().ok_or("the model has no end token")?;
    let most = setup.max_tokens as usize;
    let answers = generate(&engine, jobs)?.into_iter().map(|answer| {
        let mut tokens = setup
            .prompt
            .tokenizer()
            .encode(tokenizer.decode(&answer.tokens).trim_start())
            .map_err(|e| e.to_string())?;
        if answer.finish == Finish::Eos && tokens.len() < most {
            tokens.push(end);
        }
        tokens.truncate(most);
        let ended = tokens.last() == Some(&end);
        if !ended && tokens.len() < most {
            tokens.push(end);
        }
        let finish = if tokens.last() == Some(&end) { Finish::Eos } else { Finish::Length };
        let prints = tokens.iter().filter_map(|t| certain(*t)).collect();
        Ok(Answer { tokens, prints, finish })
    });
    answers.collect()
}
