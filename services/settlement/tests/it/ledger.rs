//! The ledger's invariants under random operations.

use std::collections::BTreeMap;

use infera_runtime::db;
use infera_settlement::{
    domain::{self, State},
    ledger::{self, Account, LedgerError, Posted},
    store::{
        Migrator,
        requests::{self, Close, NewRequest},
    },
};
use infera_testkit::{TempDir, cluster, sqlite_url, unique};
use proptest::prelude::*;
use sea_orm::{DatabaseConnection, TransactionTrait};
use uuid::Uuid;

const ACCOUNTS: [&str; 3] = ["alice", "bob", "0xfeed"];

#[derive(Debug, Clone)]
enum Op {
    /// Credit number `id`; the same number again must change nothing.
    Credit {
        id: u8,
        account: usize,
        micro: u64,
    },
    Hold {
        request: u8,
        account: usize,
        micro: u64,
    },
    Release {
        request: u8,
    },
    /// Rolled back after everything was written.
    Abandoned {
        request: u8,
        account: usize,
        micro: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (account, micro) = (0..ACCOUNTS.len(), 0_u64..1_000);
    prop_oneof![
        2 => (0_u8..20, account.clone(), micro.clone()).prop_map(|(id, account, micro)| Op::Credit { id, account, micro }),
        4 => (0_u8..30, account.clone(), micro.clone())
            .prop_map(|(request, account, micro)| Op::Hold { request, account, micro }),
        3 => (0_u8..30).prop_map(|request| Op::Release { request }),
        1 => (0_u8..30, account, micro).prop_map(|(request, account, micro)| Op::Abandoned { request, account, micro }),
    ]
}

/// The ledger in the simplest form that can be right.
#[derive(Default)]
struct Model {
    credits: Vec<u8>,
    available: BTreeMap<usize, u64>,
    /// Request -> (account, amount, open).
    requests: BTreeMap<u8, (usize, u64, bool)>,
}

fn id(request: u8) -> Uuid {
    Uuid::from_u128(u128::from(request) + 1)
}

async fn hold(db: &DatabaseConnection, request: u8, account: usize, micro: u64, commit: bool) -> bool {
    let account = ACCOUNTS[account];
    let tx = db.begin().await.unwrap();
    let new = NewRequest {
        id: id(request),
        account,
        model: "m",
        request_hash: infera_protocol::bytes::Hash32::ZERO,
        k: 3,
        calibration_hash: infera_protocol::bytes::Hash32::ZERO,
        price_micro: 1,
        deadline_ms: 0,
        prompt_tokens: 0,
        submitted_at_ms: 0,
        held_micro: micro,
    };
    if !requests::open(&tx, &new, 1).await.unwrap() {
        return false;
    }
    let held = match ledger::post(&tx, &domain::hold_transfer(id(request), account, micro).unwrap(), 1).await
    {
        Ok(posted) => posted == Posted::Now,
        Err(LedgerError::Overdraft { .. }) => {
            // The transaction goes on.
            let rejection = domain::insufficient(micro, 0);
            assert!(requests::close(&tx, id(request), &Close::rejected(&rejection), 1).await.unwrap());
            false
        }
        Err(error) => panic!("{error}"),
    };
    if commit {
        tx.commit().await.unwrap()
    } else {
        tx.rollback().await.unwrap()
    }
    held
}

async fn apply(db: &DatabaseConnection, model: &mut Model, op: &Op) {
    match *op {
        Op::Credit { id, account, micro } => {
            let tx = db.begin().await.unwrap();
            let transfer = Uuid::from_u128(1_000 + u128::from(id));
            let posted = ledger::credit(&tx, transfer, ACCOUNTS[account], micro, 1).await.unwrap();
            tx.commit().await.unwrap();
            let first = !model.credits.contains(&id);
            assert_eq!(posted == Posted::Now, first);
            if first {
                model.credits.push(id);
                *model.available.entry(account).or_default() += micro;
            }
        }
        Op::Hold { request, account, micro } => {
            let available = model.available.get(&account).copied().unwrap_or(0);
            let expected = !model.requests.contains_key(&request) && available >= micro;
            assert_eq!(hold(db, request, account, micro, true).await, expected, "{op:?}");
            if expected {
                *model.available.entry(account).or_default() -= micro;
            }
            model.requests.entry(request).or_insert((account, micro, expected));
        }
        Op::Release { request } => {
            let Some((account, micro, open)) = model.requests.get_mut(&request) else { return };
            let name = ACCOUNTS[*account];
            let tx = db.begin().await.unwrap();
            let close = Close { state: State::Released, charged_micro: 0, code: "x", message: "y" };
            let closed = requests::close(&tx, id(request), &close, 1).await.unwrap();
            assert_eq!(closed, *open);
            if closed {
                let transfer = domain::release_transfer(id(request), name, *micro).unwrap();
                assert_eq!(ledger::post(&tx, &transfer, 1).await.unwrap(), Posted::Now);
                assert_eq!(ledger::post(&tx, &transfer, 1).await.unwrap(), Posted::Before);
                *model.available.entry(*account).or_default() += *micro;
                *open = false;
            }
            tx.commit().await.unwrap();
        }
        Op::Abandoned { request, account, micro } => {
            hold(db, request, account, micro, false).await;
        }
    }
}

async fn compare(db: &DatabaseConnection, model: &Model) {
    let audit = ledger::audit(db).await.unwrap();
    assert!(audit.ok, "{audit:?}");
    for (index, name) in ACCOUNTS.iter().enumerate() {
        let available = ledger::balance(db, &Account::Consumer((*name).into())).await.unwrap();
        assert_eq!(u64::try_from(available).unwrap(), model.available.get(&index).copied().unwrap_or(0));
    }
    let held: u64 = model.requests.values().filter(|(_, _, open)| *open).map(|(_, micro, _)| micro).sum();
    assert_eq!(u64::try_from(audit.held_micro).unwrap(), held);
    assert_eq!(audit.issuance_micro, -(audit.consumers_micro + audit.held_micro));
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn postgres() -> DatabaseConnection {
    let db = db::connect(&cluster().pg_url, Some(&unique("ledger"))).await.unwrap();
    db::migrate::<Migrator>(&db).await.unwrap();
    db
}

async fn play(db: &DatabaseConnection, ops: &[Op]) {
    let mut model = Model::default();
    for op in ops {
        apply(db, &mut model, op).await;
    }
    compare(db, &model).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_operations_keep_the_books_on_sqlite(ops in proptest::collection::vec(op(), 1..80)) {
        runtime().block_on(async {
            let dir = TempDir::new().unwrap();
            let db = db::connect(&sqlite_url(&dir), None).await.unwrap();
            db::migrate::<Migrator>(&db).await.unwrap();
            play(&db, &ops).await;
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_operations_keep_the_books_on_postgres(ops in proptest::collection::vec(op(), 1..80)) {
        runtime().block_on(async { play(&postgres().await, &ops).await });
    }
}

/// Holds and releases of the same accounts from eight sides: no balance below zero, no transfer lost, no deadlock.
#[test]
fn concurrent_transfers_keep_the_books_on_postgres() {
    runtime().block_on(async {
        let db = postgres().await;
        let tx = db.begin().await.unwrap();
        for (n, account) in ACCOUNTS.iter().enumerate() {
            ledger::credit(&tx, Uuid::from_u128(5_000 + n as u128), account, 1_000, 1).await.unwrap();
        }
        tx.commit().await.unwrap();
        let tasks: Vec<_> = (0..8_u8)
            .map(|side| {
                let db = db.clone();
                tokio::spawn(async move {
                    let mut held = 0;
                    for n in 0..20_u8 {
                        let request = side * 20 + n;
                        let account = usize::from(n) % ACCOUNTS.len();
                        if !hold(&db, request, account, 200, true).await {
                            continue;
                        }
                        held += 1;
                        if n % 2 == 0 {
                            let tx = db.begin().await.unwrap();
                            let close =
                                Close { state: State::Released, charged_micro: 0, code: "", message: "" };
                            assert!(requests::close(&tx, id(request), &close, 1).await.unwrap());
                            let transfer =
                                domain::release_transfer(id(request), ACCOUNTS[account], 200).unwrap();
                            ledger::post(&tx, &transfer, 1).await.unwrap();
                            tx.commit().await.unwrap();
                        }
                    }
                    held
                })
            })
            .collect();
        let mut held = 0;
        for task in tasks {
            held += task.await.unwrap();
        }
        assert!(held >= 15, "each account can hold five at once: {held}");
        let audit = ledger::audit(&db).await.unwrap();
        assert!(audit.ok, "{audit:?}");
        assert_eq!(audit.consumers_micro + audit.held_micro, 3_000);
    });
}
