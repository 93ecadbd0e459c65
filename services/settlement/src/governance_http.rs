//! What holders decide, for everybody who has no wallet and no RPC endpoint at hand: `GET /v1/governance`. The explorer
//! shows it; `infera govern` asks the chain itself.
//!
//! A task of its own reads the chain, whoever asked and whether they still wait. While it reads, the answer of before is
//! given for a while.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use actix_web::{HttpResponse, web};
use infera_runtime::http::ApiError;
use serde::Serialize;
use tokio::sync::{Mutex as Turn, Notify};

use crate::{
    chain::{
        Contracts,
        governance::{Governance, GovernanceError, Proposal, ProposalLog, RegistryState},
    },
    http::State,
};

/// How long what was read is answered without reading again.
pub const LIFE: Duration = Duration::from_secs(5);
/// How long it is answered while it is read again, or while the chain is away.
const STALE: Duration = Duration::from_secs(60);
/// How long one who asks waits for a reading; it goes on after that.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of one reading. What it found of the log is kept, so that the next one goes on there.
const READING: Duration = Duration::from_secs(120);
/// Proposals of an answer, the newest.
const MOST: usize = 200;

/// Where decisions are read, and what was read last; clones share it.
#[derive(Clone)]
pub struct Decisions(Arc<Inner>);

struct Inner {
    rpc_url: String,
    contracts: Contracts,
    life: Duration,
    /// One reading at a time.
    log: Turn<ProposalLog>,
    kept: Mutex<Kept>,
    /// A reading ended.
    ended: Notify,
}

#[derive(Default)]
struct Kept {
    answer: Option<(Instant, Arc<str>)>,
    reading: bool,
}

impl Kept {
    fn younger_than(&self, life: Duration) -> Option<Arc<str>> {
        self.answer.as_ref().filter(|(at, _)| at.elapsed() < life).map(|(_, text)| text.clone())
    }
}

/// The answer's body.
#[derive(Serialize)]
struct Body {
    registry: RegistryState,
    /// Newest first.
    proposals: Vec<Proposal>,
}

impl Decisions {
    /// `log`: of this governor, nothing read yet. `life`: see [`LIFE`].
    pub fn new(rpc_url: String, contracts: Contracts, log: ProposalLog, life: Duration) -> Self {
        Self(Arc::new(Inner {
            rpc_url,
            contracts,
            life,
            log: Turn::new(log),
            kept: Mutex::default(),
            ended: Notify::new(),
        }))
    }

    /// As JSON, as of a few seconds ago; of a minute ago at most, while it is read again.
    ///
    /// # Errors
    /// Nothing is known that is new enough: the chain does not answer, or not yet.
    pub async fn read(&self) -> Result<Arc<str>, ApiError> {
        let ended = self.0.ended.notified();
        tokio::pin!(ended);
        // From here on no end is missed.
        ended.as_mut().enable();
        {
            let mut kept = self.kept();
            if let Some(text) = kept.younger_than(self.0.life) {
                return Ok(text);
            }
            if !kept.reading {
                kept.reading = true;
                tokio::spawn(self.clone().renew());
            }
            if let Some(text) = kept.younger_than(STALE) {
                return Ok(text);
            }
        }
        let waited = tokio::time::timeout(PATIENCE, ended).await;
        let text = waited.ok().and_then(|()| self.kept().younger_than(STALE));
        text.ok_or_else(|| {
            ApiError::unavailable("the chain does not answer; try again in a moment").retry_after(5)
        })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Nothing in it can be left half done.
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn renew(self) {
        let read = tokio::time::timeout(READING, self.ask()).await;
        let text = match read {
            Ok(Ok(body)) => serde_json::to_string(&body).map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("nothing after {} s", READING.as_secs())),
        };
        {
            let mut kept = self.kept();
            kept.reading = false;
            match text {
                Ok(text) => kept.answer = Some((Instant::now(), text.into())),
                Err(error) => tracing::warn!(%error, "the governor's contract is not read"),
            }
        }
        self.0.ended.notify_waiters();
    }

    async fn ask(&self) -> Result<Body, GovernanceError> {
        let mut log = self.0.log.lock().await;
        let governance = Governance::connect(&self.0.rpc_url, self.0.contracts).await?;
        let registry = governance.registry_state(None).await?;
        let proposals = governance.newest(&mut log, MOST).await?;
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
