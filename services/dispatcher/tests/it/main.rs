//! The dispatcher on real adapters, with nodes that speak the real protocol: in process with SQLite, and on
//! RabbitMQ, PostgreSQL and Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod crashes;
mod requests;
mod sessions;
mod trust;
mod world;
