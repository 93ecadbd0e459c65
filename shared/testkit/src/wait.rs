//! Polling with a deadline.

use std::panic::Location;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(20);

/// What a poll may answer: `bool`, `Option<T>` or `Result<T, E>`.
pub trait Ready {
    /// What [`eventually`] returns.
    type Value;
    /// The value, or why there is none yet.
    fn ready(self) -> Result<Self::Value, String>;
}

impl Ready for bool {
    type Value = ();
    fn ready(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("still false".to_owned()) }
    }
}

impl<T> Ready for Option<T> {
    type Value = T;
    fn ready(self) -> Result<T, String> {
        self.ok_or_else(|| "still none".to_owned())
    }
}

impl<T, E: std::fmt::Debug> Ready for Result<T, E> {
    type Value = T;
    fn ready(self) -> Result<T, String> {
        self.map_err(|error| format!("{error:?}"))
    }
}

/// Polls until `poll` answers `true`, `Some` or `Ok`, and returns what it holds.
///
/// # Panics
/// When `deadline` is over, with the last answer and the caller's place.
#[track_caller]
pub fn eventually<F, Fut, R>(deadline: Duration, mut poll: F) -> impl Future<Output = R::Value>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = R>,
    R: Ready,
{
    let place = Location::caller();
    async move {
        let start = Instant::now();
        loop {
            match poll().await.ready() {
                Ok(value) => return value,
                Err(last) if start.elapsed() > deadline => {
                    panic!("{place}: nothing after {deadline:?}, the last answer was: {last}")
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}
