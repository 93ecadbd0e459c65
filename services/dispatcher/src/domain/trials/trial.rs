//! One trial, from its lease to what follows.

use infera_protocol::agreement::{Standing, Votes};
use infera_protocol::assignment::Eligible;
use infera_protocol::bytes::Hash32;
use infera_protocol::commitment::Slot;
use infera_protocol::identity::verify;
use infera_protocol::judgement::{Conduct, Finding, Mean, is_planted, planted};
use infera_protocol::referee::{Report, judge, report_digest};
use infera_protocol::request::{Output, Request};
use infera_protocol::trust::Reason;
use infera_wire::convert;
use infera_wire::v1;
use uuid::Uuid;

use super::{Court, Ended, Kind, Outcome};
use crate::domain::statements::Pledge;
use crate::domain::{Effect, Rejection, SignedScores, frames};

#[derive(Debug)]
pub(super) struct Trial {
    pub(super) kind: Kind,
    pub(super) who: Eligible,
    pub(super) request: Request,
    pub(super) hash: Hash32,
    pub(super) attempt: u32,
    /// The id under which referees score the answer: they are not told which request it is about.
    pub(super) job: Uuid,
    pub(super) job_traceparent: String,
    /// Decides which referees get a defect in place of the answer; known to nobody.
    pub(super) secret: Hash32,
    /// Referees whose job held a defect, and whether they noticed it.
    pub(super) checked: Vec<(Eligible, bool)>,
    /// Who may score it, the next one last.
    pub(super) referees: Vec<Eligible>,
    /// Answers of the attempt beside which a canary stands, by hash.
    pub(super) peers: Vec<Hash32>,
    /// The node may know what this is: nothing follows from it.
    pub(super) is_void: bool,
    /// Of the lease.
    pub(super) stream: bool,
    pub(super) traceparent: String,
    pub(super) stage: Stage,
}

#[derive(Debug)]
pub(super) enum Stage {
    Leased { until_ms: i64 },
    Committed(Pledge),
    Asked { pledge: Pledge, until_ms: i64 },
    Scored { output: Output, votes: Vec<Vote>, asked: Option<Asked> },
}

/// A referee at work.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) who: Eligible,
    pub(super) until_ms: i64,
    /// What it scores in place of the answer, as in any referee's job.
    defect: Option<Output>,
}

#[derive(Debug)]
pub(super) struct Vote {
    pub(super) who: Eligible,
    is_good: bool,
    mean: Mean,
}

/// What a step of a trial leads to.
pub(super) enum Step {
    Goes,
    Ends(Verdict),
}

/// What is known in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    Bad(Reason),
    Missed,
    Declined,
    /// Nobody is left who could judge it.
    Open,
}

impl Trial {
    /// Where its node answers it.
    pub(super) fn place(&self) -> Slot {
        Slot { request_hash: self.hash, attempt: self.attempt, node: self.who.node }
    }

    /// What the node waits for: its lease, or the request to reveal.
    pub(super) fn send(&self, court: &mut Court) {
        let node = self.who.node;
        let frame = match self.stage {
            Stage::Leased { until_ms } => {
                court.nodes.lease(&node, self.request.id);
                frames::lease(v1::Lease {
                    request: Some(convert::request_to_wire(&self.request)),
                    attempt: self.attempt,
                    commit_deadline_ms: until_ms,
                    stream: self.stream,
                    traceparent: self.traceparent.clone(),
                })
            }
            Stage::Asked { until_ms, .. } => frames::reveal_request(self.request.id, self.attempt, until_ms),
            Stage::Committed(_) | Stage::Scored { .. } => return,
        };
        court.out.push(Effect::Send { node, frame });
    }

    /// Asks who has committed for the reveal.
    pub(super) fn ask_reveal(&mut self, court: &mut Court) {
        if let Stage::Committed(pledge) = self.stage {
            self.stage = Stage::Asked { pledge, until_ms: court.now + court.rules.reveal_ms };
            self.send(court);
        }
    }

    /// The node is back, with the operator, model and class that it is tried for or with others.
    pub(super) fn resume(&self, court: &mut Court) -> Step {
        let is_same = court.nodes.serves(&self.who, &self.request.model_root);
        if is_same || matches!(self.stage, Stage::Scored { .. }) {
            self.send(court);
            return Step::Goes;
        }
        Step::Ends(match self.kind {
            Kind::Canary => Verdict::Missed,
            Kind::Entry => Verdict::Open,
        })
    }

    pub(super) fn asked(&self) -> Option<&Eligible> {
        match &self.stage {
            Stage::Scored { asked: Some(asked), .. } => Some(&asked.who),
            _ => None,
        }
    }

    fn votes(&self) -> &[Vote] {
        match &self.stage {
            Stage::Scored { votes, .. } => votes,
            Stage::Leased { .. } | Stage::Committed(_) | Stage::Asked { .. } => &[],
        }
    }

    fn standing(&self) -> Standing {
        let count =
            |good| u32::try_from(self.votes().iter().filter(|v| v.is_good == good).count()).unwrap_or(0);
        Votes { good: count(true), bad: count(false) }.standing()
    }

