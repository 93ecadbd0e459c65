//! Honest nodes among themselves: what the bounds are made of, and what they then cost.

use std::path::Path;

use infera_node::engine::Class;
use infera_protocol::{
    agreement::{Ballot, Decision, Question, Relation, Votes, decide},
    bytes::{Hash32, NodeId},
    calibration::{Calibration, Pair as Named},
};

use crate::{
    attacks::Case,
    calibrate::{Measured, Pair, measure},
    judge::{Court, case_of},
    record::{Answer, MODES, Setup, generate},
    report::Metric,
    sets::{Engines, Make, timed},
    stats::Share,
};

/// Answers that a referee of the same class scores over their whole length.
const SCORED: usize = 200;

/// The same requests once more, in other company: each prompt in one mode, in reverse order.
pub struct Again {
    pub requests: Vec<(usize, usize)>,
    pub exact: Vec<Answer>,
    pub fast: Vec<Answer>,
}

impl Again {
    pub fn jobs(setup: &Setup) -> Vec<(usize, usize)> {
        (0..setup.prompts.len()).rev().map(|p| (p, p % MODES)).collect()
    }

    pub fn record(setup: &Setup, engines: &Engines, folder: &Path) -> Result<Self, String> {
        let timed = |name: &str, make: Make<'_>| timed(folder, setup, name, make);
        let requests = Self::jobs(setup);
        let jobs = || requests.iter().map(|(p, m)| setup.job(*p, *m)).collect();
        Ok(Self {
            exact: timed("exact_again", &|| generate(&engines.exact, jobs()))?,
            fast: timed("fast_again", &|| generate(&engines.fast, jobs()))?,
            requests,
        })
    }
}

/// Margins of every recorded honest answer by the other class's referee, logits: zeros up to the parting, where the
/// referee draws the same.
pub struct Margins {
    pub of_exact: Vec<Vec<f64>>,
    pub of_fast: Vec<Vec<f64>>,
}

impl Margins {
    pub fn find(court: &Court<'_>) -> Result<Self, String> {
        let (exact, fast) = (&court.sets.exact, &court.sets.fast);
        Ok(Self {
            of_exact: Self::one(court, exact, fast, Class::Fast)?,
            of_fast: Self::one(court, fast, exact, Class::Exact)?,
        })
    }

    fn one(
        court: &Court<'_>,
        own: &[Answer],
        other: &[Answer],
        referee: Class,
    ) -> Result<Vec<Vec<f64>>, String> {
        let mut margins: Vec<Vec<f64>> = own.iter().map(|a| vec![0.0; a.tokens.len()]).collect();
        let mut parted: Vec<usize> = (0..own.len()).filter(|i| own[*i].tokens != other[*i].tokens).collect();
        // Some that did not part, to see that their margins are 0 indeed.
        parted.extend((0..own.len()).step_by(26));
        parted.sort_unstable();
        parted.dedup();
        let cases: Vec<Case> = parted.iter().map(|i| case_of(i / MODES, i % MODES, &own[*i])).collect();
        let scored = court.scores(referee, &cases.iter().collect::<Vec<_>>())?;
        for (i, scores) in parted.into_iter().zip(scored) {
            let found: Vec<f64> = scores.iter().map(|s| s.margin).collect();
            let same = Setup::parting(&own[i].tokens, &other[i].tokens);
            if found.iter().take(same).any(|m| *m != 0.0) {
                return Err("a referee doubts a token that it would have drawn itself".into());
            }
            margins[i] = found;
        }
        Ok(margins)
    }
}

/// The bounds of all pairs of classes, from every second prompt; `widest`: between the classes, of meaningless prompts.
pub fn calibrate(
    court: &Court<'_>,
    again: &Again,
    margins: &Margins,
    widest: f64,
) -> Result<(Vec<Measured>, Calibration), String> {
    let drawn = |p: usize, m: usize| Setup::draw(p, m);
    let mut cross = Vec::new();
    for i in (0..court.sets.exact.len()).filter(|i| (i / MODES).is_multiple_of(2)) {
        let (params, seed) = drawn(i / MODES, i % MODES);
        cross.push(Pair {
            a: &court.sets.exact[i],
            b: &court.sets.fast[i],
            temperature: params.temperature,
            seed,
            margins: [margins.of_exact[i].clone(), margins.of_fast[i].clone()],
        });
    }
    let same = |class: Class| {
        let (first, second) = match class {
            Class::Exact => (&court.sets.exact, &again.exact),
            Class::Fast | Class::Bf16 => (&court.sets.fast, &again.fast),
        };
        let cases: Vec<Case> =
            again.requests.iter().zip(second).map(|((p, m), answer)| case_of(*p, *m, answer)).collect();
        let mut scored = court.scores(class, &cases.iter().take(SCORED).collect::<Vec<_>>())?;
        scored.resize(cases.len(), Vec::new());
        let pairs: Vec<Pair<'_>> = again
            .requests
            .iter()
            .zip(second)
            .zip(&scored)
            .map(|(((p, m), answer), scores)| {
                let (params, seed) = drawn(*p, *m);
                let margins = [scores.iter().map(|s| s.margin).collect(), Vec::new()];
                Pair { a: &first[p * MODES + m], b: answer, temperature: params.temperature, seed, margins }
            })
            .collect();
        Ok::<_, String>(measure([class.name(), class.name()], &pairs, 0.0))
    };
    let measured = vec![same(Class::Exact)?, measure(["exact", "fast"], &cross, widest), same(Class::Fast)?];
    Ok((measured.clone(), calibration(&measured)))
}

