//! Deposits, vouchers and charges through the running service on a real chain: the honest way, and what thieves try.

use infera_protocol::{bytes::Address, identity::Domain};
use infera_settlement::{
    chain::{Contracts, consumer::Consumer, operator::Operator},
    store::escrows,
};
use infera_testkit::{anvil::Anvil, eventually};
use infera_wire::v1;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    anvil_world::rpc,
    batches::place,
    chain::DEPLOYER,
    service::{Column, DEADLINE, Place, Service},
    statements::statements,
    wallets::{WALLETS, sign},
};

/// What a request holds, and what two of three equal answers cost.
pub const HOLD: i64 = 600;
pub const CHARGE: i64 = 120;

pub struct World {
    pub anvil: Anvil,
    pub contracts: Contracts,
    pub place: Place,
    pub service: Service,
    pub consumer: Consumer,
}

impl World {
    pub async fn new(column: Column) -> Self {
        Self::with(column, |_| ()).await
    }

    /// A wallet with 100,000 and its service.
    pub async fn with(column: Column, change: impl FnOnce(&mut Place)) -> Self {
        let anvil = Anvil::start_with(&["64"]).await;
        let contracts = crate::chain::contracts(anvil.url()).await;
        let mut place = place(column, anvil.url(), Address(contracts.settlement.into())).await;
        place.config.chain.poll_ms = 20;
        place.config.rewards.interval_secs = 1;
        change(&mut place);
        let service = place.start().await;
        let consumer = Consumer::connect(anvil.url(), WALLETS[0], contracts).await.unwrap();
        let treasury = Operator::connect(anvil.url(), DEPLOYER, contracts).await.unwrap();
        treasury.transfer(consumer.address(), 100_000).await.unwrap();
        Self { anvil, contracts, place, service, consumer }
    }

    pub fn name(&self) -> String {
        self.consumer.account_name()
    }

    pub fn domain(&self) -> Domain {
        self.consumer.domain()
    }

    pub async fn balance(&self) -> Value {
        self.service.json("/v1/balance", Some(&self.place.key(&self.name()))).await
    }

    /// Waits until a figure of the balance is what it must be; returns the balance.
    pub async fn wait(&self, pointer: &str, expected: i64) -> Value {
        eventually(DEADLINE, async || {
            let balance = self.balance().await;
            if balance.pointer(pointer) == Some(&json!(expected)) { Ok(balance) } else { Err(balance) }
        })
        .await
    }

    async fn post(&self, account: &str, body: &Value) -> (u16, Value) {
        self.service.post("/v1/vouchers", &self.place.key(account), body).await
    }

    /// Signs for `cumulative` and says so.
    pub async fn allow(&self, cumulative: u64) {
        let signature = self.consumer.voucher(cumulative).unwrap();
        let (status, said) =
            self.post(&self.name(), &json!({ "cumulative_micro": cumulative, "signature": signature })).await;
        assert_eq!((status, &said["voucher_micro"]), (200, &json!(cumulative)), "{said}");
    }

    /// Deposits and signs for as much, both known to the service.
    pub async fn ready(&self, micro: u64) {
        self.ready_with(0, micro).await;
    }

    async fn ready_with(&self, prepaid: i64, micro: u64) {
        self.consumer.deposit(micro.into()).await.unwrap();
        self.allow(micro).await;
        self.wait("/available_micro", prepaid + i64::try_from(micro).unwrap()).await;
    }

    /// Another wallet with `micro` in escrow and a voucher for as much, both known to the service.
    pub async fn other(&self, micro: u64) -> Consumer {
        let other = Consumer::connect(self.anvil.url(), WALLETS[1], self.contracts).await.unwrap();
        let treasury = Operator::connect(self.anvil.url(), DEPLOYER, self.contracts).await.unwrap();
        treasury.transfer(other.address(), micro.into()).await.unwrap();
        other.deposit(micro.into()).await.unwrap();
        let signature = other.voucher(micro).unwrap();
        let body = json!({ "cumulative_micro": micro, "signature": signature });
        assert_eq!(self.post(&other.account_name(), &body).await.0, 200);
        let key = self.place.key(&other.account_name());
        eventually(DEADLINE, async || {
            self.service.json("/v1/balance", Some(&key)).await["available_micro"] == micro
        })
        .await;
        other
    }

    /// Waits until the chain has charged an account so much in all.
    pub async fn charged(&self, of: infera_settlement::chain::Address, expected: u128) {
        eventually(DEADLINE, async || {
            let charged = self.consumer.account(of).await.unwrap().charged;
            if charged == expected { Ok(()) } else { Err(charged) }
        })
        .await;
    }

