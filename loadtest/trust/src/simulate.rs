//! The scenarios of the simulation, and what is reported of them.

use infera_protocol::{
    bytes::{Address, Hash32, NodeId},
    canary::CANARY_PPM,
    commitment::{Slot, commitment},
    identity::Domain,
    request::{Finish, Output},
    sampling::noise_bits,
    trust::Rules,
};
use serde::Serialize;

use crate::{
    network::{Attack, Outcome, Scenario, Strategy, run},
    report::Metric,
    sets::say,
    stats::Share,
};

const STRATEGIES: [Strategy; 9] = [
    Strategy { name: "always", attack: Attack::Always, sleeps: false, reenters: false },
    Strategy { name: "always_reenter", attack: Attack::Always, sleeps: false, reenters: true },
    Strategy { name: "majority", attack: Attack::Majority, sleeps: false, reenters: false },
    Strategy { name: "majority_sleep", attack: Attack::Majority, sleeps: true, reenters: false },
    Strategy { name: "majority_reenter", attack: Attack::Majority, sleeps: false, reenters: true },
    Strategy { name: "unanimous", attack: Attack::Unanimous, sleeps: false, reenters: false },
    Strategy { name: "unanimous_sleep", attack: Attack::Unanimous, sleeps: true, reenters: false },
    Strategy { name: "unanimous_reenter", attack: Attack::Unanimous, sleeps: false, reenters: true },
    Strategy { name: "unanimous_sleep_reenter", attack: Attack::Unanimous, sleeps: true, reenters: true },
];
const ALONE: Strategy = Strategy { name: "alone", attack: Attack::Alone, sleeps: false, reenters: false };

/// Who referees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judges {
    None,
    /// All eligible operators.
    All,
    /// Trusted ones, as long as there are enough.
    Trusted,
}

impl Judges {
    fn name(self) -> &'static str {
        match self {
            Self::None => "without referees",
            Self::All => "all referee",
            Self::Trusted => "the trusted referee",
        }
    }
}

/// A run as it is published.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    pub strategy: &'static str,
    pub operators: usize,
    pub cheaters: f64,
    pub referees: Judges,
    pub aged: bool,
    pub seed: u64,
    pub requests: u32,
    pub wrong_delivered_pct: f64,
    pub failed_pct: f64,
    pub attacks: u32,
    pub mean_replicas: f64,
    /// Answers scored as a share of answers generated.
    pub referee_share_pct: f64,
    /// Requests with at least one referee.
    pub refereed_pct: f64,
    pub alarmed_pct: f64,
    pub expelled: u32,
    pub reentered: u32,
    pub overturned: u32,
    pub honest_punished: u32,
}

pub struct Setting {
    pub operators: usize,
    pub per_day: u32,
    pub warm_up: u32,
    pub requests: u32,
    pub missed_ppm: u32,
    pub seed: u64,
    /// Runs of each strategy of a third.
    pub seeds: u32,
}

impl Setting {
    fn run(&self, strategy: Strategy, cheaters: f64, judges: Judges, aged: bool) -> Run {
        let referees = judges != Judges::None;
        let scenario = Scenario {
            operators: self.operators,
            cheaters,
            strategy,
            referees,
            trusted_judges: judges == Judges::Trusted,
            aged,
            rules: Rules::default(),
            per_day: self.per_day,
            warm_up: self.warm_up,
            requests: self.requests,
            missed_ppm: self.missed_ppm,
            seed: self.seed,
        };
        let run = published(&scenario, judges, &run(scenario));
        say(&format!(
            "{} {:.2} {}{}: {:.4} % wrong, {} expelled, {:.1} % scored",
            run.strategy,
            cheaters,
            judges.name(),
            if aged { ", aged" } else { "" },
            run.wrong_delivered_pct,
            run.expelled,
            run.referee_share_pct
        ));
        run
    }
}

