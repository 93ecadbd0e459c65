//! The set on disk: one row per request from its funding to its closing verdict, and cancels that came
//! before their request.

use infera_bus::outbox;
use infera_protocol::bytes::Hash32;
use infera_protocol::ids::message_id;
use infera_runtime::{clock, trace};
use infera_wire::convert::{CloseReason, Funded};
use infera_wire::topology::keys;
use infera_wire::{Message, v1};
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbBackend, DbErr, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder,
    QuerySelect, Set, Statement,
};
use sea_orm_migration::prelude::*;
use tracing::Instrument;
use uuid::Uuid;

use crate::domain::{Entry, Stage};

mod requests {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "requests")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request: Uuid,
        pub account: String,
        pub model_root: Vec<u8>,
        pub model: String,
        pub k: i64,
        pub bid_micro: i64,
        pub submitted_at_ms: i64,
        pub deadline_ms: i64,
        /// `pending`, `offered` or `closing`.
        pub stage: String,
        /// When the stage began.
        pub stage_ms: i64,
        /// Why, while it is `closing`: the same for all of its closes.
        pub close_reason: Option<String>,
        /// Closes asked for.
        pub closes: i64,
        /// The `RequestFunded` as it came.
        pub body: Vec<u8>,
        pub traceparent: Option<String>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod cancels {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "cancels")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request: Uuid,
        #[sea_orm(primary_key, auto_increment = false)]
        pub account: String,
        pub received_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

const PENDING: &str = "pending";
const OFFERED: &str = "offered";
const CLOSING: &str = "closing";
/// How long a cancel waits for its request, ms.
pub const KEEP_CANCELS_MS: i64 = 3600 * 1000;

/// What the columns that decide hold; the body stays on disk.
type Row = (Uuid, String, Vec<u8>, String, i64, i64, i64, i64, String, i64, Option<String>);

/// All requests in the set.
///
/// # Errors
/// The database's; `DbErr::Custom` for a row that can't be.
pub async fn load<C: ConnectionTrait>(db: &C) -> Result<Vec<Entry>, DbErr> {
    use requests::Column as R;
    let rows: Vec<Row> = requests::Entity::find()
        .select_only()
        .columns([R::Request, R::Account, R::ModelRoot, R::Model, R::K, R::BidMicro])
        .columns([R::SubmittedAtMs, R::DeadlineMs, R::Stage, R::StageMs, R::CloseReason])
        .order_by_asc(R::SubmittedAtMs)
        .into_tuple()
        .all(db)
        .await?;
    rows.into_iter().map(entry_of_row).collect()
}

fn entry_of_row(row: Row) -> Result<Entry, DbErr> {
    let (request, account, model_root, model, k, bid, submitted_at_ms, deadline_ms, stage, stage_ms, reason) =
        row;
    let broken = |what: &str| DbErr::Custom(format!("request {request} has an impossible {what}"));
    let stage = match stage.as_str() {
        PENDING => Stage::Pending,
        OFFERED => Stage::Offered { at_ms: stage_ms },
        CLOSING => {
            let reason = close_reason(reason.as_deref()).ok_or_else(|| broken("close_reason"))?;
            Stage::Closing { asked_at_ms: stage_ms, reason }
        }
        _ => return Err(broken("stage")),
    };
    Ok(Entry {
        request,
        account,
        model_root: Hash32::try_from(model_root.as_slice()).map_err(|_| broken("model_root"))?,
        model,
        k: <u32 as TryFrom<i64>>::try_from(k).map_err(|_| broken("k"))?,
        bid_micro: <u64 as TryFrom<i64>>::try_from(bid).map_err(|_| broken("bid"))?,
        submitted_at_ms,
        deadline_ms,
        stage,
    })
}

/// What the column says; rows of earlier versions say nothing, as most were closed at their deadline.
fn close_reason(column: Option<&str>) -> Option<CloseReason> {
    column.map_or(Some(CloseReason::Deadline), CloseReason::parse)
}

