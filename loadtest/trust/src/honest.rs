//! Honest nodes among themselves: what the bounds are made of, and what they then cost.

use std::path::Path;

use infera_node::engine::Class;
use infera_protocol::calibration::{Calibration, Pair as Named};

use crate::{
    attacks::Case,
    calibrate::{Measured, Pair, measure},
    judge::{Court, case_of},
    record::{Answer, MODES, Setup, generate},
    report::Metric,
    sets::{Engines, Make, say, timed},
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

/// The bounds of all pairs of classes, from every second prompt.
pub fn calibrate(
    court: &Court<'_>,
    again: &Again,
    margins: &Margins,
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
            Class::Fast => (&court.sets.fast, &again.fast),
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
        Ok::<_, String>(measure([class.name(), class.name()], &pairs))
    };
    let measured = vec![same(Class::Exact)?, measure(["exact", "fast"], &cross), same(Class::Fast)?];
    Ok((measured.clone(), calibration(&measured)))
}

/// The bounds that follow from what was measured.
pub fn calibration(measured: &[Measured]) -> Calibration {
    let named = |m: &Measured| Named { classes: m.classes.clone(), bounds: m.bounds() };
    Calibration { pairs: measured.iter().map(named).collect() }
}

/// Honest answers that would not be verified at first try, pair of classes by pair of classes; across classes from the
/// prompts that the bounds were not made of.
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
    let mut punished = 0;
    for (warm, name) in [(false, "greedy"), (true, "sampled")] {
        for (class, set, margins, direction) in [
            (Class::Fast, &court.sets.fast, &margins.of_fast, "fast_by_exact"),
            (Class::Exact, &court.sets.exact, &margins.of_exact, "exact_by_fast"),
        ] {
            let cell: Vec<usize> = odd.iter().copied().filter(|i| (i % MODES > 0) == warm).collect();
            let mut unverified = 0;
            for i in &cell {
                let case = case_of(i / MODES, i % MODES, &set[*i]);
                if let Some(layer) = court.honest_pair(&case, class, &margins[*i])? {
                    say(&format!("an honest {} answer fails: {layer}", class.name()));
                    unverified += 1;
                    punished += usize::from(layer == "referee");
                }
            }
            let share = Share::of(unverified, cell.len());
            worst = if share.pct > worst.pct { share } else { worst };
            metrics.push(Metric::share(format!("honest_{direction}_{name}_unverified_pct"), share));
        }
    }
    let unequal = odd.iter().filter(|i| court.sets.exact[**i].tokens != court.sets.fast[**i].tokens).count();
    metrics.push(Metric::share("honest_exact_fast_unequal_pct", Share::of(unequal, odd.len())));
    metrics.push(Metric::new("honest_refuted_by_referee", punished as f64, "answers"));
    metrics.insert(0, Metric::share("honest_unverified_pct", worst));
    Ok(metrics)
}
