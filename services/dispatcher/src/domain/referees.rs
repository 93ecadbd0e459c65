//! The referees of an attempt (protocol section 8): who is asked to score which answers, and what they reported.

use infera_protocol::assignment::Eligible;
use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::evidence::{Evidence, RefereeEvidence, RefereeOutcome, SubjectReport};
use infera_protocol::identity::verify;
use infera_protocol::judgement::MAX_REFEREES;
use infera_protocol::referee::{Report, report_digest};
use infera_protocol::request::Output;
use infera_wire::convert;
use infera_wire::v1;

use super::attempt::Desk;
use super::{Effect, Rejection, SignedScores, frames};

/// All referees of an attempt, in the order of their draw.
#[derive(Debug, Default)]
pub struct Referees {
    asked: Vec<Referee>,
    /// What the verifier asked for last, and the evidence from which it follows.
    job: Option<Job>,
}

#[derive(Debug)]
struct Job {
    /// Referees of this job are those from here on.
    first: usize,
    wanted: usize,
    answers: Vec<Hash32>,
    /// Who is left to ask, the next one last.
    left: Vec<Eligible>,
    evidence: Box<Evidence>,
}

#[derive(Debug)]
struct Referee {
    who: Eligible,
    until_ms: i64,
    /// The answers to score, in the order in which they were sent.
    subjects: Vec<Output>,
    state: State,
    /// For people.
    detail: String,
}

#[derive(Debug)]
enum State {
    Leased,
    Reported(Vec<SubjectReport>),
    Ended(RefereeOutcome),
}

impl Referee {
    fn is_alive(&self) -> bool {
        !matches!(self.state, State::Ended(_))
    }

    fn end(&mut self, outcome: RefereeOutcome, detail: impl Into<String>) {
        self.state = State::Ended(outcome);
        self.detail = detail.into();
    }
}

impl Referees {
    /// Asks for so many reports about these answers.
    pub fn want(&mut self, count: usize, answers: Vec<Hash32>, evidence: Evidence) {
        let order = evidence.referee_order();
        let left: Vec<Eligible> =
            order.into_iter().take(MAX_REFEREES).skip(self.asked.len()).rev().cloned().collect();
        let evidence = Box::new(evidence);
        self.job = Some(Job { first: self.asked.len(), wanted: count, answers, left, evidence });
    }

    /// Asks whoever is next until enough are at work. True while a report is awaited.
    pub fn lease_missing(&mut self, attempt: u32, traceparent: &str, desk: &mut Desk) -> bool {
        let Some(job) = &mut self.job else { return false };
        let Self { asked, .. } = self;
        while asked[job.first..].iter().filter(|referee| referee.is_alive()).count() < job.wanted {
            let Some(who) = job.left.pop() else { break };
            let node = who.node;
            let subjects = job.evidence.subjects(&node, &job.answers);
            let there = desk.nodes.serves(&who, &desk.offer.model());
            let until_ms = desk.now + desk.rules.referee_ms;
            let mut referee =
                Referee { who, until_ms, subjects, state: State::Leased, detail: String::new() };
            if there {
                let lease = lease(&referee, attempt, traceparent, desk);
                desk.out.push(Effect::Send { node, frame: frames::referee_lease(lease) });
            } else {
                referee.end(RefereeOutcome::Disconnected, "not connected when drawn");
            }
            asked.push(referee);
        }
        let awaited = asked.iter().any(|referee| matches!(referee.state, State::Leased));
        if !awaited {
            self.job = None;
        }
        awaited
    }

    /// Takes the reports of a referee. One that does not answer what it was asked has not reported.
    ///
    /// # Errors
    /// [`Rejection`]; nothing has changed then.
    pub fn reported(
        &mut self,
        node: &NodeId,
        reports: Vec<SignedScores>,
        room: usize,
        attempt: u32,
        desk: &Desk,
    ) -> Result<(), Rejection> {
        let referee = self.asked.iter_mut().find(|r| r.who.node == *node).ok_or(Rejection::NotLeased)?;
        if !matches!(referee.state, State::Leased) {
            return Err(Rejection::Late);
        }
        if reports.len() != referee.subjects.len() {
            referee.end(RefereeOutcome::NoReport, "not one report for each answer");
            return Ok(());
        }
        let mut signed = Vec::with_capacity(reports.len());
        let mut wrong = None;
        for (SignedScores { scores, signature }, output) in reports.into_iter().zip(&referee.subjects) {
            let subject = output.hash();
            let (domain, hash) = (&desk.rules.domain, &desk.offer.request_hash);
            let digest = report_digest(domain, hash, attempt, node, &subject, &scores);
            verify(node, &digest, &signature).map_err(|_| Rejection::BadSignature)?;
            match Report::decode(&scores) {
                Err(error) => wrong = Some(error.to_string()),
                Ok(report) if report.scores.len() != output.tokens.len() => {
                    wrong = Some("not one score for each token".to_owned());
                }
                Ok(_) => {}
            }
            signed.push(SubjectReport { subject, scores, signature });
        }
        if bytes(&signed) > room {
            wrong = Some("the results of this attempt exceed what a message carries".to_owned());
        }
        match wrong {
            Some(reason) => referee.end(RefereeOutcome::NoReport, reason),
            None => referee.state = State::Reported(signed),
        }
        Ok(())
    }

