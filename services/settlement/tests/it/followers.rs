//! Followers of escrows one at a time and two at a time, on a chain in memory whose endpoint lags or takes its time.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use infera_runtime::{CancellationToken, clock, db, health::Health};
use infera_settlement::{
    Config,
    chain::{
        Address, B256, BlockRef, Call, ChainError, Escrow, Fees, Head, Link, Port, PostedBatch, Rewards,
        SignedTx, TxStatus, port::Finality,
    },
    escrow::{
        Freshness,
        follow::{Follow, FollowError, Follower, Looked},
    },
    ledger::{self, Account},
    metrics::Metrics,
    store::{Migrator, escrows},
};
use infera_testkit::{TempDir, cluster, eventually, sqlite_url, unique};
use sea_orm::DatabaseConnection;
use tokio::sync::Semaphore;

use crate::{
    schedules::{Event, World},
    service::DEADLINE,
    sim::SimWorld,
    wallets::{self, Deed},
};

/// An endpoint of the chain in memory.
#[derive(Clone)]
struct Endpoint {
    world: SimWorld,
    /// The newest block that it has by number.
    has: Arc<AtomicU64>,
    /// An account's state is read, and then kept back until there is a permit.
    permits: Arc<Semaphore>,
    /// Accounts that are asked about now, and at most.
    asked: Arc<(AtomicUsize, AtomicUsize)>,
}

impl Endpoint {
    fn new(world: &SimWorld) -> Self {
        Self {
            world: world.clone(),
            has: Arc::new(u64::MAX.into()),
            permits: Arc::new(Semaphore::new(1_000)),
            asked: Arc::default(),
        }
    }

    fn slow(world: &SimWorld) -> Self {
        Self { permits: Arc::new(Semaphore::new(0)), ..Self::new(world) }
    }
}

impl Link for Endpoint {
    type Port = Self;

    async fn connect(&self) -> Result<Self, ChainError> {
        Ok(self.clone())
    }
}

impl Port for Endpoint {
    async fn head(&self) -> Result<Head, ChainError> {
        self.world.head().await
    }

    async fn batch_root(&self, sequence: u64) -> Result<Option<B256>, ChainError> {
        self.world.batch_root(sequence).await
    }

    async fn next_nonce(&self) -> Result<u64, ChainError> {
        self.world.next_nonce().await
    }

    async fn fees(&self) -> Result<Fees, ChainError> {
        self.world.fees().await
    }

    async fn sign(&self, calls: &[Call], nonce: u64, fees: Fees) -> Result<SignedTx, ChainError> {
        self.world.sign(calls, nonce, fees).await
    }

    async fn send_raw(&self, raw: &[u8]) -> Result<(), ChainError> {
        self.world.send_raw(raw).await
    }

    async fn status(&self, tx: B256) -> Result<TxStatus, ChainError> {
        self.world.status(tx).await
    }

    async fn posted(&self, sequence: u64, from_block: u64) -> Result<Option<PostedBatch>, ChainError> {
        self.world.posted(sequence, from_block).await
    }

    async fn final_block(&self, finality: Finality, confirmations: u64) -> Result<u64, ChainError> {
        self.world.final_block(finality, confirmations).await
    }

    async fn rewards(&self) -> Result<Rewards, ChainError> {
        self.world.rewards().await
    }

    async fn withdrawal_delay(&self) -> Result<u64, ChainError> {
        self.world.withdrawal_delay().await
    }

    async fn newest(&self) -> Result<BlockRef, ChainError> {
        self.world.newest().await
    }

    async fn block_hash(&self, number: u64) -> Result<Option<B256>, ChainError> {
        if number > self.has.load(Ordering::SeqCst) {
            return Ok(None);
        }
        self.world.block_hash(number).await
    }

    async fn touched(&self, from: u64, to: u64) -> Result<BTreeSet<Address>, ChainError> {
        self.world.touched(from, to).await
    }

    async fn escrow(&self, account: Address, block: u64) -> Result<Escrow, ChainError> {
        let (now, most) = &*self.asked;
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let state = self.world.escrow(account, block).await;
        self.permits.acquire().await.unwrap().forget();
        now.fetch_sub(1, Ordering::SeqCst);
        state
    }
}

