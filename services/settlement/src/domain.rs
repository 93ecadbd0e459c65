//! What settlement decides, without any I/O: what a request holds, what a verdict moves, what the batcher does next.

use infera_protocol::{
    bytes::Hash32,
    hash::keccak,
    ids::message_id,
    merkle::MerkleTree,
    money::hold_micro,
    receipt::Receipt,
    registry::{Model, Registry},
    request::MAX_REPLICAS,
};
use infera_wire::convert::Submitted;
use uuid::Uuid;

use crate::ledger::{Account, Kind, LedgerError, Transfer, amount};

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its hold stands; nothing is decided.
    Open,
    /// Verified, charged and paid.
    Settled,
    /// Failed; the whole hold was given back.
    Released,
    /// Never funded.
    Rejected,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Settled => "settled",
            Self::Released => "released",
            Self::Rejected => "rejected",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Open, Self::Settled, Self::Released, Self::Rejected]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

/// Why a request is not funded; `code` is one of OpenAI's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub code: &'static str,
    pub message: String,
}

/// What a request costs at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quote {
    /// Per token and replica.
    pub price_micro: u64,
    /// k x price x (prompt + max tokens).
    pub hold_micro: u64,
}

/// What `submitted` costs at most, at the registry's price.
///
/// # Errors
/// The model is not the registry's, or the price is beyond what the ledger can hold.
pub fn quote(submitted: &Submitted, registry: &Registry) -> Result<Quote, Rejection> {
    let model: &Model = registry
        .by_id(&submitted.model)
        .filter(|model| model.weights_root == submitted.request.model_root)
        .ok_or_else(|| Rejection {
            code: "model_not_found",
            message: format!(
                "the model `{}` is not in this network's registry; see GET /v1/models",
                submitted.model
            ),
        })?;
    let prompt = u32::try_from(submitted.request.prompt.len()).unwrap_or(u32::MAX);
    hold_micro(submitted.k, model.price_micro, prompt, submitted.request.max_tokens)
        .filter(|hold| amount(*hold).is_ok())
        .map(|hold_micro| Quote { price_micro: model.price_micro, hold_micro })
        .ok_or_else(|| Rejection {
            code: "price_overflow",
            message: "the request's price is beyond any balance; lower max_tokens".to_owned(),
        })
}

/// The rejection of a request that its account cannot pay.
pub fn insufficient(hold_micro: u64, available_micro: i64) -> Rejection {
    Rejection {
        code: "insufficient_quota",
        message: format!(
            "the request may cost up to {hold_micro} micro-INFER, the account has {available_micro}; \
             add credit or lower max_tokens"
        ),
    }
}

/// What a hold is made of, 10^-6 INFER.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hold {
    /// Of prepaid credit: taken first, and charged first.
    pub prepaid_micro: u64,
    /// Of the account's escrow.
    pub escrow_micro: u64,
    /// What the account owes beyond its escrow: what is given back to its escrow pays that first.
    pub debt_micro: u64,
}

/// A hold of prepaid credit alone.
impl From<u64> for Hold {
    fn from(prepaid_micro: u64) -> Self {
        Self { prepaid_micro, ..Self::default() }
    }
}

impl Hold {
    /// A hold of `total`, out of `prepaid` credit as far as that goes.
    pub fn of(total: u64, prepaid: u64) -> Self {
        let prepaid_micro = total.min(prepaid);
        Self { prepaid_micro, escrow_micro: total - prepaid_micro, debt_micro: 0 }
    }

    /// All that is held.
    pub fn micro(&self) -> u64 {
        self.prepaid_micro.saturating_add(self.escrow_micro)
    }

    /// Takes the hold apart: it ends.
    fn end(&self, transfer: Transfer, account: &str) -> Result<Transfer, LedgerError> {
        let (held, escrow_held) =
            (Account::Held(account.to_owned()), Account::EscrowHeld(account.to_owned()));
        Ok(transfer.with(&held, -amount(self.prepaid_micro)?).with(&escrow_held, -amount(self.escrow_micro)?))
    }

    /// Gives back what was not charged.
    fn give_back(&self, transfer: Transfer, account: &str, charged: &Self) -> Result<Transfer, LedgerError> {
        let prepaid = self.prepaid_micro - charged.prepaid_micro;
        let escrow = self.escrow_micro - charged.escrow_micro;
        let repaid = escrow.min(self.debt_micro);
        let account = || account.to_owned();
        Ok(transfer
            .with(&Account::Consumer(account()), amount(prepaid)?)
            .with(&Account::EscrowDebt(account()), amount(repaid)?)
            .with(&Account::Escrow(account()), amount(escrow - repaid)?))
    }
}

