//! One connection to the broker after another.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use infera_runtime::CancellationToken;
use lapin::options::ConfirmSelectOptions;
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, Event};
use parking_lot::Mutex;

use super::{Shared, topology};
use crate::error::BusError;

/// Seconds between heartbeats, unless the address says otherwise: a broker that vanished without a
/// word is noticed after two of them.
const HEARTBEAT_SECS: u16 = 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
/// How often the connection's state is looked at, besides its events.
const WATCH: Duration = Duration::from_millis(500);

/// A connection on which the topology is declared.
pub(crate) struct Link {
    connection: Connection,
    /// Channels in confirm mode that wait for a message to publish.
    idle: Mutex<Vec<Channel>>,
    /// For transient messages, without confirms.
    pub transient: Channel,
    /// Cancelled by whoever finds the connection unusable: the supervisor makes a new one.
    pub broken: CancellationToken,
}

impl Link {
    pub fn healthy(&self) -> bool {
        let status = self.connection.status();
        !self.broken.is_cancelled() && status.connected() && !status.blocked()
    }

    pub async fn open_channel(&self) -> lapin::Result<Channel> {
        self.connection.create_channel().await
    }

    /// A channel in confirm mode for one message; give it back with [`Link::put_back`] after the confirm.
    pub async fn publisher(&self) -> lapin::Result<Channel> {
        let idle = self.idle.lock().pop();
        if let Some(channel) = idle.filter(|channel| channel.status().connected()) {
            return Ok(channel);
        }
        let channel = self.connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    }

    pub fn put_back(&self, channel: Channel) {
        self.idle.lock().push(channel);
    }

    /// Resolves when the connection is no longer usable.
    async fn lost(&self) {
        let mut events = self.connection.events_listener();
        loop {
            tokio::select! {
                () = self.broken.cancelled() => return,
                event = events.next() => match event {
                    Some(Event::Error(error)) => {
                        tracing::warn!(%error, "connection to the broker failed");
                        return;
                    }
                    Some(Event::ConnectionBlocked(reason)) => {
                        tracing::warn!(reason, "the broker takes no messages for now");
                    }
                    Some(_) => {}
                    None => return,
                },
                () = tokio::time::sleep(WATCH) => {
                    if !self.connection.status().connected() {
                        return;
                    }
                }
            }
        }
    }
}

/// Reads the broker's address.
pub(super) fn address(url: &str) -> Result<AMQPUri, BusError> {
    let mut uri: AMQPUri = url.parse().map_err(|reason| BusError::Url { reason })?;
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECS);
    Ok(uri)
}

/// Keeps a link until the bus is closed.
pub(super) async fn supervise(shared: &Arc<Shared>) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let connected = tokio::select! {
            () = shared.stop.cancelled() => return,
            connected = connect(shared) => connected,
        };
        match connected {
            Ok(link) => {
                tracing::info!(host = shared.uri.authority.host, "connected to the broker");
                let link = Arc::new(link);
                shared.link.send_replace(Some(link.clone()));
                let since = tokio::time::Instant::now();
                let stopping = tokio::select! {
                    () = shared.stop.cancelled() => true,
                    () = link.lost() => false,
                };
                link.broken.cancel();
                shared.link.send_replace(None);
                close(&link.connection).await;
                if stopping {
                    return;
                }
                // A link that breaks as soon as it is made is not retried at full speed.
                if since.elapsed() > LAST_BACKOFF {
                    backoff = FIRST_BACKOFF;
                }
            }
            Err(reason) => {
                tracing::warn!(
                    reason,
                    host = shared.uri.authority.host,
                    "broker is not reachable, trying again"
                );
            }
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(backoff) => backoff = (backoff * 2).min(LAST_BACKOFF),
        }
    }
}

async fn connect(shared: &Shared) -> Result<Link, String> {
    let properties = ConnectionProperties::default().with_connection_name("infera".into());
    let connecting = Connection::connect_uri(shared.uri.clone(), properties);
    let connection = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| "no answer in 10 seconds".to_owned())?
        .map_err(|error| error.to_string())?;
    let transient = connection.create_channel().await.map_err(|error| error.to_string())?;
    let link = Link { connection, idle: Mutex::default(), transient, broken: CancellationToken::new() };
    let declared = shared.declared.read().clone();
    for known in &declared {
        topology::declare(&link, &shared.names, known).await.map_err(|error| error.to_string())?;
    }
    Ok(link)
}

async fn close(connection: &Connection) {
    if connection.status().connected() {
        let closing = connection.close(200, "goodbye".into());
        // What was not said in time is redelivered or published again.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closing).await;
    }
}
