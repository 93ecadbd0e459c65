//! What follows from evidence (protocol sections 7 and 8): the verdict, and what it says about every operator that took
//! part.

use std::collections::BTreeMap;

use crate::{
    agreement::{
        Ballot, Decision, FULL_SIMILARITY_MILLIONTHS, Question, Relation, Standing, Votes, compare, decide,
        quorum,
    },
    assignment::{happens, number},
    bytes::{Address, Hash32, NodeId},
    calibration::Bounds,
    evidence::{Evidence, RefereeEvidence, RefereeOutcome, SlotOutcome},
    hash::keccak,
    referee::{Fault, Report, judge},
    request::{Finish, Output},
    trust::Reason,
};

/// Share of referees' jobs that hold a planted defect, parts per million (section 8).
pub const PLANTED_PPM: u32 = 50_000;

/// Most operators that are asked to referee one attempt.
pub const MAX_REFEREES: usize = 16;

/// What taking part in one attempt says about an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// In the verified set.
    Verified,
    /// Did what it was asked, and nothing follows from it.
    Completed,
    /// Was asked and did not do it: it declined, was late, or left.
    Missed,
    Bad(Reason),
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::Answer,
        Self::Drift,
        Self::Mismatch,
        Self::Withheld,
        Self::Equivocation,
        Self::Copy,
        Self::Report,
        Self::Planted,
        Self::Challenge,
    ];

    /// Its name in messages, the API, the database and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Drift => "drift",
            Self::Mismatch => "mismatch",
            Self::Withheld => "withheld",
            Self::Equivocation => "equivocation",
            Self::Copy => "copy",
            Self::Report => "report",
            Self::Planted => "planted",
            Self::Challenge => "challenge",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

/// One operator's part in an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conduct {
    pub node: NodeId,
    pub operator: Address,
    pub finding: Finding,
    /// What referees found in its answer: the lowest where there are several, so that no single one can make it worse.
    pub mean: Option<Mean>,
}

/// Clipped mean of the margins that a referee found in an answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mean {
    /// 10^-6 logits a token.
    pub micro: u32,
    /// Of the answer's node, and of the referee.
    pub class: String,
    pub referee_class: String,
}

/// The defect that stands in the job of this referee in place of an answer, made from `output`: one token replaced by
/// another of the vocabulary. Not its end token: an answer that ends without one shows without any scoring.
pub fn planted(beta2: &Hash32, referee: &NodeId, output: &Output, vocab_size: u32) -> Output {
    let beta = keccak(&[b"infera.defect.v1", &beta2.0, &referee.0]);
    let mut tokens = output.tokens.clone();
    let ends = output.finish == Finish::Eos && tokens.len() > 1;
    let places = tokens.len() - usize::from(ends);
    let at = number(&beta, b"place", places as u64) as usize;
    if let Some(token) = tokens.get_mut(at) {
        let others = u64::from(vocab_size.saturating_sub(1)).max(1);
        let next = (u64::from(*token) + 1 + number(&beta, b"token", others)) % u64::from(vocab_size.max(1));
        *token = u32::try_from(next).unwrap_or(0);
    }
    Output { tokens, fingerprints: Vec::new(), finish: output.finish }
}

/// Whether the job of this referee holds a defect.
pub fn is_planted(beta2: &Hash32, referee: &NodeId) -> bool {
    happens(&keccak(&[b"infera.planting.v1", &beta2.0, &referee.0]), "defect", PLANTED_PPM)
}

/// A referee's word about the answers.
struct Word<'a> {
    referee: &'a RefereeEvidence,
    /// It did not notice the planted defect, so that nothing it says counts.
    is_void: bool,
    /// By answer.
    said: BTreeMap<Hash32, Result<(), Fault>>,
    means: BTreeMap<Hash32, Mean>,
}

impl Evidence {
    /// The revealed results as [`decide`] takes them.
    pub fn ballots(&self) -> Vec<Ballot> {
        self.revealed()
            .map(|(slot, output)| Ballot {
                node: slot.node,
                answer: output.hash(),
                fit: !self.unfit.contains(&slot.node),
            })
            .collect()
    }

    /// The distinct answers, each as its first node in the order of the draw revealed it.
    pub fn answers(&self) -> Vec<(Hash32, NodeId, &Output)> {
        let mut answers: Vec<(Hash32, NodeId, &Output)> = Vec::new();
        for (slot, output) in self.revealed() {
            let hash = output.hash();
            if answers.iter().all(|(known, ..)| *known != hash) {
                answers.push((hash, slot.node, output));
            }
        }
        answers
    }

