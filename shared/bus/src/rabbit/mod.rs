//! The bus over RabbitMQ.
//!
//! One thread of its own runs a small tokio runtime with the connection's supervisor, the pumps of
//! the subscriptions and the transient publisher, so that a service's busy thread never delays a
//! heartbeat. lapin does not come back after a broker's restart, so the supervisor does: connect,
//! redeclare, offer the new link; publishers repeat what was not confirmed and pumps subscribe again.
//!
//! A publish takes a channel of its own from a pool until it is confirmed. lapin hands a returned
//! message to whichever confirm comes next on the channel, so with one message per channel a return
//! can't be taken for another's; many channels make the pipeline.

mod link;
mod message;
mod publish;
mod subscribe;
mod topology;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use infera_runtime::CancellationToken;
use infera_wire::topology::Topology;
use lapin::uri::AMQPUri;
use parking_lot::RwLock;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::DropGuard;

use crate::bus::Envelope;
use crate::error::BusError;
use link::Link;
pub(crate) use subscribe::{Subscription, Ticket};

/// Messages published and not yet confirmed, at most; so many channels are used for publishing.
const WINDOW: usize = 128;
/// Longest prefix, bytes: leaves room for the names behind it.
const MAX_PREFIX: usize = 100;
/// Transient messages that wait for the connection to take them, at most.
const TRANSIENT_WINDOW: usize = 4096;

/// The adapter; clones share one connection, which ends with the last of them and of what they
/// gave out.
#[derive(Debug, Clone)]
pub(crate) struct Rabbit {
    shared: Arc<Shared>,
    _ends_with_the_last: Arc<DropGuard>,
}

pub(crate) struct Shared {
    names: Names,
    uri: AMQPUri,
    /// The thread's runtime.
    runtime: Handle,
    /// What this process declared; declared again on every connection.
    declared: RwLock<Vec<Topology>>,
    link: watch::Sender<Option<Arc<Link>>>,
    window: Semaphore,
    transient: mpsc::Sender<(String, Envelope)>,
    dropped: AtomicU64,
    stop: CancellationToken,
    finished: CancellationToken,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address may hold a password.
        f.debug_struct("Rabbit")
            .field("prefix", &self.names.prefix)
            .field("host", &self.uri.authority.host)
            .finish_non_exhaustive()
    }
}

/// Names on the broker.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn bare<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(&self.prefix).unwrap_or(name)
    }
}

impl Rabbit {
    pub fn start(url: &str, prefix: &str) -> Result<Self, BusError> {
        let uri = link::address(url)?;
        if prefix.len() > MAX_PREFIX {
            return Err(BusError::Name { name: prefix.to_owned(), limit: MAX_PREFIX });
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (transient, transient_jobs) = mpsc::channel(TRANSIENT_WINDOW);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            names: Names { prefix: prefix.to_owned() },
            uri,
            runtime: runtime.handle().clone(),
            declared: RwLock::default(),
            link: watch::Sender::new(None),
            window: Semaphore::new(WINDOW),
            transient,
            dropped: AtomicU64::new(0),
            stop: stop.clone(),
            finished: CancellationToken::new(),
        });
        let of_thread = shared.clone();
        std::thread::Builder::new().name("infera-bus".to_owned()).spawn(move || {
            let _finished = of_thread.finished.clone().drop_guard();
            runtime.block_on(async {
                tokio::spawn(publish::run_transient(of_thread.clone(), transient_jobs));
                link::supervise(&of_thread).await;
            });
        })?;
        Ok(Self { shared, _ends_with_the_last: Arc::new(stop.drop_guard()) })
    }

    pub async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        loop {
            let link = self.shared.link().await?;
            match topology::declare(&link, &self.shared.names, topology).await {
                Ok(()) => break,
                Err(error) if topology::is_refusal(&error) => {
                    return Err(BusError::Refused { reason: error.to_string() });
                }
                Err(error) => {
                    tracing::warn!(%error, "topology not declared, trying again");
                    link.broken.cancel();
                }
            }
        }
        let mut declared = self.shared.declared.write();
        if !declared.contains(topology) {
            declared.push(topology.clone());
        }
        Ok(())
    }

    /// Dead letters on the broker that nobody holds.
    pub async fn dead_letters(&self) -> Result<u64, BusError> {
        loop {
            let link = self.shared.link().await?;
            let queue = self.shared.names.full(self.shared.dead_letters());
            match topology::depth(&link, &queue).await {
                Ok(depth) => return Ok(depth),
                Err(error) => {
                    tracing::debug!(%error, "dead letters not counted, trying again");
                    link.broken.cancel();
                }
            }
        }
    }

    pub async fn subscribe_dead(&self, prefetch: u16) -> Result<Subscription, BusError> {
        self.subscribe(self.shared.dead_letters(), prefetch).await
    }

    pub fn healthy(&self) -> bool {
        let link = self.shared.link.borrow();
        link.as_ref().is_some_and(|link| link.healthy())
    }

    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    pub async fn close(&self) {
        self.shared.stop.cancel();
        self.shared.finished.cancelled().await;
    }
}

impl Shared {
    /// The present link; waits for one.
    async fn link(&self) -> Result<Arc<Link>, BusError> {
        let mut changes = self.link.subscribe();
        loop {
            let present = changes.borrow_and_update().clone();
            if let Some(link) = present.filter(|link| !link.broken.is_cancelled()) {
                return Ok(link);
            }
            tokio::select! {
                () = self.stop.cancelled() => return Err(BusError::Closed),
                changed = changes.changed() => changed.map_err(|_| BusError::Closed)?,
            }
        }
    }

    fn drop_transient(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Durable queues that this process declared, with their delivery limits.
    fn delivery_limits(&self) -> HashMap<&'static str, u32> {
        let declared = self.declared.read();
        declared
            .iter()
            .flat_map(|topology| {
                let queues = topology.queues.iter();
                queues
                    .map(|binding| (binding.queue, topology.delivery_limit))
                    .chain([(topology.dead_letters, u32::MAX)])
            })
            .collect()
    }

    /// The exchange whose durable queues receive the key.
    fn exchange_of(&self, routing_key: &str) -> Option<&'static str> {
        let declared = self.declared.read();
        let bound = declared.iter().find(|topology| {
            let mut queues = topology.queues.iter();
            queues.any(|binding| infera_wire::topology::matches(binding.pattern, routing_key))
        });
        bound.map(|topology| topology.exchange)
    }

    /// The exchange for keys without durable queues.
    fn any_exchange(&self) -> &'static str {
        let declared = self.declared.read();
        declared.first().map_or(infera_wire::topology::EXCHANGE, |topology| topology.exchange)
    }

    fn dead_letters(&self) -> &'static str {
        let declared = self.declared.read();
        declared.first().map_or(infera_wire::topology::DEAD_LETTERS, |topology| topology.dead_letters)
    }
}
