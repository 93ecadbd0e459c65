//! API and pages.

mod api;
mod export;
mod governance;
mod pages;
mod views;

use std::sync::Arc;
use std::time::Instant;

use actix_web::web::{Data, ServiceConfig};
use infera_embed::{Embedder, Index};
use infera_runtime::http::ApiError;
use sea_orm::DatabaseConnection;
use tokio::sync::{Mutex, Semaphore};
use uuid::Uuid;

use crate::metrics::Metrics;
use crate::query::{self, Entry};
use views::GovernancePage;

/// What handlers read.
pub(crate) struct Explorer {
    pub db: DatabaseConnection,
    pub embedder: Embedder,
    pub index: Arc<dyn Index>,
    pub metrics: Metrics,
    pub searches: Semaphore,
    pub exports: Arc<Semaphore>,
    pub min_score: f32,
    pub receipts_url: String,
    pub rpc_url: String,
    pub network: String,
    /// For what holders decide.
    pub client: reqwest::Client,
    /// What they decided when it was asked last.
    pub governance: Mutex<Option<(Instant, GovernancePage)>>,
}

/// The routes over `explorer`.
pub(crate) fn routes(explorer: Arc<Explorer>) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .app_data(Data::from(explorer))
            .service(api::history)
            .service(api::history_of)
            .service(api::search)
            .service(api::stats)
            .service(export::csv)
            .service(export::jsonl)
            .service(pages::home)
            .service(pages::receipt)
            .service(governance::page)
            .service(pages::style)
            .service(pages::script);
    }
}

/// An answer that is near to a question.
pub(crate) struct Found {
    pub score: f32,
    pub entry: Entry,
}

impl Explorer {
    /// Answers near to `question` in meaning, nearest first. Those whose receipt is still on its way
    /// are left out.
    async fn find(&self, question: &str, limit: usize, min_score: f32) -> Result<Vec<Found>, ApiError> {
        let _turn = self.searches.try_acquire().map_err(|_| {
            ApiError::rate_limited("too many searches run at this time; try again in a moment").retry_after(1)
        })?;
        let started = Instant::now();
        let mut vectors = self.embedder.embed(vec![question.to_owned()]).await.map_err(ApiError::internal)?;
        let vector = vectors.pop().ok_or_else(|| ApiError::internal("the embedder gave no vector"))?;
        let hits = self.index.search(&vector, limit, min_score).await.map_err(|error| {
            tracing::warn!(%error, "search failed");
            ApiError::unavailable("the index of answers does not respond; try again in a moment")
        })?;
        self.metrics.search_seconds.observe(started.elapsed().as_secs_f64());
        let ids: Vec<Uuid> = hits.iter().map(|hit| hit.request_id).collect();
        let mut entries = query::receipts_of(&self.db, ids).await.map_err(ApiError::internal)?;
        Ok(hits
            .into_iter()
            .filter_map(|hit| {
                let place = entries.iter().position(|entry| entry.receipt.id == hit.request_id)?;
                Some(Found { score: hit.score, entry: entries.swap_remove(place) })
            })
            .collect())
    }
}