    /// A request of the wallet, funded or rejected; its id.
    pub fn ask(&self) -> infera_wire::convert::Submitted {
        let submitted = self.place.network.submitted(&self.name());
        self.place.submit(&submitted);
        submitted
    }

    pub fn decide(&self, submitted: &infera_wire::convert::Submitted) -> Uuid {
        self.place.decide(&self.place.network.verified(&self.place.network.evidence(submitted, 2, 1)));
        submitted.request.id
    }

    async fn rejected(&self) -> v1::RequestRejected {
        let mut rejected = self.place.listen("gateway.rejected").await;
        self.ask();
        rejected.next().await
    }

    async fn pass(&self, secs: u64) {
        rpc(self.anvil.url(), "evm_increaseTime", json!([secs])).await;
        self.mine(1).await;
    }

    pub async fn mine(&self, blocks: u64) {
        rpc(self.anvil.url(), "anvil_mine", json!([format!("{blocks:#x}")])).await;
    }

    /// The audit, not an old one.
    pub async fn audit(&self, holds: impl Fn(&Value) -> bool) -> Value {
        eventually(DEADLINE, async || {
            let audit = self.service.audit().await;
            if holds(&audit) { Ok(audit) } else { Err(audit) }
        })
        .await
    }

    pub async fn check(&self, name: &str) -> String {
        let (_, body) = self.service.get("/readyz", None).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        body["checks"][name].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_deposit_is_spent_by_voucher_and_charged_embedded() {
    a_deposit_is_spent_by_voucher_and_charged(Column::Embedded).await;
}

#[tokio::test]
async fn a_deposit_is_spent_by_voucher_and_charged_cluster() {
    a_deposit_is_spent_by_voucher_and_charged(Column::Cluster).await;
}

async fn a_deposit_is_spent_by_voucher_and_charged(column: Column) {
    let world = World::new(column).await;
    world.ready(2_000).await;
    let pool = world.consumer.reader().total_funded().await.unwrap();
    let requests = [world.ask(), world.ask(), world.ask()];
    world.wait("/held_micro", 3 * HOLD).await;
    let short = world.rejected().await;
    assert_eq!(short.code, "insufficient_quota");
    for words in
        ["the escrow leaves 200, 400 too little", "the voucher leaves 200, 400 too little", "at least 2400"]
    {
        assert!(short.message.contains(words), "{words}: {}", short.message);
    }
    // Delivered twice: the same hold.
    for request in &requests {
        world.place.submit(request);
    }
    let ids: Vec<Uuid> = requests.iter().map(|request| world.decide(request)).collect();
    world.wait("/escrow/charged_micro", 3 * CHARGE).await;
    eventually(DEADLINE, async || {
        let on_chain = world.balance().await["escrow"]["charged_on_chain_micro"].as_i64();
        if on_chain == Some(3 * CHARGE) { Ok(()) } else { Err(on_chain) }
    })
    .await;
    let chain = world.consumer.account(world.consumer.address()).await.unwrap();
    assert_eq!((chain.escrow, chain.charged, chain.authorized), (2_000 - 360, 360, 2_000));
    assert_eq!(world.consumer.reader().total_funded().await.unwrap() - pool, 360, "it is in the pool");
    let balance = world.wait("/available_micro", 2_000 - 360).await;
    assert_eq!((&balance["charged_micro"], &balance["prepaid_micro"]), (&json!(360), &json!(0)));
    assert_eq!(balance["escrow"]["escrow_micro"], 1_640);
    let audit = world.audit(|audit| audit["escrow_charged_micro"] == 360).await;
    assert_eq!((&audit["deposits_micro"], &audit["escrow_micro"]), (&json!(-2_000), &json!(1_640)));
    statements(&world, &ids).await;

    // What is left is withdrawn, and the books know.
    world.consumer.request_withdrawal(1_640).await.unwrap();
    world.wait("/available_micro", 0).await;
    world.pass(301).await;
    world.consumer.withdraw().await.unwrap();
    world.audit(|audit| audit["deposits_micro"] == -360 && audit["escrow_micro"] == 0).await;
    assert_eq!(world.consumer.tokens(world.consumer.address()).await.unwrap(), 100_000 - 360);
    world.service.stop().await;
}

#[tokio::test]
async fn prepaid_credit_goes_first_and_what_is_missing_comes_from_escrow() {
    let credit = crate::service::credit(&crate::wallets::address(0).to_string(), 400);
    let world = World::with(Column::Embedded, |place| place.config.prepaid_credits.push(credit)).await;
    world.consumer.deposit(1_000).await.unwrap();
    world.allow(1_000).await;
    world.wait("/available_micro", 1_400).await;
    let request = world.ask();
    let balance = world.wait("/held_micro", HOLD).await;
    assert_eq!((&balance["prepaid_micro"], &balance["available_micro"]), (&json!(0), &json!(800)));
    world.decide(&request);
    let balance = world.wait("/held_micro", 0).await;
    assert_eq!((&balance["prepaid_micro"], &balance["available_micro"]), (&json!(280), &json!(1_280)));
    // 280 are prepaid, so escrow holds 320 of the next, and pays nothing of its 120.
    let request = world.ask();
    world.wait("/held_micro", HOLD).await;
    world.decide(&request);
    let balance = world.wait("/held_micro", 0).await;
    assert_eq!((&balance["prepaid_micro"], &balance["escrow"]["charged_micro"]), (&json!(160), &json!(0)));
    // 160: 120 leave 40, and the one after pays 80 of escrow.
    for _ in 0..2 {
        let request = world.ask();
        world.wait("/held_micro", HOLD).await;
        world.decide(&request);
        world.wait("/held_micro", 0).await;
    }
    let balance = world.wait("/escrow/charged_on_chain_micro", 80).await;
    assert_eq!((&balance["prepaid_micro"], &balance["charged_micro"]), (&json!(0), &json!(480)));
    world.audit(|audit| audit["escrow_charged_micro"] == 80).await;
    world.service.stop().await;
}

#[tokio::test]
async fn a_voucher_counts_only_as_its_owner_signed_it_for_this_network() {
    let world = World::new(Column::Embedded).await;
    let me = world.name();
    let domain = world.domain();
    let chain = Domain { chain_id: 1, ..domain };
    let contract = Domain { contract: Address([9; 20]), ..domain };
    let good = sign(0, &domain, 500);
    let refused = [
        ("another chain", json!({ "cumulative_micro": 500, "signature": sign(0, &chain, 500) })),
        ("another contract", json!({ "cumulative_micro": 500, "signature": sign(0, &contract, 500) })),
        ("another account", json!({ "cumulative_micro": 500, "signature": sign(1, &domain, 500) })),
        ("more than was signed", json!({ "cumulative_micro": 501, "signature": good })),
        ("no signature", json!({ "cumulative_micro": 500, "signature": "0x" })),
        ("no amount", json!({ "cumulative_micro": -5, "signature": good })),
    ];
    for (what, body) in refused {
        let (status, said) = world.post(&me, &body).await;
        let field = if what == "no amount" { "cumulative_micro" } else { "signature" };
        assert_eq!((status, said["error"]["param"].as_str()), (400, Some(field)), "{what}: {said}");
    }
    // Another's key with this wallet's voucher.
    let body = json!({ "cumulative_micro": 500, "signature": good });
    assert_eq!(world.post(&crate::wallets::address(1).to_string(), &body).await.0, 400);
    let (status, said) = world.post("alice", &body).await;
    assert_eq!((status, said["error"]["code"].as_str()), (400, Some("not_a_wallet")));
    assert_eq!(world.balance().await["escrow"]["voucher_micro"], 0, "nothing was kept");

    // Replayed, the same and a lower one: the highest stays.
    for (micro, highest) in [("500", 500), ("700", 700), ("500", 700), ("700", 700)] {
        let signature = sign(0, &domain, micro.parse().unwrap());
        let (status, said) =
            world.post(&me, &json!({ "cumulative_micro": micro, "signature": signature })).await;
        assert_eq!((status, &said), (200, &json!({ "account": me, "voucher_micro": highest })));
    }
    // A voucher is no money.
    let rejected = world.rejected().await;
    assert!(rejected.message.contains("the escrow leaves 0, 600 too little"), "{}", rejected.message);
    assert!(!rejected.message.contains("voucher"), "{}", rejected.message);
    world.service.stop().await;
}

#[tokio::test]
async fn what_is_held_is_paid_although_a_withdrawal_runs() {
    let world = World::new(Column::Embedded).await;
    world.ready(1_000).await;
    let request = world.ask();
    world.wait("/held_micro", HOLD).await;
    // All of it, although 600 are held: the contract allows it, and nothing more is lent.
    world.consumer.request_withdrawal(1_000).await.unwrap();
    world.wait("/escrow/withdrawal_micro", 1_000).await;
    assert_eq!(world.balance().await["available_micro"], 0);
    let rejected = world.rejected().await;
    assert!(rejected.message.contains("1000 are being withdrawn"), "{}", rejected.message);
    let early = world.consumer.withdraw().await.unwrap_err().to_string();
    assert!(early.contains("too early"), "{early}");
    // Decided while the delay runs: charged before the withdrawal.
    world.decide(&request);
    eventually(DEADLINE, async || {
        let charged = world.consumer.account(world.consumer.address()).await.unwrap().charged;
        if charged == 120 { Ok(()) } else { Err(charged) }
    })
    .await;
    world.pass(301).await;
    world.consumer.withdraw().await.unwrap();
    let left = world.consumer.account(world.consumer.address()).await.unwrap();
    assert_eq!((left.escrow, left.charged), (0, 120));
    assert_eq!(world.consumer.tokens(world.consumer.address()).await.unwrap(), 100_000 - 120);
    let audit = world.audit(|audit| audit["deposits_micro"] == -120).await;
    assert_eq!((&audit["escrow_debt_micro"], &audit["operators_micro"]), (&json!(0), &json!(120)));
    world.service.stop().await;
}

#[tokio::test]
async fn what_could_be_withdrawn_before_it_is_charged_is_not_spent() {
    let world = World::new(Column::Embedded).await;
    world.ready(2_000).await;
    let mut rejected = world.place.listen("gateway.rejected").await;
    let within = |secs: i64| {
        let mut submitted = world.place.network.submitted(&world.name());
        submitted.deadline_ms = infera_runtime::clock::now_ms() + secs * 1_000;
        world.place.submit(&submitted);
    };
    // The delay is 300 s, and charging may take 60.
    within(250);
    let refused: v1::RequestRejected = rejected.next().await;
    assert_eq!(refused.code, "overloaded");
    assert!(refused.message.contains("escrow can be withdrawn before that"), "{}", refused.message);
    within(120);
    world.wait("/held_micro", HOLD).await;
    drop(rejected);

    // The same contract, and a service that would rely on a view of the chain that is as old as the delay.
    let World { anvil, contracts, mut place, service, consumer } = world;
    service.stop().await;
    place.config.escrow.stale_secs = 240;
    let service = place.start().await;
    let world = World { anvil, contracts, place, service, consumer };
    let said = eventually(DEADLINE, async || {
        let said = world.check("escrow").await;
        if said.contains("withdrawal delay of 300 s") { Ok(said) } else { Err(said) }
    })
    .await;
    assert!(said.contains("`escrow.stale_secs`") && said.contains("longer delay"), "{said}");
    let refused = world.rejected().await;
    assert_eq!((refused.code.as_str(), refused.message), ("overloaded", said));
    world.service.stop().await;
}

#[tokio::test]
async fn what_was_withdrawn_before_it_was_charged_stays_owed() {
    let mut config = None;
    let world = World::with(Column::Embedded, |place| {
        place.config.batch.age_ms = 600_000;
        config = Some(place.config.clone());
    })
    .await;
    world.ready(1_000).await;
    let request = world.ask();
    world.wait("/held_micro", HOLD).await;
    world.decide(&request);
    world.wait("/escrow/charged_micro", CHARGE).await;
    // No batch was posted in the whole delay, so nothing was charged.
    world.consumer.request_withdrawal(1_000).await.unwrap();
    world.pass(301).await;
    world.consumer.withdraw().await.unwrap();
    let balance = world.wait("/escrow/escrow_leaves_micro", -CHARGE).await;
    assert_eq!(balance["available_micro"], 0);
    let audit = world.audit(|audit| audit["escrow_debt_micro"] == -CHARGE).await;
    assert_eq!((&audit["escrow_micro"], &audit["deposits_micro"]), (&json!(0), &json!(0)));
    let said = eventually(DEADLINE, async || {
        let said = world.check("escrow").await;
        if said.contains("1 accounts owe 120") { Ok(said) } else { Err(said) }
    })
    .await;
    assert!(said.contains("short_cap_micro"), "{said}");
    let (_, metrics) = world.service.get("/metrics", None).await;
    assert!(String::from_utf8(metrics).unwrap().contains("infera_settlement_escrow_short_micro 120\n"));
    // Less than a request and what is owed: it is not spent.
    world.consumer.deposit(650).await.unwrap();
    world.allow(5_000).await;
    world.wait("/available_micro", 650 - CHARGE).await;
    let rejected = world.rejected().await;
    assert!(rejected.message.contains("the escrow leaves 530, 70 too little"), "{}", rejected.message);
    world.audit(|audit| audit["escrow_debt_micro"] == 0).await;
    eventually(DEADLINE, async || world.check("escrow").await == "up").await;

    // The batch, at last: it brings what is owed.
    let World { anvil, contracts, mut place, service, consumer } = world;
    service.stop().await;
    place.config = config.unwrap();
    place.config.batch.age_ms = 50;
    let service = place.start().await;
    let world = World { anvil, contracts, place, service, consumer };
    world.wait("/escrow/charged_on_chain_micro", CHARGE).await;
    world.audit(|audit| audit["escrow_charged_micro"] == CHARGE).await;
    world.service.stop().await;
}

#[tokio::test]
async fn a_deposit_that_is_reorganised_away_was_never_spent() {
    let world = World::with(Column::Embedded, |place| place.config.chain.confirmations = 6).await;
    world.allow(5_000).await;
    world.consumer.deposit(1_000).await.unwrap();
    world.mine(2).await;
    let rejected = world.rejected().await;
    assert!(rejected.message.contains("the escrow leaves 0"), "{}", rejected.message);
    rpc(world.anvil.url(), "anvil_reorg", json!([3, []])).await;
    world.mine(12).await;
    assert_eq!(world.consumer.account(world.consumer.address()).await.unwrap().escrow, 0);
    // Another that stays is spent once it is six deep.
    world.consumer.deposit(700).await.unwrap();
    world.mine(4).await;
    let rejected = world.rejected().await;
    assert!(rejected.message.contains("the escrow leaves 0"), "{}", rejected.message);
    world.mine(1).await;
    world.wait("/available_micro", 700).await;
    world.audit(|audit| audit["deposits_micro"] == -700).await;
    world.service.stop().await;
}

#[tokio::test]
async fn a_new_database_goes_on_from_what_the_chain_has_charged() {
    let world = World::new(Column::Embedded).await;
    world.ready(1_000).await;
    world.decide(&world.ask());
    world.wait("/escrow/charged_on_chain_micro", CHARGE).await;
    let World { anvil, contracts, service, consumer, .. } = world;
    service.stop().await;
    let mut place =
        crate::batches::place(Column::Embedded, anvil.url(), Address(contracts.settlement.into())).await;
    place.config.chain.poll_ms = 20;
    let service = place.start().await;
    let world = World { anvil, contracts, place, service, consumer };
    // What was signed before stands on the chain. The first look is over when the check says so.
    world.wait("/available_micro", 880).await;
    eventually(DEADLINE, async || world.check("escrow").await == "up").await;
    world.decide(&world.ask());
    world.wait("/escrow/charged_on_chain_micro", 2 * CHARGE).await;
    world.wait("/available_micro", 760).await;
    world.audit(|audit| audit["escrow_charged_micro"] == 240).await;
    let db =
        infera_runtime::db::connect(world.place.config.common.database_url.expose(), None).await.unwrap();
    let row = escrows::find(&db, &crate::wallets::address(0)).await.unwrap().unwrap();
    assert_eq!((row.before_micro, row.owed_micro), (120, 240));
    world.service.stop().await;
}

#[tokio::test]
async fn while_the_chain_is_not_seen_prepaid_credit_is_spent_and_escrow_is_not() {
    let credit = crate::service::credit(&crate::wallets::address(0).to_string(), 700);
    let world = World::with(Column::Embedded, |place| {
        place.config.escrow.stale_secs = 1;
        place.config.prepaid_credits.push(credit);
    })
    .await;
    world.ready_with(700, 1_000).await;
    let World { anvil, place, service, consumer, .. } = world;
    drop(anvil);
    eventually(DEADLINE, async || {
        let (_, body) = service.get("/readyz", None).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        body["checks"]["escrow"] != "up"
    })
    .await;
    let mut funded = place.listen("mempool.funded").await;
    let mut rejected = place.listen("gateway.rejected").await;
    let ask = || place.submit(&place.network.submitted(&consumer.account_name()));
    ask();
    let first: v1::RequestFunded = funded.next().await;
    assert_eq!(first.held_micro, 600, "prepaid");
    // Nothing is seen any more: in a second it is too old.
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    ask();
    let refused: v1::RequestRejected = rejected.next().await;
    let (code, said) = (refused.code, refused.message);
    assert_eq!(code, "overloaded", "{said}");
    assert!(said.contains("the chain was not seen"), "{said}");
    service.stop().await;
}
