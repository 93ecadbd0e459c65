//! Real processes that are killed at every await between commit, post and ack.

use std::process::Command;

use infera_protocol::bytes::Address;
use infera_runtime::config::Secret;
use infera_settlement::{
    Config,
    chain::{ChainReader, consumer::Consumer, operator::Operator},
};
use infera_testkit::{anvil::Anvil, eventually};
use infera_wire::v1;
use uuid::Uuid;

use crate::{
    batches::{anchored, decided, deploy, place, prove, reader},
    chain::{DEPLOYER, SETTLER},
    service::{Column, DEADLINE, Place, Service},
    wallets::WALLETS,
};

const CHILD_CONFIG: &str = "INFERA_TEST_CHILD_CONFIG";

/// Not a test by itself: the process that the tests here kill. It serves with the configuration given until it aborts at
/// the planned point.
#[test]
fn child_that_is_killed() {
    let Ok(path) = std::env::var(CHILD_CONFIG) else { return };
    let config = Config::load(Some(path.as_ref())).unwrap();
    actix_rt::System::new().block_on(async {
        let bus = infera_bus::Bus::in_process();
        let stop = infera_runtime::CancellationToken::new();
        let stopper = stop.clone();
        // A point that is never reached must fail the parent's assertion, not hang it.
        actix_rt::spawn(async move {
            tokio::time::sleep(DEADLINE).await;
            stopper.cancel();
        });
        infera_settlement::run(config, infera_settlement::Deps { bus, bound: None }, stop).await.unwrap();
    });
}