fn follower(db: &DatabaseConnection, endpoint: &Endpoint) -> Follower<Endpoint> {
    let health = Health::new("follower");
    Follower {
        db: db.clone(),
        config: Config::load(None).unwrap(),
        link: endpoint.clone(),
        check: health.check("escrow"),
        metrics: Metrics::register(&health).unwrap(),
        freshness: Freshness::new(60, 60),
        changed: Arc::default(),
    }
}

async fn deposit(world: &SimWorld, wallet: usize, micro: u64) {
    world.event(Event::Deed { wallet, deed: Deed::Deposit(micro) }).await;
    world.event(Event::Mine(1)).await;
}

async fn in_books(db: &DatabaseConnection, wallet: usize) -> i64 {
    let account = Account::Escrow(wallets::address(wallet).to_string());
    ledger::balance(db, &account).await.unwrap()
}

async fn sqlite(dir: &TempDir) -> DatabaseConnection {
    let db = db::connect(&sqlite_url(dir), None).await.unwrap();
    db::migrate::<Migrator>(&db).await.unwrap();
    db
}

#[tokio::test]
async fn of_two_followers_the_slower_one_takes_nothing_back_sqlite() {
    let dir = TempDir::new().unwrap();
    of_two_followers_the_slower_one_takes_nothing_back(sqlite(&dir).await).await;
}

#[tokio::test]
async fn of_two_followers_the_slower_one_takes_nothing_back_postgres() {
    let db = db::connect(&cluster().pg_url, Some(&unique("followers"))).await.unwrap();
    db::migrate::<Migrator>(&db).await.unwrap();
    of_two_followers_the_slower_one_takes_nothing_back(db).await;
}

async fn of_two_followers_the_slower_one_takes_nothing_back(db: DatabaseConnection) {
    let world = SimWorld::new();
    let (slow, quick) = (Endpoint::slow(&world), Endpoint::new(&world));
    let (old, new) = (follower(&db, &slow), follower(&db, &quick));
    deposit(&world, 0, 1_000).await;
    let (mut before, mut after) = (Follow::default(), Follow::default());
    let late = old.look(&mut before);
    let meanwhile = async {
        while slow.asked.1.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        // What the old one is about to write is older than this.
        deposit(&world, 0, 500).await;
        assert_eq!(new.look(&mut after).await.unwrap(), Looked::Current);
        assert_eq!(in_books(&db, 0).await, 1_500);
        slow.permits.add_permits(1_000);
    };
    let (looked, ()) = tokio::join!(late, meanwhile);
    assert_eq!(looked.unwrap(), Looked::Behind, "it looks again");
    assert_eq!(in_books(&db, 0).await, 1_500);
    let row = escrows::find(&db, &wallets::address(0)).await.unwrap().unwrap();
    assert_eq!((row.escrow_micro, row.movements), (1_500, 1));
    assert_eq!(old.look(&mut before).await.unwrap(), Looked::Current);
    assert_eq!(in_books(&db, 0).await, 1_500);
}

/// What the newest block has is written as of one cursor too: a withdrawal that the quicker one saw stays seen.
#[tokio::test]
async fn of_two_followers_the_slower_one_hides_no_withdrawal() {
    let dir = TempDir::new().unwrap();
    let db = sqlite(&dir).await;
    let world = SimWorld::new();
    let (slow, quick) = (Endpoint::slow(&world), Endpoint::new(&world));
    let follower = |endpoint| {
        let mut follower = follower(&db, endpoint);
        follower.config.chain.confirmations = 3;
        follower
    };
    let (old, new) = (follower(&slow), follower(&quick));
    deposit(&world, 0, 1_000).await;
    world.event(Event::Mine(5)).await;
    assert_eq!(new.look(&mut Follow::default()).await.unwrap(), Looked::Current);
    deposit(&world, 0, 500).await;
    let (mut before, mut after) = (Follow::default(), Follow::default());
    let late = old.look(&mut before);
    let meanwhile = async {
        while slow.asked.1.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        world.event(Event::Deed { wallet: 0, deed: Deed::Request(700) }).await;
        world.event(Event::Mine(1)).await;
        assert_eq!(new.look(&mut after).await.unwrap(), Looked::Current);
        slow.permits.add_permits(1_000);
    };
    let (looked, ()) = tokio::join!(late, meanwhile);
    assert_eq!(looked.unwrap(), Looked::Behind, "it looks again");
    let row = escrows::find(&db, &wallets::address(0)).await.unwrap().unwrap();
    assert_eq!((row.escrow_micro, row.head_escrow_micro), (1_000, Some(1_500)));
    assert_eq!(row.head_withdrawal_micro, Some(700));
}

