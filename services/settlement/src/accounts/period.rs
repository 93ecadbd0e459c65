//! From when to when, from where on, and how much: what usage and statements are asked with.

use actix_web::{HttpRequest, http::header::ACCEPT};
use infera_protocol::rfc3339;
use infera_runtime::{clock, http::ApiError};
use serde::Deserialize;
use uuid::Uuid;

/// Lines of one answer in JSON at most.
pub const MOST_LINES: u64 = 1_000;
const USUAL_LINES: u64 = 100;
const DAY_MS: i64 = 86_400_000;
/// The longest period of one answer, and what is taken without a `from`.
const MOST_DAYS: i64 = 366;
const USUAL_DAYS: i64 = 30;

/// The query as it comes.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    from: Option<String>,
    to: Option<String>,
    pub model: Option<String>,
    limit: Option<String>,
    cursor: Option<String>,
    format: Option<String>,
}

/// The query, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Period {
    /// Included.
    pub from_ms: i64,
    /// Not included.
    pub to_ms: i64,
    pub limit: u64,
    /// After this line.
    pub after: Option<Place>,
    pub csv: bool,
}

/// A line: its time, then its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub at_ms: i64,
    pub id: Uuid,
}

impl Place {
    /// As `cursor` takes it.
    pub fn cursor(&self) -> String {
        format!("{}.{}", self.at_ms, self.id.simple())
    }

    fn parse(text: &str) -> Option<Self> {
        let (at_ms, id) = text.split_once('.')?;
        Some(Self { at_ms: at_ms.parse().ok()?, id: Uuid::try_parse(id).ok()? })
    }
}

impl Query {
    /// Checks everything.
    ///
    /// # Errors
    /// 400 with the field and the remedy.
    pub fn period(&self, request: &HttpRequest) -> Result<Period, ApiError> {
        let accepts = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
        self.checked(clock::now_ms(), accepts.is_some_and(|value| value.contains("text/csv")))
    }

    fn checked(&self, now_ms: i64, accepts_csv: bool) -> Result<Period, ApiError> {
        // What happens in this very moment belongs to it.
        let to_ms = self.to.as_deref().map_or(Ok(now_ms + 1), |text| time("to", text))?;
        let from_ms =
            self.from.as_deref().map_or(Ok(to_ms - USUAL_DAYS * DAY_MS), |text| time("from", text))?;
        if from_ms >= to_ms {
            return Err(ApiError::bad_request("from", "`from` must be before `to`"));
        }
        if to_ms - from_ms > MOST_DAYS * DAY_MS {
            let message = format!("the period is longer than {MOST_DAYS} days: ask for its parts");
            return Err(ApiError::bad_request("from", message));
        }
        let limit = match self.limit.as_deref() {
            None => USUAL_LINES,
            Some(text) => {
                text.parse().ok().filter(|limit| (1..=MOST_LINES).contains(limit)).ok_or_else(|| {
                    ApiError::bad_request("limit", format!("`limit` must be a number from 1 to {MOST_LINES}"))
                })?
            }
        };
        let place = |text| {
            Place::parse(text)
                .ok_or_else(|| ApiError::bad_request("cursor", "`cursor` must be an answer's `next_cursor`"))
        };
        let csv = match self.format.as_deref() {
            None => accepts_csv,
            Some("csv") => true,
            Some("json") => false,
            Some(_) => return Err(ApiError::bad_request("format", "`format` must be json or csv")),
        };
        Ok(Period { from_ms, to_ms, limit, after: self.cursor.as_deref().map(place).transpose()?, csv })
    }
}

/// A time as ms since 1970 or as RFC 3339; a date alone is its midnight in UTC.
fn time(field: &'static str, text: &str) -> Result<i64, ApiError> {
    // Far from where sums overflow: the year 9999 is the last that RFC 3339 has.
    let fits = |ms: &i64| (0..=253_402_300_800_000).contains(ms);
    let midnight = || rfc3339::parse_ms(&format!("{text}T00:00:00Z"));
    text.parse().ok().or_else(|| rfc3339::parse_ms(text)).or_else(midnight).filter(fits).ok_or_else(|| {
        let message = format!(
            "`{field}` must be ms since 1970 or a time such as 2026-11-23T08:00:00Z (RFC 3339; write + as %2B)"
        );
        ApiError::bad_request(field, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ms_or_rfc_3339() {
        let same = [
            ("0", 0),
            ("1795334400000", 1_795_334_400_000),
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29", 951_782_400_000),
            ("2026-11-23T08:00:00Z", 1_795_420_800_000),
            ("2026-11-23t08:00:00.5z", 1_795_420_800_500),
            ("2026-11-23T09:30:00.123456+01:30", 1_795_420_800_123),
            ("2026-11-22T20:00:00-12:00", 1_795_420_800_000),
        ];
        for (text, ms) in same {
            assert_eq!(time("from", text), Ok(ms), "{text}");
        }
        let refused = [
            "",
            "yesterday",
            "-1",
            "2026-13-01",
            "2026-02-29",
            "1900-02-29",
            "2026-11-23T08:00",
            "2026-11-23T24:00:00Z",
            "2026-11-23T08:00:00",
            "2026-11-23 08:00:00Z",
            "2026-11-23T08:00:00.Z",
            "2026-11-23T08:00:00+1:00",
            "99999999999999999",
            "2026/11/23",
            "2026-11-23T08:00:00Z ",
            "२०२६-11-23",
        ];
        for text in refused {
            let error = time("from", text).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("from"), "{text}");
        }
    }

    #[test]
    fn a_query_has_limits() {
        let query = |text: &str| parse(text).checked(1_795_420_800_000, false);
        let usual = query("").unwrap();
        assert_eq!((usual.limit, usual.to_ms - usual.from_ms, usual.csv), (100, 30 * DAY_MS, false));
        let place = Place { at_ms: 7, id: Uuid::from_u128(9) };
        assert_eq!(query(&format!("cursor={}", place.cursor())).unwrap().after, Some(place));
        assert!(query("format=csv").unwrap().csv);
        assert_eq!(query("limit=1000").unwrap().limit, 1_000);
        for (text, field) in [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit=-1", "limit"),
            ("limit=many", "limit"),
            ("from=5&to=5", "from"),
            ("from=0&to=1795420800000", "from"),
            ("to=never", "to"),
            ("cursor=1", "cursor"),
            ("cursor=1.2", "cursor"),
            ("format=xml", "format"),
        ] {
            assert_eq!(query(text).unwrap_err().param.as_deref(), Some(field), "{text}");
        }
    }

    fn parse(text: &str) -> Query {
        actix_web::web::Query::<Query>::from_query(text).unwrap().into_inner()
    }
}
