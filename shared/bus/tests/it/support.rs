//! A bus with a small topology, a database with a table to write to.

use std::time::Duration;

use infera_bus::{Bus, Delivery, Envelope, QueueBinding, Subscription, Topology};
use infera_testkit::{TempDir, cluster, unique};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbErr};
use sea_orm_migration::prelude::*;
use uuid::Uuid;

/// Long enough for a broker on a busy machine; never waited for when things work.
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const DELIVERY_LIMIT: u32 = 3;

/// `orders` <- order.placed; `billing` <- order.*; `audit` <- order.#
pub fn topology() -> Topology {
    let bind = |queue, pattern| QueueBinding { queue, pattern };
    Topology {
        exchange: "events",
        dead_letters: "dead",
        delivery_limit: DELIVERY_LIMIT,
        queues: vec![
            bind("orders", "order.placed"),
            bind("shipping", "order.shipped"),
            bind("billing", "invoice.*"),
            bind("audit", "invoice.#"),
        ],
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    InProcess,
    Rabbit,
}

/// A network of its own.
pub struct World {
    pub adapter: Adapter,
    pub bus: Bus,
    pub prefix: String,
}

impl World {
    pub async fn new(adapter: Adapter) -> Self {
        let prefix = format!("{}.", unique("bus"));
        let bus = match adapter {
            Adapter::InProcess => Bus::in_process(),
            Adapter::Rabbit => Bus::rabbit(&cluster().amqp_url, &prefix).await.unwrap(),
        };
        bus.declare(&topology()).await.unwrap();
        Self { adapter, bus, prefix }
    }

    /// As another process sees it: a connection of its own where there is a broker.
    pub async fn another(&self) -> Bus {
        match self.adapter {
            Adapter::InProcess => self.bus.clone(),
            Adapter::Rabbit => {
                let bus = Bus::rabbit(&cluster().amqp_url, &self.prefix).await.unwrap();
                bus.declare(&topology()).await.unwrap();
                bus
            }
        }
    }

    /// Publishes in the background: in process it lasts until the message is settled.
    pub fn publish(
        &self,
        key: &str,
        envelope: &Envelope,
    ) -> tokio::task::JoinHandle<Result<(), infera_bus::BusError>> {
        let (bus, key, envelope) = (self.bus.clone(), key.to_owned(), envelope.clone());
        tokio::spawn(async move { bus.publish(&key, envelope).await })
    }
}

pub fn envelope(body: &str) -> Envelope {
    Envelope {
        id: Uuid::now_v7(),
        kind: "order".to_owned(),
        body: body.as_bytes().to_vec().into(),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
    }
}

pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

pub async fn next(subscription: &mut Subscription) -> Delivery {
    within("a delivery", subscription.next()).await.unwrap()
}

/// A test for each adapter.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod in_process {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($crate::support::World::new($crate::support::Adapter::InProcess).await).await;
            })*
        }
        mod rabbit {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($crate::support::World::new($crate::support::Adapter::Rabbit).await).await;
            })*
        }
    };
}

/// A test for each adapter on each database.
macro_rules! on_all {
    ($($name:ident),* $(,)?) => {
        mod in_process_sqlite { $crate::support::on_one!(InProcess, Sqlite, $($name),*); }
        mod in_process_postgres { $crate::support::on_one!(InProcess, Postgres, $($name),*); }
        mod rabbit_sqlite { $crate::support::on_one!(Rabbit, Sqlite, $($name),*); }
        mod rabbit_postgres { $crate::support::on_one!(Rabbit, Postgres, $($name),*); }
    };
}

macro_rules! on_one {
    ($adapter:ident, $engine:ident, $($name:ident),*) => {
        $(#[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            use $crate::support::{Adapter, Engine, Store, World};
            let store = Store::new(Engine::$engine).await;
            super::$name(World::new(Adapter::$adapter).await, store).await;
        })*
    };
}

pub(crate) use {on_all, on_both, on_one};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// A service's database: outbox, inbox and a table `effects` for what handlers do.
pub struct Store {
    pub engine: Engine,
    pub db: DatabaseConnection,
    pub url: String,
    pub schema: Option<String>,
    _dir: TempDir,
}

