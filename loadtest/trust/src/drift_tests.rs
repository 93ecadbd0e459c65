//! What was published, what follows from it, and what the services use: one and the same.

use infera_protocol::{calibration::Calibration, registry::Registry};
use serde::Deserialize;

use crate::calibrate::{Measured, SAFETY};

#[derive(Deserialize)]
struct Published {
    rule: String,
    measured: Vec<Measured>,
    calibration: Calibration,
}

fn published() -> Published {
    serde_json::from_str(include_str!("../../../docs/reports/calibration.json")).unwrap()
}

#[test]
fn the_published_bounds_follow_from_what_was_measured() {
    let published = published();
    assert!(published.rule.starts_with(&SAFETY.to_string()), "{}", published.rule);
    assert_eq!(crate::honest::calibration(&published.measured), published.calibration);
    let cross = &published.measured[1];
    assert!(cross.requests >= 600 && cross.parted > 0, "{cross:?}");
}

/// Run `make bench-trust`, and take the calibration of target/reports/calibration.json over into both files.
#[test]
fn the_services_use_the_published_bounds() {
    let registry: Registry = serde_json::from_str(include_str!("../../../deploy/models.json")).unwrap();
    assert_eq!(registry.calibration, published().calibration);
}
