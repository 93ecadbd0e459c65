//! Tokens per second of the engine: `cargo run -p infera-node --example speed -- MODEL [THREADS]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::path::PathBuf;
use std::time::Instant;

use infera_node::engine::{Class, Engine, EngineConfig, Event, Job};
use infera_prompt::{Message, Prompt};
use infera_protocol::sampling::SamplingParams;
use uuid::Uuid;

/// User and system time of this process: on a shared machine it says more than the clock does.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).map(|t| t.parse::<f64>().unwrap()).sum();
    ticks / 100.0
}

fn main() {
    let mut args = std::env::args().skip(1);
    let model_path = PathBuf::from(args.next().expect("the model's path"));
    let threads = args.next().map_or(1, |t| t.parse().expect("a number of threads"));
    let prompt = Prompt::load(&model_path).unwrap();
    let text = "Write a long story about a river and the people who live beside it.";
    let short = prompt.render(&[Message::new("user", text)]).unwrap();
    let long = prompt.render(&[Message::new("user", text.repeat(40))]).unwrap();
    for class in [Class::Exact, Class::Fast] {
        let config = EngineConfig {
            model_path: model_path.clone(),
            class,
            slots: 8,
            threads,
            max_context: 1024,
            cache_tokens: None,
            memory_limit: None,
        };
        let loading = Instant::now();
        let engine = Engine::start(config).unwrap();
        println!("{class:?}: loaded in {:.2} s, {threads} threads", loading.elapsed().as_secs_f64());
        for (name, ids, tokens) in [("prefill", &long, 1), ("decode", &short, 64)] {
            for sequences in [1, 3, 4, 8] {
                let (start, cpu) = (Instant::now(), cpu_seconds());
                let running: Vec<_> = (0..sequences)
                    .map(|i| {
                        let job = Job {
                            id: Uuid::now_v7(),
                            prompt: ids.clone(),
                            params: SamplingParams { temperature: 0.8, ..SamplingParams::default() },
                            max_tokens: tokens,
                            stop: Vec::new(),
                            seed: i,
                            end_tokens: Vec::new(),
                            grammar: None,
                        };
                        engine.generate(job).unwrap()
                    })
                    .collect();
                let mut seen = 0usize;
                let mut first = None;
                for mut events in running {
                    while let Some(event) = events.blocking_recv() {
                        seen += usize::from(matches!(event, Event::Token { .. }));
                        first.get_or_insert_with(|| start.elapsed());
                    }
                }
                let seconds = start.elapsed().as_secs_f64();
                let count = if tokens == 1 { sequences as usize * ids.len() } else { seen };
                let (speed, work) = (count as f64 / seconds, count as f64 / (cpu_seconds() - cpu));
                println!("  {name} of {sequences}: {speed:.0} tokens/s, {work:.0} per second of CPU time");
                if tokens == 1 && sequences == 3 {
                    break;
                }
            }
        }
    }
}
