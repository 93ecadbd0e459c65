//! Tables and queries. Every function takes a transaction or a connection.

use infera_bus::{inbox, outbox};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ConnectionTrait, IntoActiveModel, QueryOrder, QuerySelect, QueryTrait, Set};
use sea_orm_migration::prelude::{
    ColumnDef, DeriveIden, Index, MigrationName, MigrationTrait, MigratorTrait, SchemaManager, Table,
};

use crate::domain::Finding;

/// One verdict per (request, round); the bytes are what was said and is said again.
pub mod verdicts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "verdicts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        /// `domain::round_key`; 0 for a close request.
        #[sea_orm(primary_key, auto_increment = false)]
        pub round: i64,
        pub outcome: String,
        pub model: String,
        /// Numerics class; empty for a close request.
        pub class: String,
        pub reply_to: String,
        pub decided_at_ms: i64,
        /// The verdict as protobuf.
        pub body: Vec<u8>,
        /// Canonical JSON, where the body does not carry it.
        pub evidence: Option<Vec<u8>>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The closing verdict of a request: one by primary key.
mod closings {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "closings")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub round: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// How each pair of results stood to each other.
pub mod findings {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "findings")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub round: i64,
        #[sea_orm(primary_key, auto_increment = false)]
        pub node_a: Vec<u8>,
        #[sea_orm(primary_key, auto_increment = false)]
        pub node_b: Vec<u8>,
        pub relation: String,
        pub parting: Option<i64>,
        pub similarity_millionths: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// Verified answers whose vectors are not in the index yet.
pub mod unindexed {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "unindexed")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub round: i64,
        pub decided_at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The verdict of one round.
///
/// # Errors
/// The database's; so everywhere below.
pub async fn verdict<C: ConnectionTrait>(
    db: &C,
    request_id: Uuid,
    round: i64,
) -> Result<Option<verdicts::Model>, DbErr> {
    verdicts::Entity::find_by_id((request_id, round)).one(db).await
}

/// The closing verdict.
pub async fn closing<C: ConnectionTrait>(db: &C, request_id: Uuid) -> Result<Option<verdicts::Model>, DbErr> {
    match closings::Entity::find_by_id(request_id).one(db).await? {
        Some(closing) => verdict(db, request_id, closing.round).await,
        None => Ok(None),
    }
}

/// The latest round that has a verdict.
pub async fn last_round<C: ConnectionTrait>(db: &C, request_id: Uuid) -> Result<Option<i64>, DbErr> {
    let query = verdicts::Entity::find().filter(verdicts::Column::RequestId.eq(request_id));
    let last = query.select_only().column(verdicts::Column::Round).order_by_desc(verdicts::Column::Round);
    last.into_tuple().one(db).await
}

/// Every verdict of a request, oldest first.
pub async fn verdicts_of<C: ConnectionTrait>(
    db: &C,
    request_id: Uuid,
) -> Result<Vec<verdicts::Model>, DbErr> {
    verdicts::Entity::find()
        .filter(verdicts::Column::RequestId.eq(request_id))
        .order_by_asc(verdicts::Column::DecidedAtMs)
        .order_by_asc(verdicts::Column::Round)
        .all(db)
        .await
}

/// Closes the request with the verdict of `round`. `false`: it is closed already.
pub async fn close<C: ConnectionTrait>(tx: &C, request_id: Uuid, round: i64) -> Result<bool, DbErr> {
    let row = closings::ActiveModel { request_id: Set(request_id), round: Set(round) };
    let insert = closings::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

/// Writes a verdict. `false`: the round has one already.
pub async fn insert<C: ConnectionTrait>(tx: &C, row: verdicts::Model) -> Result<bool, DbErr> {
    let insert = verdicts::Entity::insert(row.into_active_model())
        .on_conflict(OnConflict::new().do_nothing().to_owned());
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

/// Writes the findings of a round.
pub async fn insert_findings<C: ConnectionTrait>(
    tx: &C,
    request_id: Uuid,
    round: i64,
    findings: &[Finding],
) -> Result<(), DbErr> {
    if findings.is_empty() {
        return Ok(());
    }
    let rows = findings.iter().map(|finding| findings::ActiveModel {
        request_id: Set(request_id),
        round: Set(round),
        node_a: Set(finding.a.to_vec()),
        node_b: Set(finding.b.to_vec()),
        relation: Set(crate::domain::relation_name(finding.relation).to_owned()),
        parting: Set(crate::domain::parting(finding.relation).and_then(|p| i64::try_from(p).ok())),
        similarity_millionths: Set(i64::from(finding.similarity_millionths)),
    });
    findings::Entity::insert_many(rows).exec_without_returning(tx).await.map(drop)
}

/// The findings of a request, all rounds.
pub async fn findings_of<C: ConnectionTrait>(
    db: &C,
    request_id: Uuid,
) -> Result<Vec<findings::Model>, DbErr> {
    findings::Entity::find()
        .filter(findings::Column::RequestId.eq(request_id))
        .order_by_asc(findings::Column::Round)
        .order_by_asc(findings::Column::NodeA)
        .order_by_asc(findings::Column::NodeB)
        .all(db)
        .await
}

/// Notes that the answer of this verdict is to be indexed.
pub async fn to_index<C: ConnectionTrait>(
    tx: &C,
    request_id: Uuid,
    round: i64,
    decided_at_ms: i64,
) -> Result<(), DbErr> {
    let row = unindexed::ActiveModel {
        request_id: Set(request_id),
        round: Set(round),
        decided_at_ms: Set(decided_at_ms),
    };
    let insert = unindexed::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    tx.execute(&insert.into_query()).await.map(drop)
}

/// Answers that are to be indexed, oldest first.
pub async fn waiting<C: ConnectionTrait>(db: &C, limit: u64) -> Result<Vec<unindexed::Model>, DbErr> {
    unindexed::Entity::find().order_by_asc(unindexed::Column::DecidedAtMs).limit(limit).all(db).await
}

/// How many answers are to be indexed.
pub async fn waiting_count<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    use sea_orm::PaginatorTrait;
    unindexed::Entity::find().count(db).await
}

/// The answer is in the index.
pub async fn indexed<C: ConnectionTrait>(db: &C, request_id: Uuid) -> Result<(), DbErr> {
    unindexed::Entity::delete_by_id(request_id).exec(db).await.map(drop)
}

/// Creates every table of the verifier.
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Create), outbox::migration(), inbox::migration()]
    }
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "verifier_0001_verdicts"
    }
}

