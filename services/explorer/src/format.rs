//! Values as people read them.

use std::fmt::Display;

/// `2026-11-22 18:59:56 UTC`.
pub fn time(ms: i64) -> String {
    let secs = ms.div_euclid(1_000);
    let (days, rest) = (secs.div_euclid(86_400), secs.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Date of a day counted from 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_of_year = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_of_year + 2) / 5 + 1;
    let month = if month_of_year < 10 { month_of_year + 3 } else { month_of_year - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Micro-INFER as INFER with 6 decimals: `1.250000`.
pub fn infer(micro: u64) -> String {
    format!("{}.{:06}", grouped(micro / 1_000_000), micro % 1_000_000)
}

/// `1 234 567` with thin spaces that do not break.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() * 2);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// The two ends of a long hex value: `0x1a2b3c4d…9f8e7d`.
pub fn short(value: &impl Display) -> String {
    let text = value.to_string();
    if text.len() <= 20 || !text.is_ascii() {
        return text;
    }
    format!("{}…{}", &text[..10], &text[text.len() - 6..])
}

/// Millionths as a fraction: `0.987654`.
pub fn millionths(value: u32) -> String {
    format!("{}.{:06}", value / 1_000_000, value % 1_000_000)
}

/// A duration in ms: `850 ms`, `1.25 s`.
pub fn duration(ms: i64) -> String {
    if ms < 1_000 { format!("{ms} ms") } else { format!("{}.{:02} s", ms / 1_000, ms % 1_000 / 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        assert_eq!(time(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(time(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(time(1_795_373_996_123), "2026-11-22 18:59:56 UTC");
        assert_eq!(time(-1), "1969-12-31 23:59:59 UTC");
    }

    #[test]
    fn numbers_and_hashes_are_readable() {
        assert_eq!(infer(1_250_000), "1.250000");
        assert_eq!(infer(7), "0.000007");
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(999), "999");
        assert_eq!(short(&"0x1234567890abcdef1234567890abcdef"), "0x12345678…abcdef");
        assert_eq!(short(&"short"), "short");
        assert_eq!(millionths(987_654), "0.987654");
        assert_eq!(millionths(1_000_000), "1.000000");
        assert_eq!(duration(850), "850 ms");
        assert_eq!(duration(61_256), "61.25 s");
    }
}
