//! What operators did, kept for good: their records, their last faults, and the alarm (protocol section 8).
//!
//! ```text
//! verdict.* ─> dispatcher.conduct ─> one transaction: records, faults, alarm ─┐ at most every second
//!                                                                             └─> Ledger ─> Assignments
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use infera_bus::{Bus, ConsumerSpec, Envelope, Reject, consume_then};
use infera_protocol::bytes::{Address, NodeId};
use infera_protocol::calibration::Calibration;
use infera_protocol::ids::message_id;
use infera_protocol::judgement::{Conduct, Finding};
use infera_protocol::trust::{Alarm, Event, Reason, Record, Rules};
use infera_runtime::network::Live;
use infera_runtime::{CancellationToken, clock};
use infera_wire::topology::queues;
use infera_wire::{convert, v1};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, EntityTrait, QueryFilter,
    QueryOrder, QuerySelect, QueryTrait, Set, TransactionTrait, sea_query::OnConflict,
};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::actor::{Assignments, Decided};
use crate::domain::Command;
use crate::domain::trust::Ledger;
use crate::error::Error;

/// Verdicts processed at a time.
const PREFETCH: u16 = 32;
/// At most so often draws learn of changes.
const PAUSE: Duration = Duration::from_secs(1);
/// Changes by other replicas are looked for this often.
const LOOK: Duration = Duration::from_secs(5);
/// Changes are read again from so long before the last look: clocks of replicas differ.
const OVERLAP_MS: i64 = 60_000;
/// The row of the alarm.
const ALARM: i64 = 1;

pub(crate) mod operators {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "operators")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub operator: Vec<u8>,
        /// `protocol::trust::Record` as JSON.
        pub record: String,
        pub updated_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod faults {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "faults")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub operator: Vec<u8>,
        pub node: Vec<u8>,
        /// Nil for a fault outside a request.
        pub request: Uuid,
        /// `protocol::trust::Reason::name`.
        pub reason: String,
        pub at_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(crate) mod alarms {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "alarms")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: i64,
        pub raised_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A fault as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub node: NodeId,
    pub request: Uuid,
    pub reason: Reason,
    pub at_ms: i64,
}

/// What one operator did in one attempt, for its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deed {
    pub operator: Address,
    pub node: NodeId,
    /// Nil outside a request.
    pub request: Uuid,
    pub events: Vec<Event>,
    /// What referees found in its answer.
    pub mean: Option<infera_protocol::judgement::Mean>,
}

impl Deed {
    /// What a finding says about its operator.
    pub fn of(conduct: Conduct, request: Uuid) -> Self {
        let mut events = vec![Event::Offered];
        match conduct.finding {
            Finding::Verified => events.extend([Event::Completed, Event::Verified]),
            Finding::Completed => events.push(Event::Completed),
            Finding::Missed => {}
            Finding::Bad(reason) => events.extend([Event::Completed, Event::Bad(reason)]),
        }
        // What is a fault already is not one more by its mean.
        let mean = conduct.mean.filter(|_| !matches!(conduct.finding, Finding::Bad(_)));
        Self { operator: conduct.operator, node: conduct.node, request, events, mean }
    }

    /// A fault outside the verdicts.
    pub fn fault(operator: Address, node: NodeId, request: Uuid, reason: Reason) -> Self {
        Self { operator, node, request, events: vec![Event::Bad(reason)], mean: None }
    }
}

/// Takes a deed into its operator's record.
///
/// # Errors
/// The database's.
async fn note<C: ConnectionTrait>(
    tx: &C,
    rules: &Rules,
    calibration: &Calibration,
    deed: &Deed,
    now: i64,
) -> Result<(), DbErr> {
    let operator = deed.operator.to_vec();
    let new = operators::ActiveModel {
        operator: Set(operator.clone()),
        record: Set(write(&Record::default())?),
        updated_ms: Set(now),
    };
    let insert = operators::Entity::insert(new)
        .on_conflict(OnConflict::column(operators::Column::Operator).do_nothing().to_owned());
    tx.execute(&insert.into_query()).await?;
    // Another replica waits here for this one's commit.
    let row = operators::Entity::find_by_id(operator.clone()).lock_exclusive().one(tx).await?;
    let row = row.ok_or_else(|| DbErr::RecordNotFound(format!("operators {}", deed.operator)))?;
    let mut record = read(&row)?;
    let mut events = deed.events.clone();
    if let Some(mean) = &deed.mean
        && let Some(bounds) = calibration.bounds(&mean.class, &mean.referee_class)
        && record.refereed(mean.micro, bounds)
    {
        events.push(Event::Bad(Reason::Drift));
    }
    for event in events {
        record.apply(rules, now, event);
        if let Event::Bad(reason) = event {
            tracing::warn!(operator = %deed.operator, node = %deed.node, request = %deed.request,
                reason = reason.name(), "operator's work is bad");
            let fault = faults::ActiveModel {
                id: Set(Uuid::now_v7()),
                operator: Set(operator.clone()),
                node: Set(deed.node.to_vec()),
                request: Set(deed.request),
                reason: Set(reason.name().to_owned()),
                at_ms: Set(now),
            };
            faults::Entity::insert(fault).exec_without_returning(tx).await?;
        }
    }
    let changed = operators::ActiveModel {
        operator: Set(operator),
        record: Set(write(&record)?),
        updated_ms: Set(now),
    };
    operators::Entity::update(changed).exec(tx).await?;
    Ok(())
}

