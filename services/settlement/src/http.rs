//! Routes of this service.
//!
//! | route | who | answer |
//! |---|---|---|
//! | `GET /v1/receipts/{id}` | everybody; with an API key of the account, with the scope `receipts`, also the evidence | the receipt document in its canonical encoding |
//! | `GET /v1/balance`, `/v1/usage`, `/v1/statement`, `POST /v1/vouchers` | an API key | see [`crate::accounts`] |
//! | `GET /v1/ledger/audit` | everybody | the sums that prove the ledger's invariants, at most 2 s old; 429 while they are computed |
//! | `GET /v1/batches/...` | everybody | see [`crate::batches_http`] |
//! | `GET /v1/governance` | everybody | see [`crate::governance_http`] |
//! | `GET /v1/operators/...` | everybody | see [`crate::operators`] |
//! | `/livez`, `/readyz`, `/metrics` | | see [`infera_runtime::health`] |

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::AUTHORIZATION,
    web::{self, ServiceConfig},
};
use infera_protocol::{
    bytes::Hash32,
    document::{Anchor, Document, Status},
    evidence::Evidence,
    identity::Domain,
    merkle::MerkleTree,
    receipt::Receipt,
};
use infera_runtime::{
    health,
    http::{ApiError, defaults},
    jwt::{Claims, SCOPE_RECEIPTS, Verifier},
};
use sea_orm::{DatabaseConnection, DbErr};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{
    accounts,
    batcher::is_anchored,
    config::AUDIENCE,
    governance_http::{self, Decisions},
    ledger::{self, Audit},
    operators,
    store::{batches, corrupt, hash, requests, unsigned},
};

/// How long an audit is answered again.
const AUDIT_LIFE: Duration = Duration::from_secs(2);
/// Trees kept in memory: at most 65,536 leaves each, some MB.
const MAX_TREES: usize = 8;
/// A voucher is the only body that is read here.
const MAX_BODY: usize = 1024;

/// What the routes need.
#[derive(Clone)]
pub struct State {
    pub db: DatabaseConnection,
    pub keys: Verifier,
    /// What vouchers are signed for.
    pub domain: Domain,
    /// One audit at a time, kept for [`AUDIT_LIFE`]: it reads every row.
    pub audit: Arc<Mutex<Option<(Instant, Audit)>>>,
    /// Trees of the batches that were asked for last, newest first.
    pub trees: Trees,
    /// `None` where the contracts are not known.
    pub decisions: Option<Decisions>,
}

/// The Merkle trees of the last few batches, by sequence; whoever has one proves any of its receipts.
#[derive(Clone, Default)]
pub struct Trees(Arc<std::sync::Mutex<VecDeque<CachedTree>>>);

/// A batch's sequence and its tree.
type CachedTree = (u64, Arc<MerkleTree>);

impl Trees {
    /// The tree of a batch with this root. A batch that was posted again may have another one.
    fn get(&self, sequence: u64, root: &Hash32) -> Option<Arc<MerkleTree>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(of, tree)| *of == sequence && tree.root() == *root)?;
        let found = kept.remove(at)?;
        let tree = found.1.clone();
        kept.push_front(found);
        Some(tree)
    }

    fn put(&self, sequence: u64, tree: Arc<MerkleTree>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(of, _)| *of != sequence);
        kept.push_front((sequence, tree));
        kept.truncate(MAX_TREES);
    }
}

/// Adds all routes.
pub fn routes(state: State, health: health::Health) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .configure(defaults(MAX_BODY))
            .configure(health::routes(health))
            .configure(crate::batches_http::routes)
            .app_data(web::Data::new(state))
            .route("/v1/receipts/{id}", web::get().to(receipt))
            .route("/v1/balance", web::get().to(accounts::balance))
            .route("/v1/vouchers", web::post().to(accounts::voucher))
            .route("/v1/usage", web::get().to(accounts::usage::usage))
            .route("/v1/statement", web::get().to(accounts::statement::statement))
            .route("/v1/governance", web::get().to(governance_http::governance))
            .route("/v1/ledger/audit", web::get().to(audit))
            .route("/v1/operators/{address}", web::get().to(operators::earned))
            .route("/v1/operators/{address}/rewards/{sequence}", web::get().to(operators::reward));
    }
}

