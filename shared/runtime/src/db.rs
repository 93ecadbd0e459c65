//! One sea-orm connection: SQLite (one file per service) or PostgreSQL (one schema per service).

use std::path::{Path, PathBuf};
use std::time::Duration;

use sea_orm::sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous};
use sea_orm::sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr,
    IsolationLevel, TransactionTrait,
};
use sea_orm_migration::MigratorTrait;

/// Connections in a PostgreSQL pool: eight services of eight stay under PostgreSQL's default of 100.
pub const POSTGRES_POOL: u32 = 8;
const POSTGRES_ACQUIRE: Duration = Duration::from_secs(10);
/// SQLite has one connection, so writers queue for it: longer than any transaction of ours.
const SQLITE_ACQUIRE: Duration = Duration::from_secs(30);
const SQLITE_BUSY: Duration = Duration::from_millis(5000);
/// Between two attempts to open a database that another process is opening.
const SQLITE_PAUSE: Duration = Duration::from_millis(20);
/// How long a replica waits for another one's migrations.
const MIGRATION_TURN: Duration = Duration::from_secs(120);
/// PostgreSQL cuts identifiers after this many bytes.
const MAX_SCHEMA: usize = 63;

/// Why a database cannot be used. Each message is one sentence with a remedy; passwords are left out.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The URL has a form that is not understood.
    #[error(
        "database_url `{url}` is not usable: use sqlite://PATH?mode=rwc or postgres://USER:PASSWORD@HOST/NAME"
    )]
    Url { url: String },
    /// The schema's name would have to be quoted.
    #[error(
        "database_schema `{schema}` is not usable: use up to 63 of a-z, 0-9 and _, not starting with a digit"
    )]
    Schema { schema: String },
    /// The folder of a SQLite file cannot be made.
    #[error("the folder {} for the database cannot be created: {source}", path.display())]
    Folder { path: PathBuf, source: std::io::Error },
    /// No space is left.
    #[error("the disk that holds {url} is full: free some space and start again")]
    DiskFull { url: String },
    /// Nobody answers, or it refuses.
    #[error(
        "the database {url} cannot be reached: {reason}; is it running, and are user and password right?"
    )]
    Unreachable { url: String, reason: String },
    /// A migration failed; the database is as it was before it.
    #[error("the database's tables cannot be brought up to date: {0}")]
    Migrate(DbErr),
}

/// Connects to `url`.
///
/// `sqlite://PATH?mode=rwc`: parent folders are created, WAL, `synchronous=FULL` (a commit survives
/// a power cut), foreign keys on, ONE connection. So never use the connection while a transaction of
/// the same task is open: it would wait for itself. `schema` is ignored.
///
/// `postgres://...`: `schema` is created if missing and becomes the search path; at most
/// [`POSTGRES_POOL`] connections.
///
/// # Errors
/// [`DbError`], one sentence each.
pub async fn connect(url: &str, schema: Option<&str>) -> Result<DatabaseConnection, DbError> {
    if url.starts_with("sqlite:") {
        sqlite(url).await
    } else if url.starts_with("postgres://") {
        postgres(url, schema).await
    } else {
        Err(DbError::Url { url: redact(url) })
    }
}

/// Brings the tables up to date with the migrations of `M`. On PostgreSQL replicas that start together take turns: the
/// others find the first one's work done.
///
/// # Errors
/// [`DbError::Migrate`] or [`DbError::DiskFull`].
pub async fn migrate<M: MigratorTrait>(db: &DatabaseConnection) -> Result<(), DbError> {
    in_turn::<M>(db).await.map_err(|error| {
        if is_disk_full(&error) {
            DbError::DiskFull { url: "the database".to_owned() }
        } else {
            DbError::Migrate(error)
        }
    })
}

async fn in_turn<M: MigratorTrait>(db: &DatabaseConnection) -> Result<(), DbErr> {
    if db.get_database_backend() != DbBackend::Postgres {
        return M::up(db, None).await;
    }
    // The transaction keeps one connection of the pool, and with it the lock; it ends with the process too.
    let turn = db.begin().await?;
    turn.execute_unprepared(&format!("SET LOCAL lock_timeout = '{}s'", MIGRATION_TURN.as_secs())).await?;
    turn.execute_unprepared("SELECT pg_advisory_xact_lock(hashtext('infera.migrate.' || current_schema()))")
        .await?;
    let result = M::up(db, None).await;
    turn.commit().await?;
    result
}

/// Begins a transaction for a task that may be dropped at any await, as an HTTP handler is whose client leaves.
///
/// sqlx 0.9 rolls back only what it counted as begun: a `BEGIN` whose answer nobody waited for leaves the pool a PostgreSQL
/// connection within a transaction, and what is written over that connection afterwards nobody else ever sees. So the
/// `BEGIN` runs to its end on a task of its own. Once begun, a transaction may be dropped: it is rolled back.
///
/// # Errors
/// The database's.
pub async fn begin(db: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    begun(db, None).await
}

/// [`begin`], for reads that must all see one moment. SQLite's transactions always do.
///
/// # Errors
/// The database's.
pub async fn begin_snapshot(db: &DatabaseConnection) -> Result<DatabaseTransaction, DbErr> {
    let postgres = db.get_database_backend() == DbBackend::Postgres;
    begun(db, postgres.then_some(IsolationLevel::RepeatableRead)).await
}

