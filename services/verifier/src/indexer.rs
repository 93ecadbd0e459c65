//! Writes the vectors of delivered answers to the index, after their verdicts: a slow or absent
//! index delays no answer. A row of `unindexed` goes only when the index has the vector, so a crash
//! at any point repeats it.

use std::sync::Arc;
use std::time::Duration;

use infera_embed::{Embedder, Index, Point};
use infera_runtime::health::CheckHandle;
use infera_runtime::network::Live;
use infera_runtime::{CancellationToken, planned};
use infera_wire::{Message, v1};
use sea_orm::DatabaseConnection;
use tokio::sync::Notify;

use crate::metrics::Metrics;
use crate::store::{self, unindexed};
use crate::texts::Texts;

/// Rows taken at a time.
const BATCH: u64 = 32;
/// How often the table is looked at without being woken.
const TICK: Duration = Duration::from_secs(1);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LAST_BACKOFF: Duration = Duration::from_secs(30);

pub(crate) struct Indexer {
    pub db: DatabaseConnection,
    pub live: Live,
    pub texts: Texts,
    pub embedder: Embedder,
    pub index: Arc<dyn Index>,
    pub metrics: Metrics,
    pub wake: Arc<Notify>,
    pub health: CheckHandle,
}

impl Indexer {
    pub async fn run(self, shutdown: CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        let mut pause = Duration::ZERO;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                // A failing index is not asked more often because more waits for it.
                () = self.wake.notified(), if backoff == FIRST_BACKOFF => {}
            }
            match self.step(&shutdown).await {
                Ok(()) => {
                    backoff = FIRST_BACKOFF;
                    pause = TICK;
                }
                Err(reason) => {
                    self.health.down(reason.clone());
                    tracing::warn!(reason, retry_after = ?backoff, "answers are not indexed");
                    pause = backoff;
                    backoff = (backoff * 2).min(LAST_BACKOFF);
                }
            }
        }
    }

    /// Indexes what waits, until nothing does.
    async fn step(&self, shutdown: &CancellationToken) -> Result<(), String> {
        loop {
            let rows = store::waiting(&self.db, BATCH).await.map_err(|e| e.to_string())?;
            if rows.is_empty() {
                self.index.ping().await.map_err(|e| e.to_string())?;
                self.health.up();
            }
            let waiting = store::waiting_count(&self.db).await.map_err(|e| e.to_string())?;
            self.metrics.unindexed.set(i64::try_from(waiting).unwrap_or(i64::MAX));
            if rows.is_empty() || shutdown.is_cancelled() {
                return Ok(());
            }
            for row in rows {
                self.index_one(&row).await?;
            }
        }
    }

    async fn index_one(&self, row: &unindexed::Model) -> Result<(), String> {
        if let Some((model, text)) = self.text(row).await? {
            let vector = self.embedder.embed(vec![text]).await.map_err(|e| e.to_string())?;
            let Some(vector) = vector.into_iter().next() else {
                return Err("the embedder gave no vector".to_owned());
            };
            let point = Point { request_id: row.request_id, model, decided_at_ms: row.decided_at_ms, vector };
            planned::pause("verifier.index.before_upsert").await;
            self.index.upsert(&point).await.map_err(|e| e.to_string())?;
            planned::pause("verifier.index.after_upsert").await;
            self.metrics.indexed.inc();
        }
        store::indexed(&self.db, row.request_id).await.map_err(|e| e.to_string())
    }

    /// Model and delivered text of a verdict; none where there is nothing to search for.
    async fn text(&self, row: &unindexed::Model) -> Result<Option<(String, String)>, String> {
        let stored = store::verdict(&self.db, row.request_id, row.round).await.map_err(|e| e.to_string())?;
        let Some(stored) = stored else { return Ok(None) };
        let Ok(verdict) = v1::Verdict::decode(stored.body.as_slice()) else { return Ok(None) };
        let Some(v1::verdict::Outcome::Verified(verified)) = verdict.outcome else { return Ok(None) };
        let roots = self.live.now();
        let registries = roots.registries.in_force(stored.decided_at_ms, stored.decided_at_ms);
        let model = registries.filter_map(|registry| registry.by_id(&stored.model)).next();
        let text = model.and_then(|model| self.texts.get(&model.weights_root));
        let Some(text) = text else {
            tracing::warn!(request_id = %row.request_id, model = stored.model,
                "the model left the registry, its answer is not indexed");
            return Ok(None);
        };
        let text = text.prompt.decode(&verified.tokens);
        Ok((!text.trim().is_empty()).then_some((stored.model, text)))
    }
}