/// Takes deeds into the records, in one order, so that replicas never wait for each other in a circle.
///
/// # Errors
/// The database's.
pub async fn note_all<C: ConnectionTrait>(
    tx: &C,
    calibration: &Calibration,
    deeds: &[Deed],
    now: i64,
) -> Result<(), DbErr> {
    let mut deeds: Vec<&Deed> = deeds.iter().collect();
    deeds.sort_by_key(|deed| deed.operator);
    for deed in deeds {
        note(tx, &Rules::default(), calibration, deed, now).await?;
    }
    Ok(())
}

/// [`note_all`] in a transaction of its own.
///
/// # Errors
/// The database's.
pub async fn note_now(
    db: &DatabaseConnection,
    calibration: &Calibration,
    deeds: &[Deed],
) -> Result<(), DbErr> {
    let tx = db.begin().await?;
    note_all(&tx, calibration, deeds, clock::now_ms()).await?;
    tx.commit().await
}

async fn raise<C: ConnectionTrait>(tx: &C, now: i64) -> Result<(), DbErr> {
    let row = alarms::ActiveModel { id: Set(ALARM), raised_ms: Set(now) };
    let update = OnConflict::column(alarms::Column::Id).update_column(alarms::Column::RaisedMs).to_owned();
    alarms::Entity::insert(row).on_conflict(update).exec_without_returning(tx).await?;
    Ok(())
}

/// The record of an operator; `None` if it was never asked for anything.
///
/// # Errors
/// The database's.
pub async fn record<C: ConnectionTrait>(db: &C, operator: &Address) -> Result<Option<Record>, DbErr> {
    operators::Entity::find_by_id(operator.to_vec()).one(db).await?.as_ref().map(read).transpose()
}

/// The records that changed since `since_ms`, and the alarm.
///
/// # Errors
/// The database's.
pub async fn records<C: ConnectionTrait>(
    db: &C,
    since_ms: i64,
) -> Result<(BTreeMap<Address, Record>, Alarm), DbErr> {
    let rows = operators::Entity::find().filter(operators::Column::UpdatedMs.gte(since_ms)).all(db).await?;
    let records = rows
        .iter()
        .map(|row| {
            let operator = Address::try_from(row.operator.as_slice()).map_err(|e| damaged(&e))?;
            Ok((operator, read(row)?))
        })
        .collect::<Result<_, DbErr>>()?;
    let raised_ms = alarms::Entity::find_by_id(ALARM).one(db).await?.map(|row| row.raised_ms);
    Ok((records, Alarm { raised_ms }))
}

/// The last faults of an operator, newest first.
///
/// # Errors
/// The database's.
pub async fn last_faults<C: ConnectionTrait>(
    db: &C,
    operator: &Address,
    limit: u64,
) -> Result<Vec<Fault>, DbErr> {
    let rows = faults::Entity::find()
        .filter(faults::Column::Operator.eq(operator.to_vec()))
        .order_by_desc(faults::Column::Id)
        .limit(limit)
        .all(db)
        .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Fault {
                node: NodeId::try_from(row.node.as_slice()).map_err(|e| damaged(&e))?,
                request: row.request,
                reason: Reason::by_name(&row.reason).ok_or_else(|| damaged(&"an unknown reason"))?,
                at_ms: row.at_ms,
            })
        })
        .collect()
}

fn read(row: &operators::Model) -> Result<Record, DbErr> {
    serde_json::from_str(&row.record).map_err(|e| damaged(&e))
}