fn published(s: &Scenario, judges: Judges, o: &Outcome) -> Run {
    let pct = |part: f64, whole: f64| (1e6 * part / whole.max(1.0)).round() / 1e4;
    let requests = f64::from(o.requests);
    Run {
        strategy: s.strategy.name,
        operators: s.operators,
        cheaters: s.cheaters,
        referees: judges,
        aged: s.aged,
        seed: s.seed,
        requests: o.requests,
        wrong_delivered_pct: pct(f64::from(o.wrong), requests),
        failed_pct: pct(f64::from(o.failed), requests),
        attacks: o.attacks,
        mean_replicas: (1e4 * o.generated as f64 / requests).round() / 1e4,
        referee_share_pct: pct(o.scored as f64, o.generated as f64),
        refereed_pct: pct(f64::from(o.refereed), requests),
        alarmed_pct: pct(f64::from(o.alarmed), requests),
        expelled: o.expelled,
        reentered: o.entered,
        overturned: o.overturned,
        honest_punished: o.honest_punished,
    }
}

/// All runs, and the metrics that follow from them.
pub fn all(setting: &Setting) -> (Vec<Run>, Vec<Metric>) {
    let mut runs = Vec::new();
    // Shares of cheaters, colluding or not.
    for tenths in 0..=4 {
        for strategy in [ALONE, STRATEGIES[2], STRATEGIES[5]] {
            for referees in [Judges::Trusted, Judges::None] {
                runs.push(setting.run(strategy, f64::from(tenths) / 10.0, referees, false));
            }
        }
    }
    let third = third(setting);
    let mut metrics = thirds_best(&third);
    let honest = setting.run(ALONE, 0.0, Judges::Trusted, true);
    metrics.push(Metric::new("referee_share_pct", honest.referee_share_pct, "%"));
    metrics.push(Metric::new("mean_replicas", honest.mean_replicas, "replicas"));
    let young = &runs[0];
    metrics.push(Metric::new("referee_share_young_network_pct", young.referee_share_pct, "%"));
    let punished: u32 = runs
        .iter()
        .filter(|r| r.referees != Judges::None && r.cheaters == 0.0)
        .map(|r| r.honest_punished)
        .sum();
    metrics.push(Metric::new("honest_punished", f64::from(punished + honest.honest_punished), "operators"));
    let framed =
        third.iter().filter(|r| r.referees == Judges::Trusted).map(|r| r.honest_punished).max().unwrap_or(0);
    runs.extend(third);
    metrics.push(Metric::new("honest_punished_by_colluding_third", f64::from(framed), "verdicts"));
    runs.push(honest);
    metrics.extend(canaries(setting.seed));
    // The cosine of a copy is 1.
    metrics.push(Metric::share("copy_caught_pct", copies(setting.seed)).beside(0.0));
    for metric in &mut metrics {
        metric.command = "make bench-sim";
    }
    (runs, metrics)
}

/// A third of all colludes, by every strategy and several seeds.
fn third(setting: &Setting) -> Vec<Run> {
    let mut runs = Vec::new();
    for seed in setting.seed..setting.seed + u64::from(setting.seeds) {
        let setting = Setting { seed, ..*setting };
        for strategy in STRATEGIES {
            for (judges, aged) in KINDS {
                runs.push(setting.run(strategy, 1.0 / 3.0, judges, aged));
            }
        }
    }
    runs
}

/// Networks that a third is tried on.
const KINDS: [(Judges, bool); 5] = [
    (Judges::Trusted, false),
    (Judges::Trusted, true),
    (Judges::All, false),
    (Judges::All, true),
    (Judges::None, false),
];

/// Mean over the seeds, and the largest, of a strategy's share of wrong answers.
fn wrong(runs: &[Run], strategy: &str, judges: Judges, aged: bool) -> (f64, f64) {
    let of = runs.iter().filter(|r| r.strategy == strategy && r.referees == judges && r.aged == aged);
    let shares: Vec<f64> = of.map(|r| r.wrong_delivered_pct).collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    (shares.iter().sum::<f64>() / shares.len().max(1) as f64, most)
}

/// The best of all strategies against such referees: the highest mean over the seeds, the highest of all, and whose.
fn best(runs: &[Run], judges: Judges) -> (f64, f64, &'static str, bool) {
    let mut best = (0.0, 0.0_f64, "", false);
    for strategy in STRATEGIES {
        for (_, aged) in KINDS.iter().filter(|kind| kind.0 == judges) {
            let (mean, most) = wrong(runs, strategy.name, judges, *aged);
            let highest = best.1.max(most);
            best = if mean > best.0 {
                (mean, highest, strategy.name, *aged)
            } else {
                (best.0, highest, best.2, best.3)
            };
        }
    }
    best
}

