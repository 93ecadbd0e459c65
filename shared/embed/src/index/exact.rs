//! Exact search: every vector in a table is compared. Right for up to some 100,000 answers (a scan
//! reads 1.5 KB a row); beyond that use Qdrant.

use std::time::Duration;

use async_trait::async_trait;
use infera_runtime::db;
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ColumnTrait, DatabaseConnection, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set,
};
use sea_orm_migration::prelude::{
    ColumnDef, DeriveIden, MigrationName, MigrationTrait, MigratorTrait, SchemaManager, Table,
};

use super::{Hit, Index, MAX_LIMIT, Point, check};
use crate::embedder::cosine;
use crate::error::IndexError;

/// Rows read at a time.
const PAGE: u64 = 1_024;
const MIGRATE_ATTEMPTS: u32 = 8;
const MIGRATE_PAUSE: Duration = Duration::from_millis(50);

mod vectors {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "vectors")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub request_id: Uuid,
        pub model: String,
        pub decided_at_ms: i64,
        /// f32, little endian.
        pub vector: Vec<u8>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

/// The index in a database; clones share the connection.
#[derive(Debug, Clone)]
pub struct Exact {
    db: DatabaseConnection,
}

impl Exact {
    /// Over a connection whose migrator has run [`Migrator`].
    pub fn new(db: DatabaseConnection) -> Self {
        Self { db }
    }

    /// Connects (see `infera_runtime::db::connect`) and creates the table. Several processes may
    /// have the same database open.
    ///
    /// # Errors
    /// [`IndexError::Open`].
    pub async fn open(url: &str, schema: Option<&str>) -> Result<Self, IndexError> {
        let connection = db::connect(url, schema).await?;
        for attempt in 1.. {
            match db::migrate::<Migrator>(&connection).await {
                Ok(()) => break,
                // Verifier and explorer start together, and one of them is second to create the table.
                Err(error) if attempt < MIGRATE_ATTEMPTS => {
                    tracing::debug!(%error, "the index's table is being created by another process");
                    tokio::time::sleep(MIGRATE_PAUSE * attempt).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self::new(connection))
    }
}

#[async_trait]
impl Index for Exact {
    async fn upsert(&self, point: &Point) -> Result<(), IndexError> {
        check(&point.vector)?;
        let row = vectors::ActiveModel {
            request_id: Set(point.request_id),
            model: Set(point.model.clone()),
            decided_at_ms: Set(point.decided_at_ms),
            vector: Set(point.vector.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        let replace = OnConflict::column(vectors::Column::RequestId)
            .update_columns([vectors::Column::Model, vectors::Column::DecidedAtMs, vectors::Column::Vector])
            .to_owned();
        vectors::Entity::insert(row).on_conflict(replace).exec_without_returning(&self.db).await?;
        Ok(())
    }

    async fn search(&self, vector: &[f32], limit: usize, min_score: f32) -> Result<Vec<Hit>, IndexError> {
        check(vector)?;
        let limit = limit.min(MAX_LIMIT);
        let mut best: Vec<Hit> = Vec::new();
        let mut after = None;
        loop {
            let mut page = vectors::Entity::find().order_by_asc(vectors::Column::RequestId).limit(PAGE);
            if let Some(after) = after {
                page = page.filter(vectors::Column::RequestId.gt(after));
            }
            let rows = page.all(&self.db).await?;
            let last = rows.last().map(|row| row.request_id);
            let read = rows.len() as u64;
            best.extend(rows.into_iter().filter_map(|row| hit(row, vector)).filter(|h| h.score >= min_score));
            best.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.request_id.cmp(&b.request_id)));
            best.truncate(limit);
            if read < PAGE {
                return Ok(best);
            }
            after = last;
        }
    }

    async fn ping(&self) -> Result<(), IndexError> {
        Ok(self.db.ping().await?)
    }
}

fn hit(row: vectors::Model, vector: &[f32]) -> Option<Hit> {
    let stored: Vec<f32> =
        row.vector.chunks_exact(4).filter_map(|b| b.try_into().ok()).map(f32::from_le_bytes).collect();
    if stored.len() != vector.len() {
        tracing::warn!(request_id = %row.request_id, "a stored vector has the wrong size, skipped");
        return None;
    }
    let score = cosine(&stored, vector);
    Some(Hit { request_id: row.request_id, model: row.model, decided_at_ms: row.decided_at_ms, score })
}

/// Creates the table `vectors`.
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(Create)]
    }
}

struct Create;

impl MigrationName for Create {
    fn name(&self) -> &str {
        "embed_0001_vectors"
    }
}

#[derive(DeriveIden)]
enum Vectors {
    Table,
    RequestId,
    Model,
    DecidedAtMs,
    Vector,
}

#[async_trait]
impl MigrationTrait for Create {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let table = Table::create()
            .table(Vectors::Table)
            .if_not_exists()
            .col(ColumnDef::new(Vectors::RequestId).uuid().not_null().primary_key())
            .col(ColumnDef::new(Vectors::Model).string().not_null())
            .col(ColumnDef::new(Vectors::DecidedAtMs).big_integer().not_null())
            .col(ColumnDef::new(Vectors::Vector).binary().not_null())
            .to_owned();
        manager.create_table(table).await
    }
}
