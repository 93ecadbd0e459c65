//! Times as text, RFC 3339: what people and other programs write, as milliseconds since the Unix epoch.

const DAY_SECS: i64 = 86_400;
/// The last second of the year 9999: later ones have no four digits.
const LAST_SECS: i64 = 253_402_300_799;

/// Milliseconds since the Unix epoch of `text`, as `2026-11-23T04:10:00Z` or `2026-11-23T05:10:00.5+01:00`. Parts of a
/// millisecond are cut off. `None` if it is no date-time of RFC 3339, section 5.6.
pub fn parse_ms(text: &str) -> Option<i64> {
    let bytes = text.as_bytes();
    let (head, rest) = bytes.split_at_checked(19)?;
    let at = |index: usize, wanted: &[u8]| head.get(index).is_some_and(|byte| wanted.contains(byte));
    if !(at(4, b"-") && at(7, b"-") && at(10, b"Tt") && at(13, b":") && at(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(&head[..4])?, number(&head[5..7])?, number(&head[8..10])?);
    let (hour, minute, second) = (number(&head[11..13])?, number(&head[14..16])?, number(&head[17..19])?);
    // A leap second is the first one of the next minute.
    let exists = (1..=12).contains(&month)
        && (1..=days_of(year, month)).contains(&day)
        && hour <= 23
        && minute <= 59
        && second <= 60;
    if !exists {
        return None;
    }
    let (millis, zone) = fraction(rest)?;
    let secs = days_from_civil(year, month, day) * DAY_SECS + hour * 3_600 + minute * 60 + second;
    Some((secs - offset_secs(zone)?) * 1_000 + millis)
}

/// `ms` since the Unix epoch as `2026-11-23T04:10:00.000Z`; what is before the year 0 or after 9999 becomes the first
/// or last that can be written.
pub fn format_ms(ms: i64) -> String {
    let first = days_from_civil(0, 1, 1) * DAY_SECS;
    let secs = ms.div_euclid(1_000).clamp(first, LAST_SECS);
    let (year, month, day) = civil_from_days(secs.div_euclid(DAY_SECS));
    let of_day = secs.rem_euclid(DAY_SECS);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    let millis = ms.rem_euclid(1_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0_i64, |sum, byte| {
        byte.is_ascii_digit().then(|| sum.checked_mul(10)?.checked_add(i64::from(byte - b'0'))).flatten()
    })
}

/// The milliseconds of `.123456`, and what stands behind it.
fn fraction(rest: &[u8]) -> Option<(i64, &[u8])> {
    let Some(digits) = rest.strip_prefix(b".") else { return Some((0, rest)) };
    let len = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !(1..=9).contains(&len) {
        return None;
    }
    let millis = (0..3)
        .fold(0, |sum, place| sum * 10 + digits[..len].get(place).map_or(0, |byte| i64::from(byte - b'0')));
    Some((millis, &digits[len..]))
}

fn offset_secs(zone: &[u8]) -> Option<i64> {
    let (sign, digits) = match zone {
        b"Z" | b"z" => return Some(0),
        [b'+', digits @ ..] => (1, digits),
        [b'-', digits @ ..] => (-1, digits),
        _ => return None,
    };
    if digits.len() != 5 || digits[2] != b':' {
        return None;
    }
    let (hours, minutes) = (number(&digits[..2])?, number(&digits[3..])?);
    (hours <= 23 && minutes <= 59).then_some(sign * (hours * 3_600 + minutes * 60))
}

fn days_of(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01 in the Gregorian calendar, by eras of 400 years that begin in March: Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms".
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year;
    (if month <= 2 { year + 1 } else { year }, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_the_rfc() {
        // Section 5.8; the milliseconds are `date -u -d ... +%s`.
        for (text, ms) in [
            ("1985-04-12T23:20:50.52Z", 482_196_050_520),
            ("1996-12-19T16:39:57-08:00", 851_042_397_000),
            ("1990-12-31T23:59:60Z", 662_688_000_000),
            ("1990-12-31T15:59:60-08:00", 662_688_000_000),
            ("1937-01-01T12:00:27.87+00:20", -1_041_337_172_130),
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29t00:00:00z", 951_782_400_000),
        ] {
            assert_eq!(parse_ms(text), Some(ms), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "2026-11-23",
            "2026-11-23T04:10:00",
            "2026-11-23 04:10:00Z",
            "2026-11-23T04:10:00.Z",
            "2026-11-23T04:10:00.1234567890Z",
            "2026-13-23T04:10:00Z",
            "2026-02-29T04:10:00Z",
            "1900-02-29T04:10:00Z",
            "2026-11-00T04:10:00Z",
            "2026-11-23T24:10:00Z",
            "2026-11-23T04:60:00Z",
            "2026-11-23T04:10:61Z",
            "2026-11-23T04:10:00+1:00",
            "2026-11-23T04:10:00+24:00",
            "2026-11-23T04:10:00+01:00 ",
            "+026-11-23T04:10:00Z",
            "2026-11-23T04:10:00\u{ff3a}",
            "２026-11-23T04:10:00Z",
        ] {
            assert_eq!(parse_ms(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ms in -62_167_219_200_000_i64..=253_402_300_799_999) {
            prop_assert_eq!(parse_ms(&format_ms(ms)), Some(ms));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}", ms in any::<i64>()) {
            let _ = parse_ms(&text);
            prop_assert!(parse_ms(&format_ms(ms)).is_some());
        }
    }
}
