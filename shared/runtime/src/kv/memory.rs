//! The adapter that lives in this process.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::KvError;

/// Entries that may be alive at once: about 100 MiB of counters.
const MAX_ENTRIES: usize = 1_000_000;
/// Dead entries are swept each time the map has doubled, and not below this size.
const SWEEP_FLOOR: usize = 1024;
/// An entry may live this long at most: a sum of times must not overflow.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

#[derive(Clone, Default)]
pub(super) struct Memory {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    sweep_at: usize,
}

struct Entry {
    value: Vec<u8>,
    expires: Instant,
}

impl Memory {
    pub(super) fn incr(&self, key: &str, by: i64, ttl: Duration) -> Result<u64, KvError> {
        let mut state = self.state.lock();
        let now = Instant::now();
        if let Some(entry) = state.entries.get_mut(key).filter(|entry| entry.expires > now) {
            let count = std::str::from_utf8(&entry.value)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .and_then(|count| count.checked_add(by))
                .and_then(|count| u64::try_from(count).ok())
                .ok_or(KvError::NotACounter)?;
            entry.value = count.to_string().into_bytes();
            return Ok(count);
        }
        state.insert(key, by.to_string().into_bytes(), ttl, now)?;
        u64::try_from(by).map_err(|_| KvError::NotACounter)
    }

    pub(super) fn get(&self, key: &str) -> Option<Vec<u8>> {
        let state = self.state.lock();
        state.entries.get(key).filter(|entry| entry.expires > Instant::now()).map(|entry| entry.value.clone())
    }

    pub(super) fn set(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), KvError> {
        self.state.lock().insert(key, value.to_vec(), ttl, Instant::now())
    }

    pub(super) fn delete(&self, key: &str) {
        self.state.lock().entries.remove(key);
    }
}

impl State {
    fn insert(&mut self, key: &str, value: Vec<u8>, ttl: Duration, now: Instant) -> Result<(), KvError> {
        if self.entries.len() >= self.sweep_at.max(SWEEP_FLOOR) {
            self.entries.retain(|_, entry| entry.expires > now);
            self.sweep_at = (self.entries.len() * 2).min(MAX_ENTRIES);
        }
        if self.entries.len() >= MAX_ENTRIES && !self.entries.contains_key(key) {
            return Err(KvError::Full(self.entries.len()));
        }
        let expires = now + ttl.min(FOREVER);
        self.entries.insert(key.to_owned(), Entry { value, expires });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_entries_are_swept_and_living_ones_stay() {
        let mut state = State::default();
        let start = Instant::now();
        let later = start + Duration::from_secs(10);
        for n in 0..SWEEP_FLOOR {
            state.insert(&format!("dead-{n}"), vec![], Duration::from_secs(1), start).unwrap();
        }
        state.insert("living", vec![1], Duration::from_secs(60), start).unwrap();
        state.sweep_at = 0;
        state.insert("new", vec![2], Duration::from_secs(1), later).unwrap();
        assert_eq!(state.entries.len(), 2);
        assert!(state.entries.contains_key("living"));
    }
}
