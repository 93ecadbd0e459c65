//! The inbox: which messages a service has processed, per queue. Written in the transaction that
//! processes the message, so a redelivered message finds its own trace there.

use infera_runtime::clock;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ConnectionTrait, DbErr, QueryTrait, Set};
use sea_orm_migration::prelude::{
    ColumnDef, DeriveIden, Index, MigrationName, MigrationTrait, SchemaManager, Table,
};

/// How long a processed message is remembered, ms: 7 days. A message that comes later than that is
/// processed again.
pub const KEEP_MS: i64 = 7 * 24 * 3600 * 1000;

mod entity {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "inbox")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub queue: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub received_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Notes that the message `id` from `queue` is processed by the transaction `tx`. `false`: an earlier
/// transaction did, so there is nothing left to do.
///
/// # Errors
/// The database's.
pub async fn first_time<C: ConnectionTrait>(tx: &C, queue: &str, id: Uuid) -> Result<bool, DbErr> {
    let row =
        entity::ActiveModel { queue: Set(queue.to_owned()), id: Set(id), received_ms: Set(clock::now_ms()) };
    let insert = entity::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    let result = tx.execute(&insert.into_query()).await?;
    Ok(result.rows_affected() == 1)
}

/// Forgets messages processed before `before_ms`; returns how many.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, before_ms: i64) -> Result<u64, DbErr> {
    let result =
        entity::Entity::delete_many().filter(entity::Column::ReceivedMs.lt(before_ms)).exec(db).await?;
    Ok(result.rows_affected)
}

/// Creates the table `inbox`; put it into the service's migrator.
pub fn migration() -> Box<dyn MigrationTrait> {
    Box::new(Create)
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "bus_0001_inbox"
    }
}

#[derive(DeriveIden)]
enum Inbox {
    Table,
    Queue,
    Id,
    ReceivedMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::create()
            .table(Inbox::Table)
            .if_not_exists()
            .col(ColumnDef::new(Inbox::Queue).string().not_null())
            .col(ColumnDef::new(Inbox::Id).uuid().not_null())
            .col(ColumnDef::new(Inbox::ReceivedMs).big_integer().not_null())
            .primary_key(Index::create().col(Inbox::Queue).col(Inbox::Id))
            .to_owned();
        manager.create_table(table).await?;
        let index = Index::create()
            .name("inbox_received")
            .table(Inbox::Table)
            .col(Inbox::ReceivedMs)
            .if_not_exists()
            .to_owned();
        manager.create_index(index).await
    }
}
