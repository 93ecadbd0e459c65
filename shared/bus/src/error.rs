use uuid::Uuid;

/// Why the bus did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// No queue receives this routing key. Declare the topology before publishing.
    #[error("no queue receives `{routing_key}`: declare the topology first")]
    Unroutable { routing_key: String },
    /// The queue is not part of the declared topology.
    #[error("queue `{queue}` is not declared: declare the topology first")]
    UnknownQueue { queue: String },
    /// The body exceeds the limit of a message on the bus.
    #[error("message {id} has {bytes} bytes, the limit is {limit}")]
    TooLarge { id: Uuid, bytes: usize, limit: usize },
    /// A queue's name does not fit.
    #[error("`{name}` is too long for a queue: at most {limit} bytes with prefix and suffix")]
    Name { name: String, limit: usize },
    /// The message was delivered to somebody else meanwhile (its subscription closed, or the
    /// connection to the broker was lost): it is, or will be, redelivered.
    #[error("the delivery is no longer ours: it is redelivered")]
    Stale,
    /// The bus was closed.
    #[error("the bus is closed")]
    Closed,
    /// The broker's address cannot be read.
    #[error("bus_url is not usable: {reason}; use amqp://USER:PASSWORD@HOST:PORT/VHOST")]
    Url { reason: String },
    /// The broker refused a declaration, for example because a queue exists with other arguments.
    #[error("the broker refused the topology: {reason}")]
    Refused { reason: String },
    /// The thread that talks to the broker could not be started.
    #[error("the bus cannot start: {0}")]
    Start(#[from] std::io::Error),
}
