use std::task::Poll;

use infera_runtime::db::{self, DbError};
use infera_testkit::{TempDir, cluster, free_port, sqlite_url, unique};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use sea_orm_migration::prelude::*;

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(First)]
    }
}

#[derive(DeriveMigrationName)]
struct First;

#[async_trait::async_trait]
impl MigrationTrait for First {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        db.execute_unprepared("CREATE TABLE parent (id BIGINT PRIMARY KEY)").await?;
        db.execute_unprepared(
            "CREATE TABLE child (id BIGINT PRIMARY KEY, parent BIGINT NOT NULL REFERENCES parent (id))",
        )
        .await?;
        Ok(())
    }
}

async fn number(db: &DatabaseConnection, sql: &str) -> i64 {
    let row =
        db.query_one_raw(sea_orm::Statement::from_string(db.get_database_backend(), sql)).await.unwrap();
    let row = row.expect("a row");
    row.try_get_by_index::<i64>(0).or_else(|_| row.try_get_by_index::<i32>(0).map(i64::from)).unwrap()
}

async fn text(db: &DatabaseConnection, sql: &str) -> String {
    let row =
        db.query_one_raw(sea_orm::Statement::from_string(db.get_database_backend(), sql)).await.unwrap();
    row.expect("a row").try_get_by_index(0).unwrap()
}

/// The same for both: migrations are idempotent, foreign keys are kept, a rollback leaves nothing.
async fn suite(db: &DatabaseConnection) {
    db::migrate::<Migrator>(db).await.unwrap();
    db::migrate::<Migrator>(db).await.unwrap();
    db.execute_unprepared("INSERT INTO parent (id) VALUES (1)").await.unwrap();
    db.execute_unprepared("INSERT INTO child (id, parent) VALUES (1, 1)").await.unwrap();
    db.execute_unprepared("INSERT INTO child (id, parent) VALUES (2, 77)").await.expect_err("no such parent");
    let tx = db.begin().await.unwrap();
    tx.execute_unprepared("INSERT INTO parent (id) VALUES (2)").await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(number(db, "SELECT count(*) FROM parent").await, 1);
}

#[tokio::test]
async fn sqlite_is_durable_and_keeps_its_data() {
    let dir = TempDir::new().unwrap();
    let url = format!("sqlite://{}/a/b/test.db?mode=rwc", dir.path().display());
    let db = db::connect(&url, Some("ignored")).await.unwrap();
    suite(&db).await;
    assert_eq!(text(&db, "PRAGMA journal_mode").await, "wal");
    assert_eq!(number(&db, "PRAGMA synchronous").await, 2, "FULL");
    assert_eq!(number(&db, "PRAGMA foreign_keys").await, 1);
    assert_eq!(number(&db, "PRAGMA busy_timeout").await, 5000);
    db.close().await.unwrap();

    let db = db::connect(&url, None).await.unwrap();
    assert_eq!(number(&db, "SELECT count(*) FROM child").await, 1);
}

#[tokio::test]
async fn a_full_disk_is_one_clear_sentence() {
    let dir = TempDir::new().unwrap();
    let db = db::connect(&sqlite_url(&dir), None).await.unwrap();
    // SQLite answers as on a full disk when the file may not grow.
    db.execute_unprepared("PRAGMA max_page_count = 1").await.unwrap();
    let error = db::migrate::<Migrator>(&db).await.unwrap_err();
    assert!(matches!(error, DbError::DiskFull { .. }), "{error:?}");
    assert!(error.to_string().contains("free some space"), "{error}");
}