/// The transfer that makes a hold for a request.
///
/// # Errors
/// [`LedgerError::TooLarge`].
pub fn hold_transfer(request: Uuid, account: &str, hold: impl Into<Hold>) -> Result<Transfer, LedgerError> {
    let (hold, id) = (hold.into(), message_id("transfer.hold", request, 0));
    let account = || account.to_owned();
    Ok(Transfer::new(id, Kind::Hold, Some(request))
        .moving(&Account::Consumer(account()), &Account::Held(account()), amount(hold.prepaid_micro)?)
        .moving(&Account::Escrow(account()), &Account::EscrowHeld(account()), amount(hold.escrow_micro)?))
}

/// The transfer that gives a failed request's whole hold back.
///
/// # Errors
/// [`LedgerError::TooLarge`].
pub fn release_transfer(
    request: Uuid,
    account: &str,
    hold: impl Into<Hold>,
) -> Result<Transfer, LedgerError> {
    // One id for both ends of a request: a hold is closed once.
    let (hold, id) = (hold.into(), message_id("transfer.close", request, 0));
    let transfer = hold.end(Transfer::new(id, Kind::Release, Some(request)), account)?;
    hold.give_back(transfer, account, &Hold::default())
}

/// What a verified request moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closing {
    pub transfer: Transfer,
    /// What the account pays: the receipt's charge, never more than the hold.
    pub charged: Hold,
}

/// The transfer that closes a verified request: the charge goes to the operators as the receipt says, the rest of the
/// hold back to the account. What replicas beyond the `k` that were held for cost, the reserve pays: at most
/// (MAX_REPLICAS - k) x price x (prompt + max tokens).
///
/// # Errors
/// [`LedgerError::TooLarge`], [`LedgerError::Reserve`].
pub fn settle_transfer(
    account: &str,
    hold: impl Into<Hold>,
    k: u32,
    receipt: &Receipt,
) -> Result<Closing, LedgerError> {
    let (hold, id) = (hold.into(), message_id("transfer.close", receipt.id, 0));
    let charged = Hold::of(receipt.charged_micro.min(hold.micro()), hold.prepaid_micro);
    let needed = receipt.charged_micro - charged.micro();
    // The hold is k x price x (prompt + max tokens).
    let replica = hold.micro() / u64::from(k.max(1));
    let cap = replica.saturating_mul(u64::from(MAX_REPLICAS.saturating_sub(k)));
    if needed > cap {
        return Err(LedgerError::Reserve { needed, cap });
    }
    let transfer = hold.end(Transfer::new(id, Kind::Settle, Some(receipt.id)), account)?;
    let mut transfer = hold.give_back(transfer, account, &charged)?.with(&Account::Reserve, -amount(needed)?);
    for payment in &receipt.payments {
        transfer = transfer.with(&Account::Operator(payment.operator), amount(payment.amount_micro)?);
    }
    Ok(Closing { transfer, charged })
}

/// Where a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchState {
    /// Its receipts are chosen.
    Formed,
    /// Its transaction is signed and stored; it may have been sent.
    Signed,
    /// On the chain, as deep as configured.
    Anchored,
    /// The chain's head when this database was new: not ours, but the next one follows it.
    Adopted,
}

impl BatchState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Formed => "formed",
            Self::Signed => "signed",
            Self::Anchored => "anchored",
            Self::Adopted => "adopted",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Formed, Self::Signed, Self::Anchored, Self::Adopted]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

/// A batch as the batcher's planner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchView {
    pub sequence: u64,
    pub hash: Hash32,
    pub state: BatchState,
}

/// What the database holds, as far as the planner needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Local {
    /// The newest batch.
    pub last: Option<BatchView>,
    /// The batch with the sequence of the chain's head.
    pub at_head: Option<BatchView>,
    /// The batch after it.
    pub after_head: Option<BatchView>,
    /// Sequences of batches that are not anchored, up to the head's.
    pub unconfirmed: Vec<u64>,
    /// Receipts without a batch, and when the oldest was written.
    pub waiting: u64,
    pub oldest_ms: Option<i64>,
}

/// When a batch is formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// As soon as so many receipts wait ...
    pub size: u64,
    /// ... or one has waited so long.
    pub age_ms: i64,
}

/// What the batcher does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The chain and this database contradict each other; a person must look.
    Conflict(String),
    /// This database is new and the chain is not: go on after its head.
    Adopt,
    Work {
        /// Batches that are on the chain and wait for their depth.
        confirm: Vec<u64>,
        /// The batch that the chain needs next.
        post: Option<u64>,
        /// Form a new batch.
        form: bool,
    },
}

