//! Reports that do not say what the model says.

use infera_protocol::{
    fingerprint::{Entry, Fingerprint},
    referee::{Report, TokenScore},
    request::{Output, Request},
};

use super::{Fault, Faults};
use crate::slots::Slots;

/// How far behind a liar says that a token falls, 10^-6 logits: more than an honest one ever does.
const REFUTED: u32 = 4_000_000;

impl Faults {
    /// What the node reports about an answer.
    pub(crate) async fn report(
        &self,
        slots: &Slots,
        request: &Request,
        subject: &Output,
    ) -> Result<Report, &'static str> {
        match self.fault {
            Fault::LazyReferee => Ok(lazy(subject)),
            Fault::LyingReferee => Ok(refuted(slots.score_subject(request, subject).await?)),
            Fault::Collude if subject.tokens == self.wrong(request) => {
                Ok(confirmed(slots.score_subject(request, subject).await?))
            }
            Fault::Collude => Ok(refuted(slots.score_subject(request, subject).await?)),
            _ => slots.score_subject(request, subject).await,
        }
    }
}

/// Every token as if it had been drawn for certain.
fn lazy(subject: &Output) -> Report {
    let print = |token: &u32| Fingerprint::new(vec![Entry { token: *token, logprob: 0 }]).ok();
    let score = |fingerprint| TokenScore { margin_micro: 0, fingerprint };
    Report { scores: subject.tokens.iter().filter_map(print).map(score).collect() }
}

fn confirmed(mut report: Report) -> Report {
    report.scores.iter_mut().for_each(|score| score.margin_micro = 0);
    report
}

/// One token in the middle is enough.
fn refuted(mut report: Report) -> Report {
    let middle = report.scores.len() / 2;
    if let Some(score) = report.scores.get_mut(middle) {
        score.margin_micro = score.margin_micro.max(REFUTED);
    }
    report
}

#[cfg(test)]
mod tests {
    use infera_protocol::request::Finish;

    use super::*;

    #[test]
    fn liars_change_margins_and_nothing_else() {
        let subject = Output { tokens: vec![1, 2, 3], fingerprints: Vec::new(), finish: Finish::Eos };
        let mut honest = lazy(&subject);
        honest.scores[0].margin_micro = 5;
        let margins = |report: &Report| report.scores.iter().map(|s| s.margin_micro).collect::<Vec<_>>();
        assert_eq!(margins(&refuted(honest.clone())), [5, REFUTED, 0]);
        assert_eq!(margins(&confirmed(honest)), [0, 0, 0]);
        let none = lazy(&Output { tokens: Vec::new(), ..subject });
        assert_eq!(refuted(none).scores, []);
    }
}
