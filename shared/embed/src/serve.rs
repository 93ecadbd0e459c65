//! An index served over Qdrant's own gRPC: what the [`Qdrant`](crate::Qdrant) adapter is tested
//! against, and the vector server of a cluster that has no Qdrant.
//!
//! It knows one kind of point, the network's: cosine, [`DIMENSIONS`] numbers, the payload of
//! [`Point`]. Everything else of Qdrant's API answers `UNIMPLEMENTED`.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use infera_runtime::CancellationToken;
use parking_lot::Mutex;
use qdrant_client::qdrant as q;
use qdrant_client::qdrant::collections_server::{Collections, CollectionsServer};
use qdrant_client::qdrant::points_server::{Points, PointsServer};
use qdrant_client::qdrant::qdrant_server::{Qdrant, QdrantServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use uuid::Uuid;

use crate::embedder::DIMENSIONS;
use crate::error::IndexError;
use crate::index::payload::{DECIDED_AT_MS, MODEL, REQUEST_ID};
use crate::index::{Hit, Index, Point};

/// One index behind one collection.
struct Service {
    index: Arc<dyn Index>,
    collections: Arc<Mutex<HashSet<String>>>,
}

/// A server that is running.
#[derive(Debug, Clone, Copy)]
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Running {
    /// What goes into `qdrant_url`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// Serves `index` on `bind` (port 0 takes a free one) on the current tokio runtime until `shutdown`.
/// The first collection that a client creates is the index; a second one is refused.
///
/// # Errors
/// The address is taken or not ours.
pub async fn start(
    index: Arc<dyn Index>,
    bind: &str,
    shutdown: CancellationToken,
) -> Result<Running, std::io::Error> {
    let listener = TcpListener::bind(bind).await?;
    let address = listener.local_addr()?;
    let collections = Arc::<Mutex<HashSet<String>>>::default();
    let service = || Service { index: index.clone(), collections: collections.clone() };
    let server = Server::builder()
        .add_service(QdrantServer::new(service()))
        .add_service(CollectionsServer::new(service()))
        .add_service(PointsServer::new(service()))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
            shutdown.cancelled().await;
        });
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "the vector server stopped");
        }
    });
    Ok(Running { address })
}

/// Implements a service: the methods in braces, and `UNIMPLEMENTED` for those listed after `rest`.
macro_rules! service {
    (
        impl $service:ident { $($done:tt)* }
        rest { $($name:ident($in:ident) -> $out:ident;)* }
    ) => {
        #[tonic::async_trait]
        impl $service for Service {
            $($done)*
            $(
                async fn $name(&self, _: Request<q::$in>) -> Result<Response<q::$out>, Status> {
                    Err(Status::unimplemented(concat!("this server does not do ", stringify!($name))))
                }
            )*
        }
    };
}

service! {
    impl Qdrant {
        async fn health_check(
            &self,
            _: Request<q::HealthCheckRequest>,
        ) -> Result<Response<q::HealthCheckReply>, Status> {
            self.index.ping().await.map_err(unavailable)?;
            let version = env!("CARGO_PKG_VERSION").to_owned();
            Ok(Response::new(q::HealthCheckReply { title: "infera vectors".to_owned(), version, commit: None }))
        }
    }
    rest {}
}

