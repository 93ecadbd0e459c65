//! Usage and statements, as their owner reads them.

use infera_runtime::db;
use infera_settlement::{
    accounts::Place,
    ledger::{self, Account, Kind, Transfer},
    store::{Migrator, usage},
};
use infera_testkit::{TempDir, cluster, sqlite_url, unique};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement, TransactionTrait};
use sea_orm_migration::MigratorTrait;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{escrow::World, random::Random};

/// What the wallet reads of it, in JSON and as CSV.
pub async fn statements(world: &World, ids: &[Uuid]) {
    let key = world.place.key(&world.name());
    let get = async |path: &str| world.service.json(path, Some(&key)).await;
    let usage = get("/v1/usage?from=1999-12-01&to=2000-01-01").await;
    assert_eq!((&usage["totals"]["requests"], &usage["data"]), (&json!(0), &json!([])));
    let usage = get("/v1/usage").await;
    assert_eq!(
        usage["totals"],
        json!({
            "requests": 4, "settled": 3, "prompt_tokens": 40, "completion_tokens": 60, "charged_micro": 360,
        })
    );
    let all = usage["data"].as_array().unwrap().clone();
    assert_eq!(all[0]["state"], "rejected", "the newest first");
    assert_eq!((&all[0]["code"], &all[0]["held_micro"]), (&json!("insufficient_quota"), &json!(0)));
    for one in &all[1..] {
        assert!(ids.iter().any(|id| one["receipt_id"] == json!(id)), "{one}");
        assert_eq!((&one["held_micro"], &one["charged_micro"]), (&json!(600), &json!(120)));
        assert_eq!((&one["submitted_at_ms"], one["batch"].is_i64()), (&json!(1_000), true), "{one}");
    }
    assert_eq!(get("/v1/usage?model=other").await["totals"]["requests"], 0);
    // Page by page it is the same.
    let (mut paged, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = get(&format!("/v1/usage?limit=3{cursor}")).await;
        paged.extend(page["data"].as_array().unwrap().clone());
        assert_eq!(page["totals"]["requests"], 4, "of the whole period");
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(paged, all);
    let (status, csv) = world.service.get("/v1/usage?format=csv", Some(&key)).await;
    let csv = String::from_utf8(csv).unwrap();
    assert_eq!((status, csv.matches("\r\n").count()), (200, 5), "{csv}");
    assert!(csv.starts_with("request_id,model,state,code,prompt_tokens,"), "{csv}");

    let statement = get("/v1/statement").await;
    let lines = statement["data"].as_array().unwrap();
    let kinds: Vec<&str> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    assert_eq!((kinds[0], kinds[1], kinds[kinds.len() - 1]), ("opening", "deposit", "closing"), "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| **kind == "hold").count(), 3);
    assert_eq!(kinds.iter().filter(|kind| **kind == "charge").count(), 3);
    let last = &lines[lines.len() - 1];
    assert_eq!((&last["balance_micro"], &last["held_micro"]), (&json!(1_640), &json!(0)));
    let mut sum = 0;
    for line in lines {
        sum += line["amount_micro"].as_i64().unwrap();
        assert_eq!(line["balance_micro"], sum, "{line}");
    }
    // The next page opens with what the one before closed with.
    let first = get("/v1/statement?limit=3").await;
    let second = get(&format!("/v1/statement?cursor={}", first["next_cursor"].as_str().unwrap())).await;
    assert_eq!(first["data"][4]["kind"], "closing");
    assert_eq!(second["data"][0]["balance_micro"], first["data"][4]["balance_micro"]);
    let rest = second["data"].as_array().unwrap();
    assert_eq!(
        &rest[1..],
        &lines[4..lines.len() - 1].iter().cloned().chain([last_of(rest)]).collect::<Vec<_>>()
    );
    let (status, csv) = world.service.get("/v1/statement?format=csv", Some(&key)).await;
    let csv = String::from_utf8(csv).unwrap();
    assert_eq!((status, csv.matches("\r\n").count()), (200, lines.len() + 1), "{csv}");
    assert!(csv.trim_end().ends_with(",0,0,1640"), "{csv}");
    for path in
        ["/v1/usage?limit=1001", "/v1/usage?from=x", "/v1/statement?to=2&from=3", "/v1/usage?unknown=1"]
    {
        assert_eq!(world.service.get(path, Some(&key)).await.0, 400, "{path}");
    }
    for path in ["/v1/usage", "/v1/statement", "/v1/balance"] {
        assert_eq!(world.service.get(path, None).await.0, 401, "{path}");
    }
    let others = world.service.json("/v1/usage", Some(&world.place.key("alice"))).await;
    assert_eq!(others["totals"]["requests"], 0, "nobody sees another's");
}

/// Some hundred transfers of two accounts at few moments, many at the same.
async fn fill(db: &DatabaseConnection, account: &str) {
    let mut random = Random::new(7);
    let of = |account: &str| {
        let name = || account.to_owned();
        [
            Account::Consumer(name()),
            Account::Escrow(name()),
            Account::EscrowDebt(name()),
            Account::Held(name()),
            Account::EscrowHeld(name()),
        ]
    };
    for n in 0..150_u64 {
        let name = if n % 5 == 0 { "bob" } else { account };
        let mut transfer = Transfer::new(
            Uuid::from_u128((u128::from(random.below(1 << 40)) << 64) | u128::from(n)),
            Kind::Deposit,
            None,
        );
        for part in of(name).iter().filter(|part| !matches!(part, Account::EscrowDebt(_))) {
            let amount = i64::try_from(random.below(3) * 10).unwrap();
            transfer = transfer.moving(&Account::Issuance, part, amount);
        }
        let tx = db.begin().await.unwrap();
        ledger::post(&tx, &transfer, i64::try_from(random.below(12)).unwrap() * 100).await.unwrap();
        tx.commit().await.unwrap();
    }
}

/// Page by page, whatever the pages' size, it is what the whole is, and every page opens with what was there before it.
async fn pages_are_the_whole(db: DatabaseConnection) {
    db::migrate::<Migrator>(&db).await.unwrap();
    let account = crate::wallets::address(0).to_string();
    fill(&db, &account).await;
    let period = (200, 1_000);
    let (all, none) = usage::moved(&db, &account, period, None, 1_000).await.unwrap();
    assert!(none.is_none() && all.len() > 60, "{}", all.len());
    assert!(all.is_sorted_by_key(|one| (one.at_ms, one.id)));
    for limit in [1, 3, 7, 1_000] {
        let (mut paged, mut after) = (Vec::new(), None);
        loop {
            let (page, next) = usage::moved(&db, &account, period, after, limit).await.unwrap();
            paged.extend(page);
            if next.is_none() {
                break;
            }
            after = next;
        }
        assert_eq!(paged, all, "{limit} at a time");
    }
    // The sums of its own entries, by another way.
    let number = async |sql: &str| -> i64 { crate::agreement::number(&db, sql).await };
    let first = Place { at_ms: period.0, id: Uuid::nil() };
    let (mut balance, mut held) = usage::as_of(&db, &account, first, false).await.unwrap();
    let before = format!(
        "SELECT CAST(SUM(amount_micro) AS BIGINT) AS value FROM entries JOIN transfers ON transfers.id = transfer_id \
         WHERE account LIKE '%:{account}' AND transfers.at_ms < 200"
    );
    assert_eq!(balance, number(&before).await);
    for one in &all {
        balance += one.free_micro + one.held_micro;
        held += one.held_micro;
        let place = Place { at_ms: one.at_ms, id: one.id };
        assert_eq!(usage::as_of(&db, &account, place, true).await.unwrap(), (balance, held));
    }
    assert_eq!(
        number(
            "SELECT COUNT(*) AS value FROM entries JOIN transfers ON transfers.id = transfer_id \
             WHERE entries.at_ms <> transfers.at_ms"
        )
        .await,
        0
    );
}

#[tokio::test]
async fn pages_of_a_statement_are_the_whole_sqlite() {
    let dir = TempDir::new().unwrap();
    pages_are_the_whole(db::connect(&sqlite_url(&dir), None).await.unwrap()).await;
}

#[tokio::test]
async fn pages_of_a_statement_are_the_whole_postgres() {
    pages_are_the_whole(db::connect(&cluster().pg_url, Some(&unique("statements"))).await.unwrap()).await;
}

#[tokio::test]
async fn older_entries_get_the_time_of_their_transfer_sqlite() {
    let dir = TempDir::new().unwrap();
    let db = db::connect(&sqlite_url(&dir), None).await.unwrap();
    older_entries_get_the_time_of_their_transfer(&db).await;
    let plan = "EXPLAIN QUERY PLAN SELECT amount_micro FROM entries WHERE account = 'a' AND at_ms >= 1 AND at_ms < 2 \
                AND (at_ms, transfer_id) > (1, x'00') ORDER BY at_ms, transfer_id LIMIT 3";
    let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), plan)).await.unwrap();
    let plan: Vec<String> = rows.iter().map(|row| row.try_get("", "detail").unwrap()).collect();
    assert!(plan.len() == 1 && plan[0].contains("INDEX entries_time (account=? AND at_ms>"), "{plan:?}");
}

