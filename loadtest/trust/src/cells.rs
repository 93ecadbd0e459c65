//! Every attack before every layer.

use infera_protocol::{
    agreement::{Disagreement, Relation},
    sampling::noise_bits,
    trust::Record,
};

use crate::{
    attacks::{Attack, Case},
    judge::{Court, Finding, Verdict},
    plot::Panel,
    record::MODES,
    report::Metric,
    sets::say,
    stats::Share,
};

/// Answers of an attack whose similarity is computed.
const SIMILARITIES: usize = 300;
/// Answers of a cheaper model that are scored over their whole length.
const SCORED: usize = 300;
/// Operators that are simulated, and the answers that each gets to give.
const OPERATORS: u32 = 3_000;
const REQUESTS: u32 = 20;

/// What the attacks gave, and what the plots are made of.
pub struct Cells {
    pub metrics: Vec<Metric>,
    /// Per attack: 1 - cosine, and the margin by the other class's referee.
    pub distances: Vec<(&'static str, Vec<f64>)>,
    pub margins: Vec<(&'static str, Vec<f64>)>,
}

/// Judges all attacks between honest nodes of the other class, where the bounds are widest.
pub fn judge(court: &Court<'_>, attacks: &[Attack]) -> Result<Cells, String> {
    let mut cells = Cells { metrics: Vec::new(), distances: Vec::new(), margins: Vec::new() };
    for attack in attacks {
        let rounded = attack.name.starts_with("round");
        let verdicts = court.judge(&attack.cases, if rounded { SCORED } else { 0 })?;
        let cosines = cosines(court, &attack.cases)?;
        let blind = cosines.iter().filter(|s| **s >= court.threshold).count();
        let cosine = Share::of(cosines.len() - blind, cosines.len());
        add(&mut cells.metrics, attack.name, &verdicts, cosine);
        if rounded {
            operators(court, attack, &verdicts, &mut cells.metrics)?;
        }
        say(&format!("{}: {} answers judged", attack.name, verdicts.len()));
        cells.distances.push((attack.name, cosines.iter().map(|s| 1.0 - f64::from(*s) / 1e6).collect()));
        cells.margins.push((attack.name, verdicts.iter().map(|v| v.margin).collect()));
    }
    Ok(cells)
}

fn add(metrics: &mut Vec<Metric>, name: &str, verdicts: &[Verdict], cosine: Share) {
    let share = |test: &dyn Fn(&Verdict) -> bool| {
        Share::of(verdicts.iter().filter(|v| test(v)).count(), verdicts.len())
    };
    let caught = share(&Verdict::is_caught);
    let per_answer = if name.starts_with("round") { "answer_caught_pct" } else { "caught_pct" };
    metrics.push(Metric::share(format!("{name}_{per_answer}"), caught).beside(cosine.pct));
    metrics.push(Metric::share(format!("cosine_{name}_caught_pct"), cosine));
    metrics.push(Metric::share(
        format!("{name}_between_classes_caught_pct"),
        share(&|v| v.caught_by().is_some()),
    ));
    // Layers alone.
    metrics
        .push(Metric::share(format!("{name}_unequal_pct"), share(&|v| v.same_relation != Relation::Equal)));
    let tie = |relation: &Relation| matches!(relation, Relation::Disagree(d) if !matches!(d, Disagreement::Similarity));
    metrics.push(Metric::share(format!("{name}_parting_pct"), share(&|v| tie(&v.relation))));
    metrics.push(Metric::share(format!("{name}_parting_same_class_pct"), share(&|v| tie(&v.same_relation))));
    metrics.push(Metric::share(format!("{name}_referee_pct"), share(&|v| v.cross != Finding::Confirmed)));
    metrics.push(Metric::share(
        format!("{name}_referee_same_class_pct"),
        share(&|v| v.same != Finding::Confirmed),
    ));
    for layer in ["finish", "parting", "similarity", "margin", "mean"] {
        let first = share(&|v| v.caught_by() == Some(layer));
        if first.hits > 0 {
            metrics.push(Metric::share(format!("{name}_first_{layer}_pct"), first));
        }
    }
}

/// Similarities of evenly chosen cases to the honest answer, millionths.
fn cosines(court: &Court<'_>, cases: &[Case]) -> Result<Vec<u32>, String> {
    let step = cases.len().div_ceil(SIMILARITIES).max(1);
    let similarity = |case: &Case| {
        court.similarity(&court.sets.fast[case.prompt * MODES + case.mode].tokens, &case.output.tokens)
    };
    cases.iter().step_by(step).map(similarity).collect()
}

/// Operators that serve a cheaper model, each with 20 of its recorded answers: caught by one of them, or by what all add
/// up to. Answers that equal the honest ones are among them and harm nobody.
fn operators(
    court: &Court<'_>,
    attack: &Attack,
    verdicts: &[Verdict],
    metrics: &mut Vec<Metric>,
) -> Result<(), String> {
    let bounds = court.calibration.bounds("exact", "fast").ok_or("no bounds between the classes")?;
    let all = 2 * court.setup.prompts.len();
    let (mut caught, mut by_referee, mut by_drift) = (0, 0, 0);
    for operator in 0..OPERATORS {
        let mut record = Record::default();
        let (mut answer, mut referee, mut drift) = (false, false, false);
        for request in 0..REQUESTS {
            let at = (noise_bits(u64::from(operator), request, 1) % all as u64) as usize;
            // As often equal to the honest answer as recorded; otherwise one of those that were scored.
            let verdict = verdicts.get(at).and_then(|_| verdicts.get(at % SCORED.min(verdicts.len())));
            answer |= verdict.is_some_and(|v| v.caught_by().is_some());
            referee |= verdict.is_some_and(|v| v.cross != Finding::Confirmed);
            drift |= record.refereed(verdict.and_then(|v| v.mean_micro).unwrap_or(0), bounds);
        }
        caught += usize::from(answer || drift);
        by_referee += usize::from(referee || drift);
        by_drift += usize::from(drift);
    }
    let count = OPERATORS as usize;
    let name = attack.name;
    metrics.push(Metric::share(format!("{name}_caught_pct"), Share::of(caught, count)));
    metrics.push(Metric::share(format!("{name}_referee_within_20_pct"), Share::of(by_referee, count)));
    metrics.push(Metric::share(format!("{name}_drift_within_20_pct"), Share::of(by_drift, count)));
    metrics.push(Metric::share(format!("{name}_differs_pct"), Share::of(verdicts.len(), all)));
    Ok(())
}

/// The plots: cosine where nodes draw freely, as they would without a common seed, and the referee's largest margin.
pub fn panels<'a>(
    court: &Court<'_>,
    cells: &Cells,
    honest_margins: Vec<f64>,
) -> Result<[Panel<'a>; 2], String> {
    let mut free = Vec::new();
    for p in 0..court.setup.prompts.len() {
        let tokens = |mode: usize| &court.sets.fast[p * MODES + mode].tokens;
        free.push(1.0 - f64::from(court.similarity(tokens(1), tokens(2))?) / 1e6);
    }
    // Another seed's answer is honest where there is no common seed.
    let distances = cells.distances.iter().filter(|(name, _)| *name != "wrong_seed").cloned().collect();
    let margins = cells.margins.iter().filter(|(name, _)| *name != "wrong_seed").cloned().collect();
    Ok([
        Panel { title: "Cosine, honest nodes drawing freely", honest: free, attacks: distances },
        Panel {
            title: "Largest margin by a referee of the other class",
            honest: honest_margins,
            attacks: margins,
        },
    ])
}
