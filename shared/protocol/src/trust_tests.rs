use super::*;
use proptest::prelude::*;

const NOW: i64 = 1_800_000_000_000;
const RULES: Rules = Rules {
    decay_ppm: 980_000,
    quantile_ppm: 50_000,
    bad_weight: 5,
    most_verified: 100,
    trusted_ppm: 950_000,
    eligible_ppm: 900_000,
    audit_ppm: 50_000,
    alarm_days: 7,
};
const BOUNDS: Bounds = Bounds {
    near_tie_milli: 0,
    fingerprint_milli: 0,
    margin_milli: 500,
    clip_milli: 200,
    mean_micro: 50_000,
    drift_micro: 10_000,
    drift_limit_micro: 100_000,
};

fn record(verified: u32, bad: u32) -> Record {
    let mut record = Record::default();
    for _ in 0..verified {
        record.apply(&RULES, NOW, Event::Verified);
    }
    for _ in 0..bad {
        record.apply(&RULES, NOW, Event::Bad(Reason::Answer));
    }
    record
}

/// Found with mpmath 1.3 at 30 digits: bisection of `betainc(a, b, 0, x, regularized=True)` against 0.05.
#[test]
fn quantiles_are_those_of_a_second_implementation() {
    let table = [
        (1.0, 1.0, 0.05),
        (2.0, 1.0, 0.223_606_797_75),
        (11.0, 1.0, 0.761_595_809_619),
        (59.0, 1.0, 0.950_492_390_112),
        (101.0, 1.0, 0.970_774_846_461),
        (1.0, 6.0, 0.008_512_444_610_85),
        (2.0, 6.0, 0.053_375_500_470_2),
        (6.0, 6.0, 0.271_249_914_078),
        (21.0, 6.0, 0.637_405_138_022),
        (58.0, 6.0, 0.840_345_083_782),
        (101.0, 6.0, 0.903_381_954_421),
        (101.0, 11.0, 0.851_979_249_332),
        (101.0, 16.0, 0.807_888_210_979),
        (36.4, 4.65, 0.796_822_424_166),
        (1.0, 1.05, 0.047_676_752_909),
        (5.8, 1.485, 0.524_872_424_538),
        (101.0, 101.0, 0.442_256_608_972),
        (1.000_001, 500.0, 0.000_102_581_685_321),
        (1_001.0, 51.0, 0.940_167_350_117),
    ];
    for (a, b, expected) in table {
        let got = beta_quantile(a, b, 0.05);
        assert!((got - expected).abs() < 1e-10, "Beta({a}, {b}): {got}, expected {expected}");
    }
}

#[test]
fn who_is_eligible_trusted_and_how_heavy() {
    let alarm = Alarm::default();
    // Verified, bad, score, eligible, audit, weight of 2 slots.
    let table = [
        (0, 0, 50_000, true, 1_000_000, 100),
        (0, 1, 8_512, false, 1_000_000, 0),
        (1, 0, 223_607, true, 1_000_000, 447),
        (20, 1, 637_405, false, 1_000_000, 0),
        (57, 0, 949_661, true, 1_000_000, 1_899),
        (58, 0, 950_492, true, 50_000, 1_900),
        (57, 1, 840_345, false, 1_000_000, 0),
        (66, 1, 859_520, false, 1_000_000, 0),
        (67, 1, 861_370, true, 1_000_000, 1_722),
        (100, 0, 970_775, true, 50_000, 1_941),
        (5_000, 0, 970_775, true, 50_000, 1_941),
        (5_000, 1, 903_382, true, 1_000_000, 1_806),
        (5_000, 2, 851_979, false, 1_000_000, 0),
    ];
    for (verified, bad, score, eligible, audit, weight) in table {
        let record = record(verified, bad);
        let got = (
            record.score_ppm(&RULES, NOW),
            record.is_eligible(&RULES, NOW),
            record.audit_ppm(&RULES, &alarm, NOW),
            record.weight(&RULES, 2, NOW),
        );
        assert_eq!(got, (score, eligible, audit, weight), "{verified} verified, {bad} bad");
        assert_eq!(record.weight(&RULES, 0, NOW), 0);
    }
}

#[test]
fn offers_that_are_not_completed_cost_weight_and_nothing_else() {
    let mut record = record(100, 0);
    let before = record;
    for event in [Event::Declined, Event::Preempted] {
        for _ in 0..50 {
            record.apply(&RULES, NOW, Event::Offered);
            record.apply(&RULES, NOW, event);
        }
    }
    for _ in 0..100 {
        record.apply(&RULES, NOW, Event::Offered);
        record.apply(&RULES, NOW, Event::Completed);
    }
    assert_eq!(record.completed_ppm(), 101_000_000 / 201);
    assert_eq!(record.score_ppm(&RULES, NOW), before.score_ppm(&RULES, NOW));
    assert!(record.is_trusted(&RULES, NOW));
    assert_eq!((before.weight(&RULES, 1_000, NOW), record.weight(&RULES, 1_000, NOW)), (970_775, 487_801));
    assert_eq!((record.declined_micro, record.preempted_micro), (50_000_000, 50_000_000));
}