/// Adds a funded request. One whose cancel came first is closed at once.
///
/// # Errors
/// The database's.
pub async fn admit<C: ConnectionTrait>(tx: &C, funded: &Funded, body: &[u8]) -> Result<(), DbErr> {
    let s = &funded.submitted;
    one_at_a_time(tx, s.request.id).await?;
    let row = requests::ActiveModel {
        request: Set(s.request.id),
        account: Set(s.account.clone()),
        model_root: Set(s.request.model_root.to_vec()),
        model: Set(s.model.clone()),
        k: Set(i64::from(s.k)),
        bid_micro: Set(<i64 as TryFrom<u64>>::try_from(s.bid_micro).unwrap_or(i64::MAX)),
        submitted_at_ms: Set(s.submitted_at_ms),
        deadline_ms: Set(s.deadline_ms),
        stage: Set(PENDING.to_owned()),
        stage_ms: Set(clock::now_ms()),
        close_reason: Set(None),
        closes: Set(0),
        body: Set(body.to_vec()),
        traceparent: Set(trace::current_traceparent()),
    };
    requests::Entity::insert(row)
        .on_conflict(OnConflict::column(requests::Column::Request).do_nothing().to_owned())
        .exec_without_returning(tx)
        .await?;
    let cancel = cancels::Entity::find_by_id((s.request.id, s.account.clone())).one(tx).await?;
    if cancel.is_some() {
        cancels::Entity::delete_by_id((s.request.id, s.account.clone())).exec(tx).await?;
        close(tx, s.request.id, CloseReason::Cancelled).await?;
    }
    Ok(())
}

/// Lets admission and cancel of one request follow each other: at once, on PostgreSQL, neither would see the
/// other's row, and the cancel would be lost. SQLite has one writer.
async fn one_at_a_time<C: ConnectionTrait>(tx: &C, request: Uuid) -> Result<(), DbErr> {
    if tx.get_database_backend() != DbBackend::Postgres {
        return Ok(());
    }
    let (_, low) = request.as_u64_pair();
    let lock = Statement::from_sql_and_values(
        DbBackend::Postgres,
        "SELECT pg_advisory_xact_lock($1)",
        [low.cast_signed().into()],
    );
    tx.execute_raw(lock).await?;
    Ok(())
}

/// One request of the set.
///
/// # Errors
/// As [`load`].
pub async fn find<C: ConnectionTrait>(db: &C, request: Uuid) -> Result<Option<Entry>, DbErr> {
    use requests::Column as R;
    let row: Option<Row> = requests::Entity::find_by_id(request)
        .select_only()
        .columns([R::Request, R::Account, R::ModelRoot, R::Model, R::K, R::BidMicro])
        .columns([R::SubmittedAtMs, R::DeadlineMs, R::Stage, R::StageMs, R::CloseReason])
        .into_tuple()
        .one(db)
        .await?;
    row.map(entry_of_row).transpose()
}

/// What came of a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// The close was asked for.
    Yes,
    /// It was being closed already.
    Before,
    /// No such request yet: the cancel waits for it.
    Waits,
    /// It belongs to another account.
    NotTheirs,
}

/// Cancels a request of `account`.
///
/// # Errors
/// The database's.
pub async fn cancel<C: ConnectionTrait>(tx: &C, request: Uuid, account: &str) -> Result<Cancelled, DbErr> {
    one_at_a_time(tx, request).await?;
    let Some(row) = requests::Entity::find_by_id(request).one(tx).await? else {
        let row = cancels::ActiveModel {
            request: Set(request),
            account: Set(account.to_owned()),
            received_ms: Set(clock::now_ms()),
        };
        cancels::Entity::insert(row)
            .on_conflict(
                OnConflict::columns([cancels::Column::Request, cancels::Column::Account])
                    .do_nothing()
                    .to_owned(),
            )
            .exec_without_returning(tx)
            .await?;
        return Ok(Cancelled::Waits);
    };
    if row.account != account {
        return Ok(Cancelled::NotTheirs);
    }
    if row.stage == CLOSING {
        return Ok(Cancelled::Before);
    }
    close(tx, request, CloseReason::Cancelled).await?;
    Ok(Cancelled::Yes)
}

/// Asks the verifier to close a request, for `reason` unless it was asked before: then for the same as
/// then. Says whether it was there.
///
/// # Errors
/// The database's.
pub async fn close<C: ConnectionTrait>(tx: &C, request: Uuid, reason: CloseReason) -> Result<bool, DbErr> {
    let Some(row) = requests::Entity::find_by_id(request).one(tx).await? else { return Ok(false) };
    let before = (row.stage == CLOSING).then(|| close_reason(row.close_reason.as_deref())).flatten();
    let reason = before.unwrap_or(reason);
    let closes = row.closes + 1;
    let message =
        v1::CloseRequested { submitted: funded(&row)?.submitted, reason: reason.as_str().to_owned() };
    let id = message_id(keys::CLOSE_REQUESTED, request, closes.unsigned_abs());
    let span = span("mempool close", &row);
    outbox::enqueue(tx, keys::CLOSE_REQUESTED, id, &message).instrument(span).await?;
    let mut row = row.into_active_model();
    row.stage = Set(CLOSING.to_owned());
    row.close_reason = Set(Some(reason.as_str().to_owned()));
    row.stage_ms = Set(clock::now_ms());
    row.closes = Set(closes);
    requests::Entity::update(row).exec(tx).await?;
    Ok(true)
}

