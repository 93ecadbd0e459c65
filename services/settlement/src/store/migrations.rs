//! What makes the tables of [`super::tables`].

use sea_orm::{ConnectionTrait, DbBackend, DbErr, EntityName};
use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager,
    prelude::{Alias, ColumnDef, Index, IntoIden, Table},
};

use super::tables::{
    balances, batch_txs, batches, entries, escrow_cursor, escrows, journal, receipts, requests,
    reward_history, rewards, transfers, unpaid, vouchers,
};

/// All migrations of this service, with those of the bus.
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            infera_bus::inbox::migration(),
            infera_bus::outbox::migration(),
            Box::new(First),
            Box::new(Deadlines),
            Box::new(Variants),
            Box::new(Escrows),
            Box::new(Times),
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

/// Several signed transactions for a batch, what each operator had earned as of a batch, and what was not paid.
struct Variants;

impl MigrationName for Variants {
    fn name(&self) -> &str {
        "settlement_0003"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Variants {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use {
            batch_txs::Column as T, batches::Column as B, reward_history::Column as H, unpaid::Column as U,
        };
        let transactions = vec![
            bytes(T::Hash),
            int(T::Sequence),
            text(T::Purpose),
            int(T::Nonce),
            bytes(T::Raw),
            int(T::MaxFee),
            int(T::PriorityFee),
            int(T::SignedAtMs),
        ];
        create(manager, batch_txs::Entity, transactions, Index::create().col(T::Hash)).await?;
        index(manager, "batch_txs_nonce", batch_txs::Entity, [T::Nonce, T::Sequence]).await?;
        let history = vec![text(H::Operator), int(H::Sequence), int(H::CumulativeMicro)];
        let key = &mut Index::create();
        create(manager, reward_history::Entity, history, key.col(H::Operator).col(H::Sequence)).await?;
        index(manager, "reward_history_sequence", reward_history::Entity, [H::Sequence, H::Operator]).await?;
        let unpaid_columns =
            vec![uuid(U::RequestId), bytes(U::Node), text(U::Operator), text(U::Reason), int(U::AtMs)];
        let key = &mut Index::create();
        create(manager, unpaid::Entity, unpaid_columns, key.col(U::RequestId).col(U::Node)).await?;
        index(manager, "unpaid_operator", unpaid::Entity, [U::Operator, U::AtMs]).await?;
        let total = ColumnDef::new(B::RewardTotalMicro).big_integer().not_null().default(0_i64).take();
        manager.alter_table(Table::alter().table(batches::Entity).add_column(total).take()).await?;
        let db = manager.get_connection();
        db.execute_unprepared(
            "INSERT INTO batch_txs (hash, sequence, purpose, nonce, raw, max_fee, priority_fee, signed_at_ms) \
             SELECT tx_hash, sequence, 'post', nonce, raw_tx, 0, 0, formed_at_ms FROM batches \
             WHERE tx_hash IS NOT NULL AND nonce IS NOT NULL AND raw_tx IS NOT NULL",
        )
        .await?;
        // Earlier batches had no history: the newest of them stands for all.
        db.execute_unprepared(
            "INSERT INTO reward_history (operator, sequence, cumulative_micro) \
             SELECT operator, (SELECT COALESCE(MAX(sequence), 0) FROM batches), cumulative_micro FROM rewards",
        )
        .await?;
        db.execute_unprepared(
            "UPDATE batches SET reward_total_micro = (SELECT COALESCE(SUM(cumulative_micro), 0) FROM rewards) \
             WHERE sequence = (SELECT MAX(sequence) FROM batches)",
        )
        .await?;
        for column in ["nonce", "raw_tx"] {
            manager
                .alter_table(Table::alter().table(batches::Entity).drop_column(Alias::new(column)).take())
                .await?;
        }
        Ok(())
    }
}

/// Consumers' escrows and vouchers, and what a statement of usage needs.
struct Escrows;

impl MigrationName for Escrows {
    fn name(&self) -> &str {
        "settlement_0004"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Escrows {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use {
            escrow_cursor::Column as C, escrows::Column as E, requests::Column as R, vouchers::Column as V,
        };
        let columns = vec![
            text(E::Address),
            int(E::EscrowMicro),
            int(E::ChargedMicro),
            int(E::AuthorizedMicro),
            int(E::WithdrawalMicro),
            int(E::WithdrawableAtSecs),
            int(E::BlockNumber),
            int(E::Unread),
            optional_int(E::HeadEscrowMicro),
            optional_int(E::HeadChargedMicro),
            optional_int(E::HeadWithdrawalMicro),
            int(E::OwedMicro),
            int(E::BeforeMicro),
            int(E::Movements),
        ];
        create(manager, escrows::Entity, columns, Index::create().col(E::Address)).await?;
        index(manager, "escrows_unread", escrows::Entity, [E::Unread, E::Address]).await?;
        let columns = vec![int(C::Id), int(C::NextBlock), bytes(C::BlockHash), int(C::LookedAtMs)];
        create(manager, escrow_cursor::Entity, columns, Index::create().col(C::Id)).await?;
        let columns = vec![text(V::Address), int(V::CumulativeMicro), bytes(V::Signature), int(V::AtMs)];
        create(manager, vouchers::Entity, columns, Index::create().col(V::Address)).await?;
        for column in [
            R::HeldEscrowMicro,
            R::ChargedEscrowMicro,
            R::PromptTokens,
            R::CompletionTokens,
            R::SubmittedAtMs,
        ] {
            let column = ColumnDef::new(column).big_integer().not_null().default(0_i64).take();
            manager.alter_table(Table::alter().table(requests::Entity).add_column(column).take()).await?;
        }
        index(manager, "requests_account", requests::Entity, [R::Account, R::FundedAtMs, R::Id]).await
    }
}

/// The time of each entry, so that a statement reads its period only.
struct Times;

impl MigrationName for Times {
    fn name(&self) -> &str {
        "settlement_0005"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Times {
    /// All of it or nothing, on SQLite too: what is half done can't be begun again.
    fn use_transaction(&self) -> Option<bool> {
        Some(true)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use entries::Column as E;
        let at = ColumnDef::new(E::AtMs).big_integer().not_null().default(0_i64).take();
        manager.alter_table(Table::alter().table(entries::Entity).add_column(at).take()).await?;
        let db = manager.get_connection();
        db.execute_unprepared(
            "UPDATE entries SET at_ms = (SELECT at_ms FROM transfers WHERE transfers.id = entries.transfer_id)",
        )
        .await?;
        // A process of the version before fails, and its message is tried again by another: else it would write 1970.
        if db.get_database_backend() == DbBackend::Postgres {
            db.execute_unprepared("ALTER TABLE entries ALTER COLUMN at_ms DROP DEFAULT").await?;
        }
        index(manager, "entries_time", entries::Entity, [E::Account, E::AtMs, E::TransferId]).await?;
        // It began with the same column.
        manager.drop_index(Index::drop().name("entries_account").table(entries::Entity).to_owned()).await
    }
}

async fn index<const N: usize>(
    manager: &SchemaManager<'_>,
    name: &str,
    table: impl IntoIden + Copy + 'static + sea_orm::EntityName,
    columns: [impl IntoIden; N],
) -> Result<(), DbErr> {
    let mut index = Index::create();
    index.name(name).table(table).if_not_exists();
    for column in columns {
        index.col(column);
    }
    manager.create_index(index).await
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
            // Moved into a table of their own by the third migration.
            optional_int(Alias::new("nonce")),
            optional_bytes(B::TxHash),
            optional_bytes(Alias::new("raw_tx")),
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
