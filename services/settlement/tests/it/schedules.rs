//! Random schedules of faults by their seed: work arrives, settlement is killed at any await, the chain loses answers,
//! transactions and blocks. In the end nothing is lost, nothing is paid twice, the books balance to the last unit, and
//! the chain agrees with them.
//!
//! The same schedule runs against a chain in memory ([`crate::sim`]), fast enough for thousands, and against a real
//! anvil ([`crate::anvil_world`]). A kill is a future that is dropped at an await: whatever it had not committed is gone,
//! as after kill -9; `crash.rs` kills real processes.

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use infera_bus::{Envelope, Reject};
use infera_protocol::identity::Domain;
use infera_protocol::stakes::Stakes;
use infera_runtime::{
    config::Secret,
    db,
    health::Health,
    network::{Live, Roots},
};
use infera_settlement::{
    Config,
    batcher::{Batcher, Next, Work},
    chain::{Link, Port},
    consumer::Consumer,
    escrow::{
        Freshness,
        follow::{Follow, FollowError, Follower, Looked},
    },
    exposure::Exposure,
    ledger,
    metrics::Metrics,
    store::{Migrator, batches, escrows, vouchers},
};
use infera_testkit::{TempDir, cluster, unique};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use uuid::Uuid;

use crate::{
    agreement::{audit, charged, check, known, number},
    network::{Network, submitted_bytes, verdict_bytes},
    random::Random,
    sim::SimWorld,
    wallets::{self, Deed, WALLETS},
};

/// What happens to a chain.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// So many blocks are made.
    Mine(u64),
    /// The newest `depth` blocks are replaced by others without the settler's transactions, which wait again or are lost.
    Reorg { depth: u64, lose: bool },
    /// What waits is forgotten.
    DropPool,
    /// Somebody uses the settler's key and nonce for something else, and pays well.
    Foreign,
    /// The endpoint refuses connections.
    Down(bool),
    /// The endpoint does what it is asked and never says so.
    LoseAnswers(bool),
    /// Blocks cost so many gwei per gas from now on.
    BaseFee(u64),
    /// A consumer does something on the chain.
    Deed { wallet: usize, deed: Deed },
}

/// A chain that things happen to.
#[allow(async_fn_in_trait)]
pub trait World {
    type Link: Link<Port: Clone>;
    /// What the settler connects with.
    fn link(&self) -> Self::Link;
    async fn event(&self, event: Event);
}

/// What a schedule is made of.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    pub seed: u64,
    pub requests: u64,
    /// Blocks until a batch counts as anchored.
    pub confirmations: u64,
    /// The deepest reorganisation.
    pub reorg: u64,
    /// Random steps before the faults end.
    pub steps: u64,
}

impl Terms {
    /// Terms by a seed: three of four schedules have a finality deeper than any reorganisation.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x7e57);
        let reorg = 1 + random.below(12);
        let confirmations =
            if random.percent(75) { reorg + 1 + random.below(3) } else { 1 + random.below(reorg) };
        Self { seed, requests: 3 + random.below(8), confirmations, reorg, steps: 60 + random.below(80) }
    }

    pub fn never_taken_back(&self) -> bool {
        self.confirmations > self.reorg
    }
}

pub const CREDIT: u64 = 10_000;

/// One request of the schedule and what becomes of it.
pub struct Request {
    pub account: String,
    pub id: Uuid,
    submitted: Vec<u8>,
    verdict: Vec<u8>,
    /// What it must have been charged in the end; a wallet's only if it was funded.
    pub charge: i64,
}

fn requests(network: &Network, terms: &Terms, random: &mut Random) -> Vec<Request> {
    (0..terms.requests)
        .map(|_| {
            let account = match random.below(10) {
                0 => "bob".to_owned(),
                1..=4 => wallets::address(usize::try_from(random.below(2)).unwrap()).to_string(),
                _ => "alice".to_owned(),
            };
            let submitted = network.submitted(&account);
            let honest = 2 + random.below(2);
            let (verdict, charge) = if random.percent(85) {
                let honest = usize::try_from(honest).unwrap();
                let evidence = network.evidence(&submitted, honest, 3 - honest);
                (network.verified(&evidence), i64::try_from(honest).unwrap() * 60)
            } else {
                (network.failed(&submitted), 0)
            };
            Request {
                id: submitted.request.id,
                submitted: submitted_bytes(&submitted).1,
                verdict: verdict_bytes(&verdict).1,
                // Bob can't pay a hold of 600.
                charge: if account == "bob" { 0 } else { charge },
                account,
            }
        })
        .collect()
}