async fn receipt(
    state: web::Data<State>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let id: Uuid = id.parse().map_err(|_| {
        ApiError::bad_request("id", "`id` must be a request's id, such as the receipt's in an answer")
    })?;
    let claims = claims(&state, &request)?;
    if claims.as_ref().is_some_and(|claims| !claims.allows(SCOPE_RECEIPTS)) {
        let message = format!(
            "the api key lacks the scope `{SCOPE_RECEIPTS}`; create one that has it, or ask without a key for the \
             receipt alone"
        );
        return Err(ApiError::forbidden(message).with_code("insufficient_scope"));
    }
    let Some(row) = requests::receipt(&state.db, id).await.map_err(ApiError::internal)? else {
        let known = requests::find(&state.db, id).await.map_err(ApiError::internal)?.is_some();
        return Err(no_receipt(known));
    };
    let owner = claims.is_some_and(|claims| claims.sub == row.account);
    let document = document(&state, row, owner).await.map_err(ApiError::internal)?;
    let bytes = document.canonical().map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().content_type("application/json").body(bytes))
}

fn no_receipt(known: bool) -> ApiError {
    if known {
        ApiError::not_found(
            "this request has no receipt: it is not decided yet, or it failed and was refunded",
        )
        .with_code("no_receipt")
    } else {
        ApiError::not_found("there is no receipt with this id").with_code("receipt_not_found")
    }
}

async fn document(state: &State, row: requests::ReceiptRow, with_evidence: bool) -> Result<Document, DbErr> {
    let receipt: Receipt =
        serde_json::from_slice(&row.receipt).map_err(|e| corrupt("receipts.receipt", &e.to_string()))?;
    let evidence: Option<Evidence> = if with_evidence {
        Some(
            serde_json::from_slice(&row.evidence)
                .map_err(|e| corrupt("receipts.evidence", &e.to_string()))?,
        )
    } else {
        None
    };
    let anchor = anchor(state, row.request_id).await?;
    let status = if anchor.is_some() { Status::Anchored } else { Status::Pending };
    Ok(Document { receipt, status, anchor, evidence })
}

async fn anchor(state: &State, id: Uuid) -> Result<Option<Anchor>, DbErr> {
    let db = &state.db;
    let Some((sequence, index)) =
        batches::entry(db, id).await?.and_then(|entry| entry.batch_sequence.zip(entry.batch_index))
    else {
        return Ok(None);
    };
    let sequence_number = unsigned("journal.batch_sequence", sequence)?;
    let Some(batch) = batches::find(db, sequence_number).await?.filter(is_anchored) else { return Ok(None) };
    let receipts_root = hash("batches.receipts_root", &batch.receipts_root)?;
    let index = usize::try_from(index).map_err(|_| corrupt("journal.batch_index", "it is negative"))?;
    let tree = match state.trees.get(sequence_number, &receipts_root) {
        Some(tree) => tree,
        None => {
            let tree = Arc::new(tree(db, sequence, &receipts_root).await?);
            state.trees.put(sequence_number, tree.clone());
            tree
        }
    };
    let proof =
        tree.proof(index).ok_or_else(|| corrupt("journal.batch_index", "the batch has no such leaf"))?;
    Ok(Some(Anchor { sequence: sequence_number, receipts_root, proof }))
}

/// The tree of a batch, which must have this root.
async fn tree(db: &DatabaseConnection, sequence: i64, root: &Hash32) -> Result<MerkleTree, DbErr> {
    let leaves: Vec<_> = batches::leaves(db, sequence).await?.into_iter().map(|(_, leaf)| leaf).collect();
    // A large batch is some ten thousand hashes: not on the thread that serves others.
    web::block(move || MerkleTree::new(&leaves))
        .await
        .map_err(|error| DbErr::Custom(error.to_string()))?
        .filter(|tree| tree.root() == *root)
        .ok_or_else(|| corrupt("batches.receipts_root", "the batch's leaves lead to another root"))
}

async fn audit(state: web::Data<State>) -> Result<HttpResponse, ApiError> {
    let Ok(mut kept) = state.audit.try_lock() else {
        return Err(ApiError::rate_limited("an audit runs; ask again in a moment"));
    };
    if let Some((at, audit)) = kept.as_ref().filter(|(at, _)| at.elapsed() < AUDIT_LIFE) {
        tracing::trace!(age_ms = at.elapsed().as_millis(), "audit said again");
        return Ok(HttpResponse::Ok().json(audit));
    }
    let audit = ledger::audit(&state.db).await.map_err(ApiError::internal)?;
    let response = HttpResponse::Ok().json(&audit);
    *kept = Some((Instant::now(), audit));
    Ok(response)
}

