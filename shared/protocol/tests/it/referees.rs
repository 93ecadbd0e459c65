//! Audits and referees, as a stranger checks them.

use infera_protocol::{
    agreement::Decision,
    assignment::ALWAYS_PPM,
    evidence::{Evidence, RefereeOutcome, SlotOutcome},
    judgement::{Finding, is_planted},
    receipt::Receipt,
    trust::Reason,
};

use crate::{document, evidence, evidence_of, failures, referee};

fn audited() -> Evidence {
    evidence_of(3, 4, 8, None, ALWAYS_PPM)
}

fn findings(evidence: &Evidence) -> Vec<Finding> {
    let decision = evidence.decide(true);
    evidence.conduct(&decision).iter().map(|conduct| conduct.finding).collect()
}

#[test]
fn an_audit_that_is_due_can_not_be_left_out() {
    let mut evidence = audited();
    assert!(
        matches!(evidence.decide(true), Decision::MoreReferees { count: 1, ref answers } if answers.len() == 1)
    );
    assert!(Receipt::build(&evidence).is_err());
    evidence.referees = vec![referee(&evidence, |_| 0)];
    let receipt = Receipt::build(&evidence).unwrap();
    assert_eq!(receipt.referees, [evidence.referees[0].node]);
    assert!(failures(&document(evidence.clone()).canonical().unwrap()).is_empty());
    assert_eq!(
        findings(&evidence),
        [Finding::Verified, Finding::Verified, Finding::Verified, Finding::Completed]
    );
}

#[test]
fn a_referee_that_is_silent_counts_as_asked() {
    let mut evidence = audited();
    let mut silent = referee(&evidence, |_| 0);
    silent.outcome = RefereeOutcome::NoReport;
    silent.reports.clear();
    evidence.referees = vec![silent];
    // Nobody else is left: the three equal results stand.
    let document = document(evidence.clone());
    assert!(document.receipt.referees.is_empty());
    assert!(failures(&document.canonical().unwrap()).is_empty());
    assert_eq!(findings(&evidence).last(), Some(&Finding::Missed));
}

#[test]
fn forged_referees_are_caught() {
    type Forgery = fn(&mut Evidence);
    let forgeries: [Forgery; 6] = [
        // A replica as its own referee.
        |e| e.referees[0].node = e.slots[0].node,
        |e| e.referees[0].operator = e.slots[0].operator,
        |e| e.referees[0].reports[0].scores[3] ^= 1,
        |e| e.referees[0].reports[0].subject.0[0] ^= 1,
        |e| e.referees[0].outcome = RefereeOutcome::NoReport,
        |e| {
            let again = e.referees[0].reports[0].clone();
            e.referees[0].reports.push(again);
        },
    ];
    for (i, forge) in forgeries.into_iter().enumerate() {
        let mut forged = audited();
        forged.referees = vec![referee(&forged, |_| 0)];
        forged.check_referees().unwrap();
        forge(&mut forged);
        assert!(forged.check_referees().is_err(), "forgery {i}");
    }
    // Terms and findings are in the evidence's root, and terms are the registry's.
    let mut loose = evidence(None);
    loose.terms.calibration.pairs[0].bounds.margin_milli = 9_000;
    assert!(failures(&document(loose).canonical().unwrap()).contains(&"terms"));
}

#[test]
fn an_outlier_that_the_referee_denies_is_bad() {
    let evidence = evidence(Some(1));
    let findings = findings(&evidence);
    assert_eq!(findings[1], Finding::Bad(Reason::Answer));
    assert_eq!(
        [findings[0], findings[2], findings[3]],
        [Finding::Verified, Finding::Verified, Finding::Completed]
    );
}

#[test]
fn who_was_busy_or_left_is_no_part_of_it() {
    let mut evidence = evidence(None);
    evidence.slots[0].outcome = SlotOutcome::NoReveal;
    evidence.slots[0].reveal = None;
    evidence.slots[1].outcome = SlotOutcome::Busy;
    assert!(evidence.check_slots().is_err(), "busy, but it has committed");
    evidence.slots[1].commitment = None;
    evidence.slots[1].reveal = None;
    evidence.check_slots().unwrap();
    assert_eq!(evidence.slots.iter().filter(|slot| slot.outcome.is_unproven()).count(), 1);
    assert_eq!(findings(&evidence), [Finding::Missed, Finding::Completed]);
    // Neither has it seen the answer, so it may referee.
    let may = |operator| evidence.referee_order().iter().any(|e| e.operator == operator);
    assert!(may(evidence.slots[1].operator) && !may(evidence.slots[0].operator));
}

/// The first audited attempt whose only referee gets a planted defect.
fn planted() -> Evidence {
    let at = |epoch_ms: i64| {
        let mut evidence = evidence_of(3, u64::try_from(epoch_ms).unwrap() / 10_000, 8, None, ALWAYS_PPM);
        evidence.submitted_at_ms = epoch_ms;
        evidence.decided_at_ms = epoch_ms + 1;
        evidence
    };
    let found = (0..2_000)
        .map(|i| at(i * 10_000))
        .find(|evidence| is_planted(&evidence.beta2(), &evidence.referee_order()[0].node));
    found.expect("one in twenty has one")
}

#[test]
fn a_referee_that_misses_a_planted_defect_is_bad_and_says_nothing() {
    let mut evidence = planted();
    let lazy = referee(&evidence, |_| 0);
    assert_eq!(lazy.reports.len(), 1, "the defect, in place of the answer");
    evidence.referees = vec![lazy];
    evidence.check_referees().unwrap();
    assert_eq!(findings(&evidence).last(), Some(&Finding::Bad(Reason::Planted)));
    let answer = evidence.slots[0].reveal.as_ref().unwrap().output.tokens.clone();
    evidence.referees = vec![];
    evidence.referees = vec![referee(&evidence, |tokens| if tokens == answer { 0 } else { u32::MAX })];
    assert_eq!(findings(&evidence).last(), Some(&Finding::Completed));
}
