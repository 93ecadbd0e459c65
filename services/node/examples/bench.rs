//! Runs the engine for `make bench-node`: a command a line on stdin, JSON; an answer a line on stdout. `loadtest/node/llama.py`
//! does the same with llama.cpp, so that both are given the same tokens and measured by the same arithmetic.
//!
//! ```text
//! at first                                     {"load_secs", "base_bytes", "weights_bytes", "end_tokens": [id]}
//! {"do": "prompt", "system", "user"}           {"tokens": [id]}: the rendered prompt
//! {"do": "run", "waves": [{"when", "jobs": [{"prompt": [id], "tokens", "temperature", "seed"}]}]}
//!     {"wall_secs", "cpu_secs", "first_cpu_secs", "jobs": [{"submitted", "times": [s], "tokens": [id]}]}
//! {"do": "score", "prompt": [id], "answer": [id]}   {"wall_secs", "cpu_secs", "gaps": [logits]}: below the best token's, of each
//! {"do": "memory"}                             {"peak_bytes"}
//! {"do": "pause", "prompts": [[id]]}           {"pause_secs"}: with an endless job for each prompt running
//! {"do": "resume"}                             {"resume_secs"}
//! anything that fails                          {"error": "..."}
//! ```
//!
//! A wave's jobs are submitted when every earlier job has `when` tokens; jobs end after `tokens` tokens and for no other
//! reason. Times are seconds from the start of the command, `first_cpu_secs` the CPU time until every job had a token.

use std::cell::RefCell;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use clap::Parser;
use infera_node::engine::{Class, DeviceChoice, Engine, EngineConfig, Event, Job, ScoreJob, choose};
use infera_prompt::{Message, Prompt};
use infera_protocol::sampling::SamplingParams;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::task::LocalSet;
use uuid::Uuid;

/// Ticks of /proc/self/stat in a second: Linux's USER_HZ, 100 on x86_64 and aarch64.
const TICKS: f64 = 100.0;

#[derive(Parser)]
struct Args {
    /// The model file, GGUF
    model: PathBuf,
    /// exact, fast or bf16
    #[arg(long, value_parser = class)]
    class: Class,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Threads of the engine
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Sequences at once
    #[arg(long, default_value_t = 33)]
    slots: usize,
    /// Most tokens of a sequence
    #[arg(long, default_value_t = 2048)]
    context: usize,
    /// Tokens of the cache
    #[arg(long, default_value_t = 16384)]
    cache: usize,
}

fn class(name: &str) -> Result<Class, String> {
    let all = [Class::Exact, Class::Fast, Class::Bf16];
    all.into_iter().find(|c| c.name() == name).ok_or("exact, fast or bf16".into())
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Command {
    Prompt { system: String, user: String },
    Run { waves: Vec<Wave> },
    Score { prompt: Vec<u32>, answer: Vec<u32> },
    Memory {},
    Pause { prompts: Vec<Vec<u32>> },
    Resume {},
}

#[derive(Deserialize)]
struct Wave {
    when: usize,
    jobs: Vec<Work>,
}

#[derive(Deserialize)]
struct Work {
    prompt: Vec<u32>,
    tokens: u32,
    #[serde(default)]
    temperature: f32,
    #[serde(default)]
    seed: u64,
}

impl Work {
    fn job(self) -> Job {
        Job {
            id: Uuid::now_v7(),
            prompt: self.prompt,
            params: SamplingParams { temperature: self.temperature, ..SamplingParams::default() },
            max_tokens: self.tokens,
            stop: Vec::new(),
            seed: self.seed,
            end_tokens: Vec::new(),
            grammar: None,
        }
    }
}

/// What a job gave so far.
#[derive(Default, Serialize)]
struct Seen {
    submitted: f64,
    times: Vec<f64>,
    tokens: Vec<u32>,
    #[serde(skip)]
    failed: Option<String>,
}

/// User and system time of this process.
fn cpu_secs() -> Result<f64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
    // The name in parentheses may hold blanks; utime and stime are the 12th and 13th field after it.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Ok(fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS)
}

/// A line of /proc/self/status, in bytes.
fn status(field: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| format!("/proc/self/status has no {field}"))
}

/// One command's jobs.
struct Run {
    began: Instant,
    seen: RefCell<Vec<Seen>>,
    changed: Notify,
}

impl Run {
    fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    async fn listen(self: Rc<Self>, index: usize, mut events: mpsc::Receiver<Event>) {
        let mut complete = false;
        while let Some(event) = events.recv().await {
            let now = self.now();
            let job = &mut self.seen.borrow_mut()[index];
            match event {
                Event::Token { token, .. } => {
                    job.times.push(now);
                    job.tokens.push(token);
                }
                Event::Finished { .. } => complete = true,
                Event::Failed { reason } => job.failed = Some(reason),
            }
            self.changed.notify_one();
        }
        if !complete {
            self.seen.borrow_mut()[index].failed.get_or_insert("the engine closed a job".into());
            self.changed.notify_one();
        }
    }

    /// Waits until every job so far has `count` tokens.
    async fn reach(&self, count: usize) -> Result<(), String> {
        loop {
            {
                let seen = self.seen.borrow();
                if let Some(reason) = seen.iter().find_map(|s| s.failed.clone()) {
                    return Err(reason);
                }
                if seen.iter().all(|s| s.times.len() >= count) {
                    return Ok(());
                }
            }
            self.changed.notified().await;
        }
    }
}

