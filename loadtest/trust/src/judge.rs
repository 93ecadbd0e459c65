//! What the network's rules say about an answer: all by the functions of `shared/protocol`.

use std::{cell::RefCell, collections::HashMap};

use infera_embed::{Embedder, similarity_millionths};
use infera_node::engine::{Class, Engine, Score, ScoreJob};
use infera_protocol::{
    agreement::{Relation, compare},
    calibration::{Bounds, Calibration},
    fingerprint::Fingerprint,
    referee::{Fault, Report, TokenScore, judge},
    request::{Output, check_output},
    sampling::gumbel,
};
use uuid::Uuid;

use crate::{
    attacks::Case,
    record::{Answer, MODES, Setup, score},
    sets::{Engines, Sets},
};

/// The log-probability of a token that is no candidate is at most this: at least 64 are as likely.
const OUTSIDE: f64 = -4.158_883;
/// ln 65.
const LN_65: f64 = 4.174_387;
/// A half-precision number is this close, as a share of it.
const HALF: f64 = 1.0 / 2_048.0;

/// Margins above this are all the same to a plot.
const MOST_MARGIN: f64 = 100.0;

/// What a referee finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    Confirmed,
    /// It does not end as section 5 says.
    Finish,
    Margin,
    Mean,
}

/// One answer before the layers.
#[derive(Debug, Clone, Copy)]
pub struct Verdict {
    /// Beside honest answers of the other class.
    pub relation: Relation,
    /// Beside honest answers of its own class.
    pub same_relation: Relation,
    /// A referee of the other class.
    pub cross: Finding,
    /// A referee of its own class.
    pub same: Finding,
    /// Its largest margin by the other class's referee, or what it is at least; logits.
    pub margin: f64,
    /// Its clipped mean by the other class's referee, 10^-6 logits, where it was scored.
    pub mean_micro: Option<u32>,
}

impl Verdict {
    /// Whether it is kept from being verified among honest nodes of its own class, as all replicas of an attempt are,
    /// with a referee of the other class, whose bounds are the wider ones.
    pub fn is_caught(&self) -> bool {
        matches!(self.same_relation, Relation::Disagree(_)) || self.cross != Finding::Confirmed
    }

    /// What keeps the answer from being verified between honest nodes of the other class, the first layer that does.
    pub fn caught_by(&self) -> Option<&'static str> {
        match (self.cross, self.relation) {
            (Finding::Finish, _) => Some("finish"),
            (_, Relation::Disagree(infera_protocol::agreement::Disagreement::Similarity)) => {
                Some("similarity")
            }
            (_, Relation::Disagree(_)) => Some("parting"),
            (Finding::Margin, _) => Some("margin"),
            (Finding::Mean, _) => Some("mean"),
            (Finding::Confirmed, _) => None,
        }
    }
}

pub struct Court<'a> {
    pub setup: &'a Setup,
    pub sets: &'a Sets,
    pub engines: &'a Engines,
    pub calibration: &'a Calibration,
    pub threshold: u32,
    pub embedder: &'a Embedder,
    pub embedded: RefCell<HashMap<Vec<u32>, Vec<f32>>>,
}

/// What is known of a margin without a pass of the engine.
enum Quick {
    Known(Finding),
    /// At the parting it is at least this.
    AtLeast(f64),
    Unknown,
}

