//! Trust (protocol section 8): what an operator's past says about its next answer, what follows from it, and what it
//! would take to recover.
//!
//! Pure and without a clock: every call takes the time. Counts are kept as integers of 10^-6 answers, so that a record
//! is the same wherever it is computed; the quantile is `f64` arithmetic of the pure Rust libm in a fixed order.
//!
//! ```text
//! event -> Record (decaying counts) -> score = 5% quantile of Beta(1 + verified, 1 + 5 bad)
//!                                        |-> is_eligible: may it be drawn at all
//!                                        |-> audit_ppm:   how often its answers are refereed
//!                                        '-> weight:      how often it is drawn
//! ```

use crate::{calibration::Bounds, referee};
use serde::{Deserialize, Serialize};

/// One in parts of a million; one answer in 10^-6 answers.
const ONE: u64 = 1_000_000;
const DAY_MS: i64 = 86_400_000;
/// Longest that [`Record::recovery`] looks ahead: with the default decay nothing is left after half of it.
const MOST_DAYS: u32 = 1_500;

/// How counts become decisions. The network's own are [`Rules::default`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// What is left of every count after a day.
    pub decay_ppm: u32,
    /// The score is this quantile of the Beta distribution.
    pub quantile_ppm: u32,
    /// One bad answer counts like this many failures.
    pub bad_weight: u32,
    /// Verified answers count up to this many: however long an operator behaved, the second bad answer is one too many.
    pub most_verified: u32,
    /// From this score on an operator's answers are refereed at random only. 950,000 takes 58 verified answers, none
    /// bad (0.05^(1/59) = 0.9505).
    pub trusted_ppm: u32,
    /// Bad answers may take a score down to this share of what it would be without them. 900,000 with `most_verified`
    /// 100: one bad answer is forgiven from 67 verified ones on, two are not.
    pub eligible_ppm: u32,
    /// Share of requests among trusted operators that are refereed.
    pub audit_ppm: u32,
    /// How long everything is refereed after referees overturned a majority: who holds one holds more.
    pub alarm_days: u32,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            decay_ppm: 980_000,
            quantile_ppm: 50_000,
            bad_weight: 5,
            most_verified: 100,
            trusted_ppm: 950_000,
            eligible_ppm: 900_000,
            audit_ppm: 50_000,
            alarm_days: 30,
        }
    }
}

/// Why an operator has a bad answer on its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Referees found an answer that is not the model's.
    Answer,
    /// Its answers together drift off the model, though none alone.
    Drift,
    /// The reveal is not what was committed to, or a commitment not what was streamed.
    Mismatch,
    /// Committed, and then no reveal in time.
    Withheld,
    /// Two signed answers for one slot.
    Equivocation,
    /// It answered a canary as only a copy would.
    Copy,
    /// As a referee it was overruled by two others.
    Report,
    /// As a referee it missed a planted defect.
    Planted,
    /// The weights or the functional challenge were not proved while it was connected.
    Challenge,
}

/// What happened to an operator's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A lease was offered.
    Offered,
    /// The leased answer was revealed in time.
    Completed,
    /// Declined before its own commitment: no fault, but an offer that was not completed.
    Declined,
    /// Its owner took the machine back before its own commitment: no fault either.
    Preempted,
    /// Its answer belongs to a verified set.
    Verified,
    Bad(Reason),
}

/// What is remembered of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Days since 1970 of the counts.
    pub day: u32,
    /// Counts, each in 10^-6, after decay.
    pub verified_micro: u64,
    pub bad_micro: u64,
    pub offered_micro: u64,
    pub completed_micro: u64,
    pub declined_micro: u64,
    pub preempted_micro: u64,
    /// What refereed answers add up to (CUSUM), 10^-6 of the limit.
    pub drift_ppm: u64,
    /// The last bad answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_bad: Option<Finding>,
}

/// A bad answer and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finding {
    pub reason: Reason,
    pub at_ms: i64,
}

/// What it would take to be trusted (again), if nothing bad happens any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovery {
    /// Days until it is eligible by decay alone; 0 if it is.
    pub days_to_eligible: u32,
    /// Days until verified answers can make it trusted; 0 if they can now.
    pub days_to_trusted: u32,
    /// Verified answers that it then needs; 0 if it is trusted.
    pub verified_needed: u32,
}

/// When referees last overturned a majority of equal answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alarm {
    pub raised_ms: Option<i64>,
}

impl Alarm {
    pub fn raise(&mut self, now_ms: i64) {
        self.raised_ms = Some(self.raised_ms.map_or(now_ms, |before| before.max(now_ms)));
    }

