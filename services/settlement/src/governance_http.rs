//! What holders decide, for everybody who has no wallet and no RPC endpoint at hand: `GET /v1/governance`. The explorer
//! shows it; `infera govern` asks the chain itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use actix_web::{HttpResponse, web};
use infera_runtime::http::ApiError;
use serde::Serialize;
use tokio::sync::Mutex;

use crate::{
    chain::{
        Contracts,
        governance::{Governance, GovernanceError, Proposal, RegistryState},
    },
    http::State,
};

/// How long what was read is answered again.
const LIFE: Duration = Duration::from_secs(5);
/// Proposals of an answer, the newest.
const MOST: usize = 200;

/// Where decisions are read, and what was read last.
pub struct Decisions {
    rpc_url: String,
    contracts: Contracts,
    from_block: u64,
    /// One reader at a time.
    kept: Mutex<Option<(Instant, Arc<str>)>>,
}

/// The answer's body.
#[derive(Serialize)]
struct Body {
    registry: RegistryState,
    /// Newest first.
    proposals: Vec<Proposal>,
}

impl Decisions {
    pub fn new(rpc_url: String, contracts: Contracts, from_block: u64) -> Self {
        Self { rpc_url, contracts, from_block, kept: Mutex::new(None) }
    }

    /// As of a few seconds ago at most, as JSON.
    async fn read(&self) -> Result<Arc<str>, ApiError> {
        let mut kept = self.kept.lock().await;
        if let Some((_, text)) = kept.as_ref().filter(|(at, _)| at.elapsed() < LIFE) {
            return Ok(text.clone());
        }
        let body = self.ask().await.map_err(|error| {
            tracing::warn!(%error, "the governor's contract is not read");
            ApiError::unavailable("the chain does not answer; try again in a moment").retry_after(5)
        })?;
        let text: Arc<str> = serde_json::to_string(&body).map_err(ApiError::internal)?.into();
        *kept = Some((Instant::now(), text.clone()));
        Ok(text)
    }

    async fn ask(&self) -> Result<Body, GovernanceError> {
        let governance = Governance::connect(&self.rpc_url, self.contracts).await?;
        let registry = governance.registry_state(None).await?;
        let mut proposals = governance.proposals(self.from_block).await?;
        proposals.reverse();
        proposals.truncate(MOST);
        Ok(Body { registry, proposals })
    }
}

pub(crate) async fn governance(state: web::Data<State>) -> Result<HttpResponse, ApiError> {
    let decisions = state.decisions.as_ref().ok_or_else(|| {
        ApiError::not_found(
            "this settlement does not know the governor's contract: set `governance.contracts_path`",
        )
    })?;
    let text = decisions.read().await?;
    Ok(HttpResponse::Ok().content_type("application/json").body(text.to_string()))
}