impl Court<'_> {
    fn honest(&self, class: Class, case: &Case) -> &Answer {
        let set = if class == Class::Exact { &self.sets.exact } else { &self.sets.fast };
        &set[case.prompt * MODES + case.mode]
    }

    fn engine(&self, class: Class) -> &Engine {
        if class == Class::Exact { &self.engines.exact } else { &self.engines.fast }
    }

    /// The answers claim to be of the class `fast`.
    fn bounds(&self, class: Class) -> Result<&Bounds, String> {
        self.calibration.bounds("fast", class.name()).ok_or_else(|| "no bounds between the classes".into())
    }

    /// Up to the parting from the referee's own answer every margin is 0, since it draws the same; the margin there
    /// follows from its own fingerprint.
    fn quick(&self, class: Class, case: &Case) -> Quick {
        let request = self.setup.request(case.prompt, case.mode);
        if check_output(&request, &case.output, self.setup.end_tokens()).is_err() {
            return Quick::Known(Finding::Finish);
        }
        let honest = self.honest(class, case);
        let at = Setup::parting(&honest.tokens, &case.output.tokens);
        let (Some(print), Some(token)) = (honest.prints.get(at), case.output.tokens.get(at)) else {
            return if honest.tokens == case.output.tokens {
                Quick::Known(Finding::Confirmed)
            } else {
                Quick::Unknown
            };
        };
        Quick::AtLeast(self.least_margin(case, at, print, *token))
    }

    fn least_margin(&self, case: &Case, at: usize, print: &Fingerprint, token: u32) -> f64 {
        let (params, seed) = Setup::draw(case.prompt, case.mode);
        let warm = f64::from(params.temperature);
        let noise = |token| warm * gumbel(seed, u32::try_from(at).unwrap_or(0), token);
        let entries = || print.entries().iter().map(|e| (e.token, f64::from(e.logprob())));
        let listed = entries().find(|(t, _)| *t == token).map(|(t, l)| l + l.abs() * HALF + noise(t));
        let last = entries().next_back().map_or(f64::INFINITY, |(t, l)| l + l.abs() * HALF + noise(t));
        let score = listed.unwrap_or(last.max(OUTSIDE + noise(token)));
        // A rival counts by its distance to the first that is no candidate at most: 65 tokens are as likely as that one.
        let lead =
            |(t, l): (u32, f64)| (l - l.abs() * HALF + noise(t) - score).min(l - l.abs() * HALF + LN_65);
        entries().filter(|(t, _)| *t != token).map(lead).fold(0.0, f64::max)
    }

    fn score_jobs(&self, cases: &[&Case]) -> Vec<ScoreJob> {
        let job = |case: &&Case| {
            let (params, seed) = Setup::draw(case.prompt, case.mode);
            ScoreJob {
                id: Uuid::now_v7(),
                prompt: self.setup.prompts[case.prompt].clone(),
                tokens: case.output.tokens.clone(),
                params,
                seed,
                grammar: None,
            }
        };
        cases.iter().map(job).collect()
    }

    /// The margins that a referee of `class` gives, by its engine.
    pub fn scores(&self, class: Class, cases: &[&Case]) -> Result<Vec<Vec<Score>>, String> {
        score(self.engine(class), self.score_jobs(cases))
    }

    /// What a referee of `class` says to each case; with the clipped means of those that were scored: the first `all`,
    /// and those of which the parting does not say enough.
    pub fn referee(&self, class: Class, cases: &[Case], all: usize) -> Result<Vec<Found>, String> {
        let bounds = self.bounds(class)?;
        let limit = f64::from(bounds.margin_milli) / 1e3;
        let mut found = Vec::new();
        let mut open = Vec::new();
        for (i, case) in cases.iter().enumerate() {
            let quick = self.quick(class, case);
            let (finding, margin) = match quick {
                Quick::Known(finding) => (finding, 0.0),
                Quick::AtLeast(margin) if margin >= limit => (Finding::Margin, margin),
                Quick::AtLeast(margin) => (Finding::Confirmed, margin.max(0.0)),
                Quick::Unknown => (Finding::Confirmed, 0.0),
            };
            let known = matches!(quick, Quick::Known(_)) || finding == Finding::Margin;
            if i < all || !known {
                open.push(i);
            }
            found.push(Found { finding, margin, mean_micro: None });
        }
        let subjects: Vec<&Case> = open.iter().map(|i| &cases[*i]).collect();
        for (i, scores) in open.into_iter().zip(self.scores(class, &subjects)?) {
            let report = report(&scores);
            let said = match judge(cases[i].output.tokens.len(), &report, bounds) {
                Ok(()) => Finding::Confirmed,
                Err(Fault::Mean { .. }) => Finding::Mean,
                Err(Fault::Margin { .. } | Fault::Length { .. }) => Finding::Margin,
            };
            let one = &mut found[i];
            if one.finding == Finding::Margin && said == Finding::Confirmed {
                return Err("a margin that follows from a fingerprint was not found by the engine".into());
            }
            if one.finding != Finding::Finish {
                one.finding = said;
            }
            let widest = scores.iter().map(|s| s.margin).fold(0.0, f64::max);
            one.margin = one.margin.max(widest.min(MOST_MARGIN));
            one.mean_micro = Some(report.clipped_mean_micro(bounds.clip_milli));
        }
        Ok(found)
    }

    /// What two results are to each other, the similarity computed where it matters.
    fn relation(&self, case: &Case, honest: &Answer, bounds: &Bounds) -> Result<Relation, String> {
        let request = self.setup.request(case.prompt, case.mode);
        let honest = honest.output();
        let with =
            |similarity| compare(&request, Some(bounds), self.threshold, &honest, &case.output, similarity);
        Ok(match with(1_000_000) {
            Relation::Unconfirmed { .. } => with(self.similarity(&honest.tokens, &case.output.tokens)?),
            relation => relation,
        })
    }

    fn embedding(&self, tokens: &[u32]) -> Result<Vec<f32>, String> {
        if let Some(found) = self.embedded.borrow().get(tokens) {
            return Ok(found.clone());
        }
        let text = self.setup.prompt.decode(tokens);
        let vector = self.embedder.embed_blocking(&text).map_err(|e| e.to_string())?;
        self.embedded.borrow_mut().insert(tokens.to_vec(), vector.clone());
        Ok(vector)
    }

    /// Cosine of the two texts, millionths.
    pub fn similarity(&self, a: &[u32], b: &[u32]) -> Result<u32, String> {
        Ok(similarity_millionths(&self.embedding(a)?, &self.embedding(b)?))
    }

    /// Everything about the cases of one attack.
    pub fn judge(&self, cases: &[Case], all: usize) -> Result<Vec<Verdict>, String> {
        let cross = self.referee(Class::Exact, cases, all)?;
        let same = self.referee(Class::Fast, cases, 0)?;
        let (between, within) = (self.bounds(Class::Exact)?, self.bounds(Class::Fast)?);
        let verdict = |((case, cross), same): ((&Case, Found), Found)| {
            Ok(Verdict {
                relation: self.relation(case, self.honest(Class::Exact, case), between)?,
                same_relation: self.relation(case, self.honest(Class::Fast, case), within)?,
                cross: cross.finding,
                same: same.finding,
                margin: cross.margin,
                mean_micro: cross.mean_micro,
            })
        };
        cases.iter().zip(cross).zip(same).map(verdict).collect()
    }

    /// How an honest answer stands to the other class's, and whether a referee of the other class confirms it; `margins`
    /// are its own.
    pub fn honest_pair(&self, case: &Case, own: Class, margins: &[f64]) -> Result<(Relation, bool), String> {
        let other = if own == Class::Exact { Class::Fast } else { Class::Exact };
        let bounds = self.calibration.bounds("exact", "fast").ok_or("no bounds between the classes")?;
        let relation = self.relation(case, self.honest(other, case), bounds)?;
        let print = self.honest(own, case).prints.first().cloned().ok_or("an empty answer")?;
        let score =
            |m: &f64| TokenScore { margin_micro: TokenScore::margin_micro(*m), fingerprint: print.clone() };
        let report = Report { scores: margins.iter().map(score).collect() };
        Ok((relation, judge(case.output.tokens.len(), &report, bounds).is_ok()))
    }
}

/// What a referee found.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub finding: Finding,
    pub margin: f64,
    pub mean_micro: Option<u32>,
}

fn report(scores: &[Score]) -> Report {
    let score = |s: &Score| TokenScore {
        margin_micro: TokenScore::margin_micro(s.margin),
        fingerprint: s.fingerprint.clone(),
    };
    Report { scores: scores.iter().map(score).collect() }
}

/// An honest answer as a case.
pub fn case_of(prompt: usize, mode: usize, answer: &Answer) -> Case {
    let output: Output = answer.output();
    Case { prompt, mode, output }
}
