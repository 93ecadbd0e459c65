//! The ledger under random operations in a process that is killed (SIGKILL) again and again: in the end every balance is
//! what a simple model says, and every invariant holds.
//!
//! Every operation follows from the seed and its number, and has ids of its own. So a process that takes over goes on
//! after the last operation that was said to be done; the one that was under way is done again, and must change nothing
//! if it was committed.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use infera_protocol::bytes::{Address, Hash32};
use infera_runtime::db;
use infera_settlement::{
    domain::{self, State},
    ledger::{self, Account, Kind, LedgerError, Transfer},
    store::{
        Migrator,
        requests::{self, Close, NewRequest},
    },
};
use infera_testkit::{TempDir, cluster, unique};
use sea_orm::{DatabaseConnection, TransactionTrait};
use uuid::Uuid;

use crate::{
    random::Random,
    schedules::{eprintln_line, setting},
};

const ACCOUNTS: u64 = 40;
const OPERATORS: u64 = 9;
const CHILD: &str = "INFERA_TEST_BOOKS";

#[derive(Debug, Clone, Copy)]
enum Op {
    Credit {
        account: u64,
        micro: u64,
    },
    Hold {
        account: u64,
        micro: u64,
    },
    /// Settles the hold of an earlier operation: charged in thousandths of it, perhaps more than all.
    Settle {
        request: u64,
        permille: u64,
        operators: u64,
    },
    Release {
        request: u64,
    },
    /// Everything is written and rolled back.
    Abandon {
        account: u64,
        micro: u64,
    },
}

/// Operation `index` of a seed.
fn op(seed: u64, index: u64) -> Op {
    let mut random = Random::new(seed.wrapping_mul(0x0100_0000_01b3) ^ index);
    let (account, micro) = (random.below(ACCOUNTS), random.below(1_000));
    let request = index.saturating_sub(1 + random.below(60));
    match random.below(20) {
        0..=2 => Op::Credit { account, micro: micro * 3 },
        3..=10 => Op::Hold { account, micro },
        11..=15 => Op::Settle { request, permille: random.below(1_200), operators: 1 + random.below(3) },
        16..=18 => Op::Release { request },
        _ => Op::Abandon { account, micro },
    }
}

fn consumer(account: u64) -> String {
    format!("account-{account}")
}

fn operator(request: u64, nth: u64) -> Account {
    Account::Operator(Address([u8::try_from((request + nth) % OPERATORS).unwrap() + 1; 20]))
}

fn id(index: u64) -> Uuid {
    Uuid::from_u128(u128::from(index) + 1)
}

/// What each of `operators` gets of `charge`: the first takes what is left over.
fn shares(charge: u64, operators: u64) -> Vec<u64> {
    let each = charge / operators;
    (0..operators).map(|nth| if nth == 0 { charge - each * (operators - 1) } else { each }).collect()
}

/// The ledger in the simplest form that can be right.
#[derive(Default)]
struct Model {
    balances: BTreeMap<String, i64>,
    /// Open holds: request -> (account, amount).
    open: BTreeMap<u64, (u64, u64)>,
}

impl Model {
    fn add(&mut self, account: &Account, micro: i64) {
        *self.balances.entry(account.name()).or_default() += micro;
    }

    fn balance(&self, account: &Account) -> i64 {
        self.balances.get(&account.name()).copied().unwrap_or(0)
    }

    fn apply(&mut self, index: u64, op: Op) {
        let signed = |micro: u64| i64::try_from(micro).unwrap();
        match op {
            Op::Credit { account, micro } => {
                self.add(&Account::Issuance, -signed(micro));
                self.add(&Account::Consumer(consumer(account)), signed(micro));
            }
            Op::Hold { account, micro } => {
                let of = Account::Consumer(consumer(account));
                if self.balance(&of) >= signed(micro) {
                    self.add(&of, -signed(micro));
                    self.add(&Account::Held(consumer(account)), signed(micro));
                    self.open.insert(index, (account, micro));
                }
            }
            Op::Settle { request, permille, operators } => {
                let Some((account, held)) = self.open.remove(&request) else { return };
                let charge = held * permille / 1_000;
                let paid = charge.min(held);
                self.add(&Account::Held(consumer(account)), -signed(held));
                self.add(&Account::Consumer(consumer(account)), signed(held - paid));
                self.add(&Account::Reserve, -signed(charge - paid));
                for (nth, share) in shares(charge, operators).into_iter().enumerate() {
                    self.add(&operator(request, nth as u64), signed(share));
                }
            }
            Op::Release { request } => {
                let Some((account, held)) = self.open.remove(&request) else { return };
                self.add(&Account::Held(consumer(account)), -signed(held));
                self.add(&Account::Consumer(consumer(account)), signed(held));
            }
            Op::Abandon { .. } => {}
        }
    }
}

