//! Ledger postings and batches on the databases that settlement runs on.

use infera_protocol::bytes::Hash32;
use infera_runtime::db;
use infera_settlement::{
    batcher,
    chain::Escrow,
    domain,
    escrow::{self, Freshness, spend},
    ledger,
    store::{
        Migrator, escrows,
        requests::{self, NewRequest, ReceiptRow},
    },
};
use infera_testkit::{TempDir, cluster, sqlite_url, unique};
use sea_orm::{DatabaseConnection, DatabaseTransaction, TransactionTrait};
use std::time::Instant;
use uuid::Uuid;

use crate::{Args, Report, per_second, receipts, said};

/// Clients that post to PostgreSQL at once, each for accounts of its own.
const CLIENTS: u32 = 8;
const CREDIT: u64 = 1_000_000_000_000;

async fn ready(url: &str, schema: Option<&str>) -> Result<DatabaseConnection, String> {
    let db = db::connect(url, schema).await.map_err(said)?;
    db::migrate::<Migrator>(&db).await.map_err(said)?;
    Ok(db)
}

pub async fn run(args: &Args, report: &mut Report) -> Result<(), String> {
    let dir = TempDir::new().map_err(said)?;
    let sqlite = ready(&sqlite_url(&dir), None).await?;
    let postgres = ready(&cluster().pg_url, Some(&unique("bench"))).await?;
    let (mut one, mut two, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..args.rounds {
        one.push(posted(&sqlite, round, 0, args.postings).await?);
        two.push(posted(&postgres, round, 0, args.postings).await?);
        many.push(crowd(&postgres, round, args.postings).await?);
    }
    let count = args.postings;
    report.add("postings_per_s_sqlite", "transfers/s", per_second(count, one), None);
    report.add("postings_per_s_postgres", "transfers/s", per_second(count, two), None);
    for (metric, db) in [("escrow_per_s_sqlite", &sqlite), ("escrow_per_s_postgres", &postgres)] {
        let mut secs = Vec::new();
        for round in 0..args.rounds {
            secs.push(spent(db, round, count).await?);
        }
        report.add(metric, "transfers/s", per_second(count, secs), None);
    }
    report.add("postings_per_s_postgres_c8", "transfers/s", per_second(count, many), None);
    for (metric, db) in [("formed_per_s_sqlite", &sqlite), ("formed_per_s_postgres", &postgres)] {
        let secs = formed(db, args).await?;
        report.add(metric, "receipts/s", per_second(args.receipts, secs), None);
    }
    Ok(())
}

/// Seconds for `count` transfers, each in a transaction of its own as settlement posts them: a request is opened and its
/// hold posted, then it is released again.
async fn posted(db: &DatabaseConnection, round: u32, client: u32, count: u32) -> Result<f64, String> {
    let account = format!("bench-{client}");
    let space = (u128::from(round) << 96) | (u128::from(client) << 64);
    let tx = db.begin().await.map_err(said)?;
    let credit = Uuid::from_u128((1 << 127) | space);
    ledger::credit(&tx, credit, &account, CREDIT, 1).await.map_err(said)?;
    tx.commit().await.map_err(said)?;
    let began = Instant::now();
    for n in 0..count / 2 {
        let id = Uuid::from_u128(space | u128::from(n + 1));
        let tx = db.begin().await.map_err(said)?;
        open(&tx, id, &account).await?;
        let hold = domain::hold_transfer(id, &account, 600).map_err(said)?;
        ledger::post(&tx, &hold, 1).await.map_err(said)?;
        tx.commit().await.map_err(said)?;
        let tx = db.begin().await.map_err(said)?;
        let (state, code, message) = (domain::State::Released, "bench", "");
        let close = requests::Close { state, charged_micro: 0, code, message };
        requests::close(&tx, id, &close, 1).await.map_err(said)?;
        let release = domain::release_transfer(id, &account, 600).map_err(said)?;
        ledger::post(&tx, &release, 1).await.map_err(said)?;
        tx.commit().await.map_err(said)?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// The same for a wallet's escrow: limits looked at, held, released.
async fn spent(db: &DatabaseConnection, round: u32, count: u32) -> Result<f64, String> {
    let address = infera_protocol::bytes::Address([0xe0 ^ u8::try_from(round).map_err(said)?; 20]);
    let account = address.to_string();
    let freshness = Freshness::new(60, 60);
    freshness.looked(i64::MAX);
    freshness.delayed(86_400);
    let tx = db.begin().await.map_err(said)?;
    escrows::mark(&tx, [&address]).await.map_err(said)?;
    let state = Escrow { escrow: CREDIT.into(), authorized: CREDIT.into(), ..Escrow::default() };
    escrow::settle(&tx, &address, &state, 1, 1).await.map_err(said)?;
    tx.commit().await.map_err(said)?;
    let began = Instant::now();
    for n in 0..count / 2 {
        let id = Uuid::from_u128((7 << 124) | (u128::from(round) << 96) | u128::from(n + 1));
        let tx = db.begin().await.map_err(said)?;
        open(&tx, id, &account).await?;
        let held = spend::hold(&tx, id, &account, 600, &freshness, 0, 1).await.map_err(said)?;
        held.map_err(|rejection| rejection.message)?;
        tx.commit().await.map_err(said)?;
        let tx = db.begin().await.map_err(said)?;
        let row = requests::find(&tx, id).await.map_err(said)?.ok_or("no request")?;
        let (state, code, message) = (domain::State::Released, "bench", "");
        let close = requests::Close { state, charged_micro: 0, code, message };
        requests::close(&tx, id, &close, 1).await.map_err(said)?;
        let hold = spend::take(&tx, &row).await.map_err(said)?;
        let release = domain::release_transfer(id, &account, hold).map_err(said)?;
        ledger::post(&tx, &release, 1).await.map_err(said)?;
        tx.commit().await.map_err(said)?;
    }
    Ok(began.elapsed().as_secs_f64())
}

async fn open(tx: &DatabaseTransaction, id: Uuid, account: &str) -> Result<(), String> {
    let new = NewRequest {
        id,
        account,
        model: "m",
        request_hash: Hash32::ZERO,
        k: 3,
        calibration_hash: Hash32::ZERO,
        price_micro: 1,
        held_micro: 600,
        deadline_ms: 0,
        prompt_tokens: 0,
        submitted_at_ms: 0,
    };
    requests::open(tx, &new, 1).await.map_err(said).map(drop)
}

async fn crowd(db: &DatabaseConnection, round: u32, count: u32) -> Result<f64, String> {
    let began = Instant::now();
    let clients = (1..=CLIENTS).map(|client| posted(db, round, client, count / CLIENTS));
    futures::future::try_join_all(clients).await?;
    Ok(began.elapsed().as_secs_f64())
}

/// Seconds in which a batch is formed out of a journal of receipts, each round anew.
async fn formed(db: &DatabaseConnection, args: &Args) -> Result<Vec<f64>, String> {
    let receipts = receipts::some(args.receipts);
    let mut secs = Vec::new();
    for round in 0..args.rounds {
        let tx = db.begin().await.map_err(said)?;
        for (n, receipt) in receipts.iter().enumerate() {
            let row = ReceiptRow {
                request_id: Uuid::from_u128((u128::from(round + 1) << 80) | n as u128),
                account: "bench".into(),
                receipt: serde_json::to_vec(receipt).map_err(said)?,
                evidence: Vec::new(),
            };
            let leaf = receipt.leaf().to_vec();
            requests::add_receipt(&tx, row, leaf, i64::from(round)).await.map_err(said)?;
        }
        tx.commit().await.map_err(said)?;
        let began = Instant::now();
        let tx = db.begin().await.map_err(said)?;
        let batch = batcher::fill(&tx, u64::from(args.receipts)).await.map_err(said)?;
        tx.commit().await.map_err(said)?;
        secs.push(began.elapsed().as_secs_f64());
        match batch {
            Some(batch) if batch.count == u64::from(args.receipts) => {}
            other => return Err(format!("the batch is {other:?}")),
        }
    }
    Ok(secs)
}