    /// Whether the node has a job that is not done.
    pub fn is_asked(&self, node: &NodeId) -> bool {
        self.asked.iter().any(|r| r.who.node == *node && matches!(r.state, State::Leased))
    }

    /// Of all that were ever asked.
    pub fn operators(&self) -> impl Iterator<Item = Address> {
        self.asked.iter().map(|referee| referee.who.operator)
    }

    /// Whether the operator was ever asked.
    pub fn has(&self, operator: &Address) -> bool {
        self.asked.iter().any(|referee| referee.who.operator == *operator)
    }

    pub fn declined(&mut self, node: &NodeId, reason: &str) {
        if let Some(referee) = self.open(node) {
            referee.end(RefereeOutcome::Declined, reason);
        }
    }

    /// The node's session ended. True if it was at work.
    pub fn left(&mut self, node: &NodeId) -> bool {
        let Some(referee) = self.open(node) else { return false };
        referee.end(RefereeOutcome::Disconnected, "session lost before the report");
        true
    }

    fn open(&mut self, node: &NodeId) -> Option<&mut Referee> {
        self.asked.iter_mut().find(|r| r.who.node == *node && matches!(r.state, State::Leased))
    }

    /// Ends what is overdue.
    pub fn tick(&mut self, attempt: u32, desk: &mut Desk) {
        for referee in &mut self.asked {
            if matches!(referee.state, State::Leased) && referee.until_ms <= desk.now {
                referee.end(RefereeOutcome::NoReport, "no report before its deadline");
                let frame = frames::cancel(desk.offer.id(), attempt, "no report in time");
                desk.out.push(Effect::Send { node: referee.who.node, frame });
            }
        }
    }

    /// Ends what is under way, at the nodes.
    pub fn end(&self, reason: &str, attempt: u32, desk: &mut Desk) {
        for referee in self.asked.iter().filter(|referee| matches!(referee.state, State::Leased)) {
            let frame = frames::cancel(desk.offer.id(), attempt, reason);
            desk.out.push(Effect::Send { node: referee.who.node, frame });
        }
    }

    /// Bytes of all reports.
    pub fn bytes(&self) -> usize {
        self.asked
            .iter()
            .map(|referee| match &referee.state {
                State::Reported(reports) => bytes(reports),
                State::Leased | State::Ended(_) => 0,
            })
            .sum()
    }

    /// As the verifier gets them.
    pub fn to_wire(&self) -> Vec<v1::RefereeResult> {
        let result = |referee: &Referee| {
            let (outcome, reports) = match &referee.state {
                State::Reported(reports) => (RefereeOutcome::Reported, reports.clone()),
                State::Ended(outcome) => (*outcome, Vec::new()),
                State::Leased => (RefereeOutcome::NoReport, Vec::new()),
            };
            let Eligible { node, operator, .. } = referee.who;
            convert::referee_to_wire(&RefereeEvidence { node, operator, outcome, reports }, &referee.detail)
        };
        self.asked.iter().map(result).collect()
    }
}

fn bytes(reports: &[SubjectReport]) -> usize {
    reports.iter().map(|report| report.scores.len() + 128).sum()
}

fn lease(referee: &Referee, attempt: u32, traceparent: &str, desk: &Desk) -> v1::RefereeLease {
    let subject = |output: &Output| v1::Subject {
        tokens: output.tokens.clone(),
        finish: convert::finish_to_wire(output.finish).into(),
    };
    v1::RefereeLease {
        request: desk.offer.wire.submitted.as_ref().and_then(|s| s.request.clone()),
        attempt,
        subjects: referee.subjects.iter().map(subject).collect(),
        deadline_ms: referee.until_ms,
        traceparent: traceparent.to_owned(),
    }
}