    /// Whether even equal results are to be refereed: by chance, as often as the least trusted operator among those
    /// that answered calls for.
    pub fn is_audited(&self) -> bool {
        let ppm = self
            .revealed()
            .filter_map(|(slot, _)| self.eligible.binary_search_by_key(&slot.node, |e| e.node).ok())
            .map(|at| self.eligible[at].audit_ppm)
            .max();
        happens(&self.beta2(), "audit", ppm.unwrap_or(0))
    }

    /// Nobody is left who could referee.
    pub fn no_more_referees(&self) -> bool {
        self.referee_order().len().min(MAX_REFEREES) <= self.referees.len()
    }

    /// What a referee's job is about: the answers that are named, by hash so that their places tell nothing. A planted
    /// defect takes the place of the first answer: beside it, it would be seen without scoring anything.
    pub fn subjects(&self, referee: &NodeId, asked: &[Hash32]) -> Vec<Output> {
        let answers = self.answers();
        let defect = self.defect(referee);
        let mut subjects: Vec<Output> = answers
            .iter()
            .skip(usize::from(defect.is_some()))
            .filter(|(hash, ..)| asked.contains(hash))
            .map(|(_, _, output)| Output { fingerprints: Vec::new(), ..(*output).clone() })
            .collect();
        subjects.extend(defect);
        subjects.sort_by_key(Output::hash);
        subjects
    }

    fn defect(&self, referee: &NodeId) -> Option<Output> {
        let beta2 = self.beta2();
        let (_, _, output) = *self.answers().first()?;
        is_planted(&beta2, referee).then(|| planted(&beta2, referee, output, self.terms.vocab_size))
    }

    /// The bounds between a referee and an answer.
    fn bounds(&self, referee: &NodeId, author: &NodeId) -> Option<&Bounds> {
        self.terms.calibration.bounds(self.class_of(referee)?, self.class_of(author)?)
    }

