//! A network of thousands of operators under the real rules of trust: draws, audits, referees, expulsion. Outputs are
//! modelled: an answer is right or wrong, and what an honest referee misses comes from the measured rates. The same seed
//! gives the same run.

use infera_protocol::{
    request::MIN_REPLICAS,
    sampling::noise_bits,
    trust::{Alarm, Event, Reason, Record, Rules},
};

use crate::{
    decision::{Output, Referees, Round, settle},
    weights::Weights,
};

/// When a colluding operator answers wrongly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    /// Every time, each with an answer of its own.
    Alone,
    /// Every time, all with the same answer.
    Always,
    /// Where they hold a majority of the replicas.
    Majority,
    /// Where they hold all replicas, so that nothing looks unequal.
    Unanimous,
}

/// What the cheaters do.
#[derive(Debug, Clone, Copy)]
pub struct Strategy {
    pub name: &'static str,
    pub attack: Attack,
    /// They behave until the warm-up is over, and whenever an alarm is on or one of them there is not trusted.
    pub sleeps: bool,
    /// Whoever is expelled comes back under a new address.
    pub reenters: bool,
}

/// A network and its load.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    pub operators: usize,
    /// Share of operators that cheat.
    pub cheaters: f64,
    pub strategy: Strategy,
    pub referees: bool,
    /// Only trusted operators referee, as long as there are enough; otherwise all eligible ones do.
    pub trusted_judges: bool,
    /// Everybody starts trusted: the cheaters slept long before.
    pub aged: bool,
    pub rules: Rules,
    pub per_day: u32,
    pub warm_up: u32,
    pub requests: u32,
    /// Share of wrong answers that an honest referee misses, 10^-6.
    pub missed_ppm: u32,
    pub seed: u64,
}

/// What happened after the warm-up; expulsions and punishments from the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    pub requests: u32,
    pub wrong: u32,
    pub failed: u32,
    pub attacks: u32,
    pub generated: u64,
    pub scored: u64,
    pub refereed: u32,
    pub overturned: u32,
    pub alarmed: u32,
    pub expelled: u32,
    pub entered: u32,
    pub honest_punished: u32,
}

struct Operator {
    record: Record,
    cheats: bool,
    weight: u32,
    judges: u32,
}

struct Random {
    seed: u64,
    count: u64,
}

impl Random {
    fn next(&mut self) -> u64 {
        self.count += 1;
        noise_bits(self.seed, (self.count >> 32) as u32, self.count as u32)
    }

    fn below(&mut self, most: u64) -> u64 {
        // The bias of a remainder is below 2^-40 for the sums of weights here.
        self.next() % most.max(1)
    }

    fn ppm(&mut self, share: u32) -> bool {
        self.below(1_000_000) < u64::from(share)
    }
}

struct Network {
    scenario: Scenario,
    operators: Vec<Operator>,
    weights: Weights,
    /// Those who may referee.
    judges: Weights,
    random: Random,
    alarm: Alarm,
    now_ms: i64,
    outcome: Outcome,
}

/// Runs a scenario.
pub fn run(scenario: Scenario) -> Outcome {
    let mut network = Network::new(scenario);
    let mut day = 0;
    for i in 0..scenario.warm_up + scenario.requests {
        // Any day but the first of 1970.
        network.now_ms = 86_400_000 * 20_000 + i64::from(i) * 86_400_000 / i64::from(scenario.per_day);
        if network.now_ms / 86_400_000 != day {
            day = network.now_ms / 86_400_000;
            (0..network.operators.len()).for_each(|at| network.weigh(at));
        }
        if i == scenario.warm_up {
            let Outcome { expelled, entered, honest_punished, .. } = network.outcome;
            network.outcome = Outcome { expelled, entered, honest_punished, ..Outcome::default() };
        }
        network.request(i >= scenario.warm_up);
    }
    network.outcome
}

impl Network {
    fn new(scenario: Scenario) -> Self {
        let cheaters = (scenario.operators as f64 * scenario.cheaters).round() as usize;
        let operators = (0..scenario.operators).map(|i| Operator {
            record: Record::default(),
            cheats: i < cheaters,
            weight: 0,
            judges: 0,
        });
        let mut network = Self {
            operators: operators.collect(),
            weights: Weights::new(scenario.operators),
            judges: Weights::new(scenario.operators),
            random: Random { seed: scenario.seed, count: 0 },
            alarm: Alarm::default(),
            now_ms: 86_400_000 * 20_000,
            outcome: Outcome::default(),
            scenario,
        };
        if scenario.aged {
            for at in 0..scenario.operators {
                for _ in 0..scenario.rules.most_verified {
                    let now = network.now_ms;
                    network.operators[at].record.apply(&scenario.rules, now, Event::Verified);
                }
            }
        }
        (0..scenario.operators).for_each(|at| network.weigh(at));
        network
    }

    fn weigh(&mut self, at: usize) {
        let operator = &mut self.operators[at];
        operator.weight = operator.record.weight(&self.scenario.rules, 1, self.now_ms);
        let trusted = || operator.record.is_trusted(&self.scenario.rules, self.now_ms);
        let may_judge = operator.weight > 0 && (!self.scenario.trusted_judges || trusted());
        operator.judges = u32::from(may_judge);
        let (weight, judges) = (operator.weight, operator.judges);
        self.weights.set(at, weight);
        self.judges.set(at, judges);
    }