/// What the best strategy of a colluding third gets, and each one.
fn thirds_best(runs: &[Run]) -> Vec<Metric> {
    let (bare, ..) = best(runs, Judges::None);
    let (mean, most, name, aged) = best(runs, Judges::Trusted);
    let (all, ..) = best(runs, Judges::All);
    say(&format!("the best that a third can do: {name}, aged: {aged}"));
    let expelled = |strategy: &str, aged: bool| {
        let same = |r: &&Run| r.referees == Judges::Trusted && r.strategy == strategy && r.aged == aged;
        let counts: Vec<f64> = runs.iter().filter(same).map(|r| f64::from(r.expelled)).collect();
        counts.iter().sum::<f64>() / counts.len().max(1) as f64
    };
    let mut metrics = vec![
        Metric::new("collusion_third_wrong_delivered_pct", round(mean), "%").beside(round(bare)),
        Metric::new("collusion_third_wrong_delivered_most_pct", round(most), "%"),
        Metric::new("collusion_third_wrong_delivered_all_referee_pct", round(all), "%"),
        Metric::new("collusion_third_wrong_delivered_without_referees_pct", round(bare), "%"),
        Metric::new("collusion_third_expelled", expelled(name, aged), "operators"),
        Metric::new("collusion_third_majority_expelled", expelled("majority", false), "operators"),
    ];
    for strategy in STRATEGIES {
        for aged in [false, true] {
            let (mean, _) = wrong(runs, strategy.name, Judges::Trusted, aged);
            let name = if aged { "_aged" } else { "" };
            let metric = format!("collusion_third_{}{name}_wrong_delivered_pct", strategy.name);
            metrics.push(Metric::new(metric, round(mean), "%"));
        }
    }
    metrics
}

fn round(share: f64) -> f64 {
    (share * 1e4).round() / 1e4
}

const PAIRS: u32 = 10_000;

/// Two that share one generation answer a canary, whose question differs, with one answer: found at the first. Each job is
/// one by chance; jobs that have none are left out (fewer than six operators, greedy ones while no other prompt is known).
/// Who compares the whole requests before sharing computes canaries twice, and is never found.
fn canaries(seed: u64) -> Vec<Metric> {
    let canaries = u64::from(CANARY_PPM);
    let first = |pair: u32| (0..250).position(|job| noise_bits(seed, pair, job) % 1_000_000 < canaries);
    let found: Vec<Option<usize>> = (0..PAIRS).map(first).collect();
    let within = |jobs: usize| {
        let hits = found.iter().filter(|at| at.is_some_and(|at| at < jobs)).count();
        Share::of(hits, PAIRS as usize)
    };
    vec![
        Metric::share("sharing_naive_found_in_100_jobs_pct", within(100)),
        Metric::share("sharing_naive_found_in_250_jobs_pct", within(250)),
        Metric::share("sharing_compared_seeds_found_pct", Share::of(0, PAIRS as usize)),
    ]
}

const COPIES: u32 = 3_000;

/// Copiers of a peer that does not collude: until all have committed they see its commitment at most. It is caught if it
/// does not open for the copier's own slot, with the peer's revealed answer and salt.
fn copies(seed: u64) -> Share {
    let domain = Domain { chain_id: 31_337, contract: Address([1; 20]) };
    let caught = (0..COPIES).filter(|i| {
        let random = |n: u32| noise_bits(seed, *i, n);
        let bytes = |n: u32| {
            let mut bytes = [0; 32];
            bytes
                .chunks_exact_mut(8)
                .zip(n..)
                .for_each(|(chunk, n)| chunk.copy_from_slice(&random(n).to_be_bytes()));
            bytes
        };
        let slot = |n: u32| Slot { request_hash: Hash32(bytes(0)), attempt: 1, node: NodeId(bytes(n)) };
        let tokens = (0..24).map(|n| (random(100 + n) % 49_152) as u32).collect();
        let output = Output { tokens, fingerprints: Vec::new(), finish: Finish::Length };
        let salt = Hash32(bytes(8));
        let peers = commitment(&domain, &slot(4), &output, &salt);
        commitment(&domain, &slot(12), &output, &salt) != peers
    });
    Share::of(caught.count(), COPIES as usize)
}
