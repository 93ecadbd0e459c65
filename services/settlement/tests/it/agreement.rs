//! What must be true when a schedule has ended: books, chain and batches agree to the last unit.

use infera_protocol::{bytes::Hash32, merkle::MerkleTree};
use infera_settlement::{
    chain::{Link, Port},
    domain::reward_root,
    escrow,
    ledger::{self, Account},
    store::{self, batches, escrows, rewards},
};
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use uuid::Uuid;

use crate::{
    schedules::{CREDIT, Outcome, Parts, Request, Terms, World},
    wallets::{self, WALLETS},
};

/// The wallets' charges: the books' and the chain's are the same, to the last unit. Returns their sum.
pub async fn charged(parts: &Parts<impl World>, requests: &[Request]) -> i64 {
    let port = parts.world.link().connect().await.unwrap();
    let newest = port.newest().await.unwrap().number;
    let mut sum = 0;
    for wallet in 0..WALLETS.len() {
        let of = wallets::address(wallet);
        let chain = port.escrow(of.0.into(), newest).await.unwrap();
        let mut expected = 0;
        for request in requests.iter().filter(|request| request.account == of.to_string()) {
            let row = store::requests::find(&parts.db, request.id).await.unwrap().unwrap();
            let settled = row.state == "settled";
            assert_eq!(row.charged_escrow_micro, if settled { request.charge } else { 0 }, "{row:?}");
            assert_ne!(row.state, "open");
            expected += row.charged_escrow_micro;
        }
        assert_eq!(chain.charged, u128::try_from(expected).unwrap(), "charged once, and all of it");
        // A wallet whose only deposits were in replaced blocks has no row.
        let row = escrows::find(&parts.db, &of).await.unwrap();
        assert_eq!(row.map_or(0, |row| row.owed_micro), expected);
        let balance = async |account: Account| ledger::balance(&parts.db, &account).await.unwrap();
        assert_eq!(
            u128::try_from(balance(Account::Escrow(of.to_string())).await).unwrap(),
            chain.escrow,
            "what is left is what the chain has"
        );
        assert_eq!(balance(Account::EscrowDebt(of.to_string())).await, 0);
        sum += expected;
    }
    sum
}

pub async fn audit(db: &DatabaseConnection) -> ledger::Audit {
    let audit = ledger::audit(db).await.unwrap();
    assert!(audit.ok, "{audit:?}");
    audit
}

/// Whether the newest block's escrows are final and in the books.
pub async fn known(parts: &Parts<impl World>) -> bool {
    let port = parts.world.link().connect().await.unwrap();
    let newest = port.newest().await.unwrap().number;
    for wallet in 0..WALLETS.len() {
        let of = wallets::address(wallet);
        let chain = port.escrow(of.0.into(), newest).await.unwrap();
        let row = escrows::find(&parts.db, &of).await.unwrap();
        let (escrow, charged) = row.map_or((0, 0), |row| (row.escrow_micro, row.charged_micro));
        if (u128::try_from(escrow), u128::try_from(charged)) != (Ok(chain.escrow), Ok(chain.charged)) {
            return false;
        }
    }
    true
}

pub async fn number(db: &DatabaseConnection, sql: &str) -> i64 {
    let statement = Statement::from_string(db.get_database_backend(), sql);
    db.query_one_raw(statement).await.unwrap().unwrap().try_get("", "value").unwrap()
}

pub async fn check<W: World>(parts: &Parts<W>, requests: &[Request], terms: &Terms) -> Outcome {
    let db = &parts.db;
    let audit = audit(db).await;
    let mut settled = Vec::new();
    for request in requests {
        let row = store::requests::find(db, request.id).await.unwrap().unwrap();
        // A wallet that had too little at that moment was rejected.
        let rejected = escrow::wallet(&request.account).is_some() && row.state == "rejected";
        assert_eq!(row.charged_micro, if rejected { 0 } else { request.charge }, "{row:?}");
        if row.charged_micro > 0 {
            settled.push((request.id, row.charged_micro));
        }
    }
    let charged: i64 = settled.iter().map(|(_, charge)| charge).sum();
    assert_eq!(audit.operators_micro, charged, "operators earn what was charged");
    assert_eq!((audit.held_micro, audit.reserve_micro), (0, 0));
    for (account, credit) in [("alice", CREDIT), ("bob", 500)] {
        let spent: i64 = requests.iter().filter(|r| r.account == account).map(|r| r.charge).sum();
        let left = ledger::balance(db, &Account::Consumer(account.into())).await.unwrap();
        assert_eq!(left, i64::try_from(credit).unwrap() - spent, "{account}");
    }

    // The chain against the database, batch by batch.
    let port = parts.world.link().connect().await.unwrap();
    let head = port.head().await.unwrap();
    let (mut seen, mut total) = (Vec::new(), 0);
    for sequence in 1..=head.sequence {
        let posted = port.posted(sequence, 0).await.unwrap().unwrap();
        let leaves = batches::leaves(db, i64::try_from(sequence).unwrap()).await.unwrap();
        let hashes: Vec<Hash32> = leaves.iter().map(|(_, leaf)| *leaf).collect();
        assert_eq!(posted.batch.receipts_root.0, MerkleTree::new(&hashes).unwrap().root().0);
        assert_eq!(posted.batch.count, leaves.len() as u64);
        seen.extend(leaves.into_iter().map(|(id, _)| id));
        total += posted.batch.total;
    }
    let mut settled: Vec<Uuid> = settled.into_iter().map(|(id, _)| id).collect();
    seen.sort();
    settled.sort();
    assert_eq!(seen, settled, "every receipt in exactly one batch: none lost, none twice");
    assert_eq!(total, u128::try_from(charged).unwrap(), "the chain's totals are the ledger's charges");
    let last = number(db, "SELECT COALESCE(MAX(sequence), 0) AS value FROM batches").await;
    assert_eq!(u64::try_from(last).unwrap(), head.sequence);

    // The rewards: what is queued last is what the ledger owes, operator by operator.
    let queued = port.rewards().await.unwrap();
    assert_eq!(queued.last_total, u128::try_from(charged).unwrap(), "rewards are queued to the last unit");
    let earned = rewards::as_of(db, queued.last_sequence).await.unwrap();
    for (operator, cumulative) in &earned {
        let balance = ledger::balance(db, &Account::Operator(*operator)).await.unwrap();
        assert_eq!(u64::try_from(balance).unwrap(), *cumulative, "{operator}");
    }
    if queued.last_sequence > 0 {
        let posted = port.posted(queued.last_sequence, 0).await.unwrap().unwrap();
        assert_eq!(posted.batch.reward_root.0, reward_root(&earned).0);
    }

    let said = number(db, "SELECT COUNT(*) AS value FROM outbox WHERE kind = 'batch.anchored'").await;
    let receipts = number(db, "SELECT COUNT(*) AS value FROM outbox WHERE kind = 'receipt'").await;
    assert_eq!(receipts, i64::try_from(settled.len()).unwrap());
    if terms.never_taken_back() {
        assert_eq!(said, last, "every batch is said to be anchored once");
    } else {
        assert!(said >= last, "{said} of {last} batches were said");
    }
    let taken_back = u64::try_from(said - last).unwrap();
    Outcome { settled: settled.len() as u64, batches: head.sequence, taken_back, ..Outcome::default() }
}