    /// Draws `count` operators that are not in `taken`, and adds them to it.
    fn draw(&mut self, count: usize, taken: &mut Vec<usize>) -> Vec<usize> {
        let mut drawn = Vec::new();
        for at in taken.iter() {
            self.weights.set(*at, 0);
        }
        while drawn.len() < count {
            let total = self.weights.total();
            if total == 0 {
                break;
            }
            let point = self.random.below(total);
            let at = self.weights.find(point);
            self.weights.set(at, 0);
            drawn.push(at);
        }
        taken.extend(&drawn);
        for at in taken.iter() {
            let weight = self.operators[*at].weight;
            self.weights.set(*at, weight);
        }
        drawn
    }

    /// Referees: from those who may, every one as likely as another. Where they are too few, from all eligible ones.
    fn draw_judges(&mut self, count: usize, taken: &mut Vec<usize>) -> Vec<usize> {
        let mut drawn = Vec::new();
        taken.iter().for_each(|at| self.judges.set(*at, 0));
        while drawn.len() < count && self.judges.total() > 0 {
            let point = self.random.below(self.judges.total());
            let at = self.judges.find(point);
            self.judges.set(at, 0);
            drawn.push(at);
        }
        taken.extend(&drawn);
        taken.iter().for_each(|at| self.judges.set(*at, self.operators[*at].judges));
        let missing = count - drawn.len();
        drawn.extend(self.draw(missing, taken));
        drawn
    }

    fn event(&mut self, at: usize, event: Event) {
        let rules = self.scenario.rules;
        let before = self.operators[at].weight;
        self.operators[at].record.apply(&rules, self.now_ms, event);
        self.weigh(at);
        if matches!(event, Event::Bad(_)) {
            let operator = &self.operators[at];
            self.outcome.honest_punished += u32::from(!operator.cheats);
            if before > 0 && operator.weight == 0 {
                self.outcome.expelled += 1;
                if self.scenario.strategy.reenters && operator.cheats {
                    self.outcome.entered += 1;
                    self.operators.push(Operator {
                        record: Record::default(),
                        cheats: true,
                        weight: 0,
                        judges: 0,
                    });
                    self.weights.push();
                    self.judges.push();
                    self.weigh(self.operators.len() - 1);
                }
            }
        }
    }

    /// Whether the cheaters among the drawn answer wrongly.
    fn attacks(&self, drawn: &[usize], awake: bool) -> bool {
        let ring = drawn.iter().filter(|at| self.operators[**at].cheats).count();
        let strategy = &self.scenario.strategy;
        let trusted = || {
            let mut ring = drawn.iter().filter(|at| self.operators[**at].cheats);
            ring.all(|at| self.operators[*at].record.is_trusted(&self.scenario.rules, self.now_ms))
        };
        if strategy.sleeps && (!awake || self.alarm.is_on(&self.scenario.rules, self.now_ms) || !trusted()) {
            return false;
        }
        match strategy.attack {
            Attack::Alone | Attack::Always => ring > 0,
            Attack::Majority => 2 * ring > drawn.len(),
            Attack::Unanimous => ring == drawn.len(),
        }
    }

    fn output(&self, at: usize, attacked: bool) -> Output {
        match self.scenario.strategy.attack {
            _ if !attacked || !self.operators[at].cheats => Output::Right,
            Attack::Alone => Output::Wrong(at as u32 + 1),
            _ => Output::Wrong(0),
        }
    }

    /// A referee's word on an output. A cheater lies only for an attack of its own ring.
    fn confirms(&mut self, at: usize, output: Output, attacked: bool) -> bool {
        let colludes =
            self.operators[at].cheats && attacked && self.scenario.strategy.attack != Attack::Alone;
        match (colludes, output) {
            (true, output) => output != Output::Right,
            (false, Output::Right) => true,
            (false, Output::Wrong(_)) => self.random.ppm(self.scenario.missed_ppm),
        }
    }

    fn audited(&mut self, drawn: &[usize]) -> bool {
        let (rules, now) = (self.scenario.rules, self.now_ms);
        let share =
            drawn.iter().map(|at| self.operators[*at].record.audit_ppm(&rules, &self.alarm, now)).max();
        self.random.ppm(share.unwrap_or(0))
    }

    fn results(&self, replicas: &[usize], attacked: bool) -> Vec<(usize, Output)> {
        replicas.iter().map(|at| (*at, self.output(*at, attacked))).collect()
    }

    /// Has the drawn referees score these outputs.
    fn ask(&mut self, referees: &mut Referees, drawn: &[usize], outputs: &[Output], attacked: bool) {
        for at in drawn {
            for output in outputs {
                self.outcome.scored += 1;
                let word = self.confirms(*at, *output, attacked);
                referees.reports.push((*at, *output, word));
            }
        }
    }

