//! What consumers with a wallet have on the chain, and what of it they may spend.
//!
//! ```text
//! Deposited, Withdrawn ... -> follow: final block -> escrows, deposit or withdrawal in the ledger
//! request  -> hold: min(escrow - withdrawals, voucher) - charged - held
//! verdict  -> charged in the ledger, owed -> charge(sequence, charges) along with the batch -> final block
//! ```
//!
//! Only final blocks bring money in. What takes money out counts as soon as it is seen: an announced withdrawal lowers
//! what may be spent from the newest block on. What was held before the announcement is charged before its delay ends:
//! [`Freshness`] admits no request for which that is not certain.
//!
//! [`Standing`] decides, [`spend`] holds, [`follow`] reads the chain.

pub mod follow;
mod post;
pub mod spend;

pub use post::{Moved, settle};

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use infera_protocol::bytes::Address;

use crate::domain::Rejection;

/// The wallet that an account's name says: 0x and 40 lowercase hex digits. Other accounts have prepaid credit only.
pub fn wallet(account: &str) -> Option<Address> {
    account.parse().ok()
}

/// A wallet's money in the contract as of one block, 10^-6 INFER.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AtBlock {
    /// Neither charged nor withdrawn.
    pub escrow: i64,
    /// Charged over the account's lifetime.
    pub charged: i64,
    /// Announced to be withdrawn.
    pub withdrawal: i64,
}

impl AtBlock {
    /// All that charges can ever reach, if the withdrawal takes place.
    fn reachable(&self) -> i64 {
        self.escrow.saturating_sub(self.withdrawal).max(0).saturating_add(self.charged)
    }
}

/// What decides how much a wallet may spend, 10^-6 INFER.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// As of the final block.
    pub settled: AtBlock,
    /// As of the newest block, where it differs.
    pub head: Option<AtBlock>,
    /// The highest voucher: the most that may ever be charged.
    pub voucher: i64,
    /// Charged by the books, on the chain or not.
    pub owed: i64,
    /// Held for open requests.
    pub held: i64,
}

impl Standing {
    /// What escrow leaves; below zero if more was spent than there is.
    pub fn by_escrow(&self) -> i64 {
        let settled = self.settled.reachable();
        let reachable = self.head.map_or(settled, |head| settled.min(head.reachable()));
        reachable.saturating_sub(self.owed).saturating_sub(self.held)
    }

    /// What the voucher leaves; below zero without one.
    pub fn by_voucher(&self) -> i64 {
        self.voucher.saturating_sub(self.owed).saturating_sub(self.held)
    }

    /// What may be held now.
    pub fn free(&self) -> u64 {
        u64::try_from(self.by_escrow().min(self.by_voucher())).unwrap_or(0)
    }

    /// Announced to be withdrawn, as far as it is known.
    pub fn withdrawal(&self) -> i64 {
        self.head.map_or(0, |head| head.withdrawal).max(self.settled.withdrawal)
    }

    /// Why `needed` of escrow is not held for a request of `hold`: which limit is too small, by how much, and what helps.
    pub fn rejection(&self, hold: u64, needed: u64) -> Rejection {
        let needed = i64::try_from(needed).unwrap_or(i64::MAX);
        let missing = |left: i64| needed.saturating_sub(left);
        let (by_escrow, by_voucher) = (self.by_escrow(), self.by_voucher());
        let mut reasons = Vec::new();
        if by_escrow < needed {
            let leaving = match self.withdrawal() {
                0 => String::new(),
                leaving => format!(" ({leaving} are being withdrawn)"),
            };
            reasons.push(format!(
                "the escrow leaves {}{leaving}, {} too little: deposit that much",
                by_escrow.max(0),
                missing(by_escrow)
            ));
        }
        if by_voucher < needed {
            reasons.push(format!(
                "the voucher leaves {}, {} too little: sign one for at least {} and send it to POST /v1/vouchers",
                by_voucher.max(0),
                missing(by_voucher),
                self.voucher.saturating_add(missing(by_voucher))
            ));
        }
        Rejection {
            code: "insufficient_quota",
            message: format!(
                "the request may cost up to {hold} micro-INFER, of which {needed} are not prepaid; {}; or lower max_tokens",
                reasons.join("; ")
            ),
        }
    }
}