async fn begun(
    db: &DatabaseConnection,
    isolation: Option<IsolationLevel>,
) -> Result<DatabaseTransaction, DbErr> {
    let db = db.clone();
    tokio::spawn(async move { db.begin_with_config(isolation, None).await })
        .await
        .map_err(|error| DbErr::Custom(format!("a transaction was not begun: {error}")))?
}

/// True when `error` says that the disk is full: SQLite's code 13, PostgreSQL's class 53100.
pub fn is_disk_full(error: &DbErr) -> bool {
    says_disk_full(&error.to_string())
}

fn says_disk_full(text: &str) -> bool {
    text.contains("database or disk is full")
        || text.contains("No space left on device")
        || text.contains("53100")
}

async fn sqlite(url: &str) -> Result<DatabaseConnection, DbError> {
    if let Some(parent) = sqlite_path(url).as_deref().and_then(Path::parent) {
        std::fs::create_dir_all(parent).map_err(|source| match source.kind() {
            std::io::ErrorKind::StorageFull => DbError::DiskFull { url: url.to_owned() },
            _ => DbError::Folder { path: parent.to_owned(), source },
        })?;
    }
    let mut options = ConnectOptions::new(url);
    options
        .min_connections(1)
        .max_connections(1)
        .acquire_timeout(SQLITE_ACQUIRE)
        // A connection that is closed for idling would only be opened again.
        .idle_timeout(None::<Duration>)
        .max_lifetime(None::<Duration>)
        .test_before_acquire(false)
        .sqlx_logging(false)
        .map_sqlx_sqlite_opts(|options| {
            options
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .busy_timeout(SQLITE_BUSY)
                .foreign_keys(true)
        });
    // The change to WAL does not wait for SQLite's busy timeout while another process makes it.
    let until = tokio::time::Instant::now() + SQLITE_BUSY;
    loop {
        match open(options.clone(), url).await {
            Err(DbError::Unreachable { reason, .. })
                if reason.contains("database is locked") && tokio::time::Instant::now() < until =>
            {
                tokio::time::sleep(SQLITE_PAUSE).await;
            }
            opened => return opened,
        }
    }
}

async fn postgres(url: &str, schema: Option<&str>) -> Result<DatabaseConnection, DbError> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(POSTGRES_POOL).acquire_timeout(POSTGRES_ACQUIRE).sqlx_logging(false);
    if let Some(schema) = schema {
        if !is_schema_name(schema) {
            return Err(DbError::Schema { schema: schema.to_owned() });
        }
        options.set_schema_search_path(schema);
    }
    probe(url, schema).await?;
    open(options, url).await
}

/// Asks for one connection and creates the schema on it. The pool would repeat a refused connection until
/// its time is over, and then say only that.
async fn probe(url: &str, schema: Option<&str>) -> Result<(), DbError> {
    let work = async {
        let mut connection = PgConnection::connect(url).await?;
        if let Some(schema) = schema {
            let sql = format!("CREATE SCHEMA IF NOT EXISTS {schema}");
            let created = connection.execute(AssertSqlSafe(sql)).await;
            // Two processes that start together race inside PostgreSQL: the loser finds the winner's schema.
            if let Err(error) = created
                && !error.to_string().contains("pg_namespace_nspname_index")
            {
                return Err(error);
            }
        }
        connection.close().await
    };
    let unreachable = |reason: String| DbError::Unreachable { url: redact(url), reason };
    match tokio::time::timeout(POSTGRES_ACQUIRE, work).await {
        Err(_) => Err(unreachable(format!("no answer within {} s", POSTGRES_ACQUIRE.as_secs()))),
        Ok(Err(error)) if says_disk_full(&error.to_string()) => Err(DbError::DiskFull { url: redact(url) }),
        Ok(Err(error)) => Err(unreachable(error.to_string())),
        Ok(Ok(())) => Ok(()),
    }
}

async fn open(options: ConnectOptions, url: &str) -> Result<DatabaseConnection, DbError> {
    Database::connect(options).await.map_err(|source| {
        if is_disk_full(&source) {
            DbError::DiskFull { url: redact(url) }
        } else {
            DbError::Unreachable { url: redact(url), reason: source.to_string() }
        }
    })
}

fn is_schema_name(name: &str) -> bool {
    name.len() <= MAX_SCHEMA
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// The file of a SQLite URL; `None` for a database in memory.
fn sqlite_path(url: &str) -> Option<PathBuf> {
    let rest = url.strip_prefix("sqlite:")?;
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    let path = rest.split('?').next().unwrap_or_default();
    (!path.is_empty() && path != ":memory:").then(|| PathBuf::from(path))
}

/// `url` without the part that may hold a password.
pub fn redact(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://{host}"),
            None => url.to_owned(),
        },
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_names_need_no_quotes() {
        for good in ["gateway", "_t1", "a_b_9"] {
            assert!(is_schema_name(good), "{good}");
        }
        for bad in ["", "9a", "A", "a-b", "a;drop schema b", "a\"", &"x".repeat(64)] {
            assert!(!is_schema_name(bad), "{bad}");
        }
    }

    #[test]
    fn passwords_are_left_out() {
        assert_eq!(redact("postgres://u:p@ss@host:5/db"), "postgres://host:5/db");
        assert_eq!(redact("sqlite:///a/b.db"), "sqlite:///a/b.db");
    }

    #[test]
    fn sqlite_paths() {
        assert_eq!(sqlite_path("sqlite:///a/b.db?mode=rwc"), Some("/a/b.db".into()));
        assert_eq!(sqlite_path("sqlite://rel/b.db"), Some("rel/b.db".into()));
        assert_eq!(sqlite_path("sqlite::memory:"), None);
    }
}
