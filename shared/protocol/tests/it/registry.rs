//! Receipts and the versions of the registry that were in force in their time.

use infera_protocol::{
    bytes::Hash32,
    document::{Outcome, check},
    registry::{History, HistoryError, Manifest, Registry, Replaced},
};

use crate::{document, evidence, manifest, registry};

/// The registry after the price and then the calibration were changed, each version's bytes by hash, and the manifest
/// that names the last one.
fn changed(price_at_ms: i64, calibration_at_ms: i64) -> (Registry, Vec<(Hash32, Vec<u8>)>, Manifest) {
    let first = registry();
    let replaces = |former: &Registry, at_ms| Some(Replaced { registry_hash: former.hash().unwrap(), at_ms });
    let mut dearer = first.clone();
    dearer.models[0].price_micro = 4;
    dearer.replaces = replaces(&first, price_at_ms);
    let mut recalibrated = dearer.clone();
    recalibrated.calibration.pairs[0].bounds.near_tie_milli = 250;
    recalibrated.replaces = replaces(&dearer, calibration_at_ms);
    let former = [first, dearer]
        .iter()
        .map(|version| (version.hash().unwrap(), serde_json::to_vec(version).unwrap()))
        .collect();
    let manifest = Manifest { registry_hash: recalibrated.hash().unwrap(), ..manifest() };
    (recalibrated, former, manifest)
}

fn follow(current: &Registry, kept: &[(Hash32, Vec<u8>)]) -> Result<History, HistoryError> {
    History::follow(current.clone(), |hash| {
        Ok(kept.iter().find(|(name, _)| name == hash).map(|(_, bytes)| bytes.clone()))
    })
}

/// What became of the checks that look into the registry: model, calibration.
fn by_registry(bytes: &[u8], manifest: &Manifest, history: &History) -> [Outcome; 2] {
    let report = check(bytes, manifest, history);
    ["model", "calibration"].map(|name| {
        report.checks.iter().find(|check| check.name == name).expect("it is checked").outcome.clone()
    })
}

#[test]
fn a_receipt_outlives_changes_of_price_and_calibration() {
    // Submitted at 41 s and decided at 42 s, at price 3 and under the first calibration.
    let bytes = document(evidence(None)).canonical().unwrap();
    let (current, former, manifest) = changed(50_000, 60_000);
    let history = follow(&current, &former).unwrap();
    let report = check(&bytes, &manifest, &history);
    assert!(report.checks.iter().all(|c| c.outcome == Outcome::Passed), "{:?}", report.checks);

    // Funded under the first version and decided under a later one.
    let (current, former, manifest) = changed(41_500, 41_600);
    let history = follow(&current, &former).unwrap();
    assert_eq!(by_registry(&bytes, &manifest, &history), [Outcome::Passed, Outcome::Passed]);

    // It was asked for after the changes: what was in force before them does not count.
    let (current, former, manifest) = changed(30_000, 40_000);
    let history = follow(&current, &former).unwrap();
    let outcomes = by_registry(&bytes, &manifest, &history);
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Failed(_))), "{outcomes:?}");
}

#[test]
fn a_former_registry_that_is_missing_leaves_it_open() {
    let bytes = document(evidence(None)).canonical().unwrap();
    let (current, former, manifest) = changed(50_000, 60_000);
    let history = follow(&current, &former[1..]).unwrap();
    let outcomes = by_registry(&bytes, &manifest, &history);
    // The second version has the same calibration, but was not in force then.
    for outcome in &outcomes {
        assert!(
            matches!(outcome, Outcome::NotChecked(reason) if reason.contains(&former[0].0.to_string())),
            "{outcome:?}"
        );
    }
    assert!(!check(&bytes, &manifest, &history).failed());
}

#[test]
fn a_forged_registry_is_refused() {
    let (current, former, manifest) = changed(50_000, 60_000);
    // Under the true name, another content.
    let mut cheaper = registry();
    cheaper.models[0].price_micro = 1;
    let mut forged = former.clone();
    forged[0].1 = serde_json::to_vec(&cheaper).unwrap();
    let error = follow(&current, &forged).unwrap_err();
    assert_eq!(
        error,
        HistoryError::Forged { named: former[0].0, actual: cheaper.hash().unwrap() },
        "{error}"
    );
    // A version in force that the manifest does not name, made to lead to a forged former one.
    let mut leading = current.clone();
    leading.replaces = Some(Replaced { registry_hash: cheaper.hash().unwrap(), at_ms: 50_000 });
    let kept = [(cheaper.hash().unwrap(), serde_json::to_vec(&cheaper).unwrap())];
    let history = follow(&leading, &kept).unwrap();
    let bytes = document(evidence(None)).canonical().unwrap();
    let report = check(&bytes, &manifest, &history);
    assert!(matches!(
        report.checks[0],
        infera_protocol::document::Check { name: "registry", outcome: Outcome::Failed(_) }
    ));
    // Times that run backwards.
    let (current, former, _) = changed(60_000, 50_000);
    assert_eq!(follow(&current, &former), Err(HistoryError::Order { named: former[1].0 }));
}