fn write(record: &Record) -> Result<String, DbErr> {
    serde_json::to_string(record).map_err(|e| damaged(&e))
}

fn damaged(reason: &dyn std::fmt::Display) -> DbErr {
    DbErr::Custom(format!("a row about an operator is damaged: {reason}"))
}

/// Takes the conduct of every closing verdict into the records, until `shutdown`; `changed` is told.
///
/// # Errors
/// [`Error::Bus`].
pub async fn follow_verdicts(
    bus: Bus,
    db: DatabaseConnection,
    live: Live,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let spec = ConsumerSpec { bus, db, queue: queues::DISPATCHER_CONDUCT, prefetch: PREFETCH, relay: None };
    let handler = async |tx: &DatabaseTransaction, envelope: &Envelope| {
        take(tx, &live.now().registries.current().calibration, envelope).await
    };
    consume_then(spec, shutdown, handler, async |_| changed.notify_one()).await?;
    Ok(())
}

async fn take(
    tx: &DatabaseTransaction,
    calibration: &Calibration,
    envelope: &Envelope,
) -> Result<(), Reject> {
    let verdict: v1::Verdict = infera_wire::decode("Verdict", &envelope.body)?;
    if verdict.conduct.is_empty() {
        return Ok(());
    }
    let request = convert::uuid("verdict.request_id", &verdict.request_id)?;
    // One verdict closes a request: what another one says of it, or the same one under another id, is no further deed.
    let once = message_id("conduct", request, 0);
    if !infera_bus::inbox::first_time(tx, queues::DISPATCHER_CONDUCT, once).await? {
        return Ok(());
    }
    let now = clock::now_ms();
    let deeds = verdict.conduct.iter().map(convert::conduct).collect::<Result<Vec<_>, _>>()?;
    let deeds: Vec<Deed> = deeds.into_iter().map(|conduct| Deed::of(conduct, request)).collect();
    note_all(tx, calibration, &deeds, now).await?;
    if verdict.overturned {
        tracing::warn!(%request, "referees denied what a majority of the replicas said: everything is refereed for now");
        raise(tx, now).await?;
    }
    Ok(())
}

/// Keeps the draws' ledger up to date, until `shutdown`.
///
/// # Errors
/// [`Error::ActorEnded`].
pub async fn keep_ledger(
    db: DatabaseConnection,
    assignments: Addr<Assignments>,
    changed: Arc<Notify>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut kept = Kept::default();
    loop {
        match kept.refresh(&db, clock::now_ms()).await {
            Ok(Some(ledger)) => {
                let told = assignments.send(Decided(Command::Trust(Box::new(ledger)))).await;
                if told.is_err() {
                    return if shutdown.is_cancelled() { Ok(()) } else { Err(Error::ActorEnded) };
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "operators' records are not read, trying again"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK) => {}
            () = changed.notified() => {
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
    }
}

/// What was read so far.
#[derive(Default)]
pub struct Kept {
    records: BTreeMap<Address, Record>,
    alarm: Alarm,
    ledger: Ledger,
    /// Start of the day for which the ledger was worked out: records fade by the day.
    day: i64,
    looked_ms: i64,
}

impl Kept {
    /// Reads what changed; the ledger, if anything did.
    ///
    /// # Errors
    /// The database's.
    pub async fn refresh<C: ConnectionTrait>(&mut self, db: &C, now: i64) -> Result<Option<Ledger>, DbErr> {
        let (read, alarm) = records(db, self.looked_ms.saturating_sub(OVERLAP_MS)).await?;
        self.looked_ms = now;
        let changed: BTreeSet<Address> = read
            .iter()
            .filter(|(operator, record)| self.records.get(operator) != Some(record))
            .map(|(operator, _)| *operator)
            .collect();
        self.records.extend(read);
        let day = now / 86_400_000;
        let rules = Rules::default();
        if day != self.day || alarm.is_on(&rules, now) != self.alarm.is_on(&rules, now) {
            self.ledger = Ledger::new(&rules, &alarm, &self.records, now);
        } else if changed.is_empty() {
            return Ok(None);
        } else {
            let changed =
                changed.iter().filter_map(|operator| Some((*operator, *self.records.get(operator)?)));
            self.ledger.extend(Ledger::new(&rules, &alarm, &changed.collect(), now));
        }
        (self.day, self.alarm) = (day, alarm);
        Ok(Some(self.ledger.clone()))
    }
}
