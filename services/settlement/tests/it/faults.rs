//! The running service on a real anvil while the chain misbehaves, one fault at a time.

use infera_protocol::document::Status;
use infera_runtime::config::Secret;
use infera_settlement::chain::{Address, ChainReader, operator::Operator};
use infera_testkit::{anvil::Anvil, eventually};
use infera_wire::v1;
use serde_json::json;
use uuid::Uuid;

use crate::{
    anvil_world::{Chain, rpc},
    batches::{decided, document},
    chain::{DEPLOYER, SETTLER, SETTLER_ADDRESS},
    proxy::{Mode, Proxy},
    service::{Column, DEADLINE, Place, Service},
};

/// Blocks until a batch is final: deeper than the deepest reorganisation here.
const FINALITY: u64 = 13;
const REORG: u64 = 12;

async fn place(chain: &Chain) -> Place {
    let mut place = Place::new(Column::Embedded, chain.network()).await;
    place.config.chain.settler_key = Secret::new(SETTLER);
    place.config.chain.confirmations = FINALITY;
    place.config.chain.poll_ms = 20;
    place.config.chain.resend_ms = 200;
    place.config.batch.age_ms = 50;
    place.config.exposure.check_ms = 20;
    place
}

async fn reader(chain: &Chain) -> ChainReader {
    ChainReader::connect(chain.url(), chain.contracts.settlement).await.unwrap()
}

/// Transactions of the settler that wait: (max fee, hash).
async fn pool(chain: &Chain) -> Vec<(u128, String)> {
    let content = rpc(chain.url(), "txpool_content", json!([])).await;
    let of = |kind: &str| content[kind].as_object().cloned().unwrap_or_default();
    of("pending")
        .into_iter()
        .filter(|(from, _)| from.eq_ignore_ascii_case(SETTLER_ADDRESS))
        .flat_map(|(_, by_nonce)| by_nonce.as_object().cloned().unwrap_or_default())
        .map(|(_, tx)| {
            let fee = tx["maxFeePerGas"].as_str().unwrap().trim_start_matches("0x").to_owned();
            (u128::from_str_radix(&fee, 16).unwrap(), tx["hash"].as_str().unwrap().to_owned())
        })
        .collect()
}

/// Waits until one transaction waits, and for which `wanted` holds.
async fn waiting(chain: &Chain, wanted: impl Fn(u128) -> bool) -> (u128, String) {
    eventually(DEADLINE, async || match &pool(chain).await[..] {
        [(fee, hash)] if wanted(*fee) => Ok((*fee, hash.clone())),
        other => Err(format!("{other:?}")),
    })
    .await
}

/// Makes blocks until the batches on the chain are final.
async fn finish(chain: &Chain, service: &Service, place: &Place, ids: &[Uuid]) {
    for id in ids {
        eventually(DEADLINE, async || {
            chain.mine(1).await;
            document(service, place, *id).await.filter(|(document, _)| document.status == Status::Anchored)
        })
        .await;
    }
}

/// The books balance, and what the chain says of its batches and its last reward root is what they say.
async fn agree(chain: &Chain, service: &Service, ids: &[Uuid]) {
    let reader = reader(chain).await;
    let head = reader.head().await.unwrap();
    let (mut receipts, mut total) = (0, 0);
    for sequence in 1..=head.sequence {
        let batch = reader.posted(sequence, 0).await.unwrap().unwrap().batch;
        receipts += batch.count;
        total += batch.total;
    }
    assert_eq!(receipts, ids.len() as u64, "every receipt once");
    // An audit is said again for 2 s.
    let earned = eventually(DEADLINE, async || {
        let audit = service.audit().await;
        let earned = u128::from(audit["operators_micro"].as_u64().unwrap());
        if earned == total { Ok(earned) } else { Err(audit) }
    })
    .await;
    // A root that waits for its interval is queued by itself.
    eventually(DEADLINE, async || {
        chain.mine(1).await;
        // anvil may refuse a call in the very moment in which it makes a block.
        let queued = reader.rewards().await.map_err(|error| error.to_string())?;
        if queued.last_total == earned { Ok(()) } else { Err(format!("{queued:?}")) }
    })
    .await;
}

#[tokio::test]
async fn what_waits_too_long_is_replaced_by_what_pays_more() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    place.config.chain.bump_ms = 300;
    place.config.chain.max_fee_gwei = 2;
    // The market's price is what the last blocks cost.
    rpc(chain.url(), "anvil_setNextBlockBaseFeePerGas", json!(["0x2faf0800"])).await;
    chain.mine(1).await;
    let service = place.start().await;
    let ids = decided(&place, 2);
    let (first_fee, first) = waiting(&chain, |_| true).await;
    let (second_fee, second) = waiting(&chain, |fee| fee > first_fee).await;
    assert!(second_fee >= first_fee + first_fee / 10 && second != first, "{first_fee} {second_fee}");
    // It ends at the configured fee, and waits there.
    let (last_fee, _) = waiting(&chain, |fee| fee * 11 / 10 > 2_000_000_000).await;
    assert!(last_fee <= 2_000_000_000, "{last_fee}");
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    service.stop().await;
}