/// Decides from the chain's head and the database what is to be done. The chain's head is the truth about what was
/// posted: a batch that was anchored and is gone (a reorganisation, a devnet restored from an older state) is posted
/// again.
pub fn plan(head_sequence: u64, head_hash: &Hash32, local: &Local, limits: &Limits, now_ms: i64) -> Plan {
    let Some(last) = local.last else {
        if head_sequence > 0 {
            return Plan::Adopt;
        }
        return Plan::Work { confirm: Vec::new(), post: None, form: due(local, limits, now_ms) };
    };
    if head_sequence > 0 {
        match local.at_head {
            Some(batch) if batch.hash == *head_hash => {}
            Some(_) => {
                return Plan::Conflict(format!(
                    "the chain's batch {head_sequence} is not the one in this database"
                ));
            }
            None if head_sequence > last.sequence => {
                return Plan::Conflict(format!(
                    "the chain has batch {head_sequence}, this database ends at {}: another settler posts, or an old \
                     backup was restored",
                    last.sequence
                ));
            }
            None => {
                return Plan::Conflict(format!(
                    "batch {head_sequence} of the chain is missing in this database"
                ));
            }
        }
    }
    let post = match local.after_head {
        Some(batch) if batch.state == BatchState::Adopted => {
            return Plan::Conflict(format!(
                "the chain lost batch {}, which this database does not have",
                batch.sequence
            ));
        }
        Some(batch) => Some(batch.sequence),
        None if last.sequence > head_sequence => {
            return Plan::Conflict(format!("batch {} is missing in this database", head_sequence + 1));
        }
        None => None,
    };
    let form = post.is_none() && due(local, limits, now_ms);
    Plan::Work { confirm: local.unconfirmed.clone(), post, form }
}

fn due(local: &Local, limits: &Limits, now_ms: i64) -> bool {
    local.waiting >= limits.size
        || local.oldest_ms.is_some_and(|oldest| now_ms.saturating_sub(oldest) >= limits.age_ms)
}

/// A leaf of the reward tree: double keccak of `(address, uint256)`, ABI-encoded.
pub fn reward_leaf(operator: &infera_protocol::bytes::Address, cumulative: u64) -> Hash32 {
    let mut encoded = [0_u8; 64];
    encoded[12..32].copy_from_slice(&operator.0);
    encoded[56..].copy_from_slice(&cumulative.to_be_bytes());
    keccak(&[&keccak(&[&encoded]).0])
}

