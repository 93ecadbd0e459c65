//! The mempool on real adapters: in process with SQLite, and on RabbitMQ with PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod crashes;
mod requests;
mod world;