    fn words(&self) -> Vec<Word<'_>> {
        let answers = self.answers();
        let reported = self.referees.iter().filter(|r| r.outcome == RefereeOutcome::Reported);
        reported
            .map(|referee| {
                let find = |subject: &Hash32| {
                    let report = referee.reports.iter().find(|report| report.subject == *subject)?;
                    Report::decode(&report.scores).ok()
                };
                let (mut said, mut means) = (BTreeMap::new(), BTreeMap::new());
                for (hash, author, output) in &answers {
                    let Some(bounds) = self.bounds(&referee.node, author) else { continue };
                    let Some(report) = find(hash) else { continue };
                    said.insert(*hash, judge(output.tokens.len(), &report, bounds));
                    let class = |node| self.class_of(node).unwrap_or_default().to_owned();
                    let mean = Mean {
                        micro: report.clipped_mean_micro(bounds.clip_milli),
                        class: class(author),
                        referee_class: class(&referee.node),
                    };
                    means.insert(*hash, mean);
                }
                let is_void = self.defect(&referee.node).is_some_and(|defect| {
                    let first = answers.first().and_then(|(_, author, _)| self.bounds(&referee.node, author));
                    let noticed = |bounds: &Bounds| {
                        find(&defect.hash()).is_some_and(|r| judge(defect.tokens.len(), &r, bounds).is_err())
                    };
                    !first.is_some_and(noticed)
                });
                Word { referee, is_void, said, means }
            })
            .collect()
    }

    /// How two answers stand to each other; `None` where a similarity that is needed is missing.
    pub fn relation(&self, a: &Hash32, b: &Hash32) -> Option<Relation> {
        let answers = self.answers();
        let find = |hash: &Hash32| answers.iter().find(|(known, ..)| known == hash);
        let ((_, author_a, a_output), (_, author_b, b_output)) = (find(a)?, find(b)?);
        let bounds = match (self.class_of(author_a), self.class_of(author_b)) {
            (Some(a), Some(b)) => self.terms.calibration.bounds(a, b),
            _ => None,
        };
        let millionths = if a == b { FULL_SIMILARITY_MILLIONTHS } else { self.similarity(a, b)? };
        let threshold = self.terms.similarity_threshold_millionths;
        Some(compare(&self.request, bounds, threshold, a_output, b_output, millionths))
    }

    /// The recorded similarity of two answers.
    pub fn similarity(&self, a: &Hash32, b: &Hash32) -> Option<u32> {
        let pair = if a <= b { [*a, *b] } else { [*b, *a] };
        self.similarities.iter().find(|s| s.answers == pair).map(|s| s.millionths)
    }

    /// What follows. `no_more_nodes`: no further operator can be drawn.
    pub fn decide(&self, no_more_nodes: bool) -> Decision {
        let votes = votes(&self.words());
        decide(&Question {
            k: self.k,
            ballots: &self.ballots(),
            audited: self.is_audited(),
            alike: &|a, b| {
                matches!(self.relation(a, b), Some(Relation::Equal | Relation::Unconfirmed { .. }))
            },
            votes: &|answer| votes.get(answer).copied().unwrap_or_default(),
            no_more_nodes,
            no_more_referees: self.no_more_referees(),
        })
    }

    /// Whether referees deny what enough of the replicas said to be verified: somebody holds many of them.
    pub fn is_overturned(&self) -> bool {
        let votes = votes(&self.words());
        let denied =
            |answer: &Hash32| votes.get(answer).is_some_and(|votes| votes.standing() == Standing::Refuted);
        let ballots = self.ballots();
        self.answers().iter().any(|(hash, ..)| {
            let same = ballots.iter().filter(|ballot| ballot.fit && ballot.answer == *hash).count();
            same >= quorum(self.k) as usize && denied(hash)
        })
    }

    /// What this attempt says about everybody who took part: slots in the order of the draw, then referees in theirs.
    /// Nodes that were never asked are left out.
    pub fn conduct(&self, decision: &Decision) -> Vec<Conduct> {
        let words = self.words();
        let votes = votes(&words);
        let votes_for = |answer: &Hash32| votes.get(answer).copied().unwrap_or_default();
        let members: &[NodeId] = match decision {
            Decision::Verified { members } => members,
            _ => &[],
        };
        let mut conduct = Vec::new();
        for slot in &self.slots {
            let answer = slot.reveal.as_ref().map(|reveal| reveal.output.hash());
            let finding = match (slot.outcome, &answer) {
                (SlotOutcome::Busy | SlotOutcome::Refereed, _) => continue,
                (SlotOutcome::Mismatch, _) => Finding::Bad(Reason::Mismatch),
                (SlotOutcome::Revealed, _) if members.contains(&slot.node) => Finding::Verified,
                (SlotOutcome::Revealed, _) if self.unfit.contains(&slot.node) => Finding::Bad(Reason::Answer),
                (SlotOutcome::Revealed, Some(answer)) => {
                    let votes = votes_for(answer);
                    // Or a majority of the replicas and the only referee there is say the same.
                    let alone = !members.is_empty() && votes.bad > 0 && votes.good == 0;
                    let denied = votes.standing() == Standing::Refuted || alone;
                    if denied { Finding::Bad(Reason::Answer) } else { Finding::Completed }
                }
                _ => Finding::Missed,
            };
            let means = words.iter().filter(|word| !word.is_void);
            let mean = answer.and_then(|a| means.filter_map(|word| word.means.get(&a).cloned()).min());
            conduct.push(Conduct { node: slot.node, operator: slot.operator, finding, mean });
        }
        for referee in &self.referees {
            let word = words.iter().find(|word| word.referee.node == referee.node);
            let finding = match word {
                None => Finding::Missed,
                Some(word) if word.is_void => Finding::Bad(Reason::Planted),
                Some(word) if word.said.iter().any(|(a, said)| outvoted(*said, votes.get(a))) => {
                    Finding::Bad(Reason::Report)
                }
                Some(_) => Finding::Completed,
            };
            conduct.push(Conduct { node: referee.node, operator: referee.operator, finding, mean: None });
        }
        conduct
    }
}

fn votes(words: &[Word<'_>]) -> BTreeMap<Hash32, Votes> {
    let mut votes: BTreeMap<Hash32, Votes> = BTreeMap::new();
    for word in words.iter().filter(|word| !word.is_void) {
        for (answer, said) in &word.said {
            let votes = votes.entry(*answer).or_default();
            match said {
                Ok(()) => votes.good += 1,
                Err(_) => votes.bad += 1,
            }
        }
    }
    votes
}

/// Whether two of three decided otherwise.
fn outvoted(said: Result<(), Fault>, votes: Option<&Votes>) -> bool {
    let Some(votes) = votes.filter(|votes| votes.good + votes.bad >= crate::agreement::DECIDING_VOTES) else {
        return false;
    };
    match votes.standing() {
        Standing::Confirmed => said.is_err(),
        Standing::Refuted => said.is_ok(),
        Standing::Unscored | Standing::Contested => false,
    }
}