#[tokio::test]
async fn older_entries_get_the_time_of_their_transfer_postgres() {
    let db = db::connect(&cluster().pg_url, Some(&unique("statements"))).await.unwrap();
    older_entries_get_the_time_of_their_transfer(&db).await;
    // What a process of the version before would write.
    let old = "INSERT INTO entries (transfer_id, account, amount_micro) \
               VALUES ('00000000-0000-0000-0000-000000000000', 'consumer:alice', 9)";
    let refused = db.execute_unprepared(old).await.unwrap_err().to_string();
    assert!(refused.contains("at_ms"), "{refused}");
}

/// Entries that were written before they had a time have their transfer's, and what is asked about them is found by it.
async fn older_entries_get_the_time_of_their_transfer(db: &DatabaseConnection) {
    let last = u32::try_from(Migrator::migrations().len()).unwrap();
    Migrator::up(db, Some(last - 1)).await.unwrap();
    let is_sqlite = db.get_database_backend() == DbBackend::Sqlite;
    for n in 1..=20_u128 {
        let id = Uuid::from_u128(n);
        let id = if is_sqlite { format!("x'{}'", id.simple()) } else { format!("'{id}'") };
        let others = if n % 2 == 0 { "bob" } else { "issuance" };
        db.execute_unprepared(&format!(
            "INSERT INTO transfers (id, kind, request_id, at_ms) VALUES ({id}, 'credit', NULL, {at_ms}); \
             INSERT INTO entries (transfer_id, account, amount_micro) VALUES ({id}, 'consumer:alice', {n}); \
             INSERT INTO entries (transfer_id, account, amount_micro) VALUES ({id}, 'consumer:{others}', -{n})",
            at_ms = 500 + n
        ))
        .await
        .unwrap();
    }
    // It fails at its last step, leaves nothing half done, and is begun again.
    db.execute_unprepared("DROP INDEX entries_account").await.unwrap();
    db::migrate::<Migrator>(db).await.unwrap_err();
    db.execute_unprepared("CREATE INDEX entries_account ON entries (account)").await.unwrap();
    db::migrate::<Migrator>(db).await.unwrap();
    for (account, n, sign) in [("alice", 7, 1), ("bob", 8, -1)] {
        let at_ms = 500 + n;
        let (moved, _) = usage::moved(db, account, (at_ms, at_ms + 1), None, 10).await.unwrap();
        assert_eq!((moved.len(), moved[0].at_ms, moved[0].free_micro), (1, at_ms, sign * n));
    }
    let (all, _) = usage::moved(db, "alice", (0, 1_000), None, 100).await.unwrap();
    let times: Vec<i64> = all.iter().map(|one| one.at_ms).collect();
    assert_eq!(times, (501..=520).collect::<Vec<_>>());
}

fn last_of(lines: &[Value]) -> Value {
    lines[lines.len() - 1].clone()
}