#[tokio::test]
async fn a_block_that_the_endpoint_does_not_have_yet_is_no_reorganisation() {
    let dir = TempDir::new().unwrap();
    let db = sqlite(&dir).await;
    let world = SimWorld::new();
    let endpoint = Endpoint::new(&world);
    let follower = follower(&db, &endpoint);
    let mut follow = Follow::default();
    deposit(&world, 0, 1_000).await;
    assert_eq!(follower.look(&mut follow).await.unwrap(), Looked::Current);
    let cursor = escrows::cursor(&db).await.unwrap().unwrap();
    // It says that there are newer blocks, and has neither them nor the last one that was seen.
    deposit(&world, 0, 500).await;
    for has in [cursor.next_block - 2, cursor.next_block - 1] {
        endpoint.has.store(has, Ordering::SeqCst);
        let said = follower.look(&mut follow).await.unwrap_err();
        let FollowError::Chain(ChainError::Unreachable(said)) = said else { panic!("{said}") };
        assert_eq!(said, format!("the endpoint has no block {}", has + 1));
        assert_eq!(escrows::cursor(&db).await.unwrap(), Some(cursor), "nothing is read again");
        follow.reconnect();
    }
    endpoint.has.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(follower.look(&mut follow).await.unwrap(), Looked::Current);
    assert_eq!(in_books(&db, 0).await, 1_500);
    // Another block in its place is one.
    world.event(Event::Reorg { depth: 1, lose: true }).await;
    assert_eq!(follower.look(&mut follow).await.unwrap(), Looked::Current);
    assert_eq!(in_books(&db, 0).await, 1_000);
}

/// What another process saw says nothing of what happened until this one looks.
#[tokio::test]
async fn a_follower_that_starts_has_seen_nothing() {
    let dir = TempDir::new().unwrap();
    let db = sqlite(&dir).await;
    let world = SimWorld::new();
    let endpoint = Endpoint::new(&world);
    deposit(&world, 0, 1_000).await;
    let before = follower(&db, &endpoint);
    assert_eq!(before.look(&mut Follow::default()).await.unwrap(), Looked::Current);
    let rejection = |freshness: &Freshness| freshness.rejection(clock::now_ms(), clock::now_ms());
    assert_eq!(rejection(&before.freshness), None);
    deposit(&world, 0, 500).await;
    endpoint.has.store(0, Ordering::SeqCst);
    let health = Health::new("restarted");
    let after = Follower { check: health.check("escrow"), ..follower(&db, &endpoint) };
    let (freshness, stop) = (after.freshness.clone(), CancellationToken::new());
    let task = tokio::spawn(after.run(stop.clone()));
    eventually(DEADLINE, async || {
        let checks = health.readiness().checks;
        if checks["escrow"].contains("has no block") { Ok(()) } else { Err(checks) }
    })
    .await;
    let said = rejection(&freshness).unwrap().message;
    assert!(said.contains("not seen since the start"), "{said}");
    endpoint.has.store(u64::MAX, Ordering::SeqCst);
    eventually(DEADLINE, async || rejection(&freshness).is_none()).await;
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test]
async fn accounts_are_asked_about_together() {
    let dir = TempDir::new().unwrap();
    let db = sqlite(&dir).await;
    let world = SimWorld::new();
    let endpoint = Endpoint::new(&world);
    let follower = follower(&db, &endpoint);
    for wallet in 0..2 {
        deposit(&world, wallet, 1_000).await;
    }
    assert_eq!(follower.look(&mut Follow::default()).await.unwrap(), Looked::Current);
    assert_eq!(endpoint.asked.1.load(Ordering::SeqCst), 2);
    assert_eq!((in_books(&db, 0).await, in_books(&db, 1).await), (1_000, 1_000));
}