/// The settings of `place` as a file, for another process.
fn config_file(place: &Place) -> std::path::PathBuf {
    let common = &place.config.common;
    let text = format!(
        "http_bind = \"127.0.0.1:0\"\ndatabase_url = {:?}\njwks_path = {:?}\nmanifest_path = {:?}\n\
         registry_path = {:?}\n[chain]\nsettler_key = {SETTLER:?}\nresend_ms = 200\n[batch]\nage_ms = 50\n\
         [escrow]\ncharges = 1\n",
        common.database_url.expose(),
        common.jwks_path,
        common.manifest_path,
        common.registry_path,
    );
    let path = place.dir.path().join("settlement.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Starts a process on the database of `place` and waits until it has died at `point`.
async fn die(place: &Place, point: &str) {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child_that_is_killed"])
        .env(CHILD_CONFIG, config_file(place))
        .env("INFERA_FAIL", format!("{point}=abort"))
        .output();
    let child = tokio::task::spawn_blocking(|| child).await.unwrap().unwrap();
    let died = std::os::unix::process::ExitStatusExt::signal(&child.status);
    assert_eq!(died, Some(6), "{point}: {}", String::from_utf8_lossy(&child.stdout));
}

/// The books balance, the chain's batches hold each of `ids` once, and its rewards are what the ledger owes.
async fn agree(service: &Service, reader: &ChainReader, ids: &[Uuid], point: &str) {
    let earned = u128::from(service.audit().await["operators_micro"].as_u64().unwrap());
    let head = reader.head().await.unwrap();
    let (mut receipts, mut total) = (0, 0);
    for sequence in 1..=head.sequence {
        let batch = reader.posted(sequence, 0).await.unwrap().unwrap().batch;
        (receipts, total) = (receipts + batch.count, total + batch.total);
    }
    assert_eq!((receipts, total), (ids.len() as u64, earned), "{point}");
    eventually(DEADLINE, async || {
        // anvil may refuse a call in the very moment in which it makes a block.
        let queued = reader.rewards().await.map_err(|error| error.to_string())?;
        if queued.last_total == earned { Ok(()) } else { Err(format!("{queued:?}")) }
    })
    .await;
}

#[tokio::test]
async fn every_crash_ends_in_one_batch() {
    let anvil = Anvil::start().await;
    for point in [
        "settlement.batch.before_form",
        "settlement.batch.in_form",
        "settlement.batch.after_form",
        "settlement.batch.before_sign",
        "settlement.batch.in_sign",
        "settlement.batch.after_sign",
        "settlement.batch.before_send",
        "settlement.batch.after_send",
        "settlement.batch.before_mark",
        "settlement.batch.in_mark",
        "settlement.batch.after_mark",
        "outbox.batch.anchored.before_publish",
    ] {
        let contract = deploy(anvil.url()).await;
        let mut place = place(Column::Embedded, anvil.url(), contract).await;
        // First receipts only, then the process that is killed while it anchors them.
        place.config.chain.settler_key = Secret::default();
        let mut issued = place.listen("explorer.receipt").await;
        let service = place.start().await;
        let ids = decided(&place, 3);
        for _ in &ids {
            let _: v1::ReceiptIssued = issued.next().await;
        }
        service.stop().await;
        die(&place, point).await;

        place.config.chain.settler_key = Secret::new(SETTLER);
        let mut told = place.listen("explorer.anchored").await;
        let service = place.start().await;
        let reader = reader(anvil.url(), contract).await;
        prove(&reader, &anchored(&service, &place, &ids).await).await;
        assert_eq!(reader.head().await.unwrap().sequence, 1, "{point}");
        let message: v1::BatchAnchored = told.next().await;
        assert_eq!(message.request_ids.len(), 3, "{point}");
        agree(&service, &reader, &ids, point).await;
        service.stop().await;
    }
}

#[tokio::test]
async fn every_crash_ends_in_one_queued_root() {
    let anvil = Anvil::start().await;
    for point in ["before_sign", "in_sign", "after_sign", "before_send", "after_send"] {
        let contract = deploy(anvil.url()).await;
        let mut place = place(Column::Embedded, anvil.url(), contract).await;
        // A batch without its rewards, then the process that is killed while it queues them by themselves.
        place.config.rewards.queue = false;
        let service = place.start().await;
        let ids = decided(&place, 2);
        anchored(&service, &place, &ids).await;
        service.stop().await;
        let reader = reader(anvil.url(), contract).await;
        assert_eq!(reader.rewards().await.unwrap().last_id, 0);
        die(&place, &format!("settlement.rewards.{point}")).await;

        place.config.rewards.queue = true;
        let service = place.start().await;
        agree(&service, &reader, &ids, point).await;
        assert_eq!(reader.rewards().await.unwrap().last_id, 1, "{point}");
        service.stop().await;
    }
}

/// A wallet's money on a chain of its own.
struct Wallet {
    consumer: Consumer,
    contract: Address,
}

/// Wallets with 1,000 each in escrow, at contracts of their own.
async fn wallets(anvil: &Anvil, count: usize) -> Vec<Wallet> {
    let contracts = crate::chain::contracts(anvil.url()).await;
    let treasury = Operator::connect(anvil.url(), DEPLOYER, contracts).await.unwrap();
    let mut wallets = Vec::new();
    for key in &WALLETS[..count] {
        let consumer = Consumer::connect(anvil.url(), key, contracts).await.unwrap();
        treasury.transfer(consumer.address(), 1_000).await.unwrap();
        consumer.deposit(1_000).await.unwrap();
        wallets.push(Wallet { consumer, contract: Address(contracts.settlement.into()) });
    }
    wallets
}

impl Wallet {
    /// Signs for all of it, and waits until it can be spent.
    async fn ready(&self, place: &Place, service: &Service) {
        let name = self.consumer.account_name();
        let signature = self.consumer.voucher(1_000).unwrap();
        let body = serde_json::json!({ "cumulative_micro": 1_000, "signature": signature });
        assert_eq!(service.post("/v1/vouchers", &place.key(&name), &body).await.0, 200);
        service.wait_balance(place, &name, (1_000, 0)).await;
        // The look is over that found it.
        eventually(DEADLINE, async || {
            let (_, body) = service.get("/readyz", None).await;
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            if body["checks"]["escrow"] == "up" { Ok(()) } else { Err(body) }
        })
        .await;
    }
}

#[tokio::test]
async fn every_crash_credits_a_deposit_once() {
    let anvil = Anvil::start_with(&["64"]).await;
    for point in ["before_mark", "in_mark", "after_mark", "before_post", "in_post", "after_post"] {
        let wallet = wallets(&anvil, 1).await.remove(0);
        let place = place(Column::Embedded, anvil.url(), wallet.contract).await;
        die(&place, &format!("settlement.escrow.{point}")).await;
        let service = place.start().await;
        wallet.ready(&place, &service).await;
        let audit = service.audit().await;
        assert_eq!(
            (&audit["deposits_micro"], &audit["escrow_micro"]),
            (&(-1_000).into(), &1_000.into()),
            "{point}"
        );
        service.stop().await;
    }
}

#[tokio::test]
async fn every_crash_charges_once() {
    let anvil = Anvil::start_with(&["64"]).await;
    // One account is charged along with the batch, the other by itself.
    for point in [
        "batch.before_sign",
        "batch.in_sign",
        "batch.after_sign",
        "batch.before_send",
        "batch.after_send",
        "batch.before_mark",
        "batch.in_mark",
        "batch.after_mark",
        "charges.before_sign",
        "charges.in_sign",
        "charges.after_sign",
        "charges.before_send",
        "charges.after_send",
    ] {
        let wallets = wallets(&anvil, 2).await;
        let mut place = place(Column::Embedded, anvil.url(), wallets[0].contract).await;
        place.config.chain.poll_ms = 20;
        place.config.batch.age_ms = 600_000;
        let service = place.start().await;
        for wallet in &wallets {
            wallet.ready(&place, &service).await;
            let submitted = place.network.submitted(&wallet.consumer.account_name());
            place.submit(&submitted);
            place.decide(&place.network.verified(&place.network.evidence(&submitted, 2, 1)));
            service.wait_balance(&place, &submitted.account, (1_000 - 120, 0)).await;
        }
        service.stop().await;
        die(&place, &format!("settlement.{point}")).await;

        place.config.batch.age_ms = 50;
        let service = place.start().await;
        for wallet in &wallets {
            let of = wallet.consumer.address();
            eventually(DEADLINE, async || {
                let account = wallet.consumer.account(of).await.map_err(|error| error.to_string())?;
                let done = (account.escrow, account.charged) == (880, 120);
                if done { Ok(()) } else { Err(format!("{point}: {account:?}")) }
            })
            .await;
        }
        eventually(DEADLINE, async || {
            let audit = service.audit().await;
            if audit["escrow_charged_micro"] == 240 { Ok(()) } else { Err(audit) }
        })
        .await;
        let funded = wallets[0].consumer.reader().total_funded().await.unwrap();
        assert_eq!(funded - 10_000_000_000_000, 240, "{point}: charged once");
        service.stop().await;
    }
}
