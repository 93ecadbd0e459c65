//! The gateway through its real adapters: every test of `both!` runs on SQLite with the in-process bus and
//! on PostgreSQL with RabbitMQ and Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

/// Runs `async fn name(column: Column)` on both columns of the ports table.
macro_rules! both {
    ($($name:ident),+ $(,)?) => {
        mod embedded {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::support::Column::Embedded).await;
            })+
        }
        mod cluster {
            $(#[tokio::test]
            async fn $name() {
                super::$name($crate::support::Column::Cluster).await;
            })+
        }
    };
}

mod accounts;
mod answers;
mod bad_input;
mod books;
mod crash;
mod forms;
mod idempotency;
mod keys;
mod models;
mod openai_client;
mod quotes;
mod sign_in;
mod sse;
mod streams;
mod support;
mod wallet;