async fn hold(db: &DatabaseConnection, index: u64, account: u64, micro: u64, commit: bool) {
    let name = consumer(account);
    let tx = db.begin().await.unwrap();
    let new = NewRequest {
        id: id(index),
        account: &name,
        model: "m",
        request_hash: Hash32::ZERO,
        k: 3,
        calibration_hash: Hash32::ZERO,
        price_micro: 1,
        held_micro: micro,
        deadline_ms: 0,
        prompt_tokens: 0,
        submitted_at_ms: 0,
    };
    if requests::open(&tx, &new, 1).await.unwrap() {
        match ledger::post(&tx, &domain::hold_transfer(id(index), &name, micro).unwrap(), 1).await {
            Ok(_) => {}
            Err(LedgerError::Overdraft { .. }) => {
                let rejection = domain::insufficient(micro, 0);
                assert!(requests::close(&tx, id(index), &Close::rejected(&rejection), 1).await.unwrap());
            }
            Err(error) => panic!("{error}"),
        }
    }
    if commit { tx.commit().await.unwrap() } else { tx.rollback().await.unwrap() }
}

/// Closes the open request `request`; what is not open stays as it is.
async fn close(db: &DatabaseConnection, request: u64, settle: Option<(u64, u64)>) {
    let tx = db.begin().await.unwrap();
    let row = requests::find(&tx, id(request)).await.unwrap();
    let Some(row) = row.filter(|row| row.state == State::Open.name()) else {
        tx.rollback().await.unwrap();
        return;
    };
    let held = u64::try_from(row.held_micro).unwrap();
    let (state, charged_micro, transfer) = match settle {
        None => (State::Released, 0, domain::release_transfer(row.id, &row.account, held).unwrap()),
        Some((permille, operators)) => {
            let charge = held * permille / 1_000;
            let paid = charge.min(held);
            let signed = |micro| ledger::amount(micro).unwrap();
            let transfer_id = infera_protocol::ids::message_id("transfer.close", row.id, 0);
            let mut transfer = Transfer::new(transfer_id, Kind::Settle, Some(row.id))
                .with(&Account::Held(row.account.clone()), -signed(held))
                .with(&Account::Consumer(row.account.clone()), signed(held - paid))
                .with(&Account::Reserve, -signed(charge - paid));
            for (nth, share) in shares(charge, operators).into_iter().enumerate() {
                transfer = transfer.with(&operator(request, nth as u64), signed(share));
            }
            (State::Settled, paid, transfer)
        }
    };
    let closing = Close { state, charged_micro, code: "", message: "" };
    assert!(requests::close(&tx, row.id, &closing, 1).await.unwrap());
    ledger::post(&tx, &transfer, 1).await.unwrap();
    tx.commit().await.unwrap();
}

async fn apply(db: &DatabaseConnection, index: u64, op: Op) {
    match op {
        Op::Credit { account, micro } => {
            let tx = db.begin().await.unwrap();
            let transfer = Uuid::from_u128((1 << 100) + u128::from(index));
            ledger::credit(&tx, transfer, &consumer(account), micro, 1).await.unwrap();
            tx.commit().await.unwrap();
        }
        Op::Hold { account, micro } => hold(db, index, account, micro, true).await,
        Op::Settle { request, permille, operators } => close(db, request, Some((permille, operators))).await,
        Op::Release { request } => close(db, request, None).await,
        Op::Abandon { account, micro } => hold(db, index, account, micro, false).await,
    }
}

