//! What makes the tables of [`super::tables`].

use sea_orm::{DbErr, EntityName};
use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager,
    prelude::{ColumnDef, Index, IntoIden, Table},
};

use super::tables::{balances, batches, entries, journal, receipts, requests, rewards, transfers};

/// All migrations of this service, with those of the bus.
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            infera_bus::inbox::migration(),
            infera_bus::outbox::migration(),
            Box::new(First),
            Box::new(Deadlines),
        ]
    }
}

struct First;

impl MigrationName for First {
    fn name(&self) -> &str {
        "settlement_0001"
    }
}

/// When each request should be decided.
struct Deadlines;

impl MigrationName for Deadlines {
    fn name(&self) -> &str {
        "settlement_0002"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Deadlines {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use requests::Column as R;
        let column = ColumnDef::new(R::DeadlineMs).big_integer().not_null().default(0_i64).take();
        manager.alter_table(Table::alter().table(requests::Entity).add_column(column).take()).await?;
        // Few requests are open: what is settled is not in the way of who looks for overdue ones.
        let open = Index::create()
            .name("requests_open_deadline")
            .table(requests::Entity)
            .col(R::State)
            .col(R::DeadlineMs)
            .if_not_exists()
            .to_owned();
        manager.create_index(open).await
    }
}

fn uuid(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).uuid().not_null().take()
}

fn text(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).text().not_null().take()
}

fn int(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).big_integer().not_null().take()
}

fn bytes(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).blob().not_null().take()
}

fn optional_int(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).big_integer().null().take()
}

fn optional_bytes(column: impl IntoIden) -> ColumnDef {
    ColumnDef::new(column).blob().null().take()
}

async fn create(
    manager: &SchemaManager<'_>,
    table: impl EntityName + IntoIden + Copy,
    columns: Vec<ColumnDef>,
    key: &mut sea_orm_migration::prelude::IndexCreateStatement,
) -> Result<(), DbErr> {
    let mut statement = Table::create();
    statement.table(table).if_not_exists().primary_key(key);
    for column in columns {
        statement.col(column);
    }
    manager.create_table(statement).await
}

#[async_trait::async_trait]
impl MigrationTrait for First {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        ledger(manager).await?;
        work(manager).await?;
        chain(manager).await
    }
}

async fn ledger(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    use {balances::Column as B, entries::Column as E, transfers::Column as T};
    create(
        manager,
        transfers::Entity,
        vec![uuid(T::Id), text(T::Kind), ColumnDef::new(T::RequestId).uuid().null().take(), int(T::AtMs)],
        Index::create().col(T::Id),
    )
    .await?;
    create(
        manager,
        entries::Entity,
        vec![uuid(E::TransferId), text(E::Account), int(E::AmountMicro)],
        Index::create().col(E::TransferId).col(E::Account),
    )
    .await?;
    create(
        manager,
        balances::Entity,
        vec![text(B::Account), int(B::AmountMicro)],
        Index::create().col(B::Account),
    )
    .await?;
    let by_account = Index::create()
        .name("entries_account")
        .table(entries::Entity)
        .col(E::Account)
        .if_not_exists()
        .to_owned();
    manager.create_index(by_account).await
}

async fn work(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    use {journal::Column as J, receipts::Column as C, requests::Column as R};
    create(
        manager,
        requests::Entity,
        vec![
            uuid(R::Id),
            text(R::Account),
            text(R::Model),
            text(R::State),
            bytes(R::RequestHash),
            int(R::K),
            bytes(R::CalibrationHash),
            int(R::PriceMicro),
            int(R::HeldMicro),
            int(R::ChargedMicro),
            text(R::Code),
            text(R::Message),
            int(R::FundedAtMs),
            optional_int(R::ClosedAtMs),
        ],
        Index::create().col(R::Id),
    )
    .await?;
    create(
        manager,
        receipts::Entity,
        vec![uuid(C::RequestId), text(C::Account), bytes(C::Receipt), bytes(C::Evidence)],
        Index::create().col(C::RequestId),
    )
    .await?;
    create(
        manager,
        journal::Entity,
        vec![
            uuid(J::RequestId),
            bytes(J::Leaf),
            int(J::AtMs),
            optional_int(J::BatchSequence),
            optional_int(J::BatchIndex),
        ],
        Index::create().col(J::RequestId),
    )
    .await?;
    let by_batch = Index::create()
        .name("journal_batch")
        .table(journal::Entity)
        .col(J::BatchSequence)
        .col(J::AtMs)
        .if_not_exists()
        .to_owned();
    manager.create_index(by_batch).await
}

async fn chain(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    use {batches::Column as B, rewards::Column as W};
    create(
        manager,
        batches::Entity,
        vec![
            int(B::Sequence),
            text(B::State),
            bytes(B::PreviousHash),
            bytes(B::ReceiptsRoot),
            bytes(B::RewardRoot),
            int(B::Count),
            int(B::TotalMicro),
            bytes(B::Hash),
            optional_int(B::Nonce),
            optional_bytes(B::TxHash),
            optional_bytes(B::RawTx),
            optional_int(B::BlockNumber),
            int(B::FormedAtMs),
            optional_int(B::AnchoredAtMs),
        ],
        Index::create().col(B::Sequence),
    )
    .await?;
    create(
        manager,
        rewards::Entity,
        vec![text(W::Operator), int(W::CumulativeMicro)],
        Index::create().col(W::Operator),
    )
    .await
}