service! {
    impl Collections {
        async fn create(
            &self,
            request: Request<q::CreateCollection>,
        ) -> Result<Response<q::CollectionOperationResponse>, Status> {
            let request = request.into_inner();
            check_config(&request)?;
            let mut collections = self.collections.lock();
            if collections.contains(&request.collection_name) {
                return Err(Status::already_exists("the collection exists"));
            }
            if !collections.is_empty() {
                return Err(Status::failed_precondition("this server holds one collection"));
            }
            collections.insert(request.collection_name);
            Ok(Response::new(q::CollectionOperationResponse { result: true, time: 0.0 }))
        }

        async fn collection_exists(
            &self,
            request: Request<q::CollectionExistsRequest>,
        ) -> Result<Response<q::CollectionExistsResponse>, Status> {
            let exists = self.collections.lock().contains(&request.into_inner().collection_name);
            let result = Some(q::CollectionExists { exists });
            Ok(Response::new(q::CollectionExistsResponse { result, time: 0.0 }))
        }
    }
    rest {
        get(GetCollectionInfoRequest) -> GetCollectionInfoResponse;
        list(ListCollectionsRequest) -> ListCollectionsResponse;
        update(UpdateCollection) -> CollectionOperationResponse;
        delete(DeleteCollection) -> CollectionOperationResponse;
        update_aliases(ChangeAliases) -> CollectionOperationResponse;
        list_collection_aliases(ListCollectionAliasesRequest) -> ListAliasesResponse;
        list_aliases(ListAliasesRequest) -> ListAliasesResponse;
        collection_cluster_info(CollectionClusterInfoRequest) -> CollectionClusterInfoResponse;
        update_collection_cluster_setup(UpdateCollectionClusterSetupRequest) -> UpdateCollectionClusterSetupResponse;
        create_shard_key(CreateShardKeyRequest) -> CreateShardKeyResponse;
        delete_shard_key(DeleteShardKeyRequest) -> DeleteShardKeyResponse;
        list_shard_keys(ListShardKeysRequest) -> ListShardKeysResponse;
    }
}

service! {
    impl Points {
        async fn upsert(
            &self,
            request: Request<q::UpsertPoints>,
        ) -> Result<Response<q::PointsOperationResponse>, Status> {
            let request = request.into_inner();
            self.known(&request.collection_name)?;
            for point in request.points {
                self.index.upsert(&point_of(point)?).await.map_err(status)?;
            }
            let status = q::UpdateStatus::Completed.into();
            Ok(Response::new(q::PointsOperationResponse {
                result: Some(q::UpdateResult { operation_id: None, status }),
                ..q::PointsOperationResponse::default()
            }))
        }

        async fn search(
            &self,
            request: Request<q::SearchPoints>,
        ) -> Result<Response<q::SearchResponse>, Status> {
            let request = request.into_inner();
            self.known(&request.collection_name)?;
            if request.filter.is_some() || request.offset.is_some_and(|offset| offset > 0) {
                return Err(Status::unimplemented("this server does not filter and does not skip"));
            }
            let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
            let min_score = request.score_threshold.unwrap_or(-1.0);
            let hits = self.index.search(&request.vector, limit, min_score).await.map_err(status)?;
            let result = hits.into_iter().map(scored).collect();
            Ok(Response::new(q::SearchResponse { result, ..q::SearchResponse::default() }))
        }
    }
    rest {
        delete(DeletePoints) -> PointsOperationResponse;
        get(GetPoints) -> GetResponse;
        update_vectors(UpdatePointVectors) -> PointsOperationResponse;
        delete_vectors(DeletePointVectors) -> PointsOperationResponse;
        set_payload(SetPayloadPoints) -> PointsOperationResponse;
        overwrite_payload(SetPayloadPoints) -> PointsOperationResponse;
        delete_payload(DeletePayloadPoints) -> PointsOperationResponse;
        clear_payload(ClearPayloadPoints) -> PointsOperationResponse;
        create_field_index(CreateFieldIndexCollection) -> PointsOperationResponse;
        delete_field_index(DeleteFieldIndexCollection) -> PointsOperationResponse;
        create_vector_name(CreateVectorNameRequest) -> PointsOperationResponse;
        delete_vector_name(DeleteVectorNameRequest) -> PointsOperationResponse;
        search_batch(SearchBatchPoints) -> SearchBatchResponse;
        search_groups(SearchPointGroups) -> SearchGroupsResponse;
        scroll(ScrollPoints) -> ScrollResponse;
        recommend(RecommendPoints) -> RecommendResponse;
        recommend_batch(RecommendBatchPoints) -> RecommendBatchResponse;
        recommend_groups(RecommendPointGroups) -> RecommendGroupsResponse;
        discover(DiscoverPoints) -> DiscoverResponse;
        discover_batch(DiscoverBatchPoints) -> DiscoverBatchResponse;
        count(CountPoints) -> CountResponse;
        update_batch(UpdateBatchPoints) -> UpdateBatchResponse;
        query(QueryPoints) -> QueryResponse;
        query_batch(QueryBatchPoints) -> QueryBatchResponse;
        query_groups(QueryPointGroups) -> QueryGroupsResponse;
        facet(FacetCounts) -> FacetResponse;
        search_matrix_pairs(SearchMatrixPoints) -> SearchMatrixPairsResponse;
        search_matrix_offsets(SearchMatrixPoints) -> SearchMatrixOffsetsResponse;
    }
}

