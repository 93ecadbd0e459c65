//! Short-lived counters and values: quotas, presence, answers that may be forgotten.
//!
//! Two adapters with one behaviour: this process's memory, or Redis. Every entry has a time to live,
//! so nothing stays for ever.

mod memory;
mod redis;

use std::time::Duration;

use memory::Memory;
use redis::Redis;

/// Longest key in bytes.
pub const MAX_KEY: usize = 512;
/// Largest value in bytes.
pub const MAX_VALUE: usize = 1024 * 1024;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// The key is empty or longer than [`MAX_KEY`].
    #[error("a key has 1 to {MAX_KEY} bytes, this one has {0}")]
    Key(usize),
    /// The value is longer than [`MAX_VALUE`].
    #[error("a value has at most {MAX_VALUE} bytes, this one has {0}")]
    Value(usize),
    /// The time to live is less than a millisecond.
    #[error("an entry must live for at least a millisecond")]
    Ttl,
    /// The entry holds something else than a counter, or the counter would overflow an i64.
    #[error("the entry is not a counter or would overflow")]
    NotACounter,
    /// The memory adapter holds as many entries as it may.
    #[error("the key-value store is full: {0} entries are alive")]
    Full(usize),
    /// Redis does not answer.
    #[error("the key-value store cannot be reached: {0}")]
    Unreachable(String),
}

/// A key-value store; clones share it.
#[derive(Clone)]
pub struct Kv {
    adapter: Adapter,
}

#[derive(Clone)]
enum Adapter {
    Memory(Memory),
    Redis(Redis),
}

impl Kv {
    /// Kept in this process; gone when it ends.
    pub fn memory() -> Self {
        Self { adapter: Adapter::Memory(Memory::default()) }
    }

    /// Kept in Redis (`redis://HOST:PORT/DB`); reconnects by itself. Must be called inside a tokio runtime
    /// that outlives the store.
    ///
    /// # Errors
    /// [`KvError::Unreachable`] when the first connection fails.
    pub async fn redis(url: &str) -> Result<Self, KvError> {
        Ok(Self { adapter: Adapter::Redis(Redis::connect(url).await?) })
    }

    /// Adds `by` to the counter `key` and returns the new value. A new counter starts at 0 and ends after
    /// `ttl`; later calls do not prolong it (a fixed window).
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn incr(&self, key: &str, by: u64, ttl: Duration) -> Result<u64, KvError> {
        check(key, 0)?;
        check_ttl(ttl)?;
        let by = i64::try_from(by).map_err(|_| KvError::NotACounter)?;
        match &self.adapter {
            Adapter::Memory(memory) => memory.incr(key, by, ttl),
            Adapter::Redis(redis) => redis.incr(key, by, ttl).await,
        }
    }

    /// The value of `key`; a counter reads as its decimal digits.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
        check(key, 0)?;
        match &self.adapter {
            Adapter::Memory(memory) => Ok(memory.get(key)),
            Adapter::Redis(redis) => redis.get(key).await,
        }
    }

    /// Sets `key` to `value` for `ttl`, whatever it was.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn set(&self, key: &str, value: impl AsRef<[u8]>, ttl: Duration) -> Result<(), KvError> {
        let value = value.as_ref();
        check(key, value.len())?;
        check_ttl(ttl)?;
        match &self.adapter {
            Adapter::Memory(memory) => memory.set(key, value, ttl),
            Adapter::Redis(redis) => redis.set(key, value, ttl).await,
        }
    }

    /// Removes `key`; a key that is not there is fine.
    ///
    /// # Errors
    /// [`KvError`].
    pub async fn delete(&self, key: &str) -> Result<(), KvError> {
        check(key, 0)?;
        match &self.adapter {
            Adapter::Memory(memory) => {
                memory.delete(key);
                Ok(())
            }
            Adapter::Redis(redis) => redis.delete(key).await,
        }
    }

    /// Asks whether the store answers.
    ///
    /// # Errors
    /// [`KvError::Unreachable`].
    pub async fn ping(&self) -> Result<(), KvError> {
        match &self.adapter {
            Adapter::Memory(_) => Ok(()),
            Adapter::Redis(redis) => redis.ping().await,
        }
    }
}

fn check(key: &str, value_len: usize) -> Result<(), KvError> {
    if key.is_empty() || key.len() > MAX_KEY {
        return Err(KvError::Key(key.len()));
    }
    if value_len > MAX_VALUE {
        return Err(KvError::Value(value_len));
    }
    Ok(())
}

fn check_ttl(ttl: Duration) -> Result<(), KvError> {
    // Redis takes milliseconds, and refuses zero.
    if ttl.as_millis() == 0 { Err(KvError::Ttl) } else { Ok(()) }
}