    /// Whether everything is refereed.
    #[must_use]
    pub fn is_on(&self, rules: &Rules, now_ms: i64) -> bool {
        self.raised_ms.is_some_and(|raised| now_ms - raised < i64::from(rules.alarm_days) * DAY_MS)
    }
}

fn day_of(now_ms: i64) -> u32 {
    u32::try_from(now_ms.max(0) / DAY_MS).unwrap_or(u32::MAX)
}

impl Record {
    /// Takes an event into the counts.
    pub fn apply(&mut self, rules: &Rules, now_ms: i64, event: Event) {
        self.advance(rules, day_of(now_ms));
        match event {
            Event::Offered => self.offered_micro += ONE,
            Event::Completed => self.completed_micro += ONE,
            Event::Declined => self.declined_micro += ONE,
            Event::Preempted => self.preempted_micro += ONE,
            Event::Verified => {
                self.verified_micro =
                    (self.verified_micro + ONE).min(u64::from(rules.most_verified).saturating_mul(ONE));
            }
            Event::Bad(reason) => {
                self.bad_micro += ONE;
                self.last_bad = Some(Finding { reason, at_ms: now_ms });
            }
        }
    }

    /// Takes a referee's clipped mean of one answer ([`referee::Report::clipped_mean_micro`]), under the bounds of the
    /// answer's and the referee's classes. True: what added up is a fault, to be applied as
    /// `Event::Bad(Reason::Drift)`; it starts again at 0.
    pub fn refereed(&mut self, mean_micro: u32, bounds: &Bounds) -> bool {
        let limit = u64::from(bounds.drift_limit_micro).max(1);
        // The protocol's sum is in the pair's units; a share of the limit lets all pairs add up to one.
        let sum = u128::from(self.drift_ppm) * u128::from(limit) / u128::from(ONE);
        let sum = referee::drift(u64::try_from(sum).unwrap_or(u64::MAX), mean_micro, bounds);
        if sum > u64::from(bounds.drift_limit_micro) {
            self.drift_ppm = 0;
            return true;
        }
        self.drift_ppm = u64::try_from((u128::from(sum) * u128::from(ONE)).div_ceil(u128::from(limit)))
            .unwrap_or(u64::MAX);
        false
    }

    /// The record as of a day; a day that has passed changes nothing.
    fn advance(&mut self, rules: &Rules, day: u32) {
        let days = if self.day == 0 { 0 } else { day.saturating_sub(self.day) };
        self.day = self.day.max(day);
        for count in [
            &mut self.verified_micro,
            &mut self.bad_micro,
            &mut self.offered_micro,
            &mut self.completed_micro,
            &mut self.declined_micro,
            &mut self.preempted_micro,
        ] {
            for _ in 0..days {
                if *count == 0 {
                    break;
                }
                *count = count.saturating_mul(u64::from(rules.decay_ppm)) / ONE;
            }
        }
    }

    fn at(mut self, rules: &Rules, day: u32) -> Self {
        self.advance(rules, day);
        self
    }

    fn raw_score(&self, rules: &Rules) -> u32 {
        score(rules, self.verified_micro, self.bad_micro)
    }

    /// How sure it is that the next answer is good, 10^-6: 50,000 of somebody unknown, 970,777 at most.
    #[must_use]
    pub fn score_ppm(&self, rules: &Rules, now_ms: i64) -> u32 {
        self.at(rules, day_of(now_ms)).raw_score(rules)
    }

    /// Whether it may be drawn: its bad answers have not taken too much of its score.
    #[must_use]
    pub fn is_eligible(&self, rules: &Rules, now_ms: i64) -> bool {
        self.at(rules, day_of(now_ms)).eligible(rules)
    }

    fn eligible(&self, rules: &Rules) -> bool {
        let without = u64::from(score(rules, self.verified_micro, 0));
        u64::from(self.raw_score(rules)) * ONE >= without * u64::from(rules.eligible_ppm)
    }

    /// Whether its answers are refereed at random only.
    #[must_use]
    pub fn is_trusted(&self, rules: &Rules, now_ms: i64) -> bool {
        self.at(rules, day_of(now_ms)).trusted(rules)
    }

    fn trusted(&self, rules: &Rules) -> bool {
        self.raw_score(rules) >= rules.trusted_ppm && self.eligible(rules)
    }

    /// How often its answers are refereed where results are equal, 10^-6. Of several operators the highest holds.
    #[must_use]
    pub fn audit_ppm(&self, rules: &Rules, alarm: &Alarm, now_ms: i64) -> u32 {
        let everything = alarm.is_on(rules, now_ms) || !self.is_trusted(rules, now_ms);
        if everything { 1_000_000 } else { rules.audit_ppm }
    }