/// When the chain was last seen, and how long the contract keeps what is announced to be withdrawn; clones share it.
///
/// Somebody may have announced a withdrawal right after the last look. So what is held now must be decided and charged
/// within the delay from then on: a request's deadline and the margin, in which it is settled, posted and taken into a
/// block, end before that, or its escrow is not spent.
///
/// The endpoint is trusted to advance with the chain: one that stands still and answers counts as a look.
#[derive(Debug, Clone, Default)]
pub struct Freshness {
    looked_at_ms: Arc<AtomicI64>,
    /// The contract's `WITHDRAWAL_DELAY`; below zero: not known yet.
    delay_ms: Arc<AtomicI64>,
    stale_ms: i64,
    margin_ms: i64,
}

impl Freshness {
    /// Not seen yet; too old after `stale_secs`. `margin_secs`: what settling, posting and a block take after a request's
    /// deadline.
    pub fn new(stale_secs: u32, margin_secs: u32) -> Self {
        Self {
            looked_at_ms: Arc::default(),
            delay_ms: Arc::new((-1).into()),
            stale_ms: i64::from(stale_secs) * 1_000,
            margin_ms: i64::from(margin_secs) * 1_000,
        }
    }

    /// The contract's withdrawal delay is known.
    pub fn delayed(&self, delay_secs: u64) {
        let delay_ms = i64::try_from(delay_secs).unwrap_or(i64::MAX).saturating_mul(1_000);
        self.delay_ms.store(delay_ms, Ordering::Relaxed);
    }

    /// Why no escrow of this contract is ever spent with these settings, and what helps.
    pub fn too_slow(&self) -> Option<String> {
        let delay_ms = self.delay_ms.load(Ordering::Relaxed);
        let needed_ms = self.stale_ms.saturating_add(self.margin_ms);
        (0..=needed_ms).contains(&delay_ms).then(|| {
            format!(
                "escrow is not spent: the contract's withdrawal delay of {} s is not longer than `escrow.stale_secs` + \
                 `escrow.margin_secs` = {} s, so that what is spent could be withdrawn before it is charged; lower these \
                 two, or deploy the contract with a longer delay",
                delay_ms / 1_000,
                needed_ms / 1_000
            )
        })
    }

    /// The chain was seen.
    pub fn looked(&self, now_ms: i64) {
        self.looked_at_ms.fetch_max(now_ms, Ordering::Relaxed);
    }

