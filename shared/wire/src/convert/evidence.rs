//! What the dispatcher collected, as evidence.

use infera_protocol::{
    assignment::MAX_ELIGIBLE,
    bytes::VrfKey,
    evidence::{
        Evidence, RefereeEvidence, RefereeOutcome, SignedDecline, SlotEvidence, SlotOutcome, SubjectReport,
        Terms,
    },
    identity::Domain,
    judgement::{Conduct, Finding, Mean},
    trust::Reason,
};

use super::{MAX_SLOTS, MAX_SUBJECTS, commitment, eligible, fixed, funded, name, required, reveal};
use crate::{WireError, v1};

fn outcome(wire: i32) -> Result<SlotOutcome, WireError> {
    match v1::SlotOutcome::try_from(wire) {
        Ok(v1::SlotOutcome::Revealed) => Ok(SlotOutcome::Revealed),
        Ok(v1::SlotOutcome::NoCommit) => Ok(SlotOutcome::NoCommit),
        Ok(v1::SlotOutcome::NoReveal) => Ok(SlotOutcome::NoReveal),
        Ok(v1::SlotOutcome::Mismatch) => Ok(SlotOutcome::Mismatch),
        Ok(v1::SlotOutcome::Declined) => Ok(SlotOutcome::Declined),
        Ok(v1::SlotOutcome::Disconnected) => Ok(SlotOutcome::Disconnected),
        Ok(v1::SlotOutcome::Busy) => Ok(SlotOutcome::Busy),
        Ok(v1::SlotOutcome::Refereed) => Ok(SlotOutcome::Refereed),
        Ok(v1::SlotOutcome::Unspecified) | Err(_) => {
            Err(WireError::invalid("slot.outcome", format!("unknown outcome {wire}")))
        }
    }
}

pub fn outcome_to_wire(outcome: SlotOutcome) -> v1::SlotOutcome {
    match outcome {
        SlotOutcome::Revealed => v1::SlotOutcome::Revealed,
        SlotOutcome::NoCommit => v1::SlotOutcome::NoCommit,
        SlotOutcome::NoReveal => v1::SlotOutcome::NoReveal,
        SlotOutcome::Mismatch => v1::SlotOutcome::Mismatch,
        SlotOutcome::Declined => v1::SlotOutcome::Declined,
        SlotOutcome::Disconnected => v1::SlotOutcome::Disconnected,
        SlotOutcome::Busy => v1::SlotOutcome::Busy,
        SlotOutcome::Refereed => v1::SlotOutcome::Refereed,
    }
}

fn slot(wire: &v1::SlotResult) -> Result<SlotEvidence, WireError> {
    Ok(SlotEvidence {
        node: fixed("slot.node", &wire.node)?,
        operator: fixed("slot.operator", &wire.operator)?,
        outcome: outcome(wire.outcome)?,
        commitment: wire.commit.as_ref().map(commitment).transpose()?,
        reveal: wire.reveal.as_ref().map(reveal).transpose()?,
        decline: wire.decline.as_ref().map(decline).transpose()?,
    })
}

pub fn decline(wire: &v1::Decline) -> Result<SignedDecline, WireError> {
    Ok(SignedDecline {
        reason: name("decline.reason", &wire.reason)?,
        signature: fixed("decline.signature", &wire.signature)?,
    })
}

fn referee_outcome(wire: i32) -> Result<RefereeOutcome, WireError> {
    match v1::RefereeOutcome::try_from(wire) {
        Ok(v1::RefereeOutcome::Reported) => Ok(RefereeOutcome::Reported),
        Ok(v1::RefereeOutcome::NoReport) => Ok(RefereeOutcome::NoReport),
        Ok(v1::RefereeOutcome::Declined) => Ok(RefereeOutcome::Declined),
        Ok(v1::RefereeOutcome::Disconnected) => Ok(RefereeOutcome::Disconnected),
        Ok(v1::RefereeOutcome::Unspecified) | Err(_) => {
            Err(WireError::invalid("referee.outcome", format!("unknown outcome {wire}")))
        }
    }
}

fn referee_outcome_to_wire(outcome: RefereeOutcome) -> v1::RefereeOutcome {
    match outcome {
        RefereeOutcome::Reported => v1::RefereeOutcome::Reported,
        RefereeOutcome::NoReport => v1::RefereeOutcome::NoReport,
        RefereeOutcome::Declined => v1::RefereeOutcome::Declined,
        RefereeOutcome::Disconnected => v1::RefereeOutcome::Disconnected,
    }
}

