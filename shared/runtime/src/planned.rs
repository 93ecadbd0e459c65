//! Planned failures: tests name a point in the code and say what happens there.
//!
//! `INFERA_FAIL="outbox.Verdict.after_publish=abort@2;gateway.answer=delay:500"`: the second time the
//! first point is passed, the process aborts (as `kill -9` would: nothing is flushed); each time
//! the second is passed, it waits 500 ms.
//!
//! `INFERA_FAIL="*=once:/folder"`: every point that has a file of its name in the folder aborts, and its
//! file is removed first, so that each point of a whole network fails exactly once.
//!
//! Unset, a point costs one relaxed atomic load.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Name of the environment variable that holds the plan.
pub const ENV: &str = "INFERA_FAIL";

const UNREAD: u8 = 0;
const OFF: u8 = 1;
const ON: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(UNREAD);
static PLAN: OnceLock<Plan> = OnceLock::new();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Abort { at: u64 },
    Delay(Duration),
}

#[derive(Debug, Default)]
struct Plan {
    actions: HashMap<String, Action>,
    once: Option<PathBuf>,
    hits: Mutex<HashMap<String, u64>>,
}

/// Passes the point `name`: does nothing unless the plan names it. A delay blocks the thread; in
/// async code that must not, use [`pause`].
pub fn hit(name: &str) {
    if let Some(delay) = pass(name) {
        std::thread::sleep(delay);
    }
}

/// Passes the point `name` in async code: as [`hit`], but a delay yields the thread to other tasks.
pub async fn pause(name: &str) {
    if let Some(delay) = pass(name) {
        tokio::time::sleep(delay).await;
    }
}

/// Checks the plan in the environment. Call it at start so that a typing error is a clear sentence
/// and not a test that never fails.
///
/// # Errors
/// A sentence that names the entry and the form that is expected.
pub fn check() -> Result<(), String> {
    parse(&std::env::var(ENV).unwrap_or_default()).map(drop)
}

fn pass(name: &str) -> Option<Duration> {
    match STATE.load(Ordering::Relaxed) {
        OFF => return None,
        UNREAD if !read_env() => return None,
        _ => {}
    }
    match PLAN.get()?.pass(name)? {
        Action::Abort { .. } => {
            tracing::error!(point = name, "planned failure: aborting");
            std::process::abort()
        }
        Action::Delay(delay) => Some(delay),
    }
}

fn read_env() -> bool {
    let plan = PLAN.get_or_init(|| {
        parse(&std::env::var(ENV).unwrap_or_default()).unwrap_or_else(|error| {
            tracing::error!(%error, "the plan of failures is ignored");
            Plan::default()
        })
    });
    let on = !plan.actions.is_empty() || plan.once.is_some();
    STATE.store(if on { ON } else { OFF }, Ordering::Relaxed);
    on
}

impl Plan {
    /// Counts the pass and says what is due at it.
    fn pass(&self, name: &str) -> Option<Action> {
        if self.once.as_ref().is_some_and(|folder| std::fs::remove_file(folder.join(name)).is_ok()) {
            return Some(Action::Abort { at: 1 });
        }
        let action = *self.actions.get(name)?;
        let mut hits = self.hits.lock().unwrap_or_else(PoisonError::into_inner);
        let count = hits.entry(name.to_owned()).or_insert(0);
        *count += 1;
        match action {
            Action::Abort { at } => (*count == at).then_some(action),
            Action::Delay(_) => Some(action),
        }
    }
}

fn parse(text: &str) -> Result<Plan, String> {
    let mut plan = Plan::default();
    for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
        if let Some(folder) = entry.strip_prefix("*=once:").filter(|folder| !folder.is_empty()) {
            plan.once = Some(PathBuf::from(folder));
            continue;
        }
        let (name, action) = entry
            .split_once('=')
            .and_then(|(name, action)| Some((name.trim(), action_of(action.trim())?)))
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| {
                format!(
                    "{ENV}: cannot read `{entry}`; use `point=abort`, `point=abort@2`, `point=delay:500` or `*=once:FOLDER`"
                )
            })?;
        plan.actions.insert(name.to_owned(), action);
    }
    Ok(plan)
}

fn action_of(text: &str) -> Option<Action> {
    if let Some(ms) = text.strip_prefix("delay:") {
        return ms.parse().ok().map(|ms| Action::Delay(Duration::from_millis(ms)));
    }
    let at = match text.strip_prefix("abort")? {
        "" => 1,
        rest => rest.strip_prefix('@')?.parse().ok()?,
    };
    (at > 0).then_some(Action::Abort { at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abort_is_due_at_its_hit_only_and_delay_at_every_one() {
        let plan = parse("a.b=abort@2; c=delay:7 ;d=abort").unwrap();
        assert_eq!(plan.pass("a.b"), None);
        assert_eq!(plan.pass("a.b"), Some(Action::Abort { at: 2 }));
        assert_eq!(plan.pass("a.b"), None);
        assert_eq!(plan.pass("c"), Some(Action::Delay(Duration::from_millis(7))));
        assert_eq!(plan.pass("c"), Some(Action::Delay(Duration::from_millis(7))));
        assert_eq!(plan.pass("d"), Some(Action::Abort { at: 1 }));
        assert_eq!(plan.pass("unknown"), None);
    }

    #[test]
    fn a_point_with_a_file_is_due_once() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.b"), "").unwrap();
        let plan = parse(&format!("*=once:{}", folder.path().display())).unwrap();
        assert_eq!(plan.pass("c"), None);
        assert_eq!(plan.pass("a.b"), Some(Action::Abort { at: 1 }));
        assert_eq!(plan.pass("a.b"), None);
        assert!(!folder.path().join("a.b").exists());
    }

    #[test]
    fn nonsense_names_the_entry() {
        for text in
            ["a", "a=", "=abort", "a=abort@0", "a=abort@x", "a=delay:", "a=delay:-1", "a=abortion", "*=once:"]
        {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
        assert!(parse("").unwrap().actions.is_empty());
    }
}
