//! The scenarios of the simulation, and what is reported of them.

use infera_protocol::{sampling::noise_bits, trust::Rules};
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
/// Runs of each strategy of a third.
const SEEDS: u64 = 5;
const ALONE: Strategy = Strategy { name: "alone", attack: Attack::Alone, sleeps: false, reenters: false };

/// A run as it is published.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    pub strategy: &'static str,
    pub operators: usize,
    pub cheaters: f64,
    pub referees: bool,
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
}

impl Setting {
    fn run(&self, strategy: Strategy, cheaters: f64, referees: bool, aged: bool) -> Run {
        let scenario = Scenario {
            operators: self.operators,
            cheaters,
            strategy,
            referees,
            aged,
            rules: Rules::default(),
            per_day: self.per_day,
            warm_up: self.warm_up,
            requests: self.requests,
            missed_ppm: self.missed_ppm,
            seed: self.seed,
        };
        let run = published(&scenario, &run(scenario));
        say(&format!(
            "{} {:.2} {}{}: {:.4} % wrong, {} expelled, {:.1} % scored",
            run.strategy,
            cheaters,
            if referees { "with referees" } else { "without referees" },
            if aged { ", aged" } else { "" },
            run.wrong_delivered_pct,
            run.expelled,
            run.referee_share_pct
        ));
        run
    }
}

fn published(s: &Scenario, o: &Outcome) -> Run {
    let pct = |part: f64, whole: f64| (1e6 * part / whole.max(1.0)).round() / 1e4;
    let requests = f64::from(o.requests);
    Run {
        strategy: s.strategy.name,
        operators: s.operators,
        cheaters: s.cheaters,
        referees: s.referees,
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
            for referees in [true, false] {
                runs.push(setting.run(strategy, f64::from(tenths) / 10.0, referees, false));
            }
        }
    }
    let third = third(setting);
    let mut metrics = thirds_best(&third);
    let honest = setting.run(ALONE, 0.0, true, true);
    metrics.push(Metric::new("referee_share_pct", honest.referee_share_pct, "%"));
    metrics.push(Metric::new("mean_replicas", honest.mean_replicas, "replicas"));
    let young = &runs[0];
    metrics.push(Metric::new("referee_share_young_network_pct", young.referee_share_pct, "%"));
    let punished: u32 =
        runs.iter().filter(|r| r.referees && r.cheaters == 0.0).map(|r| r.honest_punished).sum();
    metrics.push(Metric::new("honest_punished", f64::from(punished + honest.honest_punished), "operators"));
    let framed = third.iter().filter(|r| r.referees).map(|r| r.honest_punished).max().unwrap_or(0);
    runs.extend(third);
    metrics.push(Metric::new("honest_punished_by_colluding_third", f64::from(framed), "verdicts"));
    runs.push(honest);
    metrics.extend(canaries(setting.seed));
    (runs, metrics)
}

/// A third of all colludes, by every strategy and several seeds.
fn third(setting: &Setting) -> Vec<Run> {
    let mut runs = Vec::new();
    for seed in setting.seed..setting.seed + SEEDS {
        let setting = Setting { seed, ..*setting };
        for strategy in STRATEGIES {
            for aged in [false, true] {
                runs.push(setting.run(strategy, 1.0 / 3.0, true, aged));
            }
            runs.push(setting.run(strategy, 1.0 / 3.0, false, false));
        }
    }
    runs
}

/// Mean over the seeds, and the largest, of a strategy's share of wrong answers.
fn wrong(runs: &[Run], strategy: &str, referees: bool, aged: bool) -> (f64, f64) {
    let of = runs.iter().filter(|r| r.strategy == strategy && r.referees == referees && r.aged == aged);
    let shares: Vec<f64> = of.map(|r| r.wrong_delivered_pct).collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    (shares.iter().sum::<f64>() / shares.len().max(1) as f64, most)
}

/// What the best strategy of a colluding third gets: the highest mean over the seeds.
fn thirds_best(runs: &[Run]) -> Vec<Metric> {
    let mut metrics = Vec::new();
    let (mut best, mut bare, mut most) = ((0.0, STRATEGIES[0], false), 0.0_f64, 0.0_f64);
    for strategy in STRATEGIES {
        bare = bare.max(wrong(runs, strategy.name, false, false).0);
        for aged in [false, true] {
            let (mean, largest) = wrong(runs, strategy.name, true, aged);
            most = most.max(largest);
            best = if mean > best.0 { (mean, strategy, aged) } else { best };
            let name = if aged { "_aged" } else { "" };
            let metric = format!("collusion_third_{}{name}_wrong_delivered_pct", strategy.name);
            metrics.push(Metric::new(metric, round(mean), "%"));
        }
    }
    let (mean, strategy, aged) = best;
    let same = |r: &&Run| r.referees && r.strategy == strategy.name && r.aged == aged;
    let expelled = runs.iter().filter(same).map(|r| f64::from(r.expelled)).sum::<f64>() / SEEDS as f64;
    say(&format!("the best that a third can do: {}, aged: {aged}", strategy.name));
    metrics.splice(
        0..0,
        [
            Metric::new("collusion_third_wrong_delivered_pct", round(mean), "%").beside(round(bare)),
            Metric::new("collusion_third_wrong_delivered_most_pct", round(most), "%"),
            Metric::new("collusion_third_wrong_delivered_without_referees_pct", round(bare), "%"),
            Metric::new("collusion_third_expelled", expelled, "operators"),
        ],
    );
    let always = runs.iter().filter(|r| r.referees && r.strategy == "majority" && !r.aged);
    let expelled = always.map(|r| f64::from(r.expelled)).sum::<f64>() / SEEDS as f64;
    metrics.push(Metric::new("collusion_third_majority_expelled", expelled, "operators"));
    metrics
}

fn round(share: f64) -> f64 {
    (share * 1e4).round() / 1e4
}

/// Share of jobs that are canaries (protocol section 8), 10^-6.
const CANARIES: u64 = 20_000;
const PAIRS: u32 = 10_000;

/// Two that share one generation answer a canary, whose seeds differ per node, with one answer: found at the first.
/// Who compares the seeds before sharing computes canaries twice, and is never found.
fn canaries(seed: u64) -> Vec<Metric> {
    let first = |pair: u32| (0..250).position(|job| noise_bits(seed, pair, job) % 1_000_000 < CANARIES);
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
