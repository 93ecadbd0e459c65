//! What survives a crash: the number of every request's last attempt, and proofs of equivocation. What is known of the
//! operators is in [`crate::standing`].

use infera_protocol::bytes::NodeId;
use infera_protocol::evidence::SignedCommitment;
use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DbErr, EntityTrait, QueryFilter, Set, TransactionTrait,
};
use sea_orm_migration::prelude::*;
use uuid::Uuid;

use crate::standing::{alarms, faults, operators};

mod attempts {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "attempts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request: Uuid,
        /// The last attempt that was begun, from 1.
        pub attempt: i64,
        /// The replica that began it.
        pub owner: String,
        pub updated_ms: i64,
        /// When a closing verdict was seen.
        pub closed_ms: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod equivocations {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "equivocations")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub request: Uuid,
        pub attempt: i64,
        pub node: Vec<u8>,
        pub first_digest: Vec<u8>,
        pub first_signature: Vec<u8>,
        pub second_digest: Vec<u8>,
        pub second_signature: Vec<u8>,
        pub seen_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// How long attempts are remembered, ms: as long as the bus may deliver a message again.
pub const KEEP_MS: i64 = 7 * 24 * 3600 * 1000;

/// What [`begin_attempt`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    Attempt(u32),
    /// A closing verdict was seen before: nothing is to be computed.
    Closed,
}

/// Writes (request, attempt + 1, owner). Once it returns, results of earlier attempts are stale for
/// ever, whichever replica began them.
///
/// # Errors
/// The database's.
pub async fn begin_attempt(
    db: &DatabaseConnection,
    request: Uuid,
    owner: &str,
    now: i64,
) -> Result<Begun, DbErr> {
    let tx = db.begin().await?;
    let row = attempts::ActiveModel {
        request: Set(request),
        attempt: Set(1),
        owner: Set(owner.to_owned()),
        updated_ms: Set(now),
        closed_ms: Set(None),
    };
    let next = Expr::col((attempts::Entity, attempts::Column::Attempt)).add(1);
    attempts::Entity::insert(row)
        .on_conflict(
            OnConflict::column(attempts::Column::Request)
                .value(attempts::Column::Attempt, next)
                .update_columns([attempts::Column::Owner, attempts::Column::UpdatedMs])
                .to_owned(),
        )
        .exec_without_returning(&tx)
        .await?;
    let row = attempts::Entity::find_by_id(request).one(&tx).await?;
    let row = row.ok_or_else(|| DbErr::RecordNotFound(format!("attempts {request}")))?;
    if row.closed_ms.is_some() {
        tx.rollback().await?;
        return Ok(Begun::Closed);
    }
    tx.commit().await?;
    let attempt = <u32 as TryFrom<i64>>::try_from(row.attempt)
        .map_err(|_| DbErr::Custom(format!("attempt {} of {request}", row.attempt)))?;
    Ok(Begun::Attempt(attempt))
}

/// Notes that the request is closed.
///
/// # Errors
/// The database's.
pub async fn close<C: ConnectionTrait>(db: &C, request: Uuid, now: i64) -> Result<(), DbErr> {
    attempts::Entity::update_many()
        .col_expr(attempts::Column::ClosedMs, Expr::value(now))
        .filter(attempts::Column::Request.eq(request))
        .exec(db)
        .await?;
    Ok(())
}

/// Keeps both of the commitments that a node signed for one slot.
///
/// # Errors
/// The database's.
pub async fn keep_equivocation<C: ConnectionTrait>(
    db: &C,
    request: Uuid,
    attempt: u32,
    node: NodeId,
    [first, second]: [SignedCommitment; 2],
    now: i64,
) -> Result<(), DbErr> {
    let row = equivocations::ActiveModel {
        id: Set(Uuid::now_v7()),
        request: Set(request),
        attempt: Set(i64::from(attempt)),
        node: Set(node.to_vec()),
        first_digest: Set(first.digest.to_vec()),
        first_signature: Set(first.signature.to_vec()),
        second_digest: Set(second.digest.to_vec()),
        second_signature: Set(second.signature.to_vec()),
        seen_ms: Set(now),
    };
    equivocations::Entity::insert(row).exec_without_returning(db).await?;
    Ok(())
}

