//! What survives a crash: the number of every request's last attempt, and what nodes signed that contradicts itself. What is
//! known of the operators is in [`crate::standing`].

use infera_protocol::bytes::Address;
use infera_protocol::slashing::Contradiction;
use sea_orm::sea_query::{Expr, ExprTrait, OnConflict};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DbErr, EntityTrait, QueryFilter, QueryOrder,
    QuerySelect, Set, TransactionTrait,
};
use sea_orm_migration::prelude::*;
use uuid::Uuid;

use crate::session::hello::LONGEST_BINDING_MS;
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

mod contradictions {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "contradictions")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub request: Uuid,
        pub attempt: i64,
        pub node: Vec<u8>,
        pub operator: Vec<u8>,
        pub kind: String,
        /// JSON of [`infera_protocol::slashing::Contradiction`].
        pub evidence: String,
        pub seen_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub use contradictions::Model as Kept;

/// How long attempts are remembered, ms: as long as the bus may deliver a message again.
pub const KEEP_MS: i64 = 7 * 24 * 3600 * 1000;

/// How long contradictions are kept, ms: a node's binding and the longest unbonding (`InferaStaking.MAX_UNBONDING`), after
/// which the evidence counts for nothing.
pub const KEEP_CONTRADICTIONS_MS: i64 = LONGEST_BINDING_MS + 60 * 24 * 3600 * 1000;

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

/// Keeps what a node signed that contradicts itself; the first of each kind about a slot. False for a further one.
///
/// # Errors
/// The database's.
pub async fn keep_contradiction<C: ConnectionTrait>(
    db: &C,
    request: Uuid,
    operator: Address,
    evidence: &Contradiction,
    now: i64,
) -> Result<bool, DbErr> {
    use contradictions::Column as C;
    let slot = evidence.slot();
    let text = serde_json::to_string(evidence).map_err(|e| DbErr::Custom(e.to_string()))?;
    let row = contradictions::ActiveModel {
        id: Set(Uuid::now_v7()),
        request: Set(request),
        attempt: Set(i64::from(slot.attempt)),
        node: Set(slot.node.to_vec()),
        operator: Set(operator.to_vec()),
        kind: Set(evidence.kind().to_owned()),
        evidence: Set(text),
        seen_ms: Set(now),
    };
    let known = OnConflict::columns([C::Request, C::Attempt, C::Node, C::Kind]).do_nothing().to_owned();
    let kept = contradictions::Entity::insert(row).on_conflict(known).exec_without_returning(db).await?;
    Ok(kept == 1)
}

/// The newest contradictions, at most `most`, of everybody or of one operator, that are older than `before`.
///
/// # Errors
/// The database's.
pub async fn contradictions<C: ConnectionTrait>(
    db: &C,
    operator: Option<Address>,
    before: Option<Uuid>,
    most: u64,
) -> Result<Vec<Kept>, DbErr> {
    use contradictions::Column as C;
    let mut found = contradictions::Entity::find().order_by_desc(C::Id).limit(most);
    if let Some(operator) = operator {
        found = found.filter(C::Operator.eq(operator.to_vec()));
    }
    if let Some(before) = before {
        found = found.filter(C::Id.lt(before));
    }
    found.all(db).await
}

/// One contradiction.
///
/// # Errors
/// The database's.
pub async fn contradiction<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<Kept>, DbErr> {
    contradictions::Entity::find_by_id(id).one(db).await
}

/// Forgets attempts that were last touched [`KEEP_MS`] ago, and contradictions that no chain takes any more.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, now: i64) -> Result<(), DbErr> {
    let old = attempts::Column::UpdatedMs.lt(now - KEEP_MS);
    attempts::Entity::delete_many().filter(old).exec(db).await?;
    let old = contradictions::Column::SeenMs.lt(now - KEEP_CONTRADICTIONS_MS);
    contradictions::Entity::delete_many().filter(old).exec(db).await?;
    Ok(())
}

/// The tables of this service.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Attempts), infera_bus::inbox::migration(), Box::new(Standing), Box::new(Contradictions)]
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
            .await
    }
}

/// Proofs of equivocation of before were signed with keys that no contract can check: they go.
struct Contradictions;

impl MigrationName for Contradictions {
    fn name(&self) -> &str {
        "dispatcher_0003_contradictions"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Contradictions {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use contradictions::Column as C;
        let bytes = |column| ColumnDef::new(column).binary().not_null().to_owned();
        manager.drop_table(Table::drop().table("equivocations").if_exists().to_owned()).await?;
        let table = Table::create()
            .table(contradictions::Entity)
            .col(ColumnDef::new(C::Id).uuid().not_null().primary_key())
            .col(ColumnDef::new(C::Request).uuid().not_null())
            .col(ColumnDef::new(C::Attempt).big_integer().not_null())
            .col(bytes(C::Node))
            .col(bytes(C::Operator))
            .col(ColumnDef::new(C::Kind).string().not_null())
            .col(ColumnDef::new(C::Evidence).text().not_null())
            .col(ColumnDef::new(C::SeenMs).big_integer().not_null())
            .to_owned();
        manager.create_table(table).await?;
        let once = Index::create()
            .name("contradictions_once")
            .table(contradictions::Entity)
            .col(C::Request)
            .col(C::Attempt)
            .col(C::Node)
            .col(C::Kind)
            .unique()
            .to_owned();
        manager.create_index(once).await?;
        let by_operator = Index::create()
            .name("contradictions_operator")
            .table(contradictions::Entity)
            .col(C::Operator)
            .col(C::Id)
            .to_owned();
        manager.create_index(by_operator).await
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