fn referee(wire: &v1::RefereeResult) -> Result<RefereeEvidence, WireError> {
    if wire.findings.len() > MAX_SUBJECTS {
        let reason = format!("{}, at most {MAX_SUBJECTS}", wire.findings.len());
        return Err(WireError::invalid("referee.findings", reason));
    }
    let report = |finding: &v1::RefereeFinding| {
        let report = required("referee.report", &finding.report)?;
        Ok(SubjectReport {
            subject: fixed("referee.subject", &finding.subject)?,
            scores: report.scores.clone(),
            signature: fixed("referee.signature", &report.signature)?,
        })
    };
    Ok(RefereeEvidence {
        node: fixed("referee.node", &wire.node)?,
        operator: fixed("referee.operator", &wire.operator)?,
        outcome: referee_outcome(wire.outcome)?,
        reports: wire.findings.iter().map(report).collect::<Result<_, WireError>>()?,
    })
}

/// What a verdict says about an operator.
pub fn conduct_to_wire(conduct: &Conduct) -> v1::Conduct {
    let finding = match conduct.finding {
        Finding::Verified => "verified",
        Finding::Completed => "completed",
        Finding::Missed => "missed",
        Finding::Bad(reason) => reason.name(),
    };
    v1::Conduct {
        node: conduct.node.to_vec(),
        operator: conduct.operator.to_vec(),
        finding: finding.to_owned(),
        mean: conduct.mean.as_ref().map(|mean| v1::Mean {
            micro: mean.micro,
            class: mean.class.clone(),
            referee_class: mean.referee_class.clone(),
        }),
    }
}

fn mean(wire: &v1::Mean) -> Result<Mean, WireError> {
    Ok(Mean {
        micro: wire.micro,
        class: name("mean.class", &wire.class)?,
        referee_class: name("mean.referee_class", &wire.referee_class)?,
    })
}

pub fn conduct(wire: &v1::Conduct) -> Result<Conduct, WireError> {
    let finding = match wire.finding.as_str() {
        "verified" => Finding::Verified,
        "completed" => Finding::Completed,
        "missed" => Finding::Missed,
        name => Reason::by_name(name).map(Finding::Bad).ok_or_else(|| {
            let name: String = name.chars().take(64).collect();
            WireError::invalid("conduct.finding", format!("unknown finding `{name}`"))
        })?,
    };
    Ok(Conduct {
        node: fixed("conduct.node", &wire.node)?,
        operator: fixed("conduct.operator", &wire.operator)?,
        finding,
        mean: wire.mean.as_ref().map(mean).transpose()?,
    })
}

pub fn referee_to_wire(referee: &RefereeEvidence, detail: &str) -> v1::RefereeResult {
    let finding = |report: &SubjectReport| v1::RefereeFinding {
        subject: report.subject.to_vec(),
        report: Some(v1::SubjectReport {
            scores: report.scores.clone(),
            signature: report.signature.to_vec(),
        }),
    };
    v1::RefereeResult {
        node: referee.node.to_vec(),
        operator: referee.operator.to_vec(),
        outcome: referee_outcome_to_wire(referee.outcome).into(),
        findings: referee.reports.iter().map(finding).collect(),
        detail: detail.to_owned(),
    }
}

/// The evidence that a `ResultsCollected` carries, as it stands when the verdict falls; without what the verifier finds
/// by itself.
pub fn evidence(
    wire: &v1::ResultsCollected,
    domain: Domain,
    terms: Terms,
    decided_at_ms: i64,
) -> Result<Evidence, WireError> {
    if wire.eligible.len() > MAX_ELIGIBLE {
        return Err(WireError::invalid(
            "collected.eligible",
            format!("{} nodes, at most {MAX_ELIGIBLE}", wire.eligible.len()),
        ));
    }
    if wire.slots.len() > MAX_SLOTS {
        return Err(WireError::invalid(
            "collected.slots",
            format!("{}, at most {MAX_SLOTS}", wire.slots.len()),
        ));
    }
    if wire.referees.len() > MAX_SLOTS {
        return Err(WireError::invalid(
            "collected.referees",
            format!("{}, at most {MAX_SLOTS}", wire.referees.len()),
        ));
    }
    let funded = funded(required("collected.funded", &wire.funded)?)?;
    let submitted = funded.submitted;
    Ok(Evidence {
        domain,
        request: submitted.request,
        account: submitted.account,
        model: submitted.model,
        salt: submitted.salt,
        k: submitted.k,
        submitted_at_ms: submitted.submitted_at_ms,
        decided_at_ms,
        attempt: wire.attempt,
        epoch: wire.epoch,
        class: name("collected.class", &wire.class)?,
        price_micro: funded.price_micro,
        terms,
        eligible: wire.eligible.iter().map(eligible).collect::<Result<_, _>>()?,
        dispatcher: fixed::<VrfKey>("collected.dispatcher", &wire.dispatcher)?,
        assign_proof: fixed("collected.assign_proof", &wire.assign_proof)?,
        post_proof: fixed("collected.post_proof", &wire.post_proof)?,
        post_slots: wire.post_slots,
        slots: wire.slots.iter().map(slot).collect::<Result<_, _>>()?,
        referees: wire.referees.iter().map(referee).collect::<Result<_, _>>()?,
        unfit: Vec::new(),
        similarities: Vec::new(),
    })
}