    fn request(&mut self, awake: bool) {
        let mut taken = Vec::new();
        let mut replicas = self.draw(MIN_REPLICAS as usize, &mut taken);
        let attacked = self.attacks(&replicas, awake);
        let audited = self.scenario.referees && self.audited(&replicas);
        self.outcome.requests += 1;
        self.outcome.attacks += u32::from(attacked);
        self.outcome.alarmed += u32::from(self.alarm.is_on(&self.scenario.rules, self.now_ms));
        let mut referees = Referees::default();
        let mut exhausted = false;
        loop {
            let results = self.results(&replicas, attacked);
            let with_referees = self.scenario.referees;
            match settle(&results, with_referees, audited, &referees, exhausted) {
                Round::Referees(count, outputs) => {
                    self.outcome.refereed += u32::from(referees.reports.is_empty());
                    let drawn = self.draw_judges(count, &mut taken);
                    if drawn.len() < count {
                        self.outcome.failed += 1;
                        return;
                    }
                    self.ask(&mut referees, &drawn, &outputs, attacked);
                }
                Round::Nodes(count) => {
                    let more = self.draw(count, &mut taken);
                    exhausted = more.is_empty();
                    replicas.extend(more);
                }
                Round::NoQuorum => return self.close(&results, None, &referees),
                Round::Verified(output) => return self.close(&results, Some(output), &referees),
            }
        }
    }

    fn close(&mut self, results: &[(usize, Output)], verified: Option<Output>, referees: &Referees) {
        self.outcome.generated += results.len() as u64;
        match verified {
            None => self.outcome.failed += 1,
            Some(Output::Wrong(_)) => self.outcome.wrong += 1,
            Some(Output::Right) => {}
        }
        let (rules, now) = (self.scenario.rules, self.now_ms);
        for (at, _) in results {
            for event in [Event::Offered, Event::Completed] {
                self.operators[*at].record.apply(&rules, now, event);
            }
        }
        if referees.overturned(results) {
            self.outcome.overturned += 1;
            self.alarm.raise(now);
        }
        for (at, output) in results {
            if referees.refuted(*output) {
                self.event(*at, Event::Bad(Reason::Answer));
            } else if verified == Some(*output) {
                self.event(*at, Event::Verified);
            }
        }
        for at in referees.overruled() {
            self.event(at, Event::Bad(Reason::Report));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use infera_protocol::{
        assignment::{Eligible, draw},
        bytes::{Address, NodeId},
        hash::keccak,
    };

    const HONEST: Strategy =
        Strategy { name: "honest", attack: Attack::Alone, sleeps: false, reenters: false };

    fn scenario(cheaters: f64, attack: Attack) -> Scenario {
        Scenario {
            operators: 60,
            cheaters,
            strategy: Strategy { attack, ..HONEST },
            referees: true,
            trusted_judges: false,
            aged: false,
            rules: Rules::default(),
            per_day: 1_000,
            warm_up: 500,
            requests: 1_500,
            missed_ppm: 0,
            seed: 1,
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let one = scenario(0.3, Attack::Majority);
        assert_eq!(run(one), run(one));
        assert_ne!(run(one), run(Scenario { seed: 2, ..one }));
    }

    #[test]
    fn honest_networks_fail_nobody_and_lone_cheaters_deliver_nothing() {
        let honest = run(scenario(0.0, Attack::Alone));
        assert_eq!((honest.wrong, honest.failed, honest.expelled, honest.honest_punished), (0, 0, 0, 0));
        let alone = run(scenario(0.3, Attack::Alone));
        assert_eq!((alone.wrong, alone.honest_punished, alone.expelled), (0, 0, 18), "{alone:?}");
    }

    /// Who is first and second, by the sums of weights and by the protocol's own draw.
    #[test]
    fn draws_are_distributed_as_the_protocols() {
        const RUNS: u32 = 20_000;
        let weights = [50, 200, 600, 971];
        let eligible: Vec<Eligible> = weights
            .iter()
            .zip(1..)
            .map(|(w, i)| Eligible {
                node: NodeId([i; 32]),
                operator: Address([i; 20]),
                class: "exact".into(),
                weight: *w,
                audit_ppm: 0,
                trusted: true,
            })
            .collect();
        let mut network = Network::new(Scenario { operators: 4, ..scenario(0.0, Attack::Alone) });
        for (at, weight) in weights.iter().enumerate() {
            network.operators[at].weight = *weight;
            network.weights.set(at, *weight);
        }
        let mut counts = [[0_i64; 16]; 2];
        for i in 0..RUNS {
            let ours = network.draw(2, &mut Vec::new());
            counts[0][ours[0] * 4 + ours[1]] += 1;
            let theirs = draw(&keccak(&[&i.to_be_bytes()]), &eligible);
            let at = |i: usize| usize::from(theirs[i].node.0[0]) - 1;
            counts[1][at(0) * 4 + at(1)] += 1;
        }
        for (a, b) in counts[0].iter().zip(counts[1]) {
            // Five standard deviations of the difference of two counts.
            let most = 5.0 * ((a + b) as f64).sqrt() + 1.0;
            assert!(((a - b).abs() as f64) < most, "{counts:?}");
        }
    }
}
