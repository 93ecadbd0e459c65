//! The adapter for Redis.

use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncCommands, Client, RedisError, Script};

use super::KvError;

const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(2);
/// Attempts to connect again, with growing pauses, before a call fails.
const RETRIES: usize = 3;

/// Counts and sets the time to live in one step: a client that dies between two would leave a counter
/// that never ends.
const INCR: &str = r"
local count = redis.call('INCRBY', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return count";

#[derive(Clone)]
pub(super) struct Redis {
    connection: ConnectionManager,
    incr: Script,
}

impl Redis {
    pub(super) async fn connect(url: &str) -> Result<Self, KvError> {
        let unreachable = |error: &RedisError| {
            let url = crate::db::redact(url);
            KvError::Unreachable(format!("{url}: {error}; is Redis running, and is kv_url right?"))
        };
        let client = Client::open(url).map_err(|error| unreachable(&error))?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(ANSWER))
            .set_number_of_retries(RETRIES)
            .set_max_delay(Duration::from_secs(1));
        let connection =
            ConnectionManager::new_with_config(client, config).await.map_err(|error| unreachable(&error))?;
        Ok(Self { connection, incr: Script::new(INCR) })
    }

    pub(super) async fn incr(&self, key: &str, by: i64, ttl: Duration) -> Result<u64, KvError> {
        let mut connection = self.connection.clone();
        let count: i64 = self
            .incr
            .key(key)
            .arg(by)
            .arg(millis(ttl))
            .invoke_async(&mut connection)
            .await
            .map_err(|error| failure(&error))?;
        u64::try_from(count).map_err(|_| KvError::NotACounter)
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
        self.connection.clone().get(key).await.map_err(|error| failure(&error))
    }

    pub(super) async fn set(&self, key: &str, value: &[u8], ttl: Duration) -> Result<(), KvError> {
        self.connection.clone().pset_ex(key, value, millis(ttl)).await.map_err(|error| failure(&error))
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), KvError> {
        self.connection.clone().del(key).await.map_err(|error| failure(&error))
    }

    pub(super) async fn ping(&self) -> Result<(), KvError> {
        redis::cmd("PING").query_async(&mut self.connection.clone()).await.map_err(|error| failure(&error))
    }
}

/// Redis takes an i64 of milliseconds.
fn millis(ttl: Duration) -> u64 {
    let ten_years = 10 * 365 * 24 * 3600 * 1000;
    u64::try_from(ttl.as_millis()).unwrap_or(ten_years).min(ten_years)
}

fn failure(error: &RedisError) -> KvError {
    let text = error.to_string();
    if text.contains("not an integer") || text.contains("overflow") || text.contains("WRONGTYPE") {
        KvError::NotACounter
    } else {
        KvError::Unreachable(text)
    }
}
