//! Query strings into validated values. What is wrong is named.

use infera_protocol::document::Status;
use infera_runtime::http::ApiError;

use crate::query::{Cursor, Filter};

/// Receipts of a page.
pub const DEFAULT_LIMIT: u64 = 50;
pub const MAX_LIMIT: u64 = 200;
/// Hits of a search.
pub const DEFAULT_HITS: usize = 10;
pub const MAX_HITS: usize = 100;
/// Longest question, bytes.
pub const MAX_QUESTION_BYTES: usize = 2_000;
/// Longest other value, bytes.
const MAX_VALUE_BYTES: usize = 256;

/// The pairs of a query string. Empty values count as absent, as HTML forms send them.
#[derive(Debug, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// Parses `query`, in which only the names in `known` may stand, each at most once.
    pub fn parse(query: &str, known: &[&str]) -> Result<Self, ApiError> {
        let pairs = actix_web::web::Query::<Vec<(String, String)>>::from_query(query)
            .map_err(|error| {
                ApiError::bad_request(None, format!("the query string cannot be read: {error}"))
            })?
            .into_inner();
        for (index, (name, value)) in pairs.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                let name: String = name.chars().take(64).collect();
                let message = format!("unknown parameter `{name}`; known are {}", known.join(", "));
                return Err(ApiError::bad_request(name.as_str(), message));
            }
            if pairs.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(ApiError::bad_request(name.as_str(), format!("{name} must be given once")));
            }
            let most = if name == "q" { MAX_QUESTION_BYTES } else { MAX_VALUE_BYTES };
            if value.len() > most {
                let message = format!("{name} has {} bytes, at most {most} are accepted", value.len());
                return Err(ApiError::bad_request(name.as_str(), message));
            }
        }
        Ok(Self(pairs.into_iter().filter(|(_, value)| !value.trim().is_empty()).collect()))
    }

    /// A value as it was given, trimmed.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.trim())
    }

    /// A value in its type; `expected` says in words what it must be.
    pub fn get<T: std::str::FromStr>(&self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        self.text(name)
            .map(|value| {
                value.parse().map_err(|_| ApiError::bad_request(name, format!("{name} must be {expected}")))
            })
            .transpose()
    }

    /// The filters of history, exports and pages.
    pub fn filter(&self) -> Result<Filter, ApiError> {
        const MS: &str = "milliseconds since 1970, not negative";
        let time = |name| match self.get::<i64>(name, MS)? {
            Some(ms) if ms < 0 => Err(ApiError::bad_request(name, format!("{name} must be {MS}"))),
            ms => Ok(ms),
        };
        let filter = Filter {
            model: self.text("model").map(str::to_owned),
            operator: self.get("operator", "an address: 0x and 40 lowercase hex digits")?,
            node: self.get("node", "a node id: 0x and 64 lowercase hex digits")?,
            from_ms: time("from_ms")?,
            to_ms: time("to_ms")?,
            status: match self.text("status") {
                None => None,
                Some("pending") => Some(Status::Pending),
                Some("anchored") => Some(Status::Anchored),
                Some(_) => return Err(ApiError::bad_request("status", "status must be pending or anchored")),
            },
        };
        if let (Some(from), Some(to)) = (filter.from_ms, filter.to_ms)
            && to <= from
        {
            return Err(ApiError::bad_request("to_ms", "to_ms must be after from_ms"));
        }
        Ok(filter)
    }

    /// Where a page begins.
    pub fn cursor(&self) -> Result<Option<Cursor>, ApiError> {
        self.get("cursor", "the next_cursor of an earlier page")
    }

    /// How many, 1 to `most`.
    pub fn limit(&self, default: u64, most: u64) -> Result<u64, ApiError> {
        let expected = format!("a whole number from 1 to {most}");
        match self.get::<u64>("limit", &expected)? {
            Some(limit) if !(1..=most).contains(&limit) => {
                Err(ApiError::bad_request("limit", format!("limit must be {expected}")))
            }
            limit => Ok(limit.unwrap_or(default)),
        }
    }

    /// Lowest similarity, -1 to 1.
    pub fn min_score(&self, default: f32) -> Result<f32, ApiError> {
        const EXPECTED: &str = "a number from -1 to 1";
        match self.get::<f32>("min_score", EXPECTED)? {
            Some(score) if !(-1.0..=1.0).contains(&score) => {
                Err(ApiError::bad_request("min_score", format!("min_score must be {EXPECTED}")))
            }
            score => Ok(score.unwrap_or(default)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[&str] =
        &["model", "operator", "node", "from_ms", "to_ms", "status", "cursor", "limit", "min_score"];

    #[test]
    fn what_is_wrong_is_named() {
        let address = format!("0x{}", "ab".repeat(20));
        let wrong = [
            ("surprise=1", "surprise"),
            ("model=a&model=b", "model"),
            ("operator=0x12", "operator"),
            (&format!("operator={}", address.to_uppercase()), "operator"),
            (&format!("node={address}"), "node"),
            ("from_ms=yesterday", "from_ms"),
            ("from_ms=-1", "from_ms"),
            ("from_ms=5&to_ms=5", "to_ms"),
            ("status=lost", "status"),
            ("cursor=5", "cursor"),
            ("limit=0", "limit"),
            ("limit=201", "limit"),
            ("limit=1.5", "limit"),
            ("min_score=2", "min_score"),
            ("min_score=NaN", "min_score"),
            (&format!("model={}", "m".repeat(257)), "model"),
        ];
        for (query, param) in wrong {
            let checked = Params::parse(query, KNOWN).and_then(|params| {
                params.filter()?;
                params.cursor()?;
                params.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
                params.min_score(0.3)
            });
            let error = checked.expect_err(query);
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{query}");
        }
    }

    #[test]
    fn empty_values_are_absent_as_forms_send_them() {
        let params = Params::parse("model=&operator=&status=&from_ms=%20", KNOWN).unwrap();
        assert_eq!(params.filter().unwrap(), Filter::default());
        assert_eq!(params.limit(DEFAULT_LIMIT, MAX_LIMIT).unwrap(), DEFAULT_LIMIT);
    }

    #[test]
    fn a_cursor_survives_its_text() {
        let cursor = Cursor { decided_at_ms: 1_790_000_000_000, id: uuid::Uuid::from_u128(77) };
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
    }
}