#[test]
fn counts_fade_by_the_day_and_never_by_a_clock_that_goes_back() {
    let record = record(100, 1);
    let day = |days: i64| NOW + days * DAY_MS;
    let mut later = record;
    later.apply(&RULES, day(1), Event::Offered);
    assert_eq!((later.verified_micro, later.bad_micro), (98_000_000, 980_000));
    later.apply(&RULES, day(-5), Event::Offered);
    assert_eq!((later.verified_micro, later.offered_micro), (98_000_000, 2_000_000));
    // In steps or at once.
    let (mut steps, mut once) = (record, record);
    for days in 1..=40 {
        steps.apply(&RULES, day(days), Event::Declined);
    }
    once.apply(&RULES, day(40), Event::Declined);
    assert_eq!((steps.verified_micro, steps.bad_micro), (once.verified_micro, once.bad_micro));
    // Ages away, nothing is left, and it takes no time to say so.
    assert_eq!(record.score_ppm(&RULES, i64::MAX), 50_000);
}

#[test]
fn recovery_says_what_then_comes_true() {
    for (verified, bad) in
        [(0, 0), (30, 0), (100, 0), (0, 1), (20, 1), (100, 1), (100, 2), (100, 3), (100, 20)]
    {
        let record = record(verified, bad);
        let found = record.recovery(&RULES, NOW);
        let Recovery { days_to_eligible, days_to_trusted, verified_needed } = found;
        let at = |days: u32| NOW + i64::from(days) * DAY_MS;
        assert!(record.is_eligible(&RULES, at(days_to_eligible)), "{verified}, {bad}: {found:?}");
        if days_to_eligible > 0 {
            assert!(!record.is_eligible(&RULES, at(days_to_eligible - 1)), "{verified}, {bad}: {found:?}");
        }
        let mut grown = record;
        for _ in 0..verified_needed {
            assert!(!grown.is_trusted(&RULES, at(days_to_trusted)), "{verified}, {bad}: {found:?}");
            grown.apply(&RULES, at(days_to_trusted), Event::Verified);
        }
        assert!(grown.is_trusted(&RULES, at(days_to_trusted)), "{verified}, {bad}: {found:?}");
    }
    let of = |verified, bad| record(verified, bad).recovery(&RULES, NOW);
    assert_eq!(of(0, 0), Recovery { days_to_eligible: 0, days_to_trusted: 0, verified_needed: 58 });
    assert_eq!(of(100, 0), Recovery { days_to_eligible: 0, days_to_trusted: 0, verified_needed: 0 });
}

#[test]
fn a_slightly_cheaper_model_adds_up_over_all_pairs() {
    let wide = Bounds { drift_micro: 100_000, drift_limit_micro: 1_000_000, ..BOUNDS };
    let mut record = Record::default();
    for _ in 0..1_000 {
        assert!(!record.refereed(10_000, &BOUNDS));
    }
    assert_eq!(record.drift_ppm, 0);
    // 10 % of either limit each time: the eleventh is beyond.
    let found: Vec<bool> = (0..11)
        .map(|i| if i % 2 == 0 { record.refereed(20_000, &BOUNDS) } else { record.refereed(200_000, &wide) })
        .collect();
    assert_eq!(found.iter().position(|f| *f), Some(10), "{found:?}");
    assert_eq!(record.drift_ppm, 0);
    // A limit of nothing: whatever exceeds what is expected.
    let strict = Bounds { drift_micro: 0, drift_limit_micro: 0, ..BOUNDS };
    assert!(!record.refereed(0, &strict));
    assert!(record.refereed(1, &strict));
}

#[test]
fn an_alarm_has_everything_refereed_for_its_time() {
    let mut alarm = Alarm::default();
    let trusted = record(100, 0);
    assert_eq!(trusted.audit_ppm(&RULES, &alarm, NOW), 50_000);
    alarm.raise(NOW);
    alarm.raise(NOW - 1);
    assert_eq!(trusted.audit_ppm(&RULES, &alarm, NOW + 7 * DAY_MS - 1), 1_000_000);
    assert_eq!(trusted.audit_ppm(&RULES, &alarm, NOW + 7 * DAY_MS), 50_000);
}

proptest! {
    #[test]
    fn good_never_lowers_a_score_and_bad_never_raises_it(verified in 0_u64..200_000_000, bad in 0_u64..20_000_000) {
        let at = |v, b| score(&RULES, v, b);
        prop_assert!(at(verified + ONE, bad) >= at(verified, bad));
        prop_assert!(at(verified, bad + ONE) <= at(verified, bad));
    }

    #[test]
    fn shares_of_both_sides_are_one(a in 1.0_f64..300.0, b in 1.0_f64..300.0, x in 0.0_f64..=1.0) {
        let sum = beta_share(a, b, x) + beta_share(b, a, 1.0 - x);
        prop_assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn a_record_survives_its_encoding(verified in 0_u32..9, bad in 0_u32..3) {
        let record = record(verified, bad);
        let text = serde_json::to_string(&record).unwrap();
        prop_assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}
