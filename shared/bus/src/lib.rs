//! The bus: what one service says and another must hear, once it is said.
//!
//! ```text
//!  transaction {state, outbox} -> Relay -> Bus -> queue -> consume -> transaction {inbox, state, outbox} -> ack
//! ```
//!
//! Promises:
//! - A message published with [`Bus::publish`] is delivered to every durable queue bound to its key
//!   until it is acked there: at least once. [`inbox`] makes that once per transaction.
//! - A message written with [`outbox::enqueue`] is published if and only if its transaction
//!   commits, also when the process dies at any point afterwards.
//! - Nothing stops a consumer: what cannot be processed goes to `infera.dead` with its content.
//!
//! Two adapters behind [`Bus`]. RabbitMQ: quorum queues, publisher confirms, own reconnect loop.
//! In process: queues in memory whose confirm is the consumer's ack, so that the publisher's outbox
//! keeps the message until it is processed. A message is delivered at most
//! `Topology::delivery_limit + 1` times on both.
//!
//! [`watch`] tells `/readyz` and `/metrics` how bus, outbox and database stand; [`dead`] looks at dead letters and puts them
//! back.
//!
//! Transient messages (slot reports, text deltas) are at most once: [`Bus::publish_transient`] never
//! waits, and what does not fit is dropped and counted in [`Bus::dropped`].

mod bus;
mod consume;
pub mod dead;
mod delivery;
mod error;
pub mod inbox;
mod memory;
pub mod outbox;
mod rabbit;
pub mod service;
pub mod watch;

pub use bus::{Bus, Envelope, Limits};
pub use consume::{ConsumerSpec, Reject, consume, consume_then};
pub use delivery::{DeadLetter, Delivery, Subscription};
pub use error::BusError;
pub use infera_wire::topology::{QueueBinding, Topology};