#[tokio::test]
async fn a_dear_chain_is_paid_and_an_older_variant_counts_as_well() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    place.config.chain.bump_ms = 300;
    let service = place.start().await;
    let ids = decided(&place, 1);
    let (first_fee, first) = waiting(&chain, |_| true).await;
    let raw = rpc(chain.url(), "eth_getRawTransactionByHash", json!([first])).await;
    waiting(&chain, |fee| fee > first_fee).await;
    // The block takes the first one, which everybody else has forgotten.
    rpc(chain.url(), "anvil_dropAllTransactions", json!([])).await;
    place_in_block(&chain, raw).await;
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;

    rpc(chain.url(), "anvil_setNextBlockBaseFeePerGas", json!(["0x174876e800"])).await;
    let more = decided(&place, 1);
    finish(&chain, &service, &place, &more).await;
    service.stop().await;
}

/// Sends signed bytes and makes a block, before settlement sends others.
async fn place_in_block(chain: &Chain, raw: serde_json::Value) {
    eventually(DEADLINE, async || {
        let hash = crate::anvil_world::try_rpc(chain.url(), "eth_sendRawTransaction", json!([raw])).await;
        if hash.get("error").is_some() {
            // A dearer one came back first.
            rpc(chain.url(), "anvil_dropAllTransactions", json!([])).await;
            return false;
        }
        chain.mine(1).await;
        reader(chain).await.head().await.is_ok_and(|head| head.sequence == 1)
    })
    .await;
}

#[tokio::test]
async fn a_reorganisation_of_twelve_blocks_loses_nothing() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    let mut told = place.listen("explorer.anchored").await;
    place.config.batch.size = 2;
    place.config.batch.limit = 2;
    let service = place.start().await;
    let mut ids = decided(&place, 5);
    let reader = reader(&chain).await;
    eventually(DEADLINE, async || {
        // No block without the settler's transactions, however slow the machine is: all of them must be among the twelve.
        if !pool(&chain).await.is_empty() {
            chain.mine(1).await;
        }
        reader.head().await.is_ok_and(|head| head.sequence >= 3)
    })
    .await;
    // Twelve blocks deep, and not said to be anchored: it would have been too early.
    chain.reorg(REORG).await;
    assert_eq!(reader.head().await.unwrap().sequence, 0);
    ids.extend(decided(&place, 1));
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    let batches = reader.head().await.unwrap().sequence;
    let mut said = Vec::new();
    for _ in 1..=batches {
        let message: v1::BatchAnchored = told.next().await;
        said.push(message.sequence);
    }
    said.sort_unstable();
    assert_eq!(said, (1..=batches).collect::<Vec<_>>(), "each was said once");
    let (_, metrics) = service.get("/metrics", None).await;
    assert!(!String::from_utf8(metrics).unwrap().contains("step=\"lost\""));
    service.stop().await;
}

#[tokio::test]
async fn a_reorganisation_deeper_than_finality_takes_back_what_was_anchored() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    place.config.chain.confirmations = 2;
    place.config.batch.size = 1;
    place.config.batch.limit = 1;
    let service = place.start().await;
    let ids = decided(&place, 3);
    finish(&chain, &service, &place, &ids).await;
    let taken_back = async || {
        let mut pending = 0;
        for id in &ids {
            let (document, _) = document(&service, &place, *id).await.unwrap();
            pending += usize::from(document.status == Status::Pending);
        }
        pending
    };
    chain.reorg(REORG).await;
    let lost = 3 - reader(&chain).await.head().await.unwrap().sequence;
    assert!(lost > 0);
    // Nobody is told that a receipt is anchored which is not. (The probe for it is 5 s apart.)
    eventually(DEADLINE, async || taken_back().await as u64 == lost).await;
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    let (_, metrics) = service.get("/metrics", None).await;
    let figure = format!("infera_settlement_batches_total{{step=\"lost\"}} {lost}\n");
    assert!(String::from_utf8(metrics).unwrap().contains(&figure));
    service.stop().await;
}

#[tokio::test]
async fn a_nonce_that_somebody_else_used_and_a_pool_that_forgets_only_delay() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    place.config.chain.bump_ms = 600_000;
    let service = place.start().await;
    let ids = decided(&place, 2);
    let (_, ours) = waiting(&chain, |_| true).await;
    rpc(chain.url(), "anvil_dropAllTransactions", json!([])).await;
    let (_, again) = waiting(&chain, |_| true).await;
    assert_eq!(again, ours, "the same bytes are sent again");
    // Replaced by a transaction that pays better and does something else.
    rpc(chain.url(), "anvil_dropTransaction", json!([ours])).await;
    crate::schedules::World::event(&&chain, crate::schedules::Event::Foreign).await;
    chain.mine(1).await;
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    service.stop().await;
}