/// The bounds that follow from what was measured.
pub fn calibration(measured: &[Measured]) -> Calibration {
    let named = |m: &Measured| Named { classes: m.classes.clone(), bounds: m.bounds() };
    Calibration { pairs: measured.iter().map(named).collect() }
}

/// Honest requests that would not be verified at first try: of one class, whose results must be equal; and of three
/// nodes of both classes, from the prompts that the bounds were not made of.
pub fn cells(court: &Court<'_>, again: &Again, margins: &Margins) -> Result<Vec<Metric>, String> {
    let mut metrics = Vec::new();
    let mut worst = Share::of(0, 1);
    for (name, first, second) in
        [("exact_exact", &court.sets.exact, &again.exact), ("fast_fast", &court.sets.fast, &again.fast)]
    {
        let unequal = again.requests.iter().zip(second).filter(|((p, m), answer)| {
            let before = &first[p * MODES + m];
            before.tokens != answer.tokens || before.finish != answer.finish
        });
        let share = Share::of(unequal.count(), second.len());
        worst = if share.pct >= worst.pct { share } else { worst };
        metrics.push(Metric::share(format!("honest_{name}_unverified_pct"), share));
    }
    let odd: Vec<usize> = (0..court.sets.exact.len()).filter(|i| !(i / MODES).is_multiple_of(2)).collect();
    let mut refuted = 0;
    for (warm, name) in [(false, "greedy"), (true, "sampled")] {
        let cell: Vec<usize> = odd.iter().copied().filter(|i| (i % MODES > 0) == warm).collect();
        let (mut unverified, mut unequal, mut unlike) = ([0, 0], 0, 0);
        for i in &cell {
            let [exact, fast] = [
                court.honest_pair(
                    &case_of(i / MODES, i % MODES, &court.sets.exact[*i]),
                    Class::Exact,
                    &margins.of_exact[*i],
                )?,
                court.honest_pair(
                    &case_of(i / MODES, i % MODES, &court.sets.fast[*i]),
                    Class::Fast,
                    &margins.of_fast[*i],
                )?,
            ];
            refuted += usize::from(!exact.1) + usize::from(!fast.1);
            unequal += usize::from(exact.0 != Relation::Equal);
            unlike += usize::from(matches!(exact.0, Relation::Disagree(_)) || !exact.1 || !fast.1);
            for (mix, exacts) in [1, 2].into_iter().enumerate() {
                unverified[mix] += usize::from(!is_verified(exacts, exact, fast));
            }
        }
        for (mix, hits) in ["exact_fast_fast", "exact_exact_fast"].into_iter().zip(unverified) {
            let share = Share::of(hits, cell.len());
            worst = if share.pct > worst.pct { share } else { worst };
            metrics.push(Metric::share(format!("honest_{mix}_{name}_unverified_pct"), share));
        }
        metrics.push(Metric::share(
            format!("honest_exact_fast_{name}_unequal_pct"),
            Share::of(unequal, cell.len()),
        ));
        metrics.push(Metric::share(
            format!("honest_exact_fast_{name}_unlike_pct"),
            Share::of(unlike, cell.len()),
        ));
    }
    metrics.push(Metric::new("honest_refuted_by_referee", refuted as f64, "answers"));
    metrics.insert(0, Metric::share("honest_unverified_pct", worst));
    Ok(metrics)
}

/// Whether three honest nodes, `exacts` of them of the class `exact`, are verified at first try: each answer comes with
/// its relation to the other class's and whether a referee of the other class confirms it.
fn is_verified(exacts: u8, exact: (Relation, bool), fast: (Relation, bool)) -> bool {
    let equal = exact.0 == Relation::Equal;
    let answer = |is_exact: bool| Hash32([u8::from(is_exact && !equal); 32]);
    let ballots: Vec<Ballot> =
        (0..3).map(|i| Ballot { node: NodeId([i; 32]), answer: answer(i < exacts), fit: true }).collect();
    let vote = |good: bool| Votes { good: u32::from(good), bad: 3 * u32::from(!good) };
    let alike = matches!(exact.0, Relation::Equal | Relation::Unconfirmed { .. });
    let decision = decide(&Question {
        k: 3,
        ballots: &ballots,
        audited: true,
        alike: &|a, b| a == b || alike,
        votes: &|hash| vote(if *hash == answer(true) { exact.1 } else { fast.1 }),
        no_more_nodes: true,
        no_more_referees: false,
    });
    matches!(decision, Decision::Verified { .. })
}
