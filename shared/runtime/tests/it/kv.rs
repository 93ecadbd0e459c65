use std::time::Duration;

use infera_runtime::kv::{Kv, KvError, MAX_KEY, MAX_VALUE};
use infera_testkit::{Process, TempDir, cluster, eventually, free_port, unique};

use crate::DEADLINE;

const HOUR: Duration = Duration::from_secs(3600);

/// What both adapters promise.
async fn suite(kv: &Kv) {
    kv.ping().await.unwrap();
    counters(kv).await;
    values(kv).await;
    ends(kv).await;
    refusals(kv).await;
}

async fn counters(kv: &Kv) {
    let key = unique("count");
    assert_eq!(kv.incr(&key, 3, HOUR).await.unwrap(), 3);
    assert_eq!(kv.incr(&key, 0, HOUR).await.unwrap(), 3);
    assert_eq!(kv.get(&key).await.unwrap().as_deref(), Some(b"3".as_slice()));

    let key = unique("race");
    let tasks: Vec<_> = (0..50)
        .map(|_| {
            let (kv, key) = (kv.clone(), key.clone());
            tokio::spawn(async move { kv.incr(&key, 2, HOUR).await.unwrap() })
        })
        .collect();
    let mut seen = Vec::new();
    for task in tasks {
        seen.push(task.await.unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (1..=50).map(|n| n * 2).collect::<Vec<u64>>(), "no count is lost or seen twice");
}

async fn values(kv: &Kv) {
    let key = unique("value");
    assert_eq!(kv.get(&key).await.unwrap(), None);
    let bytes = [0u8, 255, 10, 13, 0];
    kv.set(&key, bytes, HOUR).await.unwrap();
    assert_eq!(kv.get(&key).await.unwrap().as_deref(), Some(bytes.as_slice()));
    kv.set(&key, b"", HOUR).await.unwrap();
    assert_eq!(kv.get(&key).await.unwrap().as_deref(), Some(b"".as_slice()));
    kv.delete(&key).await.unwrap();
    kv.delete(&key).await.unwrap();
    assert_eq!(kv.get(&key).await.unwrap(), None);
    assert_eq!(kv.incr(&key, 1, HOUR).await.unwrap(), 1);
}

async fn ends(kv: &Kv) {
    let short = Duration::from_millis(300);
    let key = unique("short");
    kv.set(&key, b"x", short).await.unwrap();
    eventually(DEADLINE, async || kv.get(&key).await.unwrap().is_none()).await;

    // Were the time to live prolonged by each count, the window would never end under this poll.
    let key = unique("window");
    assert_eq!(kv.incr(&key, 1, short).await.unwrap(), 1);
    eventually(DEADLINE, async || kv.incr(&key, 1, short).await.unwrap() == 1).await;

    // A value that is set again lives for its new time.
    let key = unique("again");
    kv.set(&key, b"x", short).await.unwrap();
    kv.set(&key, b"y", HOUR).await.unwrap();
    let witness = unique("witness");
    kv.set(&witness, b"x", short).await.unwrap();
    eventually(DEADLINE, async || kv.get(&witness).await.unwrap().is_none()).await;
    assert_eq!(kv.get(&key).await.unwrap().as_deref(), Some(b"y".as_slice()));
}

async fn refusals(kv: &Kv) {
    let key = unique("bad");
    kv.set(&key, b"words", HOUR).await.unwrap();
    assert!(matches!(kv.incr(&key, 1, HOUR).await, Err(KvError::NotACounter)));
    kv.set(&key, i64::MAX.to_string(), HOUR).await.unwrap();
    assert!(matches!(kv.incr(&key, 1, HOUR).await, Err(KvError::NotACounter)));
    assert_eq!(kv.get(&key).await.unwrap(), Some(i64::MAX.to_string().into_bytes()));
    assert!(matches!(kv.incr(&key, u64::MAX, HOUR).await, Err(KvError::NotACounter)));

    assert!(matches!(kv.get("").await, Err(KvError::Key(0))));
    assert!(matches!(kv.delete(&"k".repeat(MAX_KEY + 1)).await, Err(KvError::Key(_))));
    assert!(matches!(kv.set(&key, vec![0; MAX_VALUE + 1], HOUR).await, Err(KvError::Value(_))));
    assert!(matches!(kv.set(&key, b"", Duration::ZERO).await, Err(KvError::Ttl)));
    assert!(matches!(kv.incr(&key, 1, Duration::from_micros(1)).await, Err(KvError::Ttl)));
    kv.set(&"k".repeat(MAX_KEY), vec![0; MAX_VALUE], Duration::MAX).await.unwrap();
}

#[tokio::test]
async fn memory() {
    suite(&Kv::memory()).await;
}

#[tokio::test]
async fn redis() {
    suite(&Kv::redis(&cluster().redis_url).await.unwrap()).await;
}

#[tokio::test]
async fn memory_is_shared_by_clones_only() {
    let kv = Kv::memory();
    kv.clone().set("k", b"v", HOUR).await.unwrap();
    assert!(kv.get("k").await.unwrap().is_some());
    assert!(Kv::memory().get("k").await.unwrap().is_none());
}

#[tokio::test]
async fn redis_comes_back_after_a_crash() {
    let dir = TempDir::new().unwrap();
    let port = free_port();
    let spec = Process::spec("redis-server", dir.path().join("redis.log"))
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
        .args([std::ffi::OsStr::new("--dir"), dir.path().as_os_str()]);
    let url = format!("redis://:hunter2@127.0.0.1:{port}");
    let error = Kv::redis(&url).await.err().expect("nobody listens").to_string();
    assert!(error.contains("127.0.0.1") && error.contains("kv_url") && !error.contains("hunter2"), "{error}");

    let url = format!("redis://127.0.0.1:{port}");
    let mut server = spec.spawn();
    let kv = eventually(DEADLINE, async || Kv::redis(&url).await.map_err(|error| error.to_string())).await;
    assert_eq!(kv.incr("k", 1, HOUR).await.unwrap(), 1);
    server.kill9();
    assert!(matches!(kv.incr("k", 1, HOUR).await, Err(KvError::Unreachable(_))));
    let _server = spec.spawn();
    eventually(DEADLINE, async || kv.ping().await).await;
    assert_eq!(kv.incr("k", 1, HOUR).await.unwrap(), 1, "it had no disk");
}
