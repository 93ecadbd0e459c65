//! `GET /v1/mempool`: how much waits, and what it bids. No prompts, no accounts.

use actix::Addr;
use actix_web::web::{self, Data, ServiceConfig};
use infera_runtime::http::ApiError;
use serde::Serialize;

use crate::actor::{Admission, Summaries};
use crate::domain::ModelSummary;

/// Largest HTTP body that is read; no route takes one.
const MAX_BODY: usize = 4_096;

/// Adds the routes.
pub fn routes(admission: Addr<Admission>) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .configure(infera_runtime::http::defaults(MAX_BODY))
            .app_data(Data::new(admission))
            .route("/v1/mempool", web::get().to(mempool));
    }
}

#[derive(Debug, Serialize)]
struct Mempool {
    /// Requests in the set.
    depth: usize,
    models: Vec<ModelItem>,
}

#[derive(Debug, Serialize)]
struct ModelItem {
    /// Registry id.
    model: String,
    model_root: String,
    pending: usize,
    offered: usize,
    closing: usize,
    /// Further requests that fit into the network's free slots now.
    window: u32,
    /// When the oldest pending request was submitted, ms since 1970.
    oldest_submitted_at_ms: Option<i64>,
    /// Of the pending requests; `null` without any.
    bids_micro: Option<Bids>,
}

/// 10^-6 INFER per token.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Bids {
    min: u64,
    median: u64,
    max: u64,
}

async fn mempool(admission: Data<Addr<Admission>>) -> Result<web::Json<Mempool>, ApiError> {
    let summaries = admission.send(Summaries).await.map_err(ApiError::internal)?;
    let depth = summaries.iter().map(|s| s.pending + s.offered + s.closing).sum();
    Ok(web::Json(Mempool { depth, models: summaries.iter().map(item).collect() }))
}

fn item(summary: &ModelSummary) -> ModelItem {
    ModelItem {
        bids_micro: bids(&summary.bids_micro),
        model: summary.model.clone(),
        model_root: summary.model_root.to_string(),
        pending: summary.pending,
        offered: summary.offered,
        closing: summary.closing,
        window: summary.window,
        oldest_submitted_at_ms: summary.oldest_ms,
    }
}

fn bids(sorted: &[u64]) -> Option<Bids> {
    Some(Bids { min: *sorted.first()?, median: *sorted.get(sorted.len() / 2)?, max: *sorted.last()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bids_are_summed_up() {
        assert_eq!(bids(&[]), None);
        assert_eq!(bids(&[7]), Some(Bids { min: 7, median: 7, max: 7 }));
        assert_eq!(bids(&[1, 2, 9]), Some(Bids { min: 1, median: 2, max: 9 }));
    }
}
