//! `GET /v1/operators`: how each operator stands, why, and what it would take to recover.

use actix_web::web::{self, Data};
use infera_protocol::bytes::Address;
use infera_protocol::trust::{Alarm, Record, Recovery, Rules};
use infera_runtime::clock;
use infera_runtime::http::ApiError;
use serde::Serialize;

use crate::session::Shared;
use crate::standing::{self, Fault};

/// Most operators of one list.
const MOST: usize = 1_000;
/// Faults that are told of one operator.
const LAST_FAULTS: u64 = 20;

/// The body of `GET /v1/operators`.
#[derive(Debug, Serialize)]
pub struct List {
    operators: Vec<Standing>,
    /// Until when everything is refereed, ms since 1970, because referees denied what a majority said.
    alarm_until_ms: Option<i64>,
}

/// How an operator stands.
#[derive(Debug, Serialize)]
pub struct Standing {
    operator: String,
    /// How sure it is that the next answer is good: the 5% quantile, 10^-6.
    score_ppm: u32,
    /// May be drawn.
    eligible: bool,
    /// Refereed at random only.
    trusted: bool,
    /// How often its answers are refereed, 10^-6.
    audit_ppm: u32,
    /// Of one slot in the draw.
    weight_per_slot: u32,
    /// Share of its offers that it completed, 10^-6.
    completed_ppm: u32,
    /// Counts fade by 2% a day; thousandths.
    verified_milli: u64,
    bad_milli: u64,
    recovery: Recovery,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    last_faults: Vec<FaultItem>,
}

#[derive(Debug, Serialize)]
struct FaultItem {
    reason: &'static str,
    meaning: &'static str,
    node: String,
    request: String,
    at_ms: i64,
}

impl Standing {
    fn of(operator: &Address, record: &Record, alarm: &Alarm, faults: Vec<Fault>) -> Self {
        let (rules, now) = (Rules::default(), clock::now_ms());
        Self {
            operator: operator.to_string(),
            score_ppm: record.score_ppm(&rules, now),
            eligible: record.is_eligible(&rules, now),
            trusted: record.is_trusted(&rules, now),
            audit_ppm: record.audit_ppm(&rules, alarm, now),
            weight_per_slot: record.weight(&rules, 1, now),
            completed_ppm: record.completed_ppm(),
            verified_milli: record.verified_micro / 1_000,
            bad_milli: record.bad_micro / 1_000,
            recovery: record.recovery(&rules, now),
            last_faults: faults.into_iter().map(FaultItem::of).collect(),
        }
    }
}

impl FaultItem {
    fn of(fault: Fault) -> Self {
        Self {
            reason: fault.reason.name(),
            meaning: meaning(fault.reason),
            node: fault.node.to_string(),
            request: fault.request.to_string(),
            at_ms: fault.at_ms,
        }
    }
}

fn meaning(reason: infera_protocol::trust::Reason) -> &'static str {
    use infera_protocol::trust::Reason;
    match reason {
        Reason::Answer => {
            "Referees found an answer that is not the model's, or it breaks the request's grammar."
        }
        Reason::Drift => "Its answers together drift off the model, though none alone.",
        Reason::Mismatch => "The reveal is not what was committed to, or breaks the request's limits.",
        Reason::Withheld => "Committed, and then no reveal in time.",
        Reason::Equivocation => "Two signed answers for one slot.",
        Reason::Copy => "It answered a canary as only a copy would.",
        Reason::Report => "As a referee it was overruled by two others.",
        Reason::Planted => "As a referee it missed a planted defect.",
        Reason::Challenge => "The weights were not proved when they were asked for.",
    }
}

pub async fn list(shared: Data<Shared>) -> Result<web::Json<List>, ApiError> {
    let (records, alarm) = standing::records(&shared.db, 0).await.map_err(ApiError::internal)?;
    let rules = Rules::default();
    let until = alarm.raised_ms.map(|raised| raised + i64::from(rules.alarm_days) * 86_400_000);
    let alarm_until_ms = until.filter(|_| alarm.is_on(&rules, clock::now_ms()));
    let operators = records
        .iter()
        .take(MOST)
        .map(|(operator, record)| Standing::of(operator, record, &alarm, Vec::new()))
        .collect();
    Ok(web::Json(List { operators, alarm_until_ms }))
}

pub async fn one(shared: Data<Shared>, path: web::Path<String>) -> Result<web::Json<Standing>, ApiError> {
    let operator: Address = path.parse().map_err(|_| {
        ApiError::bad_request("operator", "not an address: write 0x and 40 lowercase hex digits")
    })?;
    let record = standing::record(&shared.db, &operator).await.map_err(ApiError::internal)?;
    let record = record.ok_or_else(|| ApiError::not_found("this operator was never asked for anything"))?;
    let (_, alarm) = standing::records(&shared.db, i64::MAX).await.map_err(ApiError::internal)?;
    let faults =
        standing::last_faults(&shared.db, &operator, LAST_FAULTS).await.map_err(ApiError::internal)?;
    Ok(web::Json(Standing::of(&operator, &record, &alarm, faults)))
}