#[derive(DeriveIden)]
enum Verdicts {
    Table,
    RequestId,
    Round,
    Outcome,
    Model,
    Class,
    ReplyTo,
    DecidedAtMs,
    Body,
    Evidence,
}

#[derive(DeriveIden)]
enum Closings {
    Table,
    RequestId,
    Round,
}

#[derive(DeriveIden)]
enum Findings {
    Table,
    RequestId,
    Round,
    NodeA,
    NodeB,
    Relation,
    Parting,
    SimilarityMillionths,
}

#[derive(DeriveIden)]
enum Unindexed {
    Table,
    RequestId,
    Round,
    DecidedAtMs,
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let verdicts = Table::create()
            .table(Verdicts::Table)
            .if_not_exists()
            .col(ColumnDef::new(Verdicts::RequestId).uuid().not_null())
            .col(ColumnDef::new(Verdicts::Round).big_integer().not_null())
            .col(ColumnDef::new(Verdicts::Outcome).string().not_null())
            .col(ColumnDef::new(Verdicts::Model).string().not_null())
            .col(ColumnDef::new(Verdicts::Class).string().not_null())
            .col(ColumnDef::new(Verdicts::ReplyTo).string().not_null())
            .col(ColumnDef::new(Verdicts::DecidedAtMs).big_integer().not_null())
            .col(ColumnDef::new(Verdicts::Body).binary().not_null())
            .col(ColumnDef::new(Verdicts::Evidence).binary().null())
            .primary_key(Index::create().col(Verdicts::RequestId).col(Verdicts::Round))
            .to_owned();
        manager.create_table(verdicts).await?;
        let closings = Table::create()
            .table(Closings::Table)
            .if_not_exists()
            .col(ColumnDef::new(Closings::RequestId).uuid().not_null().primary_key())
            .col(ColumnDef::new(Closings::Round).big_integer().not_null())
            .to_owned();
        manager.create_table(closings).await?;
        let findings = Table::create()
            .table(Findings::Table)
            .if_not_exists()
            .col(ColumnDef::new(Findings::RequestId).uuid().not_null())
            .col(ColumnDef::new(Findings::Round).big_integer().not_null())
            .col(ColumnDef::new(Findings::NodeA).binary().not_null())
            .col(ColumnDef::new(Findings::NodeB).binary().not_null())
            .col(ColumnDef::new(Findings::Relation).string().not_null())
            .col(ColumnDef::new(Findings::Parting).big_integer().null())
            .col(ColumnDef::new(Findings::SimilarityMillionths).big_integer().not_null())
            .primary_key(
                Index::create()
                    .col(Findings::RequestId)
                    .col(Findings::Round)
                    .col(Findings::NodeA)
                    .col(Findings::NodeB),
            )
            .to_owned();
        manager.create_table(findings).await?;
        let unindexed = Table::create()
            .table(Unindexed::Table)
            .if_not_exists()
            .col(ColumnDef::new(Unindexed::RequestId).uuid().not_null().primary_key())
            .col(ColumnDef::new(Unindexed::Round).big_integer().not_null())
            .col(ColumnDef::new(Unindexed::DecidedAtMs).big_integer().not_null())
            .to_owned();
        manager.create_table(unindexed).await
    }
}