async fn run(engine: &Engine, waves: Vec<Wave>) -> Result<Value, String> {
    let cpu = cpu_secs()?;
    let run = Rc::new(Run { began: Instant::now(), seen: RefCell::default(), changed: Notify::new() });
    let mut listeners = Vec::new();
    let mut shortest = usize::MAX;
    for wave in waves {
        if wave.when > shortest {
            return Err(format!("when is {}, and an earlier job has only {shortest} tokens", wave.when));
        }
        run.reach(wave.when).await?;
        for work in wave.jobs {
            shortest = shortest.min(work.tokens as usize);
            let index = run.seen.borrow().len();
            run.seen.borrow_mut().push(Seen { submitted: run.now(), ..Seen::default() });
            let events = engine.generate(work.job()).map_err(|e| e.to_string())?;
            listeners.push(tokio::task::spawn_local(run.clone().listen(index, events)));
        }
    }
    run.reach(1).await?;
    let first = cpu_secs()? - cpu;
    for listener in listeners {
        listener.await.map_err(|e| e.to_string())?;
    }
    run.reach(1).await?;
    let (wall, cpu, jobs) = (run.now(), cpu_secs()? - cpu, run.seen.borrow());
    Ok(json!({"wall_secs": wall, "cpu_secs": cpu, "first_cpu_secs": first, "jobs": &*jobs}))
}

async fn score(engine: &Engine, prompt: Vec<u32>, answer: Vec<u32>) -> Result<Value, String> {
    let (cpu, began) = (cpu_secs()?, Instant::now());
    let params = SamplingParams::greedy();
    let job = ScoreJob { id: Uuid::now_v7(), prompt, tokens: answer, params, seed: 1, grammar: None };
    let scores = engine.score(job).map_err(|e| e.to_string())?;
    let scores = scores.await.map_err(|e| e.to_string())??;
    let wall = began.elapsed().as_secs_f64();
    let gaps: Vec<f64> = scores.iter().map(|score| score.margin).collect();
    Ok(json!({"wall_secs": wall, "cpu_secs": cpu_secs()? - cpu, "gaps": gaps}))
}

/// How long it takes to end running jobs and free the memory.
async fn pause(engine: &Engine, prompts: Vec<Vec<u32>>, most: usize) -> Result<Value, String> {
    let mut running = Vec::new();
    for prompt in prompts {
        let tokens = u32::try_from(most.saturating_sub(prompt.len())).map_err(|e| e.to_string())?;
        let job = Work { prompt, tokens, temperature: 1.0, seed: 1 }.job();
        running.push(engine.generate(job).map_err(|e| e.to_string())?);
    }
    for events in &mut running {
        match events.recv().await {
            Some(Event::Token { .. }) => {}
            other => return Err(format!("a job ended before the pause: {other:?}")),
        }
    }
    let began = Instant::now();
    engine.pause().map_err(|e| e.to_string())?;
    Ok(json!({"pause_secs": began.elapsed().as_secs_f64()}))
}

fn resume(engine: &Engine) -> Result<Value, String> {
    let began = Instant::now();
    engine.resume().map_err(|e| e.to_string())?;
    Ok(json!({"resume_secs": began.elapsed().as_secs_f64()}))
}

async fn answer(engine: &Engine, prompt: &Prompt, context: usize, line: &str) -> Result<Value, String> {
    match serde_json::from_str(line).map_err(|e| format!("not a command: {e}"))? {
        Command::Prompt { system, user } => {
            let messages = [Message::new("system", &system), Message::new("user", &user)];
            Ok(json!({"tokens": prompt.render(&messages).map_err(|e| e.to_string())?}))
        }
        Command::Run { waves } => run(engine, waves).await,
        Command::Score { prompt, answer } => score(engine, prompt, answer).await,
        Command::Pause { prompts } => pause(engine, prompts, context).await,
        Command::Resume {} => resume(engine),
        Command::Memory {} => Ok(json!({"peak_bytes": status("VmHWM")?})),
    }
}

fn serve(args: Args) -> Result<(), String> {
    let (device, class) = choose(args.device, Some(args.class)).map_err(|e| e.to_string())?;
    let config = EngineConfig {
        model_path: args.model,
        class,
        device,
        slots: args.slots,
        scorers: 1,
        threads: args.threads,
        max_context: args.context,
        cache_tokens: Some(args.cache),
        memory_limit: None,
        rounding: None,
    };
    let (base, loading) = (status("VmRSS")?, Instant::now());
    let prompt = Prompt::load(&config.model_path).map_err(|e| e.to_string())?;
    let engine = Engine::start(config).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|e| e.to_string())?;
    let mut out = std::io::stdout();
    let mut say =
        |value: Value| writeln!(out, "{value}").and_then(|()| out.flush()).map_err(|e| e.to_string());
    let load = loading.elapsed().as_secs_f64();
    say(
        json!({"load_secs": load, "base_bytes": base, "weights_bytes": engine.memory().weights, "end_tokens": prompt.end_tokens()}),
    )?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        let answer = LocalSet::new().block_on(&runtime, answer(&engine, &prompt, args.context, &line));
        say(answer.unwrap_or_else(|error| json!({"error": error})))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match serve(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}