impl Store {
    pub async fn new(engine: Engine) -> Self {
        let dir = TempDir::new().unwrap();
        let (url, schema) = match engine {
            Engine::Sqlite => (infera_testkit::sqlite_url(&dir), None),
            Engine::Postgres => (cluster().pg_url.clone(), Some(unique("bus"))),
        };
        Self::at(engine, url, schema, dir).await
    }

    /// A schema of its own behind another address of the same PostgreSQL.
    pub async fn behind(address: std::net::SocketAddr) -> Self {
        let (user, rest) = cluster().pg_url.split_once('@').unwrap();
        let (_, database) = rest.split_once('/').unwrap();
        let url = format!("{user}@{address}/{database}");
        let dir = TempDir::new().unwrap();
        Self::at(Engine::Postgres, url, Some(unique("bus")), dir).await
    }

    async fn at(engine: Engine, url: String, schema: Option<String>, dir: TempDir) -> Self {
        let db = open(&url, schema.as_deref()).await;
        Self { engine, db, url, schema, _dir: dir }
    }

    /// As another process sees it. SQLite's one connection belongs to one process: close the other first.
    pub async fn reopen(&self) -> DatabaseConnection {
        open(&self.url, self.schema.as_deref()).await
    }
}

pub async fn open(url: &str, schema: Option<&str>) -> DatabaseConnection {
    let db = infera_runtime::db::connect(url, schema).await.unwrap();
    infera_runtime::db::migrate::<Migrator>(&db).await.unwrap();
    db
}

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![infera_bus::outbox::migration(), infera_bus::inbox::migration(), Box::new(Effects)]
    }
}

struct Effects;

impl MigrationName for Effects {
    fn name(&self) -> &str {
        "effects"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Effects {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let sql = "CREATE TABLE effects (body TEXT NOT NULL)";
        manager.get_connection().execute_unprepared(sql).await?;
        Ok(())
    }
}

/// What a handler does: a row per message that it processed.
pub async fn effect<C: ConnectionTrait>(tx: &C, body: &[u8]) -> Result<(), DbErr> {
    let body = std::str::from_utf8(body).unwrap().to_owned();
    let sql = Query::insert().into_table("effects").columns(["body"]).values_panic([body.into()]).to_owned();
    tx.execute(&sql).await.map(drop)
}

/// The bodies that were processed, sorted.
pub async fn effects(db: &DatabaseConnection) -> Vec<String> {
    let sql = Query::select().column("body").from("effects").order_by("body", Order::Asc).to_owned();
    let rows = db.query_all(&sql).await.unwrap();
    rows.iter().map(|row| row.try_get("", "body").unwrap()).collect()
}

/// Stands between a client and a server, and can cut them off from each other.
pub struct Proxy {
    pub address: std::net::SocketAddr,
    state: std::sync::Arc<ProxyState>,
}

struct ProxyState {
    open: tokio::sync::watch::Sender<bool>,
    refused: std::sync::atomic::AtomicUsize,
}

impl Proxy {
    /// In front of the test cluster's PostgreSQL.
    pub async fn of_postgres() -> Self {
        let (_, rest) = cluster().pg_url.split_once('@').unwrap();
        let target = rest.split_once('/').unwrap().0.to_owned();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = std::sync::Arc::new(ProxyState {
            open: tokio::sync::watch::Sender::new(true),
            refused: Default::default(),
        });
        let of_task = state.clone();
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let mut open = of_task.open.subscribe();
                if !*open.borrow_and_update() {
                    of_task.refused.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    continue;
                }
                let mut server = tokio::net::TcpStream::connect(&target).await.unwrap();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        _ = open.changed() => {}
                    }
                });
            }
        });
        Self { address, state }
    }

    /// Ends all connections and refuses new ones, or takes them again.
    pub fn set_open(&self, open: bool) {
        self.state.open.send_replace(open);
    }

    /// Connections refused so far.
    pub fn refused(&self) -> usize {
        self.state.refused.load(std::sync::atomic::Ordering::SeqCst)
    }
}

/// Runs `work` on a thread and runtime of its own, as each service has. Not tokio's blocking pool, which
/// a failed test would wait for.
pub fn on_thread<F, Fut>(work: F) -> tokio::sync::oneshot::Receiver<Fut::Output>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output: Send + 'static>,
{
    let (done, is_done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // A test that no longer waits has failed already.
        let _ = done.send(runtime.block_on(work()));
    });
    is_done
}
