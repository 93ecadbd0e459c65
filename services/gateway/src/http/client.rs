//! Where a request comes from, and how often that address may ask for what costs us and not them.

use std::net::IpAddr;
use std::time::Duration;

use actix_web::HttpRequest;
use infera_runtime::clock;
use infera_runtime::http::ApiError;

use crate::app::App;

/// Counts one request of `who` for `what` in the current minute. Unlike the quota of keys this is refused where it
/// cannot be counted.
pub(super) async fn limit(app: &App, what: &str, who: &str, per_minute: u64) -> Result<(), ApiError> {
    let now = clock::now_secs();
    let counter = format!("gateway.{what}.{who}.{}", now / 60);
    let count = app.kv.incr(&counter, 1, Duration::from_secs(90)).await.map_err(key_value)?;
    if count <= per_minute {
        return Ok(());
    }
    let message = format!("{per_minute} such requests a minute are taken; wait for the next one");
    Err(ApiError::rate_limited(message).retry_after(u64::try_from(60 - now.rem_euclid(60)).unwrap_or(60)))
}

/// A key-value store that does not answer.
pub(super) fn key_value(error: impl std::fmt::Display) -> ApiError {
    tracing::error!(%error, "key-value store failed");
    ApiError::unavailable("the gateway's key-value store does not answer; try again").retry_after(2)
}

/// The client's address as a word: its connection's, or what the proxy in front says where that is trusted.
pub(super) fn address(app: &App, request: &HttpRequest) -> String {
    let forwarded = request.headers().get_all("x-forwarded-for").last().and_then(|value| value.to_str().ok());
    let peer = request.peer_addr().map(|address| address.ip());
    word(forwarded.filter(|_| app.config.trust_forwarded_for), peer)
}

/// What stands last was written by the nearest proxy. IPv6 networks are counted as one: a host has 2^64 addresses.
fn word(forwarded: Option<&str>, peer: Option<IpAddr>) -> String {
    let last = forwarded.and_then(|list| list.rsplit(',').next()).and_then(|text| text.trim().parse().ok());
    match last.or(peer).map(|address: IpAddr| address.to_canonical()) {
        Some(IpAddr::V4(address)) => address.to_string(),
        Some(IpAddr::V6(address)) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::")
        }
        None => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_or_a_network() {
        let peer = || Some("192.0.2.7".parse().unwrap());
        for (forwarded, peer, expected) in [
            (None, peer(), "192.0.2.7"),
            (Some("10.0.0.1, 198.51.100.9"), peer(), "198.51.100.9"),
            (Some("198.51.100.9, nonsense"), peer(), "192.0.2.7"),
            (Some(""), peer(), "192.0.2.7"),
            (Some("2001:db8:1:2:3:4:5:6"), peer(), "2001:db8:1:2::"),
            (None, Some("::ffff:192.0.2.7".parse().unwrap()), "192.0.2.7"),
            (None, None, "unknown"),
        ] {
            assert_eq!(word(forwarded, peer), expected);
        }
    }
}