#[tokio::test]
async fn postgres_keeps_services_apart_by_schema() {
    let url = &cluster().pg_url;
    let (one, two) = (unique("rt"), unique("rt"));
    // Both at once: the creation of a schema is idempotent under a race, too.
    let (a, a2, b) = tokio::join!(
        db::connect(url, Some(&one)),
        db::connect(url, Some(&one)),
        db::connect(url, Some(&two))
    );
    let (a, a2, b) = (a.unwrap(), a2.unwrap(), b.unwrap());
    suite(&a).await;
    suite(&b).await;
    assert_eq!(number(&a2, "SELECT count(*) FROM parent").await, 1);
    for db in [&a, &b] {
        assert!([&one, &two].contains(&&text(db, "SELECT current_schema()::text").await));
    }
    for schema in [one, two] {
        a2.execute_unprepared(&format!("DROP SCHEMA {schema} CASCADE")).await.unwrap();
    }
}

#[tokio::test]
async fn replicas_that_start_together_migrate_once() {
    let url = &cluster().pg_url;
    let schema = unique("rt");
    let replicas =
        futures::future::join_all((0..6).map(|_| async { db::connect(url, Some(&schema)).await.unwrap() }))
            .await;
    let migrated = futures::future::join_all(replicas.iter().map(db::migrate::<Migrator>)).await;
    for result in migrated {
        result.unwrap();
    }
    suite(&replicas[0]).await;
    assert_eq!(number(&replicas[1], "SELECT count(*) FROM seaql_migrations").await, 1);
    replicas[0].execute_unprepared(&format!("DROP SCHEMA {schema} CASCADE")).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_reached_is_named_without_its_password() {
    let url = format!("postgres://user:hunter2@127.0.0.1:{}/db", free_port());
    let error = db::connect(&url, Some("x")).await.unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("127.0.0.1"), "{error}");
    assert!(error.contains("refused") && !error.contains("hunter2"), "{error}");

    let error = db::connect("mysql://user:hunter2@h/db", None).await.unwrap_err();
    assert!(matches!(error, DbError::Url { .. }));
    assert!(!error.to_string().contains("hunter2"), "{error}");

    let error = db::connect(&url, Some("a; drop schema b")).await.unwrap_err();
    assert!(matches!(error, DbError::Schema { .. }), "{error}");

    let error = db::connect("sqlite:///proc/nowhere/x.db?mode=rwc", None).await.unwrap_err();
    assert!(error.to_string().contains("/proc/nowhere"), "{error}");
}

/// Drops `future` when it is woken for the `wakes`th time; false if it was ready before.
async fn left_after<T>(wakes: usize, future: impl Future<Output = T>) -> bool {
    let (mut future, mut seen) = (std::pin::pin!(future), 0);
    std::future::poll_fn(|context| {
        seen += 1;
        if seen > wakes {
            return Poll::Ready(true);
        }
        future.as_mut().poll(context).map(|_| false)
    })
    .await
}

#[tokio::test]
async fn a_transaction_that_nobody_waits_for_leaves_the_pool_as_it_was() {
    let (url, schema) = (&cluster().pg_url, unique("begin"));
    let db = db::connect(url, Some(&schema)).await.unwrap();
    let elsewhere = db::connect(url, Some(&schema)).await.unwrap();
    db::migrate::<Migrator>(&db).await.unwrap();
    let mut left = 0;
    for wakes in 1..=12 {
        left += usize::from(left_after(wakes, db::begin(&db)).await);
        left += usize::from(left_after(wakes, db::begin_snapshot(&db)).await);
        // Over every connection that there is, and more.
        for n in 0..2 * db::POSTGRES_POOL as usize {
            let id = 100 * (wakes + 1) + n;
            db.execute_unprepared(&format!("INSERT INTO parent (id) VALUES ({id})")).await.unwrap();
            let seen = number(&elsewhere, &format!("SELECT count(*) FROM parent WHERE id = {id}")).await;
            assert_eq!(seen, 1, "what is written is there for everybody, left after {wakes} wakes");
        }
    }
    assert!(left > 0, "some were left before they began");
    let tx = db::begin(&db).await.unwrap();
    tx.execute_unprepared("INSERT INTO parent (id) VALUES (1)").await.unwrap();
    drop(tx);
    assert_eq!(number(&db, "SELECT count(*) FROM parent WHERE id = 1").await, 0, "dropped, rolled back");
}