/// Runs a future until it is done or until it has waited `polls` times; then it is dropped, as a kill would end it.
async fn cut<F: Future>(future: F, polls: Option<u64>) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut waited = 0;
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => {
            waited += 1;
            if polls.is_some_and(|polls| waited > polls) { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}

/// Settlement's parts between a database and a chain, without a bus: deliveries come straight to the handlers.
pub struct Parts<W: World> {
    pub db: DatabaseConnection,
    pub world: W,
    handlers: Consumer,
    batcher: Batcher<W::Link>,
    work: Work<<W::Link as Link>::Port>,
    follower: Follower<W::Link>,
    follow: Follow<<W::Link as Link>::Port>,
    domain: Domain,
}

impl<W: World> Parts<W> {
    fn new(db: DatabaseConnection, network: Network, world: W, terms: &Terms) -> Self {
        let mut config = Config::load(None).unwrap();
        config.batch.size = 3;
        config.batch.limit = 4;
        config.batch.age_ms = 0;
        config.chain.confirmations = terms.confirmations;
        config.chain.bump_ms = 1;
        config.chain.resend_ms = 1;
        config.chain.settler_key = Secret::new(crate::chain::SETTLER);
        config.rewards.interval_secs = 1;
        // Few at a time, so that some are charged by themselves, and logs come in parts.
        config.escrow.charges = 1 + terms.seed % 2;
        config.escrow.log_blocks = 7;
        let health = Health::new("schedule");
        let metrics = Metrics::register(&health).unwrap();
        let written = Arc::new(tokio::sync::Notify::new());
        let freshness = Freshness::new(config.escrow.stale_secs, config.escrow.margin_secs);
        let follower = Follower {
            db: db.clone(),
            config: config.clone(),
            link: world.link(),
            check: health.check("escrow"),
            metrics: metrics.clone(),
            freshness: freshness.clone(),
            changed: written.clone(),
        };
        let exposure = Exposure::new(0);
        let batcher = Batcher {
            db: db.clone(),
            relay: None,
            config,
            link: world.link(),
            check: health.check("chain"),
            metrics: metrics.clone(),
            written: written.clone(),
            exposure: exposure.clone(),
        };
        let Network { manifest, registry, .. } = network;
        let domain = manifest.domain;
        let live = Live::fixed(Roots {
            manifest: manifest.clone(),
            registries: registry.into(),
            stakes: Stakes::default(),
        });
        let handlers = Consumer { manifest, live, metrics, exposure, freshness, written };
        let (work, follow) = (Work::default(), Follow::default());
        Self { db, world, handlers, batcher, work, follower, follow, domain }
    }

    /// One look at the escrows; whether everything up to the newest block is known.
    async fn look(&mut self, polls: Option<u64>) -> bool {
        match cut(self.follower.look(&mut self.follow), polls).await {
            Some(Ok(looked)) => looked == Looked::Current,
            Some(Err(FollowError::Chain(_))) => {
                self.follow.reconnect();
                false
            }
            Some(Err(error)) => panic!("{error}"),
            None => {
                self.follow = Follow::default();
                false
            }
        }
    }

    /// A consumer signs for more, or shows an old voucher again.
    async fn sign(&self, wallet: usize, micro: u64) {
        let voucher = wallets::voucher(wallet, &self.domain, micro);
        // A connection on which a BEGIN was dropped is still in its transaction: it ends with the next one's COMMIT.
        let tx = self.db.begin().await.unwrap();
        let highest = vouchers::keep(&tx, &wallets::address(wallet), &voucher, 1).await.unwrap();
        tx.commit().await.unwrap();
        assert!(highest >= micro, "the highest stays");
    }

    async fn deliver(&self, verdict: bool, body: &[u8]) {
        let envelope = Envelope::new(Uuid::now_v7(), "any", body.to_vec());
        let tx = self.db.begin().await.unwrap();
        let handled = if verdict {
            self.handlers.verdict(&tx, &envelope).await
        } else {
            self.handlers.submitted(&tx, &envelope).await
        };
        match handled {
            Ok(()) => tx.commit().await.unwrap(),
            // The verdict came before its request.
            Err(Reject::Retry(_)) => tx.rollback().await.unwrap(),
            Err(Reject::DeadLetter(reason)) => panic!("a dead letter: {reason}"),
        }
    }

    /// After a look at the chain no batch that it does not have is said to be anchored.
    async fn nothing_is_claimed_of_what_is_gone(&self) {
        // The endpoint may be away.
        let Ok(port) = self.world.link().connect().await else { return };
        let Ok(head) = port.head().await else { return };
        let sql = format!(
            "SELECT COUNT(*) AS value FROM batches WHERE state = 'anchored' AND sequence > {}",
            head.sequence
        );
        assert_eq!(
            number(&self.db, &sql).await,
            0,
            "anchored, and behind the chain's head {}",
            head.sequence
        );
    }

    async fn step(&mut self, polls: Option<u64>) -> bool {
        match cut(self.batcher.step(&mut self.work), polls).await {
            Some(Ok(next)) => {
                if next == Next::Poll {
                    self.nothing_is_claimed_of_what_is_gone().await;
                }
                next == Next::Idle
            }
            Some(Err(infera_settlement::batcher::StepError::Conflict(reason))) => panic!("{reason}"),
            Some(Err(_)) => {
                self.work.reconnect();
                false
            }
            None => {
                // A new process knows nothing but the database.
                self.work = Work::default();
                false
            }
        }
    }
}

fn event(terms: &Terms, random: &mut Random) -> Event {
    match random.below(17) {
        12..=16 => {
            let deed = match random.below(8) {
                0..=3 => Deed::Deposit(1 + random.below(2_000)),
                4 | 5 => Deed::Request(1 + random.below(2_000)),
                6 => Deed::Cancel,
                _ => Deed::Withdraw,
            };
            Event::Deed { wallet: usize::try_from(random.below(2)).unwrap(), deed }
        }
        0..=4 => Event::Mine(1 + random.below(3)),
        5 => Event::Reorg { depth: 1 + random.below(terms.reorg), lose: random.percent(50) },
        6 => Event::DropPool,
        7 => Event::Foreign,
        8 => Event::Down(random.percent(25)),
        9 => Event::LoseAnswers(random.percent(25)),
        _ => Event::BaseFee([1, 3, 20, 100][usize::try_from(random.below(4)).unwrap()]),
    }
}

/// What a schedule leaves: for the report.
#[derive(Debug, Default, Clone, Copy)]
pub struct Outcome {
    pub settled: u64,
    pub batches: u64,
    /// Batches that were anchored again, because a reorganisation went deeper than finality.
    pub taken_back: u64,
    /// Charged to escrows on the chain, 10^-6 INFER.
    pub escrow_micro: u64,
    /// Schedules in which an escrow was emptied before it was charged, by a withdrawal or a deep reorganisation.
    pub short: u64,
}

/// Plays a schedule; panics with what is wrong.
pub async fn play<W: World>(db: DatabaseConnection, network: Network, world: W, terms: Terms) -> Outcome {
    let mut random = Random::new(terms.seed);
    let requests = requests(&network, &terms, &mut random);
    for (account, micro, id) in [("alice", CREDIT, 1), ("bob", 500, 2)] {
        let tx = db.begin().await.unwrap();
        ledger::credit(&tx, Uuid::from_u128(id), account, micro, 1).await.unwrap();
        tx.commit().await.unwrap();
    }
    let mut parts = Parts::new(db, network, world, &terms);
    let pool = parts.world.link().connect().await.unwrap().rewards().await.unwrap().funded;
    // Most wallets have something to spend from the beginning.
    for wallet in 0..WALLETS.len() {
        if random.percent(70) {
            let deed = Deed::Deposit(500 + random.below(2_000));
            parts.world.event(Event::Deed { wallet, deed }).await;
            parts.sign(wallet, 500 + random.below(3_000)).await;
        }
    }
    parts.world.event(Event::Mine(terms.confirmations)).await;
    while !parts.look(None).await {}
    let (count, mut short) = (requests.len() as u64, false);
    for _ in 0..terms.steps {
        let polls = random.percent(40).then(|| random.below(40));
        match random.below(13) {
            10 | 11 => {
                parts.look(polls).await;
                short |= escrows::owing(&parts.db).await.unwrap().short_micro > 0;
            }
            12 => {
                let wallet = usize::try_from(random.below(2)).unwrap();
                parts.sign(wallet, random.below(4_000)).await;
            }
            0..=2 => {
                let request = &requests[usize::try_from(random.below(count)).unwrap()];
                let verdict = random.percent(60);
                let body = if verdict { &request.verdict } else { &request.submitted };
                cut(parts.deliver(verdict, body), polls).await;
            }
            3..=6 => {
                parts.step(polls).await;
            }
            _ => parts.world.event(event(&terms, &mut random)).await,
        }
    }
    finish(&mut parts, &requests).await;
    short |= audit(&parts.db).await.escrow_debt_micro < 0;
    if !terms.never_taken_back() {
        // What was said to be anchored is gone.
        let lose = random.percent(50);
        parts.world.event(Event::Reorg { depth: terms.reorg, lose }).await;
        finish(&mut parts, &requests).await;
    }
    // Whoever owes deposits it: then everything that was spent is charged.
    for wallet in 0..WALLETS.len() {
        parts.world.event(Event::Deed { wallet, deed: Deed::Cancel }).await;
        parts.world.event(Event::Deed { wallet, deed: Deed::Deposit(10_000) }).await;
    }
    finish(&mut parts, &requests).await;
    let owed = charged(&parts, &requests).await;
    let funded = parts.world.link().connect().await.unwrap().rewards().await.unwrap().funded;
    assert_eq!(funded - pool, u128::try_from(owed).unwrap(), "what was charged is in the pool");
    let outcome = check(&parts, &requests, &terms).await;
    Outcome { escrow_micro: u64::try_from(owed).unwrap(), short: short.into(), ..outcome }
}

/// The faults end, everything that was sent arrives, and settlement goes on until it has nothing to do.
async fn finish<W: World>(parts: &mut Parts<W>, requests: &[Request]) {
    for event in [Event::Down(false), Event::LoseAnswers(false), Event::BaseFee(1)] {
        parts.world.event(event).await;
    }
    for request in requests {
        parts.deliver(false, &request.submitted).await;
        parts.deliver(true, &request.verdict).await;
    }
    for _ in 0..400 {
        parts.work.reconnect();
        let idle = parts.step(None).await;
        parts.world.event(Event::Mine(1)).await;
        while !parts.look(None).await {}
        if !escrows::due(&parts.db, 1, 0).await.unwrap().is_empty() || !known(parts).await {
            continue;
        }
        let (waiting, _) = batches::waiting(&parts.db).await.unwrap();
        if !idle || waiting > 0 || batches::open_batches(&parts.db).await.unwrap() > 0 {
            continue;
        }
        // The last rewards may wait for their interval.
        let queued = parts.world.link().connect().await.unwrap().rewards().await.unwrap();
        let earned = number(
            &parts.db,
            "SELECT CAST(COALESCE(SUM(charged_micro), 0) AS BIGINT) AS value FROM requests",
        );
        if queued.last_total == u128::try_from(earned.await).unwrap() {
            return;
        }
    }
    panic!("settlement does not come to an end");
}

/// A folder in memory where there is one: schedules end with their process.
fn folder() -> TempDir {
    let memory = std::path::Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

/// The bytes of a migrated database, made once.
async fn template(dir: &TempDir) -> Vec<u8> {
    let path = dir.path().join("template.sqlite");
    let db = db::connect(&format!("sqlite://{}?mode=rwc", path.display()), None).await.unwrap();
    db::migrate::<Migrator>(&db).await.unwrap();
    db.execute_unprepared("PRAGMA wal_checkpoint(TRUNCATE)").await.unwrap();
    db.close().await.unwrap();
    std::fs::read(path).unwrap()
}

/// Plays the schedules with these seeds on SQLite and a chain in memory.
async fn play_simulated(seeds: impl Iterator<Item = u64>) -> Outcome {
    let dir = folder();
    let template = template(&dir).await;
    let mut sum = Outcome::default();
    for seed in seeds {
        eprintln_seed(seed);
        let path = dir.path().join(format!("{seed}.sqlite"));
        std::fs::write(&path, &template).unwrap();
        let db = db::connect(&format!("sqlite://{}?mode=rwc", path.display()), None).await.unwrap();
        let played = play(db.clone(), Network::offline(), SimWorld::new(), Terms::of(seed));
        let outcome = Box::pin(played).await;
        db.close().await.unwrap();
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(dir.path().join(format!("{seed}.sqlite{end}")));
        }
        sum.settled += outcome.settled;
        sum.batches += outcome.batches;
        sum.taken_back += outcome.taken_back;
        sum.escrow_micro += outcome.escrow_micro;
        sum.short += outcome.short;
    }
    sum
}

/// Said before the schedule, so that a failing one is the last that was said.
fn eprintln_seed(seed: u64) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "schedule {seed}");
}

pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test]
async fn random_faults_lose_nothing_and_pay_nothing_twice() {
    let outcome = play_simulated(1..=60).await;
    eprintln_line(&format!("{outcome:?}"));
    assert!(outcome.settled > 100 && outcome.batches > 60 && outcome.taken_back > 5, "{outcome:?}");
    assert!(outcome.escrow_micro > 5_000, "{outcome:?}");
}

#[tokio::test]
async fn random_faults_lose_nothing_on_postgres() {
    for seed in 1_001..=1_004 {
        let db = db::connect(&cluster().pg_url, Some(&unique("schedule"))).await.unwrap();
        db::migrate::<Migrator>(&db).await.unwrap();
        Box::pin(play(db, Network::offline(), SimWorld::new(), Terms::of(seed))).await;
    }
}

/// `make soak`: INFERA_SOAK_SCHEDULES schedules from INFERA_SOAK_SEED on.
#[tokio::test]
#[ignore = "long: make soak"]
async fn soak_schedules() {
    let (first, count) = (setting("INFERA_SOAK_SEED", 1), setting("INFERA_SOAK_SCHEDULES", 1_000));
    let outcome = play_simulated(first..first + count).await;
    eprintln_line(&format!("{count} schedules from {first}: {outcome:?}"));
}

pub fn eprintln_line(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}