    /// Asks the next referee, or ends: two of three have decided, or nobody is left.
    pub(super) fn ask(&mut self, court: &mut Court) -> Step {
        match self.standing() {
            Standing::Confirmed => return Step::Ends(Verdict::Good),
            Standing::Refuted => {
                let copied = matches!(&self.stage, Stage::Scored { output, .. } if self.peers.contains(&output.hash()));
                let reason = if copied { Reason::Copy } else { Reason::Answer };
                return Step::Ends(Verdict::Bad(reason));
            }
            Standing::Unscored | Standing::Contested => {}
        }
        let vocab_size = court.rules.terms(&self.request.model_root).map(|terms| terms.vocab_size);
        let job = v1::Request { id: self.job.as_bytes().to_vec(), ..convert::request_to_wire(&self.request) };
        let Stage::Scored { output, asked, .. } = &mut self.stage else { return Step::Goes };
        *asked = None;
        while let Some(who) = self.referees.pop() {
            if !court.nodes.serves(&who, &self.request.model_root) {
                continue;
            }
            let until_ms = court.now + court.rules.referee_ms;
            let defect = vocab_size
                .filter(|_| is_planted(&self.secret, &who.node))
                .map(|size| planted(&self.secret, &who.node, output, size));
            let subject = defect.as_ref().unwrap_or(output);
            let lease = v1::RefereeLease {
                request: Some(job),
                attempt: self.attempt,
                subjects: vec![v1::Subject {
                    tokens: subject.tokens.clone(),
                    finish: convert::finish_to_wire(subject.finish).into(),
                }],
                deadline_ms: until_ms,
                traceparent: self.job_traceparent.clone(),
            };
            court.out.push(Effect::Send { node: who.node, frame: frames::referee_lease(lease) });
            *asked = Some(Asked { who, until_ms, defect });
            return Step::Goes;
        }
        Step::Ends(Verdict::Open)
    }

    /// Takes the report of the referee that was asked.
    pub(super) fn take(&mut self, reports: &[SignedScores], court: &mut Court) -> Result<Step, Rejection> {
        let job = Request { id: self.job, ..self.request.clone() };
        let Stage::Scored { output, votes, asked: Some(Asked { who, defect, .. }) } = &mut self.stage else {
            return Err(Rejection::NotLeased);
        };
        let subject = defect.as_ref().unwrap_or(output);
        let [SignedScores { scores, signature }] = reports else { return Ok(self.ask(court)) };
        let hash = job.hash(&court.rules.domain);
        let digest =
            report_digest(&court.rules.domain, &hash, self.attempt, &who.node, &subject.hash(), scores);
        verify(&who.node, &digest, signature).map_err(|_| Rejection::BadSignature)?;
        let bounds = court.rules.registry.calibration.bounds(&who.class, &self.who.class);
        if let (Some(bounds), Ok(report)) = (bounds, Report::decode(scores))
            && report.scores.len() == subject.tokens.len()
        {
            let is_good = judge(subject.tokens.len(), &report, bounds).is_ok();
            if defect.is_some() {
                self.checked.push((who.clone(), !is_good));
                return Ok(self.ask(court));
            }
            let mean = Mean {
                micro: report.clipped_mean_micro(bounds.clip_milli),
                class: self.who.class.clone(),
                referee_class: who.class.clone(),
            };
            votes.push(Vote { who: who.clone(), is_good, mean });
        }
        Ok(self.ask(court))
    }

    /// Tells what came of it, to the node too.
    pub(super) fn end(self, verdict: Verdict, court: &mut Court) {
        let (node, request) = (self.who.node, self.request.id);
        if matches!(self.stage, Stage::Leased { .. }) {
            court.nodes.release(&node, request);
            let frame = frames::cancel(request, self.attempt, "lease expired");
            court.out.push(Effect::Send { node, frame });
        }
        court.out.push(Effect::Send { node, frame: frames::released(request, self.attempt) });
        court.out.push(Effect::SlotsChanged);
        let outcome = match verdict {
            Verdict::Declined => Outcome::Declined,
            _ if self.is_void => Outcome::Void,
            Verdict::Good => Outcome::Passed,
            Verdict::Bad(_) | Verdict::Missed => Outcome::Failed,
            Verdict::Open => Outcome::Void,
        };
        let mut conduct = if outcome == Outcome::Void { Vec::new() } else { self.conduct(verdict) };
        // What was tried is to be let in: who came back as somebody else since is tried anew.
        let is_same = court.nodes.serves(&self.who, &self.request.model_root);
        let outcome = if self.kind == Kind::Entry && !is_same { Outcome::Void } else { outcome };
        conduct.extend(self.checked.iter().map(|(who, noticed)| {
            let finding = if *noticed { Finding::Completed } else { Finding::Bad(Reason::Planted) };
            Conduct { node: who.node, operator: who.operator, finding, mean: None }
        }));
        court.out.push(Effect::Tried(Box::new(Ended { kind: self.kind, request, node, outcome, conduct })));
    }

    fn conduct(&self, verdict: Verdict) -> Vec<Conduct> {
        let finding = match (self.kind, verdict) {
            // Before it was admitted it only failed to get in; what it answered wrong is a challenge that it did not meet.
            (Kind::Entry, Verdict::Missed | Verdict::Declined) | (_, Verdict::Open) => return Vec::new(),
            (Kind::Entry, Verdict::Bad(_)) => Finding::Bad(Reason::Challenge),
            (_, Verdict::Good) => Finding::Completed,
            (_, Verdict::Bad(reason)) => Finding::Bad(reason),
            (_, Verdict::Missed | Verdict::Declined) => Finding::Missed,
        };
        let Eligible { node, operator, .. } = self.who;
        let mean = self.votes().iter().map(|vote| vote.mean.clone()).min();
        let mut conduct = vec![Conduct { node, operator, finding, mean }];
        let standing = self.standing();
        for Vote { who, is_good, .. } in self.votes() {
            let outvoted = match standing {
                Standing::Confirmed => !is_good,
                Standing::Refuted => *is_good,
                Standing::Unscored | Standing::Contested => false,
            };
            let finding = if outvoted { Finding::Bad(Reason::Report) } else { Finding::Completed };
            conduct.push(Conduct { node: who.node, operator: who.operator, finding, mean: None });
        }
        conduct
    }
}