impl Service {
    fn known(&self, collection: &str) -> Result<(), Status> {
        if self.collections.lock().contains(collection) {
            Ok(())
        } else {
            Err(Status::not_found(format!("collection `{collection}` does not exist")))
        }
    }
}

fn check_config(request: &q::CreateCollection) -> Result<(), Status> {
    use q::vectors_config::Config;
    let params = match request.vectors_config.as_ref().and_then(|config| config.config.as_ref()) {
        Some(Config::Params(params)) => params,
        _ => return Err(Status::invalid_argument("expected the parameters of one unnamed vector")),
    };
    if params.size != DIMENSIONS as u64 || params.distance() != q::Distance::Cosine {
        return Err(Status::invalid_argument(format!("expected cosine and {DIMENSIONS} dimensions")));
    }
    Ok(())
}

fn point_of(point: q::PointStruct) -> Result<Point, Status> {
    let text = |name: &str| match point.payload.get(name).and_then(|value| value.kind.as_ref()) {
        Some(q::value::Kind::StringValue(text)) => Ok(text.clone()),
        _ => Err(Status::invalid_argument(format!("payload `{name}` must be a text"))),
    };
    let decided_at_ms = match point.payload.get(DECIDED_AT_MS).and_then(|value| value.kind.as_ref()) {
        Some(q::value::Kind::IntegerValue(ms)) => *ms,
        _ => return Err(Status::invalid_argument("payload `decided_at_ms` must be an integer")),
    };
    let request_id = Uuid::parse_str(&text(REQUEST_ID)?)
        .map_err(|_| Status::invalid_argument("payload `request_id` must be a UUID"))?;
    Ok(Point { request_id, model: text(MODEL)?, decided_at_ms, vector: vector_of(point.vectors)? })
}

fn vector_of(vectors: Option<q::Vectors>) -> Result<Vec<f32>, Status> {
    use q::vectors::VectorsOptions;
    let one = match vectors.and_then(|vectors| vectors.vectors_options) {
        Some(VectorsOptions::Vector(vector)) => vector,
        _ => return Err(Status::invalid_argument("expected one unnamed vector")),
    };
    match one.vector {
        Some(q::vector::Vector::Dense(dense)) => Ok(dense.data),
        _ => Err(Status::invalid_argument("expected a dense vector")),
    }
}

fn scored(hit: Hit) -> q::ScoredPoint {
    let id = hit.request_id.to_string();
    q::ScoredPoint {
        id: Some(id.clone().into()),
        payload: HashMap::from([
            (REQUEST_ID.to_owned(), id.into()),
            (MODEL.to_owned(), hit.model.into()),
            (DECIDED_AT_MS.to_owned(), hit.decided_at_ms.into()),
        ]),
        score: hit.score,
        ..q::ScoredPoint::default()
    }
}

fn status(error: IndexError) -> Status {
    match error {
        IndexError::Vector(reason) => Status::invalid_argument(reason),
        other => unavailable(other),
    }
}

fn unavailable(error: IndexError) -> Status {
    Status::unavailable(error.to_string())
}
