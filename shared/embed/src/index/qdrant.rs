//! The index in a Qdrant server, over gRPC.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use qdrant_client::Qdrant as Client;
use qdrant_client::qdrant::{
    CreateCollectionBuilder, Distance, PointStruct, ScoredPoint, SearchPointsBuilder, UpsertPointsBuilder,
    Value, VectorParamsBuilder, value::Kind,
};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::payload::{DECIDED_AT_MS, MODEL, REQUEST_ID};
use super::{Hit, Index, MAX_LIMIT, Point, check};
use crate::embedder::DIMENSIONS;
use crate::error::IndexError;

const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A collection of a Qdrant server. It is created with the first use, so that a server that is
/// away at start does not stop the service.
pub struct Qdrant {
    client: Client,
    collection: String,
    created: OnceCell<()>,
}

impl Qdrant {
    /// For the gRPC address `url`, as `http://127.0.0.1:6334`. Connects with the first use.
    ///
    /// # Errors
    /// [`IndexError::Qdrant`] when the URL is malformed.
    pub fn connect(url: &str, api_key: Option<&str>, collection: &str) -> Result<Self, IndexError> {
        let mut builder = Client::from_url(url)
            .timeout(TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            .skip_compatibility_check();
        if let Some(key) = api_key {
            builder.set_api_key(key);
        }
        Ok(Self { client: builder.build()?, collection: collection.to_owned(), created: OnceCell::new() })
    }

    async fn ready(&self) -> Result<(), IndexError> {
        self.created.get_or_try_init(|| self.create()).await.copied()
    }

    async fn create(&self) -> Result<(), IndexError> {
        if self.client.collection_exists(&self.collection).await? {
            return Ok(());
        }
        let vectors = VectorParamsBuilder::new(DIMENSIONS as u64, Distance::Cosine);
        let request = CreateCollectionBuilder::new(&self.collection).vectors_config(vectors);
        match self.client.create_collection(request).await {
            Ok(_) => Ok(()),
            // Another process was faster.
            Err(_) if self.client.collection_exists(&self.collection).await? => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn hit(&self, point: ScoredPoint) -> Result<Hit, IndexError> {
        let foreign = |reason: &str| IndexError::Foreign {
            collection: self.collection.clone(),
            reason: reason.to_owned(),
        };
        let text = |name: &str| match point.payload.get(name).and_then(|value| value.kind.as_ref()) {
            Some(Kind::StringValue(text)) => Ok(text.clone()),
            _ => Err(foreign(&format!("`{name}` is no text"))),
        };
        let decided_at_ms = match point.payload.get(DECIDED_AT_MS).and_then(|value| value.kind.as_ref()) {
            Some(Kind::IntegerValue(ms)) => *ms,
            _ => return Err(foreign("`decided_at_ms` is no integer")),
        };
        let request_id =
            Uuid::parse_str(&text(REQUEST_ID)?).map_err(|_| foreign("`request_id` is no UUID"))?;
        Ok(Hit { request_id, model: text(MODEL)?, decided_at_ms, score: point.score })
    }
}

#[async_trait]
impl Index for Qdrant {
    async fn upsert(&self, point: &Point) -> Result<(), IndexError> {
        check(&point.vector)?;
        self.ready().await?;
        let payload: HashMap<String, Value> = HashMap::from([
            (REQUEST_ID.to_owned(), point.request_id.to_string().into()),
            (MODEL.to_owned(), point.model.clone().into()),
            (DECIDED_AT_MS.to_owned(), point.decided_at_ms.into()),
        ]);
        let point = PointStruct::new(point.request_id.to_string(), point.vector.clone(), payload);
        let request = UpsertPointsBuilder::new(&self.collection, vec![point]).wait(true);
        self.client.upsert_points(request).await?;
        Ok(())
    }

    async fn search(&self, vector: &[f32], limit: usize, min_score: f32) -> Result<Vec<Hit>, IndexError> {
        check(vector)?;
        self.ready().await?;
        let limit = limit.min(MAX_LIMIT) as u64;
        if limit == 0 {
            return Ok(Vec::new());
        }
        let request = SearchPointsBuilder::new(&self.collection, vector.to_vec(), limit)
            .score_threshold(min_score)
            .with_payload(true);
        let found = self.client.search_points(request).await?;
        found.result.into_iter().map(|point| self.hit(point)).collect()
    }

    async fn ping(&self) -> Result<(), IndexError> {
        self.client.health_check().await?;
        self.ready().await
    }
}