/// Who asks; `None` without a key. A key that is there must be good.
pub(crate) fn claims(state: &State, request: &HttpRequest) -> Result<Option<Claims>, ApiError> {
    let Some(header) = request.headers().get(AUTHORIZATION) else { return Ok(None) };
    let token = header
        .to_str()
        .ok()
        .and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")))
        .ok_or_else(|| {
            ApiError::unauthorized("invalid_api_key", "write the header as Authorization: Bearer KEY")
        })?;
    Ok(Some(state.keys.verify(token.trim(), AUDIENCE)?))
}

#[cfg(test)]
mod tests {
    use actix_web::body::to_bytes;
    use infera_runtime::{db, jwt::Signer};
    use infera_testkit::{TempDir, sqlite_url};
    use sea_orm::TransactionTrait;

    use super::*;
    use crate::store::Migrator;

    fn tree(seed: u8) -> Arc<MerkleTree> {
        let leaves: Vec<Hash32> = (0..3).map(|n| Hash32([seed ^ n; 32])).collect();
        Arc::new(MerkleTree::new(&leaves).unwrap())
    }

    #[test]
    fn trees_that_are_asked_for_stay() {
        let trees = Trees::default();
        let made: Vec<_> = (0..=MAX_TREES).map(|n| tree(u8::try_from(n).unwrap() * 8)).collect();
        let get = |n: usize| trees.get(n as u64, &made[n].root()).is_some();
        for (n, tree) in made.iter().enumerate().take(MAX_TREES) {
            trees.put(n as u64, tree.clone());
        }
        assert!(get(0), "asked for last");
        trees.put(MAX_TREES as u64, made[MAX_TREES].clone());
        assert!(get(0) && !get(1) && (2..=MAX_TREES).all(get), "the one that nobody asked for leaves");
        // A batch that was posted again with another root.
        assert!(trees.get(2, &made[3].root()).is_none());
        trees.put(2, made[3].clone());
        assert!(trees.get(2, &made[3].root()).is_some() && !get(2));
    }

    async fn state(dir: &TempDir) -> web::Data<State> {
        let db = db::connect(&sqlite_url(dir), None).await.unwrap();
        db::migrate::<Migrator>(&db).await.unwrap();
        let jwks = dir.path().join("jwks.json");
        Signer::load_or_create(&dir.path().join("key.pem")).unwrap().write_jwks(&jwks).unwrap();
        let keys = Verifier::from_jwks_file(&jwks).unwrap();
        let domain = Domain { chain_id: 31_337, contract: infera_protocol::bytes::Address([1; 20]) };
        web::Data::new(State {
            db,
            keys,
            domain,
            audit: Arc::default(),
            trees: Trees::default(),
            decisions: None,
        })
    }

    async fn transfers(state: &web::Data<State>) -> i64 {
        let response = audit(state.clone()).await.unwrap();
        let body = to_bytes(response.into_body()).await.unwrap();
        serde_json::from_slice::<serde_json::Value>(&body).unwrap()["transfers"].as_i64().unwrap()
    }

    #[actix_rt::test]
    async fn an_audit_is_made_once_at_a_time_and_kept_for_a_moment() {
        let dir = TempDir::new().unwrap();
        let state = state(&dir).await;
        assert_eq!(transfers(&state).await, 0);
        let tx = state.db.begin().await.unwrap();
        ledger::credit(&tx, Uuid::now_v7(), "alice", 5, 0).await.unwrap();
        tx.commit().await.unwrap();
        set_time(&state, Instant::now() + Duration::from_secs(3_600)).await;
        assert_eq!(transfers(&state).await, 0, "said again");
        set_time(&state, Instant::now().checked_sub(AUDIT_LIFE).unwrap()).await;
        assert_eq!(transfers(&state).await, 1, "made anew");

        let running = state.audit.clone().lock_owned().await;
        let refused = audit(state.clone()).await.unwrap_err();
        assert_eq!(refused.status.as_u16(), 429);
        drop(running);
        assert_eq!(transfers(&state).await, 1);
    }

    /// When the kept audit was made.
    async fn set_time(state: &web::Data<State>, at: Instant) {
        let mut kept = state.audit.lock().await;
        kept.as_mut().unwrap().0 = at;
    }
}
