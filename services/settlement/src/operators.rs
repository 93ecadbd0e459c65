//! What operators can ask: what they earned, what earned them nothing, and the proofs to claim with.
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/operators/{address}` | [`Earned`]: everybody may ask, because receipts say it all |
//! | `GET /v1/operators/{address}/rewards/{sequence}` | [`Reward`]: the operator's leaf in the reward tree of that batch, with its proof |
//!
//! What of it is claimable or paid only the chain can say: [`Standing`] puts both together.

use actix_web::{HttpResponse, web};
use infera_protocol::{
    bytes::{Address, Hash32, NodeId},
    merkle::MerkleTree,
};
use infera_runtime::http::ApiError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    domain::reward_leaf,
    http::State,
    ledger::{self, Account},
    store::{batches, rewards, unsigned},
};

/// Unpaid work that an answer names at most; the newest.
const MOST_UNPAID: u64 = 20;

/// What the books say of an operator, 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Earned {
    pub operator: Address,
    /// By all verified work so far.
    pub earned_micro: u64,
    /// Of it, what stands in batches that are final on the chain.
    pub anchored_micro: u64,
    /// The newest such batch with all before it; 0 for none.
    pub anchored_sequence: u64,
    /// Work that earned nothing, the newest first.
    pub unpaid: Vec<NotPaid>,
    /// How much of that there is in all.
    pub unpaid_total: u64,
}

/// Work that earned nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotPaid {
    pub request: Uuid,
    pub node: NodeId,
    /// As the receipt says it: `outlier`, `no_commit`, `no_reveal`, `mismatch`, `declined`, `disconnected`.
    pub reason: String,
    pub at_ms: i64,
}

impl NotPaid {
    /// The reason for people.
    pub fn sentence(&self) -> &'static str {
        match self.reason.as_str() {
            "outlier" => "the answer differed from the one that the majority gave",
            "no_commit" => "no commitment came before the deadline",
            "no_reveal" => "the commitment came, its reveal did not",
            "mismatch" => "the reveal was not what had been committed to",
            "declined" => "the node declined the work",
            "disconnected" => "the node was gone",
            _ => "the receipt does not pay it",
        }
    }
}

/// An operator's leaf of a reward tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reward {
    pub operator: Address,
    /// The batch whose reward root this leads to.
    pub sequence: u64,
    /// Earned in all as of that batch, 10^-6 INFER.
    pub cumulative_micro: u64,
    pub root: Hash32,
    pub proof: Vec<Hash32>,
}

/// Where an operator's money is, 10^-6 INFER. The four parts are all that was earned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Standing {
    /// Verified and charged, and not final on the chain yet.
    pub pending_micro: u64,
    /// Final on the chain, and in no reward root that pays yet.
    pub verified_micro: u64,
    /// Can be claimed now.
    pub claimable_micro: u64,
    /// Was claimed.
    pub paid_micro: u64,
}

impl Standing {
    /// `matured`: the operator's cumulative reward in the newest root that pays; `claimed`: what it was paid.
    pub fn of(earned: &Earned, matured: u64, claimed: u64) -> Self {
        let anchored = earned.anchored_micro.min(earned.earned_micro).max(claimed);
        let matured = matured.max(claimed);
        Self {
            pending_micro: earned.earned_micro.saturating_sub(anchored.max(matured)),
            verified_micro: anchored.saturating_sub(matured),
            claimable_micro: matured - claimed,
            paid_micro: claimed,
        }
    }
}

fn address(text: &str) -> Result<Address, ApiError> {
    text.to_ascii_lowercase().parse().map_err(|_| {
        ApiError::bad_request("address", "`address` must be an operator's address: 0x and 40 hex digits")
    })
}

/// `GET /v1/operators/{address}`.
pub(crate) async fn earned(
    state: web::Data<State>,
    path: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let operator = address(&path)?;
    let db = &state.db;
    let balance = ledger::balance(db, &Account::Operator(operator)).await.map_err(ApiError::internal)?;
    let anchored_sequence = batches::last_anchored(db).await.map_err(ApiError::internal)?;
    let anchored_micro =
        rewards::cumulative(db, &operator, anchored_sequence).await.map_err(ApiError::internal)?;
    let (rows, unpaid_total) =
        rewards::unpaid_of(db, &operator, MOST_UNPAID).await.map_err(ApiError::internal)?;
    let unpaid = rows
        .into_iter()
        .filter_map(|row| {
            let node = NodeId(row.node.try_into().ok()?);
            Some(NotPaid { request: row.request_id, node, reason: row.reason, at_ms: row.at_ms })
        })
        .collect();
    let earned_micro = unsigned("balances.amount_micro", balance).map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().json(Earned {
        operator,
        earned_micro,
        anchored_micro,
        anchored_sequence,
        unpaid,
        unpaid_total,
    }))
}

/// `GET /v1/operators/{address}/rewards/{sequence}`.
pub(crate) async fn reward(
    state: web::Data<State>,
    path: web::Path<(String, u64)>,
) -> Result<HttpResponse, ApiError> {
    let (operator, sequence) = path.into_inner();
    let operator = address(&operator)?;
    if sequence > i64::MAX.unsigned_abs() {
        return Err(ApiError::bad_request("sequence", "`sequence` is too large"));
    }
    let leaves = rewards::as_of(&state.db, sequence).await.map_err(ApiError::internal)?;
    let known = batches::find(&state.db, sequence).await.map_err(ApiError::internal)?.is_some();
    let place = leaves.iter().position(|(of, _)| *of == operator).filter(|_| known);
    let Some(place) = place else {
        return Err(ApiError::not_found("this operator has no reward in that batch").with_code("no_reward"));
    };
    let cumulative_micro = leaves[place].1;
    // As many hashes as there are operators: not on the thread that serves others.
    let (root, proof) = web::block(move || {
        let hashes: Vec<Hash32> = leaves.iter().map(|(of, sum)| reward_leaf(of, *sum)).collect();
        MerkleTree::new(&hashes).and_then(|tree| Some((tree.root(), tree.proof(place)?)))
    })
    .await
    .map_err(ApiError::internal)?
    .ok_or_else(|| ApiError::internal("a tree of some leaves has a proof for each"))?;
    Ok(HttpResponse::Ok().json(Reward { operator, sequence, cumulative_micro, root, proof }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn earned(earned_micro: u64, anchored_micro: u64) -> Earned {
        let (operator, unpaid) = (Address([1; 20]), Vec::new());
        Earned { operator, earned_micro, anchored_micro, anchored_sequence: 3, unpaid, unpaid_total: 0 }
    }

    #[test]
    fn money_moves_from_pending_to_paid() {
        let standing = |e: u64, a: u64, matured: u64, claimed: u64| {
            let s = Standing::of(&earned(e, a), matured, claimed);
            (s.pending_micro, s.verified_micro, s.claimable_micro, s.paid_micro)
        };
        assert_eq!(standing(100, 0, 0, 0), (100, 0, 0, 0));
        assert_eq!(standing(100, 80, 0, 0), (20, 80, 0, 0));
        assert_eq!(standing(100, 80, 50, 0), (20, 30, 50, 0));
        assert_eq!(standing(100, 80, 50, 50), (20, 30, 0, 50));
        assert_eq!(standing(100, 100, 100, 100), (0, 0, 0, 100));
        // A root pays before its batch counts as final here.
        assert_eq!(standing(100, 0, 60, 10), (40, 0, 50, 10));
    }

    proptest! {
        #[test]
        fn the_parts_are_all_that_was_earned(mut sums in proptest::array::uniform4(0_u64..1_000)) {
            sums.sort_unstable();
            let [claimed, matured, anchored, all] = sums;
            let s = Standing::of(&earned(all, anchored), matured, claimed);
            prop_assert_eq!(s.pending_micro + s.verified_micro + s.claimable_micro + s.paid_micro, all);
        }
    }
}