#[tokio::test]
async fn an_answer_that_never_comes_and_an_outage_post_nothing_twice() {
    let chain = Chain::start().await;
    let place = place(&chain).await;
    let service = place.start().await;
    let down = async || {
        let (_, body) = service.get("/readyz", None).await;
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        body["checks"]["chain"] != "up"
    };
    eventually(DEADLINE, async || !down().await).await;
    chain.proxy.set(Mode::LoseAnswers);
    let mut ids = decided(&place, 1);
    eventually(DEADLINE, &down).await;
    chain.proxy.set(Mode::Pass);
    waiting(&chain, |_| true).await;
    // It hangs after the transaction is out; settlement gives up the call, not the batch.
    chain.proxy.set(Mode::Hang);
    ids.extend(decided(&place, 2));
    eventually(DEADLINE, &down).await;
    chain.mine(1).await;
    chain.proxy.set(Mode::Refuse);
    ids.extend(decided(&place, 1));
    eventually(DEADLINE, &down).await;
    chain.proxy.set(Mode::Pass);
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    service.stop().await;
}

#[tokio::test]
async fn the_exposure_cap_stops_new_paid_work_only_when_it_is_reached() {
    let chain = Chain::start().await;
    let mut place = place(&chain).await;
    // Two receipts of 120 and one more reach it.
    place.config.exposure.cap_micro = 300;
    let mut rejected = place.listen("gateway.rejected").await;
    let mut funded = place.listen("mempool.funded").await;
    let service = place.start().await;
    let readiness = async || {
        let (_, body) = service.get("/readyz", None).await;
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        body["checks"]["exposure"].as_str().unwrap().to_owned()
    };
    let mut ids = decided(&place, 2);
    service.wait_balance(&place, "alice", (10_000 - 240, 0)).await;
    eventually(DEADLINE, async || readiness().await == "up").await;
    ids.extend(decided(&place, 1));
    service.wait_balance(&place, "alice", (10_000 - 360, 0)).await;
    let said = eventually(DEADLINE, async || {
        let said = readiness().await;
        if said.contains("exposure cap") { Ok(said) } else { Err(said) }
    })
    .await;
    assert!(said.contains("360 of 300"), "{said}");
    for _ in 0..3 {
        let _: v1::RequestFunded = funded.next().await;
    }

    let late = place.network.submitted("alice");
    place.submit(&late);
    let message: v1::RequestRejected = rejected.next().await;
    assert_eq!(message.code, "overloaded");
    assert!(message.message.contains("exposure cap"), "{}", message.message);
    let (_, metrics) = service.get("/metrics", None).await;
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(metrics.contains("infera_settlement_exposure_reached 1\n"), "{metrics}");
    assert!(metrics.contains("infera_settlement_exposure_micro 360\n"), "{metrics}");
    assert_eq!(service.balance(&place, "alice").await, (10_000 - 360, 0), "nothing is held");

    // What is on the chain and final is no exposure any more.
    finish(&chain, &service, &place, &ids).await;
    eventually(DEADLINE, async || readiness().await == "up").await;
    ids.extend(decided(&place, 1));
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    service.stop().await;
}

#[tokio::test]
async fn a_vetoed_root_comes_back_with_the_next_batch() {
    let chain = Chain::start().await;
    let place = place(&chain).await;
    let service = place.start().await;
    let ids = decided(&place, 1);
    finish(&chain, &service, &place, &ids).await;
    agree(&chain, &service, &ids).await;
    // The guardian strikes the root; the next batch's brings it back.
    let guardian = "0x5de4111afa1a4b94908f83103eb1f1706367c2e68ca870fc3fb9a804cdab365a";
    let reader = reader(&chain).await;
    let id = reader.rewards().await.unwrap().last_id;
    let operator = Operator::connect(chain.url(), guardian, chain.contracts).await.unwrap();
    rpc(chain.url(), "evm_setAutomine", json!([true])).await;
    operator.veto(id, reader.reward_root(id).await.unwrap().root).await.unwrap();
    assert_eq!(reader.rewards().await.unwrap().last_total, 0);
    rpc(chain.url(), "evm_setAutomine", json!([false])).await;
    let more = decided(&place, 1);
    finish(&chain, &service, &place, &more).await;
    agree(&chain, &service, &[ids, more].concat()).await;
    service.stop().await;
}

#[tokio::test]
async fn what_was_sent_is_looked_for_although_an_answer_is_lost() {
    let anvil = Anvil::start().await;
    let contracts = crate::chain::contracts(anvil.url()).await;
    let proxy = Proxy::start(anvil.url()).await;
    let to = Address::repeat_byte(9);
    let (send, receipt) = ("eth_sendRawTransaction", "eth_getTransactionReceipt");
    for (n, (method, arrives)) in (1_u128..).zip([(send, true), (send, false), (receipt, true)]) {
        let treasury = Operator::connect(&proxy.url, DEPLOYER, contracts).await.unwrap();
        if arrives {
            proxy.lose_answer_to(method)
        } else {
            proxy.lose_call_of(method)
        }
        treasury.transfer(to, 5).await.unwrap();
        assert!(proxy.has_lost(), "{method}");
        assert_eq!(treasury.tokens(to).await.unwrap(), 5 * n, "once");
    }
}