    /// Share of its offers that it completed, 10^-6; one of each is granted to begin with.
    #[must_use]
    pub fn completed_ppm(&self) -> u32 {
        let share =
            u128::from(self.completed_micro + ONE) * u128::from(ONE) / u128::from(self.offered_micro + ONE);
        u32::try_from(share.min(u128::from(ONE))).unwrap_or(u32::MAX)
    }

    /// The weight of its nodes' demonstrated `slots` in the draw: slots x score x completed share, in thousandths. At
    /// least 1 when it is eligible and has slots, otherwise 0.
    #[must_use]
    pub fn weight(&self, rules: &Rules, slots: u32, now_ms: i64) -> u32 {
        let now = self.at(rules, day_of(now_ms));
        if slots == 0 || !now.eligible(rules) {
            return 0;
        }
        let product = u128::from(slots) * u128::from(now.raw_score(rules)) * u128::from(now.completed_ppm());
        u32::try_from(product / u128::from(ONE * 1_000)).unwrap_or(u32::MAX).max(1)
    }

    /// What it would take to be trusted.
    #[must_use]
    pub fn recovery(&self, rules: &Rules, now_ms: i64) -> Recovery {
        let today = day_of(now_ms);
        let later = |days: u32| self.at(rules, today.saturating_add(days));
        let first = |from: u32, holds: &dyn Fn(&Self) -> bool| {
            (from..MOST_DAYS).find(|days| holds(&later(*days))).unwrap_or(MOST_DAYS)
        };
        let days_to_eligible = first(0, &|record| record.eligible(rules));
        let days_to_trusted =
            first(days_to_eligible, &|record| record.with(rules.most_verified).trusted(rules));
        let then = later(days_to_trusted);
        let verified_needed = least(rules.most_verified, &|more| then.with_more(rules, more).trusted(rules));
        Recovery { days_to_eligible, days_to_trusted, verified_needed }
    }

    fn with(mut self, verified: u32) -> Self {
        self.verified_micro = u64::from(verified) * ONE;
        self
    }

    fn with_more(mut self, rules: &Rules, verified: u32) -> Self {
        let most = u64::from(rules.most_verified) * ONE;
        self.verified_micro = (self.verified_micro + u64::from(verified) * ONE).min(most);
        self
    }
}

/// The least number up to `most` for which something that stays true holds; `most` if none does.
fn least(most: u32, holds: &dyn Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

fn score(rules: &Rules, verified_micro: u64, bad_micro: u64) -> u32 {
    let count = |micro: u64| micro as f64 / 1e6;
    let (good, bad) = (count(verified_micro), count(bad_micro) * f64::from(rules.bad_weight));
    let quantile = beta_quantile(1.0 + good, 1.0 + bad, f64::from(rules.quantile_ppm) / 1e6);
    (quantile * 1e6).round() as u32
}

/// Where the Beta(a, b) distribution, a and b at least 1, has the share `p` below it: by bisection.
fn beta_quantile(a: f64, b: f64, p: f64) -> f64 {
    if b <= 1.0 {
        // I_x(a, 1) = x^a.
        return libm::pow(p, 1.0 / a);
    }
    let (mut low, mut high) = (0.0, 1.0);
    // 2^-40 is a millionth of the score's unit.
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if beta_share(a, b, middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22) where that converges
/// fast, and by its symmetry elsewhere.
fn beta_share(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    let log_front =
        libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b) + a * libm::log(x) + b * libm::log1p(-x);
    let front = libm::exp(log_front);
    if x < (a + 1.0) / (a + b + 2.0) {
        front * fraction(a, b, x) / a
    } else {
        1.0 - front * fraction(b, a, 1.0 - x) / b
    }
}

/// The continued fraction of I_x(a, b), by the modified method of Lentz.
fn fraction(a: f64, b: f64, x: f64) -> f64 {
    const TINY: f64 = 1e-300;
    const ROUNDS: u32 = 300;
    let guard = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / guard(1.0 - (a + b) * x / (a + 1.0));
    let mut all = d;
    for round in 1..=ROUNDS {
        let m = f64::from(round);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        d = 1.0 / guard(1.0 + even * d);
        c = guard(1.0 + even / c);
        all *= d * c;
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        d = 1.0 / guard(1.0 + odd * d);
        c = guard(1.0 + odd / c);
        all *= d * c;
        if (d * c - 1.0).abs() < 1e-14 {
            break;
        }
    }
    all
}

#[cfg(test)]
#[path = "trust_tests.rs"]
mod tests;