/// How many proofs of equivocation are kept about a request.
///
/// # Errors
/// The database's.
pub async fn equivocations_of<C: ConnectionTrait>(db: &C, request: Uuid) -> Result<usize, DbErr> {
    let kept =
        equivocations::Entity::find().filter(equivocations::Column::Request.eq(request)).all(db).await?;
    Ok(kept.len())
}

/// Forgets attempts that were last touched before `before_ms`; returns how many.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, before_ms: i64) -> Result<u64, DbErr> {
    let result =
        attempts::Entity::delete_many().filter(attempts::Column::UpdatedMs.lt(before_ms)).exec(db).await?;
    Ok(result.rows_affected)
}

/// The tables of this service.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Attempts), infera_bus::inbox::migration(), Box::new(Standing)]
    }
}

struct Attempts;

impl MigrationName for Attempts {
    fn name(&self) -> &str {
        "dispatcher_0001_attempts"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Attempts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use attempts::Column as A;
        use equivocations::Column as E;
        let bytes = |column| ColumnDef::new(column).binary().not_null().to_owned();
        manager
            .create_table(
                Table::create()
                    .table(attempts::Entity)
                    .col(ColumnDef::new(A::Request).uuid().not_null().primary_key())
                    .col(ColumnDef::new(A::Attempt).big_integer().not_null())
                    .col(ColumnDef::new(A::Owner).string().not_null())
                    .col(ColumnDef::new(A::UpdatedMs).big_integer().not_null())
                    .col(ColumnDef::new(A::ClosedMs).big_integer().null())
                    .to_owned(),
            )
            .await?;
        manager
            .create_table(
                Table::create()
                    .table(equivocations::Entity)
                    .col(ColumnDef::new(E::Id).uuid().not_null().primary_key())
                    .col(ColumnDef::new(E::Request).uuid().not_null())
                    .col(ColumnDef::new(E::Attempt).big_integer().not_null())
                    .col(bytes(E::Node))
                    .col(bytes(E::FirstDigest))
                    .col(bytes(E::FirstSignature))
                    .col(bytes(E::SecondDigest))
                    .col(bytes(E::SecondSignature))
                    .col(ColumnDef::new(E::SeenMs).big_integer().not_null())
                    .to_owned(),
            )
            .await
    }
}

struct Standing;

impl MigrationName for Standing {
    fn name(&self) -> &str {
        "dispatcher_0002_standing"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Standing {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use alarms::Column as A;
        use faults::Column as F;
        use operators::Column as O;
        let operators = Table::create()
            .table(operators::Entity)
            .col(ColumnDef::new(O::Operator).binary().not_null().primary_key())
            .col(ColumnDef::new(O::Record).text().not_null())
            .col(ColumnDef::new(O::UpdatedMs).big_integer().not_null())
            .to_owned();
        manager.create_table(operators).await?;
        let faults = Table::create()
            .table(faults::Entity)
            .col(ColumnDef::new(F::Id).uuid().not_null().primary_key())
            .col(ColumnDef::new(F::Operator).binary().not_null())
            .col(ColumnDef::new(F::Node).binary().not_null())
            .col(ColumnDef::new(F::Request).uuid().not_null())
            .col(ColumnDef::new(F::Reason).string().not_null())
            .col(ColumnDef::new(F::AtMs).big_integer().not_null())
            .to_owned();
        manager.create_table(faults).await?;
        let by_operator =
            Index::create().name("faults_operator").table(faults::Entity).col(F::Operator).to_owned();
        manager.create_index(by_operator).await?;
        let by_change =
            Index::create().name("operators_updated").table(operators::Entity).col(O::UpdatedMs).to_owned();
        manager.create_index(by_change).await?;
        let alarms = Table::create()
            .table(alarms::Entity)
            .col(ColumnDef::new(A::Id).big_integer().not_null().primary_key())
            .col(ColumnDef::new(A::RaisedMs).big_integer().not_null())
            .to_owned();
        manager.create_table(alarms).await
    }
}