/// Offers a request that is pending; one that is no longer is left alone. Says whether it was there.
///
/// # Errors
/// The database's.
pub async fn offer<C: ConnectionTrait>(tx: &C, request: Uuid) -> Result<bool, DbErr> {
    let Some(row) = requests::Entity::find_by_id(request).one(tx).await? else { return Ok(false) };
    if row.stage != PENDING {
        return Ok(true);
    }
    let now = clock::now_ms();
    let message = v1::RequestOffered { funded: Some(funded(&row)?), offer: 1, offered_at_ms: now };
    let id = message_id(keys::REQUEST_OFFERED, request, 1);
    let span = span("mempool offer", &row);
    outbox::enqueue(tx, keys::REQUEST_OFFERED, id, &message).instrument(span).await?;
    let mut row = row.into_active_model();
    row.stage = Set(OFFERED.to_owned());
    row.stage_ms = Set(now);
    requests::Entity::update(row).exec(tx).await?;
    Ok(true)
}

/// Takes a request out of the set; says whether it was there.
///
/// # Errors
/// The database's.
pub async fn remove<C: ConnectionTrait>(tx: &C, request: Uuid) -> Result<bool, DbErr> {
    let result = requests::Entity::delete_by_id(request).exec(tx).await?;
    Ok(result.rows_affected == 1)
}

/// Forgets cancels that came before `before_ms` and never met their request.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, before_ms: i64) -> Result<u64, DbErr> {
    let result =
        cancels::Entity::delete_many().filter(cancels::Column::ReceivedMs.lt(before_ms)).exec(db).await?;
    Ok(result.rows_affected)
}

fn funded(row: &requests::Model) -> Result<v1::RequestFunded, DbErr> {
    v1::RequestFunded::decode(row.body.as_slice())
        .map_err(|error| DbErr::Custom(format!("request {} can't be read: {error}", row.request)))
}

/// The span of what the mempool decides about a request, in the request's own trace.
fn span(name: &'static str, row: &requests::Model) -> tracing::Span {
    let span =
        tracing::info_span!(parent: None, "mempool", otel.name = name, infera.request.id = %row.request);
    if let Some(parent) = &row.traceparent {
        trace::set_parent(&span, parent);
    }
    span
}

/// The tables of this service, with those of outbox and inbox.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![outbox::migration(), infera_bus::inbox::migration(), Box::new(Create), Box::new(AddReason)]
    }
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "mempool_0001_requests"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use cancels::Column as C;
        use requests::Column as R;
        let number = |column| ColumnDef::new(column).big_integer().not_null().to_owned();
        manager
            .create_table(
                Table::create()
                    .table(requests::Entity)
                    .col(ColumnDef::new(R::Request).uuid().not_null().primary_key())
                    .col(ColumnDef::new(R::Account).string().not_null())
                    .col(ColumnDef::new(R::ModelRoot).binary().not_null())
                    .col(ColumnDef::new(R::Model).string().not_null())
                    .col(number(R::K))
                    .col(number(R::BidMicro))
                    .col(number(R::SubmittedAtMs))
                    .col(number(R::DeadlineMs))
                    .col(ColumnDef::new(R::Stage).string().not_null())
                    .col(number(R::StageMs))
                    .col(number(R::Closes))
                    .col(ColumnDef::new(R::Body).binary().not_null())
                    .col(ColumnDef::new(R::Traceparent).string().null())
                    .to_owned(),
            )
            .await?;
        manager
            .create_table(
                Table::create()
                    .table(cancels::Entity)
                    .col(ColumnDef::new(C::Request).uuid().not_null())
                    .col(ColumnDef::new(C::Account).string().not_null())
                    .col(ColumnDef::new(C::ReceivedMs).big_integer().not_null())
                    .primary_key(Index::create().col(C::Request).col(C::Account))
                    .to_owned(),
            )
            .await
    }
}

struct AddReason;

impl MigrationName for AddReason {
    fn name(&self) -> &str {
        "mempool_0002_close_reason"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for AddReason {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let column = ColumnDef::new(requests::Column::CloseReason).string().null().to_owned();
        manager.alter_table(Table::alter().table(requests::Entity).add_column(column).to_owned()).await
    }
}
