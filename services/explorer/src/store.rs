//! The read model: tables, migrations and what the consumers write.

use infera_bus::inbox;
use infera_protocol::receipt::Receipt;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ConnectionTrait, IntoActiveModel, QueryTrait, Set};
use sea_orm_migration::prelude::{
    ColumnDef, DeriveIden, Index, MigrationName, MigrationTrait, MigratorTrait, SchemaManager, Table,
};

/// Rows of one insert: SQLite takes at most 32,766 values.
const ROWS: usize = 1_000;

/// A receipt and what it is found by.
pub mod receipts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "receipts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub model: String,
        pub decided_at_ms: i64,
        pub tokens: i64,
        pub charged_micro: i64,
        /// The receipt as canonical JSON.
        pub receipt: Vec<u8>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {
        #[sea_orm(
            belongs_to = "super::anchors::Entity",
            from = "Column::Id",
            to = "super::anchors::Column::RequestId"
        )]
        Anchor,
    }

    impl ActiveModelBehavior for ActiveModel {}
}

/// Nodes of a receipt, paid and unpaid.
pub mod participants {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "participants")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub receipt_id: Uuid,
        /// `0x` and lowercase hex, as everywhere.
        #[sea_orm(primary_key, auto_increment = false)]
        pub node: String,
        pub operator: String,
        /// 0: unpaid.
        pub amount_micro: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// In which batch a receipt stands. May be there before the receipt.
pub mod anchors {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "anchors")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub sequence: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A batch on the chain.
pub mod batches {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "batches")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub sequence: i64,
        pub receipts_root: Vec<u8>,
        pub receipts: i64,
        pub transaction: Vec<u8>,
        pub block_number: i64,
        pub anchored_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    New,
    /// The same was there already.
    Same,
    /// Something else is there under the same key.
    Conflict,
}

/// Writes a receipt and its participants.
///
/// # Errors
/// The database's; so everywhere below.
pub async fn insert_receipt<C: ConnectionTrait>(
    tx: &C,
    receipt: &Receipt,
    canonical: Vec<u8>,
    model: String,
) -> Result<Written, DbErr> {
    let row = receipts::Model {
        id: receipt.id,
        model,
        decided_at_ms: receipt.decided_at_ms,
        tokens: i64::from(receipt.prompt_tokens) + i64::from(receipt.output_tokens),
        charged_micro: amount(receipt.charged_micro),
        receipt: canonical,
    };
    let insert = receipts::Entity::insert(row.clone().into_active_model())
        .on_conflict(OnConflict::new().do_nothing().to_owned());
    if tx.execute(&insert.into_query()).await?.rows_affected() == 0 {
        let stored = receipts::Entity::find_by_id(receipt.id).one(tx).await?;
        return Ok(if stored == Some(row) { Written::Same } else { Written::Conflict });
    }
    let paid = receipt.verified.iter().zip(&receipt.payments).map(|(node, payment)| {
        participant(receipt.id, node.node.to_string(), node.operator.to_string(), payment.amount_micro)
    });
    let unpaid = receipt
        .unpaid
        .iter()
        .map(|node| participant(receipt.id, node.node.to_string(), node.operator.to_string(), 0));
    let rows: Vec<_> = paid.chain(unpaid).collect();
    if !rows.is_empty() {
        participants::Entity::insert_many(rows).exec_without_returning(tx).await?;
    }
    Ok(Written::New)
}

fn participant(
    receipt_id: Uuid,
    node: String,
    operator: String,
    amount_micro: u64,
) -> participants::ActiveModel {
    participants::ActiveModel {
        receipt_id: Set(receipt_id),
        node: Set(node),
        operator: Set(operator),
        amount_micro: Set(amount(amount_micro)),
    }
}

/// Amounts are far below 2^63; a larger one is shown as the largest.
fn amount(micro: u64) -> i64 {
    i64::try_from(micro).unwrap_or(i64::MAX)
}

