//! The gateway's tables beside their queries: plain functions over a connection or a transaction.
//!
//! `requests` holds one row per request: what is needed to answer a repeat. It is `open` until the first
//! closing message; later ones change nothing. Token ids are stored as 4 bytes each, big-endian.

use infera_protocol::bytes::NodeId;
use infera_protocol::request::Finish;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{Condition, ConnectionTrait, QueryTrait, Set};

use crate::domain::outcome::{Answer, Generation, Outcome};

mod migrations;

pub use migrations::Migrator;

const OPEN: &str = "open";
const VERIFIED: &str = "verified";
const FAILED: &str = "failed";
const REJECTED: &str = "rejected";

/// One request of a client.
pub mod request {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "requests")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: Uuid,
        pub account: String,
        /// Unique per account.
        pub idempotency_key: Option<String>,
        /// keccak-256 of the checked request: what a repeat must be equal to.
        pub body_hash: Vec<u8>,
        pub model: String,
        pub prompt_tokens: i64,
        pub max_tokens: i64,
        /// Stop strings as a JSON list.
        pub stop: String,
        pub submitted_ms: i64,
        pub deadline_ms: i64,
        /// open, verified, failed, rejected.
        pub state: String,
        /// Why it failed or was rejected.
        pub code: Option<String>,
        pub message: Option<String>,
        /// The delivered answer.
        pub tokens: Option<Vec<u8>>,
        pub finish: Option<String>,
        /// The verified set, 32 bytes each, in the order of the draw.
        pub nodes: Option<Vec<u8>>,
        pub similarity_millionths: Option<i64>,
        /// Verified results unlike the delivered one, as JSON.
        pub others: Option<String>,
        pub closed_ms: Option<i64>,
        /// Log-probabilities were asked for.
        pub logprobs: bool,
        /// The delivered answer's, if so.
        pub fingerprints: Option<Vec<u8>>,
    }

    /// Without the answer: rows are in error messages and logs.
    impl std::fmt::Debug for Model {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Request")
                .field("id", &self.id)
                .field("state", &self.state)
                .finish_non_exhaustive()
        }
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A revoked API key.
pub mod revoked {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "revoked_keys")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub jti: String,
        pub revoked_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// What is known of a key that an account made for itself.
pub mod api_key {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "api_keys")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub jti: String,
        pub account: String,
        pub name: String,
        /// With spaces between.
        pub scopes: String,
        /// Made by a sign-in.
        pub session: bool,
        pub created_ms: i64,
        pub expires_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// An account that makes keys: the row that whoever adds one writes first.
pub mod key_owner {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "key_owners")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub account: String,
        pub touched_ms: i64,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// A request to be stored.
#[derive(Debug, Clone)]
pub struct NewRequest {
    pub id: Uuid,
    pub account: String,
    pub idempotency_key: Option<String>,
    pub body_hash: Vec<u8>,
    pub model: String,
    pub prompt_tokens: usize,
    pub max_tokens: u32,
    pub stop: Vec<String>,
    pub submitted_ms: i64,
    pub deadline_ms: i64,
    pub logprobs: bool,
}