/// Root over the operators' cumulative rewards: OpenZeppelin's standard tree over `(address, uint256)`. Zero for none.
pub fn reward_root(rewards: &[(infera_protocol::bytes::Address, u64)]) -> Hash32 {
    let leaves: Vec<Hash32> =
        rewards.iter().map(|(operator, cumulative)| reward_leaf(operator, *cumulative)).collect();
    MerkleTree::new(&leaves).map_or(Hash32::ZERO, |tree| tree.root())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { size: 10, age_ms: 2_000 };

    /// The contracts' tests hold this value too (`Rewards.t.sol`).
    #[test]
    fn the_contract_computes_the_same_leaf() {
        let operator = infera_protocol::bytes::Address([0x11; 20]);
        assert_eq!(
            reward_root(&[(operator, 1_234_567)]).to_string(),
            "0xec641c307c1c3ad464b1a6c2cab6e110654a6a6f5961f3473a54a0fb4380238c"
        );
    }

    fn batch(sequence: u64, state: BatchState) -> BatchView {
        BatchView { sequence, hash: hash(sequence), state }
    }

    fn hash(sequence: u64) -> Hash32 {
        keccak(&[&sequence.to_be_bytes()])
    }

    /// The view of a database with these batches at a chain that ends at `head`.
    fn local(batches: &[BatchView], head: u64) -> Local {
        let at = |sequence: u64| batches.iter().find(|b| b.sequence == sequence).copied();
        let open =
            |b: &&BatchView| b.sequence <= head && matches!(b.state, BatchState::Formed | BatchState::Signed);
        Local {
            last: batches.last().copied(),
            at_head: at(head),
            after_head: at(head + 1),
            unconfirmed: batches.iter().filter(open).map(|b| b.sequence).collect(),
            waiting: 0,
            oldest_ms: None,
        }
    }

    fn work(confirm: &[u64], post: Option<u64>, form: bool) -> Plan {
        Plan::Work { confirm: confirm.to_vec(), post, form }
    }

    #[test]
    fn the_reserve_pays_for_added_replicas_and_no_more() {
        use infera_testkit::evidence::{Case, Network};
        // Three replicas at 10 each are held for; four more may be added: 7 in all.
        let (hold, k) = (30, 3);
        let mut receipt = Case::new(&Network::new()).receipt();
        let mut settle = |charged_micro: u64| {
            let paid = charged_micro / u64::try_from(receipt.payments.len()).unwrap();
            receipt.payments.iter_mut().for_each(|payment| payment.amount_micro = paid);
            receipt.charged_micro = charged_micro;
            settle_transfer("alice", hold, k, &receipt)
        };
        assert_eq!(settle(30).unwrap().charged.micro(), 30);
        assert_eq!(settle(69).unwrap().charged.micro(), 30, "never more than the hold");
        let error = settle(72).unwrap_err();
        assert!(matches!(error, LedgerError::Reserve { needed: 42, cap: 40 }), "{error:?}");
        let said = error.to_string();
        assert!(said.contains("42") && said.contains("40"), "{said}");
    }

    #[test]
    fn prepaid_credit_is_held_and_charged_first() {
        use infera_testkit::evidence::{Case, Network};
        let hold = Hold::of(30, 12);
        assert_eq!((hold.prepaid_micro, hold.escrow_micro), (12, 18));
        assert_eq!((Hold::of(10, 12).prepaid_micro, Hold::of(10, 12).escrow_micro), (10, 0));
        let mut receipt = Case::new(&Network::new()).receipt();
        receipt.payments.truncate(1);
        let mut settle = |charge: u64, hold: Hold| {
            (receipt.payments[0].amount_micro, receipt.charged_micro) = (charge, charge);
            let operator = Account::Operator(receipt.payments[0].operator);
            (settle_transfer("w", hold, 3, &receipt).unwrap(), operator)
        };
        let (closing, operator) = settle(20, hold);
        assert_eq!((closing.charged.prepaid_micro, closing.charged.escrow_micro), (12, 8));
        let of = |account: &Account| closing.transfer.amount_of(account);
        let (held, back) = (Account::EscrowHeld("w".into()), Account::Escrow("w".into()));
        assert_eq!((of(&held), of(&back), of(&operator)), (-18, 10, 20));
        assert_eq!((of(&Account::Held("w".into())), of(&Account::Consumer("w".into()))), (-12, 0));
        // What comes back pays what is owed first.
        let (closing, _) = settle(20, Hold { debt_micro: 7, ..hold });
        let of = |account: &Account| closing.transfer.amount_of(account);
        assert_eq!((of(&Account::EscrowDebt("w".into())), of(&back)), (7, 3));
        let (closing, _) = settle(0, Hold { debt_micro: 100, ..hold });
        let of = |account: &Account| closing.transfer.amount_of(account);
        assert_eq!((of(&Account::EscrowDebt("w".into())), of(&back)), (18, 0));
    }

    #[test]
    fn a_batch_is_formed_by_size_or_age() {
        let mut local = Local { waiting: 9, oldest_ms: Some(1_000), ..Local::default() };
        assert_eq!(plan(0, &Hash32::ZERO, &local, &LIMITS, 2_999), work(&[], None, false));
        assert_eq!(plan(0, &Hash32::ZERO, &local, &LIMITS, 3_000), work(&[], None, true));
        local.waiting = 10;
        assert_eq!(plan(0, &Hash32::ZERO, &local, &LIMITS, 1_000), work(&[], None, true));
    }

    #[test]
    fn the_chain_decides_what_is_posted() {
        use BatchState::{Anchored, Formed, Signed};
        let all = [batch(1, Anchored), batch(2, Signed), batch(3, Formed)];
        // The restart after a send: 2 is on the chain already and only wants its confirmation.
        assert_eq!(plan(2, &hash(2), &local(&all, 2), &LIMITS, 0), work(&[2], Some(3), false));
        // It never arrived.
        assert_eq!(plan(1, &hash(1), &local(&all, 1), &LIMITS, 0), work(&[], Some(2), false));
        // The chain lost a batch that was anchored.
        assert_eq!(plan(0, &Hash32::ZERO, &local(&all, 0), &LIMITS, 0), work(&[], Some(1), false));
        assert_eq!(plan(3, &hash(3), &local(&all, 3), &LIMITS, 0), work(&[2, 3], None, false));
    }

    #[test]
    fn nothing_is_formed_while_a_batch_waits_to_be_posted() {
        let mut local = local(&[batch(1, BatchState::Formed)], 0);
        local.waiting = 100;
        assert_eq!(plan(0, &Hash32::ZERO, &local, &LIMITS, 0), work(&[], Some(1), false));
    }

    #[test]
    fn a_new_database_follows_an_old_chain_and_a_contradiction_stops() {
        assert_eq!(plan(7, &hash(7), &Local::default(), &LIMITS, 0), Plan::Adopt);
        let adopted = [batch(7, BatchState::Adopted)];
        assert_eq!(plan(7, &hash(7), &local(&adopted, 7), &LIMITS, 0), work(&[], None, false));
        let conflict = |head, hash: &Hash32, batches: &[BatchView]| {
            matches!(plan(head, hash, &local(batches, head), &LIMITS, 0), Plan::Conflict(_))
        };
        assert!(conflict(6, &hash(6), &adopted));
        assert!(conflict(1, &hash(9), &[batch(1, BatchState::Signed)]));
        assert!(conflict(2, &hash(2), &[batch(1, BatchState::Anchored)]));
    }
}