/// Writes a batch and what it anchors.
pub async fn insert_batch<C: ConnectionTrait>(
    tx: &C,
    batch: batches::Model,
    ids: &[Uuid],
) -> Result<Written, DbErr> {
    let sequence = batch.sequence;
    let insert = batches::Entity::insert(batch.clone().into_active_model())
        .on_conflict(OnConflict::new().do_nothing().to_owned());
    if tx.execute(&insert.into_query()).await?.rows_affected() == 0 {
        let stored = batches::Entity::find_by_id(sequence).one(tx).await?;
        return Ok(if stored == Some(batch) { Written::Same } else { Written::Conflict });
    }
    for ids in ids.chunks(ROWS) {
        let rows =
            ids.iter().map(|id| anchors::ActiveModel { request_id: Set(*id), sequence: Set(sequence) });
        let insert =
            anchors::Entity::insert_many(rows).on_conflict(OnConflict::new().do_nothing().to_owned());
        tx.execute(&insert.into_query()).await?;
    }
    Ok(Written::New)
}

/// Creates every table of the explorer.
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Create), inbox::migration()]
    }
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "explorer_0001_receipts"
    }
}

#[derive(DeriveIden)]
enum Receipts {
    Table,
    Id,
    Model,
    DecidedAtMs,
    Tokens,
    ChargedMicro,
    Receipt,
}

#[derive(DeriveIden)]
enum Participants {
    Table,
    ReceiptId,
    Node,
    Operator,
    AmountMicro,
}

#[derive(DeriveIden)]
enum Anchors {
    Table,
    RequestId,
    Sequence,
}

#[derive(DeriveIden)]
enum Batches {
    Table,
    Sequence,
    ReceiptsRoot,
    Receipts,
    Transaction,
    BlockNumber,
    AnchoredAtMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        create_receipts(manager).await?;
        let anchors = Table::create()
            .table(Anchors::Table)
            .if_not_exists()
            .col(ColumnDef::new(Anchors::RequestId).uuid().not_null().primary_key())
            .col(ColumnDef::new(Anchors::Sequence).big_integer().not_null())
            .to_owned();
        manager.create_table(anchors).await?;
        let batches = Table::create()
            .table(Batches::Table)
            .if_not_exists()
            .col(ColumnDef::new(Batches::Sequence).big_integer().not_null().primary_key())
            .col(ColumnDef::new(Batches::ReceiptsRoot).binary().not_null())
            .col(ColumnDef::new(Batches::Receipts).big_integer().not_null())
            .col(ColumnDef::new(Batches::Transaction).binary().not_null())
            .col(ColumnDef::new(Batches::BlockNumber).big_integer().not_null())
            .col(ColumnDef::new(Batches::AnchoredAtMs).big_integer().not_null())
            .to_owned();
        manager.create_table(batches).await
    }
}

async fn create_receipts(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    let receipts = Table::create()
        .table(Receipts::Table)
        .if_not_exists()
        .col(ColumnDef::new(Receipts::Id).uuid().not_null().primary_key())
        .col(ColumnDef::new(Receipts::Model).string().not_null())
        .col(ColumnDef::new(Receipts::DecidedAtMs).big_integer().not_null())
        .col(ColumnDef::new(Receipts::Tokens).big_integer().not_null())
        .col(ColumnDef::new(Receipts::ChargedMicro).big_integer().not_null())
        .col(ColumnDef::new(Receipts::Receipt).binary().not_null())
        .to_owned();
    manager.create_table(receipts).await?;
    let by_time = Index::create()
        .name("receipts_time")
        .table(Receipts::Table)
        .col(Receipts::DecidedAtMs)
        .col(Receipts::Id)
        .if_not_exists()
        .to_owned();
    manager.create_index(by_time).await?;
    let participants = Table::create()
        .table(Participants::Table)
        .if_not_exists()
        .col(ColumnDef::new(Participants::ReceiptId).uuid().not_null())
        .col(ColumnDef::new(Participants::Node).string().not_null())
        .col(ColumnDef::new(Participants::Operator).string().not_null())
        .col(ColumnDef::new(Participants::AmountMicro).big_integer().not_null())
        .primary_key(Index::create().col(Participants::ReceiptId).col(Participants::Node))
        .to_owned();
    manager.create_table(participants).await?;
    for (name, column) in
        [("participants_node", Participants::Node), ("participants_operator", Participants::Operator)]
    {
        let index =
            Index::create().name(name).table(Participants::Table).col(column).if_not_exists().to_owned();
        manager.create_index(index).await?;
    }
    Ok(())
}