/// Stores an open request. `false`: the account used the idempotency key before, nothing was written.
///
/// # Errors
/// The database's.
pub async fn insert<C: ConnectionTrait>(tx: &C, new: &NewRequest) -> Result<bool, DbErr> {
    let row = request::ActiveModel {
        id: Set(new.id),
        account: Set(new.account.clone()),
        idempotency_key: Set(new.idempotency_key.clone()),
        body_hash: Set(new.body_hash.clone()),
        model: Set(new.model.clone()),
        prompt_tokens: Set(new.prompt_tokens as i64),
        max_tokens: Set(new.max_tokens.into()),
        stop: Set(json(&new.stop)?),
        submitted_ms: Set(new.submitted_ms),
        deadline_ms: Set(new.deadline_ms),
        state: Set(OPEN.to_owned()),
        code: Set(None),
        message: Set(None),
        tokens: Set(None),
        finish: Set(None),
        nodes: Set(None),
        similarity_millionths: Set(None),
        others: Set(None),
        closed_ms: Set(None),
        logprobs: Set(new.logprobs),
        fingerprints: Set(None),
    };
    let unused = OnConflict::columns([request::Column::Account, request::Column::IdempotencyKey])
        .do_nothing()
        .to_owned();
    let insert = request::Entity::insert(row).on_conflict(unused);
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

/// The account's request with this idempotency key.
///
/// # Errors
/// The database's.
pub async fn by_key<C: ConnectionTrait>(
    db: &C,
    account: &str,
    key: &str,
) -> Result<Option<request::Model>, DbErr> {
    request::Entity::find()
        .filter(request::Column::Account.eq(account))
        .filter(request::Column::IdempotencyKey.eq(key))
        .one(db)
        .await
}

/// A request by its id.
///
/// # Errors
/// The database's.
pub async fn by_id<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<request::Model>, DbErr> {
    request::Entity::find_by_id(id).one(db).await
}

/// How the request ended; `None` while it is open or unknown.
///
/// # Errors
/// The database's.
pub async fn outcome<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<Outcome>, DbErr> {
    match by_id(db, id).await? {
        Some(row) => row.outcome(),
        None => Ok(None),
    }
}

/// Closes a request. `false`: it is closed already, or not (or no longer) here.
///
/// # Errors
/// The database's.
pub async fn close<C: ConnectionTrait>(
    tx: &C,
    id: Uuid,
    outcome: &Outcome,
    now_ms: i64,
) -> Result<bool, DbErr> {
    use request::Column::{
        ClosedMs, Code, Finish, Id, Message, Nodes, Others, SimilarityMillionths, State, Tokens,
    };
    let update = request::Entity::update_many()
        .filter(Condition::all().add(Id.eq(id)).add(State.eq(OPEN)))
        .col_expr(ClosedMs, Expr::value(now_ms));
    let update = match outcome {
        Outcome::Verified(answer) => update
            .col_expr(State, Expr::value(VERIFIED))
            .col_expr(Tokens, Expr::value(tokens_to_bytes(&answer.result.tokens)))
            .col_expr(Finish, Expr::value(finish_name(answer.result.finish)))
            .col_expr(Nodes, Expr::value(answer.nodes.iter().flat_map(|node| node.0).collect::<Vec<u8>>()))
            .col_expr(SimilarityMillionths, Expr::value(i64::from(answer.similarity_millionths)))
            .col_expr(Others, Expr::value(json(&without_fingerprints(&answer.others))?)),
        Outcome::Failed { code, reason } => update
            .col_expr(State, Expr::value(FAILED))
            .col_expr(Code, Expr::value(code.as_str()))
            .col_expr(Message, Expr::value(reason.as_str())),
        Outcome::Rejected { code, message } => update
            .col_expr(State, Expr::value(REJECTED))
            .col_expr(Code, Expr::value(code.as_str()))
            .col_expr(Message, Expr::value(message.as_str())),
    };
    let closed = update.exec(tx).await?.rows_affected == 1;
    if let Outcome::Verified(answer) = outcome
        && closed
    {
        keep_fingerprints(tx, id, answer).await?;
    }
    Ok(closed)
}

/// 49 bytes a token: only where log-probabilities were asked for.
async fn keep_fingerprints<C: ConnectionTrait>(tx: &C, id: Uuid, answer: &Answer) -> Result<(), DbErr> {
    use request::Column::{Fingerprints, Id, Logprobs, Others};
    request::Entity::update_many()
        .filter(Condition::all().add(Id.eq(id)).add(Logprobs.eq(true)))
        .col_expr(Fingerprints, Expr::value(answer.result.fingerprints.clone()))
        .col_expr(Others, Expr::value(json(&answer.others)?))
        .exec(tx)
        .await?;
    Ok(())
}

fn without_fingerprints(others: &[Generation]) -> Vec<Generation> {
    let bare = |g: &Generation| Generation { fingerprints: Vec::new(), tokens: g.tokens.clone(), ..*g };
    others.iter().map(bare).collect()
}

/// Forgets requests whose deadline was before `before_ms`; returns how many.
///
/// # Errors
/// The database's.
pub async fn prune<C: ConnectionTrait>(db: &C, before_ms: i64) -> Result<u64, DbErr> {
    let old = request::Entity::delete_many().filter(request::Column::DeadlineMs.lt(before_ms));
    Ok(old.exec(db).await?.rows_affected)
}

impl request::Model {
    /// True until the first closing message.
    pub fn is_open(&self) -> bool {
        self.state == OPEN
    }

    /// How it ended; `None` while it is open.
    ///
    /// # Errors
    /// `DbErr::Type` when the row was not written by this code.
    pub fn outcome(&self) -> Result<Option<Outcome>, DbErr> {
        let code = || self.code.clone().unwrap_or_default();
        let message = || self.message.clone().unwrap_or_default();
        match self.state.as_str() {
            OPEN => Ok(None),
            VERIFIED => self.answer().map(Outcome::Verified).map(Some),
            FAILED => Ok(Some(Outcome::Failed { code: code(), reason: message() })),
            REJECTED => Ok(Some(Outcome::Rejected { code: code(), message: message() })),
            other => Err(DbErr::Type(format!("requests.state of {} is `{other}`", self.id))),
        }
    }

    /// The stop strings.
    ///
    /// # Errors
    /// `DbErr::Type` when the row was not written by this code.
    pub fn stops(&self) -> Result<Vec<String>, DbErr> {
        serde_json::from_str(&self.stop).map_err(|error| self.damaged("stop", &error.to_string()))
    }

    fn answer(&self) -> Result<Answer, DbErr> {
        let nodes: Vec<NodeId> = self
            .nodes
            .as_deref()
            .unwrap_or_default()
            .chunks(NodeId::LEN)
            .map(|bytes| NodeId::try_from(bytes).map_err(|error| self.damaged("nodes", &error.to_string())))
            .collect::<Result<_, _>>()?;
        let first = *nodes.first().ok_or_else(|| self.damaged("nodes", "empty"))?;
        let finish =
            self.finish.as_deref().and_then(finish_of).ok_or_else(|| self.damaged("finish", "unknown"))?;
        let tokens = tokens_of(self.tokens.as_deref().unwrap_or_default())
            .ok_or_else(|| self.damaged("tokens", "not 4 bytes each"))?;
        let others: Vec<Generation> = serde_json::from_str(self.others.as_deref().unwrap_or("[]"))
            .map_err(|error| self.damaged("others", &error.to_string()))?;
        Ok(Answer {
            result: Generation {
                node: first,
                tokens,
                finish,
                fingerprints: self.fingerprints.clone().unwrap_or_default(),
            },
            nodes,
            similarity_millionths: u32::try_from(self.similarity_millionths.unwrap_or(0)).unwrap_or(0),
            prompt_tokens: u32::try_from(self.prompt_tokens).unwrap_or(0),
            others,
        })
    }

    fn damaged(&self, column: &str, reason: &str) -> DbErr {
        DbErr::Type(format!("requests.{column} of {}: {reason}", self.id))
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<String, DbErr> {
    serde_json::to_string(value).map_err(|error| DbErr::Custom(error.to_string()))
}

fn tokens_to_bytes(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_be_bytes()).collect()
}

fn tokens_of(bytes: &[u8]) -> Option<Vec<u32>> {
    bytes.chunks(4).map(|chunk| chunk.try_into().ok().map(u32::from_be_bytes)).collect()
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos => "eos",
        Finish::Length => "length",
        Finish::Stop => "stop",
        Finish::Grammar => "grammar",
    }
}

fn finish_of(name: &str) -> Option<Finish> {
    [Finish::Eos, Finish::Length, Finish::Stop, Finish::Grammar]
        .into_iter()
        .find(|finish| finish_name(*finish) == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_table() {
        let tokens = vec![0, 1, 255, 256, u32::MAX];
        assert_eq!(tokens_of(&tokens_to_bytes(&tokens)), Some(tokens));
        assert_eq!(tokens_of(&[1, 2, 3]), None);
        assert_eq!(tokens_of(&[]), Some(vec![]));
    }

    #[test]
    fn finishes_survive_the_table() {
        for finish in [Finish::Eos, Finish::Length, Finish::Stop, Finish::Grammar] {
            assert_eq!(finish_of(finish_name(finish)), Some(finish));
        }
        assert_eq!(finish_of(""), None);
    }
}