    /// Why escrow is not spent now for a request that may be open until `deadline_ms`; `None` if it is charged in time.
    pub fn rejection(&self, now_ms: i64, deadline_ms: i64) -> Option<Rejection> {
        let looked_at_ms = self.looked_at_ms.load(Ordering::Relaxed);
        let age_ms = now_ms.saturating_sub(looked_at_ms);
        let delay_ms = self.delay_ms.load(Ordering::Relaxed);
        let charged_ms = deadline_ms.max(now_ms).saturating_add(self.margin_ms);
        let message = if age_ms > self.stale_ms {
            let since = match looked_at_ms {
                0 => "since the start".to_owned(),
                _ => format!("for {} s", age_ms / 1_000),
            };
            format!(
                "the chain was not seen {since}, so escrow is not spent; try again later, prepaid credit is good meanwhile"
            )
        } else if delay_ms < 0 {
            "the contract's withdrawal delay is not known yet, so escrow is not spent; try again later"
                .to_owned()
        } else if let Some(reason) = self.too_slow() {
            reason
        } else if charged_ms > looked_at_ms.saturating_add(delay_ms) {
            format!(
                "the request may be charged {} s from now, and escrow can be withdrawn before that; use prepaid credit, or \
                 a shorter deadline (the gateway's `deadline_secs`)",
                charged_ms.saturating_sub(now_ms) / 1_000
            )
        } else {
            return None;
        };
        // The gateway answers it with 503, which clients try again.
        Some(Rejection { code: "overloaded", message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::deploy::Deployment;
    use proptest::prelude::*;

    fn at(escrow: i64, charged: i64, withdrawal: i64) -> AtBlock {
        AtBlock { escrow, charged, withdrawal }
    }

    fn standing(settled: AtBlock, voucher: i64, owed: i64, held: i64) -> Standing {
        Standing { settled, head: None, voucher, owed, held }
    }

    #[test]
    fn the_smaller_of_escrow_and_voucher_counts() {
        let cases = [
            // (escrow, charged, withdrawal), voucher, owed, held -> free
            (at(0, 0, 0), 0, 0, 0, 0),
            (at(1_000, 0, 0), 0, 0, 0, 0),
            (at(0, 0, 0), 1_000, 0, 0, 0),
            (at(1_000, 0, 0), 600, 0, 0, 600),
            (at(1_000, 0, 0), 5_000, 0, 0, 1_000),
            (at(1_000, 0, 0), 5_000, 0, 400, 600),
            // Charged by the books: on the chain or not, it is the same.
            (at(1_000, 0, 0), 5_000, 300, 0, 700),
            (at(700, 300, 0), 5_000, 300, 0, 700),
            (at(700, 300, 0), 900, 300, 100, 500),
            // On its way out.
            (at(1_000, 0, 900), 5_000, 0, 0, 100),
            (at(1_000, 0, 900), 5_000, 0, 200, 0),
            (at(100, 900, 1_000), 5_000, 900, 0, 0),
            // Withdrawn before it was charged.
            (at(0, 0, 0), 5_000, 300, 0, 0),
        ];
        for (settled, voucher, owed, held, free) in cases {
            let standing = standing(settled, voucher, owed, held);
            assert_eq!(standing.free(), free, "{standing:?}");
        }
    }

    #[test]
    fn the_newest_block_only_takes() {
        let settled = standing(at(1_000, 0, 0), 5_000, 0, 0);
        let with = |head: AtBlock| Standing { head: Some(head), ..settled }.free();
        assert_eq!(with(at(1_000, 0, 400)), 600, "announced");
        assert_eq!(with(at(600, 0, 0)), 600, "withdrawn already");
        assert_eq!(with(at(9_000, 0, 0)), 1_000, "a deposit waits for finality");
        assert_eq!(with(at(700, 300, 0)), 1_000, "charged: a charge moves nothing out of reach");
        let leaving = standing(at(1_000, 0, 400), 5_000, 0, 0);
        let cancelled = Standing { head: Some(at(1_000, 0, 0)), ..leaving };
        assert_eq!(cancelled.free(), 600, "taken back: from the final block on");
    }

    #[test]
    fn a_rejection_says_which_limit_by_how_much_and_what_helps() {
        let has = |standing: Standing, words: &[&str]| {
            let said = standing.rejection(600, 500).message;
            for word in words {
                assert!(said.contains(word), "{word}: {said}");
            }
            said
        };
        let said = has(standing(at(200, 0, 0), 900, 0, 0), &["the escrow leaves 200, 300 too little"]);
        assert!(!said.contains("voucher"), "{said}");
        let said = has(standing(at(900, 0, 0), 450, 50, 0), &["leaves 400, 100 too little", "at least 550"]);
        assert!(!said.contains("deposit"), "{said}");
        has(standing(at(900, 0, 800), 100, 0, 0), &["800 are being withdrawn", "at least 500", "max_tokens"]);
    }

    #[test]
    fn what_was_not_seen_for_long_is_not_spent() {
        let freshness = Freshness::new(10, 5);
        assert!(freshness.rejection(100_000, 0).is_some(), "never seen");
        freshness.looked(100_000);
        let rejection = freshness.rejection(100_000, 0).unwrap();
        assert!(rejection.message.contains("not known yet"), "{rejection:?}");
        freshness.delayed(1_000);
        assert_eq!(freshness.rejection(110_000, 0), None);
        let rejection = freshness.rejection(111_000, 0).unwrap();
        assert!(rejection.code == "overloaded" && rejection.message.contains("11 s"), "{rejection:?}");
    }

    #[test]
    fn what_could_be_withdrawn_before_it_is_charged_is_not_spent() {
        let freshness = Freshness::new(10, 5);
        freshness.looked(100_000);
        freshness.delayed(15);
        let said = freshness.too_slow().unwrap();
        for words in ["delay of 15 s", "`escrow.stale_secs`", "`escrow.margin_secs`", "= 15 s"] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert_eq!(freshness.rejection(100_000, 0).unwrap().message, said);
        freshness.delayed(60);
        assert_eq!(freshness.too_slow(), None);
        // Announced right after the last look, it can be taken at 160 s: 5 s before that is the last deadline.
        for now_ms in [100_000, 110_000] {
            assert_eq!(freshness.rejection(now_ms, 155_000), None);
            let rejection = freshness.rejection(now_ms, 155_001).unwrap();
            assert_eq!(rejection.code, "overloaded");
            assert!(rejection.message.contains("`deadline_secs`"), "{rejection:?}");
        }
        freshness.looked(110_000);
        assert_eq!(freshness.rejection(110_000, 165_000), None);
    }

    /// What `infera up` starts is inside of it, however old the last look may be.
    #[test]
    fn the_devnet_as_it_is_shipped_spends_escrow() {
        let config = crate::Config::load(None).unwrap().escrow;
        let delay = Deployment::devnet(Default::default(), Default::default()).withdrawal_delay_secs;
        let gateway = include_str!("../../../gateway/src/gateway.toml");
        let deadline = gateway.lines().find_map(|line| line.strip_prefix("deadline_secs = ")).unwrap();
        let deadline_ms = deadline.parse::<i64>().unwrap() * 1_000;
        let freshness = Freshness::new(config.stale_secs, config.margin_secs);
        freshness.looked(0);
        freshness.delayed(delay);
        let stale_ms = i64::from(config.stale_secs) * 1_000;
        assert_eq!(freshness.rejection(stale_ms, stale_ms + deadline_ms), None);
    }

    #[test]
    fn only_one_form_of_an_address_is_a_wallet() {
        let address = "0x00000000000000000000000000000000000000ab";
        assert!(wallet(address).is_some());
        for name in ["alice", "0xab", "0x00000000000000000000000000000000000000AB", &address[2..], ""] {
            assert_eq!(wallet(name), None, "{name}");
        }
    }

    proptest! {
        /// Whatever happens, nobody spends more than was signed, nor more than the contract still has.
        #[test]
        fn nothing_beyond_escrow_or_voucher(
            (escrow, charged, withdrawal) in (0..1_000_i64, 0..1_000_i64, 0..1_000_i64),
            (head_escrow, head_charged, head_withdrawal) in (0..1_000_i64, 0..1_000_i64, 0..1_000_i64),
            (voucher, owed, held) in (0..3_000_i64, 0..1_000_i64, 0..1_000_i64),
        ) {
            let head = at(head_escrow, head_charged, head_withdrawal);
            let standing =
                Standing { settled: at(escrow, charged, withdrawal), head: Some(head), voucher, owed, held };
            let spent = i64::try_from(standing.free()).unwrap() + owed + held;
            if standing.free() > 0 {
                prop_assert!(spent <= voucher);
                prop_assert!(spent <= escrow + charged && spent <= head_escrow + head_charged);
                prop_assert!(withdrawal < escrow || spent <= charged);
            }
        }
    }
}
