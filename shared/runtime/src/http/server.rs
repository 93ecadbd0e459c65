//! The server itself.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use actix_web::body::BoxBody;
use actix_web::dev::{ServiceFactory, ServiceRequest, ServiceResponse};
use actix_web::middleware::from_fn;
use actix_web::web::ServiceConfig;
use actix_web::{App, Error, HttpServer};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Threads that parse and route; the work itself is elsewhere.
const WORKERS: usize = 2;
/// Seconds that open connections have to finish once the token is cancelled.
const SHUTDOWN_SECS: u64 = 10;
/// A client that has not sent its head by then is cut off.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than the usual 60 s of load balancers, so that they close idle connections and not we.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// Why the server does not run, one sentence each.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Somebody else listens there.
    #[error(
        "the address {bind} is already taken: stop the process that uses it, or set http_bind to another port"
    )]
    Taken { bind: String },
    /// The address is malformed, not ours, or not allowed.
    #[error(
        "cannot listen on {bind}: {source}; http_bind must be ADDRESS:PORT of this machine, as 127.0.0.1:8080"
    )]
    Bind { bind: String, source: io::Error },
    /// The running server broke.
    #[error("the http server stopped: {0}")]
    Serve(io::Error),
}

/// The app that [`serve`] runs, for tests that need no socket.
pub fn app<F>(
    factory: F,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<BoxBody>,
        Error = Error,
        InitError = (),
    >,
>
where
    F: FnOnce(&mut ServiceConfig),
{
    App::new().configure(factory).wrap(from_fn(super::request_id))
}

/// Serves HTTP on `bind` (`ADDRESS:PORT`, port 0 takes a free one) until `shutdown` is cancelled and open
/// requests are answered or [`SHUTDOWN_SECS`] are over. `bound` gets the address once it listens.
///
/// `factory` adds routes and data; it runs once per worker. Must be awaited inside an actix System.
///
/// # Errors
/// [`HttpError`].
pub async fn serve<F>(
    factory: F,
    bind: &str,
    shutdown: CancellationToken,
    bound: Option<oneshot::Sender<SocketAddr>>,
) -> Result<(), HttpError>
where
    F: Fn(&mut ServiceConfig) + Clone + Send + 'static,
{
    let server = HttpServer::new(move || app(factory.clone()))
        .disable_signals()
        .tcp_nodelay(true)
        // A client that closes its side has left: its handler is dropped, and notices.
        .h1_allow_half_closed(false)
        .workers(WORKERS)
        .shutdown_timeout(SHUTDOWN_SECS)
        .client_request_timeout(HEAD_TIMEOUT)
        .keep_alive(KEEP_ALIVE)
        .bind(bind)
        .map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => HttpError::Taken { bind: bind.to_owned() },
            _ => HttpError::Bind { bind: bind.to_owned(), source },
        })?;
    let addresses = server.addrs();
    let running = server.run();
    let handle = running.handle();
    if let (Some(bound), Some(address)) = (bound, addresses.first()) {
        // Nobody waits any more: the service was cancelled while it started.
        let _ = bound.send(*address);
    }
    tracing::info!(?addresses, "http server listens");
    let stopper = actix_web::rt::spawn(async move {
        shutdown.cancelled().await;
        handle.stop(true).await;
    });
    let result = running.await.map_err(HttpError::Serve);
    stopper.abort();
    result
}
