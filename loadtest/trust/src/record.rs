//! Recorded generations: what honest nodes and cheaters answer, with fingerprints, one file a set.

use std::{collections::VecDeque, fs, path::Path};

use infera_node::engine::{
    Class, Device, Engine, EngineConfig, Event, Finish, Job, Rounding, Score, ScoreJob,
};
use infera_prompt::{Message, Prompt};
use infera_protocol::{
    bytes::Hash32,
    fingerprint::Fingerprint,
    request::{Output, Request, choice_seed},
    sampling::SamplingParams,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Sampled answers are drawn with this temperature.
pub const WARM: f32 = 0.8;
/// Requests per prompt: one greedy, the others with a seed of their own.
pub const MODES: usize = 4;
/// Tokens of a recording's cache: all prompts stay.
const CACHE: usize = 49_152;
const CONTEXT: usize = 512;
const SLOTS: usize = 64;
const SCORERS: usize = 8;

/// What all recordings share.
pub struct Setup {
    pub prompt: Prompt,
    /// Token ids of the rendered prompts.
    pub prompts: Vec<Vec<u32>>,
    /// Token ids of the users' words alone.
    pub words: Vec<Vec<u32>>,
    pub texts: Vec<String>,
    pub max_tokens: u32,
    /// Names the prompts and the limits: recordings of others are made again.
    key: String,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub prints: Vec<Fingerprint>,
    pub finish: Finish,
}

impl Answer {
    pub fn output(&self) -> Output {
        let fingerprints = self.prints.iter().flat_map(Fingerprint::encode).collect();
        Output { tokens: self.tokens.clone(), fingerprints, finish: self.finish }
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    t: Vec<u32>,
    p: String,
    f: Finish,
}

#[derive(Serialize, Deserialize)]
struct File {
    key: String,
    answers: Vec<Stored>,
}

impl Setup {
    pub fn new(model: &Path, list: &str, most: usize, max_tokens: u32) -> Result<Self, String> {
        let prompt = Prompt::load(model).map_err(|e| e.to_string())?;
        let texts: Vec<String> =
            list.lines().filter(|l| !l.is_empty()).take(most).map(str::to_owned).collect();
        let render = |text: &String| prompt.render(&[Message::new("user", text)]).map_err(|e| e.to_string());
        let prompts = texts.iter().map(render).collect::<Result<Vec<_>, _>>()?;
        let words = |text: &String| prompt.tokenizer().encode(text).map_err(|e| e.to_string());
        let words = texts.iter().map(words).collect::<Result<Vec<_>, _>>()?;
        let mut hasher = blake3::Hasher::new();
        for text in &texts {
            hasher.update(text.as_bytes()).update(b"\n");
        }
        let key = format!("{} {max_tokens} {MODES}", hasher.finalize().to_hex());
        Ok(Self { prompt, prompts, words, texts, max_tokens, key })
    }

    /// Tokens that two answers share at their beginning.
    pub fn parting(a: &[u32], b: &[u32]) -> usize {
        a.iter().zip(b).take_while(|(x, y)| x == y).count()
    }

    pub fn end_tokens(&self) -> &[u32] {
        self.prompt.end_tokens()
    }

    /// Parameters and seed of a request.
    pub fn draw(prompt: usize, mode: usize) -> (SamplingParams, u64) {
        let temperature = if mode == 0 { 0.0 } else { WARM };
        let seed = choice_seed(prompt as u64 + 1, u32::try_from(mode).unwrap_or(0));
        (SamplingParams { temperature, ..SamplingParams::default() }, seed)
    }

    pub fn request(&self, prompt: usize, mode: usize) -> Request {
        let (sampling, seed) = Self::draw(prompt, mode);
        Request {
            id: Uuid::from_u128((prompt * MODES + mode) as u128 + 1),
            model_root: Hash32::ZERO,
            prompt: self.prompts[prompt].clone(),
            sampling,
            max_tokens: self.max_tokens,
            stop: Vec::new(),
            seed,
            grammar: None,
        }
    }

    pub fn job(&self, prompt: usize, mode: usize) -> Job {
        let (params, seed) = Self::draw(prompt, mode);
        Job {
            id: Uuid::now_v7(),
            prompt: self.prompts[prompt].clone(),
            params,
            max_tokens: self.max_tokens,
            stop: Vec::new(),
            seed,
            end_tokens: self.end_tokens().to_vec(),
            grammar: None,
        }
    }

    /// Every request of `modes`, prompt by prompt.
    pub fn jobs(&self, modes: std::ops::Range<usize>) -> Vec<Job> {
        (0..self.prompts.len())
            .flat_map(|p| modes.clone().map(move |m| (p, m)))
            .map(|(p, m)| self.job(p, m))
            .collect()
    }
}

pub fn engine(model: &Path, class: Class, rounding: Option<Rounding>) -> Result<Engine, String> {
    Engine::start(EngineConfig {
        model_path: model.to_owned(),
        class,
        device: Device::Cpu,
        slots: SLOTS,
        scorers: SCORERS,
        threads: 1,
        max_context: CONTEXT,
        cache_tokens: Some(CACHE),
        memory_limit: None,
        rounding,
    })
    .map_err(|e| e.to_string())
}

/// All jobs' answers, in their order; as many at once as the engine takes.
pub fn generate(engine: &Engine, jobs: Vec<Job>) -> Result<Vec<Answer>, String> {
    let mut left: VecDeque<Job> = jobs.into();
    let mut running = VecDeque::new();
    let mut answers = Vec::new();
    loop {
        while running.len() < 4 * SLOTS && engine.free_slots() > 0 {
            let Some(job) = left.pop_front() else { break };
            running.push_back(engine.generate(job).map_err(|e| e.to_string())?);
        }
        let Some(mut events) = running.pop_front() else { return Ok(answers) };
        let (mut tokens, mut prints) = (Vec::new(), Vec::new());
        loop {
            match events.blocking_recv() {
                Some(Event::Token { token, fingerprint }) => {
                    tokens.push(token);
                    prints.push(fingerprint);
                }
                Some(Event::Finished { finish }) => break answers.push(Answer { tokens, prints, finish }),
                Some(Event::Failed { reason }) => return Err(reason),
                None => return Err("the engine closed a job".into()),
            }
        }
    }
}

/// All answers' scores, in their order.
pub fn score(engine: &Engine, jobs: Vec<ScoreJob>) -> Result<Vec<Vec<Score>>, String> {
    let mut left: VecDeque<ScoreJob> = jobs.into();
    let mut running = VecDeque::new();
    let mut all = Vec::new();
    loop {
        while running.len() < SCORERS {
            let Some(job) = left.pop_front() else { break };
            running.push_back(engine.score(job).map_err(|e| e.to_string())?);
        }
        let Some(reply) = running.pop_front() else { return Ok(all) };
        all.push(reply.blocking_recv().map_err(|_| "the engine closed a job")??);
    }
}

/// The set `name` from its file, or made by `make` and written there.
pub fn set(
    folder: &Path,
    setup: &Setup,
    name: &str,
    make: impl FnOnce() -> Result<Vec<Answer>, String>,
) -> Result<Vec<Answer>, String> {
    let path = folder.join(format!("{name}.json"));
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    if let Some(file) = fs::read(&path).ok().and_then(|b| serde_json::from_slice::<File>(&b).ok())
        && file.key == setup.key
    {
        return file.answers.into_iter().map(|stored| read(stored).map_err(|e| failed(&e))).collect();
    }
    let answers = make()?;
    let stored = |a: &Answer| Stored {
        t: a.tokens.clone(),
        p: hex::encode(a.prints.iter().flat_map(Fingerprint::encode).collect::<Vec<u8>>()),
        f: a.finish,
    };
    let file = File { key: setup.key.clone(), answers: answers.iter().map(stored).collect() };
    fs::create_dir_all(folder).map_err(|e| failed(&e))?;
    let part = path.with_extension("part");
    let bytes = serde_json::to_vec(&file).map_err(|e| failed(&e))?;
    fs::write(&part, bytes).and_then(|()| fs::rename(&part, &path)).map_err(|e| failed(&e))?;
    Ok(answers)
}

fn read(stored: Stored) -> Result<Answer, String> {
    let bytes = hex::decode(&stored.p).map_err(|e| e.to_string())?;
    let prints = Fingerprint::decode_all(&bytes).map_err(|e| e.to_string())?;
    Ok(Answer { tokens: stored.t, prints, finish: stored.f })
}
