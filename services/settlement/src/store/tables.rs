//! The tables, one module each. Migrations are in [`super::migrations`].

/// Every transfer of the ledger.
pub mod transfers {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "transfers")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        /// See [`crate::ledger::Kind`].
        pub kind: String,
        pub request_id: Option<Uuid>,
        pub at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What each transfer did to each account.
pub mod entries {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "entries")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub transfer_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub account: String,
        pub amount_micro: i64,
        /// Its transfer's.
        pub at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The sum of each account's entries.
pub mod balances {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "balances")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub account: String,
        pub amount_micro: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Every request that was submitted, with its hold.
pub mod requests {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "requests")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub account: String,
        pub model: String,
        /// See [`crate::domain::State`].
        pub state: String,
        /// What was funded: verdicts must be about exactly this.
        pub request_hash: Vec<u8>,
        pub k: i64,
        pub calibration_hash: Vec<u8>,
        pub price_micro: i64,
        pub held_micro: i64,
        /// Of it, what was taken from the account's escrow; the rest is prepaid credit.
        pub held_escrow_micro: i64,
        pub charged_micro: i64,
        /// Of it, what its escrow pays.
        pub charged_escrow_micro: i64,
        pub prompt_tokens: i64,
        /// 0 until it is settled.
        pub completion_tokens: i64,
        /// When the gateway took it; 0 in rows that are older than this column.
        pub submitted_at_ms: i64,
        /// Why it was rejected or failed: an error code, and a sentence for people.
        pub code: String,
        pub message: String,
        pub funded_at_ms: i64,
        /// By when it should be decided; 0 in rows that are older than this column.
        pub deadline_ms: i64,
        pub closed_at_ms: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Receipts and what they rest on. Rows never change.
pub mod receipts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "receipts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub account: String,
        /// Canonical JSON of `protocol::receipt::Receipt`.
        pub receipt: Vec<u8>,
        /// Canonical JSON of `protocol::evidence::Evidence`.
        pub evidence: Vec<u8>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The leaf of each receipt, waiting for its batch or in it.
pub mod journal {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "journal")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub leaf: Vec<u8>,
        pub at_ms: i64,
        pub batch_sequence: Option<i64>,
        /// The leaf's place among those that the batch's tree was made of.
        pub batch_index: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Batches. The transactions that post them are in [`batch_txs`](super::batch_txs).
pub mod batches {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "batches")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub sequence: i64,
        /// See [`crate::domain::BatchState`].
        pub state: String,
        pub previous_hash: Vec<u8>,
        pub receipts_root: Vec<u8>,
        pub reward_root: Vec<u8>,
        pub count: i64,
        pub total_micro: i64,
        /// `chain::Batch::hash`.
        pub hash: Vec<u8>,
        /// The transaction that brought it onto the chain, once anchored.
        pub tx_hash: Option<Vec<u8>>,
        pub block_number: Option<i64>,
        pub formed_at_ms: i64,
        pub anchored_at_ms: Option<i64>,
        /// Sum of all operators' cumulative rewards as of this batch: the total that its reward root is queued with.
        pub reward_total_micro: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What each operator has earned in all batches formed so far.
pub mod rewards {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "rewards")]
    pub struct Model {
        /// Address, 0x and lowercase hex.
        #[sea_orm(primary_key, auto_increment = false)]
        pub operator: String,
        pub cumulative_micro: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Every signed transaction, kept until one of its batch is final: after a lost answer or a reorganisation any of them
/// may be the one that counts.
pub mod batch_txs {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "batch_txs")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub hash: Vec<u8>,
        pub sequence: i64,
        /// See [`crate::store::txs::Purpose`].
        pub purpose: String,
        pub nonce: i64,
        pub raw: Vec<u8>,
        /// Wei per gas.
        pub max_fee: i64,
        pub priority_fee: i64,
        pub signed_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What an operator had earned in all as of a batch; only operators that earned in it have a row.
pub mod reward_history {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "reward_history")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub operator: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub sequence: i64,
        pub cumulative_micro: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Work that earned an operator nothing, and why.
pub mod unpaid {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "unpaid")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub node: Vec<u8>,
        /// Address, 0x and lowercase hex.
        pub operator: String,
        /// As the receipt says it.
        pub reason: String,
        pub at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Consumers' escrows: what the chain has, and what the books charged to them. Amounts in 10^-6 INFER.
pub mod escrows {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "escrows")]
    pub struct Model {
        /// 0x and lowercase hex.
        #[sea_orm(primary_key, auto_increment = false)]
        pub address: String,
        /// Deposited and neither charged nor withdrawn, as of the final block `block_number`; so for the next four.
        pub escrow_micro: i64,
        /// Charged on the chain over the account's lifetime.
        pub charged_micro: i64,
        /// The highest voucher that the chain has seen.
        pub authorized_micro: i64,
        /// Asked to be withdrawn.
        pub withdrawal_micro: i64,
        pub withdrawable_at_secs: i64,
        /// 0: not read yet.
        pub block_number: i64,
        /// 1: something happened to it in a final block, to be read.
        pub unread: i64,
        /// As of the newest block, where something happened after the final one.
        pub head_escrow_micro: Option<i64>,
        pub head_charged_micro: Option<i64>,
        pub head_withdrawal_micro: Option<i64>,
        /// Charged by the books over the account's lifetime.
        pub owed_micro: i64,
        /// Of it, what the chain had charged and these books do not know of.
        pub before_micro: i64,
        /// Transfers that deposits and withdrawals made so far: the next one's id has this number.
        pub movements: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// How far the settlement contract was followed: one row.
pub mod escrow_cursor {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "escrow_cursor")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i64,
        /// The next final block to look at.
        pub next_block: i64,
        /// Hash of the block before it; another one says that the chain was reorganised beyond finality.
        pub block_hash: Vec<u8>,
        /// Not read any more.
        pub looked_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The highest voucher of each account.
pub mod vouchers {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "vouchers")]
    pub struct Model {
        /// 0x and lowercase hex.
        #[sea_orm(primary_key, auto_increment = false)]
        pub address: String,
        pub cumulative_micro: i64,
        /// r, s, v: the account's, checked.
        pub signature: Vec<u8>,
        pub at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}
