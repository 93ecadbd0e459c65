//! The tables `outbox` and `outbox_dead`.

use sea_orm::DbErr;
use sea_orm_migration::prelude::{
    ColumnDef, DeriveIden, Index, MigrationName, MigrationTrait, SchemaManager, Table,
};

pub(super) mod outbox {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub routing_key: String,
        pub kind: String,
        pub body: Vec<u8>,
        pub traceparent: Option<String>,
        pub created_ms: i64,
        /// The relay that publishes it, where several replicas share the table.
        pub lease_owner: Option<Uuid>,
        /// From then on another relay may take it; 0: nobody has it.
        pub lease_until_ms: i64,
    }

    // Bodies are not to be logged.
    impl std::fmt::Debug for Model {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Model").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
        }
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) mod dead {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "outbox_dead")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        /// The queue it failed in; the routing key of what no queue receives.
        #[sea_orm(primary_key, auto_increment = false)]
        pub queue: String,
        pub reason: String,
        pub kind: String,
        pub body: Vec<u8>,
        pub traceparent: Option<String>,
        pub created_ms: i64,
    }

    // Bodies are not to be logged.
    impl std::fmt::Debug for Model {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Model").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
        }
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "bus_0001_outbox"
    }
}

#[derive(DeriveIden)]
enum Outbox {
    Table,
    Id,
    RoutingKey,
    Kind,
    Body,
    Traceparent,
    CreatedMs,
    LeaseOwner,
    LeaseUntilMs,
}

#[derive(DeriveIden)]
enum OutboxDead {
    Table,
    Id,
    Queue,
    Reason,
    Kind,
    Body,
    Traceparent,
    CreatedMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let outbox = Table::create()
            .table(Outbox::Table)
            .if_not_exists()
            .col(ColumnDef::new(Outbox::Id).uuid().not_null())
            .col(ColumnDef::new(Outbox::RoutingKey).string().not_null())
            .col(ColumnDef::new(Outbox::Kind).string().not_null())
            .col(ColumnDef::new(Outbox::Body).binary().not_null())
            .col(ColumnDef::new(Outbox::Traceparent).string().null())
            .col(ColumnDef::new(Outbox::CreatedMs).big_integer().not_null())
            .col(ColumnDef::new(Outbox::LeaseOwner).uuid().null())
            .col(ColumnDef::new(Outbox::LeaseUntilMs).big_integer().not_null())
            .primary_key(Index::create().col(Outbox::Id).col(Outbox::RoutingKey))
            .to_owned();
        manager.create_table(outbox).await?;
        let by_age = Index::create()
            .name("outbox_age")
            .table(Outbox::Table)
            .col(Outbox::CreatedMs)
            .if_not_exists()
            .to_owned();
        manager.create_index(by_age).await?;
        let dead = Table::create()
            .table(OutboxDead::Table)
            .if_not_exists()
            .col(ColumnDef::new(OutboxDead::Id).uuid().not_null())
            .col(ColumnDef::new(OutboxDead::Queue).string().not_null())
            .col(ColumnDef::new(OutboxDead::Reason).text().not_null())
            .col(ColumnDef::new(OutboxDead::Kind).string().not_null())
            .col(ColumnDef::new(OutboxDead::Body).binary().not_null())
            .col(ColumnDef::new(OutboxDead::Traceparent).string().null())
            .col(ColumnDef::new(OutboxDead::CreatedMs).big_integer().not_null())
            .primary_key(Index::create().col(OutboxDead::Id).col(OutboxDead::Queue))
            .to_owned();
        manager.create_table(dead).await
    }
}