/// Not a test by itself: the process that is killed. It does operations from a number on, and says each that is done.
#[test]
fn child_that_keeps_books() {
    let Ok(plan) = std::env::var(CHILD) else { return };
    let parts: Vec<&str> = plan.split('|').collect();
    let number = |at: usize| parts[at].parse::<u64>().unwrap();
    let (seed, from, to, url) = (number(0), number(1), number(2), parts[3]);
    let schema = (!parts[4].is_empty()).then_some(parts[4]);
    runtime().block_on(async {
        let db = db::connect(url, schema).await.unwrap();
        let mut out = std::io::stdout();
        for index in from..to {
            apply(&db, index, op(seed, index)).await;
            writeln!(out, "done {index}").unwrap();
        }
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs a child from operation `from` on and kills it after `patience` of them; returns the first that was not said.
fn run_child(seed: u64, from: u64, to: u64, url: &str, schema: &str, patience: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "books::child_that_keeps_books", "--nocapture"])
        .env(CHILD, format!("{seed}|{from}|{to}|{url}|{schema}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut next = from;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some((_, index)) = line.split_once("done ") else { continue };
        next = index.parse::<u64>().unwrap() + 1;
        if next - from >= patience && next < to {
            child.kill().unwrap();
            break;
        }
    }
    let status = child.wait().unwrap();
    let killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    assert!(killed || (status.success() && next == to), "seed {seed}: the child failed at {next}: {status}");
    next
}

/// `count` operations by `seed`, killed about every `patience` operations; then the books against the model.
fn keep(seed: u64, count: u64, patience: u64, url: &str, schema: &str) {
    let runtime = runtime();
    let connect =
        || async { db::connect(url, Some(schema).filter(|schema| !schema.is_empty())).await.unwrap() };
    runtime.block_on(async {
        let db = connect().await;
        db::migrate::<Migrator>(&db).await.unwrap();
        db.close().await.unwrap();
    });
    let mut random = Random::new(seed);
    let (mut next, mut kills) = (0, 0);
    while next < count {
        next = run_child(seed, next, count, url, schema, 1 + random.below(2 * patience));
        kills += 1;
    }
    let mut model = Model::default();
    (0..count).for_each(|index| model.apply(index, op(seed, index)));
    runtime.block_on(async {
        let db = connect().await;
        let audit = ledger::audit(&db).await.unwrap();
        assert!(audit.ok, "seed {seed}: {audit:?}");
        let accounts = (0..ACCOUNTS)
            .flat_map(|n| [Account::Consumer(consumer(n)), Account::Held(consumer(n))])
            .chain((0..OPERATORS).map(|n| operator(n, 0)))
            .chain([Account::Issuance, Account::Reserve]);
        for account in accounts {
            let balance = ledger::balance(&db, &account).await.unwrap();
            assert_eq!(balance, model.balance(&account), "seed {seed}: {}", account.name());
        }
        eprintln_line(&format!(
            "books of seed {seed}: {count} operations, {} transfers, {} kills, all balances right",
            audit.transfers,
            kills - 1
        ));
        db.close().await.unwrap();
    });
}

fn keep_on_sqlite(seed: u64, count: u64, patience: u64) {
    let memory = std::path::Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { TempDir::new().unwrap() };
    keep(seed, count, patience, &infera_testkit::sqlite_url(&dir), "");
}

fn keep_on_postgres(seed: u64, count: u64, patience: u64) {
    keep(seed, count, patience, &cluster().pg_url, &unique("books"));
}

#[test]
fn kills_leave_the_books_right_on_sqlite() {
    keep_on_sqlite(1, 3_000, 300);
}

#[test]
fn kills_leave_the_books_right_on_postgres() {
    keep_on_postgres(2, 900, 150);
}

/// `make soak`: INFERA_SOAK_OPERATIONS operations from INFERA_SOAK_SEED on, nine of ten on SQLite.
#[test]
#[ignore = "long: make soak"]
fn soak_books() {
    let (seed, count) = (setting("INFERA_SOAK_SEED", 1), setting("INFERA_SOAK_OPERATIONS", 1_000_000));
    std::thread::scope(|threads| {
        threads.spawn(|| keep_on_sqlite(seed, count - count / 10, 5_000));
        threads.spawn(|| keep_on_postgres(seed + 1, count / 10, 1_000));
    });
}
