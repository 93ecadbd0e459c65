//! `strftime_now`, which some templates write the day with.

/// A moment as a template may print it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    year: i64,
    month: usize,
    day: i64,
    weekday: usize,
    second: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Moment {
    /// The moment `now_ms` after 1970, UTC. Years -9999 to 9999; anything else is moved to the nearest of them.
    pub(super) fn at(now_ms: i64) -> Self {
        let seconds = now_ms.div_euclid(1000).clamp(-377_705_116_800, 253_402_300_799);
        let days = seconds.div_euclid(86_400);
        // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
        let shifted = days + 719_468;
        let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = (from_march + 2) % 12;
        Self {
            year: era * 400 + year + i64::from(month < 2),
            month: usize::try_from(month).unwrap_or(0),
            day: of_year - (153 * from_march + 2) / 5 + 1,
            weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            second: seconds.rem_euclid(86_400),
        }
    }

    fn directive(self, letter: char) -> Option<String> {
        let (hour, minute) = (self.second / 3600, self.second / 60 % 60);
        let twelve = (hour + 11) % 12 + 1;
        Some(match letter {
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'b' | 'h' => MONTHS[self.month][..3].into(),
            'B' => MONTHS[self.month].into(),
            'm' => format!("{:02}", self.month + 1),
            'y' => format!("{:02}", self.year.rem_euclid(100)),
            'Y' => self.year.to_string(),
            'a' => DAYS[self.weekday][..3].into(),
            'A' => DAYS[self.weekday].into(),
            'H' => format!("{hour:02}"),
            'I' => format!("{twelve:02}"),
            'M' => format!("{minute:02}"),
            'S' => format!("{:02}", self.second % 60),
            'p' => if hour < 12 { "AM" } else { "PM" }.into(),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{hour:02}:{minute:02}:{:02}", self.second % 60),
            'Z' => "UTC".into(),
            '%' => "%".into(),
            _ => return None,
        })
    }

    /// C's strftime, for the directives that templates use; `%-d` drops the leading zero.
    pub(super) fn format(self, pattern: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut letters = pattern.chars();
        while let Some(c) = letters.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut letter = letters.next();
            let bare = letter == Some('-');
            if bare {
                letter = letters.next();
            }
            let text = letter.and_then(|l| self.directive(l));
            let text =
                text.ok_or_else(|| format!("strftime_now does not know a directive in {pattern:?}"))?;
            let short = if bare { text.trim_start_matches(['0', ' ']) } else { &text };
            out.push_str(if short.is_empty() { "0" } else { short });
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::Moment;

    #[test]
    fn days_as_strftime_writes_them() {
        for (ms, pattern, text) in [
            (0, "%d %b %Y %A %H:%M:%S %p", "01 Jan 1970 Thursday 00:00:00 AM"),
            (951_782_400_000, "%d %B %Y, %a", "29 February 2000, Tue"),
            (1_721_952_000_000, "%d %b %Y", "26 Jul 2024"),
            (1_767_225_599_000, "%Y-%m-%d %I:%M:%S %p %F %T", "2025-12-31 11:59:59 PM 2025-12-31 23:59:59"),
            (1_772_668_800_000, "%-d/%-m/%y %e %% %Z", "5/3/26  5 % UTC"),
            (-86_400_000, "%F %A", "1969-12-31 Wednesday"),
        ] {
            let got = Moment::at(ms).format(pattern).unwrap();
            assert_eq!(got, text, "{ms} {pattern}");
        }
        assert!(Moment::at(0).format("%q").is_err());
        assert!(Moment::at(0).format("%").is_err());
        for ms in [i64::MIN, i64::MAX] {
            assert!(Moment::at(ms).format("%F").is_ok());
        }
    }
}
